"""Class folders: train/<class>/..., with or without validation images, as people and tools leave them.

Images may lie deeper inside a class folder. What is an image is told by the suffix, and of files of unknown suffix by
the first bytes. Validation images that are not sorted into class folders are read with Kaggle's list of labels.
"""

import csv
import os
import stat
import unicodedata
from pathlib import Path
from typing import List, Optional

import numpy as np

from effnet_repro.data.places import Listing, Split, left_by_tools, listed, make_split
from effnet_repro.data.unread import folder_of_classes, refuse_splits_as_classes
from effnet_repro.outside import file_kind, head_of, kind_of, read_file

IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .pjpeg .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .tga .pcx .avif".split()
)
TRAIN, VALIDATION = ("train", "training"), ("validation", "val", "valid")
_ASIDE = {"test", "testing", "dev", "eval", "holdout"}
_BY_CONTENT = {"a JPEG", "a PNG", "a GIF", "a WebP image", "a BMP", "a JPEG 2000 image"}
# Never looked into: files that are not meant as images, or not finished.
_OTHERS = set(
    ".txt .csv .tsv .json .jsonl .xml .yml .yaml .md .html .htm .log .ini .py .ipynb .npy .npz .mat .pkl .h5 .db "
    ".zip .tar .gz .tgz .7z .rar .mp4 .avi .mov .mkv .webm .wav .mp3 .pdf .svg .part .crdownload .download .partial "
    ".tmp .bak .orig .old .xmp .aae .cr2 .nef .dng .arw".split()
)
_DEEPEST = 32  # Folders below a class folder
LABELS = "LOC_val_solution.csv"  # Kaggle's labels of ImageNet's validation images
TINY = "val_annotations.txt"  # The same of Tiny ImageNet, whose images lie in val/images


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _holds_images(folder, deep=True):
    "Whether there is a file with an image's name in a folder, or below"
    for inner, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if deep and not left_by_tools(name)]
        if any(is_image_name(name) and not left_by_tools(name) for name in files):
            return True
    return False


def _has_classes(folder):
    return any(path.is_dir() and _holds_images(path) for path in listed(folder))


def _named(root, names):
    "The folders of these names, in the order of the names; upper case counts as lower case"
    there = [path for path in listed(root) if path.is_dir()]
    return [path for name in names for path in there if path.name.lower() == name]


def training_folder(root: Path) -> Optional[Path]:
    """Return the folder of training images, or None."""
    found = [p for p in _named(root, TRAIN) if p.name.lower() == "train" or _has_classes(p)]
    return found[0] if found else None


def validation_folders(root: Path) -> List[Path]:
    """Return the folders that may hold validation images; `valid` without training images may be a class."""
    found = _named(root, VALIDATION)
    if training_folder(root) is None:
        found = [p for p in found if p.name.lower() != "valid" or _has_classes(p)]
    return found


def is_alone(root: Path) -> bool:
    """Return whether a folder holds nothing but class folders: no training and no validation folder."""
    return training_folder(root) is None and not validation_folders(root)


def holds_classes(root: Path) -> bool:
    """Return whether a folder is a set of class folders, split or not."""
    return not is_alone(root) or _has_classes(root)


def deeper_set(root: Path, depth: int = 4) -> Optional[Path]:
    """Return the nearest folder below that holds train/ or val/ with class folders; None where there is none."""
    inside = [path for path in listed(root) if path.is_dir()][:20]
    for path in inside:
        if any(_has_classes(p) for p in _named(path, TRAIN + VALIDATION)):
            return path
    if depth > 1:
        return next(filter(None, (deeper_set(path, depth - 1) for path in inside)), None)
    return None


def _images(folder, listing):
    "Path and bytes of each image in a folder or below, by name"
    found, seen = [], set()

    def enter(inner, above, depth):
        about = os.stat(inner)
        if (about.st_dev, about.st_ino) in seen or depth > _DEEPEST:
            return  # a link that leads back
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(inner) as entries:
            for entry in entries:
                if left_by_tools(entry.name):
                    continue
                about, place = _about(entry, listing), (*above, entry.name)
                if about is None:
                    continue
                if stat.S_ISDIR(about.st_mode):
                    enter(entry.path, place, depth + 1)
                elif _is_image(entry, about, listing):
                    found.append((place, entry.path, about.st_size))

    enter(str(folder), (), 0)
    return [(path, size) for _, path, size in sorted(found)]


