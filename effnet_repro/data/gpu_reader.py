"""The reader whose images are decoded on a GPU: threads read files, producers decode, cut and resize.

Order, crops, flips and labels are those of the other readers. What nvImageCodec does not decode (images that are no
JPEGs, rare JPEGs) is decoded on the host and sent; what the host cannot decode either is damaged, and is named. Where
the GPU's pixels are those of the host exactly, the cores decode a share of all JPEGs, too (`Balance`).
"""

import itertools
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, NamedTuple, Tuple

import numpy as np

from effnet_repro.data.decode import decode_image, located, read_image, wants_fast_dct
from effnet_repro.data.gpu_decode import PRODUCERS, ROW, Producer, empty
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


def _read(dataset, split, numbers, upright):
    "JPEGs as bytes, anything else as pixels; the sizes (n, 2); the orientations of the files"
    found, sizes, turns = [], [], []
    for number in numbers:
        data, size, turn = read_image(dataset, split, number, True, upright)
        if isinstance(data, bytes) and (data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9") < 0):
            with located(dataset, split, number):
                data = decode_image(data)
        found.append(data)
        sizes.append(size)
        turns.append(turn)
    return found, np.array(sizes), turns


class Balance:
    """Which share of the JPEGs the cores decode beside a GPU: as many as let both be done at the same time.

    The pixels are the same, so nothing depends on the share but the time.
    """

    step = 1 / 64

    def __init__(self, most: float = 0.5, share: float = 0.2):
        self.most, self.share = most, min(share, most)

    def count(self, images: int) -> int:
        """Return how many of so many images the cores decode."""
        return int(self.share * images)

    def learn(self, cores_wait: bool):
        """Take in whether the cores were done first."""
        change = self.step if cores_wait else -self.step
        self.share = min(max(self.share + change, 0.0), self.most)


def _images(producer, cores, balance, where, found, sizes):
    """The images of a producer for what `_read` found; `cores` decode a share, and what the producer refuses.

    `where` is the data set, the split and the numbers of the images.
    """
    dataset, split, numbers = where

    def on_host(i, out):
        with located(dataset, split, numbers[i]):
            out[...] = decode_image(found[i]) if isinstance(found[i], bytes) else found[i]

    def begin(some):
        arrays, images = producer.stage(sizes[some])
        return dict(zip(some, images)), [cores.submit(on_host, *one) for one in zip(some, arrays)]

    jpegs = [i for i, one in enumerate(found) if isinstance(one, bytes)]
    shared = jpegs[: balance.count(len(jpegs))] if producer.exact else []
    others = [i for i, one in enumerate(found) if not isinstance(one, bytes)]
    images, begun = begin(shared + others)
    mine = jpegs[len(shared) :]
    decoded = producer.decode([found[i] for i in mine]) if mine else ()
    if mine and producer.exact:
        balance.learn(all(one.done() for one in begun))
    fine = lambda i, one: one is not None and tuple(one.size) == tuple(sizes[i])
    images.update((i, one) for i, one in zip(mine, decoded) if fine(i, one))
    more, late = begin([i for i in mine if i not in images])
    images.update(more)
    for one in begun + late:
        one.result()
    return [images[i] for i in range(len(found))]


class _Batch(NamedTuple):
    "What is asked of a producer"

    split: str
    numbers: np.ndarray  # Images, (n,)
    shape: tuple  # Of the array; images beyond n stay black
    cuts: Callable  # From sizes (n, 2) and orientations to `_Cuts` and what else the consumer gets


class Maker(NamedTuple):
    """What makes images: producers, which are kept for the next stream, and the arrays that they write into."""

    producer: Callable[[], Any] = Producer
    empty: Callable[[tuple], Any] = empty


ON_GPU = Maker()
_KEPT = {}  # Producers that no stream uses, by what made them


def _made(request, batches, make: Maker) -> Iterator[Tuple[Any, Any]]:
    "Yield the arrays of batches, and what else their `cuts` return, made ahead"
    dataset, published = request.dataset, request.image_resize == "published"
    kept, producers, balance = _KEPT.setdefault(make.producer, []), queue.SimpleQueue(), Balance()
    for _ in range(PRODUCERS):
        producers.put(None)  # taken or begun by the first batch that needs it

    def produce(batch, out, slices):
        producer = producers.get()
        try:
            if producer is None:
                producer = kept.pop() if kept else make.producer()
            read = [one.result() for one in slices]
            found, sizes, turns = ([x for part in read for x in part[k]] for k in range(3))
            sizes = np.array(sizes)
            cuts, rest = batch.cuts(sizes, turns)
            rows = cuts.rows()
            for part in np.array_split(np.arange(len(found)), -(-len(found) // AT_ONCE)):
                part = slice(int(part[0]), int(part[-1]) + 1)
                where = dataset, batch.split, batch.numbers[part]
                images = _images(producer, cores, balance, where, found[part], sizes[part])
                producer.write(images, rows[part], out, part.start, published)
            return out, rest
        except BaseException:
            producer = None  # the cores may still write into its memory
            raise
        finally:
            producers.put(producer)

    with ThreadPoolExecutor(PRODUCERS) as pool, ThreadPoolExecutor(
        min(_READERS, core_count())
    ) as readers, ThreadPoolExecutor(max(1, core_count() - PRODUCERS - 1)) as cores:

        def begin(batch):
            parts = np.array_split(batch.numbers, -(-len(batch.numbers) // SLICE))
            how = dataset, batch.split
            slices = [readers.submit(_read, *how, part, request.upright) for part in parts]
            return pool.submit(produce, batch, make.empty(batch.shape), slices)

        try:
            for done in made_ahead(begin, batches, PRODUCERS + 1):
                yield done.result()
        finally:
            pool.shutdown()
            while not producers.empty():
                kept.append(producers.get())
            kept[:] = [one for one in kept if one is not None]


def training_stream(
    request: TrainRequest, make: Maker = ON_GPU
) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 on the GPU and labels (B,) int32 of one update after the other.

    Tests give a `make` without a GPU.
    """
    wants_fast_dct(request.dataset, request.image_resize)
    size, local = request.image_size, request.order.local

    def batch(update):
        begins = range(0, local, SLICE)
        taken = [request.take(update, at, min(at + SLICE, local)) for at in begins]
        numbers, places = (np.concatenate(column) for column in zip(*taken))

        def cuts(sizes, turns):
            parts, flips, labels = request.draw(numbers, places, sizes, turns)
            if not request.random:
                return _central(sizes, request), labels
            new, corner = np.full((len(parts), 2), size), np.zeros((len(parts), 2))
            return _Cuts(parts, new, corner, flips), labels

        return _Batch("train", numbers, (local, size, size, 3), cuts)

    return _made(request, map(batch, itertools.count(request.first_update)), make)


def validation_stream(request: ValidationRequest, make: Maker = ON_GPU):
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
        cuts = lambda sizes, turns: (_central(sizes, request), None)
        return _Batch("validation", real, (group.size, size, size, 3), cuts)

    made = _made(request, map(batch, groups), make)
    for group, (images, _) in zip(groups, made):
        for i, some in enumerate(group):
            yield (images[i * each : (i + 1) * each], *request.known(some))
