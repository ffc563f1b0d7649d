"""One run in its folder: begun or gone on with, trained, validated, and stopped where asked."""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Optional

import keras
import numpy as np

from effnet_repro.classes import match_run
from effnet_repro.config import case_to_dict
from effnet_repro.data import DataSet, update_pictures
from effnet_repro.efficientnet import build_model, get_weights, set_weights
from effnet_repro.network import segments
from effnet_repro.recipe import steps_per_epoch, total_updates, trained_segments
from effnet_repro.runs import (
    Course,
    Recorder,
    Run,
    Scores,
    Stopped,
    StopSignals,
    data_notes,
    lock_folder,
    measured_data,
    say_scores,
    write_json,
    write_scores,
)
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.decoding import settle_decoder
from effnet_repro.training.device import choose_precision, environment
from effnet_repro.training.estimation import say_estimate
from effnet_repro.training.evaluation import Evaluator
from effnet_repro.training.state import restore_state, training_state
from effnet_repro.training.step import Program, TrainingModel, use_devices
from effnet_repro.training.stream import explain_failures, updates
from effnet_repro.training.watch import Events, StepWatch, show_epoch


def make_program(case, data, precision, seed):
    spec = ModelSpec.from_case(case, num_classes=data.num_classes)
    trained = trained_segments([s.name for s in segments(spec)], case.variable_filter)
    return Program(case, spec, trained, choose_precision(precision), seed)


def spans(first, last, per_epoch):
    "Cut the updates from `first` to `last` into calls of fit: (first epoch, end epoch, updates an epoch)"
    spans, at = [], first
    while at < last:
        epoch, inside = divmod(at, per_epoch)
        whole = (last - at) // per_epoch if inside == 0 else 0
        steps = per_epoch if whole else min(per_epoch - inside, last - at)
        spans.append((epoch, epoch + max(whole, 1), steps))
        at += steps * max(whole, 1)
    return spans


class Parts(NamedTuple):
    "What the functions of a run share"

    model: TrainingModel
    evaluator: Evaluator
    data: DataSet
    recorder: Recorder
    stop: StopSignals
    events: Events

    def measure(self, averaged=None) -> Scores:  # `averaged`: weights in place of the model's own
        case = self.model.program.case
        weights = {**get_weights(self.model.network), **(averaged or {})}
        how = dict(image_resize=case.image_resize, between=self.stop.check)
        return self.evaluator.evaluate(weights, self.data, case.image_size, **how)

    def sync(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()

    def end_epoch(self):
        self.sync()
        row = self.recorder.end_epoch(training_state(self.model), self.measure)
        show_epoch(self.recorder, row, self.events)


def _fit(parts, progress):
    "Run the updates that are left"
    model, recorder, case = parts.model, parts.recorder, parts.model.program.case
    coming = lambda: range(recorder.step, recorder.step + 4)  # read, but not yet used
    order = lambda u: update_pictures(parts.data, case.global_batch_size, u, model.program.seed)
    due = lambda: np.concatenate([order(u) for u in coming()])
    doing = lambda: (
        f"micro_batch_size={case.micro_batch_size} at {case.image_size} pixels: use less"
    )
    loop = StepWatch(recorder, parts.stop, parts.end_epoch, progress)
    course = recorder.course
    try:
        with explain_failures(parts.data, "train", due, doing):
            for begin, end, steps in spans(recorder.step, course.last_step, course.steps_per_epoch):
                stream = updates(case, parts.data, model.program.seed, recorder.step)
                how = dict(initial_epoch=begin, epochs=end, steps_per_epoch=steps)
                model.fit(stream, callbacks=[loop], verbose=0, shuffle=False, **how)
    finally:
        loop.close()


def _stop_here(parts):
    "Save what was trained since the last checkpoint, and say so"
    recorder = parts.recorder
    parts.sync()
    recorder.stop(lambda: training_state(parts.model))
    where = f", saved {recorder.newest.name}" if recorder.newest else ": nothing to save"
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"stopped after update {recorder.step}{where}", flush=True)


@dataclass(frozen=True)
class Options:
    "How a run is done, whatever its case"

    seed: int = 0  # Of weights, order, crops, mixing and masks
    precision: str = "auto"  # Type to compute in
    validate_every: Optional[int] = 1  # Epochs; 0 = only at the end, None = never
    keep: int = 2  # Checkpoints, >= 1
    progress: bool = True  # Whether to draw a progress bar


