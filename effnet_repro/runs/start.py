"""Reads the weights of another run to begin from, and refuses those that do not fit."""

from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional

import numpy as np

from effnet_repro.averaging import load_weights
from effnet_repro.classes import match_classes
from effnet_repro.config import Case, case_from_dict
from effnet_repro.data import DataSet
from effnet_repro.messages import say
from effnet_repro.network import drop_statistics
from effnet_repro.runs.resume import check_init


class Start(NamedTuple):
    """Where a run begins that does not begin from fresh weights."""

    weights: Dict[str, np.ndarray]  # By full name, without slots
    data: DataSet  # With its labels in the order of the weights' classes
    source: Path  # The file that was read
    case: Case  # That the weights were trained with


def begin_from(
    init,  # A run folder, a checkpoint or an average
    weights: str,  # "last", "average", or "auto" = the average after a long run
    data: DataSet,  # To train on
    case: Optional[Case] = None,  # To train; None = the one that the weights were trained with
    lead: Callable = lambda work: (
        work()
    ),  # Returns what a function does, where one process reads for all
) -> Start:
    """Read weights to begin from. Raises ValueError where network, classes or their number are others."""
    arrays, metadata, source = lead(lambda: load_weights(init, weights))
    arrays, trained = drop_statistics(arrays, say), case_from_dict(metadata["case"])
    data = match_classes(source, metadata, data)
    check_init(source, metadata, data, case or trained)
    return Start(arrays, data, source, trained)
