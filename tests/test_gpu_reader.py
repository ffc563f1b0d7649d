"""The reader of a GPU, with a producer that decodes on the host and cuts with NumPy: the same images as the others."""

import collections
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from images import bmp, encode, record, smooth_image, write

from effnet_repro import data as d
from effnet_repro.data import decode, gpu_decode, gpu_reader, numpy_reader, readers, request


class HostProducer:
    "Does what a GPU does; refuses each fifth JPEG"

    refused = sent = 0
    exact = False

    def __init__(self, gpu):
        self.thread, self.gpu = None, gpu

    def _alone(self):
        assert self.thread in (None, threading.get_ident())  # no two threads at once

    def decode(self, data):
        self.thread = threading.get_ident()
        refuses = [len(one) % 5 == 0 for one in data]
        HostProducer.refused += sum(refuses)
        return [
            None if no else self._image(decode.decode_image(one.tobytes()))
            for no, one in zip(refuses, data)
        ]

    def _image(self, pixels):
        return gpu_decode.Image(0, pixels.shape[1] * 3, pixels.shape[:2], pixels)

    def write(self, images, rows, out, first, published, stage=None):
        self._alone()
        for i, (image, row) in enumerate(zip(images, rows)):
            out[first + i] = cut(image.owner, row, out.shape[1], published)
        self.thread = None


class HostStage:
    "Keeps what is placed"

    def __init__(self, gpu):
        self.gpu = gpu

    def begin(self, room):
        self.placed = np.zeros(0, np.uint8)
        self.lock = threading.Lock()

    def place(self, pixels):
        with self.lock:
            at = len(self.placed)
            self.placed = np.concatenate([self.placed, pixels.reshape(-1)])
        return at

    def images(self, begins, sizes):
        HostProducer.sent += len(sizes)
        ends = [at + 3 * h * w for at, (h, w) in zip(begins, sizes)]
        parts = [self.placed[a:b].reshape(*s, 3) for a, b, s in zip(begins, ends, sizes)]
        return [gpu_decode.Image(0, 3 * one.shape[1], one.shape[:2], one) for one in parts]


def maker(producer=HostProducer):
    return gpu_reader.Maker(producer, HostStage, lambda shape, gpu: np.zeros(shape, np.uint8))


def taps(at, corner, scale, size, half):
    place = (corner + at.astype(np.float32) + half) * scale - half
    low = np.floor(place)
    first, second = np.maximum(low, 0).astype(int), np.minimum(low + 1, size - 1).astype(int)
    return first, second, place - low


def cut(pixels, row, side, published):
    "The kernel's arithmetic, line by line"
    x, half = np.arange(side), np.float32(0 if published else 0.5)
    target = side - 1 - x if row["flip"] and not published else x
    x0, x1, fx = taps(target, row["corner"][1], row["scale"][1], row["width"], half)
    y0, y1, fy = taps(x, row["corner"][0], row["scale"][0], row["height"], half)
    if row["flip"] and published:
        x0, x1 = row["width"] - 1 - x0, row["width"] - 1 - x1
    image = pixels[row["top"] :, row["left"] :].astype(np.float32)
    line = lambda y: image[y][:, x0] + (image[y][:, x1] - image[y][:, x0]) * fx[:, None]
    value = line(y0) + (line(y1) - line(y0)) * fy[:, None, None]
    if published:
        return value.astype(np.float16).astype(np.uint8)
    return np.clip(np.rint(value), 0, 255).astype(np.uint8)


def requested(data, size, batch, how="published", random=True, first=3, gpus=(0,)):
    order = request.batch_order(data, batch, 5, (0, 1))
    return request.TrainRequest(data, order, size, how, random, 0.05, first, gpus)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "JPEGs of several shapes, gray ones, a PNG and a BMP"
    folder = tmp_path_factory.mktemp("mixed")
    made = [record(encode(smooth_image(40 + 7 * i, 90 - 5 * i, i)), 1 + i % 3) for i in range(9)]
    made += [
        record(encode(smooth_image(50, 60, 9), mode="L")),
        record(encode(smooth_image(), "PNG")),
    ]
    made += [record(bmp(3))]
    write(folder, "train", made)
    data = d.open_data(write(folder, "validation", made), verbose=False)
    return replace(data, decoder="pillow")  # the accurate DCT for the readers that are compared


@pytest.mark.parametrize("how", ["published", "modern"])
@pytest.mark.parametrize("random", [True, False])
def test_the_same_training_batches(mixed, how, random, monkeypatch):
    monkeypatch.setattr(gpu_reader, "SLICE", 5)
    monkeypatch.setattr(gpu_reader, "AT_ONCE", 4)
    HostProducer.refused = HostProducer.sent = 0
    args = requested(mixed, 24, 6, how, random)
    theirs = numpy_reader.training_stream(args)
    ours = gpu_reader.training_stream(args, maker())
    for (a, b), (c, e) in islice(zip(ours, theirs), 9):  # over the ends of epochs
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, e)
    ours.close()
    assert HostProducer.sent > HostProducer.refused > 0  # refused ones, and those that are no JPEG


