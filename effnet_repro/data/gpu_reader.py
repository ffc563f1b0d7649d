"""The readers of an NVIDIA GPU: it cuts and resizes all images; its decoders make their pixels, or the cores, or both.

Order, crops, flips and labels are those of the other readers. What nvImageCodec does not decode (images that are no
JPEGs, rare JPEGs) is decoded on the host and sent; what the host cannot decode either is damaged, and is named.

Where the GPU has decoding hardware, whose pixels are those of the cores' decoder exactly, both make training images:
whichever is free takes the next chunk of a batch, the cores first, since the GPU has its own work. Whether that is
faster than the GPU's decoders alone depends on network and host: it is tried (`_Trial`). The cores alone (`Cores`) make
raw pixels, and JPEGs where the user chose a decoder of the cores.

The threads here wait for the GPU and for processes most of the time. Everything that takes Python's time for each image
happens in processes: threads that read were slower, most likely because only one of them at a time runs Python.
"""

import collections
import contextlib
import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
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
CHUNK = 192  # Images of a batch that the cores take at a time, where a GPU's decoders may take them, too
AT_ONCE = 768  # Most images that a producer decodes at a time: they all lie in the GPU's memory
FEEDERS = 4  # Threads that let the cores make images beside a GPU's decoders: one's pieces wait for the others'
READERS = 4  # Processes that read for the GPU's decoders
BUSY = 4  # Cores' worth of work around these: they read, this process, and what nvJPEG does on the host
AHEAD = 7  # Batches that are being made while one is used
SPARE = 3  # Arrays that are begun ahead of their batches: each is ready when the steps before it are done
TRIALS = "decoding_trials"  # In `DataSet.kept`: what `_Trial` found for each GPU
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

    def make(self, numbers: np.ndarray, places: np.ndarray, stage: Any):
        """Make images of these numbers and places, (n,) each; return where a stage has them, their cuts and labels."""
        stage.begin(self._most)
        size = min(PIECE, max(_FEW, len(numbers) // self._count))
        parts = np.array_split(np.arange(len(numbers)), -(-len(numbers) // size))
        pieces = [self._team.submit((numbers[p], places[p]), stage.place) for p in parts]
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


class _Made:
    "A batch that is being made, chunk by chunk; its future gives the array and the labels"

    def __init__(self, batch, out):
        self.batch, self.out, self.future = batch, out, Future()
        self.labels, self.left = np.zeros(len(batch.numbers), np.int32), len(batch.numbers)
        self.lock = threading.Lock()
        self.done(slice(0, 0))

    def done(self, part, labels=()):
        with self.lock:
            self.labels[part.start : part.start + len(labels)] = labels
            self.left -= part.stop - part.start
            if not self.left and not self.future.done():
                self.future.set_result((self.out, self.labels))

    def fail(self, error):
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)


class _Chunks:
    "Chunks of batches that nobody makes yet; those who make them take the oldest"

    def __init__(self, size):
        self.size, self.waiting, self.open = size, collections.deque(), True
        self.idle, self.changed = 0, threading.Condition()  # feeders that wait
        self.feeds = True  # Whether feeders take any

    def put(self, made):
        n = len(made.batch.numbers)
        with self.changed:
            begins = range(0, n, self.size)
            self.waiting.extend((made, slice(a, min(a + self.size, n))) for a in begins)
            self.changed.notify_all()

    def take(self, most, feeds):
        "The oldest chunk, with those behind it up to `most` images of its batch; None at the end"
        with self.changed:
            self.idle += feeds
            first = lambda: self.idle if self.feeds else 0  # the cores go first
            left = lambda: self.feeds if feeds and self.waiting else len(self.waiting) > first()
            self.changed.wait_for(lambda: left() or not self.open)
            self.idle -= feeds
            if not self.open:
                return None
            made, part = self.waiting.popleft()
            while left() and self.waiting[0][0] is made:
                if self.waiting[0][1].stop - part.start > most:
                    break
                part = slice(part.start, self.waiting.popleft()[1].stop)
            self.changed.notify_all()
            return made, part

    def let_feed(self, feeds):
        "Whether feeders take chunks from now on"
        with self.changed:
            self.feeds = feeds
            self.changed.notify_all()

    def close(self):
        with self.changed:
            self.open = False
            self.changed.notify_all()


class _Trial:
    """Whether steps come faster when the cores help the GPU's decoders: tried over the first steps of a run.

    `step` is called at each step, with its time, and tells whether the cores are to help from then on. `outcome` is
    what was found, once it is known: milliseconds of a step with and without them, and whether they help.
    """

    SPAN, SKIP = (
        40,
        10,
    )  # Steps with and as many without; the first ones of each show what was made before

    def __init__(self):
        self.times, self.found, self.outcome = [], [], None

    def step(self, now):
        if len(self.found) < 2:
            self.times.append(now)
            if len(self.times) == self.SPAN:
                each = np.sort(np.diff(self.times[self.SKIP :]))[:-2]  # without an end of an epoch
                self.found.append(each.mean())
                self.times = []
        if len(self.found) < 2:
            return not self.found
        if self.outcome is None:
            helped, alone = self.found
            helps = bool(helped < 1.03 * alone)  # else the GPU's time is worth more
            ms = [round(1e3 * float(seconds), 3) for seconds in self.found]
            self.outcome = {"cores_help": helps, "ms_with_cores": ms[0], "ms_without": ms[1]}
        return self.outcome["cores_help"]


def _core_count(producer, decodes, images, gpus):
    "How many processes make images for one GPU; beside its decoders only where these make the same pixels"
    count = core_count() // gpus
    if not decodes:
        return max(1, count + count // 8)  # some wait for this process
    count -= BUSY
    return count if count > 1 and producer.exact and pays_processes(images) else 0


class _Stream:
    "Makes the arrays of batches in threads, ahead of who takes them"

    def __init__(self, request, split, make, gpu=0, decodes=True):
        small = replace(request, dataset=one_split(request.dataset, split))
        self.request, self.split, self.make, self.gpu = small, split, make, gpu
        self.published = request.image_resize == "published"
        self.spare, self.cores, self.readers = collections.deque(), None, None
        with contextlib.ExitStack() as pools:
            self._open(pools, decodes)
            self.pools = pools.pop_all()

    def _open(self, pools, decodes):
        request, enter = self.request, pools.enter_context
        images, threads = len(request.dataset.splits[self.split].label), min(_THREADS, core_count())
        if self.split == "train":
            producer = kept(self.make.producer, self.gpu)
            count = _core_count(producer, decodes, images, len(request.gpus))
            keep(self.make.producer, self.gpu, producer)
            self.cores = enter(Cores(request, count)) if count else None
        if decodes:
            space, count = (ROOM, READERS) if pays_processes(images) else (None, threads)
            self.readers = enter(Team(ReadJob(request, self.split), space, count))
        self.rescuing = enter(ThreadPoolExecutor(threads))
        self.chunks = _Chunks(min(CHUNK, AT_ONCE) if decodes else 2**31)
        makes = [self._decode] * PRODUCERS if decodes else []
        if self.cores:
            makes += [self._feed] * (FEEDERS if decodes else PRODUCERS)
        working = enter(ThreadPoolExecutor(len(makes)))
        pools.callback(self.chunks.close)
        for make in makes:
            working.submit(self._work, make)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pools.close()

    def begin(self, batch):
        "Hand out the work of a batch; the future gives its array and its labels"
        made = _Made(batch, self._empty(batch.shape))
        self.chunks.put(made)
        return made.future

    def _empty(self, shape):
        "An array of zeros that JAX was asked for some batches ago: it makes them in the order of its steps"
        while len(self.spare) <= SPARE:
            self.spare.append(self.make.empty(shape, self.gpu))
        out = self.spare.popleft()
        return out if tuple(out.shape) == tuple(shape) else self.make.empty(shape, self.gpu)

    def _work(self, make):
        "Make chunks until there are no more, with a producer of one's own"
        producer, feeds = None, make == self._feed
        while (
            taken := self.chunks.take(self.chunks.size if feeds else AT_ONCE, feeds)
        ) is not None:
            made, part = taken
            try:
                producer = producer or kept(self.make.producer, self.gpu)
                numbers, places = made.batch.numbers[part], made.batch.places[part]
                made.done(part, make(producer, made.out, part.start, numbers, places))
            except BaseException as error:
                producer = None  # what it was about to do is unknown
                made.fail(error)
        if producer is not None:
            keep(self.make.producer, self.gpu, producer)

    def _feed(self, producer, out, first, numbers, places):
        "Let the cores make images of `out` from image `first` on; their labels"
        stage = kept(self.make.stage, self.gpu)
        images, cuts, labels = self.cores.make(numbers, places, stage)
        producer.write(images, cuts.rows(), out, first, self.published, stage)
        keep(self.make.stage, self.gpu, stage)
        return labels

    def _decode(self, producer, out, first, numbers, places):
        "Let the GPU decode images of `out` from image `first` on; their labels"
        parts = np.array_split(np.arange(len(numbers)), -(-len(numbers) // SLICE))
        slices = [self.readers.submit((numbers[p], places[p]), np.array) for p in parts]
        read, cuts, labels = _Read.of(numbers, [one.result() for one in slices])
        images, sent = self._decoded(producer, read)
        producer.write(images, cuts.rows(), out, first, self.published, sent)
        if sent is not None:
            keep(self.make.stage, self.gpu, sent)
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


def training_stream(
    request: TrainRequest, make: Maker = ON_GPU
) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 on the GPU and labels (B,) int32 of one training step after the other.

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
        batches = map(batch, itertools.count(request.first_update))
        trial, known = _Trial() if decodes and stream.cores else None, request.dataset.kept
        for done in made_ahead(stream.begin, batches, AHEAD):
            if trial is not None:
                stream.chunks.let_feed(trial.step(time.perf_counter()))
                if trial.outcome:
                    known.setdefault(TRIALS, {})[f"GPU {request.gpus[index]}"] = trial.outcome
            yield done.result()


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
        made = made_ahead(stream.begin, map(batch, groups), AHEAD)
        for group, done in zip(groups, made):
            images, _ = done.result()
            if len(group) == 1:
                yield (images, *request.known(group[0]))
                continue
            for i, some in enumerate(group):
                yield (images[i * each : (i + 1) * each], *request.known(some))
