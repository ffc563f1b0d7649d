"""Requests to stop: answered after the current training step, or outside a loop by an end with one line."""

import contextlib
import os
import signal
import sys
import threading
import time

from effnet_repro.messages import say


class Stopped(Exception):
    "Raised between two steps, or two batches of a validation, when somebody asked to stop"


class StopSignals:
    "Turns the signals that ask to stop into a request, met after the current step; the second stops at once"

    def __init__(
        self,
        follow=None,  # An object; its `stop_requested` is set to True. None = this one
        leave=(),  # Signals that somebody else looks after
        unsaved=lambda: True,  # Whether an end right now would lose training steps
    ):
        self.leave, self.unsaved = leave, unsaved
        self.follow, self.old, self.stop_requested = self if follow is None else follow, {}, False

    def __enter__(self):
        self.old = _handle(set(_stop_signals()) - set(self.leave), self._ask)
        _RUNNING.append(self)
        return self

    def check(self):
        "Raise `Stopped` when somebody asked"
        if self.follow.stop_requested:
            raise Stopped

    def _ask(self, number, frame):
        if self.follow.stop_requested:
            raise KeyboardInterrupt("stopped within a step; the last checkpoint is good")
        self.follow.stop_requested = True
        say(
            "stopping after this step (again: at once); run the same command again to go on",
            sys.stderr,
        )

    def __exit__(self, *error):
        _RUNNING.remove(self)
        _restore(self.old)


class Interrupts:
    """Turns all signals that ask to stop into a `KeyboardInterrupt`, while a command imports, compiles or ends.

    A `StopSignals` within takes over, and gives back. `asked` tells whether a signal came: libraries may turn the
    exception into one of their own, or lose it. `line` is for a process that is nothing but this command: see
    `_end_without_loss`.
    """

    def __init__(self, line: str = ""):
        self.asked, self.old, self.status, self.line = False, {}, None, line

    def __enter__(self):
        self.old = _handle(_stop_signals(), self._interrupt)
        if self.old and self.line:
            _end_without_loss(self.line)
        return self

    def _interrupt(self, number, frame):
        if self.status is not None:  # all is done and said: only Python itself has to end
            os._exit(self.status)
        self.asked = True
        raise KeyboardInterrupt

    def __exit__(self, *error):
        if self.status is None:
            _restore(self.old)


#: Seconds after a signal in which a run that loses nothing may still end by itself.
PATIENCE = 3.0
#: The `StopSignals` that are entered.
_RUNNING = []


def _end_without_loss(line: str) -> None:
    """Let a signal end this process with `line` and status 130, if a run still goes on then and loses nothing.

    A compiler keeps the main thread for minutes: Python's handlers wait for it, and so does the end of the step. Before
    the first training step and after a checkpoint there is nothing to save.
    """
    if not hasattr(os, "set_blocking"):  # Windows, before Python 3.12
        return
    came, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    numbers = set(_stop_signals())

    def watch():
        while True:
            if not numbers.intersection(os.read(came, 64)):
                continue
            time.sleep(PATIENCE)
            if _RUNNING and not any(s.unsaved() for s in _RUNNING):
                with contextlib.suppress(OSError):
                    os.write(2, f"{line}\n".encode())
                os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _handle(numbers, handler):
    "Let these signals call `handler`, where that is possible; returns what they called before"
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers):
    for number, handler in handlers.items():
        with contextlib.suppress(TypeError):  # set by C code, which Python cannot set again
            signal.signal(number, handler)


#: What queues send before they kill a job, or a limit of CPU time does; not on Windows.
FOREWARNINGS = ("SIGUSR1", "SIGUSR2", "SIGXCPU")


def _stop_signals():
    """Signals that ask to stop.

    A SIGHUP that is ignored, as under nohup, stays so. Of the forewarnings, one that the user's program handles or
    ignores stays the program's.
    """
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    early = [getattr(signal, name) for name in FOREWARNINGS if hasattr(signal, name)]
    early = [number for number in early if _is_free(signal.getsignal(number))]
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [hangup]), *early]


def _is_free(handler):
    "Whether nobody but this package handles a signal"
    own = str(getattr(handler, "__module__", "")).startswith("effnet_repro")
    return handler == signal.SIG_DFL or own
