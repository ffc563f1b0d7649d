"""Layouts that tools, Kaggle and accidents leave: each is read, refused by name, or counted, never misread in silence.

A row is kind -> what is added to or taken from a good set -> the right answer: numbers of training and validation
images, a line that is said, or the words of a refusal.
"""

import gzip
import json
import os
import re
import socket

import numpy as np
import pytest
from images import FOLDERS, bmp, encode, folders, record, smooth_image, write

from effnet_repro import data as d
from effnet_repro.data.folders import IMAGE_SUFFIXES

JPEG = encode(smooth_image(8, 9))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
TRAIN = {k: v for k, v in FOLDERS.items() if k.startswith("train")}
CSV = "ImageId,PredictionString\nv1,a 1 2 3 4 \nv2,b 1 2 3 4 b 5 6 7 8\n"
TINY = "v1.JPEG\ta\t0\t0\t62\t62\nv2.JPEG\tb\t0\t0\t62\t62\n"
FLAT = {"val/v1.JPEG": JPEG, "val/v2.JPEG": JPEG}


def moved(**names):
    return {
        "/".join([names.get(p[0], p[0]), *p[1:]]): v
        for p, v in ((k.split("/"), v) for k, v in FOLDERS.items())
    }


READ = {  # kind: (files, training images, validation images, what is said)
    "flat val/ with Kaggle's list": ({**TRAIN, **FLAT, "LOC_val_solution.csv": CSV}, 4, 2, "labels of"),
    "the list inside val/": ({**TRAIN, **FLAT, "val/LOC_val_solution.csv": CSV}, 4, 2, "labels of"),
    "Tiny ImageNet": (
        {**TRAIN, "val/images/v1.JPEG": JPEG, "val/images/v2.JPEG": JPEG, "val/val_annotations.txt": TINY},
        4, 2, "labels of",
    ),
    "classes called test and tram": ({"test/0.bmp": bmp(1), "tram/0.bmp": bmp(2)}, 2, 0, ""),
    "valid/": (moved(val="valid"), 4, 4, ""),
    "Train/ and Val/": (moved(train="Train", val="Val"), 4, 4, ""),
    "training/ and validation/": (moved(train="training", val="validation"), 4, 4, ""),
    "validation/ without images beside val/": ({**FOLDERS, "validation/a/notes.txt": "x"}, 4, 4, ""),
    "two full ones": ({**FOLDERS, "validation/a/0.bmp": bmp(1)}, 4, 1, "val is not read"),
    "test/ alone": ({**TRAIN, "test/a/0.bmp": bmp(1)}, 4, 0, "test is not read"),
    "train-labels.csv": ({**FOLDERS, "train-labels.csv": "id,label"}, 4, 4, ""),
    "train-*.idx": ({**FOLDERS, "train-images.idx": "x", "validation-x.idx": "y"}, 4, 4, ""),
    "train-*.zip": ({**FOLDERS, "train-clean.zip": "PK\x03\x04"}, 4, 4, ""),
    "an empty train-list": ({**FOLDERS, "train-list": ""}, 4, 4, ""),
    "train.bin of another program": ({**FOLDERS, "train.bin": "x" * 100}, 4, 4, ""),
    "deeper folders": ({**FOLDERS, "train/a/2021/may/x.jpg": JPEG}, 5, 4, ""),
    "a folder called album.jpg": ({**FOLDERS, "train/a/album.jpg/x.jpg": JPEG}, 5, 4, ""),
    "JPEGs of other suffixes": (
        {**FOLDERS, **{f"train/a/x.{s}": JPEG for s in ("jfif", "jpe", "JPG", "pjpeg")}}, 8, 4, "",
    ),
    "by content": ({**FOLDERS, "train/a/photo": JPEG, "train/a/x.jpg_large": JPEG}, 6, 4, ""),
    "an unfinished download": ({**FOLDERS, "train/a/x.jpg.part": JPEG}, 4, 4, "1 .part"),
    "HEIC": ({**FOLDERS, "train/a/x.HEIC": HEIC, "val/b/y.heic": HEIC}, 4, 4, "2 .heic.*convert them"),
    "texts and films": (
        {**FOLDERS, "train/a/n.txt": "x", "train/b/n.txt": "x", "val/a/f.mp4": "x", "val/a/y": "x"},
        4, 4, "2 .txt.*1 .mp4.*1 without a suffix",
    ),
    "images beside class folders": ({**FOLDERS, "train/x.jpg": JPEG}, 4, 4, "1 beside the class folders"),
    "a class called valid": ({"valid/0.bmp": bmp(1), "wrong/0.bmp": bmp(2)}, 2, 0, ""),
    "a list with semicolons, paths and suffixes": (
        {**TRAIN, **FLAT, "LOC_val_solution.csv": "ImageId; PredictionString\r\nval/v1.JPEG;a 1\r\nC:\\v2.JPEG; b 1"},
        4, 2, "labels of",
    ),
    "a list of more than there is": (
        {**TRAIN, **FLAT, "LOC_val_solution.csv": CSV + "v9,a 1\n"}, 4, 2, "images that .* lists are not there",
    ),
    "images of hidden names": (
        {**FOLDERS, "train/a/@user.jpg": JPEG, "train/a/.x.jpg": JPEG, "train/a/._y.jpg": "\0\5\x16\7"},
        4, 4, "2 whose name begins with a dot, @ or ~",
    ),
    "splits with a space": (moved(train="train "), 4, 4, ""),
    "HEIC among flat images": (
        {**TRAIN, **FLAT, "val/v3.HEIC": HEIC, "LOC_val_solution.csv": CSV}, 4, 2, "1 .heic.*convert them first",
    ),
    "training/ beside train/": (
        {**FOLDERS, "training/a/0.bmp": bmp(1)}, 4, 4, "from .*train; .*training is not read",
    ),
    "an archive beside class folders": ({**FOLDERS, "train/c.zip": "PK\3\4"}, 4, 4, "archives in .* not read: c.zip"),
    "val.zip": ({**TRAIN, "val.zip": "PK\3\4"}, 4, 0, "val.zip is a ZIP archive, not a folder"),
    "a list called val": ({**TRAIN, "val": "a/0.bmp\n"}, 4, 0, "val is a text, not a folder"),
    "validation images of fewer classes": (
        {k: v for k, v in FOLDERS.items() if not k.startswith("val/b")}, 4, 2, "no validation images of b, though",
    ),
    "classes that look alike": ({**FOLDERS, "train/A/0.bmp": bmp(9)}, 5, 4, "'A' and 'a' look alike"),
    "accents in two encodings": ({f"{c}/0.bmp": bmp(1) for c in ("\xe9", "e\u0301")}, 2, 0, "look alike"),
    "folders without an end": (
        {**FOLDERS, "train/a/" + 40 * "d/" + "x.jpg": JPEG}, 4, 4, "1 folder deeper than 32",
    ),
    "the same folders in every class": (
        {f"{c}/{s}/{i}.bmp": bmp(i) for c in "ab" for s in ("left", "right") for i in (1, 2)},
        5, 3, "a and b in .* are the classes, though each holds left, right",
    ),
    "AVIF and TIFF without a suffix": (
        {**FOLDERS, **{f"train/a/x{s}": encode(smooth_image(8, 9), k) for s, k in (("", "TIFF"), (".avifs", "AVIF"))}},
        6, 4, "",
    ),
    "orders to a terminal in a name": (
        {**FOLDERS, "train/a\x1b[2J\nb/0.bmp": bmp(1)}, 5, 4, r"images of a\\x1b\[2J\\nb, though",
    ),
}  # fmt: skip

