"""The loop of every run: begin or resume, train, record, validate, and stop when asked.

`execute` runs a `Task` on a `Runtime`. It holds the folder's lock, finds the newest checkpoint and refuses one of
another run, and writes checkpoints, averages and rows through a `Recorder`. Nothing here knows what computes.
"""

import contextlib
import logging
import signal
import time
from collections import deque
from dataclasses import replace
from typing import Any, Callable, Dict, Optional

import numpy as np

from effnet_repro.checkpoint import AVERAGE
from effnet_repro.classes import match_run
from effnet_repro.messages import say
from effnet_repro.runs.folder import Run
from effnet_repro.runs.lock import check_places, lock_folder
from effnet_repro.runs.recorder import Recorder
from effnet_repro.runs.resume import refuse_other_run
from effnet_repro.runs.runtime import Runtime
from effnet_repro.runs.scores import Scores, measured_data, print_scores, write_scores
from effnet_repro.runs.signals import Stopped, StopSignals
from effnet_repro.runs.tables import write_json
from effnet_repro.runs.task import Task
from effnet_repro.runs.watch import ProgressBar, Watch

LOG = logging.getLogger(__name__)
#: Steps after which several processes agree whether to stop, where that is a message of its own.
AGREE_EVERY = 16


def execute(task: Task, runtime: Runtime) -> Run:
    """Train in the task's folder: from its newest checkpoint, from the task's weights, or from scratch.

    Returns when all steps are done, or when somebody asked to stop. Raises ValueError where the folder holds another
    run or a checkpoint that does not fit, RuntimeError where another process uses the folder, FloatingPointError where
    the loss is no longer finite.
    """
    first = runtime.process[0] == 0
    if first:
        check_places(task.run_dir)
    data = runtime.settle(match_run(task.run_dir, task.data, runtime.lead), task.run_dir)
    task = replace(task, data=data)
    if not data.validation_count and task.options.validate_every is not None:
        if first:
            where = f"no validation images in {data.root}"
            say(f"{where}: the accuracy is not measured")
        task = replace(task, options=replace(task.options, validate_every=None))
    course = task.course()
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(lock_folder(task.run_dir))
        facts, skipped = task.facts(runtime.precision), len(task.data.damaged)
        recorder = Recorder(task.run_dir, course, facts, skipped, runtime.process)
        leave = (
            (signal.SIGTERM,) if runtime.shares else ()
        )  # which a runtime of several processes sees
        unsaved = lambda: recorder.step != recorder.saved_step
        stop = stack.enter_context(StopSignals(leave=leave, unsaved=unsaved))
        stack.callback(runtime.close)
        return _Loop(task, runtime, recorder, stop).run()


