"""What writers of several files share: syncing, and removing what a killed writer left."""

import os
import re
from pathlib import Path


def remove_leftovers(path):
    "Delete what writers of this file left when they were killed"
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp.*")
    for left in path.parent.glob(".*.tmp*"):
        if ours.fullmatch(left.name):
            left.unlink()


def sync(path):
    "Force a file, or a folder's list of names, to disk; some file systems cannot do the latter"
    if os.name != "nt":
        handle = os.open(str(path), os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not Path(path).is_dir():
                raise
        finally:
            os.close(handle)
