"""What passes between formats: a network's weights with what is known of them, and what a reader finds in a file."""

import importlib
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.config import Case
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
    way_out="In the project's folder, run: pip install -e '.[keras]'.",
):
    "Import a package that only some formats need"
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"{what} needs {package}, which is not installed. {way_out}") from None


def text_of(path):
    "Text of a file, empty where there is none"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def class_names_of(n):
    "Placeholders for the names of `n` classes"
    return tuple(f"class {i}" for i in range(n))
