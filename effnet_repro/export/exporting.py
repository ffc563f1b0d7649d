"""`export`: a trained network as a file of another program, checked by that program before it is there."""

from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from effnet_repro.checkpoint import explain_writing
from effnet_repro.config import unknown_name
from effnet_repro.data import open_data
from effnet_repro.export import keras_file, onnx_file, stablehlo_file
from effnet_repro.export.agreement import Agreement, compare
from effnet_repro.export.card import write_card
from effnet_repro.export.int8 import Kept, write_int8
from effnet_repro.export.place import check_target, new_place
from effnet_repro.export.subject import Subject, read_subject
from effnet_repro.export.tensorflow_files import litert, saved_model
from effnet_repro.paths import local_path, utf8_path

#: Format -> what writes it, opens it, and reads what it says of itself.
WRITERS = {
    "onnx": onnx_file,
    "saved_model": saved_model,
    "litert": litert,
    "stablehlo": stablehlo_file,
    "keras": keras_file,
}
FORMATS = tuple(WRITERS)
SUFFIXES = {
    ".onnx": "onnx",
    ".tflite": "litert",
    ".litert": "litert",
    ".stablehlo": "stablehlo",
    ".keras": "keras",
    "": "saved_model",
}


class Exported(NamedTuple):
    """What was written."""

    path: Path
    format: str  # One of FORMATS
    runtime: str  # Name and version of the program that opened it
    agreement: Agreement  # How near it is to the network; of int8, how near the float32 file is
    card: Path  # The model card
    subject: Subject  # What was exported
    kept: Optional[Kept] = None  # Of int8: how near it is to the float32 file


def export_format(target: Path, to: Optional[str] = None, int8: bool = False) -> str:
    """Return the format of a file by its name, or `to` where that is given.

    Raises `ValueError` for other names, and for a format that has no `int8` where that is asked for.
    """
    if to is not None and to not in WRITERS:
        raise unknown_name("format", to, FORMATS)
    if target.name and target.name.lower() in SUFFIXES:
        raise ValueError(f"{target.name} is an ending without a name. Name the file before it.")
    by_name = SUFFIXES.get(target.suffix.lower())
    if to is None and by_name is None:
        endings = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items() if suffix)
        raise ValueError(
            f"The ending of {target.name} is none of a format's: {endings}; a name without an ending becomes a "
            "SavedModel. Rename it, or pass the format."
        )
    if to == "keras" and target.suffix != ".keras":
        raise ValueError(f"Keras reads its models from *.keras only. Received: {target.name}.")
    kind = to or by_name
    if int8 and kind != "onnx":
        raise ValueError(f"`int8` is for ONNX files. Received: {kind}, {target.name}.")
    return kind


def written(
    subject: Subject, target: Path, to: str, int8=None
) -> Tuple[Agreement, str, Optional[Kept]]:
    """Write a file of a format and compare it with the network; it is there only if it agrees.

    Returns the agreement, the runtime that computed it and, with `int8` (a data set), how near the int8 file is.
    """
    writer, kept = WRITERS[to], None
    runtime = writer.runtime()  # a missing program is told before the work
    with new_place(target) as temporary:
        with explain_writing(target):
            writer.write(subject, temporary)
        agreement = compare(subject, writer.opened(temporary), target.name)
        if int8 is not None:
            kept = write_int8(subject, temporary, int8)
    return agreement, runtime, kept


def _megabytes(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(f.stat().st_size for f in files if f.is_file()) / 1e6, 2)


def export(
    source,  # A run folder, a checkpoint, or a file of another program: see `convert.read`
    target,  # File to write; for a SavedModel a folder
    to: Optional[str] = None,  # One of FORMATS; None = see the target's name
    *,
    image_size: Optional[int] = None,  # Side of an image, pixels; None = as trained
    batch: Optional[int] = None,  # Images at a time; None = any number
    overwrite: bool = False,  # Whether `target` may exist
    license: str = "other",  # Of the weights, for the model card
    int8=None,  # A `DataSet` or its folder: quantize an ONNX file with ranges of its training images
    **reading,  # `predict.Reading`: weights, class_names, arch
) -> Exported:
    "Write a trained network as a file of another program, and a model card beside it"
    target = local_path(target, "target")
    kind = export_format(target, to, int8 is not None)
    check_target(target, kind == "saved_model", overwrite)
    if kind == "saved_model":
        utf8_path(target)  # or it raises, before anything is computed
    if int8 is not None and not hasattr(int8, "splits"):
        int8 = open_data(int8, verbose=False)  # or it raises, before anything is computed
    subject = read_subject(source, image_size=image_size, batch=batch, **reading)
    agreement, runtime, kept = written(subject, target, kind, int8)
    about = {"format": kind, "runtime": runtime, "difference": float(f"{agreement.difference:.1e}")}
    if kept:
        about["format"] = "onnx, int8"
        about["difference"] = (
            f"{kept.difference:.1e}; the same first class in {kept.same:.1%} of {kept.images} images"
        )
    card = write_card(subject, target, {**about, "MB": _megabytes(target)}, license)
    return Exported(target, kind, runtime, agreement, card, subject, kept)


def read_metadata(path, to: Optional[str] = None) -> dict:
    """Return what an exported file says of itself: class names, image size, preprocessing and more.

    - `to`: its format, one of FORMATS; None = see its name.
    """
    return WRITERS[export_format(Path(path), to)].read_metadata(path)
