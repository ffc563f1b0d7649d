"""Folders that are almost a set of class folders, and sets of other programs: told by what lies there, with a hint."""

import os
import re
from pathlib import Path
from typing import List, Optional, Sequence

from effnet_repro.config import list_some
from effnet_repro.data.places import listed
from effnet_repro.data.tfrecord import is_tfrecord

#: Arrays, tables and databases: what is in them are no files of images.
_TABLES = set(".parquet .arrow .npz .npy .mat .h5 .hdf5 .pkl .pickle .lmdb .mdb .feather".split())
_SPLIT = re.compile(
    r"(?P<which>train|val|test|dev)(ing|id|idation)?[-_ ]?(images?|imgs?|set|data|split|\d{4})?",
    re.I,
)
_CIFAR_FOR_PYTHON = re.compile(r"data_batch_\d|test_batch|cifar-100?-(batches-py|python)")


def _folders(folder: Path) -> List[Path]:
    return [path for path in listed(folder) if path.is_dir()]


_PARTS = set(
    "train training test testing val valid validation dev fold part split set subset".split()
)


def _nested(folder, classes, holds_images):
    "Whether there are several class folders, and all of them hold folders of images and no image themselves"
    return len(classes) > 1 and not any(holds_images(folder / name, False) for name in classes)


def refuse_splits_as_classes(folder: Path, classes: Sequence[str], holds_images) -> None:
    """Raise `ValueError` where the class folders are called like splits: `train_images` beside `val_images`.

    So are `seg_train` and `seg_test`, or `fold1` and `fold2`, where each holds folders of images.
    """
    found = {name: _SPLIT.fullmatch(name) for name in classes}
    splits = {name: match["which"].lower() for name, match in found.items() if match}
    if "train" in splits.values() and len(set(splits.values())) > 1:
        names = " and ".join(list(splits)[:3])
        raise ValueError(
            f"{folder} holds {names}, which look like splits, not like classes. Rename them to train and val."
        )
    words = [re.split(r"[\W\d_]+", name.lower()) for name in classes]
    if all(_PARTS & set(some) for some in words) and _nested(folder, classes, holds_images):
        raise ValueError(
            f"{folder} holds {' and '.join(classes[:2])}, which look like parts of a set, not like classes. Make a "
            "folder with train and val of them: class folders lie in each."
        )


def tell_same_folders(folder: Path, classes: Sequence[str], holds_images, listing) -> None:
    """Say it where every class folder holds the same folders of images: these may be the classes."""
    if not _nested(folder, classes, holds_images):
        return
    inside = [{path.name for path in _folders(folder / name)} for name in classes]
    same = sorted(set.intersection(*inside))
    if len(same) > 1:
        listing.say(
            f"data: {classes[0]} and {classes[1]} in {folder} are the classes, though each holds {list_some(same)}"
        )


def folder_of_classes(folder: Path, names: Sequence[str], holds_images) -> Optional[Path]:
    """Return the one folder among `names` whose folders look like the classes; None where there is none.

    No image lies in it, and images lie in two of its folders or more: `holds_images(path, deep)` tells.
    """
    for name in names:
        path = folder / name
        if path.is_dir() and not holds_images(path, False):
            full = (inner for inner in _folders(path) if holds_images(inner, True))
            if next(full, None) is not None and next(full, None) is not None:
                return path
    return None


def _is_records(path):
    try:
        return path.is_file() and is_tfrecord(path)
    except OSError:
        return False


def hint_on(folder: Path) -> str:
    """Return what a folder may be that is no set of images here, and what to do; "" where nothing tells."""
    there = listed(folder)
    for path in _folders(folder)[:20]:
        there += listed(path)[:20]
    names = [path.name for path in there]
    if any(_CIFAR_FOR_PYTHON.fullmatch(name) for name in names):
        return "CIFAR's files for Python are not read: take the binary version (cifar-10-binary.tar.gz)."
    if any(_is_records(path) for path in there[:7]):
        return "TFRecords are read from files called train-* and validation-*: rename these, or link them."
    tables = {os.path.splitext(name)[1].lower() for name in names} & _TABLES
    if tables or any("-ubyte" in name for name in names):
        kinds = " ".join(sorted(tables)) or "ubyte"
        hint = "save the images as files, in a folder for each class."
        return f"Arrays and tables of images ({kinds}) are not read: {hint}"
    return ""