REFUSED = {  # kind: (files, words)
    "flat val/ without a list": ({**TRAIN, **FLAT}, "val holds 2 images, but no class folders.*LOC_val"),
    "flat val/ with another list": ({**TRAIN, **FLAT, "LOC_val_solution.csv": "x,y\n1,2\n"}, "columns ImageId"),
    "an image that is not listed": (
        {**TRAIN, **FLAT, "val/v3.JPEG": JPEG, "LOC_val_solution.csv": CSV}, "does not list v3.JPEG",
    ),
    "a listed class that is not trained": (
        {**TRAIN, **FLAT, "LOC_val_solution.csv": CSV.replace("v1,a", "v1,z")}, "gives v1.JPEG the class z",
    ),
    "flat train/": ({"train/cat.1.jpg": JPEG, "train/dog.1.jpg": JPEG}, "train holds 2 images, but no class"),
    "splits below classes": (
        {f"{c}/{s}/{i}.bmp": bmp(i) for c in "ab" for s in ("train", "val") for i in (1, 2)},
        "holds the folders train and val.*above the classes",
    ),
    "a set one folder deeper": (
        {f"ILSVRC/Data/CLS-LOC/{k}": v for k, v in FOLDERS.items()}, "Deeper there is .*CLS-LOC: give that",
    ),
    "a class of nothing but HEIC": ({**FOLDERS, "train/c/x.heic": HEIC}, "c holds no image.*1 .heic"),
    "MNIST's files": ({"train-images-idx3-ubyte": "\0\0\x08\x03"}, "No data set.*tables of images .ubyte. are not"),
    "some other folder": ({"a/notes.txt": "x"}, "No data set.*name it with `data_format`"),
    "CIFAR's files for Python": ({f"data_batch_{i}": b"\x80\x02}" for i in (1, 2)}, "take the binary version"),
    "a table of images": ({"data/train-00000-of-00001.parquet": "PAR1"}, r"tables of images \(.parquet\) are not"),
    "a table in train/": ({"train/data-00000-of-00001.arrow": "ARROW1"}, r"tables of images \(.arrow\) are not"),
    "arrays": ({"images.npz": b"PK\3\4" + bytes(26) + b"x.npy"}, r"images.npz \(arrays of NumPy\). Arrays and tables"),
    "one folder of class folders": (
        {f"Categories/{c}/{i}.bmp": bmp(i) for c in "ab" for i in (1, 2)},
        "Categories would be the only class.*give that",
    ),
    "train/ inside train/": (
        {f"train/train/{c}/1.bmp": bmp(1) for c in "ab"}, "train/train would be the only class",
    ),
    "images/ beside lists": (
        {**{f"images/{c}/1.bmp": bmp(1) for c in "ab"}, "meta/train.txt": "x"},
        "meta holds no image.*the folders in .*images, give that folder",
    ),
    "COCO's folders": ({"train2017/1.jpg": JPEG, "val2017/2.jpg": JPEG}, "train2017 and val2017, which look like"),
    "train_images and val_images": (
        {f"{s}_images/{c}/1.bmp": bmp(1) for s in ("train", "val") for c in "ab"},
        "look like splits.*Rename them to train",
    ),
    "Tiny ImageNet's list without an image": (
        {**TRAIN, "val/images/v9.JPEG": JPEG, "val/val_annotations.txt": TINY}, "does not list v9.JPEG",
    ),
    "class names that look alike": (
        {**TRAIN, "val/a/0.bmp": bmp(1), "val/B/0.bmp": bmp(2)}, "letter by letter: 'B' here, 'b' there",
    ),
    "archives": ({"train.tar": bytes(257) + b"ustar" + bytes(250), "x.csv": "1"}, "a TAR archive.*Unpack"),
    "info.json in UTF-16": (
        {**FOLDERS, "info.json": '{"num_classes": 2}'.encode("utf-16")}, "info.json is not a.*not text in UTF-8",
    ),
    "compressed records": ({"train-00000-of-00001.tfrecord.gz": gzip.compress(b"x")}, "a gzip archive"),
    "a list of two minds": (
        {**TRAIN, **FLAT, "LOC_val_solution.csv": CSV + "v1,b 1\n"}, "gives v1 two classes, a and b",
    ),
    "Tiny ImageNet's list of two minds": (
        {**TRAIN, "val/images/v1.JPEG": JPEG, "val/val_annotations.txt": "v1.JPEG a 0\nv1.JPEG b 0\n"}, "two classes",
    ),
    "a list that is a page": (
        {**TRAIN, **FLAT, "LOC_val_solution.csv": "<!DOCTYPE html>"}, "no list of labels: it is an HTML page",
    ),
    "a list in UTF-16": ({**TRAIN, **FLAT, "LOC_val_solution.csv": CSV.encode("utf-16")}, "a text in UTF-16. Save"),
    "a list of nothing": ({**TRAIN, **FLAT, "LOC_val_solution.csv": CSV.splitlines()[0]}, "lists no image"),
    "archives of classes": ({"train/a.tar": "x", "train/b.tar": "x"}, "holds a.tar, but no class folders: unpack"),
    "images alone": ({"1.jpg": JPEG, "2.jpg": JPEG}, "lie in no class folders: sort them"),
    "seg_train and seg_test": (
        {f"seg_{s}/seg_{s}/{c}/1.bmp": bmp(1) for s in ("train", "test") for c in "ab"}, "look like parts of a set",
    ),
    "a class called train": (
        {f"{c}/{i}.bmp": bmp(i) for c in ("train", "bus", "car") for i in (1, 2)}, "as bus, car may be, rename it",
    ),
    "info.json that swaps class folders": (
        {**FOLDERS, "info.json": '{"classes": [{"label": 1, "text": "b"}, {"label": 2, "text": "a"}]}'},
        "calls label 1 'b', which is the folder 'a'",
    ),
    "folds": ({f"fold{i}/{c}/1.bmp": bmp(1) for i in (1, 2) for c in "ab"}, "fold1 and fold2, which look like parts"),
    "a set that was not packed to its end": ({**FOLDERS, "pack.json": "{}"}, "effnet-pack has not finished"),
    "CIFAR's files twice": (
        {f"data_batch_1{mark}.bin": bytes(3073) for mark in ("", " (1)")}, "stand for the same images",
    ),
    "CIFAR-10 and CIFAR-100": ({"data_batch_1.bin": bytes(3073), "train.bin": bytes(3074)}, "of CIFAR-10 and of"),
    "names of CIFAR that are a page": (
        {"data_batch_1.bin": bytes(3073), "batches.meta.txt": "<html> <p>"}, "2 names for 10 classes",
    ),
    "an empty file of CIFAR": ({"data_batch_1.bin": bytes(3073), "data_batch_2.bin": ""}, "has 0 bytes"),
    "a pointer in place of records": (
        {"train-00000-of-00001": "version https://git-lfs.github.com/spec/v1\n"}, "record 0 of .*pointer of Git LFS",
    ),
    "CIFAR's labels": ({"data_batch_1.bin": bytes([11]) + bytes(3072)}, "has the label 11; the last one is 9"),
}  # fmt: skip


