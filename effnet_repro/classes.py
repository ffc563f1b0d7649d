"""Compare the classes of a network with those of a data set by name, and bring labels into the network's order."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Callable, Optional, Sequence

import numpy as np

from effnet_repro.checkpoint import find_checkpoints, read_metadata
from effnet_repro.messages import say


def has_names(names: Optional[Sequence[str]]) -> bool:
    """Return whether classes have real names. Numbers, such as "0" or a converter's "class 0", are none."""
    number = re.compile(r"(class )?\d+")
    return bool(names) and not all(number.fullmatch(str(name).strip()) for name in names)


def _shown(names):
    text = ", ".join(map(repr, names[:3]))
    return text + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def new_labels(there: Sequence[str], here: Sequence[str]) -> Optional[np.ndarray]:
    """Return the network's label of each label of the data; None if they are the same.

    - `there`: class names of the network, by label.
    - `here`: class names of the data set, by label; as many.

    Where one side has no real names, classes are compared by count, and nothing is mapped. A class that alone has no
    name (its number stands for it) agrees with any name at its place. Raises `ValueError` if the names are others.
    """
    there, here = ([str(name).strip() for name in names] for names in (there, here))
    plain = [str(i) for i in range(len(here))]
    numbers = not has_names(there) and not has_names(here)
    same = sorted(there) == sorted(here)
    if there == here or (numbers and (plain in (there, here) or not same)):
        return None
    if not numbers and not (has_names(there) and has_names(here)):
        return None
    if same and len(set(there)) == len(there):
        return np.array([there.index(name) for name in here])
    if all(a == b or plain[i] in (a, b) for i, (a, b) in enumerate(zip(there, here))):
        return None
    other = [name for name in here if name not in there]
    if other:
        missing = [name for name in there if name not in here]
        raise ValueError(f"the data has {_shown(other)}, the network {_shown(missing)}")
    raise ValueError("the names are in another order, and some stand for more than one class")


def match_classes(source, metadata: dict, data):
    """Return `data` with its labels in the order of the network's classes.

    - `source`: where the network comes from: a run folder or a checkpoint; for messages.
    - `metadata`: what its checkpoint says; `class_names` are compared.
    - `data`: a `DataSet`. One of another number of classes is returned as it is: the caller refuses it.

    Prints a line if labels are mapped. Raises `ValueError` if both have names, and the names are others.
    """
    names = metadata.get("class_names")
    if not names or len(names) != data.num_classes:
        return data
    try:
        labels = new_labels(names, data.class_names)
    except ValueError as why:
        raise ValueError(
            f"{source} was trained on other classes than those in {data.root}: {why}. Use data with the same class "
            "names, or train a new classifier for these: effnet-finetune --new-head. (Classes whose names are only "
            "numbers are compared by count.)"
        ) from None
    if labels is None:
        return data
    say(
        f"classes: {data.root} lists them in another order; its labels are mapped to the network's ({_shown(names)})"
    )
    move = lambda split: split._replace(label=labels[split.label].astype(split.label.dtype))
    splits = {name: move(split) for name, split in data.splits.items()}
    return replace(data, class_names=tuple(names), splits=splits)


def match_run(run_dir, data, lead: Callable = lambda work: work()):
    """Return `data` with its labels in the order of the run that goes on in `run_dir`, if there is one.

    `lead` returns what a function without arguments returns; of several processes only one may read the folder.
    """

    def newest():
        found, _ = find_checkpoints(Path(run_dir) / "checkpoints")  # the run says which are damaged
        return (
            (found[-1], {"class_names": read_metadata(found[-1]).get("class_names")})
            if found
            else None
        )

    there = lead(newest)
    return data if there is None else match_classes(*there, data)
