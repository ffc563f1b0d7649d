"""A file or folder that comes into being whole: written under another name, and renamed when it is good."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Iterator

from effnet_repro.checkpoint import explain_writing

SAVED_MODEL = "saved_model.pb"  # What makes a folder a SavedModel


def check_target(path: Path, folder: bool, overwrite: bool) -> None:
    """Raise where `path` cannot become a file, or a SavedModel's folder: before anything is computed."""
    for above in path.absolute().parents:
        if above.exists() and not above.is_dir():
            raise NotADirectoryError(f"{above} is a file, and {path} would be in it.")
    if not path.exists() and not path.is_symlink():
        return
    if folder and not (path.is_dir() and (path / SAVED_MODEL).is_file()):
        raise FileExistsError(f"{path} exists and is no SavedModel. Choose another name.")
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name a file in it.")
    if not overwrite:
        raise FileExistsError(f"{path} exists. Pass `overwrite`, or choose another name.")


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path), ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def new_place(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its ending; what is there becomes `path` if the block ends well.

    After an exception, `path` is what it was before, and nothing else is left.
    """
    mark = uuid.uuid4().hex[:8]
    temporary = path.parent / f".{path.name}.{mark}.tmp{path.suffix}"
    old = path.parent / f".{path.name}.{mark}.old"
    with explain_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.????????.tmp{path.suffix}"):
            _remove(left)  # of one that was killed
    try:
        yield temporary
        with explain_writing(path):
            if path.is_dir():
                os.replace(str(path), str(old))
            os.replace(str(temporary), str(path))
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(str(old), str(path))
        raise
    finally:
        _remove(temporary)
        _remove(old)
