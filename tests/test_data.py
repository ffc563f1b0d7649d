"""What does not read well on the page of 30_data: matrices of formats, damage, processes, real sets."""

import hashlib
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from effnet_repro import data as d
from effnet_repro.testing import test_allclose as check_close

check_close.__test__ = False
ROOT = Path(__file__).resolve().parents[1]
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sample(cache):
    return d.open_data(cache_dir=cache, verbose=False)


@pytest.fixture(params=["imagenette128", "imagenet_sample"])
def real(request):
    folders = [os.environ.get("EFFNET_REPRO_DATA"), ROOT.parent / "shared" / "data"]
    for folder in filter(None, folders):
        if (Path(folder) / request.param).is_dir():
            return d.open_data(Path(folder) / request.param, verbose=False)
    pytest.skip(f"no {request.param}: set EFFNET_REPRO_DATA to the folder that holds it")


def picture(height=30, width=40, seed=0):
    "A smooth colour picture with some noise"
    y, x = np.mgrid[:height, :width]
    base = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1)
    noise = d.random_uniform(seed, np.arange(base.size)).reshape(base.shape)
    return (0.8 * base + 50 * noise).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def record(encoded=None, label=1, **more):
    encoded = encode(picture()) if encoded is None else encoded
    return d.make_example({"image/encoded": encoded, "image/class/label": label, **more})


def write(folder, split, records, name="{}-00000-of-00001"):
    folder.mkdir(parents=True, exist_ok=True)
    d.write_tfrecords(folder / name.format(split), records)
    return folder


# --- records ---------------------------------------------------------------------------------


@quick
@given(records=st.lists(st.binary(max_size=200), max_size=8))
def test_records_round_trip(tmp_path, records):
    path = tmp_path / "records"
    d.write_tfrecords(path, records)
    places, data = d.scan_tfrecord(path, check_data=True), path.read_bytes()
    assert [data[at : at + length] for at, length in places] == records
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records


