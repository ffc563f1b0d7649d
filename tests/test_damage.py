"""Images of odd shapes, cut off, overwritten: read as all decoders do, refused by name, or left out."""

import contextlib
import errno
import io
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from images import encode, quick, record, smooth_image, write
from PIL import Image
from test_faults import one_line
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import data as d
from effnet_repro.config import for_one_device
from effnet_repro.data import decode
from effnet_repro.training import decoding, stream, train, validate

SHAPES = {"1x1": (1, 1), "1x10000": (1, 10_000), "10000x1": (10_000, 1), "small": (20, 30)}


@pytest.fixture(scope="module")
def odd_shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    records = [
        record(encode(smooth_image(*s), k)) for s in SHAPES.values() for k in ("JPEG", "PNG")
    ]
    write(folder, "train", records)
    return d.open_data(write(folder, "validation", records), verbose=False)


def test_images_of_every_shape_are_read(odd_shapes):
    n, how = odd_shapes.train_count, "published" if decode.has_fast_dct() else "modern"
    (theirs,) = d.validation_batches(odd_shapes, 64, n, image_resize=how)
    (ours,) = d.validation_arrays(odd_shapes, 64, n, image_resize=how)
    assert np.abs(theirs[0].numpy().astype(int) - ours[0]).max() <= 1
    for reader in ("tensorflow", "numpy"):
        images, _ = next(iter(d.training_batches(odd_shapes, 64, n, reader=reader)))
        assert images.shape == (n, 64, 64, 3)


def test_sixteen_bits_become_the_upper_eight():
    gray = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    np.testing.assert_array_equal(decode.decode_image(file.getvalue())[..., 1], gray >> 8)


