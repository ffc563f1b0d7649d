"""Locks: one run in a folder, and one writer of a file in it."""

import contextlib
import datetime
import errno
import logging
import os
import socket
from pathlib import Path

from effnet_repro.checkpoint import explain_writing
from effnet_repro.outside import file_kind
from effnet_repro.paths import local_path

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_folder(
    folder,  # A run folder; made when missing
):  # A context; RuntimeError when another run is in it
    """Hold a folder for one run; it is made when missing.

    RuntimeError where another run is in it, OSError where it cannot be written. Where the system has no locks, a
    warning says so.
    """
    path = local_path(folder, "run_dir") / ".lock"
    with explain_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        if not _try_lock(file, path):
            file.seek(0)
            raise _in_use(folder, file.read())
        now = datetime.datetime.now().isoformat(" ", "seconds")
        with explain_writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


#: Files of a run, which are read, or written anew.
_FILES = (".lock", "config.json", "environment.json", "metrics.csv", "validation.csv")


def check_places(folder) -> None:
    """Raise OSError where something else lies in the place of a file or folder of a run, which would end it later."""
    folder = local_path(folder, "run_dir")
    checkpoints = folder / "checkpoints"
    if os.path.lexists(str(checkpoints)) and not checkpoints.is_dir():
        raise _in_the_way(checkpoints, "a folder")
    for path in (*(folder / name for name in _FILES), *checkpoints.glob("*.safetensors")):
        if not path.is_file() and (path.exists() or _is_loop(path)):
            raise _in_the_way(path, "a file")


def _is_loop(path):
    "Whether a link leads to itself"
    try:
        os.stat(str(path))
    except OSError as e:
        return e.errno == errno.ELOOP
    return False


def _in_the_way(path, due):
    kind = "a link to nothing" if not os.path.exists(str(path)) else file_kind(path)
    hint = "Move it away, or choose another folder."
    text = f"Cannot write {path}: there is {kind} where a run has {due}. {hint}"
    return OSError(errno.EEXIST, text)


def _in_use(folder, owner):
    owner = owner.strip() or "which did not say who it is"
    return RuntimeError(
        f"{folder} is in use by another run, {owner}. Wait for it, stop it, or use another run_dir."
    )


def refuse_used_folder(folder) -> None:
    """Raise RuntimeError where another run is in a folder, which is left as it is; it need not exist."""
    path = local_path(folder, "run_dir") / ".lock"
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        owner = path.read_text(encoding="utf-8", errors="replace")
        if not owner.strip():  # nobody: a run that begins right now is not disturbed
            return
        with path.open() as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(folder, owner) from None


@contextlib.contextmanager
def wait_for_folder(
    folder,  # An existing folder
):  # A context
    "Wait until no other process rewrites a file of `folder`; where locks are missing, go on without"
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with explain_writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a file system that cannot open folders
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _try_lock(file, path):
    "Take the system's lock on an open file; False when somebody has it"
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except ImportError:
        why = "Windows has none"
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        why = e.strerror
    LOG.warning("No lock on %s (%s): make sure that no other run uses the folder.", path, why)
    return True
