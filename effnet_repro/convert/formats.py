"""Which format a file is in, and which one a target's name asks for."""

import re
from pathlib import Path

from effnet_repro.convert.tf1 import indexed, tf1_prefix
from effnet_repro.convert.torch_files import open_safetensors
from effnet_repro.outside import file_kind
from effnet_repro.paths import local_path

FORMATS = ("ours", "tf1", "keras", "torch")


_TORCH_ENDINGS = (".pt", ".pth", ".tar", ".bin")
# What files of weights are by their first bytes, and the ending by which they are read.
_ENDINGS = {"a safetensors file": ".safetensors", "an HDF5 file": ".h5"}
_ENDINGS.update({"a ZIP archive": ".pth", "a pickle": ".pth"})


def format_of(
    path,  # A file, a folder, or the prefix of a TensorFlow checkpoint
) -> str:  # One of FORMATS
    "Tell which format weights are in"
    path = local_path(path)
    if path.is_dir():
        if (path / "checkpoints").is_dir() or any(path.glob("epoch-*.safetensors")):
            return "ours"
        if indexed(path):
            return "tf1"
        raise ValueError(
            f"{path} is a folder without a checkpoint. Name the file of weights in it."
        )
    if Path(f"{tf1_prefix(path)}.index").is_file():
        return "tf1"
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {file_kind(path)}, not a file of weights.")
    if not path.is_file():
        raise FileNotFoundError(f"No file, run folder or TensorFlow checkpoint {path}.")
    if path.suffix in (".keras", ".h5"):
        return "keras"
    if path.suffix in _TORCH_ENDINGS:
        return "torch"
    if path.suffix == ".safetensors":
        header = open_safetensors(path, lambda file: file.metadata() or {})
        return "ours" if "effnet_repro" in header else "torch"
    endings, kind = (".safetensors", ".keras", ".h5", *_TORCH_ENDINGS, ".index"), file_kind(path)
    ending = _ENDINGS.get(kind)
    what = "if PyTorch wrote it" if ending == ".pth" else "if it holds weights"
    hint = f": {what}, call it {path.stem}{ending}" if ending else ""
    raise ValueError(
        f"Unknown kind of weights: {path.name}. Legal: {', '.join(endings)}, a run folder. It is {kind}{hint}."
    )


def target_format(path, source_format):
    "The format that a target's name asks for"
    if path.suffix == ".safetensors":
        if source_format != "ours":
            return "ours"
        raise ValueError(f"{path.name} may be ours or PyTorch's. Pass `to`: 'torch' or 'ours'.")
    if path.suffix in (".keras", ".h5"):
        return "keras"
    if path.suffix in (".pt", ".pth"):
        return "torch"
    if re.fullmatch(r"(\.ckpt.*|\.index)?", path.suffix):
        return "tf1"
    raise ValueError(
        f"Unknown kind of target: {path.name}. Legal: .safetensors, .pt, .pth, .keras, .weights.h5, "
        ".ckpt; or pass `to`."
    )


def check_name(path, to: str, overwrite: bool = False) -> None:
    """Raise `ValueError` for a name that the format's own program would refuse, OSError for what is in the way."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name a file in it.")
    there = Path(f"{tf1_prefix(path)}.index") if to == "tf1" else path
    if there.exists() and not overwrite:
        raise FileExistsError(f"{there} exists. Pass `overwrite`, or choose another name.")
    if to == "keras" and path.suffix != ".keras" and not path.name.endswith(".weights.h5"):
        raise ValueError(
            f"Keras writes weights to *.weights.h5 and models to *.keras. Received: {path.name}."
        )
