"""The readers of an NVIDIA GPU: it cuts and resizes all images; its decoders make their pixels, or the cores, or both.

Order, crops, flips and labels are those of the other readers. What nvImageCodec does not decode (images that are no
JPEGs, rare JPEGs) is decoded on the host and sent; what the host cannot decode either is damaged, and is named.

Where the GPU has decoding hardware, whose pixels are those of the cores' decoder exactly, both share each batch of
training (`_Share`). Raw pixels, and JPEGs for whose decoder the user asked so, are all made by the cores (`Cores`).

Producers are threads that wait for the GPU most of the time. All else that takes Python's time for every image happens
in other processes: with reading in threads a reader came to 9,600 images/s, most likely for the one interpreter lock.
"""

import collections
import contextlib
import itertools
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, NamedTuple, Tuple, Union

import numpy as np

from effnet_repro.data.catalog import one_split
from effnet_repro.data.decode import (
    decode_image,
    has_jpegs,
    is_whole_jpeg,
    located,
    read_image,
    wants_fast_dct,
)
from effnet_repro.data.device import whole_images
from effnet_repro.data.gpu_decode import PRODUCERS, ROW, Producer, Stage, empty, keep, kept
from effnet_repro.data.rectangles import PIECE, ROOM, RectanglesJob
from effnet_repro.data.request import TrainRequest, ValidationRequest
from effnet_repro.data.team import Team, pays_processes
from effnet_repro.data.threads import core_count, made_ahead
from effnet_repro.data.transforms import center_crop_box

SLICE = 64  # Images that are read at a time
AT_ONCE = 768  # Most images that a producer decodes at a time: they all lie in the GPU's memory
READERS = 3  # Processes that read
BUSY = 3  # Cores' worth of work around the GPU's decoders: this process, and what nvJPEG does on the host
SPARE = 3  # Arrays that are begun ahead of their batches: each is ready when the steps before it are done
_FEW = 8  # Images of a piece that the cores make, at least
_THREADS = 8  # The same as threads, where processes do not pay


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
    windows = [center_crop_box(*s, request.image_size, request.image_resize) for s in sizes]
    new, corner = np.array(windows).swapaxes(0, 1)
    return _Cuts(whole_images(sizes), new, corner, np.zeros(len(sizes), bool))


def _squares(parts, flips, side):
    "The cuts of training: a rectangle of each image becomes the square"
    new, corner = np.full((len(parts), 2), side), np.zeros((len(parts), 2))
    return _Cuts(parts, new, corner, flips)


def _read(dataset, split, numbers, upright):
    "JPEGs as bytes, anything else as pixels; the sizes (n, 2); the orientations of the files"
    found, sizes, turns = [], [], []
    for number in numbers:
        data, size, turn = read_image(dataset, split, number, True, upright)
        if isinstance(data, bytes) and not is_whole_jpeg(data):
            with located(dataset, split, number):
                data = decode_image(data)
        found.append(data)
        sizes.append(size)
        turns.append(turn)
    return found, np.array(sizes), turns


@dataclass(frozen=True)
class ReadJob:
    """Reads some images, JPEGs as they are, and draws what is done to them, as in `team`."""

    request: Union[TrainRequest, ValidationRequest]
    split: str

    def __call__(self, numbers: np.ndarray, places: np.ndarray):
        """Return the bytes of all, one behind the other; and lengths, which are JPEGs, sizes, cuts and labels."""
        request = self.request
        found, sizes, turns = _read(request.dataset, self.split, numbers, request.upright)
        labels = np.zeros(0, np.int32)
        if self.split == "train":
            parts, flips, labels = request.draw(numbers, places, sizes, turns)
        if self.split == "train" and request.random:
            cuts = _squares(parts, flips, request.image_size)
        else:
            cuts = _central(sizes, request)
        jpegs = [isinstance(data, bytes) for data in found]
        parts = [np.frombuffer(d, np.uint8) if j else d.reshape(-1) for d, j in zip(found, jpegs)]
        lengths = [part.size for part in parts]
        return np.concatenate(parts), (lengths, jpegs, sizes, tuple(cuts), labels)


