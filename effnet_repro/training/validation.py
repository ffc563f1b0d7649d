"""Measure the weights of a run or a file, and write the scores beside them."""

import logging
from pathlib import Path
from typing import Dict, Optional

from effnet_repro import checkpoint as checkpoints
from effnet_repro.averaging import has_average, load_weights, read_update
from effnet_repro.checkpoint import load_metadata
from effnet_repro.classes import match_classes
from effnet_repro.config import case_from_dict, say_earlier, unknown_name
from effnet_repro.data import DataSet, say_found
from effnet_repro.fields import check_whole
from effnet_repro.messages import BestEffort
from effnet_repro.paths import local_path
from effnet_repro.runs import (
    Reading,
    Scores,
    measured_data,
    print_scores,
    read_rows,
    write_scores,
)
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.compiled import keep_compiled
from effnet_repro.training.decoding import settle_decoder
from effnet_repro.training.device import choose_precision, configure
from effnet_repro.training.evaluation import Evaluator

LOG = logging.getLogger(__name__)


def validate(
    source,  # A run folder, a checkpoint file or an average
    data_dir=None,  # Folder of images, or a `DataSet`; None = the built-in sample set
    *,
    image_size: Optional[int] = None,  # Side to test at; None = the one it was trained at
    weights: str = "both",  # Of a run folder: "last", "average", "both", or "all": see below
    precision: str = "auto",
    backend: Optional[str] = None,
    data_format: Optional[str] = None,
    on_corrupt: str = "refuse",
    decoder: str = "auto",
    validation_split: Optional[float] = None,  # None = that of the run
    batch: Optional[int] = None,  # Images at a time; None = 512 on a GPU, else 64
) -> Dict[str, Scores]:  # "last", "average", or the name of the file -> scores of what was measured
    """Measure trained weights on every validation image, and add rows to the run's validation.csv.

    ValueError for a number out of range or other classes, FileNotFoundError where there is no checkpoint.
    """
    configure(backend)
    keep_compiled()
    batch = None if batch is None else check_whole(1, batch=batch)
    image_size = image_size and check_whole(32, image_size=image_size)
    source, scores, evaluator = local_path(source, "source"), {}, None
    files = _weight_files(source, weights)
    say_earlier(source, load_metadata(next(iter(files.values()))[0])["case"])
    reading = Reading(data_dir, data_format, decoder, validation_split, on_corrupt)
    data = data_dir if isinstance(data_dir, DataSet) else reading.open(source)
    say_found(data)
    data = settle_decoder(data)
    is_run, place, table = source.is_dir(), None, BestEffort("validation.csv", LOG)
    run_dir = source.parent if source.name == "checkpoints" else source
    for name, (path, kind) in files.items():
        metadata = load_metadata(path)
        data, case = match_classes(path, metadata, data), case_from_dict(metadata["case"])
        place = place or measured_data(data)  # in the network's order of classes, as in training
        size, update = image_size or case.image_size, read_update(path, kind)
        if weights == "all" and _is_measured(run_dir, (name, update, size), place):
            continue
        arrays = load_weights(path, kind)[0]
        spec = ModelSpec.from_case(case, num_classes=metadata["num_classes"])
        if evaluator is None or evaluator.spec != spec:
            evaluator = Evaluator(spec, choose_precision(precision))
        scores[name] = evaluator.evaluate(arrays, data, size, batch, case.image_resize)
        if weights == "all":
            print_scores(name, scores[name])
        if is_run:
            newest = read_update(run_dir, kind) <= update
            with table:  # what was measured is not lost for a folder that is read-only
                write_scores(run_dir, name, scores[name], update, place, in_any_case=newest)
    return scores


def _weight_files(source, weights):
    "What there is to measure: name -> (file or run folder, which of its weights)"
    if weights not in ("last", "average", "both", "all"):
        raise unknown_name("weights", weights, ("last", "average", "both", "all"))
    newest = checkpoints.newest_file(source)
    if newest == source:
        return {source.name: (source, "auto")}
    if weights == "all":
        files = checkpoints.list_checkpoints(newest.parent)
        found = {p.stem: (p, "last") for p in files}
    else:
        found = {"last": (newest, "last")} if weights in ("last", "both") else {}
    if weights == "average" or (weights != "last" and has_average(newest)):
        found["average"] = source, "average"
    return found


def _is_measured(run_dir, what, place):
    "Whether validation.csv holds (name, update, image size) on these images, be it under another name"
    name, update, image_size = what
    want = [name == "average", str(update), str(image_size), *place.values()]
    columns = ("update", "image_size", *place)
    have = lambda row: [row.get("weights") == "average", *(row.get(c) for c in columns)]
    return any(have(row) == want for row in read_rows(Path(run_dir) / "validation.csv")[0])