class _Loop:
    """One run, once it has its folder to itself."""

    def __init__(self, task: Task, runtime: Runtime, recorder: Recorder, stop: StopSignals):
        self.task, self.runtime, self.recorder, self.stop = task, runtime, recorder, stop
        self.watch = Watch(recorder.run_dir)
        self.unread = deque()  # (the step before, result of `advance`), the oldest first
        self.bar: Optional[ProgressBar] = None
        self.saved_at = time.monotonic()
        self.environment: Optional[dict] = None  # What environment.json holds

    def run(self) -> Run:
        """Run from the beginning to the end."""
        recorder, scores = self.recorder, {}
        try:
            self._begin()
            self._train()
            scores, finished = self._led(self._final_scores) or {}, True
        except Stopped:
            self._stop_here()
            finished = False
        finally:
            self.watch.close()
        average = recorder.folder / "average.safetensors"
        case = self.task.case
        return Run(
            recorder.run_dir, case, recorder.step, finished, recorder.newest, average, scores
        )

    # ---------------------------------------------------------------- begin

    def _begin(self):
        "Go on from the newest checkpoint, if there is one, and describe what is still to be done"
        recorder, runtime, task = self.recorder, self.runtime, self.task
        found = runtime.lead(recorder.find)
        if found is None:
            runtime.begin(task.data, 0, task.weights)
        else:
            self._restore(*found)
        recorder.resume(found)
        if recorder.step < recorder.course.last_step and recorder.writes:
            self._describe()
            runtime.say_cost()
        if self._asked_to_stop():
            raise Stopped
        row = self._led(lambda: recorder.complete_row(self._measure))
        if recorder.writes and recorder.last_scores is not None:
            self.watch.show_epoch(recorder, row)

    def _describe(self):
        "Write down what is trained, and on what"
        config = self.task.config(self.runtime.precision, self.runtime.backend)
        write_json(self.recorder.run_dir / "config.json", config)
        self.environment = None  # it may have vanished, too
        self._write_environment(self.runtime.environment())

    def _write_environment(self, environment):
        "Write environment.json, with what training showed so far, unless it says all of this already"
        environment = {**environment, **self.runtime.findings()}
        if environment != self.environment:
            write_json(self.recorder.run_dir / "environment.json", environment)
            self.environment = environment

    def _mend(self):
        "Write again what somebody removed from the run folder while it trained"
        run_dir = self.recorder.run_dir
        gone = [
            n for n in ("config.json", "metrics.csv", "checkpoints") if not (run_dir / n).exists()
        ]
        if not self.recorder.rows:
            gone = [name for name in gone if name != "metrics.csv"]
        if gone and self.recorder.newest is not None:
            LOG.warning("%s: %s vanished while it trained; written anew", run_dir, ", ".join(gone))
        if "config.json" in gone:
            self._describe()

    def _restore(self, path, arrays, metadata):
        "Give the runtime what a checkpoint holds"
        task = self.task
        refuse_other_run(path, metadata, task.data, task.case, task.options.seed)
        before = metadata.get("precision")
        if before not in (None, self.runtime.precision):
            say(f"precision: {before} so far, {self.runtime.precision} from here on")
        own = {n: a for n, a in arrays.items() if not n.startswith(AVERAGE)}
        try:
            self.runtime.begin(task.data, metadata["update"], own)
        except ValueError as e:
            hint = "Go on from a checkpoint that this code wrote."
            raise ValueError(f"{path} does not fit: {e} {hint}") from None

    # ---------------------------------------------------------------- training steps

    def _train(self):
        "Do the steps that are left"
        recorder = self.recorder
        last = recorder.course.last_step
        always = self.runtime.process[1] == 1 or self.runtime.shares
        self.bar = ProgressBar(last, recorder.step, self.task.options.progress and recorder.writes)
        try:
            while recorder.step < last:
                before = recorder.step // AGREE_EVERY
                self._advance()
                agree = always or recorder.step // AGREE_EVERY != before
                if recorder.ends_epoch():
                    self._end_epoch()
                    agree = True
                elif always and recorder.writes and self._is_due():
                    self._save()
                if agree and self._asked_to_stop():
                    raise Stopped
        finally:
            self.bar.close()

    def _advance(self):
        "Let the runtime do its next steps, and read what came before while it is busy"
        recorder, course = self.recorder, self.recorder.course
        inside = recorder.step % course.steps_per_epoch
        most = min(course.steps_per_epoch - inside, course.last_step - recorder.step)
        values = self.runtime.advance(most)
        self.unread.append((recorder.step, values))
        recorder.step += len(values)
        self._read(self.runtime.ahead)
        recorder.meter.tick(len(values))
        self.bar.advance(len(values))

    def _read(self, ahead: int = 0):
        "Wait for all results but the newest `ahead`, and hand their losses and accuracies on"
        recorder = self.recorder
        while len(self.unread) > ahead:
            before, values = self.unread.popleft()
            for i, (loss, accuracy) in enumerate(np.asarray(values, "float64"), 1):
                recorder.count(float(loss), float(accuracy), before + i)
            self.bar.show(loss, recorder.meter.images_per_s)

    def _asked_to_stop(self) -> bool:
        "Whether any process was asked to stop; then all do, after the same step"
        return self.runtime.stops(self.recorder.step, self.stop.stop_requested)

    def _is_due(self) -> bool:
        "Whether the newest checkpoint is older than the user wants"
        minutes = self.task.options.checkpoint_every
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self):
        "Save within an epoch"
        self._read()
        self.recorder.save(self.runtime.state())
        self.saved_at = time.monotonic()

    def _share_sums(self):
        "Average loss and accuracy over all processes, where each knows those of its own images only"
        if self.runtime.process[1] > 1 and not self.runtime.shares:
            meter = self.recorder.meter
            meter.share(self.runtime.gather(meter.sums))

    # ---------------------------------------------------------------- ends

    def _end_epoch(self):
        "Write down an epoch, and validate where that is due"
        recorder = self.recorder
        self._read()
        self._share_sums()
        if recorder.writes:
            self._mend()
            self._write_environment(self.environment)
        row = self._led(lambda: recorder.end_epoch(self.runtime.state(), self._measure))
        self.saved_at = time.monotonic()
        if not recorder.writes:
            recorder.meter.reset()
            return
        self.watch.show_epoch(recorder, row)

    def _stop_here(self):
        "Save what was trained since the last checkpoint, and say so"
        recorder, self.stop.unsaved = self.recorder, lambda: True  # let it end as it does
        self._read()
        if not recorder.ends_epoch():
            self._share_sums()
        if not recorder.writes:
            return
        self._mend()
        recorder.stop(self.runtime.state)
        where = f", saved {recorder.newest.name}" if recorder.newest else ": nothing to save"
        say(f"stopped after step {recorder.step}{where}")

    def _led(self, work: Callable[[], Any]) -> Any:
        "Let the first process write down something; where it measures meanwhile, the others measure with it"
        runtime = self.runtime
        if self.recorder.writes:
            result = work()
            if runtime.shares:
                runtime.lead(lambda: None)  # done
            return result
        while runtime.shares:
            order = runtime.lead(lambda: None)
            if order is None:
                break
            runtime.scores(*order)
        return None

    def _measure(self, arrays: Optional[Dict[str, np.ndarray]] = None) -> Scores:
        "Measure the runtime's weights, with `arrays` in place of its own; a stop comes between two batches"
        alone = self.runtime.process[1] == 1  # several processes stop together, after a step
        if self.runtime.shares:
            self.runtime.lead(lambda: (arrays,))
        return self.runtime.scores(arrays, self.stop.check if alone else lambda: None)

    def _final_scores(self) -> Dict[str, Scores]:
        "Validate the last weights, if that was not just done, and the averaged ones; write both down"
        recorder, average = self.recorder, self.recorder.average
        if self.task.options.validate_every is None:
            return {}
        scores = {"last": recorder.last_scores or self._measure()}
        if average.count:
            scores["average"] = self._measure(average.arrays())
        at = {"last": recorder.step, "average": average.last_update}
        place = measured_data(self.task.data)
        for kind, s in scores.items():
            print_scores(kind, s)
            write_scores(recorder.run_dir, kind, s, at[kind], place, in_any_case=True)
        return scores
