"""Class folders without a validation set: each image's name decides whether it validates.

A name's hash is a number in [0, 1), and images whose number is below the share validate. So an image stays where it
is when others come or go, on every machine.
"""

import hashlib
import os
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np

from effnet_repro.data.folders import is_alone
from effnet_repro.data.places import Split, make_split
from effnet_repro.messages import say

DEFAULT_SHARE = 0.2  # Of a folder that holds nothing but class folders


def place_of(name: str) -> float:
    """Return the number in [0, 1) that a name such as "cat/7.jpg" stands for."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _validates(split, root, share):
    "Which images validate, (n,) bool; of each class the image of the highest number trains in any case"
    names = (Path(os.path.relpath(path, root)).as_posix() for path in split.files)
    places = np.array([place_of(name) for name in names])[split.file]
    chosen = places < share
    for label in np.unique(split.label):
        own = np.flatnonzero(split.label == label)
        chosen[own[np.argmax(places[own])]] = False
    return chosen


def _part(split, chosen):
    "The images of `chosen`, each in a file of its own"
    files = [split.files[split.file[i]] for i in np.flatnonzero(chosen)]
    some = (split.offset[chosen], split.length[chosen], split.label[chosen])
    return make_split(files, np.arange(len(files)), *some)


def split_off(
    splits: Dict[str, Split], root: Path, kind: str, share: Optional[float]
) -> Tuple[Dict[str, Split], Optional[float]]:
    """Return the splits with a share of the training images as validation images, and the share: None if none moved.

    - `root`: the data set's folder; a name counts from there, so that a folder may move.
    - `kind`: the layout. Only class folders ("folder") are split, and only where no image validates so far.
    - `share`: in (0, 1). None is `DEFAULT_SHARE` for a folder that holds nothing but class folders, else nothing.

    Raises ValueError for a share that is none.
    """
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (number and 0 < share < 1):
        raise ValueError(
            f"`validation_split` must be in (0, 1). Received: validation_split={share!r}."
        )
    if kind != "folder" or len(splits["validation"].label):
        if share is not None:
            say(f"data: {root} has its own validation images: validation_split is left aside")
        return splits, None
    share = share or (DEFAULT_SHARE if is_alone(root) else None)
    if share is None:
        return splits, None
    chosen = _validates(splits["train"], root, share)
    return {
        n: _part(splits["train"], c) for n, c in (("train", ~chosen), ("validation", chosen))
    }, share
