"""Cheap questions come first: what is wrong is told before Keras is imported, with the status of the rule.

2: the line itself is wrong. 1: data, weights or a folder are not there, or do not fit. `--dry-run` ends as the run
does.
"""

import importlib
import json
from pathlib import Path

import pytest
from images import encode, folders, smooth_image
from test_faults_words import CASE, plain

RUN = Path(__file__).with_name("data") / "earlier_run"
PLACES = [f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in range(4)]
IMAGES = {place: encode(smooth_image(40, 40, i)) for i, place in enumerate(PLACES)}
ONE = {k: v for k, v in IMAGES.items() if k.startswith("train")}
FILES = {
    "damaged.jpg": IMAGES["train/a/0.jpg"][:99],
    "empty.jpg": b"",
    "names3": b"a\nb\nc\n",
    "utf16": "a\nb\n".encode("utf-16"),
    "x.onnx": b"",
    "x.safetensors": b"",
}
TRAIN = ("train", CASE)
SMALL = ("--model-size", "cifar", "--image-size", "32", "--budget", "smoke")

EARLY = [  # (words, words of the answer, status)
    (("predict", RUN, "nowhere.jpg"), "1 of 1 images could not be read", 1),
    (("predict", RUN, "damaged.jpg", "empty.jpg", "text"), "3 of 3 images", 1),
    (("predict", RUN, "data/train/a/0.jpg", "--class-names", "names3"), "3 class names for the 10", 1),
    (("predict", RUN, "damaged.jpg", "--class-names", "utf16"), "it is a text in UTF-16. Save it as", 2),
    (("validate", RUN, "--data-dir", "nowhere"), "--data-dir must be a folder", 1),
    (("validate", RUN, "--data-dir", "data"), "The network has 10 classes, the data 2", 1),
    (("validate", RUN, "--data-dir", "one"), "The network has 10 classes", 1),
    (("finetune", RUN, "--data-dir", "nowhere"), "--data-dir must be a folder", 1),
    (("finetune", RUN, "--data-dir", "data"), "give it a new classifier", 1),
    (("finetune", RUN, "--new-head", "--data-dir", "nowhere"), "--data-dir must be a folder", 1),
    (("finetune", RUN, "--run-dir", "x.onnx"), "x.onnx is no folder", 1),
    (("export", RUN, "new.onnx", "--int8", "nowhere"), "must be a folder", 1),
    (("export", RUN, "new.tflite", "--int8", "data"), "--int8 is for ONNX files", 2),
    (("export", RUN, "new.pth"), "is none of a format's", 2),
    (("export", RUN, "x.onnx"), "x.onnx exists. Pass --overwrite", 1),
    (("convert", RUN, "x.safetensors", "--to", "torch"), "exists. Pass --overwrite", 1),
    (("convert", RUN, "new.safetensors"), "Pass --to: 'torch' or 'ours'", 2),
    (("convert", RUN, "data"), "data is a folder. Name a file in it", 1),
    (("export", RUN, ".onnx"), ".onnx is an ending without a name", 2),
    (("export", RUN, "new.onnx", "--batch-size", 10**11), "--batch-size must be from 1 to 4,096", 2),
    (("convert", RUN, "new.h5", "--to", "keras"), "Keras writes weights to *.weights.h5", 1),
    (("validate", "text"), "There is no file or folder text", 1),
    (("compare", RUN, "nowhere"), "nowhere is no folder", 1),
    (("compare", RUN, "data"), "data has no config.json", 1),
    (("pack", "x.onnx", "--data-dir", "data"), "x.onnx is no folder", 1),
    (("pack", "data/train/new", "--data-dir", "data"), "is inside data, which is read", 1),
    (("plan", CASE, "--gpus", "4"), "--gpus: for --device gpu", 2),
    (("plan", CASE, "--device", "gpu", "--ipus", "4", "--figure", "x.png"), "--ipus and --figure: for --device ipu", 2),
    ((*TRAIN, "--data-dir", "data", "--global-batch-size", "64"), "exceeds the 8 training images", 1),
    ((*TRAIN, "--data-dir", "nothing"), "no training images in nothing, only validation images", 1),
    ((*TRAIN, "--data-dir", "data", "--epochs", "1e-9"), "at least one weight update", 1),
    ((*TRAIN, "--data-dir", "data", "--run-dir", "x.onnx", *SMALL), "x.onnx is no folder", 1),
    ((*TRAIN, "--data-dir", "data", "--init", RUN, *SMALL), "holds another network", 1),
    ((*TRAIN, "--init", "nowhere", *SMALL), "There is no file or folder nowhere", 1),
    ((*TRAIN, "--run-dir", RUN, *SMALL), "belongs to another run", 1),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "What the lines name, in the current folder; Keras cannot be started"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFNET_REPRO_CACHE", str(tmp_path / "cache"))
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    folders(tmp_path / "data", IMAGES)
    folders(tmp_path / "one", ONE)
    folders(tmp_path / "nothing", {k: v for k, v in IMAGES.items() if k.startswith("val")})

    def too_early(*_, **__):
        raise AssertionError("Keras was started before the cheap questions")

    for name in ("options", "train", "finetune", "validate", "predict"):
        monkeypatch.setattr(
            importlib.import_module(f"effnet_repro.cli.{name}"), "start_keras", too_early
        )
    return tmp_path


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.parts)


@pytest.mark.parametrize("words, says, status", EARLY)
def test_what_is_wrong_is_told_before_anything_is_computed(run, folder, words, says, status):
    before = names(folder)
    got, out, err = run(*words)
    last = err.splitlines()[-1]
    assert got == status and says in plain(last), (got, out, err)
    if words[0] != "predict":  # which has a line for each image
        assert len(err.splitlines()) == 1
    assert names(folder) == before


TRAININGS = [words for words, _, _ in EARLY if words[:1] == ("train",)]


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
@pytest.mark.parametrize("words", TRAININGS)
def test_a_dry_run_answers_as_the_run_does(run, folder, words, backend):
    words = (*words, "--backend", backend)
    status, _, err = run(*words)
    assert run(*words, "--dry-run")[::2] == (status, err)


def test_images_that_cannot_be_read_are_listed_in_every_form(run, folder):
    words = ("predict", RUN, "damaged.jpg", "nowhere.jpg")
    status, out, _ = run(*words, "--json")
    assert status == 1 and [set(one) for one in json.loads(out)] == [{"image", "problem"}] * 2
    status, out, _ = run(*words, "--csv")
    assert [line.split(",")[0] for line in out.splitlines()] == ["image", *words[2:]]
