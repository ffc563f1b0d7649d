"""The three layouts of a folder, each listed as places of images: TFRecords, class folders, CIFAR.

An opener takes the folder, the cache folder and a function that says a line to the user, and returns
`({"train": Split, "validation": Split}, {label: name of the class})`. `recognize` tells which one is due.
"""

import json
import mmap
import os
import re
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np

from effnet_repro.data.cache import cache_folder, file_stamp
from effnet_repro.data.tfrecord import feature_places, message_fields, read_feature, scan_tfrecord


class Split(NamedTuple):
    "The pictures of one split, as arrays with an entry for each picture"

    files: Tuple[str, ...]  # Paths
    file: np.ndarray  # Index into `files`
    offset: np.ndarray  # Byte at which the encoded picture begins
    length: np.ndarray  # Its bytes
    label: np.ndarray  # Class from 0, int32
    boxes: np.ndarray  # Boxes of objects, (m, 4): top, left, bottom, right in [0, 1]
    box_begin: np.ndarray  # Picture i has the boxes box_begin[i] to box_begin[i + 1]
    # Height and width, (n, 2), of what was made smaller when the set was packed, and of raw pixels; else empty.
    original: np.ndarray = np.zeros((0, 2), np.int32)
    stored: np.ndarray = np.zeros((0, 2), np.int32)


def make_split(paths, file, offset, length, label, boxes=(), **sizes) -> Split:
    """Return a `Split` of these columns, an entry for each image.

    `boxes` are arrays (m, 4), or none at all; `sizes` are `original` and `stored`, where there are such.
    """
    numbers = [np.asarray(values, np.int64) for values in (file, offset, length)]
    counts = [len(found) for found in boxes] if len(boxes) else np.zeros(len(label), int)
    flat = np.concatenate([np.zeros((0, 4)), *(found for found in boxes if len(found))])
    begin = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    sizes = {name: np.asarray(size, np.int32) for name, size in sizes.items()}
    return Split(
        tuple(map(str, paths)), *numbers, np.asarray(label, np.int32), flat, begin, **sizes
    )


_TOOLS = {"__macosx", "__pycache__", "lost+found", "$recycle.bin", "recycler", "thumbnails"}
_TOOLS |= {"system volume information", "network trash folder", "temporary items"}
_TOOLS |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "_thumbnails", "#recycle", "#snapshot"}
_TOOL_ENDINGS = ("~", ":zone.identifier", "@synoeastream", "@synoresource")


def left_by_tools(name: str) -> bool:
    """Return whether a program left this file or folder, and nobody means it as a class or an image."""
    name = name.lower()
    return name in _TOOLS or name.startswith((".", "@", "~")) or name.endswith(_TOOL_ENDINGS)


def _listed(folder):
    "Paths in a folder, sorted, without what tools leave"
    paths = (path for path in folder.iterdir() if not left_by_tools(path.name))
    return sorted(paths, key=lambda path: path.name)


LARGE = 2**31  # Bytes of a split beyond which lists are cached and reading goes in runs
_SIDES = ("ymin", "xmin", "ymax", "xmax")


def _record_facts(record):
    "Place of the picture in a record, the labels, the class name, the boxes (m, 4) and the original size, if given"
    places = dict(feature_places(record))
    encoded = places.pop("image/encoded")
    facts = {key: read_feature(record, *place) for key, place in places.items()}
    ((_, _, values),) = message_fields(record, *encoded)  # a list of bytes,
    ((_, _, place),) = message_fields(record, *values)  # with one entry
    boxes = np.stack([facts.get(f"image/object/bbox/{side}", ()) for side in _SIDES], 1)
    name = (facts.get("image/class/text") or [b""])[0].decode("utf-8", "replace")
    sides = (facts.get(f"image/original/{side}", ()) for side in ("height", "width"))
    original = [int(value) for side in sides for value in side]
    return place, facts["image/class/label"].tolist(), name, np.clip(boxes, 0, 1), original


def _list_tfrecord(path):
    "Facts of each record of a file; the picture's place as offset in the file and length"
    records, facts = scan_tfrecord(path).tolist(), []
    if not records:
        return facts
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as view:
            for i, (at, length) in enumerate(records):
                try:
                    with view[at : at + length] as record:
                        (begin, end), label, *rest = _record_facts(record)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"Record {i} of {path} is not a picture with a label: it needs "
                        f"`image/encoded` (one JPEG) and `image/class/label`."
                    ) from error
                if len(label) != 1 or not isinstance(label[0], int) or label[0] < 1:
                    raise ValueError(
                        f"`image/class/label` must be one whole number from 1 (0 is the unused "
                        f"background class). Received: {label} in record {i} of {path}. "
                        f"Write the records again with labels from 1."
                    )
                facts.append((at + begin, end - begin, label[0], *rest))
    return facts


