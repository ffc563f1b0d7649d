"""Find images that cannot be decoded before a run, and leave them out.

The order of an epoch is drawn for the images that are left: it depends on the seed and the training step only.
"""

import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict

import numpy as np

from effnet_repro.config import list_some
from effnet_repro.data.cache import cache_folder, file_stamp, keep
from effnet_repro.data.decode import HINT, decode_image, located, read_encoded
from effnet_repro.data.places import without
from effnet_repro.data.tfrecord import masked_crc, scan_tfrecord
from effnet_repro.data.threads import core_count
from effnet_repro.outside import read_json


def problems(numbers, problem: Callable[[int], str]) -> Dict[int, str]:
    """Return what `problem` says of each image number, "" for nothing, asked on all cores."""

    def look(part):
        return {int(i): text for i in part for text in [problem(i)] if text}

    with ThreadPoolExecutor(core_count()) as pool:
        parts = np.array_split(np.asarray(numbers), -(-len(numbers) // 64) or 1)
        return {i: text for found in pool.map(look, parts) for i, text in found.items()}


def find_damaged(
    dataset,  # `DataSet` from `open_data`
    split: str,  # "train" or "validation"
    numbers=None,  # Numbers of the images to look at; None = all, and the records' checksums
) -> Dict[int, str]:  # Number of each damaged image -> what is wrong, and where it is
    """Decode images and list those that cannot be"""
    places = dataset.splits[split]
    chosen = np.arange(len(places.label)) if numbers is None else np.asarray(numbers, int)

    def problem(i):
        try:
            encoded, _ = read_encoded(dataset, split, i)
            with located(dataset, split, i):
                decode_image(encoded)
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""

    found = problems(chosen, problem)
    if dataset.format == "tfrecord" and numbers is None:
        found = {**_wrong_checksums(places), **found}
    if dataset.format == "raw" and numbers is None:
        found = {**_wrong_pixels(places), **found}
    return found


def _wrong_pixels(places):
    "Images of a packed set whose pixels do not give their checksum"
    found = {}
    for number, path in enumerate(places.files):
        if number not in places.file:
            continue
        index = np.load(str(Path(path).with_name(Path(path).name.replace("pixels", "index", 1))))
        index = index[index["boxes"] >= 0]
        crcs = dict(zip(index["offset"].tolist(), index["crc"].tolist()))
        with open(path, "rb") as file:
            for i in np.flatnonzero(places.file == number):
                file.seek(places.offset[i])
                if zlib.crc32(file.read(int(places.length[i]))) != crcs[int(places.offset[i])]:
                    text = f"Damaged file: the checksum of the pixels at byte {places.offset[i]}"
                    found[int(i)] = f"{text} is wrong. It is image {i}, in {path}."
    return found


def _wrong_checksums(places):
    "Images in records whose data do not give their checksum"
    found = {}
    for number, path in enumerate(places.files):
        inside = np.flatnonzero(places.file == number)
        if not len(inside):
            continue
        records = scan_tfrecord(path, damaged=lambda text: None)  # those are not in the list
        around = np.searchsorted(records[:, 0], places.offset[inside], "right") - 1
        with open(path, "rb") as file:
            for i, (at, length) in zip(inside, records[around]):
                file.seek(at)
                data, crc = file.read(int(length)), file.read(4)
                if struct.pack("<I", masked_crc(data)) != crc:
                    text = f"Damaged file: the checksum of the record at byte {at - 12} is wrong."
                    found[int(i)] = f"{text} It is image {i}, in {path}."
    return found


def leave_out_damaged(
    dataset,  # `DataSet`
    cache_dir,  # Cache folder; None = the usual one
    say: Callable[[str], None],  # Is told when images must be decoded to find out
    find: Callable[..., Dict[int, str]] = find_damaged,  # Called with the data set and a split
    by: str = "",  # The decoder that `find` asks; "" = the one whose word goes for all
):
    """Return the `DataSet` without its damaged images, which it names in `damaged`.

    Which ones these are, is kept in the cache folder.
    """
    splits, damaged, kinds = {}, list(dataset.damaged), list(dataset.damaged_kinds)
    for name, places in dataset.splits.items():
        kept = cache_folder(cache_dir) / "damaged" / f"{_stamp(places)}{by and '-'}{by}.json"
        found = _kept(kept, len(places.label))
        if found is None:
            say(f"data: decoding {len(places.label):,} {name} images{by and ' with '}{by}, once")
            found = {i: text.replace(f" {HINT}", "") for i, text in find(dataset, name).items()}
            keep(kept, json.dumps(found).encode())
        splits[name] = without(places, sorted(found)) if found else places
        gone = sorted({*places.label.tolist()} - {*splits[name].label.tolist()})
        if gone:
            classes = list_some(dataset.class_names[label] for label in gone)
            say(f"data: all {name} images of {classes} are damaged")
        damaged += [found[i] for i in sorted(found)]
        kinds += ["image"] * len(found)
    counts = {f"{name}_count": len(split.label) for name, split in splits.items()}
    left = dict(damaged=tuple(damaged), damaged_kinds=tuple(kinds))
    return replace(dataset, splits=splits, **left, **counts)


_RULES = 2  # Raise it when what counts as damaged changes: what is kept was found by these rules


def _stamp(places):
    "Digits that stand for the files of a split, for which images are in it, and for the rules"
    images = zlib.crc32(np.ascontiguousarray(places.offset)) ^ len(places.label)
    return f"{file_stamp(places.files)}-{images:08x}-{_RULES}"


def _kept(path, count):
    "What was found earlier among `count` images; None where that is not there, or not whole"
    try:
        found = {int(i): str(text) for i, text in read_json(path).items()}
    except Exception:  # whatever is wrong with it, it is only a cache
        return None
    return found if all(0 <= i < count for i in found) else None
