"""Decoded rectangles of images, one flat batch after the other: what is sent to a GPU that resizes by itself.

Resizing in NumPy takes as long as decoding does. Where a GPU trains, the cores only decode and cut; `device` sends
the pixels of a batch in one piece and resizes all of them there.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Iterator, NamedTuple

import numpy as np

from effnet_repro.data.catalog import one_split
from effnet_repro.data.decode import decode_for, located
from effnet_repro.data.request import TrainRequest
from effnet_repro.data.team import Team, pays_processes
from effnet_repro.data.threads import made_ahead

PIECE = 8  # Images of a batch that a thread or a process decodes at a time
_ROOM = 2**24  # Bytes of a piece, mostly; only what is used takes memory


class Rectangles(NamedTuple):
    """The pixels of a batch, one image after the other."""

    pixels: np.ndarray  # (P, 3) uint8, P a number of few values, so that few programs are compiled
    sizes: np.ndarray  # Height and width of each, (B, 2)
    flips: np.ndarray  # (B,) bool
    labels: np.ndarray  # (B,) int32


@dataclass(frozen=True)
class RectanglesJob:
    """Decodes some training images and cuts out their rectangles, or leaves them whole, as in `team`."""

    request: TrainRequest

    def __call__(self, numbers: np.ndarray, places: np.ndarray):
        """Return all pixels (P, 3), and the sizes, flips and labels of the images."""
        some, cut = self.request.read_images(numbers, places, raw=True), []
        for number, data, (top, left, height, width) in zip(some.numbers, some.data, some.crops):
            with located(self.request.dataset, "train", number):
                pixels = decode_for(self.request.dataset, data, self.request.image_resize)
            if self.request.random:
                pixels = pixels[top : top + height, left : left + width]
            cut.append(pixels)
        sizes = np.array([pixels.shape[:2] for pixels in cut], np.int32)
        flat = np.concatenate([pixels.reshape(-1, 3) for pixels in cut])
        return flat, (sizes, some.flips, some.labels)


def _assembled(pieces):
    "The batch that pieces make, filled up to one of eight sizes between two powers of two"
    flat, rest = zip(*(one.result() for one in pieces))
    count = sum(map(len, flat))
    step = 2 ** max(count.bit_length() - 3, 0)
    pixels = np.empty((-(-count // step) * step, 3), np.uint8)
    np.concatenate(flat, out=pixels[:count])
    return Rectangles(pixels, *map(np.concatenate, zip(*rest)))


def rectangle_batches(request: TrainRequest) -> Iterator[Rectangles]:
    """Yield the rectangles of one update after the other, without end, two updates ahead."""
    local = request.order.local
    job = RectanglesJob(replace(request, dataset=one_split(request.dataset, "train")))
    room = _ROOM if pays_processes(request.dataset.train_count) else None
    begins = range(0, local, PIECE)
    with Team(job, room) as team, ThreadPoolExecutor(1) as assembler:

        def begin(update):
            taken = (request.take(update, at, min(at + PIECE, local)) for at in begins)
            return assembler.submit(_assembled, [team.submit(piece) for piece in taken])

        for batch in made_ahead(begin, itertools.count(request.first_update)):
            yield batch.result()