@pytest.mark.parametrize("how", ["published", "modern"])
@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("decodes", [True, False])
def test_the_cores_make_the_same_images(mixed, how, random, decodes, monkeypatch):
    "Some of each batch, beside a GPU's decoders, and all"
    made = collections.Counter()
    monkeypatch.setattr(gpu_reader, "CHUNK", 2)
    monkeypatch.setattr(gpu_reader, "AT_ONCE", 4)
    monkeypatch.setattr(gpu_reader, "_core_count", lambda *_: 2)
    for owner, name in ((gpu_reader.Cores, "make"), (gpu_reader._Stream, "_decode")):
        inner = getattr(owner, name)

        def counted(self, *args, inner=inner, name=name):
            made[name] += len(args[0] if name == "make" else args[3])
            return inner(self, *args)

        monkeypatch.setattr(owner, name, counted)
    args = requested(mixed, 24, 6, how, random)
    stream = gpu_reader.training_stream if decodes else gpu_reader.cores_stream
    ours, theirs = stream(args, maker()), numpy_reader.training_stream(args)
    for (a, b), (c, e) in islice(zip(ours, theirs), 12):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, e)
    ours.close()
    assert made["make"] and bool(made["_decode"]) == decodes
    assert (made["make"] + made["_decode"]) % 2 == 0 and sum(made.values()) >= 12 * 6


def test_who_is_free_takes_the_oldest_chunk_and_the_cores_come_first():
    batch = gpu_reader._Batch(np.arange(10), np.arange(10), (10, 4, 4, 3))
    chunks, one, two = gpu_reader._Chunks(4), *(gpu_reader._Made(batch, None) for _ in range(2))
    chunks.put(one)
    chunks.put(two)
    assert chunks.take(8, False) == (one, slice(0, 8))
    assert chunks.take(8, False) == (one, slice(8, 10))  # not those of the next batch
    chunks.idle = 1  # a feeder waits
    assert chunks.take(100, False) == (two, slice(0, 8))  # which leaves it one
    with ThreadPoolExecutor(1) as pool:
        gpu = pool.submit(chunks.take, 100, False)
        with pytest.raises(TimeoutError):
            gpu.result(0.05)
        assert chunks.take(4, True) == (two, slice(8, 10))
        chunks.close()
        assert gpu.result(5) is None


def test_feeders_that_may_not_feed_leave_all_to_the_gpu():
    batch = gpu_reader._Batch(np.arange(10), np.arange(10), (10, 4, 4, 3))
    chunks, made = gpu_reader._Chunks(4), gpu_reader._Made(batch, None)
    chunks.let_feed(False)
    chunks.put(made)
    with ThreadPoolExecutor(1) as pool:
        feeder = pool.submit(chunks.take, 4, True)
        with pytest.raises(TimeoutError):
            feeder.result(0.05)
        assert chunks.take(100, False) == (made, slice(0, 10))
        chunks.put(made)
        chunks.let_feed(True)
        assert feeder.result(5) == (made, slice(0, 4))


@pytest.mark.parametrize("helped, helps", [(0.9, True), (1.0, True), (1.1, False)])
def test_whether_the_cores_help_is_tried(helped, helps):
    trial, now, said = gpu_reader._Trial(), 0.0, []
    for step in range(200):
        now += (helped if step < 40 else 1.0) + 30 * (step in (15, 60))  # epochs end
        said.append(trial.step(now))
    assert all(said[:39]) and not any(said[39:79]) and set(said[80:]) == {helps}
    times = {"ms_with_cores": 1e3 * helped, "ms_without": 1e3}
    assert trial.outcome == {"cores_help": helps, **{n: pytest.approx(t) for n, t in times.items()}}


def test_a_batch_is_there_when_all_chunks_are():
    batch = gpu_reader._Batch(np.arange(3), np.arange(3), (3, 4, 4, 3))
    made, none = (gpu_reader._Made(one, "out") for one in (batch, batch._replace(numbers=[])))
    assert none.future.done() and not made.future.done()
    made.done(slice(1, 3), np.array([5, 6]))
    assert not made.future.done()
    made.done(slice(0, 1), np.array([4]))
    out, labels = made.future.result(0)
    assert out == "out" and labels.tolist() == [4, 5, 6] and labels.dtype == np.int32
    late = gpu_reader._Made(batch, "out")
    late.fail(ValueError("damaged"))
    late.done(slice(0, 3))
    with pytest.raises(ValueError, match="damaged"):
        late.future.result(0)


@pytest.mark.parametrize("why, reader", [(None, "cores"), ("no driver", "jax")])
def test_pixels_of_the_cores_are_sent_with_what_works(why, reader, monkeypatch):
    monkeypatch.setattr(gpu_decode, "problem", lambda decodes: why if not decodes else "not asked")
    assert readers.sending_reader() == reader


