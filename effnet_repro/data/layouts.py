"""The layouts of a folder, each listed as places of images: TFRecords, class folders (`folders`), CIFAR, packed pixels.

An opener takes a `Listing` and returns `({"train": Split, "validation": Split}, {label: name of the class})`.
`recognize` tells by the content of files which one is due.
"""

import io
import json
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Tuple

import numpy as np

from effnet_repro.config import list_some
from effnet_repro.data.cache import cache_folder, file_stamp, keep
from effnet_repro.data.folders import (
    IMAGE_SUFFIXES,
    deeper_set,
    holds_classes,
    is_alone,
    is_image_name,
    open_folders,
)
from effnet_repro.data.places import Damage, Split, left_by_tools, listed, make_split
from effnet_repro.data.shards import refuse_doubles, tell_missing
from effnet_repro.data.tfrecord import (
    feature_places,
    is_tfrecord,
    masked_crc,
    message_fields,
    read_feature,
    scan_tfrecord,
)
from effnet_repro.data.unread import hint_on
from effnet_repro.messages import in_a_line
from effnet_repro.outside import MOST_PIXELS, file_kind, head_of, kind_of, read_file

__all__ = ["IMAGE_SUFFIXES", "INDEX", "LARGE", "OPENERS", "Split", "left_by_tools", "recognize"]

LARGE = 2**31  # Bytes of a split beyond which lists are cached and reading goes in runs
_SIDES = ("ymin", "xmin", "ymax", "xmax")
_BEYOND = 1.5  # From an image's middle, in sides: a box that reaches further is one in pixels


class _Wrong(ValueError):
    "What is wrong with a record: the kind of damage, and a text in which {here} stands for the place"

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


def _record_facts(record):
    "Place of the image in a record, label, class name, boxes (m, 4) and the original size, if given"
    try:
        places = dict(feature_places(record))
        encoded = places.pop("image/encoded")
        facts = {key: read_feature(record, *place) for key, place in places.items()}
        ((_, _, values),) = message_fields(record, *encoded)  # a list of bytes,
        ((_, _, place),) = message_fields(record, *values)  # with one entry
        labels = facts["image/class/label"].tolist()
        name = (facts.get("image/class/text") or [b""])[0].decode("utf-8", "replace")
        begin, end = place
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        needs = f"it needs `image/encoded` (one JPEG) and `image/class/label`{_keys_of(record)}."
        raise _Wrong("record", f"{{here}} is not an image with a label: {needs}") from None
    return (begin, end), _label(labels), name, _boxes(facts), _original(facts)


def _keys_of(record):
    "What a message says of the keys that a record has"
    try:
        keys = [in_a_line(key)[:40] for key, _ in feature_places(record)]
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        return ""
    return f". It has {list_some(sorted(keys))}" if keys else ""


def _label(labels):
    if len(labels) != 1 or not isinstance(labels[0], int) or labels[0] < 1:
        raise _Wrong(
            "label",
            "`image/class/label` must be one whole number from 1 (0 is the unused background class). "
            f"Received: {str(labels)[:80]} in {{here}}.",
        )
    return labels[0]


def _boxes(facts):
    "Boxes (m, 4), cut at the edges of the image"
    sides = [facts.get(f"image/object/bbox/{side}", ()) for side in _SIDES]
    try:
        boxes = np.stack(sides, 1).astype(float).reshape(-1, 4)
        fine = np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
        fine = fine and (np.abs(boxes - 0.5) <= _BEYOND).all()
    except (TypeError, ValueError):
        fine = False
    if not fine:
        shown = ", ".join(str([str(value)[:12] for value in side][:3]) for side in sides)
        raise _Wrong(
            "box",
            "The boxes `image/object/bbox/` ymin, xmin, ymax and xmax must be as many finite numbers each, ymin up to "
            f"ymax, xmin up to xmax, in shares of the image's sides. Received: {shown} in {{here}}.",
        )
    return np.clip(boxes, 0, 1)


def _original(facts):
    sides = (facts.get(f"image/original/{side}", ()) for side in ("height", "width"))
    try:
        sides = [int(value) for side in sides for value in side]
    except (TypeError, ValueError, OverflowError):
        sides = [0, 0]
    if len(sides) == 2 and not 0 < min(sides) <= max(sides) <= MOST_PIXELS:
        raise _Wrong("record", f"{{here}} has a wrong `image/original/` height or width: {sides}.")
    return sides