def _about(entry, listing):
    "What the system says about an entry of a folder; None for a link to nothing, which is damaged or left out"
    try:
        return entry.stat()
    except OSError as error:
        suffix = os.path.splitext(entry.name)[1]
        if suffix and not is_image_name(entry.name):
            listing.leave(entry.path)
            return None
        if entry.is_symlink():
            listing.damage_link(entry.path)
        else:
            listing.damage("file", f"{entry.path} cannot be read: {error.strerror}.")
        return None


def _is_image(entry, about, listing):
    named = is_image_name(entry.name)
    if not stat.S_ISREG(about.st_mode):
        if named:
            text = f"{entry.path} is {file_kind(entry.path)}, not an image."
            listing.damage("special file", text)
        else:
            listing.leave(entry.path, "special file")
        return False
    suffix = os.path.splitext(entry.name)[1].lower()
    if named or (suffix not in _OTHERS and kind_of(head_of(entry.path)) in _BY_CONTENT):
        return True
    listing.leave(entry.path)
    return False


def _class_folders(folder, listing):
    "Names of the class folders; says which folders are not taken for one"
    if folder is None or not folder.is_dir():
        return []
    names = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if left_by_tools(path.name):
            if path.is_dir() and not path.name.startswith("."):
                listing.say(
                    f"data: {path} is not taken for a class: tools leave folders of that name"
                )
        elif path.is_dir():
            names.append(path.name)
        elif path.is_symlink() and not path.exists() and not path.suffix:
            listing.damage_link(path)
    return names


def _refuse_splits(folder):
    "Raise `ValueError` for a class folder that holds train/ and val/: splits come before classes here"
    inside = [path.name for path in _named(folder, ("train", "val", "validation", "test"))]
    if len(inside) > 1:
        raise ValueError(
            f"The class folder {folder} holds the folders {' and '.join(inside)}. Training and validation images "
            f"are told apart above the classes: {folder.parent / inside[0] / folder.name}."
        )