def test_the_cores_help_only_decoders_that_make_the_same_pixels(monkeypatch):
    monkeypatch.setattr(gpu_reader, "core_count", lambda: 16)
    monkeypatch.setattr(gpu_reader, "pays_processes", lambda images: images > 100)
    exact, other = HostProducer(0), HostProducer(0)
    exact.exact = True
    count = gpu_reader._core_count
    assert (
        count(other, True, 1000, 1) == count(exact, True, 10, 1) == count(exact, True, 1000, 4) == 0
    )
    assert 0 < count(exact, True, 1000, 1) < 16 <= count(other, False, 1000, 1)


@pytest.mark.parametrize("how", ["published", "modern"])
@pytest.mark.parametrize("batch, shard", [(5, (0, 1)), (2, (1, 3)), (40, (0, 1))])
def test_the_same_validation_batches(mixed, how, batch, shard, monkeypatch):
    monkeypatch.setattr(gpu_reader, "AT_ONCE", 8)
    args = request.ValidationRequest(mixed, 20, batch, shard, how)
    ours = list(gpu_reader.validation_stream(args, maker()))
    theirs = list(numpy_reader.validation_stream(args))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        for a, b in zip(one, other):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", [lambda e: e[:200], lambda e: b"GIF89a but no more"])
def test_damage_is_named(tmp_path, damage):
    good = encode(smooth_image())
    write(tmp_path, "train", [record(good), record(damage(good)), record(good)])
    data = d.open_data(tmp_path, verbose=False)
    with pytest.raises(ValueError, match="can be decoded.*image 1 of the train split, at byte"):
        next(gpu_reader.training_stream(requested(data, 16, 3), maker()))


def test_what_a_decoder_refuses_and_the_host_cannot_read_is_named(tmp_path):
    good = encode(smooth_image())
    bad = good[:3] + b"\0" * 40 + good[43:]  # an end, but no beginning
    write(tmp_path, "train", [record(good), record(good), record(bad)])
    data = d.open_data(tmp_path, verbose=False)
    with pytest.raises(ValueError, match="image 2 of the train split, at byte"):
        next(gpu_reader.training_stream(requested(data, 16, 3), maker()))


def test_an_image_of_another_size_than_its_header_is_decoded_again(mixed):
    class Odd(HostProducer):
        def _image(self, pixels):
            return gpu_decode.Image(0, 0, (1, 1), pixels[:1, :1])

    args = requested(mixed, 24, 6)
    ours, theirs = (gpu_reader.training_stream(args, make) for make in (maker(Odd), maker()))
    np.testing.assert_array_equal(next(ours)[0], next(theirs)[0])


def test_each_gpu_makes_its_own_part_of_a_batch(mixed, monkeypatch):
    made = []

    class Told(HostProducer):
        def write(self, images, rows, out, *more):
            made.append((self.gpu, len(out)))
            super().write(images, rows, out, *more)

    ours = gpu_reader.training_stream(requested(mixed, 24, 6, gpus=(1, 3)), maker(Told))
    theirs = gpu_reader.training_stream(requested(mixed, 24, 6), maker())
    for (parts, labels), (images, theirs_too) in islice(zip(ours, theirs), 3):
        np.testing.assert_array_equal(np.concatenate(parts), images)
        np.testing.assert_array_equal(labels, theirs_too)
    ours.close()
    assert set(made) == {(1, 3), (3, 3)}


def test_a_producer_that_does_not_work_is_told(mixed):
    def make(gpu):
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        next(gpu_reader.training_stream(requested(mixed, 16, 3), maker(make)))


def test_a_row_is_laid_out_as_in_the_kernel():
    fields = [gpu_decode.ROW.fields[name][1] for name in gpu_decode.ROW.names]
    assert fields == [0, 8, 16, 20, 24, 28, 32, 36, 40, 48] and gpu_decode.ROW.itemsize == 56


def test_without_a_gpu_the_problem_is_said():
    found = gpu_decode.problem()
    assert found is None or (": " in found and "\n" not in found)


def test_nvimagecodec_decodes_as_libjpeg(mixed, capfd):
    "On the host's cores: that the calls are right, and quiet"
    if not importlib.util.find_spec("nvidia") or not importlib.util.find_spec("nvidia.nvimgcodec"):
        pytest.skip("nvImageCodec is not installed")
    codec = gpu_decode.Codec(None, 1)
    encoded = [decode.read_encoded(mixed, "train", i)[0] for i in range(10)]
    good = codec.decode([*encoded, encoded[0][:300]])
    assert good.pop() is None
    for data, image in zip(encoded, good):
        np.testing.assert_array_equal(np.asarray(image), decode.decode_image(data))
    assert capfd.readouterr().err == ""