class _Read(NamedTuple):
    "Images of a batch that are to be decoded on the GPU"

    numbers: np.ndarray  # (n,)
    data: list  # A JPEG as an array of bytes, or pixels (H, W, 3)
    jpegs: list  # Which are JPEGs
    sizes: np.ndarray  # (n, 2)

    @classmethod
    def of(cls, numbers, results):
        "From what `ReadJob` returned, piece by piece; and the cuts and labels of all"
        found, every, columns = [], [], []
        for flat, (lengths, jpegs, sizes, cuts, labels) in results:
            some = np.split(flat, np.cumsum(lengths)[:-1])
            found += [one if j else one.reshape(*s, 3) for one, j, s in zip(some, jpegs, sizes)]
            every += jpegs
            columns.append((sizes, labels, *cuts))
        sizes, labels, *cuts = (np.concatenate(column) for column in zip(*columns))
        return cls(numbers, found, every, sizes), _Cuts(*cuts), labels

    def part(self, at):
        return _Read(*(column[at] for column in self))


class Maker(NamedTuple):
    """What makes images on a GPU, given its number: producers and stages, which are kept, and arrays to write into."""

    producer: Callable[[int], Any] = Producer
    stage: Callable[[int], Any] = Stage
    empty: Callable[[tuple, int], Any] = empty


ON_GPU = Maker()


class _Batch(NamedTuple):
    "What is asked for"

    numbers: np.ndarray  # Images, (n,)
    places: np.ndarray  # In the run, (n,)
    shape: tuple  # Of the array; images beyond n stay black


