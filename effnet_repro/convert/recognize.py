"""Recognizes the network of arrays by their names and shapes, and makes a case for it.

A file of arrays rarely says what it belongs to, but the shapes do: the kernels of block 2a give group size
and expansion, the name beside the stem's kernel gives the norm, the classifier gives the classes, and one
size fits the rest.
"""

import difflib
from typing import Callable, Dict, Tuple

from effnet_repro.config import Case, for_one_device, list_some, load_cases, override
from effnet_repro.network import params
from effnet_repro.scaling import SIZE_TABLE, ModelSpec

_MARKS = {"BN": "batch_norm/moving_mean", "LN_PN": "proxy/beta_prime", "GN": "GroupNorm/gamma"}


def _misfits(spec, shapes, name_of):
    "How many arrays a network lacks, has in another shape, or does not know"
    wanted = {name_of(p.name): p.shape for p in params(spec)}
    return sum(shapes.get(n) != wanted.get(n) for n in {*shapes, *wanted})


def network_of(
    shapes: Dict[str, Tuple[int, ...]],  # Name -> shape, kernels as (height, width, in, out)
    name_of: Callable = str,  # From our full name of a parameter to the name in `shapes`
) -> (
    ModelSpec
):  # At its native size; the number of norm groups, which shapes do not show, as published
    "Recognize a network by the names and shapes of its arrays"
    names = [name_of(f"all/{at}/conv/conv2d/kernel") for at in ("block0", "block2a/a", "block2a/b")]
    _, wide, spatial = (shapes.get(n, ()) for n in names)
    norm = next((n for n, m in _MARKS.items() if name_of(f"all/block0/{m}") in shapes), None)
    lacking = [n for n in names if len(shapes.get(n, ())) != 4 or 0 in shapes[n]]
    if lacking or norm is None:
        lacking = lacking or [name_of(f"all/block0/{m}") for m in _MARKS.values()]
        near = difflib.get_close_matches(lacking[0], list(shapes), n=1, cutoff=0.5)
        raise ValueError(
            f"These arrays are none of our EfficientNets: there is no {lacking[0]}. "
            f"There: {list_some(near or shapes)}."
        )
    dense = shapes.get(name_of("all/Top/logits/dense/kernel"), (0, 0))
    arm = dict(group_size=spatial[2], expand_ratio=max(1, wide[3] // wide[2]), num_classes=dense[1])
    arm.update(norm=norm, norm_groups=4 if norm == "GN" else 1)
    return min(
        (ModelSpec(size, **arm) for size in SIZE_TABLE), key=lambda s: _misfits(s, shapes, name_of)
    )


def case_for(
    spec: ModelSpec,  # The network
) -> Case:  # On one device
    "Make a case around a network, with the recipe of the nearest published one"
    network = dict(
        model_size="cifar" if spec.size == "CIFAR" else int(spec.size[1]),
        group_size=spec.group_size,
        norm=spec.norm,
        image_size=spec.image_size,
    )
    rest = ("expand_ratio", "norm_groups", "input_norm", "dropout_rate", "drop_path_rate")
    rest += ("net_stages", "top_filters")
    fields = {**network, **{f: getattr(spec, f) for f in rest}}
    alike = lambda case: [getattr(case, f) == value for f, value in network.items()]
    base = max(load_cases().values(), key=lambda case: (alike(case)[:1], sum(alike(case))))
    name = base.name if all(alike(base)) else spec.name
    return for_one_device(override(base, **fields, name=name))
