"""Images in, classes out: `predict` for a list, `Predictor` for a network that stays.

Weights are read from whatever `convert.read` reads: a run folder, a checkpoint, a file of keras.applications, a state
dict of timm or torchvision. An image is cut, resized and normalized as in the validation of the network it is shown
to. Nothing heavy is imported before a `Predictor` is made.
"""

import os
import time
from dataclasses import dataclass
from typing import Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.classes import has_names
from effnet_repro.convert import Weights
from effnet_repro.data.decode import has_fast_dct
from effnet_repro.data.device import memory_of_gpu
from effnet_repro.data.files import SquaresJob, find_images, square_batches
from effnet_repro.fields import check_whole
from effnet_repro.scaling import count
from effnet_repro.transfer import read_body

MOST_ON_GPU, MOST_ON_CPU = 256, 64  # Images at a time: more are no faster
GPU_GIB, CPU_GIB = 16.0, 4.0  # Of memory, where nothing tells
SHARE = 0.25  # Of memory that the activations of a batch may take, if all were kept


class Guess(NamedTuple):
    """A class that a network sees in an image."""

    name: str  # Its name, or its number where the classes have no names
    label: int  # From 0
    probability: float  # In [0, 1]


class Prediction(NamedTuple):
    """What a network says of an image."""

    image: object  # As it was given: a path, mostly
    guesses: Tuple[Guess, ...]  # The most likely first; none where there is a problem
    problem: str = ""  # Why there is no answer, e.g. that the file is damaged


@dataclass(frozen=True)
class Reading:
    """How weights are read, where the file does not say it."""

    weights: str = "auto"  # Of a run folder: "last", "average", "auto" = the average of a long run
    class_names: Optional[Sequence[str]] = None  # By label; None = the file's, or numbers
    arch: Optional[str] = None  # timm's name of a PyTorch file, e.g. "tf_efficientnet_b0"


def read_classifier(source, reading: Reading = Reading()) -> Weights:
    """Return the weights of `source`, which may be `Weights` that were read before.

    Raises ValueError where it has no classifier, or another number of classes.
    """
    read = isinstance(source, Weights)
    network = source if read else read_body(source, reading.weights, reading.arch)
    if not network.spec.num_classes:
        raise ValueError(
            f"{source} has no classifier: it cannot name a class. Give it one: effnet-finetune {source} "
            "--data-dir FOLDER --new-head."
        )
    names = network.class_names if reading.class_names is None else tuple(reading.class_names)
    if len(names) != network.spec.num_classes:
        raise ValueError(
            f"{len(names)} class names for the {network.spec.num_classes} classes of {source}."
        )
    return network._replace(class_names=names)


