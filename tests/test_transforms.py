"""Crops and resizing: against TensorFlow's draws, and against outputs of the published functions."""

import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from images import ROOT, encode, quick, record, smooth_image, write

from effnet_repro import data as d
from effnet_repro.data import device, readers, request, tf_reader, transforms
from effnet_repro.testing import test_allclose as check_close

check_close.__test__ = False
READERS = [name for name in readers.READERS if name != "nvimagecodec"]  # see test_gpu_reader.py


@quick
@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    area_min=st.sampled_from([0.01, 0.05, 0.25, 1.0]),
    box=st.none() | st.tuples(*[st.floats(0, 1) for _ in range(4)]),
    seed=st.integers(0, 1000),
)
def test_crops_keep_their_promises(height, width, area_min, box, seed):
    boxes = np.zeros((0, 4)) if box is None else np.array([box])
    crops = d.draw_crops([(height, width)] * 16, [boxes] * 16, seed, np.arange(16), area_min)
    assert crops.dtype == np.int32 and (crops[:, :2] >= 0).all() and (crops[:, 2:] >= 1).all()
    assert (crops[:, :2] + crops[:, 2:] <= (height, width)).all()
    whole = (crops == (0, 0, height, width)).all(1)
    top, left, h, w = crops[~whole].T.astype(float)
    assert (h * w >= area_min * height * width).all()
    assert (np.abs(w / h - (0.75 + 1.33) / 2) <= (1.33 - 0.75) / 2 + 0.5 / h).all()  # whole pixels


def test_crops_do_not_depend_on_company():
    sizes, boxes = np.array([[50, 70], [300, 200], [64, 64]]), [np.zeros((0, 4))] * 3
    together = d.draw_crops(sizes, boxes, 5, np.array([11, 3, 8]))
    for i, place in enumerate([11, 3, 8]):
        alone = d.draw_crops(sizes[i : i + 1], boxes[:1], 5, np.array([place]))
        np.testing.assert_array_equal(alone[0], together[i])


def sampled_boxes(size, boxes, aspects, n):
    "What the operation draws that the published code calls: top, left, height, width"

    def sample(i):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            [*size, 3],
            boxes[None],
            seed=tf.stack([tf.constant(5, tf.int64), i]),
            min_object_covered=0.1,
            aspect_ratio_range=aspects,
            area_range=(0.05, 1.0),
            max_attempts=100,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    return np.stack(list(tf.data.Dataset.range(n).map(sample).as_numpy_iterator()))


@pytest.mark.parametrize(
    "size, box",
    [
        ((375, 500), None),
        ((375, 500), (0.3, 0.4, 0.5, 0.6)),
        ((60, 300), None),
        ((500, 120), (0.0, 0.0, 0.2, 0.9)),
        ((128, 128), None),
    ],
)
def test_crops_are_distributed_as_tensorflow_draws_them(size, box):
    n = 6000
    boxes = np.array([box or (0, 0, 1, 1)], np.float32)
    theirs = sampled_boxes(size, boxes, (0.75, 1.33), n)
    ours = d.draw_crops([size] * n, [boxes if box else boxes[:0]] * n, 5, np.arange(n))
    facts = []
    for crops, last in ((ours, 1), (theirs, 0)):  # theirs never touch the right or lower edge
        (top, left), (h, w), (height, width) = crops.T[:2], crops.T[2:], size
        down, across = (
            (at + 0.5) / np.maximum(room + last, 1)
            for at, room in ((top, height - h), (left, width - w))
        )
        shape = [h / height, w / width, h * w / (height * width), np.log(w / h)]
        facts.append([*shape, down[height - h > 30], across[width - w > 30]])
    for i, (a, b) in enumerate(zip(*facts)):
        if min(len(a), len(b)) < 500:
            continue
        # Kolmogorov-Smirnov distance: the 0.1 % point; for places, the grain of whole pixels
        grid = np.sort(np.concatenate([a, b]))
        cdf = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (a, b)]
        bound = 1.95 * (1 / len(a) + 1 / len(b)) ** 0.5
        assert np.abs(cdf[0] - cdf[1]).max() < bound + (1 / 30 if i > 3 else 0)


