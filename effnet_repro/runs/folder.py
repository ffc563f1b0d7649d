"""A run folder: what it holds, and how it is found."""

from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional, Union

from effnet_repro.checkpoint import load_metadata
from effnet_repro.config import Case, case_from_dict, differing_fields, get_case
from effnet_repro.paths import local_path
from effnet_repro.runs.resume import NETWORK_FIELDS, list_fields
from effnet_repro.runs.scores import Scores


class Run(NamedTuple):
    "What a run left behind"

    run_dir: Path
    case: Case
    update: int  # Weight updates done
    finished: bool  # False when it was asked to stop
    checkpoint: Path  # The newest one
    average: Path  # The exponential average over epochs
    scores: Dict[str, Scores]  # "last" and "average"


def read_case(
    source,  # A run folder or a checkpoint
    expected: Union[str, Case, None] = None,  # The case it must be, or its name; None = any
) -> Case:
    """Read which case trained weights belong to. ValueError where `expected` is another network."""
    case = case_from_dict(load_metadata(source)["case"])
    if expected in (None, case.name):
        return case
    expected = get_case(expected) if isinstance(expected, str) else expected
    fields = differing_fields(case, expected, ("name", *NETWORK_FIELDS))
    if fields:
        raise ValueError(f"{source} holds another case ({list_fields(fields)}). Leave `case` out.")
    return case


def find_run(
    source,  # A run folder or a checkpoint; None = the default folder of the case
    case: Optional[str],  # A published name; None = the demo's
    data_dir,  # For `train`
    runs,  # Folder of runs
    train: Optional[
        Callable
    ] = None,  # Of the runtime: makes a run of two steps where there is none
):  # The run folder
    "Find the run to go on with; where there is none, make a small one with `train`, or raise FileNotFoundError"
    if source is not None:
        return local_path(source, "source")
    folder = local_path(runs, "runs") / (case or "B1-G16-LN_PN-Half_16IPU_4x4")
    if not (folder / "checkpoints").is_dir():
        if train is None:
            raise FileNotFoundError(
                f"No run in {folder}. Train first (`40_train`), or say where it is."
            )
        train(folder.name, data_dir, folder, budget="smoke")
    return folder