def make(root, files):
    files = {k: v.encode("latin-1") if isinstance(v, str) else v for k, v in files.items()}
    return folders(root, files)


@pytest.mark.parametrize("kind", READ)
def test_layouts_that_are_read(tmp_path, capsys, kind):
    files, train, validation, said = READ[kind]
    found = d.open_data(make(tmp_path, files), "folder" if "bin" in kind else None)
    assert (found.format, found.train_count, found.validation_count) == (
        "folder",
        train,
        validation,
    )
    lines = capsys.readouterr().out
    assert re.search(said, lines) and lines.count("left out in") == (
        ": " not in said and said[:1].isdigit()
    )
    for split, count in (("train", train), ("validation", validation)):
        if count:
            images, _ = d.load_arrays(found, split, 8, "modern")
            assert images.shape == (count, 8, 8, 3) and images.std((1, 2, 3)).min() > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_layouts_that_are_refused_by_name(tmp_path, kind):
    files, words = REFUSED[kind]
    with pytest.raises((ValueError, OSError), match=words) as error:
        d.open_data(make(tmp_path, files))
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path) in str(error.value)


def test_labels_of_flat_validation_images(tmp_path):
    root = make(tmp_path, {**TRAIN, **FLAT, "LOC_val_solution.csv": CSV})
    assert d.open_data(root, verbose=False).splits["validation"].label.tolist() == [0, 1]