class Cores:
    """Processes that make the rectangles of training images for one GPU; use it in a `with` statement.

    A piece of a batch is copied once, from the memory of its process to the stage of the batch, which sends all.
    """

    def __init__(self, request: TrainRequest, count: int):
        self._request, self._count, self._most = request, count, 0  # bytes of a batch, so far
        room = ROOM if pays_processes(request.dataset.train_count) else None
        self._team = Team(RectanglesJob(request), room, count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._team.close()

    def begin(self, numbers: np.ndarray, places: np.ndarray, stage: Any) -> list:
        """Begin images of these numbers and places, (n,) each; futures of pieces, which are placed on `stage`."""
        stage.begin(self._most)
        size = min(PIECE, max(_FEW, len(numbers) // self._count))
        parts = np.array_split(np.arange(len(numbers)), -(-len(numbers) // size))
        return [self._team.submit((numbers[p], places[p]), stage.place) for p in parts]

    def finish(self, pieces: list, stage: Any):
        """Wait for pieces; return their images on the GPU, the cuts of these, and their labels."""
        at, rest = zip(*(one.result() for one in pieces))
        sizes, flips, labels = map(np.concatenate, zip(*rest))
        lengths = [3 * some.prod(1, dtype=np.int64) for some, *_ in rest]
        self._most = max(self._most, sum(int(some.sum()) for some in lengths))
        begins = np.concatenate([a + np.cumsum(n) - n for a, n in zip(at, lengths)])
        if self._request.random:
            cuts = _squares(whole_images(sizes), flips, self._request.image_size)
        else:
            cuts = _central(sizes, self._request)
        return stage.images(begins, sizes), cuts, labels


class _Share:
    """How many images of a batch the cores make; the GPU's decoders make the others.

    Where a step had to wait and the cores were the last to be done, they get fewer; otherwise they get more, little by
    little, since the GPU has its own work. The images are the same, whatever their number.
    """

    def __init__(self, batch, decodes, cores):
        self._least, self._most = 0 if decodes else batch, batch if cores else 0
        self.now = max(self._least, self._most // 4)
        self._step = max(1, batch // 24)

    def learn(self, waited, late):
        step = -self._step if waited and late else max(1, self._step // (8 if late else 4))
        self.now = min(max(self.now + step, self._least), self._most)


def _core_count(producer, decodes, images, gpus):
    "How many processes make images for one GPU; beside its decoders only where these make the same pixels"
    count = core_count() // gpus
    if not decodes:
        return max(1, count + count // 8)  # some wait for this process
    count -= READERS + BUSY
    return count if count > 1 and producer.exact and pays_processes(images) else 0


class _Stream:
    "Makes the arrays of batches in threads, ahead of who takes them"

    def __init__(self, request, split, make, gpu=0, decodes=True):
        small = replace(request, dataset=one_split(request.dataset, split))
        self.request, self.split, self.make, self.gpu = small, split, make, gpu
        self.published = request.image_resize == "published"
        self.producers, self.spare = queue.SimpleQueue(), collections.deque()
        first = kept(make.producer, gpu)
        for one in (first, *[None] * (PRODUCERS - 1)):  # made when they are needed
            self.producers.put(one)
        self.pools = contextlib.ExitStack()
        self.pools.callback(self._keep)
        try:
            self._open(first, decodes)
        except BaseException:
            self.pools.close()
            raise

    def _open(self, producer, decodes):
        request, enter = self.request, self.pools.enter_context
        images, self.cores, self.readers = len(request.dataset.splits[self.split].label), None, None
        if self.split == "train":
            if count := _core_count(producer, decodes, images, len(request.gpus)):
                self.cores = enter(Cores(request, count))
        if decodes:
            pays = pays_processes(images)
            space, count = (ROOM, READERS) if pays else (None, min(_THREADS, core_count()))
            self.readers = enter(Team(ReadJob(request, self.split), space, count))
        pool = lambda count: enter(ThreadPoolExecutor(count))
        self.producing, self.rescuing = pool(PRODUCERS), pool(min(_THREADS, core_count()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pools.close()

    def _keep(self):
        while not self.producers.empty():
            one = self.producers.get()
            if one is not None:
                keep(self.make.producer, self.gpu, one)

    def begin(self, batch, first=0):
        """Hand out the work of a batch, of which the cores make the images before `first`.

        The future gives its array, its labels, and whether the cores were the last.
        """
        numbers, places = batch.numbers, batch.places
        pieces, stage = [], None
        if first:
            stage = kept(self.make.stage, self.gpu)
            pieces = self.cores.begin(numbers[:first], places[:first], stage)
        numbers, places = numbers[first:], places[first:]
        parts = np.array_split(np.arange(len(numbers)), max(1, -(-len(numbers) // SLICE)))
        slices = [self.readers.submit((numbers[p], places[p]), np.array) for p in parts if len(p)]
        out = self._empty(batch.shape)
        return self.producing.submit(self._produce, out, (pieces, stage), (first, numbers, slices))

    def _empty(self, shape):
        "An array of zeros that JAX was asked for some batches ago: it makes them in the order of its steps"
        while len(self.spare) <= SPARE:
            self.spare.append(self.make.empty(shape, self.gpu))
        out = self.spare.popleft()
        return out if tuple(out.shape) == tuple(shape) else self.make.empty(shape, self.gpu)

    def _produce(self, out, by_cores, by_gpu):
        producer = self.producers.get()
        try:
            producer = producer or kept(self.make.producer, self.gpu)
            labels = self._decode(producer, out, *by_gpu)
            late, own = self._place(producer, out, *by_cores)
            return out, np.concatenate([own, labels]), late
        except BaseException:
            producer = None  # what it was about to do is unknown
            raise
        finally:
            self.producers.put(producer)

    def _place(self, producer, out, pieces, stage):
        "Write what the cores make into `out`; whether they were not done, and the labels"
        if not pieces:
            return False, np.zeros(0, np.int32)
        late = not all(one.done() for one in pieces)
        images, cuts, labels = self.cores.finish(pieces, stage)
        producer.write(images, cuts.rows(), out, 0, self.published, stage)
        self._give_back(stage)
        return late, labels

    def _decode(self, producer, out, first, numbers, slices):
        "Let the GPU decode images into `out` from image `first` on; their labels"
        if not slices:
            return np.zeros(0, np.int32)
        read, cuts, labels = _Read.of(numbers, [one.result() for one in slices])
        rows, count = cuts.rows(), len(numbers)
        for part in np.array_split(np.arange(count), -(-count // AT_ONCE)):
            part = slice(int(part[0]), int(part[-1]) + 1)
            images, sent = self._decoded(producer, read.part(part))
            producer.write(images, rows[part], out, first + part.start, self.published, sent)
            self._give_back(sent)
        return labels

    def _decoded(self, producer, read):
        "The images of a producer for what was read; and a stage with those that it refuses, or None"
        jpegs, sizes = np.flatnonzero(read.jpegs), read.sizes
        decoded = producer.decode([read.data[i] for i in jpegs]) if len(jpegs) else ()
        fine = lambda i, one: one is not None and tuple(one.size) == tuple(sizes[i])
        images = {i: one for i, one in zip(jpegs, decoded) if fine(i, one)}
        every = range(len(read.data))
        late = [i for i in every if i not in images]
        if not late:
            return [images[i] for i in every], None

        def on_host(i):
            if not read.jpegs[i]:
                return read.data[i]
            with located(self.request.dataset, self.split, read.numbers[i]):
                return decode_image(read.data[i].tobytes())

        stage = kept(self.make.stage, self.gpu)
        stage.begin(int(3 * sizes[late].prod(1).sum()))
        begins = [stage.place(pixels.reshape(-1, 3)) for pixels in self.rescuing.map(on_host, late)]
        images.update(zip(late, stage.images(begins, sizes[late])))
        return [images[i] for i in every], stage

    def _give_back(self, stage):
        if stage is not None:
            keep(self.make.stage, self.gpu, stage)


def training_stream(
    request: TrainRequest, make: Maker = ON_GPU
) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 on the GPU and labels (B,) int32 of one update after the other.

    With several GPUs the images are a list: each GPU has made its part of the batch, in their order. Tests give a
    `make` without a GPU.
    """
    return _parts(request, make, has_jpegs(request.dataset))


def cores_stream(request: TrainRequest, make: Maker = ON_GPU) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield what `training_stream` does, of images that the cores decode or read as pixels; the GPU resizes them."""
    return _parts(request, make, False)


def _parts(request, make, decodes):
    "The images of all GPUs of a request, and the labels"
    wants_fast_dct(request.dataset, request.image_resize)
    if len(request.gpus) == 1:
        yield from _part(request, make, decodes, 0)
        return
    with contextlib.ExitStack() as streams:
        parts = [_part(request, make, decodes, i) for i in range(len(request.gpus))]
        for one in parts:
            streams.callback(one.close)
        for some in zip(*parts):
            images, labels = zip(*some)
            yield list(images), np.concatenate(labels)


def _part(request, make, decodes, index):
    "The images that one of the request's GPUs makes of each step, and their labels"
    size, local, gpus = request.image_size, request.order.local, len(request.gpus)
    first, last = (local * i // gpus for i in (index, index + 1))

    def batch(update):
        begins = range(first, last, SLICE)
        taken = [request.take(update, at, min(at + SLICE, last)) for at in begins]
        numbers, places = (np.concatenate(column) for column in zip(*taken))
        return _Batch(numbers, places, (last - first, size, size, 3))

    with _Stream(request, "train", make, request.gpus[index], decodes) as stream:
        share = _Share(last - first, decodes, stream.cores)
        begin = lambda update: stream.begin(batch(update), share.now)
        for done in made_ahead(begin, itertools.count(request.first_update), PRODUCERS + 1):
            waited = not done.done()
            images, labels, late = done.result()
            share.learn(waited, late)
            yield images, labels


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
        return _Batch(real, real, (group.size, size, size, 3))

    with _Stream(request, "validation", make) as stream:
        made = made_ahead(stream.begin, map(batch, groups), PRODUCERS + 1)
        for group, done in zip(groups, made):
            images, *_ = done.result()
            if len(group) == 1:
                yield (images, *request.known(group[0]))
                continue
            for i, some in enumerate(group):
                yield (images[i * each : (i + 1) * each], *request.known(some))