def broken_jpegs():
    whole = encode(smooth_image(60, 80))
    zeros = bytearray(whole)
    zeros[100:400] = bytes(300)
    return {"cut": whole[: len(whole) // 2], "zeros": bytes(zeros), "no end": whole[:-2]}


@pytest.fixture(scope="module")
def broken_set(tmp_path_factory):
    "Fifteen good images and three broken ones, in both splits."
    folder = tmp_path_factory.mktemp("broken")
    good = [record(encode(smooth_image(40, 50, i)), label=i % 2 + 1) for i in range(15)]
    bad = [record(b) for b in broken_jpegs().values()]
    records = good[:4] + bad[:1] + good[4:9] + bad[1:] + good[9:]
    write(folder, "train", records)
    return write(folder, "validation", records)


def test_damaged_images_are_left_out_and_named(broken_set, tmp_path, capsys):
    data = d.open_data(broken_set, cache_dir=tmp_path, on_corrupt="skip")
    said = capsys.readouterr().out
    assert (data.train_count, data.validation_count, len(data.damaged)) == (15, 15, 6)
    assert "6 damaged ones left out" in said and said.count("left out: Not an image") == 5
    assert all("train-" in text or "validation-" in text for text in data.damaged)
    again = d.open_data(broken_set, cache_dir=tmp_path, on_corrupt="skip")
    assert again == data and "decoding" not in capsys.readouterr().out  # it is remembered
    streams = [d.training_batches(data, 16, 5, reader=r) for r in ("tensorflow", "numpy")]
    seen = [[np.asarray(y) for _, (_, y) in zip(range(7), stream)] for stream in streams]
    np.testing.assert_array_equal(*seen)
    later = d.training_batches(data, 16, 5, first_update=4, reader="numpy")
    np.testing.assert_array_equal(next(later)[1], seen[0][4])  # going on sees the same
    assert sum(mask.sum() for _, _, mask in d.validation_arrays(data, 16, 4)) == 15


def test_images_that_a_disk_does_not_give_are_named_or_left_out(broken_set, tmp_path, monkeypatch):
    opened = os.open

    def fail(path, *how, **named):
        if str(path).endswith("train-00000-of-00001"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *how, **named)

    data = d.open_data(broken_set, verbose=False)
    monkeypatch.setattr(os, "open", fail)
    says = "Cannot read image 0 of the train split, at byte .*train-00000-of-00001: Input/output"
    with pytest.raises(OSError, match=says):
        decode.read_encoded(data, "train", 0)
    data = d.open_data(broken_set, cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    assert (data.train_count, data.validation_count) == (0, 15)
    assert "Cannot read image 0 of the train" in data.damaged[0] and "Errno" not in data.damaged[0]


def test_damaged_images_are_refused_by_name(broken_set):
    data = d.open_data(broken_set, verbose=False)
    with pytest.raises(ValueError, match="It is image .* at byte .*on_corrupt='skip'") as error:
        next(d.numpy_batches(data, 16, 18))
    one_line(error)
    with pytest.raises(ValueError, match="validation split.*on_corrupt='skip'") as error:
        list(d.validation_arrays(data, 16, 18))
    one_line(error)
    with pytest.raises(ValueError, match="Unknown on_corrupt 'ignore'"):
        d.open_data(broken_set, on_corrupt="ignore")


def test_a_run_names_the_damaged_image_or_leaves_it_out(broken_set, tmp_path):
    options = {**SMOKE, "global_batch_size": 6, "micro_batch_size": 3, "max_steps": 3}
    options.update(epochs=2, validate_every=None)
    with pytest.raises(ValueError, match="image .* of the train split, at byte") as error:
        train(TINY, broken_set, tmp_path / "a", **options)
    one_line(error)
    run = train(TINY, broken_set, tmp_path / "b", on_corrupt="skip", **options)
    config = json.loads((run.run_dir / "config.json").read_text())
    assert run.finished and len(config["skipped_pictures"]) == 6
    assert "skipped_pictures" in (run.run_dir / "metrics.csv").read_text().splitlines()[0]
    with pytest.raises(ValueError, match="image .* of the validation split, at byte") as error:
        validate(run.run_dir, broken_set)
    one_line(error)
    assert validate(run.run_dir, broken_set, on_corrupt="skip")["last"].pictures == 15


def test_tensorflow_feeds_a_gpu_of_jax(broken_set, tmp_path, monkeypatch, capsys):
    """The same batches as TensorFlow's own, from any step on, and the same words about damage."""
    monkeypatch.setattr(decoding, "has_jax_gpu", lambda: True)
    monkeypatch.setattr(decoding, "fits_device", lambda data: False)
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    case = for_one_device(TINY, global_batch_size=5, micro_batch_size=5)
    how = dict(verbose=False, decoder="tensorflow")
    good = d.open_data(broken_set, cache_dir=tmp_path, on_corrupt="skip", **how)
    theirs = d.training_batches(good, 32, 5, seed=2, first_update=4).as_numpy_iterator()
    for ((ours,), other), _ in zip(zip(stream.updates(case, good, 2, 4), theirs), range(3)):
        np.testing.assert_array_equal(ours["images"], other[0])
        np.testing.assert_array_equal(ours["labels"], other[1])
    assert sum(mask.sum() for *_, mask in stream.validation_stream(good, 32, 4)) == 15
    bad = d.open_data(broken_set, **how)
    with pytest.raises(ValueError, match="image .* of the validation split, at byte") as error:
        list(stream.validation_stream(bad, 32, 4))
    one_line(error)
    good = replace(good, decoder="simplejpeg")
    (ours,) = next(stream.updates(case, good, 2, 4))
    theirs = next(d.numpy_batches(good, 32, 5, seed=2, first_update=4))
    np.testing.assert_array_equal(ours["images"], theirs[0])


@quick
@example(2505, 5)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_of_a_jpeg_decodes_alike_or_is_refused(place, bit):
    import tensorflow as tf

    data = bytearray(encode(smooth_image(24, 32)))
    data[place % len(data)] ^= 1 << bit
    try:
        ours = decode.decode_image(bytes(data))
    except ValueError as error:
        refused = "Not an image that can be decoded|at most .* are read"  # or its size has grown
        assert re.search(refused, one_line(error))
        with pytest.raises(ValueError, match=refused):
            decode.decode_image(bytes(data), fast=True)
        return
    theirs = tf.io.decode_jpeg(bytes(data), channels=3, dct_method="INTEGER_ACCURATE")
    np.testing.assert_array_equal(ours, theirs)  # TensorFlow refuses nothing that we take
    if decode._decode_turbo(bytes(data), True, strict=False) is not None:
        theirs = tf.io.decode_jpeg(bytes(data), channels=3, dct_method="INTEGER_FAST")
        np.testing.assert_array_equal(decode.decode_image(bytes(data), fast=True), theirs)


def test_a_wrong_checksum_is_found_before_the_run(tmp_path):
    write(tmp_path, "train", [record(encode(smooth_image(40, 50, i))) for i in range(3)])
    path, split = tmp_path / "train-00000-of-00001", d.open_data(tmp_path).splits["train"]
    raw = bytearray(path.read_bytes())
    raw[split.offset[1] + split.length[1] - 40] ^= 1  # still a JPEG
    path.write_bytes(raw)
    data = d.open_data(tmp_path, cache_dir=tmp_path / "c", on_corrupt="skip", verbose=False)
    assert data.train_count == 2 and "checksum" in data.damaged[0] and str(path) in data.damaged[0]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"classes": 3}', '{"num_classes": -1}', '{"classes": [{"label": 0, "text": 1}]}'],
)
def test_a_broken_info_file_is_named(tmp_path, text):
    write(tmp_path, "train", [record()])
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(ValueError, match="info.json is not a description of classes") as error:
        d.open_data(tmp_path)
    one_line(error)


def test_a_jpeg_that_libjpeg_steps_over_is_read_by_tensorflow_as_by_the_others(tmp_path):
    import tensorflow as tf

    whole, found = encode(smooth_image(24, 32)), []
    for place in range(600, len(whole) - 4):
        data = whole[:place] + b"\xff" + whole[place + 1 :]
        try:
            tf.io.decode_jpeg(data)
        except tf.errors.InvalidArgumentError:
            with contextlib.suppress(ValueError):
                decode.decode_image(data)
                found.append(data)
        if len(found) == 3:
            break
    write(tmp_path, "train", [record(data) for data in found])
    data = d.open_data(
        write(tmp_path, "validation", [record(data) for data in found]), verbose=False
    )
    assert not d.find_damaged(data, "train") and len(found) == 3
    (theirs, *_), (ours, *_) = (
        next(iter(make(data, 16, 3, image_resize="modern")))
        for make in (d.validation_batches, d.validation_arrays)
    )
    np.testing.assert_array_equal(theirs.numpy(), ours)
    next(iter(d.training_batches(data, 16, 3)))


def test_what_only_tensorflow_refuses_is_named(broken_set, monkeypatch):
    import tensorflow as tf

    def refuse(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "Invalid JPEG data")

    data = d.open_data(broken_set, verbose=False)
    monkeypatch.setattr(tf.io, "decode_jpeg", refuse)
    says = "TensorFlow cannot decode image 3 of the train.*train-00000-of.*--decoder pillow"
    with pytest.raises(ValueError, match=says) as error:
        with stream.explain_failures(data, "train", lambda: [3], str):
            refuse()
    one_line(error)


def test_what_only_tensorflow_refuses_is_left_out(broken_set, monkeypatch, tmp_path, capsys):
    import tensorflow as tf

    monkeypatch.setenv("EFFNET_REPRO_CACHE", str(tmp_path))
    data = d.open_data(broken_set, on_corrupt="skip", verbose=False)
    known, refused = tf.io.decode_jpeg, {decode.read_encoded(data, "train", 2)[0]}

    def decode_jpeg(data, **how):
        if data in refused:
            raise tf.errors.InvalidArgumentError(None, None, "Invalid JPEG data")
        return known(data, **how)

    monkeypatch.setattr(tf.io, "decode_jpeg", decode_jpeg)
    left = decoding.settle_decoder(replace(data, decoder="tensorflow"))
    # The training split holds it as image 2, and so does the validation split, with the same bytes.
    assert (left.train_count, left.validation_count, len(left.damaged)) == (14, 14, 8)
    assert "left out: TensorFlow cannot decode image 2 of the train" in capsys.readouterr().out
    refused.clear()  # it is remembered
    assert decoding.settle_decoder(replace(data, decoder="tensorflow")) == left
    assert decoding.settle_decoder(replace(data, decoder="pillow")).train_count == 15
    whole = decoding.settle_decoder(replace(data, decoder="tensorflow", on_corrupt="refuse"))
    assert whole.train_count == 15  # where damage is refused, it is named when it is met
