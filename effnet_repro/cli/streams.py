"""A command's standard streams: closed ones, those that cannot show a name, and warnings as single lines."""

import codecs
import contextlib
import os
import sys
import warnings

from effnet_repro.messages import shown


def _escaped(error):
    "What is printed for characters that a stream cannot show; a byte that is not UTF-8 becomes \\xe9 or the like"
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    byte = lambda c: f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else None
    plain = lambda c: byte(c) or c.encode("ascii", "backslashreplace").decode()
    return "".join(map(plain, wrong)), error.end


_NAMES = "effnet_names"
codecs.register_error(_NAMES, _escaped)


def settle_streams() -> None:
    """Set up the standard streams so that printing never fails because of a character.

    A stream that was closed when the process began becomes /dev/null, its number, too: a file that is opened later
    must not get it, since libraries print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors=_NAMES)


def flush() -> None:
    """Write out what was printed. Raises OSError where it cannot be; then Python does not try again at its end."""
    try:
        sys.stdout.flush()
    except OSError as e:
        leave_stdout()
        raise OSError(e.errno, f"Cannot write to standard output: {e.strerror}") from None
    except ValueError:
        leave_stdout()
        raise


def flush_or_leave() -> None:
    """Write out what was printed. If that is impossible, ignore it: the work is done."""
    with contextlib.suppress(OSError, ValueError):
        flush()


def leave_stdout() -> None:
    """Discard what is still to be printed, because the reader is gone or its disk is full."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(line: str) -> None:
    """Print a line on standard error, unless that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(shown(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def plain_warnings(name: str, every: bool):
    """Show warnings of this project as lines of the command `name`; those of libraries only where `every`."""
    before = warnings.showwarning
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def show(message, category, filename, lineno, file=None, line=None):
        if every:
            before(message, category, filename, lineno, file, line)
        elif os.path.abspath(filename).startswith(here):
            tell(f"{name}: warning: {' '.join(str(message).split())}")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
