"""What makes a function of parsed flags a program: its parser, its messages, its exit statuses and its tables."""

import argparse
import csv
import difflib
import functools
import json
import math
import os
import re
import sys
import textwrap
import traceback
from typing import Callable, Dict, NamedTuple, Optional, Sequence

from effnet_repro.cli.streams import (
    flush,
    leave_stdout,
    plain_warnings,
    settle_streams,
    tell,
)
from effnet_repro.config import list_some, unknown_name
from effnet_repro.distributed import here, is_child
from effnet_repro.messages import in_a_line
from effnet_repro.outside import SAVE, file_kind, read_file
from effnet_repro.paths import local_path
from effnet_repro.runs.signals import Interrupts


class UsageError(ValueError):
    "The command line cannot be run as it stands: one line on stderr, exit status 2"


EXIT_STATUSES = {
    0: "done",
    1: "it failed; the line on stderr says why and what to do. Data, weights and folders that are not there count here",
    2: "the command line cannot be run as it stands: unknown flag, case or value, or a file of cases or class names "
    "that cannot be read",
    75: "--distributed: a process was lost, or told to stop by SIGTERM after saving; start the same command again",
    130: "stopped by Ctrl-C or SIGTERM after saving; the same command goes on",
}


class _Parser(argparse.ArgumentParser):
    """A parser that takes flags as written, each once, and raises `UsageError`.

    Ours: argparse cuts flags short in silence (`--ep` for `--epochs`), takes the last of several values, and prints a
    usage block on a mistake.
    """

    def __init__(self, **how):
        super().__init__(**how)
        self.register("action", None, Once)  # what flags do that name no action
        self.register("action", "store", Once)

    def error(self, message):
        text = re.sub(r"^argument (\S+): ", lambda m: m[1].split("/")[0] + ": ", message)
        raise UsageError(text if text.startswith("-") else text[:1].upper() + text[1:])

    def has(self, flag) -> bool:
        "Whether there is such a flag"
        return flag in self._option_string_actions

    def parse_args(self, argv):
        for word in argv:
            flag, _, value = word.partition("=")
            if word == "--":
                break
            if _LIKE_A_FLAG.match(word):
                raise UsageError(unknown_flag(flag, self._option_string_actions))
            if not word.startswith("--"):
                continue
            if flag not in self._option_string_actions:
                raise UsageError(unknown_flag(flag, self._option_string_actions))
            if value == "--":  # argparse drops it
                raise UsageError(f"{flag}: a value is needed. Received: '--'.")
            if "=" in word and self._option_string_actions[flag].nargs == 0:
                raise UsageError(f"{flag} takes no value. Received: {value!r}.")
        args, rest = self.parse_known_args(argv)
        if rest and re.match(r"-[a-z]", rest[0], re.I):
            raise UsageError(unknown_flag(rest[0], self._option_string_actions))
        if rest:
            raise UsageError(f"Unexpected argument {rest[0]!r}.")
        args.words = list(argv)
        return args


class Once(argparse.Action):
    "Store a value. An empty one is refused, and so is a second, different one, whatever spelling of the flag it has"

    def __call__(self, parser, namespace, value, option=None):
        if option is None and value == self.default:  # an argument that was left out
            return
        value = self.const if self.nargs == 0 else value
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text or "\0" in text):
                what = "holds a zero byte" if text else "is empty"
                raise argparse.ArgumentError(self, f"the value {what}. Give one, or leave it out.")
        given = vars(namespace).setdefault("given_once", {})
        old = given.setdefault(self.dest, value)
        if old != value:
            raise argparse.ArgumentError(
                self, f"given twice, as {old!r} and as {value!r}. Keep one."
            )
        setattr(namespace, self.dest, value)


#: Dashes that web pages and word processors put in the place of --, and what they put before it.
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"
_BLANKS = "\u00a0\u200b\u2060\ufeff "
_LIKE_A_FLAG = re.compile(f"[{_BLANKS}]*[{_DASHES}][-{_DASHES}]*[a-z]|[{_BLANKS}]+--[a-z]", re.I)

#: What people call flags that have another name here, or none.
_ALSO = {
    "list": "effnet-cases lists the cases.",
    "lr": "Did you mean '--base-learning-rate-exponent'? The rate is 2**exponent x global batch.",
    "learning-rate": "Did you mean '--base-learning-rate-exponent'? The rate is 2**exponent x global batch.",
    "resume": "The same command goes on with an interrupted run; --restore-path names its folder.",
    "output": "Did you mean '--run-dir'?",
    "output-dir": "Did you mean '--run-dir'?",
    "out": "Did you mean '--run-dir'?",
    "data": "Did you mean '--data-dir'?",
    "dataset": "Did you mean '--data-dir'?",
    "steps": "Did you mean '--max-steps'?",
    "size": "Did you mean '--image-size'?",
    "model": "Which network it is, the case says: effnet-cases lists them.",
    "version": "effnet-doctor prints the versions.",
    "gpu": "--backend and $KERAS_BACKEND choose what computes.",
    "quiet": "Did you mean '--no-progress'?",
    "verbose": "Did you mean '--debug'?",
}


