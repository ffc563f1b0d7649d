"""What the library says while it works.

A step of the work is told by `say`: on standard output, or to the program's own handlers where it gave the logger
`effnet_repro` some. Then nothing is printed. What may be wrong is a warning in the logger of its module, for example
`effnet_repro.runs.lock`; without handlers Python prints that on standard error. Only what would be told over and over,
such as a damaged checkpoint, is a warning of `warnings`, which tells it once. Commands print by themselves.
"""

import logging
import sys

LOG = logging.getLogger("effnet_repro")


_MUTED = []


def mute(quiet: bool = True) -> None:
    """Let `say` say nothing: of processes that work together, one speaks."""
    _MUTED[:] = [True] if quiet else []


def say(text: str, file=None) -> None:
    """Tell a step of the work: print it on `file` (None is standard output), or log it where `LOG` has handlers."""
    if _MUTED:
        return
    if LOG.handlers:
        LOG.info(text)
    else:
        print(text, file=file or sys.stdout, flush=True)
