"""Results to show others: a row with its origin, and images with the classes guessed for them."""

from typing import Optional

import numpy as np

from effnet_repro.averaging import load_weights
from effnet_repro.classes import match_classes
from effnet_repro.config import case_from_dict
from effnet_repro.data import DataSet, plot_images, validation_arrays
from effnet_repro.outside import read_json
from effnet_repro.paths import local_path
from effnet_repro.results import origin_of_run, write_rows
from effnet_repro.runs import Scores, score_row
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.evaluation import predictor


def record(
    path,  # A CSV file of results; a row is added, or replaced when `what` is there already
    what: str,  # What was measured, in a few words
    scores: Scores,  # From `evaluate`, `validate` or a run
    run_dir,  # Where it was made: environment, seed and data set are taken from it
    command: str,  # The exact command, with the data folder as a variable
    data: str,  # Name of the data set
    seconds: float,  # Wall time of the command
):
    """Write a measured accuracy with where it is from: a row of a CSV file, which replaces the row of the same `what`.

    ValueError where the run lacks something that a row needs.
    """
    case = read_json(local_path(run_dir, "run_dir") / "config.json")["case"]
    row = {"what": what, "data": data, **score_row("last", scores)}
    row.update(case=case["name"], epochs=case["epochs"], seconds=round(seconds))
    write_rows(path, [row], ("what",), origin_of_run(run_dir, command))


def plot_predictions(
    source,  # A run folder or a checkpoint
    data: DataSet,  # Its validation images are shown
    n: int = 16,  # How many, spread over the set
    image_size: Optional[int] = None,  # Side to test at; None = the one it was trained at
):  # The axes
    """Show validation images with the best guess and its probability in percent; wrong ones name the truth."""
    arrays, metadata, path = load_weights(source, "last")
    data = match_classes(path, metadata, data)
    case = case_from_dict(metadata["case"])
    size, names = image_size or case.image_size, metadata["class_names"]
    predict = predictor(ModelSpec.from_case(case, num_classes=len(names)), arrays)
    batch = max(1, min(n, data.validation_count))
    shown, labels = [], []
    each = max(1, data.validation_count // batch)
    stream = validation_arrays(data, size, each, image_resize=case.image_resize)
    for i, (images, y, mask) in enumerate(stream):
        if i < batch and mask[0]:
            shown.append(images[0])
            labels.append(int(y[0]))
    logits = predict(np.stack(shown))
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    best = p.argmax(1)
    titles = [
        f"{names[b][:14]} {row[b]:.0%}" + ("" if b == y else f"\n({names[y][:14]})")
        for b, y, row in zip(best, labels, p)
    ]
    return plot_images(shown, titles, columns=min(8, len(shown)), side=1.2)
