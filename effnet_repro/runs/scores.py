"""How good weights are: from logits to scores, and to rows of `validation.csv`."""

import time
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from effnet_repro.messages import say, shown
from effnet_repro.paths import local_path
from effnet_repro.runs.lock import wait_for_folder
from effnet_repro.runs.tables import read_rows, write_rows


class Scores(NamedTuple):
    "How a network did on the validation images"

    top1: float  # Share of images whose best guess is right, in [0, 1]
    top5: float  # Share with the label among the best five
    loss: float  # Mean cross entropy, nats
    pictures: int  # How many were measured
    image_size: int  # Side of the images, pixels
    images_per_s: float  # Speed without the first batch
    confusion: np.ndarray  # (classes, classes): true label, guessed label -> images


def score(
    batches,  # Iterable of (logits (n, classes), labels (n,), mask (n,): 0 for a filler)
    classes: int,  # Outputs of the network
    image_size: int,  # Side of the images, pixels
    where: str = "the data",  # Named in the error when there are no images
    processes=None,  # `Processes` that each measure a part of the images; None = this one alone
) -> Scores:
    "Measure logits against labels"
    total, confusion, started, timed = np.zeros(4), np.zeros((classes, classes), int), None, 0
    for logits, labels, mask in batches:
        logits = np.asarray(logits, "float64")
        labels, mask = np.asarray(labels), np.asarray(mask)
        own = np.take_along_axis(logits, labels[:, None], 1)
        before = np.arange(classes) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & before)).sum(1)
        rank = np.where(
            np.isfinite(logits).all(1), rank, classes
        )  # a broken network is never right
        top = logits.max(1, keepdims=True)
        loss = (top + np.log(np.exp(logits - top).sum(1, keepdims=True)) - own)[:, 0]
        total += [(v * mask).sum() for v in (rank < 1, rank < 5, loss, np.ones_like(mask))]
        np.add.at(confusion, (labels, logits.argmax(1)), mask.astype(int))
        timed += 0 if started is None else int(mask.sum())
        started = started or time.perf_counter()
    seconds, several = time.perf_counter() - (started or time.perf_counter()), 1
    if processes is not None and processes.count > 1:
        several, total, confusion = processes.count, processes.add(total), processes.add(confusion)
    n = int(total[3])
    if n == 0:
        raise _no_images(where)
    speed = several * timed / seconds if timed else float("nan")
    return Scores(*(float(t) for t in total[:3] / n), n, image_size, speed, confusion)


def _no_images(where):
    return ValueError(
        f"There are no validation images in {where}. It needs validation-* files, or a folder "
        "validation/ or val/ of class folders."
    )


def refuse_unmeasurable(
    classes: int,  # Outputs of a network
    data,  # `DataSet` to measure it on
):  # None; raises ValueError
    "Refuse data of another number of classes, or without validation images"
    if classes != data.num_classes:
        raise ValueError(
            f"The network has {classes} classes, the data {data.num_classes} ({data.root}). "
            "Validate on its own classes, or fine-tune it for these: effnet-finetune --new-head."
        )
    if not data.validation_count:
        raise _no_images(data.root)


