"""Weights, images and expected values of the published network (tests/parity)."""

import json
import zlib
from pathlib import Path

import numpy as np

from effnet_repro.network import unpack
from effnet_repro.scaling import ModelSpec

FOLDER = Path(__file__).parent / "parity"
NAMES = sorted(p.stem for p in FOLDER.glob("*.json"))


def load(name):
    """The vector called `name`: its options and expected statistics, and the expected logits."""
    return json.loads((FOLDER / f"{name}.json").read_text()), np.load(FOLDER / f"{name}_logits.npy")


def spec_of(vector):
    norm = "BN" if vector["batch_norm"] else vector["case"].split("-")[2]
    return ModelSpec(
        size=vector["size"],
        group_size=vector["group_dim"],
        expand_ratio=vector["expand_ratio"],
        norm=norm,
        norm_groups=vector["norm_groups"],
        image_size=vector["image_size"],
        input_norm="none",
    )


def _draw(name, shape):
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit("/", 1)[-1]
    if last == "kernel":
        z = z * np.sqrt(1 / np.prod(shape[:-1]))
    elif last in ("gamma",):
        z = 1 + 0.2 * z
    elif last == "moving_mean":
        z = 0.1 * z
    elif last == "moving_variance":
        z = np.exp(0.2 * z)
    else:
        z = 0.2 * z
    return z.astype("float32")


def published_variables(vector):
    """Published name -> array; the rows of a proxy that follow from the others are left at zero."""
    variables = {}
    for name, shape in vector["variables"]:
        if not name.endswith("/proxy"):
            variables[name] = _draw(name, shape)
            continue
        rows = {
            r: _draw(f"{name}/{r}", shape[3:])
            for r in ("beta", "gamma", "beta_prime", "gamma_prime")
        }
        zero = np.zeros(shape[3:], "float32")
        order = (rows["beta"], rows["gamma"], zero, zero, rows["beta_prime"], rows["gamma_prime"])
        variables[name] = np.stack(order)[:, None, None]
    return variables


def weights_of(vector):
    return unpack(published_variables(vector))


def images_of(vector):
    size = vector["image_size"]
    rng = np.random.default_rng(vector["image_seed"])
    return rng.standard_normal((vector["batch"], size, size, 3)).astype("float32")