def _list_tfrecord(path, damage):
    "Facts of each record of a file, none of one that cannot be read; see `_facts_of_records`"
    try:
        return _facts_of_records(path, damage)
    except OSError as error:
        damage("file", f"{path} cannot be read: {error.strerror or error}.")
        return []


def _facts_of_records(path, damage):
    "Facts of each record of a file; the image's place as offset in the file and length"

    def broken(text):
        if "record 0 of" in text and (kind := kind_of(head_of(path))) != "of no known kind":
            text = f"{text} It is {kind}."
        damage("file" if text.startswith("Truncated") else "record", text)

    records, facts = scan_tfrecord(path, damaged=broken).tolist(), []
    if not records:
        return facts
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as view:
            for i, (at, length) in enumerate(records):
                try:
                    with view[at : at + length] as record:
                        (begin, end), *rest = _record_facts(record)
                except _Wrong as wrong:
                    here, text = f"record {i} of {path}", str(wrong)
                    if (
                        struct.pack("<I", masked_crc(view[at : at + length]))
                        != view[at + length :][:4]
                    ):
                        text = "Damaged file: the checksum of {here} is wrong. Copy the file again."
                    text = text.replace("{here}", here)
                    damage(wrong.kind, text[0].upper() + text[1:])
                else:
                    facts.append((at + begin, end - begin, *rest))
    return facts


def _list_tfrecords(paths, damage):
    lists = [_list_tfrecord(path, damage) for path in paths]
    facts = [fact for found in lists for fact in found]
    offset, length, label, name, boxes, original = zip(*facts) if facts else [()] * 6
    file = np.repeat(np.arange(len(paths)), [len(found) for found in lists])
    names = {}
    for number, text in sorted({pair for pair in zip(label, name) if pair[1]}):
        names.setdefault(number - 1, []).append(text)
    known = original if len(original) and all(len(one) == 2 for one in original) else ()
    sizes = dict(original=np.reshape(known, (-1, 2)))
    label = np.array(label, np.int64) - 1
    return make_split(paths, file, offset, length, label, boxes, **sizes), names


def _cached_list(paths, listing):
    "`_list_tfrecords`, from the cache if these very files were listed before"
    kept = cache_folder(listing.cache_dir) / "lists" / f"{file_stamp(paths)}.npz"
    try:
        with np.load(kept) as found:
            names = {int(k): list(v) for k, v in json.loads(bytes(found["texts"])).items()}
            arrays = [found[f"split_{key}"] for key in Split._fields[1:]]
            damaged = json.loads(bytes(found["damaged"])) if "damaged" in found else []
        split = Split(tuple(map(str, paths)), *arrays)
        damaged = [Damage(*map(str, one)) for one in damaged]
    except (
        Exception
    ):  # not there, or damaged in one of many ways: it is only a cache, so list again
        pass
    else:
        for one in damaged:
            listing.damage(*one)
        return split, names
    listing.say(f"data: listing {len(paths)} files, once (kept in {kept.parent})")
    before = len(listing.damaged)
    split, names = _list_tfrecords(paths, listing.damage)
    text, made = np.frombuffer(json.dumps(names).encode(), np.uint8), io.BytesIO()
    damaged = np.frombuffer(json.dumps(listing.damaged[before:]).encode(), np.uint8)
    arrays = {f"split_{key}": getattr(split, key) for key in Split._fields[1:]}
    np.savez(made, texts=text, damaged=damaged, **arrays)
    keep(kept, made.getvalue())
    return split, names


def _named_records(root, split):
    "What the names of records fit, beside each other or in a folder of their own; without what tools leave"
    found = list(root.glob(f"{split}-*")) or list(root.glob(f"{split}/{split}-*"))
    return sorted(path for path in found if not left_by_tools(path.name) and not path.is_dir())


# So are records called; of other names, such as train-labels.csv, the content decides.
_RECORD_NAME = re.compile(r"(train|validation)-\d+(-of-\d+)?(\.tfrecords?)?|.*\.tfrecords?")


