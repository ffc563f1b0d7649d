"""The folder for what is made once, and names for files that change with them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Iterable


def cache_folder(cache_dir=None) -> Path:
    """Return `cache_dir`, or what EFFNET_REPRO_CACHE says, or ~/.cache/effnet_repro. It need not exist."""
    root = cache_dir or os.environ.get("EFFNET_REPRO_CACHE") or "~/.cache/effnet_repro"
    return Path(root).expanduser()


def file_stamp(paths: Iterable) -> str:
    """Return 24 hexadecimal digits that stand for these very files: other sizes or times give others."""
    stats = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps([1, stats]).encode()).hexdigest()[:24]
