"""Fields of a dataclass that describe themselves, and the one check of their values.

A field is declared with `option`: a sentence of help, and where they apply its legal values, its range, the name that
the published file gives it. `describe` reads those of a whole record. Whatever shows, reads or checks a field (errors,
flags, tables, converters) reads its `Field`, so a new field is declared once and known everywhere.
"""

import dataclasses
import difflib
import math
import numbers
import re
import typing
from dataclasses import MISSING, dataclass
from typing import Any, Dict, NamedTuple, Optional, Tuple


def list_some(
    names,  # Names to list
    limit: int = 3,  # How many in full
) -> str:  # e.g. "a, b, c and 4 more"
    "List a few `names` and count the rest"
    names = sorted(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def unknown_name(
    what: str,  # What kind of name, e.g. "case"
    name: object,  # What was asked for
    legal,  # The legal names
    where: str = "",  # Where it stood, e.g. a file
) -> ValueError:  # The error to raise; it names the nearest legal name, or all when there are few
    "Make the error for a `name` that is not among the `legal` ones"
    legal = [str(n) for n in legal]
    near = difflib.get_close_matches(
        str(name), legal, n=1, cutoff=0.5 if len(str(name)) > 3 else 0.7
    )
    near = [n for n in legal if n.lower() == str(name).lower()] or near
    begins = [n for n in legal if name and n.lower().startswith(str(name).lower())]
    near = near or (begins if len(begins) == 1 else [])
    hint = f"Did you mean {near[0]!r}?" if near else ""
    if begins and not near:
        hint = f"{list_some(begins, 5)} begin so."
    elif not legal:
        hint = "There are none."
    elif not near or len(legal) <= 8:
        hint += f" Legal names: {', '.join(legal)}."
    place = f" in {where}" if where else ""
    return ValueError(f"Unknown {what} {_received(name)}{place}. {hint.strip()}")


UNCHANGED = object()  # Of a field that every stored case has


class Range(NamedTuple):
    "Numbers from `low` to `high`"

    text: str  # As it was declared, e.g. "[0, 1)"
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> "Range":
        "Read `[0, 1)`; a square bracket takes its end in, a round one leaves it out, `2^40` is a power"
        match = re.fullmatch(r"[\[(](\S+), (\S+)[\])]", text)
        ends = [part.partition("^") for part in match.groups()]
        return cls(text, *(float(base) ** float(power or 1) for base, _, power in ends))

    def __contains__(self, value) -> bool:
        above = self.low <= value if self.text[0] == "[" else self.low < value
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)

    @property
    def words(self) -> str:
        "e.g. `in [0, 1)`, `at least 1`, `above 0`"
        if self.high < float("inf"):
            return f"in {self.text}"
        return f"{'at least' if self.text[0] == '[' else 'above'} {self.low:g}"

    def rule(self, value) -> str:
        "What a `value` outside must be"
        below = value < self.low and self.text[0] == "[" and self.low >= 1
        return f"at least {self.low:g}" if below else self.words


def _plain_number(value):
    "A number as one of Python's: those of NumPy are `numbers` like others, and sweeps over sizes make them"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_whole(
    least: int,  # The least that is legal
    **named,  # Name -> value, one of them
) -> int:  # The value, as Python's number
    "Check a whole number; ValueError names it, the rule and what was received"
    ((name, value),) = named.items()
    number = _plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(
            f"`{name}` must be a whole number from {least}. Received: {name}={_received(value)}."
        )
    return number


def _is_number(value, kinds):
    return isinstance(value, kinds) and not isinstance(value, bool)


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _as_number(value):
    "What text means where a number is due: YAML 1.1 takes `1e-5`, without a point, for text"
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


_KINDS = {  # Type of one value -> what it is called, and whether a value is one
    bool: ("true or false", lambda v: isinstance(v, bool)),
    str: ("text", lambda v: isinstance(v, str) and v != "" and "\0" not in v),
    int: ("a whole number >= 0", lambda v: _is_number(v, int) and 0 <= v < 2**31),
    float: ("a finite number", lambda v: _is_number(v, (int, float)) and abs(v) < 1e9),
}


def _received(value):
    "A value as a message shows it: a long one is cut, a structure named"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (bool, int, float, str, bytes, list, tuple, type(None))):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a value of another kind ({type(value).__name__})"


