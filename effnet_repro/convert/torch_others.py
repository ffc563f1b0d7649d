"""State dicts of torchvision and of the package efficientnet-pytorch, brought to timm's names.

All three have the same network. torchvision pads symmetrically, efficientnet-pytorch as TensorFlow does.
"""

import re
from typing import Dict, NamedTuple

import numpy as np

#: Kernels that a state dict begins with: timm's, torchvision's, efficientnet-pytorch's, ours.
STEMS = ("conv_stem.weight", "features.0.0.weight", "_conv_stem.weight", "block0.conv.weight")

_BLOCK = ("conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3")
_FIRST_BLOCK = (None, None, "conv_dw", "bn1", "se", "conv_pw", "bn2")  # of stage 1: no expansion
_SE = {"fc1": "conv_reduce", "fc2": "conv_expand"}
_ENDS = {  # What stands outside the blocks
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.8.0": "conv_head",
    "features.8.1": "bn2",
    "classifier.1": "classifier",
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_PYTORCH_BLOCK = {
    "_expand_conv": 0,
    "_bn0": 1,
    "_depthwise_conv": 2,
    "_bn1": 3,
    "_project_conv": 5,
    "_bn2": 6,
}
# Share of the resized image's short side that torchvision validates on, by blocks and width of the head.
_CROPS = {(16, 1280): 0.875, (23, 1280): 0.9375, (26, 1536): 0.9375, (32, 1792): 0.99}


class Renamed(NamedTuple):
    """A state dict with timm's names, if it can be brought to them."""

    state: Dict[str, np.ndarray]
    package: str = ""  # "torchvision", "efficientnet-pytorch"; "" for one that was not renamed
    old_epsilon: bool = False  # Whether its batch norms add 1e-5 to the variance, and not 1e-3
    crop_pct: float = 0.0  # As timm says it; 0 = not known


def without_prefix(state: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Return a state dict whose names begin with the network's.

    A network inside another module, or one that was compiled or trained on several GPUs, has names such as
    "module.conv_stem.weight" or "model.net.conv_stem.weight".
    """
    for name in state:
        stem = next((s for s in STEMS if name.endswith(f".{s}")), None)
        if stem and not set(STEMS) & set(state):
            before = len(name) - len(stem)
            return {n[before:] if n.startswith(name[:before]) else n: v for n, v in state.items()}
    return state


def brought_to_timm(state: Dict[str, np.ndarray]) -> Renamed:
    """Return a state dict with timm's names in place of torchvision's or efficientnet-pytorch's.

    Names that neither has stay as they are.
    """
    if "features.0.0.weight" in state and any(".block." in name for name in state):
        found = {_of_torchvision(name): value for name, value in state.items()}
        head = np.shape(found.get("conv_head.weight", ()))
        blocks = len({n.rpartition(".block.")[0] for n in state if ".block." in n})
        width = head[-1] if head else 0
        return Renamed(found, "torchvision", width < 2048, _CROPS.get((blocks, width), 1.0))
    if "_conv_stem.weight" in state:
        at = _stages(state)
        found = {_of_efficientnet_pytorch(name, at): value for name, value in state.items()}
        return Renamed(found, "efficientnet-pytorch")
    return Renamed(state)


def _outside(name):
    module, _, end = name.rpartition(".")
    return f"{_ENDS[module]}.{end}" if module in _ENDS else name


def _of_torchvision(name):
    found = re.fullmatch(r"features\.([1-7])\.(\d+)\.block\.([0-3])\.(\w+)\.(\w+)", name)
    if not found:
        return _outside(name)
    stage, at, part, inner, end = found.groups()
    part = int(part) + (stage == "1")  # 0 expansion, 1 depthwise, 2 gate, 3 projection
    names = _FIRST_BLOCK if stage == "1" else _BLOCK
    if part == 2 and inner in _SE:
        return f"blocks.{int(stage) - 1}.{at}.se.{_SE[inner]}.{end}"
    number = {0: 0, 1: 2, 3: 5}.get(part)
    if number is None or inner not in ("0", "1"):
        return name
    return f"blocks.{int(stage) - 1}.{at}.{names[number + int(inner)]}.{end}"


def _stages(state):
    "Block's number -> (stage from 0, number in it): a stage begins where the outputs of a block grow"
    widths = {}
    for name, value in state.items():
        found = re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", name)
        if found:
            widths[int(found[1])] = np.shape(value)[-1]
    places, stage, at, before = {}, -1, 0, None
    for number in sorted(widths):
        stage, at = (stage, at + 1) if widths[number] == before else (stage + 1, 0)
        places[number], before = (stage, at), widths[number]
    return places


def _of_efficientnet_pytorch(name, places):
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if not found or int(found[1]) not in places:
        return _outside(name)
    (stage, at), part, end = places[int(found[1])], found[2], found[3]
    if part in ("_se_reduce", "_se_expand"):
        return f"blocks.{stage}.{at}.se.conv{part[3:]}.{end}"
    own = (_BLOCK if stage else _FIRST_BLOCK)[_PYTORCH_BLOCK[part]] if part in _PYTORCH_BLOCK else 0
    return f"blocks.{stage}.{at}.{own}.{end}" if own else name