def execute(case, data, run_dir, weights, options, notes):
    "Train `case` in `run_dir`, from its newest checkpoint, from `weights`, or from scratch"
    run_dir = Path(run_dir)
    data = settle_decoder(match_run(run_dir, data), run_dir)
    program = make_program(case, data, options.precision, options.seed)
    per_epoch = data.train_count // case.global_batch_size
    if per_epoch == 0:
        raise ValueError(
            f"global_batch_size={case.global_batch_size} exceeds the {data.train_count} training pictures in "
            f"{data.root}. Use a smaller global_batch_size."
        )
    _check(options)
    if not data.validation_count:
        print(f"no validation pictures in {data.root}: the accuracy is not measured", flush=True)
        options = replace(options, validate_every=None)
    with lock_folder(run_dir), use_devices(case):
        return _execute_alone(program, data, run_dir, weights, per_epoch, options, notes)


def _check(options):
    every = options.validate_every
    for name, value, lowest in (
        ("seed", options.seed, 0),
        ("keep", options.keep, 1),
        ("validate_every", 0 if every is None else every, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
            raise ValueError(
                f"`{name}` must be a whole number from {lowest} to 2**31 - 1. Received: {name}={value!r}."
            )


def _execute_alone(program, data, run_dir, weights, per_epoch, options, notes):
    "The run itself, once it has the folder to itself"
    case = program.case
    schedule = steps_per_epoch(case, data.train_count)
    last = min(total_updates(case, schedule), case.max_steps or sys.maxsize)
    recorder = Recorder(
        run_dir,
        Course(case, per_epoch, last, options.validate_every, options.keep, schedule),
        _facts(program, data),
        len(data.damaged),
    )
    with StopSignals() as stop:
        evaluator = Evaluator(program.spec, program.precision)
        model, events = _build(program, weights), Events(run_dir / "events")
        parts = Parts(model, evaluator, data, recorder, stop, events)
        try:
            _begin(parts, notes)
            _fit(parts, options.progress)
            scores = {} if options.validate_every is None else _final_scores(parts)
            finished = True
        except Stopped:
            _stop_here(parts)
            scores, finished = {}, False
    average = recorder.folder / "average.safetensors"
    return Run(run_dir, case, recorder.step, finished, recorder.newest, average, scores)


def _build(program, weights):
    "The network of a run, with these weights or fresh ones, as a model that trains"
    network = build_model(
        program.spec, image_size=program.case.image_size, dtype="float32", seed=program.seed
    )
    if weights is not None:
        set_weights(network, weights)
    return TrainingModel(network, program)


def _facts(program, data):
    "What every checkpoint of a run says of it"
    return {
        "case": case_to_dict(program.case),
        "num_classes": program.spec.num_classes,
        "seed": program.seed,
        "precision": program.precision,
        **data_notes(data),
    }


def _begin(parts, notes):
    "Go on from the newest checkpoint, if there is one, and describe what is still to be done"
    recorder, program = parts.recorder, parts.model.program
    found = recorder.find()
    if found is not None:
        restore_state(found, parts.model, parts.data)
    recorder.resume(found)
    if recorder.step < recorder.course.last_step:
        _describe_run(recorder.run_dir, program, parts.data, notes)
        say_estimate(program.case, parts.data)
    parts.stop.check()
    row = recorder.complete_row(parts.measure)
    if recorder.last_scores is not None:
        show_epoch(recorder, row, parts.events)


def _final_scores(parts):
    "Validate the last weights, if that was not just done, and the averaged ones; write both down"
    recorder, average = parts.recorder, parts.recorder.average
    scores = {"last": recorder.last_scores or parts.measure()}
    if average.count:
        scores["average"] = parts.measure(average.arrays())
    at, place = {"last": recorder.step, "average": average.last_update}, measured_data(parts.data)
    for kind, s in scores.items():
        say_scores(kind, s)
        write_scores(recorder.run_dir, kind, s, at[kind], place, in_any_case=True)
    return scores


def _describe_run(run_dir, program, data, notes):
    config = {
        "case": case_to_dict(program.case),
        "num_classes": program.spec.num_classes,
        "seed": program.seed,
        "precision": program.precision,
        "backend": keras.backend.backend(),
        "decoder": data.decoder,
        "data": {"root": data.root, "format": data.format, "builtin": data.builtin},
        "skipped_pictures": list(data.damaged),
        "pictures": {"train": data.train_count, "validation": data.validation_count},
        "data_fingerprint": data.fingerprint,
        **notes,
    }
    write_json(run_dir / "config.json", config)
    write_json(run_dir / "environment.json", environment())