class Predictor:
    """A trained network that names what images show.

    - `source`: a run folder, a checkpoint, or a file of another program: see `convert.read`; or its `Weights`.
    - `image_size`: side that images are resized to, pixels; None is what the network was trained at.
    - `precision`: type to compute in: "float32", "bfloat16", "float16"; "auto" is bfloat16 on a GPU under JAX.
    - `backend`: "tensorflow" or "jax"; refused where Keras runs on the other.
    - `reading`: fields of `Reading`: weights, class_names, arch.

    It can be pickled, for other processes: it takes its weights along and compiles there.

    Raises ValueError for weights of no network of ours, or without a classifier.
    """

    def __init__(self, source, *, image_size=None, precision="auto", backend=None, **reading):
        from effnet_repro.training import choose_precision, configure, predictor

        configure(backend)
        network = read_classifier(source, Reading(**reading))
        self.spec, self.case, self.notes = network.spec, network.case, network.notes
        self.image_size = check_whole(32, image_size=image_size or network.case.image_size)
        named = has_names(network.class_names)
        self.class_names = network.class_names if named else tuple(map(str, self._labels))
        if not named:
            self.notes += (
                "The file names no classes, so their numbers are shown, from 0. class_names, or --class-names FILE "
                "with a name a line, names them.",
            )
        self.precision = choose_precision(precision)
        self._job = SquaresJob(self.image_size, self.case.image_resize, network.crop_pct)
        self._arrays = network.arrays
        self._logits = predictor(self.spec, self._arrays, self.precision)
        self.seconds, self._timed, self._shapes = 0.0, 0, set()
        if self.case.image_resize == "published" and not has_fast_dct():
            self.notes += (
                "JPEGs are decoded with the accurate DCT; training used the fast one. The same: "
                "pip install simplejpeg.",
            )

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_logits"}

    def __setstate__(self, state):
        from effnet_repro.training import configure, predictor

        configure()
        vars(self).update(state, _shapes=set())
        self._logits = predictor(self.spec, self._arrays, self.precision)

    def __repr__(self):
        classes = f"{self.spec.num_classes} classes"
        return f"<Predictor: {self.spec.name}, {classes}, images of {self.image_size} px>"

    @property
    def crop_pct(self) -> Optional[float]:
        """How images are cut, of weights of timm or keras.applications: see `data.files.timm_square`; else None."""
        return self._job.crop_pct

    @property
    def _labels(self):
        return range(self.spec.num_classes)

    @property
    def images_per_s(self) -> float:
        """Speed so far, from files to probabilities, without the first batch; not a number after one batch."""
        return self._timed / self.seconds if self._timed else float("nan")

    def see(self, image) -> np.ndarray:
        """Return what the network sees of an image, (S, S, 3) uint8. Raises ValueError where it cannot be read."""
        (square,), (problem,) = self._job([image])
        if problem:
            raise ValueError(f"{image}: {problem}")
        return square

    def probabilities(self, squares: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (n, classes) float64, of squares (n, S, S, 3) uint8."""
        logits = np.asarray(self._logits(squares), "float64")
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def __call__(
        self, images: Iterable, top: int = 5, batch: Optional[int] = None
    ) -> Iterator[Prediction]:
        """Yield a `Prediction` of each image, in order.

        - `images`: paths, bytes of files, arrays (H, W, 3) uint8, or Pillow's; mixed if need be, or one of them.
        - `top`: how many guesses.
        - `batch`: images at a time; None is what suits the device.
        """
        images, top = _as_list(images), check_whole(1, top=top)
        fits = suitable_batch(self.spec, self.image_size) if batch is None else batch
        most = check_whole(1, batch=fits)
        batch = max(1, -(-len(images) // max(1, -(-len(images) // most))))  # the last is no smaller
        return self._predicted(images, top, batch, self._shape(batch, most))

    def _shape(self, batch, most):
        """Return how many images are computed at once where `batch` are shown, the others being black.

        Each new number compiles the network, for seconds. So after the first few numbers are used, and one that was
        used before unless it is more than four times too large.
        """
        known = [n for n in self._shapes if batch <= n <= min(4 * batch, most)]
        rounded = 2 ** (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8
        shape = min(known, default=min(rounded, most) if self._shapes else batch)
        self._shapes.add(shape)
        return shape

    def _predicted(self, images, top, batch, shape):
        first, since = True, time.perf_counter()
        for number, (squares, problems) in enumerate(square_batches(images, self._job, batch)):
            missing = shape - len(squares)
            squares = np.concatenate([squares, np.zeros((missing, *squares.shape[1:]), np.uint8)])
            p = self.probabilities(squares)
            now = time.perf_counter()
            if not first:
                self.seconds, self._timed = self.seconds + now - since, self._timed + len(problems)
            first = False
            some = images[number * batch : (number + 1) * batch]
            for one in zip(some, p, problems):
                yield self._prediction(*one, top)
            since = time.perf_counter() if first else now

    def _prediction(self, image, p, problem, top):
        if not problem and not np.isfinite(p).all():
            problem = "The network's answer is not a number: its weights are broken."
        if problem:
            return Prediction(image, (), problem)
        best = np.argsort(-p, kind="stable")[:top]
        return Prediction(
            image, tuple(Guess(self.class_names[i], int(i), float(p[i])) for i in best)
        )


def _as_list(images) -> list:
    """Return images as a list. One path, file's bytes, Pillow's image or array (H, W, 3) is a list of one."""
    one = isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "convert")
    return [images] if one or getattr(images, "ndim", 4) < 4 else list(images)


def suitable_batch(spec, image_size: int) -> int:
    """Return how many images at a time suit the device: a power of two that its memory holds."""
    from effnet_repro.training.device import has_jax_gpu
    from effnet_repro.training.memory import found_gib

    gpu = has_jax_gpu()
    found = (memory_of_gpu() or 0) / 2**30 if gpu else found_gib()
    memory = found or (GPU_GIB if gpu else CPU_GIB)
    needed = 4 * count(spec, image_size).activations / 2**30  # of an image, were all of them kept
    fitting = max(1, int(SHARE * memory / needed))
    return min(MOST_ON_GPU if gpu else MOST_ON_CPU, 2 ** (fitting.bit_length() - 1))


def predict(
    source,  # A run folder, a checkpoint, or a file of another program: see `convert.read`
    images,  # A path of a file or folder, an array (H, W, 3) uint8, Pillow's image, or several of them
    *,
    top: int = 5,  # Guesses for each image
    batch: Optional[int] = None,  # Images at a time; None = what suits the device
    **options,  # Of `Predictor`: image_size, precision, backend, weights, class_names, arch
) -> List[Prediction]:  # One for each image, in order; of a folder, every image in it or below
    "Name what images show. For several lists keep a `Predictor`"
    listed = []
    for image in _as_list(images):
        is_path = isinstance(image, (str, os.PathLike))
        listed += find_images([image]) if is_path else [image]
    return list(Predictor(source, **options)(listed, top, batch))
