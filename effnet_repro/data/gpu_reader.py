"""The reader whose images are decoded on a GPU: threads read files, producers decode, cut and resize.

Order, crops, flips and labels are those of the other readers. What nvImageCodec does not decode (images that are no
JPEGs, rare JPEGs) is decoded on the host and sent; what the host cannot decode either is damaged, and is named.
"""

import itertools
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, NamedTuple, Tuple

import numpy as np

from effnet_repro.data.decode import decode_image, located, read_encoded, wants_fast_dct
from effnet_repro.data.gpu_decode import PRODUCERS, ROW, Producer
from effnet_repro.data.request import TrainRequest, ValidationRequest
from effnet_repro.data.threads import core_count, made_ahead
from effnet_repro.data.transforms import validation_window

SLICE = 64  # Images that a thread reads at a time
AT_ONCE = 512  # Most images that a producer decodes at a time: they all lie in the GPU's memory
_READERS = 8  # Threads, at most: while one reads, others wait for the disk


class _Cuts(NamedTuple):
    "What is done to images: rectangles, their new sizes, where the square begins, who is mirrored"

    parts: np.ndarray  # (n, 4)
    new: np.ndarray  # (n, 2)
    corner: np.ndarray  # (n, 2)
    flips: np.ndarray  # (n,) bool

    def rows(self) -> np.ndarray:
        "The kernel's table, without addresses"
        rows = np.zeros(len(self.parts), ROW)
        for name, column in zip(("top", "left", "height", "width"), self.parts.T):
            rows[name] = column
        rows["flip"], rows["corner"] = self.flips, self.corner
        rows["scale"] = (self.parts[:, 2:] / self.new).astype("float32")
        return rows


def _central(sizes, request):
    "The cuts of validation: the central square of whole images"
    windows = [validation_window(*s, request.image_size, request.image_resize) for s in sizes]
    new, corner = np.array(windows).swapaxes(0, 1)
    return _Cuts(np.concatenate([0 * sizes, sizes], 1), new, corner, np.zeros(len(sizes), bool))


def _read(dataset, split, numbers):
    "JPEGs as bytes, anything else as pixels; and the sizes (n, 2)"
    found, sizes = [], []
    for number in numbers:
        data, size = read_encoded(dataset, split, number, raw=True)
        if isinstance(data, bytes) and (data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9") < 0):
            with located(dataset, split, number):
                data = decode_image(data)
        found.append(data)
        sizes.append(size)
    return found, np.array(sizes)


def _on_gpu(producer, pool, where, found, sizes):
    """The images of a producer for what `_read` found; what it refuses, `pool` decodes on the host.

    `where` is the data set, the split and the numbers of the images.
    """
    dataset, split, numbers = where
    jpegs = [i for i, one in enumerate(found) if isinstance(one, bytes)]
    images = dict(zip(jpegs, producer.decode([found[i] for i in jpegs])) if jpegs else ())

    def on_host(i):
        with located(dataset, split, numbers[i]):
            return decode_image(found[i])

    fine = lambda i: images[i] is not None and tuple(images[i].size) == tuple(sizes[i])
    refused = [i for i in jpegs if not fine(i)]
    pixels = {i: one for i, one in enumerate(found) if not isinstance(one, bytes)}
    pixels.update(zip(refused, pool.map(on_host, refused)))
    images.update((i, producer.upload(one)) for i, one in pixels.items())
    return [images[i] for i in range(len(found))]


class _Batch(NamedTuple):
    "What is asked of a producer"

    split: str
    numbers: np.ndarray  # Images, (n,)
    shape: tuple  # Of the array; images beyond n stay black
    cuts: Callable  # From sizes (n, 2) to `_Cuts` and what else the consumer gets


def _made(request, batches, make: Callable[[], Any]) -> Iterator[Tuple[Any, Any]]:
    "Yield the arrays of batches, and what else their `cuts` return, made ahead"
    dataset, published = request.dataset, request.image_resize == "published"
    producers = queue.SimpleQueue()
    for _ in range(PRODUCERS):
        producers.put(None)  # begun by the first batch that needs it

    def produce(batch, slices):
        producer = producers.get()
        try:
            producer = producer or make()
            out = producer.empty(batch.shape)
            read = [one.result() for one in slices]
            found = [data for part, _ in read for data in part]
            sizes = np.concatenate([part for _, part in read])
            cuts, rest = batch.cuts(sizes)
            rows = cuts.rows()
            for at in range(0, len(found), AT_ONCE):
                part = slice(at, at + AT_ONCE)
                where = dataset, batch.split, batch.numbers[part]
                images = _on_gpu(producer, readers, where, found[part], sizes[part])
                producer.write(images, rows[part], out, at, published)
            return out, rest
        finally:
            producers.put(producer)

    with ThreadPoolExecutor(PRODUCERS) as pool, ThreadPoolExecutor(
        min(_READERS, core_count())
    ) as readers:

        def begin(batch):
            parts = np.array_split(batch.numbers, -(-len(batch.numbers) // SLICE))
            slices = [readers.submit(_read, dataset, batch.split, part) for part in parts]
            return pool.submit(produce, batch, slices)

        for done in made_ahead(begin, batches, PRODUCERS + 1):
            yield done.result()


def training_stream(request: TrainRequest, make=Producer) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 on the GPU and labels (B,) int32 of one update after the other.

    `make` makes a producer; tests give one without a GPU.
    """
    wants_fast_dct(request.dataset, request.image_resize)
    size, local = request.image_size, request.order.local

    def batch(update):
        begins = range(0, local, SLICE)
        taken = [request.take(update, at, min(at + SLICE, local)) for at in begins]
        numbers, places = (np.concatenate(column) for column in zip(*taken))

        def cuts(sizes):
            parts, flips, labels = request.draw(numbers, places, sizes)
            if not request.random:
                return _central(sizes, request), labels
            new, corner = np.full((len(parts), 2), size), np.zeros((len(parts), 2))
            return _Cuts(parts, new, corner, flips), labels

        return _Batch("train", numbers, (local, size, size, 3), cuts)

    return _made(request, map(batch, itertools.count(request.first_update)), make)


def validation_stream(request: ValidationRequest, make=Producer):
    """Yield images (B, S, S, 3) uint8 on the GPU, labels (B,) int32 and mask (B,) float32; fillers are black.

    Small batches are made together and taken apart.
    """
    wants_fast_dct(request.dataset, request.image_resize)
    ids, size, each = request.ids, request.image_size, request.batch
    together = max(1, AT_ONCE // each)
    groups = [ids[at : at + together] for at in range(0, len(ids), together)]

    def batch(group):
        real = group.reshape(-1)
        real = real[real >= 0]  # fillers come last
        cuts = lambda sizes: (_central(sizes, request), None)
        return _Batch("validation", real, (group.size, size, size, 3), cuts)

    made = _made(request, map(batch, groups), make)
    for group, (images, _) in zip(groups, made):
        for i, some in enumerate(group):
            yield (images[i * each : (i + 1) * each], *request.known(some))