def test_published_crops_end_at_an_aspect_of_133(sample, monkeypatch):
    "Large crops, where whole pixels hide nothing: the share that is wider than 1.33"

    def share(crops):
        _, _, height, width = np.asarray(crops, float).T
        return (width / height > 1.33 + 0.5 / height).mean()

    n, size, none = 6000, (3000, 3000), np.zeros((0, 4))
    ours = lambda **more: d.draw_crops([size] * n, [none] * n, 5, np.arange(n), **more)
    theirs = lambda aspects: sampled_boxes(size, np.array([[0, 0, 1, 1.0]], np.float32), aspects, n)
    assert share(theirs((0.75, 1.33))) == share(ours()) == 0
    assert 0.003 < share(theirs((3 / 4, 4 / 3))) < 0.009
    assert 0.003 < share(ours(aspects=transforms.ASPECTS["modern"])) < 0.009
    drawn, draw = [], d.draw_crops  # the readers ask for them
    monkeypatch.setattr(
        request, "draw_crops", lambda *a, **k: (drawn.append(k["aspects"]), draw(*a, **k))[1]
    )
    for reader in READERS:
        for image_resize in transforms.RESIZES:
            drawn.clear()
            next(iter(d.training_batches(sample, 16, 8, reader=reader, image_resize=image_resize)))
            assert set(drawn) == {(0.75, 1.33) if image_resize == "published" else (3 / 4, 4 / 3)}


# --- the published preprocessing ---------------------------------------------------------------
# tests/data/preprocessing.{json,npz} are outputs of the published functions, run under TensorFlow's v1
# interface, of images that a formula gives; nothing of this project was used to make them.

VECTORS = json.loads((ROOT / "tests/data/preprocessing.json").read_text())
ARRAYS = np.load(ROOT / "tests/data/preprocessing.npz")


def vector_image(row):
    y, x = np.mgrid[: row["height"], : row["width"]][..., None]
    waves = 60 * np.sin(y / 7 + row["seed"]) * (1, 0.7, 0.4) + 50 * np.cos(x / 9) * (0.5, 1, 0.8)
    noise = np.random.default_rng(row["seed"]).integers(-18, 19, (row["height"], row["width"], 3))
    image = np.clip(np.rint(128 + waves + noise), 0, 255).astype(np.uint8)
    assert hashlib.sha256(image.tobytes()).hexdigest() == row["image_sha256"]
    return image


def is_published(found, row, kind):
    found = np.ascontiguousarray(found)
    assert found.shape == (row["size"], row["size"], 3) and found.dtype == np.uint8
    key = f"{kind}_{VECTORS.index(row)}"
    if key in ARRAYS:
        np.testing.assert_array_equal(found, ARRAYS[key])
    assert hashlib.sha256(found.tobytes()).hexdigest() == row[f"{kind}_sha256"]


@pytest.fixture(scope="module")
def vector_set(tmp_path_factory):
    "Each image of the vectors as a PNG, in a set of its own"
    folder = tmp_path_factory.mktemp("vectors")
    for i, row in enumerate(VECTORS):
        records = [record(encode(vector_image(row), "PNG"))]
        write(folder / str(i), "train", records), write(folder / str(i), "validation", records)
    return [d.open_data(folder / str(i), verbose=False) for i in range(len(VECTORS))]


def one_batch(stream):
    return np.asarray(next(iter(stream))[0])


@pytest.mark.parametrize("i", range(len(VECTORS)))
def test_validation_crops_are_the_published_ones(vector_set, i):
    row, data = VECTORS[i], vector_set[i]
    request = dict(image_size=row["size"], global_batch_size=1, preprocessing="validation")
    streams = [d.training_batches(data, **request, reader=reader) for reader in READERS]
    streams += [f(data, row["size"], 1) for f in (d.validation_batches, d.validation_arrays)]
    for stream in streams:
        is_published(one_batch(stream)[0], row, "validation")
    for split in ("train", "validation"):
        is_published(d.load_arrays(data, split, row["size"])[0][0], row, "validation")


@pytest.mark.parametrize("i", range(len(VECTORS)))
@pytest.mark.parametrize("resident", [True, False])
def test_training_crops_are_the_published_ones(vector_set, monkeypatch, i, resident):
    row, data = VECTORS[i], vector_set[i]
    monkeypatch.setattr(request, "draw_crops", lambda *a, **k: np.array([row["crop"]], np.int32))
    monkeypatch.setattr(request, "draw_flips", lambda *a: np.array([row["flip"]]))
    monkeypatch.setattr(device, "fits_device", lambda dataset: resident)
    for reader in ["jax"] if not resident else READERS:
        stream = d.training_batches(data, row["size"], 1, reader=reader)
        is_published(one_batch(stream)[0], row, "training")


