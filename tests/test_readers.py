"""Readers by TensorFlow, NumPy and JAX: every kind of file, processes, what needs no TensorFlow."""

import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import tensorflow as tf
from images import (
    FOLDERS,
    ROOT,
    encode,
    folders,
    record,
    smooth_image,
    write,
)

from effnet_repro import data as d
from effnet_repro.data import decode, device, tf_reader, threads, transforms
from effnet_repro.testing import test_allclose as check_close

check_close.__test__ = False


KINDS = {
    "rgb": dict(),
    "444": dict(subsampling=0),
    "progressive": dict(progressive=True),
    "gray": dict(mode="L"),
    "cmyk": dict(mode="CMYK"),
    "png": dict(kind="PNG"),
    "png gray": dict(kind="PNG", mode="L"),
    "png alpha": dict(kind="PNG", mode="RGBA"),
    "png palette": dict(kind="PNG", mode="P"),
    "png 16 bit": dict(kind="PNG", mode="I;16"),
    "gif": dict(kind="GIF", mode="P"),
    "webp": dict(kind="WEBP", lossless=True),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "A record of each kind of file, in sizes that are no multiples of eight"
    records = []
    for i, options in enumerate(KINDS.values()):
        records.append(record(encode(smooth_image(61 + i, 83 - i, i), **options)))
    folder = tmp_path_factory.mktemp("zoo")
    write(folder, "train", records)
    return d.open_data(write(folder, "validation", records), verbose=False)


RESIZES = [
    pytest.param(
        "published", marks=pytest.mark.skipif(not decode.has_fast_dct(), reason="simplejpeg")
    ),
    "modern",
]


@pytest.mark.parametrize("image_resize", RESIZES)
@pytest.mark.parametrize("image_size", [24, 96])
def test_every_kind_of_file(zoo, image_size, image_resize):
    (theirs,) = d.validation_batches(zoo, image_size, len(KINDS), image_resize=image_resize)
    (ours,) = d.validation_arrays(zoo, image_size, len(KINDS), image_resize=image_resize)
    for name, a, b in zip(KINDS, theirs[0].numpy(), ours[0]):
        check_close(a, b, rtol=0, atol=1, msg=name)  # 0 on x86
        assert b.std() > 10, name


def test_an_image_that_cannot_be_decoded(tmp_path):
    write(tmp_path, "train", [record(b"GIF89a but no more"), record(encode(smooth_image())[:200])])
    found = d.open_data(tmp_path, verbose=False)
    with pytest.raises(ValueError, match="can be decoded.*at byte .*train-"):
        next(d.numpy_batches(found, 16, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="can be decoded.*at byte .*train-"):
        next(iter(d.training_batches(found, 16, 2)))


@pytest.mark.parametrize("image_resize", RESIZES)
def test_both_readers_agree_on_training(zoo, image_resize):
    request = dict(image_size=40, global_batch_size=len(KINDS), seed=4, image_resize=image_resize)
    streams = d.training_batches(zoo, **request), d.numpy_batches(zoo, **request)
    for theirs, ours in islice(zip(*streams), 4):
        np.testing.assert_array_equal(theirs[1].numpy(), ours[1])
        difference = np.abs(theirs[0].numpy().astype(int) - ours[0])
        # decoding part of a JPEG does not see the colors next to the part
        assert (difference > 0).mean() < 0.05 and difference[:, :, 6:-6].max() <= 1


@pytest.mark.parametrize("image_resize", RESIZES)
def test_fine_tuning_sees_the_validation_crop(sample, image_resize):
    request = dict(image_size=32, global_batch_size=16, preprocessing="validation", seed=2)
    request["image_resize"] = image_resize
    images, labels = next(iter(d.training_batches(sample, **request)))
    same, same_labels = next(d.numpy_batches(sample, **request))
    check_close(images, same, rtol=0, atol=1)
    every, _ = d.load_arrays(sample, "train", 32, image_resize)
    np.testing.assert_array_equal(same, every[d.epoch_order(sample.train_count, 2, 0)[:16]])
    np.testing.assert_array_equal(labels, same_labels)


@pytest.mark.parametrize("image_resize", RESIZES)
def test_real_images_decode_alike(real, image_resize):
    batch = 64 if real.num_classes == 10 else 12
    for image_size in (64, 224) if batch == 12 else (64,):
        readers = d.validation_batches, d.validation_arrays
        readers = [f(real, image_size, batch, image_resize=image_resize) for f in readers]
        for theirs, ours in zip(*readers):
            for a, b in zip(theirs, ours):
                check_close(a, b, rtol=0, atol=1)  # 0 on x86


def test_real_images_of_every_shape(real):
    if real.num_classes == 10:
        pytest.skip("one shape only")
    for i in range(real.train_count):
        encoded, size = decode.read_encoded(real, "train", i)
        theirs = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(theirs, decode.decode_image(encoded))
        assert theirs.shape[:2] == size


def test_streams_of_processes_and_chunks(sample, monkeypatch):
    whole = next(islice(d.training_batches(sample, 16, 24, first_update=3), 1))
    parts = [
        next(iter(d.training_batches(sample, 16, 24, first_update=3, shard=(i, 3))))
        for i in range(3)
    ]
    monkeypatch.setattr(tf_reader, "CHUNK", 7)
    chunked = next(iter(d.training_batches(sample, 16, 24, first_update=3)))
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])
        np.testing.assert_array_equal(chunked[i], whole[i])


