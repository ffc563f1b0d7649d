"""Train a case on IPUs, or fine-tune a trained network there: what a user calls, and the run between."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence, Union

import numpy as np

from effnet_repro import averaging
from effnet_repro import checkpoint as checkpoints
from effnet_repro.classes import match_classes, match_run
from effnet_repro.config import Case, case_from_dict, case_to_dict, get_case, say_earlier
from effnet_repro.data import open_data, training_batches
from effnet_repro.ipu.feed import element_stream
from effnet_repro.ipu.layout import (
    DEVICE_LOOP,
    finetune_layout,
    ipus_per_replica,
    machine_options,
    resolve_for_ipus,
)
from effnet_repro.ipu.poprun import broadcast, count_ipus, gather
from effnet_repro.ipu.program import TrainingProgram, get_state, set_state
from effnet_repro.ipu.sdk import Graphcore, configure, describe_tensorflow
from effnet_repro.ipu.validation import validate
from effnet_repro.network import check_matches, drop_statistics, initial_weights, params
from effnet_repro.recipe import learning_rate, steps_per_epoch, total_updates
from effnet_repro.runs import (
    Course,
    Recorder,
    Run,
    Stopped,
    StopSignals,
    check_init,
    data_notes,
    describe_epoch,
    describe_machine,
    finetune_case,
    finetune_size,
    lock_folder,
    refuse_other_run,
    save_curves,
    say_scores,
    settle_case,
    write_json,
)
from effnet_repro.scaling import ModelSpec


@dataclass(frozen=True)
class Options:
    """How a run is done, whatever its case."""

    seed: int = 0  # Of weights, order, crops, mixing and masks
    keep: int = 2  # Checkpoints, >= 1
    connection: str = "ALWAYS"  # or "ON_DEMAND", or "PRE_COMPILE": compile and stop


def train(
    case: Union[str, Case],  # A published name or a case
    data_dir=None,  # Folder of pictures; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    *,
    ipus: Optional[int] = None,  # IPUs over all processes; None = poprun's, or 16
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": see `config.budget_overrides`
    seed: int = 0,  # Of weights, order, crops, mixing and masks
    data_format: Optional[str] = None,  # "tfrecord", "folder" or "cifar"; None = see the files
    init=None,  # Run folder or checkpoint to begin from; None = fresh weights
    weights: str = "auto",  # Of `init`: "last", "average", "auto" = the average after a long run
    validation: bool = True,  # Validate at the end; under poprun a process of its own does that
    keep: int = 2,  # Checkpoints to keep, >= 1
    on_corrupt: str = "refuse",  # or "skip": leave damaged pictures out, see `open_data`
    connection: str = "ALWAYS",  # or "ON_DEMAND", or "PRE_COMPILE": compile and stop
    **overrides,  # Fields of the case; None means what the case says
) -> Run:
    """Train a `case` on IPUs, or go on with it when `run_dir` holds a checkpoint.

    The case keeps its published layout on as many IPUs as there are. Raises ImportError without Graphcore's TensorFlow,
    and ValueError where case, data or weights do not fit each other.
    """
    graphcore, data = Graphcore(), open_data(data_dir, data_format, on_corrupt=on_corrupt)
    start = get_case(case) if isinstance(case, str) else case
    ipus = count_ipus(graphcore, ipus_per_replica(start.num_stages), ipus)
    resolved = resolve_for_ipus(start, ipus, budget, data_dir is not None, **overrides)
    run_dir, notes, arrays = Path(run_dir or Path("runs") / start.name), {"kind": "train"}, None
    named = [name for name, value in overrides.items() if value is not None]
    resolved = settle_case(run_dir, resolved, DEVICE_LOOP, named)
    if init is not None:
        arrays, metadata, source = averaging.load_weights(init, weights)
        arrays = drop_statistics(arrays, print)
        data = match_classes(source, metadata, data)
        check_init(source, metadata, data, resolved)
        notes["init"] = str(source)
    options = Options(seed, keep, connection)
    done = _execute(graphcore, resolved, data, run_dir, arrays, options, notes)
    how = dict(ipus=ipus, data_format=data_format, on_corrupt=on_corrupt)
    return _with_scores(done, data_dir, how) if validation and graphcore.popdist is None else done


def finetune(
    init,  # A run folder or a checkpoint to begin from
    data_dir=None,  # Folder of pictures; None = the built-in sample set
    run_dir=None,  # None = <run folder of init>/finetune-<image size>
    *,
    ipus: Optional[int] = None,  # IPUs over all processes, each a replica
    image_size: Optional[int] = None,  # Side to fine-tune at; None = see `runs.finetune_size`
    variable_filter: Sequence[str] = ("Top",),  # e.g. ("Top", "block7", "block6")
    protocol: str = "published",  # or "clean"
    weights: str = "auto",  # "last", "average", "auto" = the average after a long run
    seed: int = 0,
    data_format: Optional[str] = None,
    validation: bool = True,
    keep: int = 2,
    on_corrupt: str = "refuse",
    connection: str = "ALWAYS",
    micro_batch_size: Optional[int] = None,  # Pictures of an IPU at a time
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Run:
    """Train the last layers of a trained network a little more, on single IPUs: see `finetune_layout`.

    Raises ImportError without Graphcore's TensorFlow, and ValueError where weights and data do not fit each other.
    """
    graphcore, data = Graphcore(), open_data(data_dir, data_format, on_corrupt=on_corrupt)
    arrays, metadata, source = averaging.load_weights(init, weights)
    arrays = drop_statistics(arrays, print)
    trained, ipus = case_from_dict(metadata["case"]), count_ipus(graphcore, 1, ipus)
    say_earlier(source, metadata["case"])
    data = match_classes(source, metadata, data)
    check_init(source, metadata, data, trained)
    size = image_size or finetune_size(trained)
    case = finetune_case(trained, size, protocol, variable_filter, **overrides)
    case = finetune_layout(case, ipus, micro_batch_size)
    folder = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    run_dir = Path(run_dir or folder / f"finetune-{size}")
    named = [name for name, value in overrides.items() if value is not None]
    case = settle_case(run_dir, case, DEVICE_LOOP, named)
    notes = {"kind": "finetune", "init": str(source), "protocol": protocol}
    options = Options(seed, keep, connection)
    done = _execute(graphcore, case, data, run_dir, arrays, options, notes)
    how = dict(ipus=ipus, data_format=data_format, on_corrupt=on_corrupt)
    return _with_scores(done, data_dir, how) if validation and graphcore.popdist is None else done


def _with_scores(done, data_dir, how):
    "A run with what `validate` says of it, when it came to its end"
    if not done.finished:
        return done
    scores = validate(done.run_dir, data_dir, **how)
    for name, found in scores.items():
        say_scores(name, found)
    return done._replace(scores=scores)


def _execute(graphcore, case, data, run_dir, weights, options, notes):
    "Train `case` in `run_dir`, which the first process holds for this run"
    writes = graphcore.instances[0] == 0 and options.connection != "PRE_COMPILE"
    with lock_folder(run_dir) if writes else contextlib.nullcontext():
        return _execute_alone(graphcore, case, data, run_dir, weights, options, notes)


def _execute_alone(graphcore, case, data, run_dir, weights, options, notes):
    "The run itself, once it has the folder to itself"
    data = match_run(run_dir, data)
    spec = ModelSpec.from_case(case, num_classes=data.num_classes)
    per_replica = ipus_per_replica(case.num_stages)
    per_epoch, shard = data.train_count // case.global_batch_size, graphcore.instances
    if per_epoch == 0:
        raise ValueError(
            f"global_batch_size={case.global_batch_size} exceeds the {data.train_count} training pictures in "
            f"{data.root}. Use a smaller global_batch_size."
        )
    schedule = steps_per_epoch(case, data.train_count)
    last = min(total_updates(case, schedule), case.max_steps or sys.maxsize)
    course = Course(case, per_epoch, last, keep=options.keep, schedule=schedule)
    recorder = Recorder(run_dir, course, _facts(case, data, options.seed), len(data.damaged), shard)
    recorder.writes &= options.connection != "PRE_COMPILE"
    found = recorder.find()
    if found is not None:
        refuse_other_run(found[0], found[2], data, case, options.seed)
    recorder.resume(found)
    average, first = recorder.folder / "average.safetensors", recorder.step
    if first >= last:
        return Run(run_dir, case, first, True, recorder.newest, average, {})
    local = case.num_replicas // shard[1] * per_replica
    settings = machine_options(case, None if graphcore.popdist else local, options.connection)
    configure(graphcore, settings, per_replica)
    if case.stochastic_rounding:  # 16-bit weights must round alike in every replica
        alike = dict(experimental_identical_replicas=case.precision == "16.16")
        graphcore.ipu.utils.reset_ipu_seed(options.seed, **alike)

    def dataset():
        how = dict(seed=options.seed, first_update=first, area_min=case.crop_area_min, shard=shard)
        how.update(preprocessing=case.train_preprocessing, image_resize=case.image_resize)
        pictures = training_batches(data, case.image_size, case.global_batch_size, **how)
        return element_stream(case, spec, pictures, options.seed, first, shard)

    program = TrainingProgram(graphcore, case, spec, dataset)
    if options.connection == "PRE_COMPILE":
        set_state(program, weights or initial_weights(spec, options.seed))
        program.run(0.0)
        print(f"{case.name}: compiled; nothing was run", flush=True)
        return Run(run_dir, case, 0, False, None, None, {})
    with StopSignals() as stop:
        host = _Host(program, recorder, stop)
        _begin(host, found, weights)
        _describe_run(recorder, data, notes)
        try:
            _fit(host)
            finished = True
        except Stopped:
            host.stop_here()
            finished = False
    program.close()
    return Run(run_dir, case, recorder.step, finished, recorder.newest, average, {})


def _facts(case, data, seed):
    "What every checkpoint of a run says of it"
    return {
        "case": case_to_dict(case),
        "num_classes": data.num_classes,
        "seed": seed,
        "precision": case.precision,
        **data_notes(data),
    }


def _describe_run(recorder, data, notes):
    "Write config.json and environment.json"
    if not recorder.writes:
        return
    case = recorder.course.case
    config = {
        "case": case_to_dict(case),
        "num_classes": data.num_classes,
        "seed": recorder.facts["seed"],
        "precision": case.precision,
        "backend": "graphcore",
        "data": {"root": data.root, "format": data.format, "builtin": data.builtin},
        "pictures": {"train": data.train_count, "validation": data.validation_count},
        **notes,
    }
    write_json(recorder.run_dir / "config.json", config)
    ipus = case.num_replicas * ipus_per_replica(case.num_stages)
    machine = describe_machine("graphcore", f"{ipus} IPUs, {describe_tensorflow()}")
    write_json(recorder.run_dir / "environment.json", machine)


def _begin(host, found, weights):
    "Give a program its state: the newest checkpoint, or these weights"
    graphcore, spec = host.graphcore, host.program.spec
    arrays = found[1] if found else weights or initial_weights(spec, host.recorder.facts["seed"])
    arrays = {n: w for n, w in arrays.items() if not n.startswith(checkpoints.AVERAGE)}
    check_matches({n: w for n, w in arrays.items() if not n.startswith("slots/")}, params(spec))
    set_state(host.program, arrays)
    if graphcore.popdist is None:
        return
    state = {**get_state(host.program), "update": np.int32(host.recorder.step)}
    state = broadcast(graphcore, state)
    if int(state.pop("update")) != host.recorder.step:
        raise RuntimeError(
            f"{host.recorder.run_dir}: processes see different checkpoints. Use one shared folder."
        )
    set_state(host.program, state)


class _Host:
    "The host's side of a training: what the first process writes down, and requests to stop"

    def __init__(self, program, recorder, stop):
        self.program, self.recorder, self.stop = program, recorder, stop
        self.graphcore = program.graphcore

    def share_sums(self):
        "A process knows the loss of its own replicas: let all know all"
        meter = self.recorder.meter
        meter.share([sums for (sums,) in gather(self.graphcore, [meter.sums])])

    def end_epoch(self):
        self.share_sums()
        if not self.recorder.writes:
            self.recorder.meter.reset()
            return
        row = self.recorder.end_epoch(get_state(self.program))
        save_curves(self.recorder.run_dir)
        print(describe_epoch(row, self.recorder.course, self.recorder.newest), flush=True)

    def stop_here(self):
        "Save what was trained since the last checkpoint"
        recorder = self.recorder
        if not recorder.ends_epoch():
            self.share_sums()
        if recorder.writes:
            recorder.stop(lambda: get_state(self.program))
        print(f"stopped after update {recorder.step}", flush=True)


def _fit(host):
    "Run the updates that are left"
    recorder = host.recorder
    case, course = recorder.course.case, recorder.course
    while recorder.step < course.last_step:
        rate = learning_rate(case, recorder.step, course.schedule)
        loss, accuracy = host.program.run(rate)[0]
        recorder.step += 1
        recorder.count(float(loss), float(accuracy))
        recorder.meter.tick()
        stop = _anybody_stops(host, recorder.step)
        if recorder.ends_epoch():
            host.end_epoch()
        if stop and recorder.step < course.last_step:
            raise Stopped


def _anybody_stops(host, done):
    "Whether a process was asked to stop: then all do, after the same update; several ask now and then"
    if host.graphcore.popdist is not None and done % 16:
        return False
    asked = np.float32(host.stop.stop_requested)
    return any(part[0] for part in gather(host.graphcore, [asked]))
