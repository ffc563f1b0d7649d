"""Records a run while it trains, on any runtime: checkpoints, averages and rows. No framework is imported.

A loop tells a `Recorder` of every training step and of every end of an epoch. A checkpoint then holds all that the next
process needs to write what an uninterrupted run would have written: weights and slots, the average, the sums of the
epoch so far, and the rows of `metrics.csv`. The file `metrics.csv` is made from these rows; so one that was cut,
emptied or deleted comes back. Only the columns of `TIMING` depend on how often the run was interrupted.
"""

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Callable, Dict, List, Optional

import numpy as np

from effnet_repro import checkpoint as checkpoints
from effnet_repro.averaging import WeightAverage, pack_average, unpack_average
from effnet_repro.config import Case
from effnet_repro.messages import say
from effnet_repro.paths import local_path
from effnet_repro.recipe import learning_rate
from effnet_repro.runs.lock import wait_for_folder
from effnet_repro.runs.resume import average_until
from effnet_repro.runs.scores import Scores
from effnet_repro.runs.tables import read_rows, write_rows

#: Columns of metrics.csv that no two runs have in common.
TIMING = ("images_per_s", "seconds")
#: Columns that the validation after an epoch fills in.
VALIDATION = ("validation_top1", "validation_top5", "validation_loss")
#: Order of the columns; others follow.
COLUMNS = (
    "epoch",
    "update",
    "loss",
    "accuracy",
    "images_per_s",
    "learning_rate",
    "seconds",
    "skipped_pictures",
    *VALIDATION,
)