@dataclass(frozen=True)
class Field:
    "What is known of one field"

    name: str
    kind: type  # Of one value: bool, int, float or str
    several: bool  # Whether it holds a tuple of such values
    optional: bool  # Whether None is a value, too
    default: Any  # `dataclasses.MISSING` when the field must be given
    group: str  # First line of the docstring of the class that declares it
    help: str  # A sentence
    choices: Optional[Tuple] = None  # The legal values, where they are few
    range: Optional[Range] = None  # Of a number
    weights: bool = False  # Whether trained weights belong to one value of it
    hint: str = ""  # Sentence below an error about the value
    published: Optional[str] = None  # Its key in the published file
    earlier: Any = UNCHANGED  # What a stored case means that is too old to have it
    spellings: Dict[str, Any] = dataclasses.field(default_factory=dict)  # Other words for values
    flags: Dict[str, Any] = dataclasses.field(default_factory=dict)  # More flags: name -> value

    @property
    def about(self) -> str:
        "The help with the range and the published key"
        notes = [self.range.words] if self.range else []
        notes += [f"published: {self.published}"] if self.published else []
        return self.help + (f" ({'; '.join(notes)})" if notes else "")

    def fits(self, value) -> bool:
        "Whether a value has the type of the field"
        if value is None:
            return self.optional
        test = _KINDS[self.kind][1]
        return isinstance(value, tuple) and all(map(test, value)) if self.several else test(value)

    def check(self, value, where: str = ""):
        "The `value`, a list as a tuple; ValueError names the rule, what was received and `where`"
        if self.choices is not None:
            if not isinstance(value, (int, float, str)) or isinstance(value, bool):
                value = _received(value)
            if value not in self.choices:
                raise unknown_name(self.name, value, self.choices, where)
            return value
        value = tuple(value) if isinstance(value, list) else _plain_number(value)
        if self.kind is float:
            value = tuple(map(_as_number, value)) if isinstance(value, tuple) else _as_number(value)
        rule = self._broken_rule(value)
        if rule:
            place = f" ({where})" if where else ""
            text = f"`{self.name}` must be {rule}. Received: {self.name}={_received(value)}{place}."
            raise ValueError(f"{text} {self.hint}".strip())
        return value

    def _broken_rule(self, value):
        "What a value must be and is not; None where it is sound"
        if not self.fits(value):
            what = _KINDS[self.kind][0]
            if (
                not self.several
                and _is_number(value, (int, float))
                and 1e9 <= abs(value) < math.inf
            ):
                what = "between -1e9 and 1e9" if self.kind is float else "from 0 to 2**31 - 1"
                what = "a whole number" if self.kind is int and not _is_number(value, int) else what
            return f"a list: {what} each" if self.several else what
        each = value if isinstance(value, tuple) else (value,)
        wrong = [v for v in each if self.range and v is not None and v not in self.range]
        return self.range.rule(wrong[0]) if wrong else None


def option(
    help: str,  # A sentence; what a table, `--help` and the page show
    default=MISSING,  # Its value where none is given
    **known,  # `choices`, `range` as text, `weights`, `hint`, `published`, `earlier`, `spellings`, `flags`: see `Field`
):
    "Declare a field of a dataclass"
    legal = {f.name for f in dataclasses.fields(Field)}
    for name in known:
        if name not in legal:
            raise unknown_name("part of a field", name, legal)
    if "range" in known:
        known["range"] = Range.parse(known["range"])
    return dataclasses.field(default=default, metadata={"help": help, **known})


def _element(hint):
    "Of a type hint: the type of one value, whether there are several, whether None is legal"
    inner = [k for k in typing.get_args(hint) if k not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        return inner[0], True, False
    if typing.get_origin(hint) is typing.Union:
        kind, several, _ = _element(inner[0]) if len(inner) == 1 else (str, False, False)
        return kind, several, type(None) in typing.get_args(hint)
    return hint, False, False


def describe(
    record: type,  # A dataclass whose fields are declared with `option`
) -> Dict[str, Field]:  # Name -> field, in the order of the class
    "Read what the fields of a class say of themselves"
    hints = typing.get_type_hints(record)
    declared = {
        name: kind for kind in record.__mro__ for name in vars(kind).get("__annotations__", ())
    }
    found = {}
    for f in dataclasses.fields(record):
        kind, several, optional = _element(hints[f.name])
        group = (declared[f.name].__doc__ or "").splitlines()[0]
        found[f.name] = Field(f.name, kind, several, optional, f.default, group, **f.metadata)
    return found


def read_values(
    fields: Dict[str, Field],  # Name -> field
    values: Dict[str, Any],  # Name -> value; None = not given
    where: str = "",  # Whose values they are, for a message
) -> Dict[str, Any]:  # Name -> value as its field reads it, of those that are given
    "Read the values of some fields; ValueError for a name or a value that is not legal"
    for name in values:
        if name not in fields:
            raise unknown_name("field", name, fields)
    return {n: fields[n].check(v, where) for n, v in values.items() if v is not None}
