"""What is to be trained, for how long, and what the files of a run say of it."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from effnet_repro.config import Case, case_to_dict
from effnet_repro.data import DataSet
from effnet_repro.recipe import steps_per_epoch, total_updates
from effnet_repro.runs.recorder import Course
from effnet_repro.runs.resume import data_notes


@dataclass(frozen=True)
class Options:
    """How a run is done, whatever its case. Raises ValueError for a number that makes no sense."""

    seed: int = 0  # Of weights, order, crops, mixing and masks, >= 0
    validate_every: Optional[int] = 1  # Epochs; 0 = only at the end, None = never
    keep: int = 2  # Checkpoints, >= 1
    progress: bool = True  # Whether to draw a progress bar
    checkpoint_every: Optional[float] = None  # Minutes; None = at the end of each epoch only

    def __post_init__(self):
        minutes = self.checkpoint_every
        if minutes is not None and not (
            isinstance(minutes, (int, float)) and 0 < minutes < math.inf
        ):
            raise ValueError(
                f"`checkpoint_every` must be minutes above 0, or None. Received: checkpoint_every={minutes!r}."
            )
        for name, lowest in (("seed", 0), ("keep", 1), ("validate_every", 0)):
            value = getattr(self, name)
            if name == "validate_every" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
                raise ValueError(
                    f"`{name}` must be a whole number from {lowest} to 2**31 - 1. Received: {name}={value!r}."
                )


@dataclass(frozen=True)
class Task:
    """A case to train on a data set, in a folder."""

    case: Case  # In the layout that runs
    data: DataSet
    run_dir: Path
    weights: Optional[Dict[str, np.ndarray]] = None  # By full name, to begin from; None = fresh
    options: Options = Options()
    notes: Dict[str, Any] = field(default_factory=dict)  # What config.json says besides

    def course(self) -> Course:
        """Return how long the run is. Raises ValueError when the data set has fewer images than a global batch."""
        case, data = self.case, self.data
        if not data.train_count:
            raise ValueError(
                f"There are no training images in {data.root}, only validation images."
            )
        per_epoch = data.train_count // case.global_batch_size
        if per_epoch == 0:
            raise ValueError(
                f"global_batch_size={case.global_batch_size} exceeds the {data.train_count} training images in "
                f"{data.root}. Use a smaller global_batch_size."
            )
        schedule = steps_per_epoch(case, data.train_count)
        last = min(total_updates(case, schedule), case.max_steps or sys.maxsize)
        options = self.options
        return Course(case, per_epoch, last, options.validate_every, options.keep, schedule)

    def facts(self, precision: str) -> dict:
        """Return what every checkpoint of the run says of it; `precision` is the type it is computed in."""
        return {
            "case": case_to_dict(self.case),
            "num_classes": self.data.num_classes,
            "seed": self.options.seed,
            "precision": precision,
            **{name: self.notes[name] for name in ("budget",) if name in self.notes},
            **data_notes(self.data),
        }

    def config(self, precision: str, backend: str) -> dict:
        """Return what config.json holds."""
        data = self.data
        return {
            "case": case_to_dict(self.case),
            "num_classes": data.num_classes,
            "seed": self.options.seed,
            "precision": precision,
            "backend": backend,
            "decoder": data.decoder,
            "data": {"root": data.root, "format": data.format, "builtin": data.builtin},
            "skipped_pictures": list(data.damaged),
            "pictures": {"train": data.train_count, "validation": data.validation_count},
            "data_fingerprint": data.fingerprint,
            **self.notes,
        }
