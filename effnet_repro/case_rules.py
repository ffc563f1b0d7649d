"""Rules of a case beyond type and range: forms that other parts of the program need, checked before a run begins."""

import contextlib
import dataclasses
import functools
import math
import re

from effnet_repro.fields import unknown_name
from effnet_repro.scaling import ModelSpec, conv_table

LEGAL_FILTERS = ("Top", *(f"block{i}" for i in range(7, -1, -1)))


@functools.lru_cache(maxsize=256)
def segment_names(spec: ModelSpec) -> tuple:
    """Return the names of a network's segments, in order, from `block0` to `Top`."""
    return tuple(dict.fromkeys(row.segment for row in conv_table(spec)))


def check_keys(name, values, fields, published, where: str) -> None:
    """Check that a case of a file maps known fields to values, and lacks none that must be given. Raises ValueError.

    - `published`: key of the published form -> field.
    """
    if not isinstance(name, str):
        raise ValueError(f"The name of a case must be text. Received: {name!r} in {where}.")
    if not isinstance(values, dict):
        raise ValueError(f"Case {name!r} in {where} must map field names to values.")
    for key in values:
        if key in published:
            ours = f"It is called {published[key]!r} here."
            raise ValueError(f"Unknown key {key!r} of {name} in {where}. {ours}")
        if key not in fields:
            raise unknown_name("key", key, fields, f"{name}, {where}")
    needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n != "name"]
    missing = [n for n in needed if n not in values]
    if missing:
        raise ValueError(
            f"Case {name!r} in {where} lacks {', '.join(missing)}. Add them or merge a size."
        )


def check_forms(case, spec: ModelSpec) -> None:
    """Check the name, the loss scale and the filter of a case. Raises ValueError."""
    name = case.name
    odd = name in (".", "..") or name.startswith("-") or not name.isprintable()
    if odd or re.search(r"[/\\]", name) or len(name) > 200:
        raise ValueError(
            "`name` must be usable as the name of a folder: no slash, no dash at its beginning, at most 200 "
            f"characters. Received: name={name[:80]!r}."
        )
    if case.loss_scale <= 0 or math.frexp(case.loss_scale)[0] != 0.5:
        raise ValueError(
            f"`loss_scale` must be a power of two. Received: loss_scale={case.loss_scale} ({name}). "
            "Use 1 for none, or 128."
        )
    if case.variable_filter is not None:
        _check_filter(case, segment_names(spec))


def _check_filter(case, names):
    "Each part of a filter is the beginning of a segment's name"
    parts = case.variable_filter
    if not parts:
        raise ValueError(
            "`variable_filter` must be None (train everything) or a list of beginnings of segment "
            f"names. Received: () ({case.name}). Use e.g. ('Top', 'block7')."
        )
    for part in parts:
        if not any(name.startswith(part) for name in names):
            raise ValueError(
                f"`variable_filter` names no segment: {part!r}. Legal: {', '.join(LEGAL_FILTERS)}, "
                f"block for all blocks, or one such as block6c. This network ({case.name}) ends "
                f"with {', '.join(names[-4:])}."
            )


def check_layout(case) -> None:
    """Check that the layout on IPUs fits the network of a case: its splits and its shares of memory.

    Raises ValueError. On one device neither has an effect.
    """
    names, splits = segment_names(case.network), case.pipeline_splits
    for split in splits:
        if split not in names[1:]:
            raise unknown_name("split", split, names[1:], case.name)
    places = [names.index(split) for split in splits]
    if places != sorted(set(places)):
        raise ValueError(
            f"`pipeline_splits` must follow the network. Received: {', '.join(splits)} ({case.name})."
        )
    count = len(case.available_memory_proportion)
    if count not in (0, 1, 2 * case.num_stages):
        raise ValueError(
            f"`available_memory_proportion` has one value, or two a stage. Received: {count} values "
            f"for {case.num_stages} stages ({case.name})."
        )


def check_budgets(budgets, fields, where: str) -> None:
    """Check the section `budgets:` of a file: known fields of a case with sound values; None leaves a case's own.

    Raises ValueError, which names the file.
    """
    if budgets is None:
        return
    if not isinstance(budgets, dict):
        raise ValueError(f"{where}: `budgets:` must map names to fields of a case.")
    for budget, values in budgets.items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}: budget {budget!r} must map fields of a case to values.")
        for name, value in values.items():
            if name not in fields:
                raise unknown_name("field", name, fields, f"budget {budget!r} of {where}")
            if value is not None:
                with named(where):
                    fields[name].check(value, f"budget {budget}")


@contextlib.contextmanager
def named(where: str):
    """Let an error about a value name the file that it stands in."""
    try:
        yield
    except ValueError as e:
        raise e if where in str(e) else ValueError(f"{where}: {e}") from None