def plot_confusion(
    scores: Scores,  # From `score`
    class_names: Sequence[str],  # By label
    most: int = 30,  # Show only the classes that are confused most, when there are more
    ax=None,  # Matplotlib axes; None = new ones
):  # The axes
    "Draw which classes are taken for which"
    import matplotlib.pyplot as plt

    c = scores.confusion
    mistakes = c.sum(0) + c.sum(1) - 2 * np.diag(c)
    most = np.sort(np.argsort(-mistakes, kind="stable")[:most])
    c, names = c[np.ix_(most, most)], [shown(class_names[i])[:16] for i in most]
    if ax is None:
        side = 2.2 + 0.22 * len(names)
        _, ax = plt.subplots(figsize=(side, side), layout="constrained")
    ax.imshow(c / np.maximum(c.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(c)):
        dark = c[i, j] > 0.6 * c[i].sum()
        ax.text(
            j,
            i,
            c[i, j],
            ha="center",
            va="center",
            fontsize=6,
            color="#fefefe" if dark else "#111111",
        )
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    ax.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    ax.set(
        xlabel="guess",
        ylabel="truth",
        title=f"Which classes are confused? (top-1 {scores.top1:.1%})",
    )
    return ax


def print_scores(
    weights: str,  # Which weights, e.g. "last"
    s: Scores,  # What they scored
):
    "Print what weights scored"
    say(
        f"validation, {weights} weights: top-1 {s.top1:.2%} of {s.pictures:,} images at {s.image_size} px"
    )


def score_row(
    weights: str,  # Which weights
    s: Scores,  # What they scored
) -> dict:  # A row of validation.csv
    "Turn scores into a row"
    own = ("top1", "top5", "loss", "pictures", "image_size")
    return {"weights": weights, **{k: getattr(s, k) for k in own}}


def measured_data(
    data,  # `DataSet` whose validation images are measured
) -> dict:  # "data": its folder in full, "data_fingerprint": changes with every image
    "Say which images a validation is about"
    return {
        "data": shown(Path(data.root).resolve()),
        "data_fingerprint": data.split_fingerprint("validation"),
    }


def _gives_way(old, row):
    "Whether a row takes the place of an old one (text): same size and folder, and the same name or weights"
    there = old.get("data") or ""
    place = there if old.get("data_fingerprint") else str(Path(there).resolve())  # older versions
    if old.get("image_size") != str(row["image_size"]) or place != row["data"]:
        return False
    name = old.get("weights") or ""
    of_average = (name == "average") == (row["weights"] == "average")
    renamed = of_average and old.get("update") == str(row["update"])  # "last" is an epoch, too
    changed = old.get("data_fingerprint") != row["data_fingerprint"]
    return name == row["weights"] or (renamed and changed)


def write_scores(
    run_dir,  # A run folder
    weights: str,  # Which weights
    scores: Scores,  # What they scored
    update: int,  # Weight updates behind them
    data,  # `DataSet` they were measured on, or what `measured_data` says of it
    *,
    in_any_case: bool = False,  # Replace a row of a later step, too: the run is at this one
) -> bool:  # False when the row of a later step stays
    "Write or replace a row of validation.csv"
    place = data if isinstance(data, dict) else measured_data(data)
    row = {**score_row(weights, scores), "update": update, **place}
    path, newer = local_path(run_dir, "run_dir") / "validation.csv", []

    def keep(old):
        if not _gives_way(old, row):
            return True
        is_today = old.get("data_fingerprint") == row["data_fingerprint"]
        is_newer = is_today and (old.get("update") or "").isdigit() and int(old["update"]) > update
        newer.extend([old["update"]] if is_newer and not in_any_case else [])
        return is_newer and not in_any_case

    with wait_for_folder(path.parent):
        rows, wrong = read_rows(path, must=True)  # or all that is there would be lost
        rows = [old for old in rows if keep(old)] + ([] if newer else [row])
        write_rows(path, rows)
    for what in wrong:
        say(f"written anew: {what}")
    for there in newer:
        say(f"{path.name}: the row of step {there} stays; this was {update}")
    return not newer


def score_table(
    scores,  # Name of a row -> `Scores`
):  # pandas table: shares in percent, loss in nats
    "Make a table of scores"
    import pandas as pd

    show = {
        "top-1": lambda s: f"{s.top1:.1%}",
        "top-5": lambda s: f"{s.top5:.1%}",
        "loss": lambda s: f"{s.loss:.3f}",
        "images": lambda s: f"{s.pictures:,}",
        "pixels": lambda s: s.image_size,
    }
    return pd.DataFrame({k: {n: f(s) for n, f in show.items()} for k, s in scores.items()}).T
