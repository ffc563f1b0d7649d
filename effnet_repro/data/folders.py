"""Class folders: train/<class>/..., with or without validation images, as people and tools leave them.

Images may lie deeper inside a class folder. What is an image is told by the suffix, and of files of unknown suffix by
the first bytes. Validation images that are not sorted into class folders are read with Kaggle's list of labels.
"""

import os
import stat
import unicodedata
from pathlib import Path
from typing import List, Optional

import numpy as np

from effnet_repro.config import list_some
from effnet_repro.data.labels import LABELS, TINY, labels_beside, read_labels
from effnet_repro.data.places import Listing, Split, left_by_tools, listed, make_split
from effnet_repro.data.unread import folder_of_classes, refuse_splits_as_classes, tell_same_folders
from effnet_repro.messages import in_a_line
from effnet_repro.outside import file_kind, head_of, kind_of

IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .pjpeg .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .tga .pcx .avif".split()
)
TRAIN, VALIDATION = ("train", "training"), ("validation", "val", "valid")
_ASIDE = {"test", "testing", "dev", "eval", "holdout"}
_BY_CONTENT = {
    "a JPEG",
    "a PNG",
    "a GIF",
    "a WebP image",
    "a BMP",
    "a JPEG 2000 image",
    "an AVIF image",
}
_ARCHIVES = tuple(".zip .tar .gz .tgz .bz2 .xz .7z .rar".split())
# Never looked into: files that are not meant as images, or not finished.
_OTHERS = set(
    ".txt .csv .tsv .json .jsonl .xml .yml .yaml .md .html .htm .log .ini .py .ipynb .npy .npz .mat .pkl .h5 .db "
    ".zip .tar .gz .tgz .7z .rar .mp4 .avi .mov .mkv .webm .wav .mp3 .pdf .svg .part .crdownload .download .partial "
    ".tmp .bak .orig .old .xmp .aae .cr2 .nef .dng .arw".split()
)
_DEEPEST = 32  # Folders below a class folder


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
    return [path for name in names for path in there if path.name.strip().lower() == name]


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


def _images(folder, listing, seen=None, deep=True):
    """Path and bytes of each image in a folder, and with `deep` below, by name.

    `seen` keeps which folders were entered, and for which class: one that a link adds to a second class is an error.
    """
    found, seen = [], {} if seen is None else seen

    def enter(inner, above, depth):
        about = os.stat(inner)
        first, owner = seen.setdefault((about.st_dev, about.st_ino), (inner, folder))
        if owner is not folder:
            raise ValueError(
                f"{inner} and {first} are one folder: its images would be of two classes. Remove the link."
            )
        if first is not inner:
            return  # a link that leads back
        if depth > _DEEPEST:
            return listing.leave(inner, f"folder deeper than {_DEEPEST}")
        try:
            with os.scandir(inner) as there:
                entries = list(there)
        except OSError as error:
            return listing.damage_file(inner, error)
        for entry in entries:
            if left_by_tools(entry.name):
                if is_image_name(entry.name) and _looks_like_image(entry.path):
                    listing.leave(entry.path, "whose name begins with a dot, @ or ~")
                continue
            about, place = _about(entry, listing), (*above, entry.name)
            if about is None:
                continue
            if stat.S_ISDIR(about.st_mode):
                if deep:
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
            listing.damage_file(entry.path, error)
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
    if named or is_image_inside(entry.path):
        return True
    listing.leave(entry.path)
    return False


