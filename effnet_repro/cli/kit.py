"""What makes a function of parsed flags a program: its parser, its messages, its exit statuses and its tables."""

import argparse
import csv
import functools
import json
import math
import os
import re
import sys
import textwrap
import traceback
from typing import Callable, Dict, NamedTuple, Optional, Sequence

from effnet_repro.config import unknown_name
from effnet_repro.distributed import here


class UsageError(ValueError):
    "The command line cannot be run as it stands: one line on stderr, exit status 2"


EXIT_STATUSES = {
    0: "done",
    1: "it failed while running; the line on stderr says why and what to do",
    2: "the command line cannot be run as it stands: unknown flag, case or value",
    75: "--distributed: a process was lost, or told to stop by SIGTERM after saving; start the same command again",
    130: "stopped by Ctrl-C or SIGTERM after saving; the same command goes on",
}


class _Parser(argparse.ArgumentParser):
    """A parser that takes flags as written and raises `UsageError`.

    Ours: argparse cuts flags short in silence (`--ep` for `--epochs`) and prints a usage block on a mistake.
    """

    def error(self, message):
        raise UsageError(message[:1].upper() + message[1:])

    def parse_args(self, argv):
        for word in argv:
            flag = word.split("=")[0]
            if word == "--":
                break
            if word.startswith("--") and flag not in self._option_string_actions:
                raise UsageError(str(unknown_name("flag", flag, self._option_string_actions)))
        args, rest = self.parse_known_args(argv)
        if rest:
            raise UsageError(f"Unexpected argument {rest[0]!r}.")
        args.words = list(argv)
        return args


class Once(argparse.Action):
    "Store a value; a second, different one, or one under another spelling, is refused"

    def __call__(self, parser, namespace, value, option=None):
        value = self.const if self.nargs == 0 else value
        old = getattr(namespace, self.dest)
        if old is not None and old != value:
            raise argparse.ArgumentError(
                self, f"given twice, as {old!r} and as {value!r}. Keep one."
            )
        setattr(namespace, self.dest, value)


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


def one_line(error):
    """Return what went wrong as one line of at most 800 characters; an error that no check foresaw carries its type."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 800 else text[:800] + " ..."
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (unforeseen: --debug shows where)"


def run_program(command, argv):
    """Run a command on `argv` (None: the process's own words) and return its exit status.

    Every error becomes one line on stderr; `--debug` adds the traceback.
    """
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return int(command.run(command.parser().parse_args(argv)) or 0)
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as e:
        if "--debug" in argv:
            traceback.print_exc()
        status = 130 if isinstance(e, KeyboardInterrupt) else 2 if isinstance(e, UsageError) else 1
        status = getattr(e, "exit_status", status)
        if getattr(e, "told", False) and here().index:  # another process says it
            return status
        line = "interrupted" if status == 130 else one_line(e)
        line += "" if line.endswith((".", ")", "?")) or status == 130 else "."
        hint = f" See effnet-{command.name} --help." if status == 2 else ""
        print(f"effnet-{command.name}: {line}{hint}", file=sys.stderr)
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
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        rows = [f"  {c.name:<10} {c.sentence}" for c in COMMANDS.values()]
        print("usage: python -m effnet_repro.cli COMMAND ...\n\ncommands:\n" + "\n".join(rows))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"effnet: {unknown_name('command', argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run_program(COMMANDS[argv[0]], argv[1:])


def choice(what, legal, aliases=None):
    """Return a reader of one of the `legal` values, written as they print; other text is a UsageError."""
    by_text = {**{str(v): v for v in legal}, **(aliases or {})}

    def read(text):
        if text not in by_text:
            raise argparse.ArgumentTypeError(str(unknown_name(what, text, by_text)))
        return by_text[text]

    return read


def whole_number(text):
    """Read a whole number, a sign allowed. argparse reports other text as a UsageError."""
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"a whole number is needed. Received: {text!r}.")
    return int(text)


def real_number(text):
    """Read a finite number; one without point or exponent stays whole.

    argparse reports other text as a UsageError.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a finite number is needed. Received: {text!r}.")
    return int(text) if re.fullmatch(r"-?\d+", text) else value


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