def test_every_suffix_names_what_can_be_read(tmp_path):
    kinds = {
        ".pgm": "PPM",
        ".ppm": "PPM",
        ".jp2": "JPEG2000",
        ".webp": "WEBP",
        ".pcx": "PCX",
        ".tga": "TGA",
    }
    files = {f"train/a/x{s}": encode(smooth_image(9, 8), kinds[s]) for s in kinds}
    found = d.open_data(make(tmp_path, files), verbose=False)
    assert set(kinds) < set(IMAGE_SUFFIXES) and found.train_count == len(kinds)
    assert d.load_arrays(found, "train", 8, "modern")[0].std((1, 2, 3)).min() > 0


def test_records_beside_other_files(tmp_path, capsys):
    write(tmp_path, "train", [record()])
    (tmp_path / "train-labels.csv").write_text("id,label\n")
    (tmp_path / "train-00000-of-00001.idx").write_text("0 1")
    found = d.open_data(tmp_path)
    assert (found.format, found.files["train"]) == ("tfrecord", 1)
    assert "1 .idx, 1 .csv" in capsys.readouterr().out
    (tmp_path / "train-00000-of-00001").write_bytes(b"damaged" * 9)  # still called like records
    with pytest.raises(ValueError, match="or damaged: record 0 of .*train-00000-of-00001"):
        d.open_data(tmp_path)