def _record_files(root, split, listing=None):
    "Files of records of a split; `listing` is told what is called so and is none"
    found, compressed = [], re.compile(r"a (gzip|bzip2|xz) archive")
    for path in _named_records(root, split):
        if path.is_file() and (_RECORD_NAME.fullmatch(path.name) or is_tfrecord(path)):
            found.append(path)
        elif listing and path.is_symlink() and not path.exists():
            listing.damage_link(path)
        elif listing and not path.is_file():
            listing.damage("special file", f"{path} is {file_kind(path)}, not a file of records.")
        elif listing and compressed.match(kind_of(head_of(path))):
            kind = kind_of(head_of(path))
            listing.damage("file", f"{path} is {kind}: unpack it before it is read.")
        elif listing and not path.suffix:
            text = f"Not a TFRecord file, or damaged: {path} is {kind_of(head_of(path))}."
            listing.damage("file", text)
        elif listing:
            listing.leave(path)
    return found


def _open_tfrecords(listing):
    splits, names, root = {}, {}, listing.root
    others = [p for p in listed(root) if re.match("(val|valid|test|dev)-", p.name) and p.is_file()]
    others = [path for path in others if is_tfrecord(path)]
    if others:
        listing.say(
            f"data: {len(others)} files such as {others[0]} are not read: validation files are called validation-*"
        )
    for split in ("train", "validation"):
        paths = _record_files(root, split, listing)
        inside = root / split
        if paths and paths[0].parent == root and inside.is_dir() and listed(inside):
            listing.say(
                f"data: the {split} images are read from TFRecords in {root}; {inside} is not read"
            )
        refuse_doubles(paths)
        empty = [path.name for path in paths if not os.path.getsize(path)]
        if empty:
            listing.say(f"data: no records are in {list_some(empty)} of {root}")
        large = sum(os.path.getsize(path) for path in paths) > LARGE
        splits[split], found = (
            _cached_list(paths, listing) if large else _list_tfrecords(paths, listing.damage)
        )
        for label, texts in found.items():
            names[label] = sorted({*names.get(label, ()), *texts})
        tell_missing(paths, f"{split} files", listing)
    return splits, names


