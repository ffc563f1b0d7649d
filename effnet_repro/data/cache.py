"""The folder for what is computed once, and names that change with the files behind it. It only saves time."""

import functools
import hashlib
import json
import logging
import os
import tempfile
import uuid
from pathlib import Path
from typing import Iterable

from effnet_repro.messages import BestEffort
from effnet_repro.paths import local_path

LOG = logging.getLogger(__name__)


def cache_folder(cache_dir=None) -> Path:
    """Return `cache_dir`, or what EFFNET_REPRO_CACHE says, or ~/.cache/effnet_repro. It need not exist.

    Where no home folder is known, it is a folder among the temporary ones.
    """
    root = cache_dir or os.environ.get("EFFNET_REPRO_CACHE")
    if root:
        return local_path(root, "EFFNET_REPRO_CACHE" if not cache_dir else "cache_dir")
    try:
        return local_path("~/.cache/effnet_repro")
    except ValueError:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"effnet_repro-{user}"


@functools.lru_cache(maxsize=None)
def _effort(folder):
    "The `BestEffort` of a folder: one each, so that an error is told once"
    return BestEffort(f"cache in {folder}", LOG)


def keep(path: Path, data: bytes) -> None:
    """Write a file of the cache whole or not at all. If the cache cannot be written, say so once and go on."""
    own = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with _effort(path.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            own.write_bytes(data)
            os.replace(str(own), str(path))
        finally:
            if own.exists():
                own.unlink()


def file_stamp(paths: Iterable) -> str:
    """Return 24 hexadecimal digits that stand for these very files: other sizes or times give others."""
    stats = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps([1, stats]).encode()).hexdigest()[:24]