OF = "train-{:05d}-of-{:05d}"


@pytest.mark.parametrize(
    "names",
    [
        [(0, 1), (0, 2)],
        [(0, 2), (1, 2), (1, 3)],
        [(0, 1, " (1)")],
        [(0, 1, ".bak")],
        ["train-0 (1)"],
    ],
)
def test_records_that_are_there_twice_are_refused(tmp_path, names):
    d.write_tfrecords(tmp_path / OF.format(0, 1 if len(names) == 1 else 2), [record()])
    if isinstance(names[0], str):
        d.write_tfrecords(tmp_path / "train-0", [record()])
        d.write_tfrecords(tmp_path / names.pop(), [record()])
    for number, count, *copy in names:
        d.write_tfrecords(tmp_path / (OF.format(number, count) + "".join(copy)), [record()])
    with pytest.raises(ValueError, match="stand for the same images.*Keep one set") as error:
        d.open_data(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["val-00000-of-00001", "valid-0", "test-00000-of-00001"])
def test_records_of_other_names_are_told(tmp_path, capsys, name):
    write(tmp_path, "train", [record()])
    d.write_tfrecords(tmp_path / name, [record()])
    assert d.open_data(tmp_path).validation_count == 0
    assert f"{name} are not read: validation files are called" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.tfrecord", "imagenet2012-train.tfrecord-00000-of-00001"])
def test_records_of_unknown_names_are_recognized(tmp_path, name):
    d.write_tfrecords(tmp_path / name, [record()])
    with pytest.raises(
        FileNotFoundError, match="TFRecords are read from files called train-.*rename"
    ):
        d.open_data(tmp_path)


def test_links_that_lead_back_are_walked_once(tmp_path):
    root = folders(tmp_path, FOLDERS)
    os.symlink(root / "train" / "a", root / "train" / "a" / "again")
    assert d.open_data(root, verbose=False).train_count == 4


# ---------------------------------------------------------------- links and special files


def fifo(path):
    os.mkfifo(path)


