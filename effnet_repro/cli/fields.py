"""Every field of a case is a flag. Its help, its type and its other names come from the field.

A new field of `00_config` is a flag without a line here.
"""

import functools
import os
import re

from effnet_repro.cli.kit import (
    Once,
    UsageError,
    choice,
    one_line,
    real_number,
    user_path,
    whole_number,
)
from effnet_repro.config import FIELDS, get_case

_NO_FLAG = ("name", "precision")  # precision: see `options.machine_arguments`


def config_arguments(parser):
    """Add the flag for the file that cases are read from."""
    parser.add_argument(
        "--config-path",
        type=user_path,
        metavar="FILE",
        default=os.environ.get("CONFIG_PATH") or None,
        help="file of cases, in the form of config.yml or of the published repository's own; "
        "default: $CONFIG_PATH, or the published cases",
    )


def named_case(name, path):
    """Return the case of this name in the file at `path` (None: the published ones).

    UsageError where it, or the file, is wrong.
    """
    try:
        return get_case(name, path)
    except (ValueError, OSError) as e:
        raise UsageError(one_line(e)) from None


def check_given(**values):
    """Check values of fields that came by a command's own flags; None was not given.

    UsageError names the flag.
    """
    try:
        for name, value in values.items():
            if value is not None:
                FIELDS[name].check(value)
    except ValueError as e:
        flag = lambda found: "--" + found[1].replace("_", "-")
        raise UsageError(re.sub(r"^`(\w+)`", flag, str(e))) from None


def _add_field(group, field):
    "Add the flags of one field: its own name, what the published code calls it, and further ones"
    spell = lambda name: "--" + name.replace("_", "-")
    same = [n for n, value in field.flags.items() if value is None]
    names = [field.name, *([field.published] if field.published else []), *same]
    add = functools.partial(group.add_argument, dest=field.name, action=Once)
    about = field.about.replace("%", "%%")
    if field.kind is bool:
        add(*map(spell, names), nargs=0, const=True, help=about)
        add(spell("no_" + field.name), nargs=0, const=False)
        return
    read = {int: whole_number, float: real_number}.get(field.kind, str)
    if field.choices:
        read = choice(field.name, field.choices, field.spellings)
    shape = "A" if read is str else "N"
    several = "+" if field.several else None
    add(*map(spell, names), type=read, nargs=several, help=about, metavar=shape)
    for name, value in field.flags.items():
        if value is not None:
            same_as = f"{spell(field.name)} {value}, as published"
            add(spell(name), nargs=0, const=value, help=same_as)


def field_arguments(parser, leave_out=()):
    """Add a flag for each field of a case, in the groups of `00_config`, but for the fields of `leave_out`."""
    groups = {}
    for name, field in FIELDS.items():
        if name in (*leave_out, *_NO_FLAG):
            continue
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        _add_field(groups[field.group], field)


def given_fields(args):
    """Return the fields of a case that the command line names: name -> value, lists as tuples."""
    given = {n: getattr(args, n, None) for n in FIELDS if n not in _NO_FLAG}
    split = lambda v: [w for part in v for w in part.split(",")] if isinstance(v[0], str) else v
    given = {k: tuple(split(v)) if isinstance(v, list) else v for k, v in given.items()}
    if getattr(args, "precision", None) in FIELDS["precision"].choices:
        given["precision"] = args.precision
    return {k: v for k, v in given.items() if v is not None}