def _list_tfrecords(paths):
    lists = [_list_tfrecord(path) for path in paths]
    facts = [fact for found in lists for fact in found]
    offset, length, label, name, boxes, original = zip(*facts) if facts else [()] * 6
    file = np.repeat(np.arange(len(paths)), [len(found) for found in lists])
    names = {number - 1: text for number, text in zip(label, name) if text}
    label = np.minimum(np.array(label, int) - 1, np.iinfo(np.int32).max)
    known = original if len(original) and all(len(one) == 2 for one in original) else ()
    sizes = dict(original=np.reshape(known, (-1, 2)))
    return make_split(paths, file, offset, length, label, boxes, **sizes), names


def _cached_list(paths, cache_dir, say):
    "`_list_tfrecords`, from the cache if these very files were listed before"
    kept = cache_folder(cache_dir) / "lists" / f"{file_stamp(paths)}.npz"
    try:
        with np.load(kept) as found:
            names = {int(k): v for k, v in json.loads(bytes(found["names"])).items()}
            arrays = [found[f"split_{key}"] for key in Split._fields[1:]]
            return Split(tuple(map(str, paths)), *arrays), names
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there, or not whole: list again
    say(f"data: listing {len(paths)} files, once (kept in {kept.parent})")
    split, names = _list_tfrecords(paths)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(kept.parent)) as temporary:
        made = Path(temporary) / "list.npz"
        text = np.frombuffer(json.dumps(names).encode(), np.uint8)
        arrays = {f"split_{key}": getattr(split, key) for key in Split._fields[1:]}
        np.savez(made, names=text, **arrays)
        os.replace(str(made), str(kept))
    return split, names


def _record_files(root, split):
    "Files of a split, beside each other or in a folder of their own"
    found = list(root.glob(f"{split}-*")) or list(root.glob(f"{split}/{split}-*"))
    return sorted(path for path in found if path.is_file() and not left_by_tools(path.name))


def _open_tfrecords(root, cache_dir, say):
    splits, names = {}, {}
    for split in ("train", "validation"):
        paths = _record_files(root, split)
        large = sum(os.path.getsize(path) for path in paths) > LARGE
        found = _cached_list(paths, cache_dir, say) if large else _list_tfrecords(paths)
        splits[split], found = found
        names.update(found)
        total = re.search(r"-of-0*(\d+)$", paths[0].name) if paths else None
        if total and int(total[1]) != len(paths):
            say(f"data: only {len(paths)} of the {total[1]} {split} files are in {root}")
    return splits, names


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def _list_folder(folder, classes):
    paths, sizes, labels = [], [], []
    for label, name in enumerate(classes):
        inside = _listed(folder / name) if (folder / name).is_dir() else ()
        found = [(path, os.stat(path)) for path in inside if path.suffix.lower() in IMAGE_SUFFIXES]
        found = [(path, facts) for path, facts in found if not stat.S_ISDIR(facts.st_mode)]
        if (folder / name).is_dir() and not found:
            raise ValueError(
                f"The class folder {folder / name} holds no picture ({' '.join(IMAGE_SUFFIXES)}). "
                f"Put pictures there, or remove the folder."
            )
        paths += [path for path, _ in found]
        sizes += [facts.st_size for _, facts in found]
        labels += [label] * len(found)
    return make_split(paths, np.arange(len(paths)), np.zeros(len(paths)), sizes, labels)


def _class_folders(folder, say):
    "Names of the class folders; says which folders are not taken for one"
    if not folder.is_dir():
        return []
    for path in folder.iterdir():
        if path.is_dir() and left_by_tools(path.name) and not path.name.startswith("."):
            say(f"data: {path} is not taken for a class: tools leave folders of that name")
    return [path.name for path in _listed(folder) if path.is_dir()]


def _open_folder(root, cache_dir, say):
    train, validation = root / "train", root / "validation"
    if not any((root / name).is_dir() for name in ("train", "validation", "val")):
        train = root  # nothing but class folders: `split` makes two sets of them
    classes, inside = _class_folders(train, say), _class_folders(validation, say)
    if not inside:
        validation, inside = root / "val", _class_folders(root / "val", say)
    classes = classes or inside
    extra = sorted(set(inside) - set(classes))
    if extra:
        raise ValueError(
            f"{validation} has class folders that {train} does not have: {', '.join(extra[:5])}. "
            f"A class has the same name in both."
        )
    splits = {"train": _list_folder(train, classes)}
    splits["validation"] = _list_folder(validation, classes)
    return splits, dict(enumerate(classes))