def tf_legacy(image, size):
    "TensorFlow's own operations: bilinear by corners, float16, uint8"
    legacy = dict(align_corners=False, half_pixel_centers=False)
    values = tf.compat.v1.image.resize_bilinear(image[None], size, **legacy)[0]
    return tf.cast(tf.cast(values, tf.float16), tf.uint8).numpy()


sides = st.one_of(st.integers(1, 12), st.integers(1, 700))


@quick
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 99), st.booleans())
def test_published_resize_is_tensorflows_old_one(old, new, seed, flip):
    image = d.random_bits(seed, np.arange(old[0] * old[1] * 3)).astype(np.uint8).reshape(*old, 3)
    expected = tf_legacy(image[:, ::-1] if flip else image, new)
    ours = d.resize(image[:, ::-1] if flip else image, new)
    np.testing.assert_array_equal(ours, expected)
    square = new[0], new[0]  # on JAX's device
    whole, zero = np.array([[0, 0, *old]], np.int32), np.zeros(1, np.int32)
    scale = (np.array([old]) / np.array([square])).astype("float32")
    corner, width = np.zeros((1, 2), "float32"), np.array([old[1]], np.int32)
    cuts = device.Cuts(zero, width, whole, scale, corner, np.array([flip]), np.int32(0))
    side = min(new[0], 64)  # a part of it, so that few programs are compiled
    side = 1 << (side.bit_length() - 1)
    found = np.asarray(device.cutter("published")(image.reshape(-1, 3), cuts._asdict(), side))[0]
    np.testing.assert_array_equal(
        found, tf_legacy(image[:, ::-1] if flip else image, square)[:side, :side]
    )


@quick
@given(sides, sides, st.integers(7, 600))
def test_published_window_is_computed_in_float32(height, width, image_size):
    short = tf.cast(min(height, width), tf.float32)
    ratio = tf.cast(int(image_size * 256 / 224), tf.float32) / short
    new = [int(tf.cast(tf.cast(side, tf.float32) * ratio, tf.int32)) for side in (height, width)]
    corner = [(side - image_size) // 2 for side in new]
    assert d.center_crop_box(height, width, image_size) == (tuple(new), tuple(corner))
    size, at = tf_reader._window(tf.constant([height, width, 3]), image_size, "published")
    assert (list(size.numpy()), [int(a) for a in at]) == (new, corner)


@pytest.mark.parametrize("image_resize", transforms.RESIZES)
@pytest.mark.parametrize("image_size", [1, 6, 64])
def test_extreme_shapes_agree(tmp_path, image_size, image_resize):
    shapes = [(1, 1), (1, 10_000), (10_000, 1), (2, 3), (41, 41), (5, 300), (600, 7)]
    records = [record(encode(smooth_image(*shape, i), "PNG")) for i, shape in enumerate(shapes)]
    write(tmp_path, "train", records), write(tmp_path, "validation", records)
    data, n = d.open_data(tmp_path, verbose=False), len(shapes)
    how = dict(image_resize=image_resize)
    (theirs,) = d.validation_batches(data, image_size, n, **how)
    (ours,) = d.validation_arrays(data, image_size, n, **how)
    np.testing.assert_array_equal(theirs[0], ours[0])
    for preprocessing in ("train", "validation"):
        how["preprocessing"] = preprocessing
        streams = [d.training_batches(data, image_size, n, reader=r, **how) for r in READERS]
        for tensors, arrays, on_device in islice(zip(*streams), 2):
            np.testing.assert_array_equal(tensors[0], arrays[0])
            atol = 0 if image_resize == "published" else 1  # compilers fuse products and sums
            check_close(np.asarray(on_device[0]), arrays[0], rtol=0, atol=atol)


def test_modern_resize_is_todays():
    "What runs from before the field was there were trained with: half-pixel centers, rounded"
    for i, (old, new) in enumerate(
        [((30, 40), (17, 23)), ((9, 7), (50, 60)), ((200, 5), (64, 64))]
    ):
        image = smooth_image(*old, i)
        theirs = np.rint(tf.image.resize(image, new).numpy()).astype(np.uint8)
        np.testing.assert_array_equal(d.resize(image, new, image_resize="modern"), theirs)
    assert d.center_crop_box(332, 500, 224, "modern") == ((256, 386), (16, 81))
    assert transforms.ASPECTS["modern"] == (3 / 4, 4 / 3)
