"""Static int8: weights and activations of an ONNX file in 8 bits, with ranges measured on images of a data set.

ONNX Runtime's own tools do it. With batch norm everything is quantized. With other norms only the convolutions are: the
statistics of an image stay float32, and so does what would be turned into 8 bits and back around each of them.
"""

import logging
import tempfile
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np

from effnet_repro.convert.weights import needed
from effnet_repro.data.decode import read_encoded
from effnet_repro.data.files import SquaresJob
from effnet_repro.export import onnx_file
from effnet_repro.export.agreement import Disagreement, in_batches

CALIBRATION, CHECKED = (
    128,
    256,
)  # Training images that give the ranges; validation images that are compared
BATCH = 8  # Images at a time while ranges are measured
LEAST_SAME = 0.9  # Share of images whose first class must stay


class Kept(NamedTuple):
    """How near a quantized file is to the network."""

    difference: float  # The largest of any logit, as a share of the largest logit
    same: float  # Share of images with the same first class
    images: int  # Of a validation split
    top1: float  # Share of them that the quantized file names rightly
    float_top1: float  # The same of the float32 file


def some_images(data, split: str, count: int, subject) -> Tuple[np.ndarray, np.ndarray]:
    """Return up to `count` images of a split, spread over it, (n, S, S, 3) uint8, and their labels."""
    labels = data.splits[split].label if split in data.splits else ()
    rows = np.unique(np.linspace(0, len(labels) - 1, min(count, len(labels))).astype(int))
    if not len(labels):
        raise ValueError(f"{data.root} has no {split} images, which int8 needs.")
    files = [read_encoded(data, split, int(i), raw=True)[0] for i in rows]
    squares, problems = SquaresJob(subject.image_size, subject.case.image_resize)(files)
    good = np.array([not problem for problem in problems])
    return squares[good], np.asarray(labels)[rows][good]


class _Reader:
    "What the quantizer draws batches from"

    def __init__(self, images, batch):
        rows = np.resize(np.arange(len(images)), -(-len(images) // batch) * batch)
        self._batches = iter(np.split(images[rows], len(rows) // batch))

    def get_next(self):
        images = next(self._batches, None)
        return None if images is None else {"images": images}


def quantize(subject, source: Path, target: Path, images: np.ndarray) -> None:
    """Write the int8 form of an ONNX file of a `Subject`; `images` give the ranges."""
    onnx = needed("onnx", "int8", onnx_file.HINT)
    tools = needed("onnxruntime.quantization", "int8", onnx_file.HINT)
    convolutions = None if subject.spec.batch_norm else ["Conv"]
    level, log = logging.root.level, logging.root
    log.setLevel(logging.ERROR)  # it advises steps that this graph has behind it
    try:
        tools.quantize_static(
            str(source),
            str(target),
            _Reader(images, subject.batch or BATCH),
            op_types_to_quantize=convolutions,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )
    finally:
        log.setLevel(level)
    model = onnx_file.describe(onnx.load(str(target)), subject)  # the quantizer changes it
    target.write_bytes(model.SerializeToString())


def kept(expected: np.ndarray, found: np.ndarray, labels: np.ndarray) -> Kept:
    """Compare the logits of a float32 and of an int8 file, (n, classes) each."""
    first, now = expected.argmax(1), found.argmax(1)
    difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    shares = (float((a == b).mean()) for a, b in ((now, first), (now, labels), (first, labels)))
    same, top1, float_top1 = shares
    return Kept(difference, same, len(labels), top1, float_top1)


def write_int8(subject, path: Path, data) -> Kept:
    """Write a `Subject` as an int8 ONNX file, and compare it with the float32 one on validation images.

    - `data`: a `DataSet`; its training images give the ranges.

    Raises `Disagreement` where more than a tenth of the images get another first class.
    """
    images, _ = some_images(data, "train", CALIBRATION, subject)
    checked, labels = some_images(data, "validation", CHECKED, subject)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        onnx_file.write(subject, plain)
        quantize(subject, plain, path, images)
        expected, found = (
            in_batches(onnx_file.opened(p), checked, subject.batch) for p in (plain, path)
        )
    result = kept(expected, found, labels)
    if result.same < LEAST_SAME:
        raise Disagreement(
            f"int8 changes the first class of {1 - result.same:.0%} of {result.images} validation images of "
            f"{data.root}, and {1 - LEAST_SAME:.0%} is allowed. Nothing was written. Train longer, or leave int8 out."
        )
    return result
