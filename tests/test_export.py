"""Exported files: each agrees with the network in its own runtime, or is not there."""

import errno
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conversions import moved
from tiny import STAGES

from effnet_repro import convert, network
from effnet_repro.export import (
    FORMATS,
    Disagreement,
    agreement,
    export,
    exporting,
    int8,
    onnx_file,
    read_metadata,
)
from effnet_repro.export.layers import LayerOps, Tensor
from effnet_repro.export.subject import Subject
from effnet_repro.scaling import ModelSpec

pytest.importorskip("onnxruntime", reason="onnx and onnxruntime are in the lock: run `make venv`")
HERE = Path(__file__).parent
RUN = HERE / "data" / "earlier_run"
ARMS = ["G1-BN", "G1-GN", "G16-GN", "G1-LN", "G1-LN_PN", "G16-LN_PN"]


def spec_of(arm="G16-LN_PN", **fields):
    given = dict(net_stages=STAGES, top_filters=32, image_size=32, num_classes=5, **fields)
    return replace(ModelSpec.from_name(f"CIFAR-{arm}"), **given)


def subject_of(spec, batch=None):
    weights = moved(spec)
    names = tuple(f"kind {i}" for i in range(spec.num_classes))
    about = replace(weights.case, image_size=spec.image_size), names, spec.image_size
    return Subject(Path("x"), spec, weights.arrays, *about, batch)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


ENDING = {kind: end for end, kind in exporting.SUFFIXES.items()}


def check_file(folder, kind, arm, batch=None):
    "Write a file of one format, which its own runtime opens; what it says of itself comes back"
    path = folder / f"a{ENDING[kind]}"
    subject = subject_of(spec_of(arm), batch)
    found, *_ = exporting.written(subject, path, kind)
    assert found.difference < 2e-5 and names(folder) == [path.name]
    assert read_metadata(path) == subject.metadata


# ---------------------------------------------------------------- the network in a file


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(tmp_path, kind):
    check_file(tmp_path, kind, "G16-LN_PN")


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_agrees_in_onnx_runtime(folder, arm):
    norm = dict(input_norm="keras") if arm == "G1-BN" else {}
    found, runtime, _ = exporting.written(
        subject_of(spec_of(arm, **norm)), folder / "a.onnx", "onnx"
    )
    assert found.difference < 2e-5 and found.random + found.real >= 2
    assert runtime.startswith("ONNX Runtime") and names(folder) == ["a.onnx"]


def test_norm_groups_are_strided_as_in_the_network(folder):
    "Contiguous groups give other numbers; four groups of 16 channels differ in each."
    spec = spec_of("G1-GN", norm_groups=4)
    assert exporting.written(subject_of(spec), folder / "a.onnx", "onnx")[0].difference < 2e-5


def test_stored_statistics_of_an_average_are_the_file_s(folder):
    spec = replace(spec_of(), stored_proxies=True)
    subject = subject_of(spec)
    for name, value in subject.arrays.items():
        if name.endswith("/inv_std"):
            subject.arrays[name] = np.abs(value) + 0.5
    assert exporting.written(subject, folder / "a.onnx", "onnx")[0].difference < 2e-5


def test_a_fixed_batch_takes_that_batch_only(folder):
    subject = subject_of(spec_of(), batch=2)
    exporting.written(subject, folder / "a.onnx", "onnx")
    run = onnx_file.opened(folder / "a.onnx")
    images = np.zeros((2, 32, 32, 3), "uint8")
    assert run(images).shape == (2, 5)
    with pytest.raises(Exception, match="(?i)dimension|shape"):
        run(images[:1])


def test_a_norm_is_two_nodes_and_an_affine_of_a_convolution_none():
    kinds = lambda spec: [n.op_type for n in onnx_file.onnx_model(subject_of(spec)).graph.node]
    layer, batch = kinds(spec_of("G16-LN_PN")), kinds(spec_of("G1-BN"))
    count = layer.count("InstanceNormalization")
    assert count == sum(p.name.endswith("/gamma") for p in network.params(spec_of("G16-LN_PN")))
    assert "ReduceMean" not in layer and "BatchNormalization" not in batch
    assert batch.count("Add") == 2  # the image's mean, and one residual


def test_a_file_of_an_earlier_version_still_runs():
    "tests/data/exported.onnx was written from tests/data/earlier_run, whose weights have not changed since."
    read = exporting.read_subject(RUN, weights="last")
    found = agreement.compare(read, onnx_file.opened(HERE / "data" / "exported.onnx"), "it")
    assert found.difference < 2e-5
    said = read_metadata(HERE / "data" / "exported.onnx")
    assert said["class_names"] == list(read.class_names) and said["image_size"] == 32


