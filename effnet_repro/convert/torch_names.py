"""PyTorch's names and layouts: timm's where timm has the network, ours with dots elsewhere.

PyTorch keeps kernels as (out, in, height, width) and dense matrices as (out, in).
"""

from typing import Dict

import numpy as np

from effnet_repro.network import params
from effnet_repro.scaling import ModelSpec

_ENDS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


_ENDS.update(moving_mean="running_mean", moving_variance="running_var")


def timm_name(
    name: str,  # Our full name of a parameter of a batch-norm network, e.g. "all/block2a/b/conv/conv2d/kernel"
) -> str:  # e.g. "blocks.1.0.conv_dw.weight"
    "Translate a parameter's name to timm's"
    _, block, *rest = name.split("/")
    end, norm = _ENDS.get(rest[-1], rest[-1]), "batch_norm" in rest
    if block == "block0":
        return f"{'bn1' if norm else 'conv_stem'}.{end}"
    if block == "Top":
        return f"{'classifier' if 'logits' in rest else 'bn2' if norm else 'conv_head'}.{end}"
    stage, at = int(block[5]), f"blocks.{int(block[5]) - 1}.{ord(block[6]) - ord('a')}"
    if rest[0] == "SE":
        return f"{at}.se.conv_{'reduce' if rest[1] == '1' else 'expand'}.{end}"
    if norm:  # numbered in the order of the convolutions; stage 1 has no expansion
        return f"{at}.bn{'abc'.index(rest[0]) + (1 if stage > 1 else 0)}.{end}"
    last = "conv_pwl" if stage > 1 else "conv_pw"
    return f"{at}.{dict(a='conv_pw', b='conv_dw', c=last)[rest[0]]}.{end}"


_SHORTER = (
    ("/conv2d/", "/"),
    ("/dense/", "/"),
    ("/GroupNorm/", "/norm/"),
    ("/batch_norm/", "/norm/"),
)


def torch_name(
    name: str,  # Our full name of a parameter
) -> str:  # e.g. "block2a.b.norm.weight"
    "Give a parameter the name that it has in our PyTorch files"
    for long, short in _SHORTER:
        name = name.replace(long, short)
    head, _, end = name[len("all/") :].rpartition("/")
    if head.endswith("proxy") and end in ("gamma", "beta"):
        head = head[: -len("proxy")] + "norm"
    return f"{head}/{_ENDS.get(end, end)}".replace("/", ".")


def has_timm_twin(spec):
    "Whether timm has this network, of another name"
    return (
        spec.batch_norm and (spec.group_size, spec.expand_ratio) == (1, 6) and spec.size != "CIFAR"
    )


def torch_layout(value):
    "Kernels as (out, in, height, width), matrices as (out, in)"
    value = np.asarray(value)
    return value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim)))


def own_layout(value):
    "Kernels as (height, width, in, out), matrices as (in, out)"
    value = np.asarray(value)
    return value.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim, range(value.ndim)))


def to_state_dict(
    spec: ModelSpec,  # The network
    arrays: Dict[str, np.ndarray],  # Full name -> array
) -> Dict[str, np.ndarray]:  # timm's names where timm has this network, else those of `torch_name`
    "Arrange weights as PyTorch does"
    rename = timm_name if has_timm_twin(spec) else torch_name
    names = [p.name for p in params(spec) if p.name.startswith("all/")]
    state = {rename(n): torch_layout(arrays[n]) for n in names}
    counters = [
        n.replace("running_var", "num_batches_tracked") for n in state if "running_var" in n
    ]
    return {**state, **{n: np.zeros((), "int64") for n in counters}}