@quick
@given(keep=st.integers(0, 10_000), flip=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_damage_is_found(tmp_path, keep, flip, bit):
    path = tmp_path / "records"
    d.write_tfrecords(path, [b"one", b"", b"three" * 5])
    whole = path.read_bytes()
    ends = {0} | {int(at + length + 4) for at, length in d.scan_tfrecord(path)}
    keep %= len(whole)
    path.write_bytes(whole[:keep])
    if keep in ends:
        assert len(d.scan_tfrecord(path)) == sorted(ends).index(keep)
    else:
        with pytest.raises(ValueError, match="records"):
            d.scan_tfrecord(path)
    damaged = bytearray(whole)
    damaged[flip % len(whole)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="record [012] of"):
        d.scan_tfrecord(path, check_data=True)


values = st.one_of(
    st.lists(st.binary(max_size=20), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
)


@quick
@given(features=st.dictionaries(st.text(max_size=10), values, max_size=5))
def test_examples_round_trip(features):
    ours = d.make_example(features)
    theirs = tf.train.Example.FromString(ours).SerializeToString()
    for data in (ours, theirs):
        found = d.parse_example(data)
        assert {key: list(value) for key, value in found.items()} == features


def test_numbers_that_are_not_packed():
    # Old writers store each number as a field of its own: tag 8, value.
    body = b"".join(d._number(8) + d._number(n) for n in (3, 300, -1))
    feature = d._message(3, body)
    example = d._message(1, d._message(1, d._message(1, b"n") + d._message(2, feature)))
    assert list(tf.train.Example.FromString(example).features.feature["n"].int64_list.value) == [
        3,
        300,
        -1,
    ]
    assert list(d.parse_example(example)["n"]) == [3, 300, -1]


@quick
@given(data=st.binary(max_size=60))
def test_noise_is_refused_or_read(data):
    try:
        assert isinstance(d.parse_example(data), dict)
    except ValueError as error:
        assert "tf.train.Example" in str(error)


# --- opening ---------------------------------------------------------------------------------


def test_split_folders_and_missing_shards(tmp_path, capsys):
    write(tmp_path / "train", "train", [record(label=2)], "{}-00001-of-00003")
    found = d.open_data(tmp_path)
    assert (found.format, found.num_classes, found.train_count) == ("tfrecord", 2, 1)
    out = capsys.readouterr().out
    assert "only 1 of the 3 train files" in out and "tfrecord" in out


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_folders(tmp_path, validation):
    for split, names in [("train", "ab"), (validation, "b")]:
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.JPEG").write_bytes(encode(picture()))
            (tmp_path / split / name / "notes.txt").write_text("not a picture")
    found = d.open_data(tmp_path, verbose=False)
    assert found.format == "folder" and found.class_names == ("a", "b")
    assert list(found.splits["validation"].label) == [1]
    (tmp_path / validation / "c").mkdir()
    with pytest.raises(ValueError, match="does not have: c"):
        d.open_data(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="class folder .*c holds no picture"):
        d.open_data(tmp_path)


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(tmp_path, hundred):
    pixels = np.stack([picture(32, 32, i) for i in range(6)])
    labels = np.array([9, 0, 3, 1, 2, 4], np.uint8)[:, None]
    heads = [np.full_like(labels, 7), labels] if hundred else [labels]  # coarse, fine
    rows = np.concatenate([*heads, pixels.transpose(0, 3, 1, 2).reshape(6, -1)], 1)
    inner = tmp_path / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    inner.mkdir()
    if hundred:
        rows.tofile(inner / "train.bin")
    else:
        rows[:4].tofile(inner / "data_batch_1.bin")
        rows[4:].tofile(inner / "data_batch_2.bin")
    found = d.open_data(tmp_path, verbose=False)
    assert (found.format, found.num_classes) == ("cifar", 100 if hundred else 10)
    assert list(found.splits["train"].label) == list(labels[:, 0])
    for i in range(6):
        np.testing.assert_array_equal(d._decode(d._read(found, "train", i)[0]), pixels[i])
    images, _ = next(iter(d.training_batches(found, 32, 6, preprocessing="validation")))
    assert images.shape == (6, 32, 32, 3)
    last = sorted(inner.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match="Truncated file"):
        d.open_data(tmp_path)


def test_info_names_the_classes(tmp_path):
    write(tmp_path, "validation", [record(label=3, **{"image/class/text": "three"})])
    assert d.open_data(tmp_path, verbose=False).class_names == ("0", "1", "three")
    info = {"num_classes": 4, "classes": [{"label": 1, "text": "one"}]}
    (tmp_path / "info.json").write_text(json.dumps(info))
    assert d.open_data(tmp_path, verbose=False).class_names == ("one", "1", "three", "3")
    (tmp_path / "info.json").write_text(json.dumps({"num_classes": 2}))
    with pytest.raises(ValueError, match="2 classes of .* label 3 in .*validation-"):
        d.open_data(tmp_path)


@pytest.mark.parametrize(
    "bad, message",
    [
        (record(label=0), "from 1 .*Received: \\[0\\] in record 1"),
        (record(label=-3), "from 1 .*Received: \\[-3\\] in record 1"),
        (record(label=1.5), "whole number from 1 .*Received: \\[1.5\\] in record 1"),
        (record(label=10**15), "must not exceed 100,000 .*give num_classes in info.json"),
        (record(label=[1, 2]), "Received: \\[1, 2\\]"),
        (d.make_example({"image/class/label": 1}), "Record 1 of .* is not a picture"),
        (d.make_example({"image/encoded": b"x"}), "Record 1 of .* is not a picture"),
        (record(encoded=[b"x", b"y"]), "Record 1 of .* is not a picture"),
        (b"\x0a\x7fcut", "Record 1 of .* is not a picture"),
        (record(**{"image/object/bbox/xmin": [0.1]}), "Record 1 of .* is not a picture"),
    ],
)
def test_bad_records_are_refused(tmp_path, bad, message):
    write(tmp_path, "train", [record(), bad])
    with pytest.raises(ValueError, match=message):
        d.open_data(tmp_path)


def test_refusals(tmp_path, sample):
    with pytest.raises(FileNotFoundError, match="Found: nothing"):
        d.open_data(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        d.open_data(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="No pictures"):
        d.open_data(tmp_path, "cifar")
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        d.training_batches(sample, 32, 8, preprocessing="valid")
    with pytest.raises(ValueError, match="area_min=0"):
        d.array_batches(sample, 32, 8, area_min=0)
    with pytest.raises(ValueError, match=r"shard=\(0, 3\)"):
        d.training_batches(sample, 32, 8, shard=(0, 3))
    with pytest.raises(ValueError, match="Unknown split"):
        d.load_arrays(sample, "test", 32)


# --- sample set ------------------------------------------------------------------------------


def test_sample_set_is_written_whole_or_not(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "train-00000-of-00002").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(d, "_write_sample_set", fail)
    with pytest.raises(KeyboardInterrupt):
        d.sample_set(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sample_set_from_two_processes(tmp_path, sample):
    code = "from effnet_repro.data import open_data; print(open_data(verbose=False).train_count)"
    environment = {**os.environ, "EFFNET_REPRO_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].split() for process in both] == [[b"1200"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == [Path(sample.root).name]
    for path in Path(sample.root).iterdir():
        assert path.read_bytes() == (tmp_path / Path(sample.root).name / path.name).read_bytes()


def test_sample_set_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(d, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-image.*data_dir"):
        d.open_data(cache_dir=tmp_path)


# --- decoding --------------------------------------------------------------------------------

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
        records.append(record(encode(picture(61 + i, 83 - i, i), **options)))
    folder = tmp_path_factory.mktemp("zoo")
    write(folder, "train", records)
    return d.open_data(write(folder, "validation", records), verbose=False)


RESIZES = [
    pytest.param("published", marks=pytest.mark.skipif(not d._has_fast_dct(), reason="simplejpeg")),
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


def test_a_picture_that_cannot_be_decoded(tmp_path):
    write(tmp_path, "train", [record(b"GIF89a but no more"), record(encode(picture())[:200])])
    found = d.open_data(tmp_path, verbose=False)
    with pytest.raises(ValueError, match="can be decoded.*at byte .*train-"):
        next(d.array_batches(found, 16, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="can be decoded.*at byte .*train-"):
        next(iter(d.training_batches(found, 16, 2)))


@pytest.mark.parametrize("image_resize", RESIZES)
def test_both_readers_agree_on_training(zoo, image_resize):
    request = dict(image_size=40, global_batch_size=len(KINDS), seed=4, image_resize=image_resize)
    streams = d.training_batches(zoo, **request), d.array_batches(zoo, **request)
    for theirs, ours in islice(zip(*streams), 4):
        np.testing.assert_array_equal(theirs[1].numpy(), ours[1])
        difference = np.abs(theirs[0].numpy().astype(int) - ours[0])
        # decoding part of a JPEG does not see the colours next to the part
        assert (difference > 0).mean() < 0.05 and difference[:, :, 6:-6].max() <= 1


@pytest.mark.parametrize("image_resize", RESIZES)
def test_fine_tuning_sees_the_validation_crop(sample, image_resize):
    request = dict(image_size=32, global_batch_size=16, preprocessing="validation", seed=2)
    request["image_resize"] = image_resize
    images, labels = next(iter(d.training_batches(sample, **request)))
    same, same_labels = next(d.array_batches(sample, **request))
    check_close(images, same, rtol=0, atol=1)
    every, _ = d.load_arrays(sample, "train", 32, image_resize)
    np.testing.assert_array_equal(same, every[d.epoch_order(sample.train_count, 2, 0)[:16]])
    np.testing.assert_array_equal(labels, same_labels)


@pytest.mark.parametrize("image_resize", RESIZES)
def test_real_pictures_decode_alike(real, image_resize):
    batch = 64 if real.num_classes == 10 else 12
    for image_size in (64, 224) if batch == 12 else (64,):
        readers = d.validation_batches, d.validation_arrays
        readers = [f(real, image_size, batch, image_resize=image_resize) for f in readers]
        for theirs, ours in zip(*readers):
            for a, b in zip(theirs, ours):
                check_close(a, b, rtol=0, atol=1)  # 0 on x86


def test_real_pictures_of_every_shape(real):
    if real.num_classes == 10:
        pytest.skip("one shape only")
    for i in range(real.train_count):
        encoded, size = d._read(real, "train", i)
        theirs = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(theirs, d._decode(encoded))
        assert theirs.shape[:2] == size


# --- order -----------------------------------------------------------------------------------


@quick
@given(
    count=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 400),
    run=st.sampled_from([1, 3, 64]),
    pool=st.sampled_from([1, 4, 256]),
)
def test_every_epoch_is_a_permutation(count, seed, epoch, run, pool):
    order = d.epoch_order(count, seed, epoch, run, pool)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_orders_are_uniform():
    # where picture 0 lands, over seeds and epochs
    places = [np.flatnonzero(d.epoch_order(8, s, e) == 0)[0] for s in range(40) for e in range(40)]
    counts = np.bincount(places, minlength=8)
    assert np.abs(counts - 200).max() < 4 * 200**0.5


@quick
@given(
    count=st.integers(40, 300),
    batch=st.sampled_from([12, 24, 36]),
    shards=st.sampled_from([1, 2, 3, 4, 6]),
    run=st.sampled_from([1, 5]),
)
def test_processes_share_each_batch(count, batch, shards, run):
    for update in (0, 1, 7, 1000):
        parts = []
        for index in range(shards):
            local = batch // shards
            plan = d._Plan(count, 3, batch, local, index * local, run)
            pictures, places = plan.take(update, 0, local)
            parts.append(pictures)
            assert (places // count == update // (count // batch)).all()
        whole = d._Plan(count, 3, batch, batch, 0, run).take(update, 0, batch)[0]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert len(set(whole)) == batch


def test_streams_of_processes_and_chunks(sample, monkeypatch):
    whole = next(islice(d.training_batches(sample, 16, 24, first_update=3), 1))
    parts = [
        next(iter(d.training_batches(sample, 16, 24, first_update=3, shard=(i, 3))))
        for i in range(3)
    ]
    monkeypatch.setattr(d, "_CHUNK", 7)
    chunked = next(iter(d.training_batches(sample, 16, 24, first_update=3)))
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])
        np.testing.assert_array_equal(chunked[i], whole[i])


@quick
@given(count=st.integers(0, 50), batch=st.integers(1, 16), shards=st.integers(1, 5))
def test_every_validation_picture_counts_once(count, batch, shards):
    class Counted:
        validation_count = count

    ids = [d._validation_ids(Counted, batch, (index, shards)) for index in range(shards)]
    assert len({part.shape for part in ids}) == 1  # all processes take as many steps
    real = np.concatenate([part[part >= 0] for part in ids])
    np.testing.assert_array_equal(np.sort(real), np.arange(count))


def test_large_sets_keep_their_list_and_read_in_runs(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(d, "_LARGE", 0)
    announced = []
    announce = d._announce
    monkeypatch.setattr(d, "_announce", lambda *a: (announced.append(len(a[1])), announce(*a)))
    first = d.open_data(sample.root, cache_dir=tmp_path)
    assert capsys.readouterr().out.count("once (kept in") == 2
    monkeypatch.setattr(d, "_list_tfrecord", None)  # the list is not made again
    second = d.open_data(sample.root, cache_dir=tmp_path)
    for found in (first, second):
        for split in ("train", "validation"):
            for a, b in zip(found.splits[split], sample.splits[split]):
                np.testing.assert_array_equal(a, b)
        assert found.class_names == sample.class_names
    assert d._plan(second, 32, 0, (0, 1)).run == 64
    images, labels = next(iter(d.training_batches(second, 16, 32)))
    assert images.shape == (32, 16, 16, 3) and announced
    monkeypatch.undo()
    monkeypatch.setattr(d, "_LARGE", 0)
    for kept in (tmp_path / "lists").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])  # a damaged list is made again
    d.open_data(sample.root, cache_dir=tmp_path)
    assert capsys.readouterr().out.count("once (kept in") == 2


def test_coming_run_is_what_is_read_later():
    plan = d._Plan(count=64 * 600, seed=1, batch=64, local=64, first=0, run=64)
    announced = np.concatenate([plan.coming(update, 0) for update in range(256)])
    later = np.concatenate([plan.take(update, 0, 64)[0] for update in range(256, 512)])
    np.testing.assert_array_equal(np.sort(announced), np.sort(later))


# --- crops -----------------------------------------------------------------------------------


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
    assert 0.003 < share(ours(aspects=d._ASPECTS["modern"])) < 0.009
    drawn, draw = [], d.draw_crops  # the readers ask for them
    monkeypatch.setattr(
        d, "draw_crops", lambda *a, **k: (drawn.append(k["aspects"]), draw(*a, **k))[1]
    )
    for reader in d._READERS:
        for image_resize in d._RESIZES:
            drawn.clear()
            next(iter(d.training_batches(sample, 16, 8, reader=reader, image_resize=image_resize)))
            assert set(drawn) == {(0.75, 1.33) if image_resize == "published" else (3 / 4, 4 / 3)}


def test_boxes_travel_with_their_picture(tmp_path):
    sides = dict(ymin=[0.1, 0.9], xmin=[0.2, 0.9], ymax=[0.5, 1.5], xmax=[0.6, 0.95])
    sides = {f"image/object/bbox/{k}": v for k, v in sides.items()}
    boxed = record(encode(picture(120, 160)), **sides)
    plain = record(encode(picture(120, 160)), **dict.fromkeys(sides, []))
    write(tmp_path, "train", [plain, boxed, plain])
    split = d.open_data(tmp_path, verbose=False).splits["train"]
    assert list(split.box_begin) == [0, 0, 2, 2]
    check_close(split.boxes, [[0.1, 0.2, 0.5, 0.6], [0.9, 0.9, 1.0, 0.95]], rtol=1e-6)


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
    streams = [d.training_batches(data, **request, reader=reader) for reader in d._READERS]
    streams += [f(data, row["size"], 1) for f in (d.validation_batches, d.validation_arrays)]
    for stream in streams:
        is_published(one_batch(stream)[0], row, "validation")
    for split in ("train", "validation"):
        is_published(d.load_arrays(data, split, row["size"])[0][0], row, "validation")


@pytest.mark.parametrize("i", range(len(VECTORS)))
@pytest.mark.parametrize("resident", [True, False])
def test_training_crops_are_the_published_ones(vector_set, monkeypatch, i, resident):
    row, data = VECTORS[i], vector_set[i]
    monkeypatch.setattr(d, "draw_crops", lambda *a, **k: np.array([row["crop"]], np.int32))
    monkeypatch.setattr(d, "draw_flips", lambda *a: np.array([row["flip"]]))
    monkeypatch.setattr(d, "fits_device", lambda dataset: resident)
    for reader in ["jax"] if not resident else d._READERS:
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
    part = np.zeros((1, 2), "float32"), np.array([flip])
    at = image.reshape(-1, 3), zero, np.array([old[1]], np.int32)
    side = min(new[0], 64)  # a part of it, so that few programs are compiled
    side = 1 << (side.bit_length() - 1)
    found = np.asarray(d._cutter("published")(*at, whole, scale, *part, side))[0]
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
    assert d.validation_window(height, width, image_size) == (tuple(new), tuple(corner))
    size, at = d._tf_window(tf.constant([height, width, 3]), image_size, "published")
    assert (list(size.numpy()), [int(a) for a in at]) == (new, corner)


@pytest.mark.parametrize("image_resize", d._RESIZES)
@pytest.mark.parametrize("image_size", [1, 6, 64])
def test_extreme_shapes_agree(tmp_path, image_size, image_resize):
    shapes = [(1, 1), (1, 10_000), (10_000, 1), (2, 3), (41, 41), (5, 300), (600, 7)]
    records = [record(encode(picture(*shape, i), "PNG")) for i, shape in enumerate(shapes)]
    write(tmp_path, "train", records), write(tmp_path, "validation", records)
    data, n = d.open_data(tmp_path, verbose=False), len(shapes)
    how = dict(image_resize=image_resize)
    (theirs,) = d.validation_batches(data, image_size, n, **how)
    (ours,) = d.validation_arrays(data, image_size, n, **how)
    np.testing.assert_array_equal(theirs[0], ours[0])
    for preprocessing in ("train", "validation"):
        how["preprocessing"] = preprocessing
        streams = [d.training_batches(data, image_size, n, reader=r, **how) for r in d._READERS]
        for tensors, arrays, device in islice(zip(*streams), 2):
            np.testing.assert_array_equal(tensors[0], arrays[0])
            atol = 0 if image_resize == "published" else 1  # compilers fuse products and sums
            check_close(np.asarray(device[0]), arrays[0], rtol=0, atol=atol)


def test_modern_resize_is_todays():
    "What runs from before the field was there were trained with: half-pixel centers, rounded"
    for i, (old, new) in enumerate(
        [((30, 40), (17, 23)), ((9, 7), (50, 60)), ((200, 5), (64, 64))]
    ):
        image = picture(*old, i)
        theirs = np.rint(tf.image.resize(image, new).numpy()).astype(np.uint8)
        np.testing.assert_array_equal(d.resize(image, new, image_resize="modern"), theirs)
    assert d.validation_window(332, 500, 224, "modern") == ((256, 386), (16, 81))
    assert d._ASPECTS["modern"] == (3 / 4, 4 / 3)


@pytest.mark.skipif(not d._has_fast_dct(), reason="simplejpeg")
def test_jpegs_of_published_cases_are_decoded_fast(sample, tmp_path, monkeypatch, capsys):
    encoded = [d._read(sample, "train", i)[0] for i in range(50)]
    theirs = [tf.io.decode_jpeg(e, dct_method="INTEGER_FAST").numpy() for e in encoded]
    for a, b in zip(encoded, theirs):
        np.testing.assert_array_equal(d._decode(a, fast=True), b)
    accurate = [d._decode(e).astype(int) for e in encoded]
    assert 0.5 < np.mean([np.abs(a - b).mean() for a, b in zip(accurate, theirs)]) < 1.5
    kept = {how: d.load_arrays(sample, "validation", 32, how)[0] for how in d._RESIZES}
    d._say_accurate.cache_clear()
    monkeypatch.setattr(d, "_has_fast_dct", lambda: False)  # Pillow alone: it is said, once
    for how in 2 * d._RESIZES:
        images, _ = d.load_arrays(sample, "validation", 32, how)
        assert np.array_equal(images, kept[how]) == (how == "modern")
    assert capsys.readouterr().out.count("accurate DCT") == 1
    d._say_accurate.cache_clear()
    next(d.array_batches(sample, 16, 8, image_resize="modern"))
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


# --- without TensorFlow ----------------------------------------------------------------------


def test_no_tensorflow_needed(cache, sample):
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["jax"] = None
from effnet_repro.data import *
data = open_data(verbose=False)
images, labels = next(array_batches(data, 32, 8))
assert images.shape == (8, 32, 32, 3) and labels.dtype == "int32"
assert sum(mask.sum() for _, _, mask in validation_arrays(data, 16, 128)) == 300
print("fine")
"""
    environment = {**os.environ, "EFFNET_REPRO_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.split() == [b"fine"], done.stderr.decode()


def test_an_abandoned_stream_stops(sample):
    stream = d.array_batches(sample, 16, 8)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


# --- fingerprints ----------------------------------------------------------------------------


def folders(root, contents):
    "Class folders: split/class/name -> bytes"
    for place, data in contents.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(data)
    return root


def bmp(seed):
    return d._bmp(picture(8, 8, seed))  # all of one length


FOLDERS = {
    f"{s}/{c}/{i}.bmp": bmp(len(s) + ord(c) * 2 + int(i))
    for s in ("train", "val")
    for c in "ab"
    for i in "01"
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "change", ["added", "removed", "moved", "renamed", "a byte", "length", "swapped"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_split_has_another_fingerprint(tmp_path, monkeypatch, split, change, whole):
    if not whole:
        monkeypatch.setattr(d, "_WHOLE", 0)
    at, files = {"train": "train", "validation": "val"}[split], dict(FOLDERS)
    one = f"{at}/a/0.bmp"
    if change == "added":
        files[f"{at}/a/2.bmp"] = bmp(2)
    elif change in ("removed", "moved", "renamed"):
        data = files.pop(one)
        files.update(
            {"moved": {f"{at}/b/2.bmp": data}, "renamed": {f"{at}/a/x.bmp": data}}.get(change, {})
        )
    elif change == "swapped":
        a, b = ({k: v for k, v in files.items() if f"{at}/{c}/" in k} for c in "ab")
        files.update(zip(a, b.values()), **dict(zip(b, a.values())))
    else:
        files[one] = files[one] + b"\0" if change == "length" else files[one][:-1] + b"\1"
    found = [
        d.open_data(folders(tmp_path / n, f), verbose=False) for n, f in zip("xy", (FOLDERS, files))
    ]
    before, after = (data.split_fingerprint(split) for data in found)
    other = {"train": "validation", "validation": "train"}[split]
    assert before != after
    assert len({data.split_fingerprint(other) for data in found}) == 1


def test_fingerprints_of_other_layouts(tmp_path, cache, sample):
    records = [record(encode(picture(40, 50, i)), label=i % 2 + 1) for i in range(4)]
    marks = []
    for name, these in [
        ("a", records),
        ("order", records[::-1]),
        ("label", records[:3] + [record(encode(picture(40, 50, 3)), label=1)]),
        (
            "name",
            [
                record(
                    encode(picture(40, 50, i)),
                    label=i % 2 + 1,
                    **{"image/class/text": str(i % 2 + 5)},
                )
                for i in range(4)
            ],
        ),
    ]:
        write(tmp_path / name, "validation", these)
        marks.append(d.open_data(tmp_path / name, verbose=False).split_fingerprint("validation"))
    assert len(set(marks)) == 4
    monkey = os.getcwd()
    os.chdir(tmp_path)
    try:  # a relative path is the same data
        assert d.open_data("a", verbose=False).split_fingerprint("validation") == marks[0]
    finally:
        os.chdir(monkey)
    assert sample.split_fingerprint("train") != sample.split_fingerprint("validation")
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        sample.split_fingerprint("test")


# --- what tools leave ------------------------------------------------------------------------

LEFT_FOLDERS = """.ipynb_checkpoints .git .thumbnails .Trash-1000 .AppleDouble .cache @eaDir @tmp __MACOSX
lost+found $RECYCLE.BIN RECYCLER System_Volume_Information __pycache__ #recycle #snapshot ~snapshot""".split()
LEFT_FILES = "._x.jpg .x.jpg .hidden.png @x.jpg ~x.jpg".split()


@pytest.mark.parametrize("name", LEFT_FOLDERS)
def test_folders_that_tools_leave_are_no_classes(tmp_path, capsys, name):
    name, clean = name.replace("_V", " V").replace("_I", " I"), folders(tmp_path / "clean", FOLDERS)
    litter = {
        f"{at}{name}/x-checkpoint.jpg": encode(picture())
        for at in ("", "train/", "val/", "train/a/")
    }
    places = [folders(tmp_path / "littered", {**FOLDERS, **litter}), clean]
    found, expected = (d.open_data(place, verbose=False) for place in places)
    assert found.class_names == ("a", "b") and found.num_classes == 2
    for split in ("train", "validation"):
        assert found.split_fingerprint(split) == expected.split_fingerprint(split)
    assert found.fingerprint == expected.fingerprint
    said = capsys.readouterr().out
    assert said.count(f"{name} is not taken for a class") == (0 if name.startswith(".") else 2)


@pytest.mark.parametrize("name", LEFT_FILES)
def test_files_that_tools_leave_are_no_images(tmp_path, name):
    "AppleDouble files have an image's name and are none"
    litter = {
        f"{split}/{c}/{name}": b"\0\5\26\7not an image" for split in ("train", "val") for c in "ab"
    }
    found = d.open_data(
        folders(tmp_path / "a", {**FOLDERS, **litter}),
        verbose=False,
        cache_dir=tmp_path,
        on_corrupt="skip",
    )
    assert (found.train_count, found.validation_count, found.damaged) == (4, 4, ())
    (tmp_path / "a/train/a/album.jpg").mkdir()  # a folder is no image either
    assert d.open_data(tmp_path / "a", verbose=False).train_count == 4
    only = folders(tmp_path / "b", {**FOLDERS, f"train/c/{name}": b"x", "train/c/Thumbs.db": b"x"})
    with pytest.raises(ValueError, match="class folder .*c holds no picture"):
        d.open_data(only)


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_split_of_nothing_but_what_tools_leave_is_not_there(tmp_path, split):
    files = {k: v for k, v in FOLDERS.items() if not k.startswith(split)}
    files[f"{split}/.ipynb_checkpoints/x.jpg"] = encode(picture())
    files[f"{split}/.DS_Store"] = b"x"
    found = d.open_data(folders(tmp_path, files), verbose=False)
    assert (found.train_count, found.validation_count) == (
        (4, 4) if split == "validation" else (0, 4)
    )


@pytest.mark.parametrize("inner", ["", "split"])
def test_records_and_cifar_files_that_tools_leave(tmp_path, inner):
    names = "._{0} .{0} {0}~ {0}:Zone.Identifier {0}@SynoEAStream @eaDir/{0}".split()
    for split in ("train", "validation"):
        place = write(tmp_path / (split if inner else ""), split, [record()])
        for name in names:
            left = place / name.format(f"{split}-00000-of-00001")
            left.parent.mkdir(exist_ok=True)
            left.write_bytes(b"\0\5\26\7not a record")
    found = d.open_data(tmp_path, verbose=False)
    assert (found.format, found.files) == ("tfrecord", {"train": 1, "validation": 1})
    (tmp_path / "c").mkdir()
    (tmp_path / "c/data_batch_1.bin").write_bytes(bytes(3073))
    (tmp_path / "c/._data_batch_1.bin").write_bytes(b"x")
    assert d.open_data(tmp_path / "c", verbose=False).train_count == 1


def test_what_tools_leave_is_no_data_set(tmp_path):
    for name in ("._train-00000-of-00001", "__MACOSX/train/x.jpg", ".train/a/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="No data set in"):
        d.open_data(tmp_path)
