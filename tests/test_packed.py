"""Packed sets: smaller images, crops drawn as before, whole after an interruption, read like any set."""

import errno
import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from images import encode, folders, record, smooth_image, write

from effnet_repro import cli
from effnet_repro import data as d
from effnet_repro.data import decode, packed, request

BOX = {
    f"image/object/bbox/{side}": value
    for side, value in zip(("ymin", "xmin", "ymax", "xmax"), ([0.1], [0.2], [0.7], [0.9]))
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "JPEGs, one of them small, a gray one and a PNG; every third has a box"
    folder, records = tmp_path_factory.mktemp("source"), []
    for i in range(11):
        kind = dict(kind="PNG") if i == 4 else dict(mode="L") if i == 5 else {}
        size = (30, 40) if i == 2 else (90 + 3 * i, 160 - 5 * i)
        more = BOX if i % 3 == 0 else {}
        records.append(record(encode(smooth_image(*size, i), **kind), 1 + i % 2, **more))
    write(folder, "train", records)
    write(folder, "validation", records[:5])
    names = [{"label": 1, "text": "cat"}, {"label": 2, "text": "dog"}]
    (folder / "info.json").write_text(json.dumps({"num_classes": 3, "classes": names}))
    return d.open_data(folder, verbose=False)


def packing(form, **more):
    return packed.Packing(form, **{"short_side": 64, "in_a_part": 4, **more})


@pytest.fixture(scope="module", params=packed.FORMS)
def made(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    packed.pack(source, folder, packing(request.param), 1, say=lambda line: None)
    return d.open_data(folder, verbose=False)


def test_a_packed_set_is_a_set_like_any(source, made):
    assert made.format == {"jpeg": "tfrecord"}.get(made.format, made.format) in ("tfrecord", "raw")
    assert made.class_names == source.class_names == ("cat", "dog", "2")
    assert made.files == ({"train": 3, "validation": 2})
    for split in ("train", "validation"):
        ours, theirs = made.splits[split], source.splits[split]
        np.testing.assert_array_equal(ours.label, theirs.label)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=1e-6)
        np.testing.assert_array_equal(ours.box_begin, theirs.box_begin)
        for i in range(len(theirs.label)):
            size = decode.read_encoded(source, split, i)[1]
            assert tuple(ours.original[i]) == size
            data, stored = decode.read_encoded(made, split, i)
            assert min(stored) == min(64, *size) and decode.decode_image(data).shape[:2] == stored


def test_images_look_as_before(source, made):
    for i in range(source.train_count):
        before = decode.decode_image(decode.read_encoded(source, "train", i)[0])
        after = decode.decode_image(decode.read_encoded(made, "train", i)[0])
        assert abs(before.mean((0, 1)) - after.mean((0, 1))).max() < 2


def test_a_small_jpeg_is_copied(source, tmp_path):
    packed.pack(source, tmp_path, packing("jpeg"), 1, say=lambda line: None)
    there = d.open_data(tmp_path, verbose=False)
    assert decode.read_encoded(there, "train", 2) == decode.read_encoded(source, "train", 2)


def test_crops_are_drawn_on_the_originals(source, made):
    order = request.batch_order(source, 11, 3, (0, 1))
    ours, theirs = (
        request.TrainRequest(data, order, 32).read_images(*order.take(0, 0, 11))
        for data in (made, source)
    )
    np.testing.assert_array_equal(ours.flips, theirs.flips)
    for i, number in enumerate(theirs.numbers):
        full, small = (decode.read_encoded(x, "train", number)[1] for x in (source, made))
        scale = np.tile(np.array(small) / full, 2)
        assert abs(ours.crops[i] - theirs.crops[i] * scale).max() <= 1
        top, left, height, width = ours.crops[i]
        assert min(height, width) >= 1 and top + height <= small[0] and left + width <= small[1]


def test_scaled_crops_stay_inside():
    crops = np.array([[99, 0, 1, 300], [0, 0, 100, 300], [50, 299, 50, 1]])
    sizes, small = np.array([[100, 300]] * 3), np.array([[10, 30]] * 3)
    found = request.scale_crops(crops, sizes, small)
    np.testing.assert_array_equal(found, [[9, 0, 1, 30], [0, 0, 10, 30], [5, 29, 5, 1]])


@pytest.mark.parametrize("reader", ["numpy", "tensorflow", "jax"])
def test_readers_agree_on_packed_sets(made, reader):
    how = dict(seed=1, image_resize="modern")
    theirs = islice(d.numpy_batches(made, 24, 5, **how), 3)
    ours = d.training_batches(made, 24, 5, reader=reader, **how)
    for (a, b), (c, e) in zip(ours, theirs):
        difference = np.abs(np.asarray(a).astype(int) - c)
        assert (difference > 1).mean() < 0.05  # TensorFlow decodes part of a JPEG
        np.testing.assert_array_equal(b, e)


@pytest.mark.parametrize("form", packed.FORMS)
def test_an_interrupted_packing_goes_on(source, tmp_path, form, monkeypatch):
    calls = []
    image = packed._Part._image

    def failing(self, split, number):
        calls.append(number)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return image(self, split, number)

    monkeypatch.setattr(packed._Part, "_image", failing)
    with pytest.raises(KeyboardInterrupt):
        packed.pack(source, tmp_path / "a", packing(form), 1, say=lambda line: None)
    monkeypatch.undo()
    assert not (tmp_path / "a" / "info.json").exists()
    done = packed.pack(source, tmp_path / "a", packing(form), 1, say=lambda line: None)
    assert done["train"]["found"] >= 1
    packed.pack(source, tmp_path / "b", packing(form), 1, say=lambda line: None)
    whole = sorted(p for p in (tmp_path / "b").iterdir())
    assert [p.name for p in whole] == sorted(
        p.name for p in (tmp_path / "a").iterdir() if p.name[0] != "."
    )
    for path in whole:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("form", packed.FORMS)
def test_a_damaged_part_is_written_again(source, tmp_path, form):
    packed.pack(source, tmp_path, packing(form), 1, say=lambda line: None)
    path = next(
        p for p in sorted(tmp_path.iterdir()) if "train-00001" in p.name and "index" not in p.name
    )
    good = path.read_bytes()
    path.write_bytes(good[:300] + bytes([good[300] ^ 1]) + good[301:])
    done = packed.pack(source, tmp_path, packing(form), 1, say=lambda line: None)
    assert path.read_bytes() == good and done["train"]["found"] == 2


def test_damaged_pixels_are_left_out(source, tmp_path):
    packed.pack(source, tmp_path / "p", packing("raw"), 1, say=lambda line: None)
    whole = d.open_data(tmp_path / "p", cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    assert whole.damaged == ()
    split = whole.splits["train"]
    path, at = split.files[split.file[6]], int(split.offset[6])
    good = open(path, "rb").read()
    open(path, "wb").write(good[: at + 50] + bytes([good[at + 50] ^ 1]) + good[at + 51 :])
    os.utime(path, (1, 1))  # other times: what is kept of before does not count
    left = d.open_data(tmp_path / "p", cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    assert left.train_count == 10 and "checksum of the pixels" in left.damaged[0]
    assert len(left.splits["train"].original) == len(left.splits["train"].stored) == 10


def test_an_image_too_long_for_a_jpeg_is_packed(tmp_path):
    long = encode(smooth_image(40, 65_600), "PNG")
    source = d.open_data(folders(tmp_path / "a", {"train/a/x.png": long}), verbose=False)
    packed.pack(source, tmp_path / "b", packing("jpeg", short_side=32), 1, say=lambda line: None)
    found = d.open_data(tmp_path / "b", verbose=False)
    (ours, _), (theirs, _) = (d.load_arrays(x, "train", 8, "modern") for x in (found, source))
    assert np.abs(ours.astype(int) - theirs).mean() < 12


def test_several_writers_write_the_same(source, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        packed.pack(source, tmp_path / name, packing("jpeg"), workers, say=lambda line: None)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_is_refused(source, tmp_path):
    packed.pack(source, tmp_path / "a", packing("jpeg"), 1, say=lambda line: None)
    with pytest.raises(ValueError, match=r"packed otherwise \(short_side\)"):
        packed.pack(source, tmp_path / "a", packing("jpeg", short_side=48), 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        packed.pack(source, tmp_path / "b", packing("jpeg"), 1)
    with pytest.raises(
        ValueError, match="`quality` must lie between 1 and 100. Received: quality=0"
    ):
        packed.pack(source, tmp_path / "c", packing("jpeg", quality=0), 1)


def test_a_damaged_image_is_named(tmp_path):
    good = encode(smooth_image())
    write(tmp_path / "s", "train", [record(good), record(good[:200] + b"\xff\xd9")])
    data = d.open_data(tmp_path / "s", verbose=False)
    with pytest.raises(ValueError, match="image 1 of the train split, at byte"):
        packed.pack(data, tmp_path / "p", packing("jpeg"), 1)


@pytest.mark.parametrize("form", packed.FORMS)
def test_a_disk_that_fills_up_is_named(source, tmp_path, form, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = {"jpeg": "train-00000-of-00003", "raw": "pixels-train-00000-of-00003.npy"}[form]
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=f"Cannot write .*{name}: No space left.*Make room") as error:
        packed.pack(source, tmp_path, packing(form), 1, say=lambda line: None)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["pack.json", ".info.json"])
def test_a_small_file_that_cannot_be_written_is_named(source, tmp_path, monkeypatch, name):
    write_text = Path.write_text

    def full(path, *text, **how):
        if path.name == name:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return write_text(path, *text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"Cannot write .*{name.strip('.')}: File too large"):
        packed.pack(source, tmp_path / "p", packing("jpeg"), 1, say=lambda line: None)


def test_no_more_processes_than_parts(source, tmp_path, monkeypatch):
    asked = []

    class Team(packed.Team):
        def __init__(self, job, room, count):
            asked.append(count)
            super().__init__(job, None, 1)

    monkeypatch.setattr(packed, "Team", Team)
    packed.pack(source, tmp_path, packing("jpeg"), 10**20, say=lambda line: None)
    assert asked == [5]  # three of training images, two of validation images


def test_class_folders_are_shuffled(tmp_path):
    images = {f"train/{c}/{i}.jpg": encode(smooth_image(40, 40, i)) for c in "ab" for i in range(8)}
    data = d.open_data(folders(tmp_path / "s", images), verbose=False)
    packed.pack(data, tmp_path / "p", packing("jpeg"), 1, say=lambda line: None)
    label = d.open_data(tmp_path / "p", verbose=False).splits["train"].label
    assert sorted(label) == [0] * 8 + [1] * 8 and list(label) != sorted(label)


def test_the_command(source, tmp_path, capsys):
    words = [str(tmp_path / "p"), "--data-dir", source.root, "--short-side", "48", "--workers", "1"]
    assert cli.pack_command(words) == 0
    said = capsys.readouterr().out
    assert "16 images" in said and "effnet-train B0-G16-LN_PN-Half_16IPU_2x8 --data-dir" in said
    assert cli.pack_command(words) == 0 and "2 files were there already" in capsys.readouterr().out
    assert cli.pack_command([*words, "--quality", "0"]) == 2
    assert cli.pack_command([*words, "--form", "raw"]) == 1
    assert "packed otherwise (form)" in capsys.readouterr().err
    assert os.path.exists(tmp_path / "p" / "info.json")


@pytest.mark.parametrize(
    "field, value", [("size", 2**30), ("offset", 10**15), ("offset", -1), ("label", -1)]
)
def test_an_index_with_impossible_numbers_is_refused(tmp_path, field, value):
    write(tmp_path / "a", "train", [record(encode(smooth_image(40, 50, i))) for i in range(2)])
    packed.pack(
        d.open_data(tmp_path / "a", verbose=False), tmp_path / "b", packed.Packing("raw"), 1
    )
    (path,) = (tmp_path / "b").glob("index-train-*")
    index = np.load(path)
    index[field][1] = value
    np.save(path, index)
    with pytest.raises(ValueError, match="index-train-.* does not fit pixels-train.*Pack again"):
        d.open_data(tmp_path / "b")
    header = path.read_bytes().replace(b"(2,)", b"(9,)")
    path.write_bytes(header)
    with pytest.raises(ValueError, match="index-train-.*is no index"):
        d.open_data(tmp_path / "b")