def unknown_flag(flag, legal):
    """Return the message about a flag that does not exist: the one that was meant, if that can be told."""
    plain = lambda name: (
        re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.strip(f"-{_DASHES}{_BLANKS}"))
        .replace("_", "-")
        .lower()
    )
    word, by_word = plain(flag), {plain(name): name for name in legal if name.startswith("--")}
    begins = f"Unknown flag {flag!r}."
    near = difflib.get_close_matches(word, by_word, n=1, cutoff=0.7)
    if word in by_word or near:
        return f"{begins} Did you mean {by_word.get(word) or by_word[near[0]]!r}?"
    known = _ALSO.get(word, "")
    named = re.search(r"Did you mean '(--[a-z-]+)'", known)
    if known and (named is None or named[1] in legal):
        return f"{begins} {known}"
    parts = [name for w, name in by_word.items() if word in w.split("-") or w.startswith(word)]
    if parts:
        return f"{begins} Did you mean one of these: {list_some(parts, 5)}?"
    return begins


class Command(NamedTuple):
    "What makes a function a program"

    name: str  # Without effnet-, e.g. "train"
    sentence: str  # What it does; the function's docstring
    arguments: Callable  # Fills a parser
    run: Callable  # From parsed flags to an exit status, or None for 0
    examples: str  # For --help, a line each

    def parser(self) -> argparse.ArgumentParser:
        statuses = "\n".join(f"  {n:<5} {what}" for n, what in EXIT_STATUSES.items())
        epilog = f"examples:\n{textwrap.indent(self.examples, '  ')}\nexit status:\n{statuses}\n"
        parser = _Parser(
            prog=f"effnet-{self.name}",
            description=self.sentence,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show tracebacks and all logs")
        return parser


COMMANDS: Dict[str, Command] = {}


_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)


