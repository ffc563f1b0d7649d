"Weights, images and comparisons for the tests of the converter."

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from effnet_repro import convert
from effnet_repro.network import initial_weights, run
from effnet_repro.ops import get_ops
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import test_allclose as check_close

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent / "data"))
import make_timm_vectors as timm_vectors  # noqa: E402

TIMM = json.loads((ROOT / "tests/data/timm_vectors.json").read_text())
SMALL = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10)


def logits(weights, images, dtype="float32"):
    arrays = {n: a.astype(dtype) for n, a in weights.arrays.items()}
    with np.errstate(over="ignore"):  # exp in a sigmoid far below zero
        return run(get_ops("numpy"), weights.spec, arrays, images.astype(dtype))


def moved(spec, seed=0):
    """Weights with every array away from its start, so that none can be swapped or dropped unseen."""
    rng = np.random.default_rng(seed)
    arrays = initial_weights(spec, seed)
    for name, value in arrays.items():
        if name.endswith("moving_variance"):
            arrays[name] = rng.uniform(0.5, 2, value.shape).astype("float32")
        elif not name.endswith("kernel") and not name.startswith("input/"):
            arrays[name] = (value + rng.normal(0, 0.2, value.shape)).astype("float32")
    return convert.Weights(spec, arrays, convert.case_for(spec), ("x",) * spec.num_classes)


def random_images(size, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (2, size, size, 3)).astype("float32")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        check_close(a[name], b[name], rtol=0, msg=name)


def write_body(path):
    "Write a small network without its classifier, as a PyTorch file"
    weights = moved(SMALL)
    state = convert.to_state_dict(weights.spec, weights.arrays)
    body = {n: np.array(a, order="C") for n, a in state.items() if ".logits." not in n}
    save_file(body, str(path))
    return path


def write_timm(path, arch):
    shapes = TIMM["shapes"].get(arch) or TIMM["shapes"][f"tf_{arch}"]
    save_file(timm_vectors.state_dict(shapes), str(path))
    return path
