"""Sets in numbered files, such as train-00000-of-00002: no image is counted twice, and what is missing is told."""

import os
import re
from pathlib import Path
from typing import Sequence

from effnet_repro.data.places import Listing

_NUMBERED = re.compile(r"-(\d+)-of-0*(\d+)")
# What browsers, file managers and editors add to the name of a copy; the ending may stand before or behind it.
_COPY = re.compile(r"( ?\(\d+\)|[ _-]+copy( \d+)?|\.bak|\.orig|\.old|~)+$", re.I)
_ENDINGS = re.compile(r"\.(tfrecords?|bin|npy)$", re.I)


def _stands_for(path):
    "What a file is called but for the ending and the marks of a copy"
    name = _ENDINGS.sub("", path.name)
    return _ENDINGS.sub("", _COPY.sub("", name))


def refuse_doubles(paths: Sequence[Path]) -> None:
    """Raise `ValueError` for files of two sets, and for a file that is there twice: its images would count twice."""
    known, first = {}, None
    for path in paths:
        numbers = _NUMBERED.search(path.name)
        other = known.setdefault(int(numbers[1]) if numbers else _stands_for(path), path)
        if numbers and other is path:  # it may be of a set of another number of files
            first = first or (path, numbers[2])
            other = path if numbers[2] == first[1] else first[0]
        if other is not path:
            raise ValueError(
                f"{path} and {other} stand for the same images: they are of two sets, or copies. Keep one set."
            )


def tell_missing(paths: Sequence[Path], what: str, listing: Listing, total: int = 0) -> None:
    """Say in a line how many of a set's files are missing: by the names of `paths`, or of a known `total`."""
    numbers = _NUMBERED.search(paths[0].name) if paths else None
    total = int(numbers[2]) if numbers else total
    if paths and len(paths) < total:
        listing.say(
            f"data: only {len(paths)} of the {total} {what} are in {os.path.dirname(paths[0])}"
        )