def _list_cifar(paths, head):
    "Files of rows of `head` label bytes and 3,072 colours; the last label counts"
    row, labels = 3072 + head, [np.zeros(0, np.uint8)]
    for path in paths:
        data = np.fromfile(path, np.uint8)
        if data.size % row:
            raise ValueError(
                f"Truncated file: {path} has {data.size} bytes, not a multiple of {row}. "
                f"Copy it again."
            )
        labels.append(data.reshape(-1, row)[:, head - 1])
    counts = [len(part) for part in labels[1:]]
    file = np.repeat(np.arange(len(paths)), counts)
    at = np.concatenate([np.arange(n) for n in [0] + counts]) * row + head
    return make_split(paths, file, at, np.full(len(at), 3072), np.concatenate(labels))


def _open_cifar(root, cache_dir, say):
    hundred = (root / "train.bin").exists() or (root / "test.bin").exists()
    train, test = ("train.bin", "test.bin") if hundred else ("data_batch_*.bin", "test_batch.bin")
    head = 2 if hundred else 1
    splits = {"train": _list_cifar(sorted(root.glob(train)), head)}
    splits["validation"] = _list_cifar(sorted(root.glob(test)), head)
    listed = root / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    names = listed.read_text().split() if listed.exists() else range(100 if hundred else 10)
    return splits, dict(enumerate(map(str, names)))


# A row for each image of a packed set of raw pixels; then one for each box, whose `boxes` is -1.
INDEX = np.dtype(
    [
        ("offset", "<i8"),  # Byte of the file of pixels at which the image begins
        ("size", "<i4", 2),  # Height and width
        ("original", "<i4", 2),  # The same of what was packed
        ("label", "<i4"),  # Class from 0
        ("crc", "<u4"),  # CRC-32 of the pixels, as zlib computes it
        ("boxes", "<i4"),  # How many boxes the image has
        ("box", "<f8", 4),  # Top, left, bottom, right in [0, 1]
    ]
)


def _list_raw(root, split):
    paths = sorted(root.glob(f"index-{split}-*.npy"))
    rows, boxes = [np.zeros(0, INDEX)], []
    for path in paths:
        found = np.load(path)
        if found.dtype != INDEX:
            raise ValueError(f"{path} is no index of a packed set. Pack again with effnet-pack.")
        images, flat = found[found["boxes"] >= 0], found["box"][found["boxes"] < 0]
        boxes += np.split(flat, np.cumsum(images["boxes"])[:-1])
        rows.append(images)
    file = np.repeat(np.arange(len(paths)), [len(one) for one in rows[1:]])
    rows, pixels = (
        np.concatenate(rows),
        [root / p.name.replace("index", "pixels", 1) for p in paths],
    )
    sizes = dict(original=rows["original"], stored=rows["size"])
    length = 3 * rows["size"].prod(1)
    return make_split(pixels, file, rows["offset"], length, rows["label"], boxes, **sizes)


def _open_raw(root, cache_dir, say):
    return {split: _list_raw(root, split) for split in ("train", "validation")}, {}


OPENERS = {
    "tfrecord": _open_tfrecords,
    "folder": _open_folder,
    "cifar": _open_cifar,
    "raw": _open_raw,
}


def recognize(root: Path) -> Tuple[str, Path]:
    """Return the format of a folder, and the folder itself or the one inside that an archive unpacks to.

    Raises `FileNotFoundError` for a folder that has none of the three layouts.
    """
    for inner in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        patterns = ("data_batch_*.bin", "test_batch.bin", "train.bin", "test.bin")
        if any(any(inner.glob(pattern)) for pattern in patterns):
            return "cifar", inner
    if any(root.glob("index-*-of-*.npy")):
        return "raw", root
    if _record_files(root, "train") or _record_files(root, "validation"):
        return "tfrecord", root
    if any((root / name).is_dir() for name in ("train", "validation", "val")):
        return "folder", root
    inside = (path for path in _listed(root) if path.is_dir())
    if any(file.suffix.lower() in IMAGE_SUFFIXES for folder in inside for file in _listed(folder)):
        return "folder", root
    names = sorted(path.name for path in root.iterdir())
    raise FileNotFoundError(
        f"No data set in {root}. It needs TFRecords (train-*, validation-*), class folders, "
        f"folders of class folders (train/, val/ or validation/), or CIFAR binaries (data_batch_*.bin or train.bin). "
        f"Found: {', '.join(names[:6]) + (', ...' if len(names) > 6 else '') or 'nothing'}."
    )
