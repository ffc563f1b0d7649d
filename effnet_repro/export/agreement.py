"""A file that was written is opened by its own runtime and compared with the network, image by image."""

from importlib.util import find_spec
from typing import Callable, List, NamedTuple, Optional

import numpy as np

from effnet_repro.data.sample import PHOTOS, open_photo
from effnet_repro.data.transforms import validation_image
from effnet_repro.export.subject import computing_ops

TOLERANCE = 1e-4  # Of the largest logit; sums in another order differ by about 1e-5
MOST_TOLERANCE = 1e-2  # Where float32 itself is no nearer to float64
MOST = 32  # Images at a time
RANDOM, REAL = 2, 3  # Images of noise, and photographs


class Disagreement(ValueError):
    """A file gives other numbers than the network."""


class Agreement(NamedTuple):
    """How near a file is to the network."""

    difference: float  # The largest of any logit, as a share of the largest logit
    random: int  # Images of noise
    real: int  # Photographs


def real_images(image_size: int, image_resize: str) -> List[np.ndarray]:
    """Return some photographs as a validation makes them, (S, S, 3) uint8; none without the packages that have them."""
    if not find_spec("PIL"):
        return []
    there = [photo for photo in PHOTOS if find_spec(photo.package)][:REAL]
    pixels = (np.asarray(open_photo(photo)) for photo in there)
    return [validation_image(image, image_size, image_resize) for image in pixels]


def in_batches(run: Callable, images: np.ndarray, batch: Optional[int]) -> np.ndarray:
    """Apply a function that takes `batch` images at a time; None: any number, then the first image goes alone."""
    if batch is None:
        return np.concatenate(
            [run(images[:1]), *map(run, np.array_split(images[1:], -(-len(images) // MOST)))]
        )
    rows = np.resize(np.arange(len(images)), -(-len(images) // batch) * batch)
    parts = np.split(images[rows], len(rows) // batch)
    return np.concatenate([run(part) for part in parts])[: len(images)]


def rounding(subject, images: np.ndarray, expected: np.ndarray) -> float:
    """Return how far float32 moves a logit of the network from float64, as a share of the largest; 0 where unknown.

    A network whose numbers grow from layer to layer, as one with batch norm and strange moving averages may, amplifies
    rounding: then no two programs agree to many digits.
    """
    if computing_ops().name == "jax":
        return 0.0
    exact = subject.logits(images, "float64")
    return float(np.abs(expected - exact).max() / max(np.abs(exact).max(), 1e-6))


def compare(
    subject,  # `Subject` that was written
    run: Callable,  # From images (N, S, S, 3) uint8 to logits (N, classes): the file in its runtime
    name: str,  # What to call the file in an error
) -> Agreement:
    """Compare a file with the network on noise and on photographs. Raises `Disagreement`.

    A logit may differ by `TOLERANCE` of the largest or, where float32 is further from float64, by four times that.
    """
    side, rng = subject.image_size, np.random.default_rng(0)
    noise = rng.integers(0, 256, (RANDOM, side, side, 3), dtype=np.uint8)
    photographs = real_images(side, subject.case.image_resize)
    images = np.stack([*noise, *photographs])
    expected = subject.logits(images)
    if not np.isfinite(expected).all():
        raise Disagreement("The network's own answer is not a number: its weights are broken.")
    found = np.asarray(in_batches(run, images, subject.batch))
    if found.shape != expected.shape:
        raise Disagreement(
            f"{name} gives {found.shape} for {len(images)} images, and the network {expected.shape}. "
            "Nothing was written."
        )
    largest = max(float(np.abs(expected).max()), 1e-6)
    difference = float(np.abs(found - expected).max()) / largest
    tolerance = TOLERANCE
    if not difference <= tolerance:
        coarse = rounding(subject, images, expected)
        if 4 * coarse > MOST_TOLERANCE:
            raise Disagreement(
                f"The network's own logits are not determined in float32: they are {coarse:.1%} of the largest away "
                "from float64. Nothing was written. Its weights or moving averages do not fit images: train longer."
            )
        tolerance = max(tolerance, 4 * coarse)
    if not difference <= tolerance:
        raise Disagreement(
            f"{name} does not agree with the network: a logit differs by {difference:.1e} of the largest, and "
            f"{tolerance:.0e} is allowed. Nothing was written. Try another version of the runtime, or another format."
        )
    return Agreement(difference, RANDOM, len(photographs))
