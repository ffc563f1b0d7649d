"""Decoded rectangles of images, one flat batch after the other: what is sent to a GPU that resizes by itself.

Resizing in NumPy takes as long as decoding does. Where a GPU trains, the cores only decode and cut; `device` sends
the pixels of a batch in one piece and resizes all of them there.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Iterator, NamedTuple

import numpy as np

from effnet_repro.data.catalog import one_split
from effnet_repro.data.decode import decode_for, located
from effnet_repro.data.request import TrainRequest
from effnet_repro.data.team import Team, pays_processes
from effnet_repro.data.threads import core_count, made_ahead

# Images of a batch that a thread or a process decodes at a time, at most. Each piece costs a message and back, and
# draws that take as long for a few images: in small pieces packed pixels took three times as much of the cores.
PIECE = 32
_FEW = 8  # Where a batch has few images for each core
ROOM = 2**26  # Bytes of a piece, mostly; only what is used takes memory


class Rectangles(NamedTuple):
    """The pixels of a batch, in the order in which its pieces were done."""

    pixels: np.ndarray  # (P, 3) uint8, P a number of few values, so that few programs are compiled
    begin: np.ndarray  # First pixel of each image, (B,) int32
    sizes: np.ndarray  # Height and width of each, (B, 2)
    flips: np.ndarray  # (B,) bool
    labels: np.ndarray  # (B,) int32


@dataclass(frozen=True)
class RectanglesJob:
    """Decodes some training images and cuts out their rectangles, or leaves them whole, as in `team`."""

    request: TrainRequest

    def __call__(self, numbers: np.ndarray, places: np.ndarray):
        """Return the rectangles (H, W, 3), and the sizes, flips and labels of the images."""
        some, cut = self.request.read_images(numbers, places, raw=True), []
        for number, data, (top, left, height, width) in zip(some.numbers, some.data, some.crops):
            with located(self.request.dataset, "train", number):
                pixels = decode_for(self.request.dataset, data, self.request.image_resize)
            if self.request.random:
                pixels = pixels[top : top + height, left : left + width]
            cut.append(pixels)
        sizes = np.array([pixels.shape[:2] for pixels in cut], np.int32)
        return cut, (sizes, some.flips, some.labels)


def _rounded(count):
    "One of eight numbers between two powers of two, at least `count`"
    step = 2 ** max(int(count).bit_length() - 3, 0)
    return -(-int(count) // step) * step


class _Flat:
    "The pixels of a batch as its pieces come, one behind the other: each is copied once"

    def __init__(self, room):
        self.pixels, self.used, self.late = np.empty((room, 3), np.uint8), 0, []
        self._lock = threading.Lock()

    def place(self, pixels):
        "Copy the pixels of a piece to the next free place, and return it"
        with self._lock:
            at, end = self.used, self.used + len(pixels)
            self.used = end
        if end > len(self.pixels):
            self.late.append((at, pixels.copy()))
        else:
            self.pixels[at:end] = pixels
        return at

    def finish(self):
        "All pixels, filled up so that few programs are compiled"
        count = _rounded(self.used)
        if self.late:
            there, self.pixels = self.pixels, np.empty((count, 3), np.uint8)
            end = min(at for at, _ in self.late)
            self.pixels[:end] = there[:end]
            for at, pixels in self.late:
                self.pixels[at : at + len(pixels)] = pixels
        return self.pixels[:count]


def _assembled(flat, pieces):
    "The batch that pieces make"
    at, rest = zip(*(one.result() for one in pieces))
    sizes, flips, labels = map(np.concatenate, zip(*rest))
    counts = [size.prod(1) for size, _, _ in rest]
    begin = np.concatenate([a + np.cumsum(n) - n for a, n in zip(at, counts)])
    return Rectangles(flat.finish(), begin.astype(np.int32), sizes, flips, labels)


def rectangle_batches(request: TrainRequest) -> Iterator[Rectangles]:
    """Yield the rectangles of one training step after the other, without end, two steps ahead."""
    local = request.order.local
    job = RectanglesJob(replace(request, dataset=one_split(request.dataset, "train")))
    room = ROOM if pays_processes(request.dataset.train_count) else None
    size = min(PIECE, max(_FEW, local // core_count()))
    begins = range(0, local, size)
    most = 0  # pixels of a batch, so far
    with Team(job, room) as team, ThreadPoolExecutor(1) as assembler:

        def begin(update):
            flat = _Flat(_rounded(1.1 * most))
            taken = (request.take(update, at, min(at + size, local)) for at in begins)
            pieces = [team.submit(piece, flat.place) for piece in taken]
            return assembler.submit(_assembled, flat, pieces)

        for batch in made_ahead(begin, itertools.count(request.first_update)):
            done = batch.result()
            most = max(most, int(done.sizes.prod(1).sum()))
            yield done
