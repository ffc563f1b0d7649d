"""State dicts of PyTorch, in safetensors or as `torch.save` writes them: timm's, ours, and those of `torch_others`.

A state dict does not tell timm's two kinds apart (`tf_efficientnet_b*` pads as TensorFlow does, plain
`efficientnet_b*` symmetrically, with another epsilon), nor how images are centered: our own header, timm's
`config.json` beside the file, the file's name or the caller does.
"""

import contextlib
import importlib
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from effnet_repro.checkpoint import atomic_write
from effnet_repro.config import case_to_dict, earlier_note, list_some, unknown_name
from effnet_repro.convert.torch_names import (
    has_timm_twin,
    own_layout,
    timm_name,
    to_state_dict,
    torch_name,
)
from effnet_repro.convert.torch_others import brought_to_timm, without_prefix
from effnet_repro.convert.weights import (
    Found,
    case_in,
    checked_object,
    names_in,
    needed,
    object_in,
    text_of,
)
from effnet_repro.network import IMAGENET_STD, input_affine
from effnet_repro.outside import check_archive, check_numbers, file_kind, head_of


@dataclass(frozen=True)
class TorchOptions:
    "What a caller says of a PyTorch file that the file itself does not"

    arch: Optional[str] = (
        None  # timm's name, e.g. "tf_efficientnet_b0"; None = the file's name says
    )
    input_mean: Optional[Sequence[float]] = (
        None  # Of 0..1 pixels, a number a color; None = see the file
    )
    input_std: Optional[Sequence[float]] = None  # Likewise


_ARCH = re.compile(r"(tf_)?efficientnet_b[0-7]")


_STATE_KEYS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")


def _known_arch(name):
    "timm's model name without the tag of its training, or None"
    found = _ARCH.match(str(name or ""))
    rest = str(name or "")[found.end() :] if found else ""
    return found[0] if found and not rest[:1].isalnum() else None


def pads_symmetrically(found, arch, path):
    "Whether a network of timm's names pads symmetrically, by what is said about it"
    if arch is not None and _known_arch(arch) is None:
        legal = ["tf_efficientnet_b0 to b7", "efficientnet_b0 to b7"]
        raise unknown_name("arch", arch, legal)
    for said in (arch, found.get("arch"), path.name):
        if _known_arch(said):
            return not _known_arch(said).startswith("tf_")
    raise ValueError(
        f"{path.name} does not say whether it is timm's tf_efficientnet (TensorFlow's padding, epsilon "
        "1e-3) or efficientnet (symmetric padding, epsilon 1e-5). Pass arch, e.g. 'tf_efficientnet_b0'."
    )


_HEADER = "effnet_repro_torch"


def open_safetensors(path, read):
    "Call `read` with an open safetensors file; all errors of the file are raised here"
    with contextlib.suppress(ImportError):  # which tells NumPy what bfloat16 is
        importlib.import_module("ml_dtypes")
    try:
        with safe_open(str(path), "np") as file:
            return read(file)
    except (SafetensorError, AttributeError, TypeError) as e:  # a type of numbers that NumPy lacks
        raise ValueError(
            f"{path} is not a whole safetensors file that NumPy can hold: cut off while copying, or "
            f"another kind of file (it is {file_kind(path)}; {e}). Copy it again."
        ) from None