def is_image_inside(path: str) -> bool:
    """Return whether a file is an image by its first bytes, if its suffix is none that is known."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix not in _OTHERS and _looks_like_image(path, not suffix)


def _looks_like_image(path, tiff=False):
    "Whether the first bytes are those of an image; raw files of cameras are TIFFs, too"
    try:
        kind = kind_of(head_of(path))
    except OSError:  # nothing says that it is meant as one
        return False
    return kind in _BY_CONTENT or (tiff and kind == "a TIFF")


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
        elif path.is_symlink() and not path.exists() and path.suffix.lower() not in _OTHERS:
            listing.damage_link(path)
    return names


def _refuse_splits(folder):
    "Raise `ValueError` for a class folder that holds train/ and val/: splits come before classes here"
    try:
        inside = [path.name for path in _named(folder, ("train", "val", "validation", "test"))]
    except OSError:  # `_images` tells it
        return
    if len(inside) > 1:
        raise ValueError(
            f"The class folder {folder} holds the folders {' and '.join(inside)}. Training and validation images "
            f"are told apart above the classes: {folder.parent / inside[0] / folder.name}."
        )


def _list_classes(folder, classes, listing):
    paths, sizes, labels, seen = [], [], [], {}
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        _refuse_splits(folder / name)
        before, gone = listing.left.copy(), len(listing.damaged)
        found = _images(folder / name, listing, seen)
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


def _list_flat(root, folder, classes, listing):
    "Validation images that are not sorted, with the labels that Kaggle lists"
    path = labels_beside(root, folder)
    if path is None:
        raise ValueError(
            f"{folder} holds {len(_flat(folder)):,} images, but no class folders: nothing says what they show. Put "
            f"{LABELS} beside it (Kaggle has it for ImageNet), sort the images into {folder.name}/<class>/, or remove "
            "the folder."
        )
    known, taken, there = read_labels(path), [], set()
    for image, size in _images(folder, listing, deep=False):
        image = Path(image)
        name = image.stem if image.stem in known else image.name
        label = known.get(name)
        there.add(name)
        if label is None:
            listing.damage("label", f"{path} does not list {image.name} of {folder}.")
        elif label not in classes:
            text = f"{path} gives {image.name} the class {label}, for which there is no training folder."
            listing.damage("label", text)
        else:
            taken.append((image, size, classes.index(label)))
    if path.parent == folder:  # it was counted as a file that is no image
        listing.left.subtract([path.suffix])
    listing.say(f"data: the labels of {folder} are read from {path}")
    absent = len(set(known) - there)
    if absent:
        listing.say(
            f"data: {absent:,} of the {len(known):,} images that {path} lists are not there"
        )
    paths, sizes, labels = zip(*taken) if taken else [()] * 3
    return make_split(paths, np.arange(len(paths)), np.zeros(len(paths)), sizes, labels)


def _tell_no_folder(root, names, listing):
    "Say what is called like a split and is no folder of one: an archive, a link to nothing, a list"
    for path in listed(root):
        stem, *endings = path.name.lower().split(".")
        if stem not in names or path.is_dir():
            continue
        if path.is_symlink() and not path.exists():
            listing.damage_link(path)
        elif not endings or path.name.lower().endswith(_ARCHIVES):
            listing.say(f"data: {path} is {file_kind(path)}, not a folder: it is not read")


def _choose_validation(root, listing):
    "The folder of validation images: the first one that holds any"
    there = validation_folders(root)
    full = [folder for folder in there if _holds_images(folder)]
    for folder in full[1:]:
        listing.say(f"data: validation images are read from {full[0]}; {folder} is not read")
    if not there:
        _tell_no_folder(root, VALIDATION, listing)
    if not full:
        for path in listed(root) if training_folder(root) else ():
            if path.is_dir() and path.name.lower() in _ASIDE and _holds_images(path):
                listing.say(
                    f"data: {path} is not read: validation images lie in validation/, val/ or valid/"
                )
    return (full or there or [None])[0]


def _if_a_class(root, train):
    "What is said of a folder of training images among folders that look like classes"
    others = [p for p in listed(root) if p.is_dir() and p != train and _holds_images(p, False)]
    names = [p.name for p in others if p.name.lower() not in {*VALIDATION, *_ASIDE}]
    return f" If it is a class, as {list_some(names)} may be, rename it." if names else ""


def open_folders(listing: Listing):
    """Open class folders: see `layouts`."""
    root = listing.root
    train, validation = training_folder(root), _choose_validation(root, listing)
    if train is None:
        _tell_no_folder(root, TRAIN, listing)
    for other in _named(root, TRAIN):
        if train and other != train and _has_classes(other):
            listing.say(f"data: training images are read from {train}; {other} is not read")
    if train and validation and os.path.samefile(train, validation):
        listing.say(f"data: {validation} is {train}: what trains also validates")
    if train is None and validation is None:
        train = root  # nothing but class folders: `split` makes two sets of them
    classes = _class_folders(train, listing)
    inside = _class_folders(validation, listing)
    above = train if classes or validation is None else validation  # the folder of the classes
    classes = classes or inside
    if inside == ["images"] and (validation / TINY).is_file():
        validation, inside = validation / "images", []
    if train is not None and not classes and _flat(train):
        raise ValueError(
            f"{train} holds {len(_flat(train)):,} images, but no class folders: sort them into "
            f"{train}/<class>/, a folder for each class.{_if_a_class(root, train)}"
        )
    archives = _archives(train or validation)
    if not classes and archives:
        raise ValueError(
            f"{train or validation} holds {archives[0].name}, but no class folders: unpack the archives there, each "
            "into a folder of its class."
        )
    refuse_splits_as_classes(above, classes, _holds_images)
    if len(classes) == 1 and folder_of_classes(above, classes, _holds_images):
        raise ValueError(
            f"{above / classes[0]} would be the only class, and holds folders of images. If these are "
            "the classes, give that folder."
        )
    extra = sorted(set(inside) - set(classes))
    if extra:
        raise ValueError(
            f"{validation} has class folders that {train} does not have: {', '.join(map(in_a_line, extra[:5]))}. "
            f"A class has the same name in both{_almost(extra, classes)}."
        )
    _tell_alike(classes, listing)
    splits = {"train": _sorted_out(train, classes, listing)}
    tell_same_folders(above, classes, _holds_images, listing)
    if validation is not None and not inside and _flat(validation):
        splits["validation"] = _list_flat(root, validation, classes, listing)
    else:
        splits["validation"] = _sorted_out(validation, classes, listing)
    return splits, dict(enumerate(classes))


def _plain(name):
    "A name without what hardly shows: letter case, spaces around it, the encoding of accents"
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _almost(extra, classes):
    "What is said of class folders whose names look alike"
    known = {_plain(name): name for name in classes}
    pairs = [
        f"{name!a} here, {known[_plain(name)]!a} there" for name in extra if _plain(name) in known
    ]
    return f", letter by letter: {'; '.join(pairs[:3])}" if pairs else ""


def _tell_alike(classes, listing):
    "Say which classes differ in nothing that one sees: they may be meant as one"
    known = {}
    for name in classes:
        known.setdefault(_plain(name), []).append(name)
    for names in known.values():
        if len(names) > 1:
            listing.say(
                f"data: {' and '.join(map(ascii, names))} look alike, and are classes of their own"
            )


def _archives(folder):
    "The archives that lie in a folder itself"
    files = (path for path in listed(folder) if path.name.lower().endswith(_ARCHIVES))
    return [path for path in files if path.is_file()]


def _sorted_out(folder, classes, listing) -> Split:
    "The images of class folders; what lies beside the class folders is counted or named"
    if folder is None:
        return make_split((), (), (), (), ())
    for path in _flat(folder):
        listing.leave(path, "beside the class folders")
    packed = [p.name for p in _archives(folder) if not (folder / p.name.split(".")[0]).is_dir()]
    if packed:
        listing.say(
            f"data: archives in {folder} are not read: {list_some(packed)}. Unpack those of classes"
        )
    return _list_classes(folder, classes, listing)
