"""What is odd about a set and does not stop it is said: files that are not read, classes without images, lost parts.

A row is kind -> what is added to or taken from a good set -> words of the line that says so, or of a refusal.
"""

import errno
import os
import re
import shutil

import numpy as np
import pytest
from images import FOLDERS, bmp, encode, folders, record, smooth_image, write

from effnet_repro import data as d
from effnet_repro.data import packed

JPEG = encode(smooth_image(8, 9))
TRAIN = {k: v for k, v in FOLDERS.items() if k.startswith("train")}


def named(label, text):
    return record(label=label, **{"image/class/text": text})


SAID = {  # kind: (training records, validation records, other files, what is said)
    "records beside class folders": ([record()], [], {"train/a/0.jpg": JPEG}, "from TFRecords in .*train is not read"),
    "an empty file": ([record()], [], {"train-1": b""}, "no records are in train-1"),
    "a class that does not train": ([record()], [record(label=2)], {}, "no training images of 1, though"),
    "an info.json of another order": (
        [named(1, "cat"), named(2, "dog")], [],
        {"info.json": b'{"classes": [{"label": 1, "text": "dog"}, {"label": 2, "text": "cat"}]}'},
        "calls label 1 'dog', and records call it 'cat'",
    ),
    "an info.json that speaks of more": (
        [record()], [], {"info.json": b'{"splits": {"train": {"records": 9}}}'}, "speaks of 9 train images; 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAID)
def test_what_is_odd_about_records_is_said(tmp_path, capsys, kind):
    train, validation, files, said = SAID[kind]
    write(folders(tmp_path, files), "train", train)
    found = d.open_data(write(tmp_path, "validation", validation))
    assert (found.train_count, found.validation_count) == (len(train), len(validation))
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("splits", ["[1]", '{"train": 3}', '{"train": {"records": 1e400}}'])
def test_counts_in_info_that_are_none_do_not_matter(tmp_path, splits):
    root = folders(tmp_path, {**FOLDERS, "info.json": f'{{"splits": {splits}}}'.encode()})
    assert d.open_data(root, verbose=False).train_count == 4


@pytest.mark.parametrize("asked", ["tfrecord", "cifar", "raw"])
def test_another_format_than_was_asked_for_is_named(tmp_path, asked):
    with pytest.raises(FileNotFoundError, match="It looks like data_format='folder'"):
        d.open_data(folders(tmp_path, FOLDERS), asked)


@pytest.mark.parametrize("place", ["train", "validation"])
def test_a_label_of_two_names_is_refused_unless_info_names_it(tmp_path, place):
    write(tmp_path, "train", [named(1, "cat"), named(2, "dog")])
    write(tmp_path, place, [named(1, "cat"), named(1, "dog")], "{}-00001-of-00002")
    os.rename(tmp_path / "train-00000-of-00001", tmp_path / "train-00000-of-00002")
    with pytest.raises(ValueError, match="label 1 call it 'cat' and 'dog'.*info.json"):
        d.open_data(tmp_path)
    (tmp_path / "info.json").write_text('{"classes": [{"label": 1, "text": "pet"}]}')
    assert d.open_data(tmp_path, verbose=False).class_names == ("pet", "dog")


def test_keys_of_other_records_are_named(tmp_path):
    write(tmp_path, "train", [d.make_example({"image": JPEG, "label": 1})])
    with pytest.raises(ValueError, match="needs `image/encoded`.*It has image, label"):
        d.open_data(tmp_path)


def test_a_folder_in_two_classes_is_refused(tmp_path):
    root = folders(tmp_path, FOLDERS)
    os.symlink(root / "train/a", root / "train/b/more")
    with pytest.raises(ValueError, match="b/more and .*train/a are one folder"):
        d.open_data(root)


def test_validation_images_that_train_are_told(tmp_path, capsys):
    root = folders(tmp_path, TRAIN)
    os.symlink("train", root / "val")
    assert d.open_data(root).validation_count == 4
    assert "what trains also validates" in capsys.readouterr().out


def test_a_class_that_is_left_out_whole_is_said(tmp_path, capsys):
    root = folders(tmp_path / "r", {**FOLDERS, "train/c/0.jpg": b"", "train/c/1.jpg": JPEG[:-2]})
    for _ in range(2):  # found, and remembered
        assert d.open_data(root, cache_dir=tmp_path, on_corrupt="skip").train_count == 4
        assert "all train images of c are damaged" in capsys.readouterr().out


def test_records_with_other_bytes_than_were_written_are_called_damaged(tmp_path):
    write(tmp_path, "train", [record(), record(label=0)])
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(path.read_bytes().replace(b"image/class/label", b"image/class/lable"))
    with pytest.raises(ValueError, match="checksum of record 0 of .*00001 is wrong. Copy"):
        d.open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="left out: 2 records.$"):
        d.open_data(tmp_path, cache_dir=tmp_path / "c", on_corrupt="skip")


# ---------------------------------------------------------------- packed sets


def without(pattern):
    return lambda root: [path.unlink() for path in root.glob(pattern)]


def copied(old, new):
    def change(root):
        for kind in ("index", "pixels"):
            shutil.copy(root / f"{kind}-train-{old}.npy", root / f"{kind}-train-{new}.npy")

    return change


def saved(change):
    def save(root):
        path = root / "pixels-train-00000-of-00003.npy"
        np.save(path, change(np.load(path)))

    return save


PACKED = {  # kind: (what is done to a packed set of six images, what is said or refused, training images)
    "a part that is missing": (without("*-train-00001-*"), "only 2 of the 3 train files", 4),
    "an index that is missing": (without("index-train-00001-*"), "only 2 of the 3 train files", 4),
    "no validation": (without("*-validation-*"), "speaks of 6 validation images; 0 are", 6),
    "a copy": (copied("00001-of-00003", "00001-of-00003 (1)"), "stand for the same images", None),
    "a part of another set": (copied("00001-of-00003", "00000-of-00001"), "stand for the same images", None),
    "not finished": (without("info.json"), "effnet-pack has not finished", None),
    "floats": (saved(lambda pixels: pixels.astype("f8")), "no index of a packed set, or does not fit", None),
    "rows": (saved(lambda pixels: pixels[None]), "no index of a packed set, or does not fit", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def packed_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    files = {f"{s}/{c}/{i}.bmp": bmp(i) for s in ("train", "val") for c in "ab" for i in range(3)}
    source = d.open_data(folders(root / "source", files), verbose=False)
    packed.pack(source, root / "set", packed.Packing("raw", in_a_part=2), 1, say=lambda line: None)
    return root / "set"


@pytest.mark.parametrize("kind", PACKED)
def test_packed_sets_that_are_not_whole_are_told_or_refused(packed_set, tmp_path, capsys, kind):
    change, says, train = PACKED[kind]
    root = shutil.copytree(packed_set, tmp_path / "set")
    change(root)
    if train is None:
        with pytest.raises(ValueError, match=says) as error:
            d.open_data(root)
        assert len(str(error.value).splitlines()) == 1
    else:
        assert d.open_data(root).train_count == train
        assert re.search(says, capsys.readouterr().out)


# ---------------------------------------------------------------- what cannot be read

UNREADABLE = {  # kind -> (what the system does not give, how many training images are left)
    "a class": ("train/a", 2),
    "a folder in a class": ("train/a/deep", 4),
    "records": ("train-00001-of-00002", 1),
    "CIFAR's rows": ("data_batch_2.bin", 1),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_the_system_does_not_give_is_named_or_left_out(tmp_path, monkeypatch, kind):
    place, left = UNREADABLE[kind]
    root = tmp_path / "r"
    if place.startswith("train/"):
        folders(root, {**FOLDERS, "train/a/deep/x.jpg": JPEG})
    elif place.startswith("train"):
        for i in range(2):
            write(root, "train", [record()], f"{{}}-0000{i}-of-00002")
    else:
        folders(root, {f"data_batch_{i}.bin": bytes(3073) for i in (1, 2)})

    def barred(given):
        def call(path, *how, **named):
            if str(path) == str(root / place):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return given(path, *how, **named)

        return call

    monkeypatch.setattr(os, "scandir", barred(os.scandir))
    monkeypatch.setattr(np, "fromfile", barred(np.fromfile))
    monkeypatch.setattr("builtins.open", barred(open))
    with pytest.raises(ValueError, match=f"{place} cannot be read: Permission denied"):
        d.open_data(root, verbose=False)
    found = d.open_data(root, cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    assert found.train_count == left and found.damaged_kinds == ("file",)
