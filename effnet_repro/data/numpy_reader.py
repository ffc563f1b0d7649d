"""The reader without TensorFlow: simplejpeg or Pillow decodes and NumPy resizes, on all cores.

A batch is made in pieces, by processes where that pays and by threads elsewhere (`team`), two batches ahead of the one
that is used. A batch does not depend on which core made a piece, or when.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Iterator, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data.catalog import DataSet, one_split
from effnet_repro.data.decode import decode_for, located, read_encoded, wants_fast_dct
from effnet_repro.data.request import TrainRequest, ValidationRequest, check_request
from effnet_repro.data.team import Team, into, pays_processes
from effnet_repro.data.threads import made_ahead
from effnet_repro.data.transforms import train_image, validation_image

PIECE = 8  # Images of a batch that a thread or a process makes at a time


@dataclass(frozen=True)
class TrainingJob:
    """Makes the squares of some training images, as in `team`."""

    request: TrainRequest

    def __call__(self, numbers: np.ndarray, places: np.ndarray):
        """Return images (n, S, S, 3) uint8 and labels (n,) int32."""
        some = self.request.read_images(numbers, places, raw=True)
        return np.stack([self._square(*one) for one in zip(*some[:4])]), some.labels

    def _square(self, number, data, crop, flip):
        request = self.request
        how = request.image_size, request.image_resize
        with located(request.dataset, "train", number):
            pixels = decode_for(request.dataset, data, request.image_resize)
        if not request.random:
            return validation_image(pixels, *how)
        top, left, height, width = crop
        return train_image(pixels[top : top + height, left : left + width], flip, *how)


@dataclass(frozen=True)
class ValidationJob:
    """Makes the central squares of some images of a split, as in `team`; those of numbers below 0 are black."""

    dataset: DataSet
    split: str
    image_size: int
    image_resize: str

    def __call__(self, numbers: np.ndarray):
        """Return images (n, S, S, 3) uint8 and None."""
        return np.stack([self._square(number) for number in numbers]), None

    def _square(self, number):
        if number < 0:
            return np.zeros((self.image_size, self.image_size, 3), np.uint8)
        upright = self.image_resize == "modern"
        encoded, _ = read_encoded(self.dataset, self.split, number, True, upright)
        with located(self.dataset, self.split, number):
            pixels = decode_for(self.dataset, encoded, self.image_resize)
        return validation_image(pixels, self.image_size, self.image_resize)


def _batches(job, numbers, pieces, image_size, count):
    """Yield images and the other results of one batch after the other, made ahead.

    `pieces(number)` lists the pieces of a batch: what the job takes, the first of it an array with an entry for each
    image. `count` is how many images there will be.
    """
    room = PIECE * image_size**2 * 3 if pays_processes(count) else None

    with Team(job, room) as team:

        def begin(number):
            parts = pieces(number)
            ends = np.cumsum([len(part[0]) for part in parts])
            images = np.empty((ends[-1], image_size, image_size, 3), np.uint8)
            done = [team.submit(p, into(images[e - len(p[0]) : e])) for p, e in zip(parts, ends)]
            return images, done

        for images, done in made_ahead(begin, numbers):
            yield images, [one.result()[1] for one in done]


def training_stream(request: TrainRequest) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 and labels (B,) int32 of one training step after the other, without end."""
    wants_fast_dct(request.dataset, request.image_resize)
    job = TrainingJob(replace(request, dataset=one_split(request.dataset, "train")))
    begins = range(0, request.order.local, PIECE)

    def pieces(update):
        ends = (min(begin + PIECE, request.order.local) for begin in begins)
        return [request.take(update, begin, end) for begin, end in zip(begins, ends)]

    updates = itertools.count(request.first_update)
    made = _batches(job, updates, pieces, request.image_size, request.dataset.train_count)
    return ((images, np.concatenate(labels)) for images, labels in made)


def validation_stream(
    request: ValidationRequest,
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8, labels (B,) int32 and mask (B,) float32; fillers are black."""
    wants_fast_dct(request.dataset, request.image_resize)
    size, ids = request.image_size, request.ids
    dataset = one_split(request.dataset, "validation")
    job = ValidationJob(dataset, "validation", size, request.image_resize)
    pieces = lambda i: [(ids[i][at : at + PIECE],) for at in range(0, request.batch, PIECE)]
    made = _batches(job, range(len(ids)), pieces, size, ids.size)
    return ((images, *request.known(some)) for some, (images, _) in zip(ids, made))


def load_arrays(
    dataset: DataSet,  # From `open_data`
    split: str,  # "train" or "validation"
    image_size: int,  # Side of the images, S, pixels
    image_resize: str = "published",  # Or "modern": see `resize`
) -> Tuple[np.ndarray, np.ndarray]:  # Images (n, S, S, 3) uint8 and labels (n,) int32
    """Decode a whole split into memory, with the validation crop"""
    check_request(dataset, image_size, image_resize)
    if split not in dataset.splits:
        raise unknown_name("split", split, dataset.splits)
    wants_fast_dct(dataset, image_resize)
    labels = dataset.splits[split].label
    if not len(labels):
        return np.empty((0, image_size, image_size, 3), np.uint8), labels
    job = ValidationJob(one_split(dataset, split), split, image_size, image_resize)
    parts = np.array_split(np.arange(len(labels)), -(-len(labels) // PIECE))
    whole = _batches(job, [0], lambda _: [(part,) for part in parts], image_size, len(labels))
    ((images, _),) = whole
    return images, labels