def _has_folder():
    "Whether the current folder is still there"
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def one_line(error):
    """Return what went wrong as one line of at most 800 characters; an error that no check foresaw carries its type."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    elif isinstance(error, FileNotFoundError) and not _has_folder():
        text = "The folder that this was started in is gone. Change to another one"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error)
    text = in_a_line(" ".join(text.split()))
    text = text if len(text) <= 800 else text[:800] + " ..."
    if isinstance(error, MemoryError):
        return (
            "The memory of this machine is not enough. Use fewer images at a time, or smaller ones."
        )
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} This is a fault of effnet_repro; --debug shows where it is."


def _status_of(error, interrupts):
    "The exit status that an exception stands for"
    if interrupts.asked or isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_status", 2 if isinstance(error, UsageError) else 1)


#: Parameters that no file has a field of: a message that names one means the flag, whatever failed.
_NO_FIELDS = {"data_dir", "data_format", "device", "epochs", "overwrite", "to"}


def _as_flags(text, parser, among=None):
    "A message with flags in place of the names of fields and parameters; None = of all that are flags here"
    spell = lambda found: "--" + found[1].replace("_", "-")
    known = lambda found: parser.has(spell(found)) and (among is None or found[1] in among)
    return re.sub(r"`(\w+)`", lambda found: spell(found) if known(found) else found[0], text)


def _of_stdout(error):
    "The line about a bare error of the system that standard output gives again; else None"
    if not isinstance(error, OSError) or error.strerror != os.strerror(error.errno or 0):
        return None
    try:
        sys.stdout.write("\n")
        flush()
    except (OSError, ValueError) as e:
        leave_stdout()
        if getattr(e, "errno", None) == error.errno:
            return f"Cannot write to standard output: {error.strerror}"
    return None


def _do(command, argv, interrupts):
    "Run a command; its errors become a line and a status"
    parser = command.parser()
    try:
        status = int(command.run(parser.parse_args(argv)) or 0)
        flush()
        return status
    except SystemExit as e:  # --help
        flush()
        return int(e.code or 0)
    except BrokenPipeError:  # the reader, such as head, has enough
        leave_stdout()
        return 141
    except (Exception, KeyboardInterrupt) as e:
        if "--debug" in argv:
            traceback.print_exc()
        status = _status_of(e, interrupts)
        here().linger(e)
        if getattr(e, "told", False) and here().index:  # another process says it
            return status
        line = "interrupted" if status == 130 else one_line(e)
        line = _of_stdout(e) or line
        line = _as_flags(line, parser, None if status == 2 else _NO_FIELDS)
        line += "" if line.endswith((".", ")", "?")) or status == 130 else "."
        hint = f" See effnet-{command.name} --help." if status == 2 else ""
        tell(f"effnet-{command.name}: {line}{hint}")
        return status


def run_program(command, argv, alone=False):
    """Run a command on `argv` (None: the process's own words) and return its exit status.

    Every error becomes one line on stderr; `--debug` adds the traceback. So does a signal, at any moment. `alone`: the
    process does nothing else, as with its own words; then a signal may end it.
    """
    alone = alone or argv is None
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    settle_streams()
    name = f"effnet-{command.name}"
    line = (
        f"{name}: interrupted" if alone and not is_child() else ""
    )  # its parent says how it ended
    with Interrupts(line) as interrupts, plain_warnings(name, "--debug" in argv):
        try:
            status = _do(command, argv, interrupts)
        except (KeyboardInterrupt, OSError) as e:  # a second signal, or nowhere to print
            status = 130 if isinstance(e, KeyboardInterrupt) else 1
            tell(f"{name}: {'interrupted' if status == 130 else one_line(e)}")
        interrupts.status = status if alone else None
    return status


def program(name, arguments, examples):
    "Make a function of parsed flags the entry point of `effnet-<name>`"

    def decorate(run):
        command = Command(
            name, run.__doc__, arguments, run, textwrap.dedent(examples).strip() + "\n"
        )
        COMMANDS[name] = command

        @functools.wraps(run)
        def main(argv: Optional[Sequence[str]] = None) -> int:
            return run_program(command, argv)

        del main.__wrapped__  # help() and the site show what a caller passes: argv
        return main

    return decorate


def main(
    argv: Optional[Sequence[str]] = None,  # Command and its words; None = those of the process
) -> int:  # Exit status
    "Run any command by its name: `python -m effnet_repro.cli train B0-...`"
    alone, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        rows = [f"  {c.name:<10} {c.sentence}" for c in COMMANDS.values()]
        print("usage: python -m effnet_repro.cli COMMAND ...\n\ncommands:\n" + "\n".join(rows))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"effnet: {unknown_name('command', argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run_program(COMMANDS[argv[0]], argv[1:], alone)


def choice(what, legal, aliases=None):
    """Return a reader of one of the `legal` values, written as they print; other text is a UsageError."""
    by_text = {**{str(v): v for v in legal}, **(aliases or {})}

    def read(text):
        if text not in by_text:
            raise argparse.ArgumentTypeError(str(unknown_name(what, text, by_text)))
        return by_text[text]

    return read


def user_path(text):
    """Read a path of this machine, with `~` expanded. argparse reports `gs://bucket` and the like as a UsageError."""
    if not text:
        return text  # `Once` says so
    try:
        return str(local_path(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e).replace("`path` ", "it ", 1)) from None


def read_lines(path):
    """Return the lines of a text file. Raises UsageError, which names the file, where it cannot be read."""
    try:
        path = local_path(path)
        return read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8: it is {file_kind(path)}. {SAVE}") from None
    except ValueError as e:
        raise UsageError(str(e)) from None
    except OSError as e:
        raise UsageError(f"Cannot read {path}: {e.strerror}.") from None


def whole_number(text):
    """Read a whole number, a sign allowed. argparse reports other text as a UsageError."""
    if not re.fullmatch(r"-?[0-9]{1,300}", text):
        raise argparse.ArgumentTypeError(f"a whole number is needed. Received: {text!r}.")
    return int(text)


def real_number(text):
    """Read a finite number; one without point or exponent stays whole.

    argparse reports other text as a UsageError.
    """
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.I | re.A)
    value = float(text) if number else math.nan  # not 1_000, which may be meant as 1.000
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a finite number is needed. Received: {text!r}.")
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else value


def format_table(
    rows,  # Dictionaries with the same keys
    indent="",
):
    """Align rows under their keys, numbers to the right; "" for no rows."""
    if not rows:
        return ""
    text = [[str(k) for k in rows[0]]] + [
        ["" if v is None else str(v) for v in r.values()] for r in rows
    ]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    number = re.compile(r"-?[\d,.]+")
    right = [all(number.fullmatch(str(r[k])) for r in rows) for k in rows[0]]
    align = lambda line: (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, right))
    return "\n".join(indent + "  ".join(align(line)).rstrip() for line in text)


def print_rows(rows, args, brief=None):
    """Print rows as a table of their `brief` form, or whole as --csv or --json."""
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(format_table(rows if brief is None else [brief(row) for row in rows]))


def format_arguments(parser):
    "Flags for the form of the output."
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
