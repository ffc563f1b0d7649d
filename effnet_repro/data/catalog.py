"""What is in a folder: `open_data` lists images, classes and damage as a `DataSet`, which can sum itself up."""

import contextlib
import hashlib
import itertools
import json
import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np

from effnet_repro.config import list_some, unknown_name
from effnet_repro.data.damage import leave_out_damaged
from effnet_repro.data.decoders import check_decoder
from effnet_repro.data.layouts import OPENERS, recognize
from effnet_repro.data.places import Listing, Split, count_kinds, without
from effnet_repro.data.sample import sample_set
from effnet_repro.data.split import split_off
from effnet_repro.data.unread import hint_on
from effnet_repro.messages import in_a_line, say
from effnet_repro.outside import MOST_CLASSES, file_kind, read_json
from effnet_repro.paths import local_path, no_folder


@dataclass(frozen=True, repr=False)
class DataSet:
    "Where the images of a data set lie, and what they show"

    format: str  # "tfrecord", "folder", "cifar", or "raw" of a packed set
    root: str  # Folder
    num_classes: int  # Width of the classifier
    class_names: Tuple[str, ...]  # By label from 0; the number where there is no name
    train_count: int  # Training images
    validation_count: int  # Validation images
    files: Dict[str, int]  # Number of files of each split
    builtin: bool  # True for the built-in sample set
    splits: Dict[str, Split] = field(compare=False)
    damaged: Tuple[str, ...] = ()  # What was left out, and why: see `on_corrupt` of `open_data`
    damaged_kinds: Tuple[str, ...] = ()  # The kind of each: see `places`
    validation_split: Optional[float] = None  # Share that names' hashes chose: see `split`
    decoder: str = field(default="auto", compare=False)  # What makes pixels: see `decoders`
    on_corrupt: str = field(default="refuse", compare=False)  # What was asked for: see `open_data`
    # What readers found out about the images, as long as this object lives; a copy begins anew.
    kept: Dict[str, Any] = field(default_factory=dict, init=False, compare=False)

    @property
    def fingerprint(
        self,
    ) -> str:  # Changes when a training image is added, moved, resized or relabelled
        "Sum up names, places, bytes and labels of the training images"
        split = self.splits["train"]
        names = "\n".join(map(os.path.basename, split.files))
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
        for numbers in (split.file, split.offset, split.length, split.label):
            digest.update(np.ascontiguousarray(numbers, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def split_fingerprint(self, split: str) -> str:  # Changes with every image, place or label
        "Sum up the paths, bytes, labels and class names of the `split`"
        return _sum_up(self, split)

    def __repr__(self):
        return f"<DataSet: {self.describe().partition(': ')[2]}>"

    def describe(self) -> str:  # One line
        "Say what was found, and where"
        place = "built-in sample set" if self.builtin else self.root
        drawn = self.validation_split
        drawn = "" if drawn is None else f"; {drawn:g} of them validate, chosen by their names"
        kinds = count_kinds(self.damaged_kinds)
        left_out = (
            f"; {len(self.damaged):,} damaged ones left out ({kinds})" if self.damaged else ""
        )
        return (
            f"data: {place} ({self.format}): {self.num_classes} classes, {self.train_count:,} "
            f"training and {self.validation_count:,} validation images{drawn}{left_out}"
        )


def one_split(dataset: DataSet, split: str) -> DataSet:
    """Return the data set with one split, without what readers found out: this is sent to other processes."""
    return replace(dataset, splits={split: dataset.splits[split]})


_WHOLE = 2**28  # bytes of a split that are all read


_LOOKED_AT = 2**16  # images of a larger one of which a few bytes are read


def _at_once(path, flags):
    "Open a file without waiting for the other end of what became a FIFO"
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _pieces(split):
    "Yield bytes of the images of a split: all, or of large splits a few of some"
    count, whole = len(split.label), split.length.sum() <= _WHOLE
    chosen = np.arange(count)
    if not whole and count > _LOOKED_AT:
        chosen = np.linspace(0, count - 1, _LOOKED_AT).astype(int)
    for number, inside in itertools.groupby(chosen, lambda i: split.file[i]):
        with open(split.files[number], "rb", buffering=0, opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                path = split.files[number]
                raise ValueError(f"{path} is {file_kind(path)} now, not a file.")
            for i in inside:
                begin, length = int(split.offset[i]), int(split.length[i])
                places = [(0, length)] if whole else [(length // 2, 64), (max(length - 64, 0), 64)]
                for at, size in places:
                    file.seek(begin + at)
                    yield file.read(min(size, length - at))


def _sum_up(dataset, name):
    "`DataSet.split_fingerprint`"
    if name not in dataset.splits:
        raise unknown_name("split", name, dataset.splits)
    split = dataset.splits[name]
    files = [Path(os.path.relpath(path, dataset.root)).as_posix() for path in split.files]
    words = json.dumps([dataset.format, dataset.num_classes, dataset.class_names, files])
    digest = hashlib.sha256(words.encode())
    for numbers in (split.file, split.offset, split.length, split.label, split.box_begin):
        digest.update(np.ascontiguousarray(numbers, np.int64).tobytes())
    digest.update(np.ascontiguousarray(split.boxes, np.float64).tobytes())
    if len(split.original):  # crops are drawn on them
        digest.update(np.ascontiguousarray(split.original, np.int64).tobytes())
    for piece in _pieces(split):
        digest.update(piece)
    return digest.hexdigest()[:16]


_MOST_CLASSES = 100_000  # without an `info.json` that says otherwise


def _whole(value, most):
    "A whole number from 1 to `most`"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
        raise ValueError(f"labels and num_classes are numbers from 1 to {most:,}")
    if value != int(value):
        raise ValueError(f"{value} is not a whole number")
    return int(value)


def _read_info(path):
    "Number and names of the classes in `info.json`, and images of each split: (None, {}, {}) where there is none"
    if not path.exists():
        return None, {}, {}
    try:
        info = read_json(path)
        if not isinstance(info.get("classes", []), list):
            raise ValueError("`classes` must be a list")
        number = info.get("num_classes")
        number = None if number is None else _whole(number, MOST_CLASSES)
        names = {}
        for one in info.get("classes", ()):
            label = _whole(one["label"], number or _MOST_CLASSES)
            if not isinstance(one["text"], (str, int, float)):
                raise ValueError(f"the text of label {label} is none")
            if names.setdefault(label - 1, str(one["text"])) != str(one["text"]):
                raise ValueError(f"label {label} has two names")
        splits = info.get("splits") if isinstance(info.get("splits"), dict) else {}
        counts = {name: one.get("records") for name, one in splits.items() if isinstance(one, dict)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        what = what.replace(f"{path} ", "it ").rstrip(".")[:200]
        raise ValueError(
            f"{path} is not a description of classes ({what}). It needs "
            f'{{"num_classes": 10, "classes": [{{"label": 1, "text": "cat"}}, ...]}}, or remove it.'
        ) from None
    return number, names, counts


def _one_name(label, texts, told):
    "The name of a class: `told` by info.json, or what all records call it"
    texts = [texts] if isinstance(texts, str) else texts
    if told is not None or len(texts) == 1:
        return texts[0] if told is None else told
    calls = " and ".join(repr(text) for text in texts[:3])
    raise ValueError(
        f"Records of label {label + 1} call it {calls}: a label has one meaning in all files. Mend the records, or "
        "name the classes in info.json."
    )


def _compare_names(listing, told, names):
    "Refuse an info.json that gives a class folder the name of another; say it where records call a label otherwise"
    for label, text in told.items():
        texts = [names[label]] if isinstance(names.get(label), str) else names.get(label, [])
        if not set(texts) & (set(told.values()) - {text}):
            continue
        path = listing.root / "info.json"
        if isinstance(names[label], str):
            raise ValueError(
                f"{path} calls label {label + 1} {text!r}, which is the folder {texts[0]!r}. Mend it, or remove it."
            )
        calls = f"calls label {label + 1} {text!r}, and records call it {texts[0]!r}"
        return listing.say(f"data: {path} {calls}: info.json counts")


def _classes(listing, splits, names):
    "Splits whose labels are checked, and number and names of the classes, by `info.json` if there is one"
    root = listing.root
    number, told, counts = _read_info(root / "info.json")
    _compare_names(listing, told, names)
    names = {
        label: _one_name(label, names.get(label), told.get(label)) for label in {*names, *told}
    }
    most = number or _MOST_CLASSES
    limit = (
        f"the {number} classes of {root}"
        if number
        else f"{most:,} (or give num_classes in info.json)"
    )
    checked = {}
    for name, split in splits.items():
        beyond = np.flatnonzero(split.label >= most)
        for i in beyond:
            listing.damage(
                "label",
                f"Labels must not exceed {limit}. Received: label {int(split.label[i]) + 1} in "
                f"{split.files[split.file[i]]} ({len(beyond)} images of the {name} split).",
            )
        checked[name] = without(split, beyond) if len(beyond) else split
    highest = max(int(split.label.max(initial=-1)) for split in checked.values())
    if highest < 0:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:6])
        gone = count_kinds([one.kind for one in listing.damaged])
        left = f"; left out: {gone}" if gone else ""
        hint = "" if gone else hint_on(root)
        raise FileNotFoundError(f"No images in {root}. Found: {there}{left}. {hint}".rstrip())
    names = {label: name for label, name in names.items() if label < most}
    for name, split in checked.items():
        many, missing = counts.get(name), len(split.label) + len(listing.damaged)
        if isinstance(many, int) and missing < many:
            listing.say(
                f"data: info.json in {root} speaks of {many:,} {name} images; {len(split.label):,} are there"
            )
    return checked, number or max(highest, *names, 0) + 1, names


def _other_format(root, data_format):
    "What a message says where the format that was asked for gave no images and another one fits"
    with contextlib.suppress(OSError, ValueError):
        kind = recognize(root)[0]
        if data_format not in (None, kind):
            return f" It looks like data_format={kind!r}."
    return ""


def _check_open(data_dir, data_format, on_corrupt):
    if data_format is not None and data_format not in OPENERS:
        raise unknown_name("data_format", data_format, OPENERS)
    if on_corrupt not in ("refuse", "skip"):
        raise unknown_name("on_corrupt", on_corrupt, ("refuse", "skip"))


def open_data(
    data_dir=None,  # Folder of the data set; None = the built-in sample set
    data_format: Optional[str] = None,  # "tfrecord", "folder", "cifar", "raw"; None = see the files
    cache_dir=None,  # Cache folder; None = EFFNET_REPRO_CACHE, or ~/.cache/effnet_repro
    *,
    on_corrupt: str = "refuse",  # or "skip": look at everything, and leave out what is damaged
    decoder: str = "auto",  # or "simplejpeg", "pillow", "tensorflow", "nvimagecodec": see `decoders`
    validation_split: Optional[float] = None,  # Share of class folders that validates: see `split`
    verbose: bool = True,  # Print what was found
) -> DataSet:
    "List the images in `data_dir` and say what was found"
    _check_open(data_dir, data_format, on_corrupt)
    check_decoder(decoder)
    root = sample_set(cache_dir) if data_dir is None else local_path(data_dir, "data_dir")
    if not root.is_dir():
        raise FileNotFoundError(f"{no_folder(root, 'data_dir')} Leave it out for the built-in set.")
    if os.path.exists(root / "pack.json") and not os.path.exists(root / "info.json"):
        raise ValueError(
            f"{root} holds a set that effnet-pack has not finished. Run the same command again: it goes on."
        )
    kind, root = (data_format, root) if data_format else recognize(root)
    listing = Listing(root, cache_dir, lambda text: say(in_a_line(text)), on_corrupt == "skip")
    splits, names = OPENERS[kind](listing)
    splits, validation_split = split_off(splits, root, kind, validation_split)
    try:
        splits, num_classes, names = _classes(listing, splits, names)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_other_format(root, data_format)}") from None
    listing.tell_left()
    data = DataSet(
        format=kind,
        root=str(root),
        num_classes=num_classes,
        class_names=tuple(names.get(label, str(label)) for label in range(num_classes)),
        train_count=len(splits["train"].label),
        validation_count=len(splits["validation"].label),
        files={name: len(split.files) for name, split in splits.items()},
        builtin=data_dir is None,
        splits=splits,
        damaged=tuple(one.text for one in listing.damaged),
        damaged_kinds=tuple(one.kind for one in listing.damaged),
        validation_split=validation_split,
        decoder=decoder,
        on_corrupt=on_corrupt,
    )
    data = leave_out_damaged(data, cache_dir, say) if on_corrupt == "skip" else data
    if verbose:
        say_found(data)
    return data


def say_found(
    data: DataSet,  # From `open_data`
):
    "Print what was found, and the first images that were left out"
    say(in_a_line(data.describe()))
    for place in data.damaged[:5]:
        say(in_a_line(f"  left out: {place}"))
    shown = {name: set(split.label.tolist()) for name, split in data.splits.items()}
    for name, other in (("training", "validation"), ("validation", "training")):
        here, there = (shown[{"training": "train"}.get(n, n)] for n in (name, other))
        alone = [data.class_names[label] for label in sorted(there - here)]
        if here and alone:
            say(
                in_a_line(
                    f"data: no {name} images of {list_some(alone)}, though there are {other} images"
                )
            )
