"""Shared by writers of several files: removing what a killed writer left."""

import re


def remove_leftovers(path):
    "Delete what writers of this file left when they were killed"
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp.*")
    for left in path.parent.glob(".*.tmp*"):
        if ours.fullmatch(left.name):
            left.unlink()
