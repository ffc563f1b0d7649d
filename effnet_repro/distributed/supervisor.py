"""A parent that starts one process of a training, and turns its end into a line and an exit status.

When a process of several is gone, JAX's runtime aborts the others with a page of text. The parent keeps that text to
itself and says what happened; it may start the process again, a bounded number of times. Signals that ask to stop go
to the process, whose run then ends after the same step as all others. No framework is imported here.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import List, Optional, Sequence

from effnet_repro.distributed.child import AGAIN, PARENT
from effnet_repro.distributed.processes import HEARTBEAT_SECONDS
from effnet_repro.distributed.ranks import Ranks
from effnet_repro.messages import say

#: Seconds before a process is started again: by then the others have noticed that it was gone, and ended.
PAUSE_SECONDS = HEARTBEAT_SECONDS + 5
STOPPED = 130  # Status of a run that saved and stopped
_LOG = re.compile(r"([IWEF])\d{4} \d\d:|WARNING: All log messages before absl|\[Gloo\] Rank ")
_OURS = re.compile(r"effnet|Traceback|  File|\w*(Error|Warning)\b")
_MOST_LINES = 400


@dataclass
class Ending:
    """How a process ended: its status for the caller, and a line where the process said none itself."""

    status: int
    line: str = ""
    lost: bool = False  # Whether starting it again would go on


class _Text:
    "The standard error of a process: its own lines are passed on, those of the runtime are kept"

    def __init__(self, stream, shows_all: bool):
        self.stream, self.shows_all = stream, shows_all
        self.kept: List[str] = []
        self.of_runtime = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        for raw in self.stream:
            line = raw.decode(errors="replace")
            self._sort(line)
            if self.shows_all or not (self.of_runtime or _LOG.match(line)):
                with contextlib.suppress(OSError):  # the terminal is gone
                    sys.stderr.write(line)
                    sys.stderr.flush()

    def _sort(self, line):
        "Note whether a line belongs to an error of the runtime, which goes on until a line of ours"
        found = _LOG.match(line)
        if found:
            self.of_runtime = found.group(1) in ("E", "F")
        elif _OURS.match(line):
            self.of_runtime = False
        if self.of_runtime or found:
            self.kept = self.kept[-_MOST_LINES:] + [line]

    def close(self) -> str:
        self.thread.join(5)
        return "".join(self.kept)


@dataclass
class _Requests:
    "The signals that this parent received, and the process that they are passed on to"

    numbers: List[int] = field(default_factory=list)
    process: Optional[subprocess.Popen] = None
    came: threading.Event = field(default_factory=threading.Event)

    def take(self, number, frame):
        self.numbers.append(number)
        self.came.set()
        self.tell()

    def tell(self):
        if self.process is not None and self.process.poll() is None and self.numbers:
            again = len(self.numbers) > 1
            self.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)


@contextlib.contextmanager
def _listening(requests):
    numbers = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    old = {n: signal.signal(n, requests.take) for n in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def explain_end(status: int, text: str, ranks: Ranks, asked: Sequence[int] = ()) -> Ending:
    """Return what an exit status of a process means; `text` is what the runtime wrote, `asked` the signals before."""
    who = f"process {ranks.index} of {ranks.count}" if ranks.count > 1 else "the training"
    if status == STOPPED or (asked and status in (-signal.SIGTERM, -signal.SIGKILL)):
        return Ending(STOPPED if signal.SIGINT in asked else AGAIN)
    if status >= 0:
        return Ending(status, lost=status == AGAIN)
    again = "The same command goes on from the last checkpoint."
    if status == -signal.SIGABRT and "RegisterTask" in text:
        line = f"not all {ranks.count} processes came to {ranks.coordinator} in time. Are all of them started?"
        return Ending(1, line)
    gone = re.search(r"stopped sending heartbeats\)?:?\s*\n?([\d, \n]*\d)", text)
    if gone:
        numbers = ", ".join(gone.group(1).split())
        line = f"{who} lost process {numbers}, which stopped answering. {again}"
        return Ending(AGAIN, line, lost=True)
    if "coordination service" in text or "CoordinationService" in text:
        line = f"{who} lost the coordinator {ranks.coordinator}. {again}"
        return Ending(AGAIN, line, lost=True)
    name = signal.Signals(-status).name
    hint = " (was it short of memory?)" if status == -signal.SIGKILL else ""
    return Ending(AGAIN, f"{who} was ended by {name}{hint}. {again}", lost=True)


def _run_once(command, ranks, requests, shows_all) -> Ending:
    environment = {**os.environ, PARENT: str(os.getpid())}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL if ranks.index and not shows_all else None,
        env=environment,
        start_new_session=True,  # Ctrl-C comes here, and goes on as a request to all
    )
    text, requests.process = _Text(process.stderr, shows_all), process
    requests.tell()  # what came before it was started
    status = process.wait()
    return explain_end(status, text.close(), ranks, requests.numbers)


def supervise(
    command: Sequence[str],  # Program and words of the process
    ranks: Ranks,  # Which process it is
    restarts: int = 0,  # How often it may be started again after a process was lost
    name: str = "effnet",  # Before each line
    shows_all: bool = False,  # Whether the runtime's own text is passed on
) -> int:
    """Run a process until it is done, stops as it was asked to, or is lost more than `restarts` times.

    Returns its exit status; `AGAIN` where the same command is to be started again.
    """
    requests = _Requests()
    with _listening(requests):
        for attempt in range(restarts + 1):
            ending = _run_once(command, ranks, requests, shows_all)
            left = restarts - attempt
            goes_on = ending.lost and left > 0 and not requests.numbers
            if ending.line:
                say(f"{name}: {ending.line}", sys.stderr)
            if goes_on:
                say(f"{name}: starting again in {PAUSE_SECONDS} s ({left} left)", sys.stderr)
            if not goes_on or requests.came.wait(PAUSE_SECONDS):
                break
    return ending.status
