"""What is exported: a trained network with its proxies folded, and what a program must know to feed it."""

import zlib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np

from effnet_repro import __version__
from effnet_repro.config import FIELDS, Case
from effnet_repro.network import fold_proxies, run
from effnet_repro.ops import JAXOps, NumpyOps, TFOps
from effnet_repro.predict import Reading, read_classifier
from effnet_repro.scaling import ModelSpec

MOST_AT_A_TIME = 4096  # Images; a file with a fixed number is tried with as many
RESIZING = {
    "modern": "bilinear between two pixels, centers at half pixels, rounded to the nearest",
    "published": "bilinear between two pixels, centers at whole pixels (TensorFlow 1), computed in float32, "
    "rounded to float16, cut off",
}


@dataclass(frozen=True)
class Subject:
    """A network that is exported.

    `spec` and `arrays` are as read; the properties `folded_spec` and `folded_arrays` are what is written.
    """

    source: Path
    spec: ModelSpec
    arrays: Dict[str, np.ndarray]  # Full name -> float32 array
    case: Case
    class_names: Tuple[str, ...]
    image_size: int  # Side of an image, pixels
    batch: Optional[int] = None  # Images at a time; None = any number
    notes: Tuple[str, ...] = ()

    @property
    def _folds(self):
        return self.spec.proxy_norm and not self.spec.folded

    @property
    def folded_spec(self) -> ModelSpec:
        """The network with the statistics of its proxies stored; without proxies the network itself."""
        if not self._folds:
            return self.spec
        return replace(self.spec, folded=True, stored_proxies=False)

    @property
    def folded_arrays(self) -> Dict[str, np.ndarray]:
        """The arrays of `folded_spec`."""
        return fold_proxies(self.arrays) if self._folds else self.arrays

    @property
    def fingerprint(self) -> str:
        """Eight digits that change with every weight."""
        total = 0
        for name in sorted(self.arrays):
            value = np.ascontiguousarray(self.arrays[name], "float32")
            total = zlib.crc32(value.view(np.uint8).reshape(-1), zlib.crc32(name.encode(), total))
        return f"{total:08x}"

    @property
    def metadata(self) -> dict:
        """What a file says of itself, as JSON values."""
        side, rule = self.image_size, self.case.image_resize
        return {
            "producer": f"effnet_repro {__version__}",
            "network": self.spec.name,
            "case": self.case.name,
            "fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "image_size": side,
            "input": {
                "name": "images",
                "type": "uint8",
                "shape": [self.batch or "N", side, side, 3],
                "colors": "RGB",
                "range": [0, 255],
                "normalization": "inside the file",
            },
            "preprocessing": {
                "short_side": side * 256 // 224,
                "crop": f"the central {side} x {side} pixels",
                "image_resize": rule,
                "resizing": RESIZING[rule],
            },
            "output": {
                "name": "logits",
                "shape": [self.batch or "N", len(self.class_names)],
                "probabilities": "softmax",
            },
        }

    def logits(self, images: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Compute what the network itself says of images (N, S, S, 3) uint8: (N, classes) float32.

        Its proxies are not folded here. TensorFlow computes it, or else JAX, or NumPy; "float64" is not for JAX.
        """
        ops = computing_ops()
        arrays = {name: ops.cast(ops.asarray(value), dtype) for name, value in self.arrays.items()}
        return np.asarray(run(ops, self.spec, arrays, ops.cast(ops.asarray(images), dtype)))


_COMPUTING = (("tensorflow", TFOps), ("jax", JAXOps), (None, NumpyOps))


def computing_ops():
    """Return the operations that compute a network here: of TensorFlow, or else of JAX, or of NumPy."""
    return next(make() for package, make in _COMPUTING if package is None or find_spec(package))


def check_sizes(image_size: Optional[int], batch: Optional[int]) -> None:
    """Raise `ValueError` for a side of an image, in pixels, or a number of images that no file is written for."""
    if image_size is not None:
        FIELDS["image_size"].check(image_size)
    if batch is not None and not 1 <= batch <= MOST_AT_A_TIME:
        raise ValueError(f"`batch` must be from 1 to {MOST_AT_A_TIME:,}. Received: {batch}.")


def read_subject(
    source,  # A run folder, a checkpoint, or a file of another program: see `convert.read`
    *,
    image_size: Optional[int] = None,  # Side of an image, pixels; None = as trained
    batch: Optional[int] = None,  # Images at a time; None = any number
    **reading,  # `predict.Reading`: weights, class_names, arch
) -> Subject:
    "Read what is to be exported"
    check_sizes(image_size, batch)
    read = read_classifier(source, Reading(**reading))
    broken = [name for name, value in read.arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"{source}: {broken[0]} has values that are no numbers. Take an earlier checkpoint of the run."
        )
    about = read.case, tuple(read.class_names), image_size or read.case.image_size
    return Subject(Path(source), read.spec, read.arrays, *about, batch, read.notes)
