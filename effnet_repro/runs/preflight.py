"""Checks what a run will need before it begins. `--dry-run` and the doctor do the same checks as the run."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional

import numpy as np

from effnet_repro import checkpoint as checkpoints
from effnet_repro.averaging import load_weights
from effnet_repro.classes import match_classes, match_run
from effnet_repro.data import DataSet, find_damaged, open_data
from effnet_repro.recipe import total_updates
from effnet_repro.runs.lock import check_places, refuse_used_folder
from effnet_repro.runs.resolved import Resolved
from effnet_repro.runs.resume import check_init, refuse_other_run, stored_split
from effnet_repro.runs.task import Options, Task
from effnet_repro.scaling import blocks


class Reading(NamedTuple):
    """Where the images are, and how they are read: what `open_data` takes."""

    data_dir: Optional[str] = None
    data_format: Optional[str] = None
    decoder: str = "auto"
    validation_split: Optional[float] = None
    on_corrupt: str = "refuse"

    def open(self, *runs, lead: Callable = lambda work: work()) -> DataSet:
        """Return the data; without a share for validation of its own, with what the first of some runs began with.

        `lead` returns what a function without arguments returns; of several processes only one may read a run.
        """
        share = self.validation_split or lead(lambda: stored_split(*runs))
        how = dict(on_corrupt=self.on_corrupt, decoder=self.decoder, validation_split=share)
        return open_data(self.data_dir, self.data_format, verbose=False, **how)


#: Images of each split that are decoded before a run, where damaged ones are not left out anyway.
TRIED = 32


def notes_on(case, data: DataSet) -> List[str]:
    """Return what is legal in a case and a data set, but perhaps not what was meant, a sentence each."""
    notes = []
    sizes = [block.channels_per_group for block in blocks(case.network)]
    if set(sizes) != {case.group_size}:
        found = ", ".join(map(str, sorted(set(sizes))))
        notes.append(
            f"group_size={case.group_size} does not divide the channels of every block: the real sizes are {found}"
        )
    if data.num_classes == 1:
        notes.append(
            f"{data.root} has one class, {data.class_names[0]!r}: every guess is right. Give a folder for each class"
        )
    return notes


_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_folder(run_dir) -> None:
    """Raise OSError where a run could not write: a file in the way, or no right to."""
    path = Path(run_dir).absolute()
    try:
        os.lstat(str(path))
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise OSError(e.errno, f"Cannot write {run_dir}: {e.strerror}.") from None
    there = next(p for p in (path, *path.parents) if os.path.lexists(str(p)))
    if not there.is_dir():
        raise NotADirectoryError(f"Cannot write {run_dir}: {there} is no folder.")
    try:  # the rights of a folder do not say it all: NFS, quotas, /proc
        tempfile.TemporaryFile(dir=str(there)).close()
    except OSError as e:
        why = "is read-only for you" if e.errno in _NO_RIGHT else f"takes no file ({e.strerror})"
        text = f"Cannot write {run_dir}: {there} {why}. Choose another folder."
        raise OSError(e.errno, text) from None


def check_images(data: DataSet) -> None:
    """Decode a few images of each split, from its first to its last. Raises ValueError for one that is damaged."""
    for name, split in data.splits.items():
        count = len(split.label)
        some = np.unique(np.linspace(0, max(count - 1, 0), min(count, TRIED)).astype(int))
        for problem in find_damaged(data, name, some).values():
            raise ValueError(problem)


def check_run(
    plan: Resolved,  # What will be done
    reading: Reading,
    options: Options,
    init=None,  # Run folder or checkpoint to begin from; None = fresh weights
    weights: str = "auto",  # Which of its weights
    tries: bool = True,  # Whether a few images are decoded
) -> DataSet:
    """Check all that can be checked without computing, and return the data of the run, which is listed.

    Raises ValueError or OSError, as the run itself would, and RuntimeError where another run is in the folder.
    """
    check_places(plan.run_dir)
    refuse_used_folder(plan.run_dir)
    data = plan.data or reading.open(plan.run_dir, init)
    if init is not None:
        metadata = load_weights(init, weights)[1]
        data = match_classes(init, metadata, data)
        check_init(init, metadata, data, plan.case)
    data = match_run(plan.run_dir, data)
    if tries:
        check_images(data)
    course = Task(plan.case, data, plan.run_dir, None, options).course()
    total_updates(plan.case, course.schedule)
    check_folder(plan.run_dir)
    newest = checkpoints.load_newest(plan.run_dir / "checkpoints")  # where one is whole
    if newest is not None:
        path, _, metadata, _ = newest
        refuse_other_run(path, metadata, data, plan.case, options.seed)
    return data