@dataclass(frozen=True)
class Course:
    """How long a run is, and what it does on the way."""

    case: Case
    steps_per_epoch: int
    last_step: int  # Training steps of the whole run
    validate_every: Optional[int] = None  # Epochs; 0 or None = no columns of validation
    keep: int = 2  # Checkpoints, >= 1
    schedule: Optional[Fraction] = (
        None  # Steps of an epoch for the learning rate; None = `steps_per_epoch`
    )

    def is_validated(self, step: int) -> bool:
        """Return whether the row of the epoch that ends after `step` has the columns of a validation."""
        epoch = -(-step // self.steps_per_epoch)
        return bool(self.validate_every) and (
            step >= self.last_step or epoch % self.validate_every == 0
        )


class Meter:
    """Sums of loss and accuracy over the steps of an epoch, and the speed of this process."""

    def __init__(self, images: int):
        self.images, self.sums, self.steps, self.parts = images, np.zeros(2), 0, None
        self.start_clock()

    def start_clock(self):
        """Begin to measure the speed: the next step compiles, or waits for images, and is not timed."""
        self.seconds, self.timed, self._since = 0.0, 0, None

    def tick(self, steps: int = 1):
        """Note that `steps` more have come back."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds, self.timed = self.seconds + now - self._since, self.timed + steps
        self._since = now

    def add(self, loss: float, accuracy: float):
        """Take in what a step says."""
        self.sums, self.steps = self.sums + [loss, accuracy], self.steps + 1

    def means(self):
        """Return mean loss and mean accuracy over all steps of the epoch, in whatever process they were."""
        return tuple(float(v) for v in self.sums / max(self.steps, 1))

    @property
    def images_per_s(self) -> float:
        """Speed of the timed steps; not a number before there is one."""
        return self.timed * self.images / self.seconds if self.seconds else float("nan")

    def reset(self):
        """Begin another epoch."""
        self.sums, self.steps, self.parts = np.zeros(2), 0, None
        self.start_clock()

    def share(self, every):
        """Take the mean of the sums of several processes, each of which saw its own images: (processes, 2)."""
        self.parts = np.asarray(every)
        self.sums = self.parts.mean(0)

    def state(self) -> dict:
        """Return what a checkpoint within an epoch holds: sums, and those of each process where there are several."""
        parts = {} if self.parts is None else {"parts": self.parts.tolist()}
        return {"loss": self.sums[0], "accuracy": self.sums[1], "steps": self.steps, **parts}

    def restore(self, state: dict, process=(0, 1)):
        """Go on with what `state` returned, as one of the processes: (index, count)."""
        self.sums, self.steps = np.array([state["loss"], state["accuracy"]]), state["steps"]
        if len(state.get("parts", ())) == process[1]:
            self.sums = np.array(state["parts"][process[0]])


def plain_number(text):
    """Return the number that a cell of a table holds, a whole one where it is whole, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def lasting(row: dict) -> dict:
    """Return a row without the columns that differ from run to run, such as times."""
    return {k: v for k, v in row.items() if k not in TIMING}


def describe_epoch(row: dict, course: Course, path: Path) -> str:
    """Return a row as a line for the reader who watches."""
    valid = f", validation top-1 {row['validation_top1']:.1%}" if "validation_top1" in row else ""
    speed = row.get("images_per_s", float("nan"))  # not a number after an epoch of one step
    timed = f", {speed:.0f} images/s" if speed == speed else ""
    return (
        f"epoch {row['epoch']:g}/{course.case.epochs:g}: loss {row['loss']:.3f}, training accuracy "
        f"{row['accuracy']:.1%}{valid}{timed} -> {path.name}"
    )


def read_metrics_rows(path):
    """Return (rows, messages): the rows of a metrics.csv by step, as numbers, and what is wrong with the file."""
    texts, wrong = read_rows(path)
    rows = {}
    for number, texts_of_row in enumerate(texts, 1):
        row = {k: plain_number(v) for k, v in texts_of_row.items() if v != ""}
        known = [row[k] for k in COLUMNS if k in row]
        if not isinstance(row.get("update"), int):
            missing = "update" not in texts_of_row
            wrong.append(
                f"{path} has no column `update`."
                if missing
                else f"{path}: row {number} is damaged."
            )
        elif any(isinstance(v, str) for v in known):
            wrong.append(f"{path}: row {number} is damaged.")
        else:
            rows[row["update"]] = row
    return rows, wrong


def merged(row: dict, file_row: Optional[dict]) -> dict:
    """Return a checkpoint's row with what only the file knows: its timing, and the validation after the checkpoint.

    A row of the file that says something else is not believed.
    """
    if file_row is None or any(file_row.get(k) != v for k, v in lasting(row).items()):
        return dict(row)
    validated = {k: file_row[k] for k in VALIDATION if k in file_row}
    extra = {k: v for k, v in file_row.items() if k not in VALIDATION}
    return {**extra, **row, **(validated if len(validated) == len(VALIDATION) else {})}


class Recorder:
    """Records a run: makes checkpoints, averages and rows from the steps of a loop.

    - `run_dir`: the run folder.
    - `course`: how long the run is.
    - `facts`: what every checkpoint says of the run, such as its case, seed and data.
    - `skipped`: how many damaged images were left out; a column of the rows where there are some.
    - `process`: (index, count) of this process, where several train together. Only the first one writes.

    A loop calls `resume` once, then `count` after every step and `end_epoch` at every end of an epoch, or `save` where
    it was asked to stop within one. All arrays are NumPy's, by full name; slots begin with "slots/".
    """

    def __init__(self, run_dir, course: Course, facts: dict, skipped: int = 0, process=(0, 1)):
        self.run_dir = local_path(run_dir, "run_dir")
        self.course, self.facts, self.skipped = course, facts, skipped
        self.process, self.writes = process, process[0] == 0
        self.folder, self.metrics = self.run_dir / "checkpoints", self.run_dir / "metrics.csv"
        self.step, self.started = 0, time.perf_counter()
        self.newest, self.saved_step = None, 0  # The newest checkpoint, and its step
        self.meter = Meter(course.case.global_batch_size)
        self.average = WeightAverage(course.case.weight_average_decay)
        self.copied: Optional[int] = None  # Step of the average in its file; None = not known
        self.rows: List[dict] = []
        self.passed_over = set()  # Damaged files whose headers are whole
        self.last_scores: Optional[Scores] = None  # Of the weights of this very step

    # ---------------------------------------------------------------- going on

    def find(self):
        """Return (path, arrays, metadata) of the newest checkpoint that is whole, or None.

        Says which damaged ones were passed over, and removes half-written files. Changes nothing else: the caller may
        still refuse to go on.
        """
        if self.writes:
            with wait_for_folder(self.run_dir):  # a validation may be writing its row
                checkpoints.remove_leftovers(self.run_dir)
            checkpoints.remove_leftovers(self.folder)
        found = checkpoints.load_newest(self.folder)
        if found is None:
            return None
        path, arrays, metadata, damaged = found
        for message in damaged:
            say(f"passed over: {message}")
        newer = lambda other: checkpoints.read_metadata(other).get("update", 0) > metadata["update"]
        self.passed_over = {p for p in checkpoints.find_checkpoints(self.folder)[0] if newer(p)}
        return path, arrays, metadata

    def resume(self, found):
        """Take over average, sums and rows of what `find` returned."""
        if found is None:
            return
        path, arrays, metadata = found
        self.step = self.saved_step = metadata["update"]
        self.newest = path
        inside = self.step % self.course.steps_per_epoch
        if metadata.get("epoch_sums"):
            self.meter.restore(metadata["epoch_sums"], self.process)
        if not self.writes:
            return
        say(f"going on from {path.name}, step {self.step}")
        self.average = unpack_average(arrays, metadata)
        if self.average is None:
            say(
                "its average is beside it, as older versions had it; from the next one on it is inside"
            )
            self.average = average_until(self.folder, self.course.case, self.step)
        if inside and not metadata.get("epoch_sums"):
            say(f"loss and accuracy of this epoch leave out its first {inside} steps")
        self.rows = self._rows_until(metadata)
        self._write_metrics()
        self._copy_average()

    def _rows_until(self, metadata) -> List[dict]:
        "The rows that a checkpoint knows, with what the file adds; for an older run those of the file"
        own = [metadata["row"]] if metadata.get("row") else []
        there, wrong = read_metrics_rows(self.metrics)
        if "rows" in metadata:
            if wrong:
                say(f"written anew: {wrong[0]}")
            return [merged(row, there.get(row["update"])) for row in (*metadata["rows"], *own)]
        return self._rows_of_before(there, wrong)

    def _rows_of_before(self, there, wrong) -> List[dict]:
        "The rows of a run whose checkpoints hold one row each, or none"
        kept = {}
        for path in checkpoints.find_checkpoints(self.folder)[0]:
            row = checkpoints.read_metadata(path).get("row")
            if row:
                kept[row["update"]] = merged(row, there.get(row["update"]))
        rows = {u: row for u, row in {**there, **kept}.items() if u <= self.step}
        epochs = self.step // self.course.steps_per_epoch
        if wrong and len(rows) < epochs:
            raise ValueError(
                f"{wrong[0]} The checkpoints hold {len(kept)} of its {epochs} rows. Mend it, or move it away to go "
                "on without the others."
            )
        return [rows[u] for u in sorted(rows)]

    def _copy_average(self):
        "Bring the copy of the average, for other readers, up to date"
        path, newest = self.folder / "average.safetensors", self.average.last_update
        if not self.average.count or (self.copied == newest and path.is_file()):
            return
        content = self.average.encode()
        unknown = self.copied is None and path.is_file()  # what the process before has left
        if not unknown or path.read_bytes() != content:
            checkpoints.atomic_write(path, content)
        self.copied = newest

    # ---------------------------------------------------------------- while it trains

    def count(self, loss: float, accuracy: float, step: Optional[int] = None):
        """Take in what a step says; None = the newest one. A loss that is no number ends the run."""
        if not np.isfinite(loss):
            step = self.step if step is None else step
            raise FloatingPointError(f"The loss of step {step} is {loss}. {self.last_good()}")
        self.meter.add(loss, accuracy)

    def ends_epoch(self) -> bool:
        """Return whether the newest step was the last of an epoch, or of the run."""
        return self.step % self.course.steps_per_epoch == 0 or self.step >= self.course.last_step

    def end_epoch(
        self, arrays: Dict[str, np.ndarray], measure: Optional[Callable[[], Scores]] = None
    ) -> dict:
        """Record an epoch: its checkpoint, its row, and the validation where one is due. Returns the row.

        A request to stop, raised by `measure`, leaves the checkpoint and the row.
        """
        self._end_epoch(arrays)
        return self.complete_row(measure)

    def _end_epoch(self, arrays):
        "The checkpoint and the row of an epoch"
        self.last_scores = None
        loss, accuracy = self.meter.means()
        per_epoch, case = self.course.steps_per_epoch, self.course.case
        row = {
            "epoch": round(self.step / per_epoch, 4),
            "update": self.step,
            "loss": round(loss, 6),
            "accuracy": round(accuracy, 6),
            "images_per_s": round(self.meter.images_per_s, 2),
            "learning_rate": float(
                learning_rate(case, self.step - 1, self.course.schedule or per_epoch)
            ),
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        row.update({"skipped_pictures": self.skipped} if self.skipped else {})
        whole = lambda old: old["update"] % per_epoch == 0  # a part of an epoch gives way to it
        self.rows = [r for r in self.rows if r["update"] < self.step and whole(r)] + [row]
        self.save(arrays)
        self._write_metrics()
        self.meter.reset()

    def stop(self, arrays: Callable[[], Dict[str, np.ndarray]]):
        """Record what was done since the last checkpoint; a complete epoch gets its row."""
        if self.step == self.saved_step:
            return
        if self.ends_epoch():
            self._end_epoch(arrays())
        else:
            self.save(arrays())

    def complete_row(self, measure: Callable[[], Scores]) -> Optional[dict]:
        """Add the validation to the newest row, if it is due and missing. Returns the row of this step, or None."""
        row = self.rows[-1] if self.rows and self.rows[-1]["update"] == self.step else None
        if row and self.course.is_validated(self.step) and VALIDATION[0] not in row:
            scores = self.last_scores = measure()
            row.update(zip(VALIDATION, map(float, (scores.top1, scores.top5, scores.loss))))
            self._write_metrics()
        return row

    def _write_metrics(self):
        "Write metrics.csv whole: every row, in the known order of columns"
        empty = dict.fromkeys(TIMING, "")
        names = list(dict.fromkeys([*COLUMNS, *(n for row in self.rows for n in row)]))
        rows = [{**empty, **row} for row in self.rows]
        rows = [{n: str(row[n]) for n in names if n in row} for row in rows]
        if not rows:
            return
        first = {n: "" for n in names if any(n in row for row in rows)}
        write_rows(self.metrics, [{**first, **row} for row in rows])

    def save(self, arrays: Dict[str, np.ndarray]) -> Path:
        """Write the checkpoint of the newest step, with its average, and delete old ones."""
        step, per_epoch = self.step, self.course.steps_per_epoch
        epoch, inside = divmod(step, per_epoch)
        self._refuse_broken(arrays)
        if not inside and self.average.last_update < step:
            self.average.update({n: w for n, w in arrays.items() if n.startswith("all/")}, step)
        more, average = pack_average(self.average)
        own = [lasting(row) for row in self.rows if row["update"] == step]
        metadata = {
            **self.facts,
            "update": step,
            "epoch": epoch,
            "whole_epoch": not inside,
            **average,
            "epoch_sums": self.meter.state() if inside else None,
            "rows": [lasting(row) for row in self.rows if row["update"] < step],
            "row": own[0] if own else None,
        }
        path = checkpoints.epoch_path(self.folder, epoch, step if inside else None)
        self.newest, self.saved_step = checkpoints.save(path, {**arrays, **more}, metadata), step
        self.passed_over.discard(path)
        self._copy_average()
        self._delete_old()
        return path

    def _delete_old(self):
        "Keep the newest checkpoints; a file that claims to be newer than this step is not one of them"
        until = lambda path: checkpoints.read_metadata(path).get("update", 0) <= self.step
        found = [p for p in checkpoints.find_checkpoints(self.folder)[0] if until(p)]
        damaged = [p for p in found if p in self.passed_over]  # their steps have come again
        whole = [p for p in found if p not in self.passed_over]
        for old in (*damaged, *whole[: -self.course.keep]):
            old.unlink()

    def _refuse_broken(self, arrays):
        broken = [n for n, a in arrays.items() if not np.isfinite(a).all()]
        if broken:
            raise FloatingPointError(
                f"After step {self.step} {len(broken)} arrays hold values that are not finite, such as "
                f"{broken[0]}; they were not saved. {self.last_good()}"
            )

    def last_good(self) -> str:
        """Return where to go on from, and how, after numbers went wrong."""
        there = self.newest
        good = f"The last good checkpoint is {there}." if there else "There is no checkpoint yet."
        return f"{good} Try a smaller base_learning_rate_exponent, or precision='float32'."
