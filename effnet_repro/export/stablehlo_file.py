"""StableHLO files: the bytes of `jax.export`, which JAX runs on a CPU, a GPU and a TPU without this package."""

from pathlib import Path
from typing import Callable

import numpy as np

from effnet_repro.convert.weights import needed
from effnet_repro.export.archive import append_metadata, read_appended
from effnet_repro.network import run
from effnet_repro.ops import JAXOps

HINT = "In the project's folder, run: pip install -e '.[jax]'."
PLATFORMS = ("cpu", "cuda", "tpu")


def _jax_export(what):
    needed("jax", what, HINT)
    return needed("jax.export", what, "It needs JAX 0.4.30 or newer: pip install -U jax.")


def write(subject, path) -> None:
    """Write a `Subject` as a StableHLO file."""
    export, ops, side = _jax_export("A StableHLO file"), JAXOps(), subject.image_size
    arrays, spec = subject.folded_arrays, subject.folded_spec
    n = subject.batch or export.symbolic_shape("N")[0]
    images = ops.jax.ShapeDtypeStruct((n, side, side, 3), "uint8")
    logits = lambda images: run(ops, spec, arrays, ops.cast(images, "float32"))
    data = export.export(ops.jax.jit(logits), platforms=PLATFORMS)(images).serialize()
    Path(path).write_bytes(data)
    append_metadata(path, subject.metadata)


def opened(path) -> Callable:
    """Return a function from images (N, S, S, 3) uint8 to logits, computed by JAX."""
    export = _jax_export("Checking a StableHLO file")
    call = export.deserialize(bytearray(Path(path).read_bytes())).call
    return lambda images: np.asarray(call(images))


def runtime() -> str:
    """Return the name and version of the program that opens these files."""
    return f"JAX {needed('jax', 'Checking a StableHLO file', HINT).__version__}"


def read_metadata(path) -> dict:
    """Return what a file says of itself."""
    return read_appended(path)
