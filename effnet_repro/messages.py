"""What the library says while it works.

A step of the work is told by `say`: on standard output, or to the program's own handlers where it gave the logger
`effnet_repro` some. Then nothing is printed. What may be wrong is a warning in the logger of its module, for example
`effnet_repro.runs.lock`; without handlers Python prints that on standard error. Only what would be told over and over,
such as a damaged checkpoint, is a warning of `warnings`, which tells it once. Commands print by themselves.

Nothing that is said can end the work: not a terminal that is gone, a full disk behind a pipe, or a name that the
terminal cannot show. `BestEffort` does the same for figures, events and whatever else a run can do without.
"""

import logging
import sys
import warnings

LOG = logging.getLogger("effnet_repro")


_MUTED = []


def mute(quiet: bool = True) -> None:
    """Make `say` silent, in all but one of several processes that work together."""
    _MUTED[:] = [True] if quiet else []


def shown(text) -> str:
    """Return text that can be printed and stored: what is not UTF-8 in a name becomes an escape, as in `caf\\xe9`."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def in_a_line(text) -> str:
    """Return text as one line that can be printed: line ends and terminal codes become escapes."""
    plain = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()
    return "".join(map(plain, shown(text)))


def byte_size(number) -> str:
    """Return a number of bytes as text, such as 4.7 MiB or 137 GiB."""
    unit, power = ("GiB", 30) if number >= 2**30 else ("MiB", 20)
    value = number / 2**power
    return f"{value:,.{0 if value >= 100 else 1}f} {unit}"


def _print(text, file):
    try:
        print(text, file=file, flush=True)
    except UnicodeEncodeError:  # an encoding that lacks a character
        print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)


def say(text: str, file=None) -> None:
    """Tell a step of the work: print it on `file` (None is standard output), or log it where `LOG` has handlers."""
    if _MUTED:
        return
    text = shown(text)
    if LOG.handlers:
        LOG.info(text)
        return
    try:
        _print(text, file or sys.stdout)
    except (OSError, ValueError, RuntimeError):  # nobody listens: gone, closed, or within a print
        pass


class BestEffort:
    """For optional work: its first error becomes one warning, and everything else goes on.

    - `what`: its name in the warning.
    - `log`: where the warning goes.
    - `quiet`: whether warnings of libraries are hidden within. Then those of elsewhere may be told again.

    Ctrl-C and other signals are no errors.
    """

    def __init__(self, what: str, log: logging.Logger = LOG, quiet: bool = False):
        self.what, self.log, self.quiet, self.failed = what, log, quiet, False

    def __enter__(self):
        if self.quiet:
            self._warnings = warnings.catch_warnings()
            self._warnings.__enter__()
            warnings.simplefilter("ignore")
        return self

    def __exit__(self, kind, error, trace):
        if self.quiet:
            self._warnings.__exit__(kind, error, trace)
        if not isinstance(error, (Exception, SystemExit)):
            return False
        if not self.failed:
            text = getattr(error, "strerror", None) or str(error)
            reason = " ".join(text.split())[:300] or kind.__name__
            self.log.warning("%s", shown(f"{self.what}: left out ({reason})."))
        self.failed = True
        return True
