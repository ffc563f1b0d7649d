"""Folders that are opened: layouts, classes, fingerprints, what tools leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images import FOLDERS, ROOT, bmp, encode, folders, record, smooth_image, write

from effnet_repro import data as d
from effnet_repro.data import catalog, decode, layouts, request
from effnet_repro.data import sample as sample_module
from effnet_repro.testing import test_allclose as check_close

check_close.__test__ = False


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
            (tmp_path / split / name / "x.JPEG").write_bytes(encode(smooth_image()))
            (tmp_path / split / name / "notes.txt").write_text("not an image")
    found = d.open_data(tmp_path, verbose=False)
    assert found.format == "folder" and found.class_names == ("a", "b")
    assert list(found.splits["validation"].label) == [1]
    (tmp_path / validation / "c").mkdir()
    with pytest.raises(ValueError, match="does not have: c"):
        d.open_data(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="class folder .*c holds no image"):
        d.open_data(tmp_path)


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(tmp_path, hundred):
    pixels = np.stack([smooth_image(32, 32, i) for i in range(6)])
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
        np.testing.assert_array_equal(
            decode.decode_image(decode.read_encoded(found, "train", i)[0]), pixels[i]
        )
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
        (d.make_example({"image/class/label": 1}), "Record 1 of .* is not an image"),
        (d.make_example({"image/encoded": b"x"}), "Record 1 of .* is not an image"),
        (record(encoded=[b"x", b"y"]), "Record 1 of .* is not an image"),
        (b"\x0a\x7fcut", "Record 1 of .* is not an image"),
        (record(**{"image/object/bbox/xmin": [0.1]}), "The boxes .* in record 1 of"),
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
    with pytest.raises(FileNotFoundError, match="No images"):
        d.open_data(tmp_path, "cifar")
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        d.training_batches(sample, 32, 8, preprocessing="valid")
    with pytest.raises(ValueError, match="area_min=0"):
        d.numpy_batches(sample, 32, 8, area_min=0)
    with pytest.raises(ValueError, match=r"shard=\(0, 3\)"):
        d.training_batches(sample, 32, 8, shard=(0, 3))
    with pytest.raises(ValueError, match="Unknown split"):
        d.load_arrays(sample, "test", 32)


@pytest.mark.parametrize("read", ["training_batches", "numpy_batches", "validation_batches"])
@pytest.mark.parametrize(
    "given, message",
    [
        (("images", 32, 8), "`dataset` must come from `open_data`. Received: dataset='images'"),
        ((None, "32", 8), "`image_size` must be a whole number from 1. Received: image_size='32'"),
        ((None, 32, 0), "`(batch|global_batch_size)` must be a whole number from 1"),
    ],
)
def test_wrong_arguments_of_readers_are_named(sample, read, given, message):
    dataset, *sizes = given
    with pytest.raises(ValueError, match=message):
        getattr(d, read)(dataset or sample, *sizes)
    if sizes[1]:
        with pytest.raises(ValueError, match=message):
            d.load_arrays(dataset or sample, "train", sizes[0])


# --- sample set ------------------------------------------------------------------------------


def test_sample_set_is_written_whole_or_not(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "train-00000-of-00002").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_module, "_write_sample_set", fail)
    with pytest.raises(KeyboardInterrupt):
        d.sample_set(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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
    monkeypatch.setattr(sample_module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-image.*data_dir"):
        d.open_data(cache_dir=tmp_path)


def test_large_sets_keep_their_list_and_read_in_runs(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layouts, "LARGE", 0)
    announced = []
    announce = request.announce
    monkeypatch.setattr(request, "announce", lambda *a: (announced.append(len(a[1])), announce(*a)))
    first = d.open_data(sample.root, cache_dir=tmp_path)
    assert capsys.readouterr().out.count("once (kept in") == 2
    monkeypatch.setattr(layouts, "_list_tfrecord", None)  # the list is not made again
    second = d.open_data(sample.root, cache_dir=tmp_path)
    for found in (first, second):
        for split in ("train", "validation"):
            for a, b in zip(found.splits[split], sample.splits[split]):
                np.testing.assert_array_equal(a, b)
        assert found.class_names == sample.class_names
    assert request.batch_order(second, 32, 0, (0, 1)).run == 64
    images, labels = next(iter(d.training_batches(second, 16, 32)))
    assert images.shape == (32, 16, 16, 3) and announced
    monkeypatch.undo()
    monkeypatch.setattr(layouts, "LARGE", 0)
    for kept in (tmp_path / "lists").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])  # a damaged list is made again
    d.open_data(sample.root, cache_dir=tmp_path)
    assert capsys.readouterr().out.count("once (kept in") == 2


def test_boxes_travel_with_their_image(tmp_path):
    sides = dict(ymin=[0.1, 0.9], xmin=[0.2, 0.9], ymax=[0.5, 1.5], xmax=[0.6, 0.95])
    sides = {f"image/object/bbox/{k}": v for k, v in sides.items()}
    boxed = record(encode(smooth_image(120, 160)), **sides)
    plain = record(encode(smooth_image(120, 160)), **dict.fromkeys(sides, []))
    write(tmp_path, "train", [plain, boxed, plain])
    split = d.open_data(tmp_path, verbose=False).splits["train"]
    assert list(split.box_begin) == [0, 0, 2, 2]
    check_close(split.boxes, [[0.1, 0.2, 0.5, 0.6], [0.9, 0.9, 1.0, 0.95]], rtol=1e-6)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "change", ["added", "removed", "moved", "renamed", "a byte", "length", "swapped"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_split_has_another_fingerprint(tmp_path, monkeypatch, split, change, whole):
    if not whole:
        monkeypatch.setattr(catalog, "_WHOLE", 0)
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


def test_fingerprints_of_other_layouts(tmp_path, cache_dir, sample):
    records = [record(encode(smooth_image(40, 50, i)), label=i % 2 + 1) for i in range(4)]
    marks = []
    for name, these in [
        ("a", records),
        ("order", records[::-1]),
        ("label", records[:3] + [record(encode(smooth_image(40, 50, 3)), label=1)]),
        (
            "name",
            [
                record(
                    encode(smooth_image(40, 50, i)),
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
        f"{at}{name}/x-checkpoint.jpg": encode(smooth_image())
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
    with pytest.raises(ValueError, match="class folder .*c holds no image"):
        d.open_data(only)


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_split_of_nothing_but_what_tools_leave_is_not_there(tmp_path, split):
    files = {k: v for k, v in FOLDERS.items() if not k.startswith(split)}
    files[f"{split}/.ipynb_checkpoints/x.jpg"] = encode(smooth_image())
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
