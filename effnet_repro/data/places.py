"""Where images are: `Split` lists them, and `Listing` is what an opener of a layout is given and reports to.

One definition of damaged, for all layouts: a file, record, label, box or link that is meant as an image and cannot be
used as one. `on_corrupt="refuse"` stops at the first one, "skip" leaves it out and counts it by its kind. What is not
meant as an image (texts, films, formats that no reader knows) is left out and counted in either case.
"""

import collections
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import numpy as np


class Split(NamedTuple):
    "The images of one split, as arrays with an entry for each image"

    files: Tuple[str, ...]  # Paths
    file: np.ndarray  # Index into `files`
    offset: np.ndarray  # Byte at which the encoded image begins
    length: np.ndarray  # Its bytes
    label: np.ndarray  # Class from 0, int32
    boxes: np.ndarray  # Boxes of objects, (m, 4): top, left, bottom, right in [0, 1]
    box_begin: np.ndarray  # Image i has the boxes box_begin[i] to box_begin[i + 1]
    # Height and width, (n, 2), of what was made smaller when the set was packed, and of raw pixels; else empty.
    original: np.ndarray = np.zeros((0, 2), np.int32)
    stored: np.ndarray = np.zeros((0, 2), np.int32)

    def __repr__(self):
        return f"<Split: {len(self.label):,} images in {len(self.files):,} files>"


def make_split(paths, file, offset, length, label, boxes=(), **sizes) -> Split:
    """Return a `Split` of these columns, an entry for each image.

    `boxes` are arrays (m, 4), or none at all; `sizes` are `original` and `stored`, where there are such. Labels are
    int32 unless one is too large for that.
    """
    numbers = [np.asarray(values, np.int64) for values in (file, offset, length)]
    counts = [len(found) for found in boxes] if len(boxes) else np.zeros(len(label), int)
    flat = np.concatenate([np.zeros((0, 4)), *(found for found in boxes if len(found))])
    begin = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    sizes = {name: np.asarray(size, np.int32) for name, size in sizes.items()}
    label = np.asarray(label, np.int64)
    label = label if label.max(initial=0) > np.iinfo(np.int32).max else label.astype(np.int32)
    return Split(tuple(map(str, paths)), *numbers, label, flat, begin, **sizes)


def select(places: Split, numbers) -> Split:
    """Return the split with the images of these `numbers` only, in their order."""
    boxes = [places.boxes[places.box_begin[i] : places.box_begin[i + 1]] for i in numbers]
    columns = (getattr(places, key)[numbers] for key in ("file", "offset", "length", "label"))
    sizes = {key: getattr(places, key) for key in ("original", "stored")}
    sizes = {key: size[numbers] for key, size in sizes.items() if len(size)}
    return make_split(places.files, *columns, boxes, **sizes)


def without(places: Split, gone) -> Split:
    """Return the split without the images of the numbers `gone`."""
    return select(places, np.setdiff1d(np.arange(len(places.label)), gone))


_TOOLS = {"__macosx", "__pycache__", "lost+found", "$recycle.bin", "recycler", "thumbnails"}
_TOOLS |= {"system volume information", "network trash folder", "temporary items"}
_TOOLS |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "_thumbnails", "#recycle", "#snapshot"}
_TOOL_ENDINGS = ("~", ":zone.identifier", "@synoeastream", "@synoresource")


def left_by_tools(name: str) -> bool:
    """Return whether a program left this file or folder, and nobody means it as a class or an image."""
    name = name.lower()
    return name in _TOOLS or name.startswith((".", "@", "~")) or name.endswith(_TOOL_ENDINGS)


def listed(folder: Path) -> List[Path]:
    """Return the paths in a folder, sorted, without what tools leave."""
    paths = (path for path in folder.iterdir() if not left_by_tools(path.name))
    return sorted(paths, key=lambda path: path.name)


class Damage(NamedTuple):
    "Something that was meant as an image and is left out"

    kind: str  # "image", "record", "file", "label", "box", "link" or "special file"
    text: str  # What is wrong, and where


def count_kinds(kinds: Sequence[str]) -> str:
    """Return, for example, "2 images, 1 box": how often each kind is there, the most frequent first."""
    plural = lambda kind, n: kind if n == 1 else kind + ("es" if kind.endswith("x") else "s")
    counted = collections.Counter(kinds).most_common()
    return ", ".join(f"{n:,} {plural(kind, n)}" for kind, n in counted)


@dataclass
class Listing:
    "What an opener is given: the folder, and whom to tell of what it finds there"

    root: Path
    cache_dir: Any  # Cache folder; None = the usual one
    say: Callable[[str], None]  # Tells the user a line
    skip: bool = False  # Whether damaged ones are left out; else the first one is an error
    damaged: List[Damage] = field(default_factory=list)
    left: collections.Counter = field(default_factory=collections.Counter)  # Kind -> files

    def damage(self, kind: str, text: str) -> None:
        """Leave something damaged out, or raise `ValueError` with `text`, which says what is wrong and where."""
        if not self.skip:
            raise ValueError(
                f"{text} Mend or remove it, or leave damaged ones out with on_corrupt='skip'."
            )
        self.damaged.append(Damage(kind, text))

    def damage_link(self, path) -> None:
        """Leave out a link to nothing, or raise `ValueError`, as `damage` does."""
        self.damage("link", f"{path} is a link to {os.readlink(path)}, which is not there.")

    def damage_file(self, path, error: OSError) -> None:
        """Leave out a file or folder that the disk or its permissions do not give, or raise `ValueError`."""
        self.damage("file", f"{path} cannot be read: {error.strerror or error}.")

    def leave(self, path, kind: str = "") -> None:
        """Count a file that is not meant as an image; its kind is its suffix unless `kind` says otherwise."""
        suffix = os.path.splitext(path)[1].lower()
        self.left[kind or (suffix if len(suffix) > 1 else "without a suffix")] += 1

    def tell_left(self) -> None:
        """Say in one line what was left out, where there is anything."""
        text = describe_left(self.left)
        if text:
            self.say(f"data: left out in {self.root}, {text}")


def describe_left(left: collections.Counter) -> str:
    """Return how many files of each kind are no images that can be read, the most frequent first; "" for none."""
    kinds = (+left).most_common()
    heic = any("heic" in kind.lower() or "heif" in kind.lower() for kind, _ in kinds)
    rest = "" if len(kinds) <= 12 else f", {sum(n for _, n in kinds[12:]):,} of other kinds"
    counted = ", ".join(f"{n:,} {kind}" for kind, n in kinds[:12])
    hint = ". HEIC images can be used as JPEGs: convert them first" if heic else ""
    return f"no images that can be read: {counted}{rest}{hint}" if kinds else ""
