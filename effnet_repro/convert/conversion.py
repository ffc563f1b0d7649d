"""Weights of any format in, and out in any: `read` and `convert`."""

from pathlib import Path
from typing import Optional, Sequence, Union

from effnet_repro.config import Case, get_case, unknown_name
from effnet_repro.convert.formats import FORMATS, check_name, format_of, target_format
from effnet_repro.convert.keras_files import find_keras, write_keras
from effnet_repro.convert.ours import read_ours, write_ours
from effnet_repro.convert.replace import remove_leftovers
from effnet_repro.convert.settle import as_asked, settle
from effnet_repro.convert.tf1 import find_tf1, tf1_prefix, write_weights_tf1
from effnet_repro.convert.torch_files import TorchOptions, find_torch, write_torch
from effnet_repro.convert.weights import Weights
from effnet_repro.paths import local_path

_FINDERS = {"tf1": find_tf1, "keras": find_keras}


def read(
    source,  # A file, a run folder, or the prefix of a TensorFlow checkpoint
    source_format: Optional[str] = None,  # One of FORMATS; None = see the file
    *,
    case: Union[str, Case, None] = None,  # What the weights must be; None = see their shapes
    weights: str = "auto",  # Of a run folder: "last", "average", "auto" = the average of a long run
    num_classes: Optional[
        int
    ] = None,  # Of a new classifier, where the file has none; 0 = then none
    class_names: Optional[Sequence[str]] = None,  # By label; None = the file's, or numbers
    image_size: Optional[int] = None,  # Usual side of an image, pixels; None = the case's
    **torch,  # `TorchOptions`: arch, input_mean, input_std
) -> Weights:
    "Read weights of any of the formats"
    path = local_path(source, "source")
    kind = format_of(path) if source_format is None else source_format
    if kind not in FORMATS:
        raise unknown_name("format", kind, FORMATS)
    given = get_case(case) if isinstance(case, str) else case
    options = TorchOptions(**torch)
    asked = [k for k, v in vars(options).items() if v is not None]
    if kind != "torch" and asked:
        raise ValueError(
            f"{asked[0]} is for PyTorch files. Received: {path.name}, which is {kind}."
        )
    if weights != "auto" and not path.is_dir():
        raise ValueError(
            f"weights={weights!r} chooses among those of a run folder. Received: {path.name}."
        )
    if kind == "ours":
        found = read_ours(path, weights, given)
        return as_asked(found, path, num_classes, image_size, class_names)
    found = find_torch(path, options) if kind == "torch" else _FINDERS[kind](path)
    return settle(path, found, given, num_classes, image_size, class_names)


_WRITERS = {
    "ours": write_ours,
    "tf1": write_weights_tf1,
    "keras": write_keras,
    "torch": write_torch,
}


def _refuse_lost(target, to, options):
    "Refuse what a caller says of weights where the target has no place for it"
    if to == "tf1" or (to == "torch" and target.suffix != ".safetensors"):
        for name in ("class_names", "image_size"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{target.name} has no place for {name}: leave it out, or write a .safetensors file."
                )


def convert(
    source,  # A file, a run folder, or the prefix of a TensorFlow checkpoint
    target,  # File to write, or the prefix of a TensorFlow checkpoint
    to: Optional[str] = None,  # One of FORMATS; None = see the target's name
    source_format: Optional[str] = None,  # One of FORMATS; None = see the source
    overwrite: bool = False,  # Whether `target` may exist
    **options,  # As in `read`: case, weights, num_classes, class_names, image_size, arch, ...
) -> Weights:  # What was written; its notes say what was assumed, changed or left out
    "Read weights in one format and write them in another"
    target = local_path(target, "target")
    kind = format_of(source) if source_format is None else source_format
    to = target_format(target, kind) if to is None else to
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    check_name(target, to, overwrite)
    there = Path(f"{tf1_prefix(target)}.index") if to == "tf1" else target
    _refuse_lost(target, to, options)
    weights = read(source, kind, **options)
    remove_leftovers(there)
    return weights._replace(notes=weights.notes + _WRITERS[to](target, weights))
