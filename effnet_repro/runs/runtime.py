"""The interface between a run and what computes it: Keras, a pipeline on IPUs, or a few lines of NumPy in a test."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from effnet_repro.data import DataSet
from effnet_repro.runs.scores import Scores


class Runtime:
    """Computes training steps for `loop`, which does everything else. Subclasses fill in the methods.

    Arrays have full names, such as "all/Top/logits/dense/bias"; those of the optimizer begin with "slots/". All are
    NumPy arrays, and what `state` returns is a copy that later steps leave alone.
    """

    backend: str = ""  # For config.json: "tensorflow", "jax" or "graphcore"
    precision: str = ""  # Type that is computed in, such as "bfloat16" or "16.16"
    process: Tuple[int, int] = (0, 1)  # (index, count) of the processes that train together
    ahead: int = 0  # Results that may stay unread while the device goes on
    shares: bool = (
        False  # Whether several processes measure together, and each knows the loss of all images
    )

    def settle(self, data: DataSet, run_dir: Path) -> DataSet:
        """Return the data set as it will be read; what the run in `run_dir` was begun with may decide."""
        return data

    def begin(self, data: DataSet, step: int, arrays: Optional[Dict[str, np.ndarray]]):
        """Get ready to go on after training step `step`.

        - `data`: what is trained and validated on; it decides the number of classes.
        - `arrays`: with `step` > 0 what `state` returned then; with 0 weights to begin from, or None for fresh ones.

        Raises ValueError where the arrays do not fit. What is expensive may wait until the first `advance`.
        """
        raise NotImplementedError

    def advance(self, n: int):
        """Do at least one and at most `n` training steps, and return what they say: (steps, 2), loss and accuracy.

        The result needs a length, and `numpy.asarray` must accept it. It may be a promise: the loop reads it once
        `ahead` more results are there, so that a device is given its next step before anybody waits for this one.
        """
        raise NotImplementedError

    def state(self) -> Dict[str, np.ndarray]:
        """Return weights and slots after the newest step."""
        raise NotImplementedError

    def scores(
        self,
        arrays: Optional[Dict[str, np.ndarray]] = None,
        between: Callable[[], None] = lambda: None,
    ) -> Scores:
        """Measure the weights on the validation images; `arrays` take the place of those of the same names.

        `between` is called between two batches, and may raise.
        """
        raise NotImplementedError

    def gather(self, values: np.ndarray) -> List[np.ndarray]:
        """Return the `values` of every process, in every process; all call it at the same steps."""
        return [values]

    def lead(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns; where the first process reads for all, what it returns there."""
        return work()

    def stops(self, step: int, asked: bool) -> bool:
        """Return whether a run ends after training step `step`, because this or another process was asked to stop."""
        if self.process[1] == 1:
            return asked
        return any(part[0] for part in self.gather(np.float32([asked])))

    def environment(self) -> dict:
        """Return what environment.json holds; see `environment.describe_machine`."""
        return {}

    def findings(self) -> dict:
        """Return what training showed about the machine so far; environment.json takes it up after each epoch."""
        return {}

    def say_cost(self):
        """Print what the steps that are left will cost, where that can be told."""

    def close(self):
        """Give back what `begin` and `advance` took."""
