"""Every field of a case is a flag, and says in --help what its comment in `00_config` says."""

import ast
import dataclasses
import functools
import inspect
import os
import re
import typing

from effnet_repro.cli.kit import Once, UsageError, choice, real_number, whole_number
from effnet_repro.config import CHOICES, PUBLISHED_KEYS, SIZES, Case, get_case


def config_arguments(parser):
    "The file that cases are read from"
    parser.add_argument(
        "--config-path",
        metavar="FILE",
        default=os.environ.get("CONFIG_PATH") or None,
        help="file of cases, in the form of config.yml or of the published repository's own; "
        "default: $CONFIG_PATH, or the published cases",
    )


def named_case(name, path):
    "Look a case up; what is wrong with it or with its file is a mistake of the command line"
    try:
        return get_case(name, path)
    except (ValueError, OSError) as e:
        raise UsageError(str(e)) from None


def field_comments():
    "Field of a case -> its comment in the source, on whichever of its lines that stands"
    found = {}
    for kind in Case.__mro__[:-1]:
        try:
            text = inspect.getsource(kind)
        except OSError:  # installed without sources
            continue
        for node in ast.parse(text).body[0].body:
            lines = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            comment = re.search(r"(?m)  # (.+)$", lines)
            if isinstance(node, ast.AnnAssign) and comment:
                found[node.target.id] = comment[1]
    return found


def _element(kind):
    "Of a field's type: the type of one value, and whether there are several"
    inner = [k for k in typing.get_args(kind) if k not in (type(None), Ellipsis)]
    if typing.get_origin(kind) is tuple:
        return inner[0], True
    if len(inner) == 1:
        return _element(inner[0])
    return (str if inner else kind), False


_ALIASES = {
    "model_size": {f"B{n}": n for n in SIZES if isinstance(n, int)},
    "optimizer": {"RMSprop": "rmsprop", "SGD": "sgd"},
}


# Version 2.1 of the published code, and its README, call it so.
_MORE_FLAGS = {"base_learning_rate_exponent": ["--base-learning-rate"]}


def _add_field(group, name, kind, about):
    "Add the flags of one field: its own name, and what the published code calls it"
    spell = lambda name: "--" + name.replace("_", "-")
    flags = [spell(name), *(spell(k) for k, v in PUBLISHED_KEYS.items() if v == name)]
    flags += _MORE_FLAGS.get(name, [])
    add = functools.partial(group.add_argument, dest=name, action=Once)
    one, several = _element(kind)
    if one is bool:
        add(*flags, nargs=0, const=True, help=about)
        add(spell("no_" + name), nargs=0, const=False)
        return
    read = {int: whole_number, float: real_number}.get(one, str)
    if name in CHOICES:
        read = choice(name, CHOICES[name], _ALIASES.get(name))
    shape = "A" if read is str else "N"
    add(*flags, type=read, nargs="+" if several else None, help=about, metavar=shape)


_TITLES = ("network", "batches and length", "recipe", "pictures", "IPU (no effect elsewhere)")


NETWORK_FIELDS = ("model_size", "group_size", "expand_ratio", "norm", "norm_groups", "input_norm")


def field_arguments(parser, leave_out=()):
    "Flags for the fields of a case, in the groups of `00_config`"
    comments = field_comments()
    for title, kind in zip(_TITLES, reversed(Case.__mro__[:-1])):
        group = parser.add_argument_group(title)
        for name, hint in typing.get_type_hints(kind).items():
            if name in kind.__annotations__ and name not in (*leave_out, "name", "precision"):
                about = comments.get(name, "").replace("%", "%%")
                _add_field(group, name, hint, about)
        if title == "pictures":
            group.add_argument(
                "--train-with-valid-preprocessing",
                dest="train_preprocessing",
                action=Once,
                nargs=0,
                const="validation",
                help="--train-preprocessing validation, as published",
            )


def given_fields(args):
    "The fields of a case that the command line names"
    names = [f.name for f in dataclasses.fields(Case) if f.name not in ("name", "precision")]
    given = {n: getattr(args, n, None) for n in names}
    split = lambda v: [w for part in v for w in part.split(",")] if isinstance(v[0], str) else v
    given = {k: tuple(split(v)) if isinstance(v, list) else v for k, v in given.items()}
    if getattr(args, "precision", None) in CHOICES["precision"]:
        given["precision"] = args.precision
    return {k: v for k, v in given.items() if v is not None}