def _list_cifar(paths, total, head, classes, listing):
    "`total` files of rows of `head` label bytes and 3,072 colors; the last label counts"
    refuse_doubles(paths)
    tell_missing(paths, f"files {paths[0].name.replace('1', '*')}" if paths else "", listing, total)
    row, labels, places, counts = 3072 + head, [np.zeros(0, np.uint8)], [np.zeros(0, int)], []
    for path in paths:
        data = np.zeros(0, np.uint8)
        try:
            if path.is_file():
                data = np.fromfile(path, np.uint8)
            else:
                listing.damage("special file", f"{path} is no file that can be read.")
        except OSError as error:
            listing.damage_file(path, error)
        if data.size % row or (path.is_file() and not os.path.getsize(path)):
            listing.damage(
                "file",
                f"Truncated file: {path} has {data.size} bytes, not a multiple of {row}. Copy it again.",
            )
        label = data[: data.size // row * row].reshape(-1, row)[:, head - 1]
        for i in np.flatnonzero(label >= classes):
            text = f"Image {i} of {path} has the label {label[i]}; the last one is {classes - 1}."
            listing.damage("label", text)
        at = np.flatnonzero(label < classes)
        labels.append(label[at])
        places.append(at * row + head)
        counts.append(len(at))
    file, at = np.repeat(np.arange(len(paths)), counts), np.concatenate(places)
    return make_split(paths, file, at, np.full(len(at), 3072), np.concatenate(labels))


def _open_cifar(listing):
    root = listing.root
    hundred = (root / "train.bin").exists() or (root / "test.bin").exists()
    if hundred and any(root.glob("data_batch_*.bin")):
        raise ValueError(f"{root} holds the files of CIFAR-10 and of CIFAR-100. Keep those of one.")
    train, test = ("train.bin", "test.bin") if hundred else ("data_batch_*.bin", "test_batch.bin")
    how = (2, 100, listing) if hundred else (1, 10, listing)
    splits = {"train": _list_cifar(sorted(root.glob(train)), 1 if hundred else 5, *how)}
    splits["validation"] = _list_cifar(sorted(root.glob(test)), 1, *how)
    path = root / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    names = read_file(path).decode("utf-8", "replace").split() if path.is_file() else range(how[1])
    if len(names) != how[1]:
        raise ValueError(
            f"{path} holds {len(names)} names for {how[1]} classes. Copy it again, or remove it."
        )
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


def _read_index(path, pixels):
    "The rows of images and the boxes of each, of the index of a packed set"
    try:
        found = np.load(
            path, mmap_mode="r"
        )  # which refuses a header that claims more than there is
        if found.dtype != INDEX or found.ndim != 1:
            raise ValueError
        found = np.array(found)
        images, flat = found[found["boxes"] >= 0], found["box"][found["boxes"] < 0]
        sizes, bytes_there = images["size"].astype(np.int64), os.path.getsize(pixels)
        fine = (sizes > 0).all(1) & (sizes.prod(1) <= MOST_PIXELS) & (images["label"] >= 0)
        fine &= (images["offset"] >= 0) & (images["offset"] + 3 * sizes.prod(1) <= bytes_there)
        if not fine.all() or images["boxes"].sum() != len(flat) or not np.isfinite(flat).all():
            raise ValueError
        colors = np.load(pixels, mmap_mode="r")
        if colors.dtype != np.uint8 or colors.ndim != 1:
            raise ValueError
    except (OSError, ValueError, EOFError):
        text = f"{path} is no index of a packed set, or does not fit {Path(pixels).name}. Pack again with effnet-pack."
        raise ValueError(text) from None
    return images, np.split(flat, np.cumsum(images["boxes"])[:-1])


def _list_raw(root, split, listing):
    rows, boxes, pixels = [], [], []
    paths = sorted(root.glob(f"index-{split}-*.npy"))
    refuse_doubles(paths)
    tell_missing(paths, f"{split} files", listing)
    for path in paths:
        beside = root / path.name.replace("index", "pixels", 1)
        try:
            images, own = _read_index(path, beside)
        except ValueError as error:
            listing.damage("file", str(error))
            continue
        boxes += own[: len(images)]
        rows.append(images)
        pixels.append(beside)
    file = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
    rows = np.concatenate([np.zeros(0, INDEX), *rows])
    sizes = dict(original=rows["original"], stored=rows["size"])
    length = 3 * rows["size"].prod(1)
    return make_split(pixels, file, rows["offset"], length, rows["label"], boxes, **sizes)


def _open_raw(listing):
    return {n: _list_raw(listing.root, n, listing) for n in ("train", "validation")}, {}


OPENERS = {
    "tfrecord": _open_tfrecords,
    "folder": open_folders,
    "cifar": _open_cifar,
    "raw": _open_raw,
}
_CIFAR = ("data_batch_*.bin", "test_batch.bin", "train.bin", "test.bin")


def _is_cifar(folder):
    "Whether CIFAR's files are there; beside class folders their size must be right, too"
    found = [path for pattern in _CIFAR for path in folder.glob(pattern)]
    if not found or is_alone(folder):
        return bool(found)
    return any(path.stat().st_size % row == 0 for path in found for row in (3073, 3074))


def _described(path):
    "The name of what lies in a folder, with what kind of file it is"
    try:
        return path.name if path.is_dir() else f"{path.name} ({file_kind(path)})"
    except OSError:
        return f"{path.name} (a link to nothing)"


def recognize(root: Path) -> Tuple[str, Path]:
    """Return the format of a folder, and the folder itself or the one inside that an archive unpacks to.

    Raises `FileNotFoundError` for a folder that has none of the layouts.
    """
    for inner in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        if inner.is_dir() and _is_cifar(inner):
            return "cifar", inner
    if any(root.glob("index-*-of-*.npy")):
        return "raw", root
    if _record_files(root, "train") or _record_files(root, "validation"):
        return "tfrecord", root
    deeper = deeper_set(root) if is_alone(root) else None
    if deeper is None and holds_classes(root):
        return "folder", root
    names = [_described(path) for path in listed(root)[:7]]
    packed = any("archive)" in name for name in names)
    flat = any(is_image_name(path.name) and path.is_file() for path in listed(root))
    hint = hint_on(root) or ("Unpack the archive first." if packed else "")
    hint = hint or (
        "Its images lie in no class folders: sort them into a folder for each class."
        if flat
        else ""
    )
    hint = hint or "If it is one of these, name it with `data_format`."
    raise FileNotFoundError(
        f"No data set in {root}. It needs TFRecords (train-*, validation-*), class folders, "
        f"folders of class folders (train/, val/ or validation/), or CIFAR binaries (data_batch_*.bin or train.bin). "
        f"Found: {', '.join(names[:6]) + (', ...' if len(names) > 6 else '') or 'nothing'}. "
        + (f"Deeper there is {deeper}: give that folder." if deeper else hint)
    )
