"""One run in a folder, and one writer of a file in it."""

import contextlib
import datetime
import errno
import logging
import os
import socket
from pathlib import Path

from effnet_repro.checkpoint import explain_writing
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
            owner = file.read().strip() or "which did not say who it is"
            raise RuntimeError(
                f"{folder} is in use by another run, {owner}. Wait for it, stop it, or use "
                "another run_dir."
            )
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