def test_the_metadata_says_how_to_feed_it(folder):
    spec = spec_of()
    exporting.written(subject_of(spec), folder / "a.onnx", "onnx")
    said = read_metadata(folder / "a.onnx")
    assert said["class_names"] == [f"kind {i}" for i in range(5)]
    assert said["input"]["type"] == "uint8" and said["input"]["shape"] == ["N", 32, 32, 3]
    assert said["preprocessing"]["short_side"] == 36
    assert said["preprocessing"]["image_resize"] in ("published", "modern")


def test_a_word_without_a_layer_is_named():
    x = Tensor(LayerOps(), (None, 8, 8, 4), "x")
    with pytest.raises(NotImplementedError, match="`moments`"):
        x.ops.moments(x)


# ---------------------------------------------------------------- what does not agree is not there


@pytest.mark.parametrize("word", ["swish_layer", "group_norm", "scale_shift", "mean_of_pixels"])
def test_a_file_that_does_not_agree_is_not_left_behind(folder, monkeypatch, word):
    right = getattr(onnx_file.OnnxOps, word)
    wrong = lambda ops, *args: ops.node("Mul", right(ops, *args), np.float32(1.01))
    monkeypatch.setattr(onnx_file.OnnxOps, word, wrong)
    (folder / "a.onnx").write_bytes(b"before")
    with pytest.raises(Disagreement, match="does not agree"):
        exporting.written(subject_of(spec_of()), folder / "a.onnx", "onnx")
    assert names(folder) == ["a.onnx"] and (folder / "a.onnx").read_bytes() == b"before"


@pytest.mark.parametrize(
    "file, float32, said",
    [
        (1e-5, 0, ""),
        (3e-4, 0, "does not agree"),
        (3e-4, 2e-4, ""),
        (3e-3, 2e-4, "does not agree"),
        (0.1, 0.1, "not determined in float32"),
    ],
)
def test_where_float32_is_coarse_a_file_may_be(monkeypatch, file, float32, said):
    "Shares of the largest logit: how far the file is from the network, and float32 from float64."
    logits = lambda subject, images, dtype="float32": np.full(
        (len(images), 5), 1 + float32 * (dtype == "float64"), "float64"
    )
    monkeypatch.setattr(Subject, "logits", logits)
    compare = lambda: agreement.compare(
        subject_of(spec_of()), lambda images: np.full((len(images), 5), 1 + file), "it"
    )
    if not said:
        assert compare().difference == pytest.approx(file)
    else:
        with pytest.raises(Disagreement, match=said):
            compare()


def test_int8_that_changes_classes_is_not_left_behind(folder, monkeypatch, sample):
    subject = replace(subject_of(spec_of()), batch=2)
    monkeypatch.setattr(int8, "LEAST_SAME", 0.5)  # random weights: five nearly equal answers
    monkeypatch.setattr(int8, "CALIBRATION", 4)
    monkeypatch.setattr(int8, "CHECKED", 7)
    found, _, kept = exporting.written(subject, folder / "a.onnx", "onnx", sample)
    assert kept.images == 7 and kept.same >= 0.5 and found.difference < 2e-5
    assert read_metadata(folder / "a.onnx") == subject.metadata
    before = (folder / "a.onnx").read_bytes()
    monkeypatch.setattr(int8, "LEAST_SAME", 1.1)
    with pytest.raises(Disagreement, match="changes the first class"):
        exporting.written(subject, folder / "a.onnx", "onnx", sample)
    assert (folder / "a.onnx").read_bytes() == before and names(folder) == ["a.onnx"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    weights = moved(spec_of())
    weights.arrays["all/Top/conv/conv2d/kernel"][0, 0, 0, 0] = value
    convert.write_ours(folder / "w.safetensors", weights)
    with pytest.raises(ValueError, match="no numbers"):
        export(folder / "w.safetensors", folder / "a.onnx")
    assert names(folder) == ["w.safetensors"]


def test_a_full_disk_is_explained(folder, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="Cannot write .*a.onnx.*Make room"):
        exporting.written(subject_of(spec_of()), folder / "a.onnx", "onnx")
    assert names(folder) == []


def test_what_a_killed_export_left_goes(folder):
    (folder / ".a.onnx.0123abcd.tmp.onnx").write_bytes(b"half")
    (folder / ".b.onnx.0123abcd.tmp.onnx").write_bytes(b"another's")
    exporting.written(subject_of(spec_of()), folder / "a.onnx", "onnx")
    assert names(folder) == [".b.onnx.0123abcd.tmp.onnx", "a.onnx"]


# ---------------------------------------------------------------- the command


def test_the_command_writes_a_file_and_a_card(run, folder):
    status, out, err = run("export", RUN, folder / "a.onnx", "--license", "cc-by-4.0")
    assert (status, err) == (0, "")
    assert "agrees with the network in ONNX Runtime" in out
    text = (folder / "MODEL_CARD.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["pipeline_tag"]) == ("cc-by-4.0", "image-classification")
    assert head["files"][0]["file"] == "a.onnx" and head["files"][0]["difference"] < 2e-5
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(0.2033, abs=1e-4)
    for part in ("| last | 20.33% | 55.67% | 300 |", "1,200 images", "## Limits", "## License"):
        assert part in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["a.onx"], "none of a format's"),
        (["a.onnx", "--format", "onxx"], "Unknown format 'onxx'"),
        (["a.onnx", "--batch-size", "0"], "--batch-size must be from 1 to 4,096"),
        (["a.onnx", "--image-size", "16"], "at least 32"),
        (["a.tflite", "--format", "keras"], r"\*\.keras only"),
        (["file/a.onnx"], "is a file"),
        (["there.onnx"], "--overwrite"),
        (["a.tflite", "--int8", "."], "int8 is for ONNX"),
        (["."], "no SavedModel"),
        (["folder.onnx"], "is a folder"),
        (["a.onnx", "--class-names", "two.txt"], "2 class names for the 10 classes"),
    ],
)
def test_mistakes_are_one_line(run, folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    (folder / "file").write_text("")
    (folder / "there.onnx").write_text("")
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "folder.onnx").mkdir()
    before = names(folder)
    status, out, err = run("export", RUN, *words)
    assert status in (1, 2) and len(err.splitlines()) == 1 and out == ""

    assert re.search(said, err), err
    assert names(folder) == before