def bound(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = {  # kind: (place, how it is made, words, kind of damage)
    "a dead link": ("train/a/x.jpg", lambda p: p.symlink_to("/nowhere/x.jpg"), "link to /nowhere", "1 link"),
    "a link to itself": ("train/a/x.jpg", lambda p: p.symlink_to("x.jpg"), "is a link to x.jpg", "1 link"),
    "a dead class with a dot": ("train/c.v2", lambda p: p.symlink_to("/nowhere"), "link to /nowhere", "1 link"),
    "a dead class": ("train/c", lambda p: p.symlink_to("/nowhere"), "link to /nowhere", "1 link"),
    "a FIFO": ("train/a/x.jpg", fifo, "is a FIFO", "1 special file"),
    "a socket": ("val/a/x.png", bound, "is a socket", "1 special file"),
    "a device": ("val/a/x.png", lambda p: p.symlink_to("/dev/zero"), "is a device", "1 special file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_special_files_are_named_or_left_out(tmp_path, kind):
    place, put, words, counted = SPECIAL[kind]
    root = folders(tmp_path / "r", FOLDERS)
    put(root / place)
    with pytest.raises(ValueError, match=f"{place}.*{words}.*on_corrupt='skip'"):
        d.open_data(root, verbose=False)
    found = d.open_data(root, cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    assert (found.train_count, found.validation_count) == (4, 4)
    assert f"1 damaged ones left out ({counted})" in found.describe()


@pytest.mark.parametrize("name", ["train-00000-of-00001", "data_batch_1.bin", "info.json"])
def test_special_files_of_other_layouts_do_not_hang(tmp_path, name):
    write(tmp_path, "validation", [record()])
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=name):
        d.open_data(tmp_path)


def test_a_file_that_became_a_fifo_is_not_waited_for(tmp_path):
    found = d.open_data(folders(tmp_path, FOLDERS), verbose=False)
    os.remove(tmp_path / "train/a/0.bmp")
    os.mkfifo(tmp_path / "train/a/0.bmp")
    with pytest.raises(ValueError, match="0.bmp is a FIFO now"):
        found.split_fingerprint("train")
    with pytest.raises(ValueError, match="Truncated file: 0 of"):
        d.load_arrays(found, "train", 8)


# ---------------------------------------------------------------- numbers in info.json

INFO = {
    "too many": {"num_classes": 10**9},
    "a label too large": {"classes": [{"label": 10**9, "text": "x"}]},
    "beyond its own number": {"num_classes": 2, "classes": [{"label": 3, "text": "x"}]},
    "a fraction": {"num_classes": 3.7},
    "a label with a fraction": {"classes": [{"label": 1.5, "text": "x"}]},
    "true": {"num_classes": True},
    "infinite": {"num_classes": float("inf")},
    "no number": {"num_classes": float("nan")},
    "two names": {"classes": [{"label": 1, "text": "x"}, {"label": 1, "text": "y"}]},
    "no name": {"classes": [{"label": 1, "text": None}]},
    "classes by name": {"classes": {"x": 1}},
}


@pytest.mark.parametrize("kind", INFO)
def test_numbers_in_info_are_whole_and_have_limits(tmp_path, kind):
    root = folders(tmp_path, {**FOLDERS, "info.json": json.dumps(INFO[kind]).encode()})
    with pytest.raises(ValueError, match="info.json is not a description of classes") as error:
        d.open_data(root)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text", [b"[" * 10**5, b'{"num_classes":' + b"9" * 6000 + b"}", b"\xff\xfe{"]
)
def test_an_info_that_is_no_json_is_one_line(tmp_path, text):
    with pytest.raises(ValueError, match="info.json is not a description of classes") as error:
        d.open_data(folders(tmp_path, {**FOLDERS, "info.json": text}))
    assert len(str(error.value)) < 500 and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- on_corrupt="skip" of records and labels

BOX = {f"image/object/bbox/{side}": [0.5] for side in ("ymin", "xmin", "ymax", "xmax")}
BAD = {  # kind of damage: records
    "label": [record(label=0), record(label=2**62), record(label=1.5), record(label=[1, 2])],
    "record": [b"\x0a\x7fcut", d.make_example({"image/class/label": 1}), record([b"x", b"y"])],
    "box": [
        record(**{**BOX, "image/object/bbox/ymax": [0.1]}),
        record(**{**BOX, "image/object/bbox/ymax": [float("nan")]}),
        record(**{"image/object/bbox/ymin": [0.1]}),
        record(**{**BOX, "image/object/bbox/ymax": [20.0]}),  # in pixels
    ],
    "image": [record(b"no image"), record(encode(smooth_image())[:-2])],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_damaged_in_records_is_left_out_by_kind(tmp_path, kind):
    bad = BAD[kind]
    write(tmp_path, "train", [record(label=2), *bad, record()])
    if kind != "image":
        with pytest.raises(ValueError, match="train-00000-of-00001.*on_corrupt='skip'"):
            d.open_data(tmp_path)
    found = d.open_data(tmp_path, cache_dir=tmp_path / "c", on_corrupt="skip", verbose=False)
    assert found.splits["train"].label.tolist() == [1, 0] and found.num_classes == 2
    assert set(found.damaged_kinds) == {kind} and len(found.damaged) == len(bad)
    assert f"({len(bad)} {kind}" in found.describe()
    again = d.open_data(tmp_path, cache_dir=tmp_path / "c", on_corrupt="skip", verbose=False)
    assert again == found


def test_a_large_label_is_named_as_it_is(tmp_path):
    write(tmp_path, "train", [record(label=2**62)])
    with pytest.raises(ValueError, match=f"label {2**62} in"):
        d.open_data(tmp_path)


@pytest.mark.parametrize(
    "damage", ["length", "checksum of the length", "cut", "in between", "checksum"]
)
def test_damaged_files_of_records_lose_only_what_is_damaged(tmp_path, damage):
    records = [record(encode(smooth_image(20, 20, i)), label=i + 1) for i in range(4)]
    write(tmp_path, "train", records)
    path = tmp_path / "train-00000-of-00001"
    raw, places = bytearray(path.read_bytes()), d.scan_tfrecord(path)
    second = int(places[1][0])
    if damage == "cut":
        raw = raw[: int(places[3][0]) + 5]
    elif damage == "in between":
        raw[second - 12 : second - 12] = b"rubbish"
    else:
        at = {"length": -12, "checksum of the length": -4, "checksum": len(records[1])}[damage]
        raw[second + at] ^= 1
    path.write_bytes(raw)
    found = d.open_data(tmp_path, cache_dir=tmp_path / "c", on_corrupt="skip", verbose=False)
    lost = {"cut": [3], "in between": []}.get(damage, [1])
    assert found.splits["train"].label.tolist() == [i for i in range(4) if i not in lost]
    assert len(found.damaged) == 1
    assert found.damaged_kinds == ({"cut": "file", "checksum": "image"}.get(damage, "record"),)


def test_a_cached_list_keeps_what_was_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("effnet_repro.data.layouts.LARGE", 0)
    write(tmp_path, "train", [record(label=0), record()])
    how = dict(cache_dir=tmp_path / "c", on_corrupt="skip", verbose=False)
    first, second = d.open_data(tmp_path, **how), d.open_data(tmp_path, **how)
    assert first == second and first.damaged_kinds == ("label",)
    with pytest.raises(ValueError, match="Received: .0. in record 0"):
        d.open_data(tmp_path, cache_dir=tmp_path / "c")
    (kept,) = (tmp_path / "c" / "lists").iterdir()
    for damage in (
        b"",
        b"PK\x03\x04" + bytes(40),
        kept.read_bytes()[:-30],
        kept.read_bytes().replace(b"\x14\0", b"\x14\x7f"),
    ):
        kept.write_bytes(damage)
        assert d.open_data(tmp_path, **how) == first


def test_cut_files_of_cifar_and_damaged_packed_sets(tmp_path):
    rows = np.zeros((3, 3073), np.uint8)
    rows[:, 0] = 1, 200, 2
    folder = folders(tmp_path / "c", {"data_batch_1.bin": rows.tobytes()[:-1] + b"x" + b"cut"})
    how = dict(cache_dir=tmp_path, on_corrupt="skip", verbose=False)
    found = d.open_data(folder, **how)
    assert found.splits["train"].label.tolist() == [1, 2] and found.num_classes == 10
    assert sorted(found.damaged_kinds) == ["file", "label"]