@pytest.mark.skipif(not decode.has_fast_dct(), reason="simplejpeg")
def test_jpegs_of_published_cases_are_decoded_fast(sample, tmp_path, monkeypatch, capsys):
    encoded = [decode.read_encoded(sample, "train", i)[0] for i in range(50)]
    theirs = [tf.io.decode_jpeg(e, dct_method="INTEGER_FAST").numpy() for e in encoded]
    for a, b in zip(encoded, theirs):
        np.testing.assert_array_equal(decode.decode_image(a, fast=True), b)
    accurate = [decode.decode_image(e).astype(int) for e in encoded]
    assert 0.5 < np.mean([np.abs(a - b).mean() for a, b in zip(accurate, theirs)]) < 1.5
    kept = {how: d.load_arrays(sample, "validation", 32, how)[0] for how in transforms.RESIZES}
    monkeypatch.setattr(decode, "has_fast_dct", lambda: False)  # Pillow alone: it is said, once
    for how in 2 * transforms.RESIZES:
        images, _ = d.load_arrays(sample, "validation", 32, how)
        assert np.array_equal(images, kept[how]) == (how == "modern")
    assert capsys.readouterr().out.count("accurate DCT") == 1
    next(d.numpy_batches(sample, 16, 8, image_resize="modern"))
    d.load_arrays(d.open_data(folders(tmp_path, FOLDERS), verbose=False), "train", 8)  # no JPEGs
    assert capsys.readouterr().out == ""


def test_an_unknown_image_resize_is_refused(sample):
    for call in (
        lambda: d.training_batches(sample, 32, 8, image_resize="publish"),
        lambda: d.validation_batches(sample, 32, 8, image_resize="publish"),
        lambda: next(d.validation_arrays(sample, 32, 8, image_resize="publish")),
        lambda: d.load_arrays(sample, "train", 32, "publish"),
    ):
        with pytest.raises(ValueError, match="image_resize.*Did you mean 'published'"):
            call()


def test_no_tensorflow_needed(cache_dir, sample):
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["jax"] = None
from effnet_repro.data import *
data = open_data(verbose=False)
images, labels = next(numpy_batches(data, 32, 8))
assert images.shape == (8, 32, 32, 3) and labels.dtype == "int32"
assert sum(mask.sum() for _, _, mask in validation_arrays(data, 16, 128)) == 300
print("fine")
"""
    environment = {**os.environ, "EFFNET_REPRO_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.split() == [b"fine"], done.stderr.decode()


def test_an_abandoned_stream_stops(sample):
    stream = d.numpy_batches(sample, 16, 8)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


# --- what readers keep ------------------------------------------------------------------------


def test_decoded_images_stay_with_their_data_set(tmp_path, capsys):
    "Two data sets beside each other are decoded once each, and a DCT at a time is kept"
    for name in "ab":
        write(tmp_path / name, "train", [record(encode(smooth_image(20, 24, i))) for i in range(4)])
    a, b = (d.open_data(tmp_path / name, verbose=False) for name in "ab")
    for data in (a, b, a, b):
        next(d.device_batches(data, 16, 4))
    assert capsys.readouterr().out.count("stay on the device") == 2
    fast, pixels = a.kept["on the device"]
    assert fast and pixels.pixels.shape == (4 * 20 * 24, 3)
    next(d.device_batches(a, 16, 4, image_resize="modern"))
    assert not a.kept["on the device"][0] and b.kept["on the device"][0]
    assert a == d.open_data(tmp_path / "a", verbose=False)  # what is kept is no part of the data


def test_the_size_of_images_is_looked_at_once(sample, monkeypatch):
    fits = d.fits_device(sample)
    monkeypatch.setattr(device, "read_encoded", None)
    assert d.fits_device(sample) == fits and not d.fits_device(sample, share=0)


def test_batches_are_made_ahead():
    begun, seen = [], []
    for number in threads.made_ahead(lambda n: begun.append(n) or n, range(5)):
        seen.append((number, len(begun)))
    assert seen == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]


def test_cores_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    assert threads.core_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.core_count() == 1


def test_a_reader_that_does_not_validate_is_refused(sample):
    with pytest.raises(ValueError, match="Unknown reader 'jax'"):
        d.validation_batches(sample, 32, 8, reader="jax")
    with pytest.raises(ValueError, match="Did you mean 'numpy'"):
        d.training_batches(sample, 32, 8, reader="nump")


def test_a_gpu_that_tensorflow_has_taken_is_told(sample, monkeypatch, caplog):
    "Before, another backend ran short of memory without a word."

    def refuse(*_):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    images, _ = next(d.tensorflow_arrays(d.training_batches, sample, 32, 4))
    assert images.shape == (4, 32, 32, 3) and "has used the GPU already" in caplog.text