@pytest.mark.parametrize(
    "package, target, hint",
    [
        ("onnx", "a.onnx", r"pip install -e '.\[onnx\]'"),
        ("onnxruntime", "a.onnx", r"pip install -e '.\[onnx\]'"),
        ("jax", "a.stablehlo", r"pip install -e '.\[jax\]'"),
        ("keras", "a.keras", r"pip install -e '.\[keras\]'"),
        ("tensorflow", "a", r"pip install -e '.\[keras\]'"),
    ],
)
def test_a_missing_package_is_one_line(folder, monkeypatch, package, target, hint):
    monkeypatch.setitem(sys.modules, package, None)
    subject = subject_of(spec_of())
    subject.__dict__["logits"] = lambda images: np.zeros((len(images), 5))
    to = exporting.export_format(folder / target)
    with pytest.raises(ImportError, match=f"needs {package}, which is not installed.*{hint}"):
        exporting.written(subject, folder / target, to)
    assert names(folder) == []


# ---------------------------------------------------------------- the card


def test_a_card_lists_the_files_of_one_network_and_is_never_lost(folder):
    first = export(RUN, folder / "a.onnx", weights="last")
    second = export(RUN, folder / "b.onnx", weights="last", batch=1)
    assert first.card == second.card == folder / "MODEL_CARD.md"
    head = yaml.safe_load(first.card.read_text().split("---\n")[1])
    assert [f["file"] for f in head["files"]] == ["a.onnx", "b.onnx"]
    another = export(RUN, folder / "c.onnx", weights="average")
    assert another.card.name == "c.onnx.MODEL_CARD.md"
    first.card.write_text(first.card.read_text().replace("## Limits", "## Limits, by me"))
    edited = first.card.read_text()
    assert export(RUN, folder / "d.onnx", weights="last").card.name == "d.onnx.MODEL_CARD.md"
    assert first.card.read_text() == edited


def test_a_card_without_a_run_says_what_it_does_not_know(folder):
    convert.write_ours(folder / "w.safetensors", moved(spec_of()))
    text = export(folder / "w.safetensors", folder / "a.onnx").card.read_text()
    assert "does not say on what it was trained" in text and "No validation" in text
    assert "model-index" not in text


def test_names_that_need_care_pass(folder):
    weights = moved(spec_of())._replace(class_names=("a: b", "ä|b", '"q"', "- x", "\u65e5\u672c"))
    convert.write_ours(folder / "w.safetensors", weights)
    card = export(folder / "w.safetensors", folder / "a.onnx").card.read_text()
    assert yaml.safe_load(card.split("---\n")[1])["files"][0]["file"] == "a.onnx"
    assert read_metadata(folder / "a.onnx")["class_names"] == list(weights.class_names)
    assert json.dumps(read_metadata(folder / "a.onnx"))