def _read_safetensors(path):
    "State dict of a safetensors file, and what its header says"
    said = open_safetensors(path, lambda file: (file.metadata() or {}).get(_HEADER, "{}"))
    plain = lambda a: a.astype("float32") if a.dtype.name == "bfloat16" else a
    arrays = lambda file: {n: plain(file.get_tensor(n)) for n in file.keys()}
    check_numbers(path, path.stat().st_size // 4)
    return open_safetensors(path, arrays), object_in(said, f"The header of {path}")


def _floats(tensor):
    "A tensor of numbers that NumPy knows; whole ones stay whole"
    whole = not getattr(tensor, "is_floating_point", lambda: True)()
    return tensor.detach() if whole else tensor.detach().float()


def _read_pth(path):
    "State dict of a file that torch.save wrote, and what stands beside it"
    save_there = "safetensors.torch.save_file(state_dict, 'model.safetensors')"
    hint = f"Install torch, or save the state dict where it is: {save_there}."
    check_numbers(path, path.stat().st_size // 4)
    kind = file_kind(path)
    if kind == "a ZIP archive":
        check_archive(path)
    elif kind not in ("a pickle", "of no known kind") and head_of(path, 2) != b"PK":
        do = "Unpack it" if kind.endswith("archive") else "Copy it again"
        raise ValueError(f"{path} is {kind}, not a whole file of weights. {do}.")
    torch = needed("torch", f"Reading {path.name}", hint)
    try:
        loaded = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises what its unpickler, archive reader or allocator raise
        raise ValueError(
            f"{path} is not a whole file of weights: cut off, or with other objects than tensors in "
            f"it, which are not run (it is {file_kind(path)}; {' '.join(str(e).split('. ')[0].split())[:200]})."
        ) from None
    if not isinstance(loaded, dict):
        kind = "one tensor" if hasattr(loaded, "detach") else f"a {type(loaded).__name__}"
        raise ValueError(f"{path} holds {kind}, not a dictionary of tensors.")
    states = [k for k in _STATE_KEYS if isinstance(loaded.get(k), dict)]
    state = loaded[states[0]] if states else loaded
    arch = loaded.get("arch") if isinstance(loaded.get("arch"), str) else None
    tensors = {str(n): v for n, v in state.items() if hasattr(v, "detach")}
    check_numbers(
        path, sum(math.prod(getattr(v, "shape", ())) for v in tensors.values())
    )  # a view may be larger than its file
    try:
        arrays = {n: _floats(v).numpy() for n, v in tensors.items()}
    except (RuntimeError, TypeError) as e:  # sparse or quantized ones
        raise ValueError(f"{path} holds tensors that are no plain numbers ({e}).") from None
    more = (
        f"Read from {states[0]}; the file also holds {', '.join(states[1:])}." if states[1:] else ""
    )
    return arrays, {"arch": arch, "note": more}


_DEFAULT_MEAN, _DEFAULT_STD = (0.485, 0.456, 0.406), tuple(s / 255 for s in IMAGENET_STD)


def _beside(path):
    "What timm's config.json beside a file says"
    beside = path.parent / "config.json"
    try:
        said = json.loads(text_of(beside) or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or not ({"pretrained_cfg", "architecture"} & set(said)):
        return {}  # of another program
    about = checked_object(said.get("pretrained_cfg") or {}, f"`pretrained_cfg` in {beside}")
    about = {n: about.get(n) for n in ("mean", "std", "crop_pct")}
    about["arch"] = said.get("architecture")
    return {k: v for k, v in about.items() if v}


def _crop_pct(value, path):
    "timm's `crop_pct`, None where nothing says it"
    if value is None or (type(value) in (int, float) and 0.01 < value <= 1):
        return value
    raise ValueError(f"`crop_pct` of {path} must be a number up to 1. Received: {str(value)[:80]}.")


def _three(name, values):
    "Three positive or zero numbers, one a color"
    try:
        values = np.asarray(values, "float64").reshape(-1)
    except (TypeError, ValueError):
        text = f"`{name}` is three numbers of 0..1 pixels. Received: {str(values)[:80]}."
        raise ValueError(text) from None
    if values.size not in (1, 3) or not np.isfinite(values).all():
        raise ValueError(f"`{name}` is three numbers of 0..1 pixels. Received: {values.tolist()}.")
    return np.broadcast_to(values, 3)


def _torch_affine(said, mean, std):
    "(scale, shift) of 0..255 pixels from mean and std of 0..1 pixels, and a note when both are guessed"
    assumed = mean is None and std is None and "mean" not in said
    mean = _three("input_mean", mean if mean is not None else said.get("mean", _DEFAULT_MEAN))
    std = _three("input_std", std if std is not None else said.get("std", _DEFAULT_STD))
    if (std <= 0).any():
        raise ValueError(f"`input_std` must be positive. Received: {std.tolist()}.")
    scale = 1 / (255 * std)
    affine = (scale.astype("float32"), (-mean / std).astype("float32"))
    note = "Images are centered with ImageNet's mean and standard deviation, since the file names none."
    return affine, (note,) if assumed else ()


def _refuse_others(path, state):
    "Raise `ValueError` unless the arrays have timm's names, of EfficientNet-B0 to B7"
    if "conv_stem.weight" not in state:
        raise ValueError(
            f"{path} has the names of no EfficientNet that is read: timm's, torchvision's, efficientnet-pytorch's or "
            f"ours. There: {list_some(state)}."
        )
    lacking = [n for n in _OF_EVERY_B if n not in state]
    if lacking:
        raise ValueError(
            f"{path} has timm's names, but is none of efficientnet_b0 to b7, tf_ or not: there is no {lacking[0]}. "
            "EfficientNetV2, lite, MobileNet and others are not read."
        )


def find_torch(path, options):
    "Read a PyTorch file as `Found`; `options` are `TorchOptions`"
    state, said = (_read_safetensors if path.suffix == ".safetensors" else _read_pth)(path)
    said = {**_beside(path), **{k: v for k, v in said.items() if v}}
    state = {n: own_layout(v) for n, v in state.items() if not n.endswith("num_batches_tracked")}
    case = case_in(said, path)
    renamed = brought_to_timm(without_prefix(state))
    state = renamed.state
    affine, notes = _torch_affine(said, options.input_mean, options.input_std)
    if (notes and "block0.conv.weight" in state) or (case and case.input_norm != "keras"):
        affine, notes = None, ()  # ours, centered as published unless the header says otherwise
    notes += (said["note"],) if said.get("note") else ()
    if case and (note := earlier_note(said["case"])):
        notes = (*notes, note)
    about = dict(affine=affine, case=case, class_names=names_in(said, path), notes=notes)
    about["crop_pct"] = _crop_pct(said.get("crop_pct"), path) or renamed.crop_pct or None
    if "block0.conv.weight" in state:
        return Found(state, torch_name, **about)
    _refuse_others(path, state)
    if renamed.package:
        if options.arch:
            raise ValueError(
                f"{path} has the names of {renamed.package}, and `arch` tells timm's networks apart. Leave it out."
            )
        about["notes"] = (*notes, f"Names of {renamed.package}.")
    if renamed.package == "torchvision" or (
        not renamed.package and pads_symmetrically(said, options.arch, path)
    ):
        old = renamed.old_epsilon or not renamed.package
        about.update(odd_size=True, notes=(*about["notes"], _SYMMETRIC_NOTE + _EPSILON_NOTE * old))
        state = with_our_epsilon(state) if old else state
    return Found(state, timm_name, **about)


#: Arrays that tell an EfficientNet of the first kind from its relatives
_OF_EVERY_B = ("blocks.0.0.conv_dw.weight", "blocks.0.0.se.conv_reduce.weight")


_SYMMETRIC_NOTE = (
    "This network pads symmetrically: the numbers are the original's at sizes of 32 k + 1 pixels and differ at "
    "others."
)


_EPSILON_NOTE = " Epsilon 1e-5 became part of gamma."


def with_our_epsilon(state, theirs=1e-5, ours=1e-3):
    "Rescale every batch norm's gamma so that our epsilon gives their result"
    state = dict(state)
    for name in [n for n in state if n.endswith(".running_var")]:
        gamma, variance = name.replace("running_var", "weight"), state[name].astype("float64")
        factor = np.sqrt((variance + ours) / (variance + theirs))
        state[gamma] = (state[gamma] * factor).astype("float32")
    return state


def write_torch(path, weights):
    "Write `Weights` as a PyTorch file; returns notes"
    spec, (scale, shift) = weights.spec, input_affine(weights.spec, weights.arrays)
    state = to_state_dict(spec, weights.arrays)
    scale, shift = scale.astype("float64"), shift.astype("float64")
    about = {"mean": (-shift / scale / 255).tolist(), "std": (1 / (255 * scale)).tolist()}
    about.update(case=case_to_dict(weights.case), class_names=list(weights.class_names))
    if has_timm_twin(spec):
        about["arch"] = f"tf_efficientnet_{spec.size.lower()}"
    if path.suffix == ".safetensors":
        state = {n: np.asarray(v, order="C") for n, v in state.items()}
        data = serialize(state, metadata={"format": "pt", _HEADER: json.dumps(about)})
        notes = ()
    else:
        data, notes = _pth_bytes(path, state), (_CASE_LOST.format(case=weights.case),)
    atomic_write(path, data)
    named = [", ".join(f"{v:.4g}" for v in about[k]) for k in ("mean", "std")]
    centring = f"Feed images of 0..1 less mean ({named[0]}), over std ({named[1]})."
    return (
        f"Names and shapes of timm's {about['arch']}." if "arch" in about else _OWN_NOTE,
        centring,
        *notes,
    )


_CASE_LOST = (
    "A .pth file has no place for how the network was trained (image_resize={case.image_resize}, "
    "label_smoothing_over={case.label_smoothing_over}); a .safetensors file has."
)


_OWN_NOTE = "timm has no such network: names are ours, as on the page of `effnet_repro.convert`."


def _pth_bytes(path, state):
    hint = "Write .safetensors instead: safetensors.torch.load_file reads it."
    torch = needed("torch", f"Writing {path.name}", hint)
    file = io.BytesIO()
    torch.save({n: torch.from_numpy(np.array(v)) for n, v in state.items()}, file)
    return file.getvalue()
