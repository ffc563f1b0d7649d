"""The first thing in a command's process: a signal ends it with a line, also while Python still imports the rest.

Only a process that is one of the commands is meant; in all others nothing happens.
"""

import os
import signal
import sys


def _is_command():
    "Whether this process was started as `effnet-...` or as `python -m effnet_repro.cli`"
    words = getattr(sys, "orig_argv", sys.argv)
    started = os.path.basename(sys.argv[0]) if sys.argv else ""
    return started.startswith("effnet-") or (started == "-m" and "effnet_repro.cli" in words)


def _end(number, frame):
    try:
        os.write(2, b"effnet: interrupted before anything was begun\n")
    finally:
        os._exit(130)


def answer_signals() -> None:
    """Let requests to stop that are not ignored, such as SIGTERM, end the process with a line and status 130."""
    if not _is_command():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = getattr(signal, name, None)  # Windows has the first two
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
