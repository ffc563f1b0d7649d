"""Paths as users write them: one rule for every file and folder that a command or a function is given.

`~` is the home folder. `gs://bucket/run` and the like are refused: `pathlib` would make a folder `gs:` of it. Bytes and
names that are not UTF-8 are good, and a whole number is the name that it looks like, since notebooks' parameters and
YAML make numbers of such names.
"""

import os
import re
from pathlib import Path

from effnet_repro.outside import file_kind

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What `pathlib` leaves of some of them before they come here.
_SHORTENED = re.compile(r"(gs|gcs|s3a?|https?|ftp|file|hdfs|abfss?|wasbs?|az|dbfs|hf):/[^/]")


def _text(path, name):
    "A path as text"
    if isinstance(path, int) and not isinstance(path, bool):
        return str(path)
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.fsdecode(os.fspath(path)) if not isinstance(path, str) else path
    raise ValueError(f"`{name}` must be a path. Received: {name}={path!r}.")


def local_path(
    path,  # Text, bytes, `Path`, or a whole number, which is a name
    name: str = "path",  # What the user calls it: a message begins with it
) -> Path:
    """Return what a user gave as a path of this machine, with `~` expanded. It need not exist.

    Raises ValueError where it is no path: another type, empty, a place such as `gs://bucket`, or `~` without a home.
    """
    text = _text(path, name)
    if not text or "\0" in text:
        what = "is empty" if not text else "holds a zero byte"
        raise ValueError(f"`{name}` {what}. Give a file or a folder.")
    if _ELSEWHERE.match(text) or _SHORTENED.match(text):
        raise ValueError(
            f"`{name}` must be on this machine. Received: {text}. Copy it here, or mount it."
        )
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(found):
        user = found.split(os.sep)[0]
        if user == "~" or os.sep in found:
            raise ValueError(
                f"`{name}` begins with {user}, but no home folder is known for it. Write the whole path."
            )
    return Path(found)


def no_folder(path: Path, name: str) -> str:
    """Return the sentence about a path that is no folder; `name` is what the user calls it."""
    what = "is a file" if path.exists() else "does not exist"
    kind = file_kind(path) if path.is_file() else ""
    what = f"is {kind}: unpack it first" if kind.endswith("archive") else what
    return f"`{name}` must be a folder. Received: {str(path)!r}, which {what}."


def utf8_path(path) -> str:
    """Return a path as text for a library that encodes it in UTF-8 by itself, such as TensorFlow, in any locale.

    Raises ValueError for a name that is not UTF-8, which such a library cannot have.
    """
    try:
        return os.fsencode(str(path)).decode("utf-8")
    except UnicodeEncodeError:  # letters that the locale lacks: the text is right as it is
        return str(path)
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} has a name that is not UTF-8, which TensorFlow cannot use. Rename it, or choose another place."
        ) from None
