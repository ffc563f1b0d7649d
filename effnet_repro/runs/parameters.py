"""Parameters of the run notebooks: a value of the wrong kind is read as what it means, or refused by its name.

papermill makes numbers of `20240115` and `16.32`, and whatever YAML makes of a list. `check_parameters` runs before
anything is imported or opened.
"""

import ast
import sys
from typing import Any, Callable, Dict, NamedTuple, Sequence, Tuple

from effnet_repro.config import FIELDS, budget_overrides, get_case, unknown_name
from effnet_repro.data.decoders import DECODERS
from effnet_repro.finetuning import PROTOCOLS
from effnet_repro.paths import local_path, no_folder
from effnet_repro.recipe import is_trained


class Parameter(NamedTuple):
    """How a parameter is read, and what None means."""

    read: Callable[[str, Any], Any]  # Of its name and a value that is not None
    default: Any = None


def _path(name, value):
    return str(local_path(value, name))


def _choice(*legal):
    by_text = {str(value): value for value in legal}

    def read(name, value):
        if isinstance(value, bool) or str(value) not in by_text:
            raise unknown_name(name, value, by_text)
        return by_text[str(value)]

    return read


def _text(name, value):
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` must be text. Received: {name}={value!r}.")
    return value


def _case(name, value):
    return get_case(_text(name, value)).name


def _budget(name, value):
    return _text(name, value) if value == "auto" else budget_overrides(_text(name, value))[0]


def _folder(name, value):
    path = local_path(value, name)
    if not path.is_dir():
        raise ValueError(no_folder(path, name))
    return str(path)


def _whole(lowest):
    def read(name, value):
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if not whole or value in (float("inf"), -float("inf")) or int(value) != value:
            raise ValueError(f"`{name}` must be a whole number. Received: {name}={value!r}.")
        if not lowest <= value < 2**31:
            raise ValueError(
                f"`{name}` must be from {lowest} to 2**31 - 1. Received: {name}={value!r}."
            )
        return int(value)

    return read


def _truth(name, value):
    if value not in (True, False):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")
    return bool(value)


def _segments(name, value):
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p for p in parts):
        raise ValueError(
            f"`{name}` must be names of segments, such as 'Top block7'. Received: {name}={value!r}."
        )
    if not parts:
        return None
    is_trained("", tuple(parts))  # or it raises: no segment has such a name
    return tuple(parts)


def _field(name, value):
    "A field of a case; a whole number may come as 64.0"
    field = FIELDS[name]
    if field.kind is int and isinstance(value, float) and value == value and abs(value) < 2**53:
        value = int(value) if value == int(value) else value
    return field.check(value)


_PRECISIONS = ("auto", "float32", "bfloat16", "float16", *FIELDS["precision"].choices)
PARAMETERS: Dict[str, Parameter] = {
    "case": Parameter(_case),
    "data_dir": Parameter(_folder),
    "run_dir": Parameter(_path),
    "init": Parameter(_path),
    "checkpoint": Parameter(_path),
    "data_format": Parameter(_choice("tfrecord", "folder", "cifar", "raw")),
    "on_corrupt": Parameter(_choice("refuse", "skip"), "refuse"),
    "decoder": Parameter(_choice(*DECODERS), "auto"),
    "budget": Parameter(_budget, "auto"),
    "device": Parameter(_choice("auto", "ipu", "keras"), "auto"),
    "precision": Parameter(_choice(*_PRECISIONS), "auto"),
    "backend": Parameter(_choice("tensorflow", "jax"), "tensorflow"),
    "weights": Parameter(_choice("auto", "last", "average", "both", "all"), "auto"),
    "protocol": Parameter(_choice(*PROTOCOLS)),
    "variable_filter": Parameter(_segments),
    "new_head": Parameter(_truth, False),
    "seed": Parameter(_whole(0), 0),
    "ipus": Parameter(_whole(1)),
    "distributed": Parameter(_truth, False),
    "validate_every": Parameter(_whole(0)),
}


def _assigned(cell) -> Tuple[str, ...]:
    "The names that a cell of plain assignments gives a value to; none where it is anything else"
    try:
        found = [node.targets[0].id for node in ast.parse(cell).body]
    except (SyntaxError, ValueError, AttributeError):
        return ()
    return tuple(found)


def _refuse_unknown(cells: Sequence[str]) -> None:
    """Refuse a name that papermill sets and the notebook does not know: papermill warns, and runs with the defaults.

    - `cells`: what a kernel was given, `In`. papermill puts its cell, which begins with "# Parameters", below the
      notebook's own.
    """
    for own, cell in zip(cells, list(cells)[1:]):
        known = _assigned(own)
        for name in _assigned(cell) if cell.startswith("# Parameters") and known else ():
            if name not in known:
                raise unknown_name("parameter", name, known)


def check_parameters(values: dict) -> dict:
    """Return the parameters of a notebook, read as what they mean: name -> value.

    - `values`: the notebook's `globals()`, or the parameters alone; other names are left aside. Only those that
      papermill sets are refused where the notebook has no such parameter.

    Raises ValueError, which begins with the name of the parameter.
    """
    _refuse_unknown(values.get("In", ()))
    checked = {}
    for name, value in values.items():
        known = PARAMETERS.get(name) or (Parameter(_field) if name in FIELDS else None)
        if known is not None:
            checked[name] = known.default if value is None else known.read(name, value)
    return checked


def _not_the_end(record) -> bool:
    "Whether a record of a kernel's log is about something else than its end"
    return "KeyboardInterrupt caught in kernel" not in record.getMessage()


def quiet_end() -> None:
    """Keep the end of a notebook's kernel from printing a line that looks like an error.

    Who ends a kernel interrupts it first, and the kernel logs that as an error: the last line of papermill after a good
    run. A cell that is interrupted still says so itself. Outside Jupyter nothing happens.
    """
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython.get_ipython(), "kernel", None) if ipython else None
    log = getattr(kernel, "log", None)
    if hasattr(log, "addFilter"):
        log.addFilter(_not_the_end)
