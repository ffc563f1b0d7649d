"""What passes between formats: a network's weights with what is known of them, and what a reader finds in a file."""

import importlib
import json
import sys
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.config import Case, case_from_dict
from effnet_repro.outside import read_file
from effnet_repro.runs.environment import suppress_stderr
from effnet_repro.scaling import ModelSpec


class Weights(NamedTuple):
    "The weights of a network, and what is known about them"

    spec: ModelSpec
    arrays: Dict[str, np.ndarray]  # Full name -> float32 array: all that the network declares
    case: Case  # What the checkpoint will say
    class_names: Tuple[str, ...]  # By label
    notes: Tuple[str, ...] = ()  # What was assumed, changed or left out, a sentence each
    crop_pct: Optional[float] = (
        None  # As timm says it: images were cut as in `data.files.timm_square`
    )

    def describe(self) -> str:
        "Say in a line which network it is, and how much"
        numbers = sum(a.size for a in self.arrays.values())
        size = f"{numbers:,} numbers in {len(self.arrays)} arrays"
        return f"{self.spec.name}, {self.spec.num_classes} classes, {size}"

    def __repr__(self):
        return f"<Weights: {self.describe()}>"


class Found(NamedTuple):
    "What a reader found in a file"

    arrays: Dict[str, np.ndarray]  # The file's name -> array, kernels as (height, width, in, out)
    name_of: Callable = str  # From our full name to the file's
    affine: Optional[tuple] = None  # (scale, shift) of 0..255 pixels; None = as published
    case: Optional[Case] = None  # When the file says
    trained: Dict[str, object] = {}  # When the file says no more of it: how the network was trained
    class_names: Optional[Sequence[str]] = None  # When the file says
    odd_size: bool = False  # Whether the case should get a size of 32 k + 1 pixels
    crop_pct: Optional[float] = (
        None  # When the file says: side of the square over that it is cut from
    )
    notes: Tuple[str, ...] = ()


CASE_KEY = "effnet_repro/case"  # Where a file of another format keeps the case, as JSON


def needed(
    package,  # To import
    what,  # What asks for it, e.g. "A Keras file"
    hint="In the project's folder, run: pip install -e '.[keras]'.",
):
    "Import a package that only some formats need"
    try:
        if package == "tensorflow" and package not in sys.modules:
            # Its first use leaves notes, which would stand above an error's line.
            with suppress_stderr():
                importlib.import_module(package).zeros(1)
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"{what} needs {package}, which is not installed. {hint}") from None


def text_of(path):
    "Text of a file, empty where there is none"
    return read_file(path).decode("utf-8", "replace") if path.is_file() else ""


_JSON = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def object_in(text, what) -> dict:
    """Return the JSON object in a text; `what` names file and place in the `ValueError` for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{what} is no JSON. Copy the file again.") from None
    return checked_object(found, what)


def checked_object(found, what) -> dict:
    """Return what JSON gave, if it is an object; `ValueError` says what it is otherwise."""
    if not isinstance(found, dict):
        kind = _JSON.get(type(found), "null")
        raise ValueError(f"{what} is {kind}, where an object is needed. Copy the file again.")
    return found


def case_in(said, what) -> Optional[Case]:
    """Return the case that a file names, None where it names none; `what` names the file in a `ValueError`."""
    if said.get("case") is None:
        return None
    fields = checked_object(said["case"], f"`case` in {what}")
    try:
        return case_from_dict(fields)
    except (TypeError, AttributeError, ArithmeticError, LookupError, ValueError) as error:
        text = str(error) if isinstance(error, ValueError) else "a field has a wrong type"
        raise ValueError(f"`case` in {what} is none: {text}") from None


def names_in(said, what) -> Optional[Tuple[str, ...]]:
    """Return the class names that a file gives, None where it gives none; `what` names it in a `ValueError`."""
    names = said.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`class_names` in {what} is not a list of texts.")
    return tuple(names)


def quantized(path, dtype, name) -> str:
    """Return what is said of an array of weights that are no floating point numbers."""
    return (
        f"{path} holds numbers of type {dtype} in {name}: quantized weights are not read. Take those from before "
        "they were quantized."
    )


def class_names_of(n):
    "Placeholders for the names of `n` classes"
    return tuple(f"class {i}" for i in range(n))