def _list_classes(folder, classes, listing):
    paths, sizes, labels = [], [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        _refuse_splits(folder / name)
        before, gone = listing.left.copy(), len(listing.damaged)
        found = _images(folder / name, listing)
        if not found and len(listing.damaged) == gone:
            other = ", ".join(f"{n} {kind}" for kind, n in (listing.left - before).most_common(5))
            deeper = folder_of_classes(folder, classes, _holds_images)
            raise ValueError(
                f"The class folder {folder / name} holds no image ({' '.join(IMAGE_SUFFIXES)})"
                + (f", but {other}" if other else "")
                + ". Put images there, or remove the folder."
                + (
                    f" If the classes are the folders in {deeper}, give that folder."
                    if deeper
                    else ""
                )
            )
        paths += [path for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return make_split(paths, np.arange(len(paths)), np.zeros(len(paths)), sizes, labels)


def _flat(folder):
    "The image files that lie in a folder itself, sorted"
    return [p for p in listed(folder) if is_image_name(p.name) and not p.is_dir()]


def _labels_beside(root, folder):
    "A list of labels in the folder of validation images, or in one of those above"
    above = [folder, folder.parent, root, *root.absolute().parents[:3]]
    paths = (place / name for name in (LABELS, TINY) for place in above)
    return next((path for path in paths if path.is_file()), None)


def _read_labels(path):
    "Name of an image, without suffix -> class, of Kaggle's list or Tiny ImageNet's"
    text = read_file(path).decode("utf-8-sig", "replace")
    if path.name == TINY:
        rows = [line.split("\t") for line in text.splitlines()]
        return {os.path.splitext(row[0])[0]: row[1] for row in rows if len(row) > 1}
    try:
        rows = list(csv.DictReader(text.splitlines()))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (csv.Error, KeyError, AttributeError, IndexError, TypeError):
        raise ValueError(
            f"{path} is not Kaggle's list of labels: it needs the columns ImageId and PredictionString, with a "
            "class first in each. Download it again."
        ) from None


def _list_flat(root, folder, classes, listing):
    "Validation images that are not sorted, with the labels that Kaggle lists"
    images, path = _flat(folder), _labels_beside(root, folder)
    if path is None:
        raise ValueError(
            f"{folder} holds {len(images):,} images, but no class folders: nothing says what they show. Put "
            f"{LABELS} beside it (Kaggle has it for ImageNet), sort the images into {folder.name}/<class>/, or remove "
            "the folder."
        )
    known, taken = _read_labels(path), []
    for image in images:
        label = known.get(image.stem)
        if label is None:
            listing.damage("label", f"{path} does not list {image.name} of {folder}.")
        elif label not in classes:
            text = f"{path} gives {image.name} the class {label}, for which there is no training folder."
            listing.damage("label", text)
        elif not image.is_file():
            listing.damage("link", f"{image} is no file that can be read.")
        else:
            taken.append((image, image.stat().st_size, classes.index(label)))
    listing.say(f"data: the labels of {folder} are read from {path}")
    paths, sizes, labels = zip(*taken) if taken else [()] * 3
    return make_split(paths, np.arange(len(paths)), np.zeros(len(paths)), sizes, labels)


def _choose_validation(root, listing):
    "The folder of validation images: the first one that holds any"
    there = validation_folders(root)
    full = [folder for folder in there if _holds_images(folder)]
    for folder in full[1:]:
        listing.say(f"data: validation images are read from {full[0]}; {folder} is not read")
    if not full:
        for path in listed(root) if training_folder(root) else ():
            if path.is_dir() and path.name.lower() in _ASIDE and _holds_images(path):
                listing.say(
                    f"data: {path} is not read: validation images lie in validation/, val/ or valid/"
                )
    return (full or there or [None])[0]


def open_folders(listing: Listing):
    """Open class folders: see `layouts`."""
    root = listing.root
    train, validation = training_folder(root), _choose_validation(root, listing)
    if train is None and validation is None:
        train = root  # nothing but class folders: `split` makes two sets of them
    classes = _class_folders(train, listing)
    inside = _class_folders(validation, listing)
    classes = classes or inside
    if inside == ["images"] and (validation / TINY).is_file():
        validation, inside = validation / "images", []
    if train is not None and not classes and _flat(train):
        raise ValueError(
            f"{train} holds {len(_flat(train)):,} images, but no class folders: sort them into "
            f"{train}/<class>/, a folder for each class."
        )
    refuse_splits_as_classes(train or validation, classes)
    if len(classes) == 1 and folder_of_classes(train or validation, classes, _holds_images):
        raise ValueError(
            f"{(train or validation) / classes[0]} would be the only class, and holds folders of images. If these are "
            "the classes, give that folder."
        )
    extra = sorted(set(inside) - set(classes))
    if extra:
        raise ValueError(
            f"{validation} has class folders that {train} does not have: {', '.join(extra[:5])}. "
            f"A class has the same name in both{_almost(extra, classes)}."
        )
    splits = {"train": _sorted_out(train, classes, listing)}
    if validation is not None and not inside and _flat(validation):
        splits["validation"] = _list_flat(root, validation, classes, listing)
    else:
        splits["validation"] = _sorted_out(validation, classes, listing)
    return splits, dict(enumerate(classes))


def _almost(extra, classes):
    "What is said of class folders whose names look alike: in letter case, spaces or the encoding of accents"
    plain = lambda name: unicodedata.normalize("NFKC", name).casefold().strip()
    known = {plain(name): name for name in classes}
    pairs = [
        f"{name!a} here, {known[plain(name)]!a} there" for name in extra if plain(name) in known
    ]
    return f", letter by letter: {'; '.join(pairs[:3])}" if pairs else ""


def _sorted_out(folder, classes, listing) -> Split:
    "The images of class folders; those that lie beside the class folders are counted"
    if folder is None:
        return make_split((), (), (), (), ())
    for path in _flat(folder):
        listing.leave(path, "beside the class folders")
    return _list_classes(folder, classes, listing)
