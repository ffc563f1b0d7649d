"""A request to stop, kept until the training step in hand is done."""

import contextlib
import signal
import sys
import threading

from effnet_repro.messages import say


class Stopped(Exception):
    "Raised between two steps, or two batches of a validation, when somebody asked to stop"


class StopSignals:
    "Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current update; the second stops at once"

    def __init__(
        self,
        follow=None,  # An object; its `stop_requested` is set to True. None = this one
        leave=(),  # Signals that somebody else looks after
    ):
        self.leave = leave
        self.follow, self.old, self.stop_requested = self if follow is None else follow, {}, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in set(_stop_signals()) - set(self.leave):
                self.old[number] = signal.signal(number, self._ask)
        return self

    def check(self):
        "Raise `Stopped` when somebody asked"
        if self.follow.stop_requested:
            raise Stopped

    def _ask(self, number, frame):
        if self.follow.stop_requested:
            raise KeyboardInterrupt("stopped within an update; the last checkpoint is good")
        self.follow.stop_requested = True
        with contextlib.suppress(RuntimeError, OSError):  # while something was printed; no terminal
            text = (
                "stopping after this update (again: at once); run the same command again to go on"
            )
            say(text, sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def _stop_signals():
    "Signals that ask to stop; a SIGHUP that is ignored, as under nohup, stays so"
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [hangup])]
