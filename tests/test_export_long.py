"""Every format with every arm, B0 to B5, and networks of other libraries: minutes, so only in the long run."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conversions import write_timm
from test_export import ARMS, ENDING, RUN, check_file, spec_of, subject_of
from test_task_pages import commands
from tiny import PYTHON, TINY

from effnet_repro.config import override
from effnet_repro.export import FORMATS, export, exporting, read_metadata
from effnet_repro.scaling import ModelSpec

pytestmark = pytest.mark.long


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("batch", [None, 2])
def test_every_format_with_every_arm(tmp_path, kind, arm, batch):
    check_file(tmp_path, kind, arm, batch)


@pytest.mark.parametrize("size", range(6))
@pytest.mark.parametrize("arm", ["G1-BN", "G16-LN_PN", "G16-GN"])
def test_every_size(tmp_path, size, arm):
    spec = replace(ModelSpec.from_name(f"B{size}-{arm}", num_classes=10), image_size=64)
    subject = subject_of(spec)
    for name, value in subject.arrays.items():
        if name.endswith("/c/batch_norm/gamma"):
            subject.arrays[name] = (
                0.1 * value
            )  # else numbers grow block by block, until float32 is too coarse
    found, *_ = exporting.written(subject, tmp_path / "a.onnx", "onnx")
    assert found.difference < 1e-4


@pytest.mark.parametrize("kind", FORMATS)
def test_a_network_of_keras_applications(tmp_path, kind):
    import keras
    from keras_models import scatter

    source = keras.applications.EfficientNetB0(weights=None, classes=7, classifier_activation=None)
    scatter(source, np.random.default_rng(0))
    source.save_weights(tmp_path / "b0.weights.h5")
    path = tmp_path / f"a{ENDING[kind]}"
    done = export(tmp_path / "b0.weights.h5", path, kind)
    assert done.agreement.difference < 5e-5
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    theirs = np.asarray(source(images.astype("float32")))
    ours = exporting.WRITERS[kind].opened(path)(images)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, run):
    shutil.copytree(RUN, tmp_path / "runs" / "b1")
    monkeypatch.chdir(tmp_path)
    lines = commands("07_export")
    assert {"b1.onnx", "b1", "b1.tflite", "b1.stablehlo", "b1.keras"} <= {li[2] for li in lines}
    for name, *words in lines:
        status, out, err = run(name.partition("-")[2], *words, "--overwrite")
        assert (status, err) == (0, "") and "agrees with the network" in out
    assert {"b1.onnx", "b1", "MODEL_CARD.md"} <= {p.name for p in tmp_path.iterdir()}


def test_int8_keeps_the_classes_of_a_trained_network(tmp_path):
    from effnet_repro.data import open_data
    from effnet_repro.training import train

    data = open_data(verbose=False)
    case = override(TINY, image_resize="modern", image_size=48)
    train(case, None, tmp_path / "run", budget="demo", epochs=4, progress=False)
    done = export(tmp_path / "run", tmp_path / "a.onnx", int8=data)
    assert done.kept.same > 0.95 and abs(done.kept.top1 - done.kept.float_top1) < 0.04
    plain = export(tmp_path / "run", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()
    assert read_metadata(tmp_path / "a.onnx") == plain.subject.metadata
    assert "int8" in done.card.read_text()


@pytest.mark.parametrize("arch", ["tf_efficientnet_b0", "efficientnet_b0"])
def test_a_network_of_timm(tmp_path, arch):
    source = write_timm(tmp_path / f"{arch}.safetensors", arch)
    done = export(source, tmp_path / "a.onnx", image_size=97)
    assert done.agreement.difference < 1e-3  # batch norm with made-up averages: its numbers grow


@pytest.mark.parametrize("arm", ["G1-BN", "G16-LN_PN", "G1-GN"])
def test_a_keras_file_opens_without_this_package(tmp_path, arm):
    path = tmp_path / "a.keras"
    exporting.written(subject_of(spec_of(arm)), path, "keras")
    program = (
        "import sys; sys.modules['effnet_repro'] = None; import keras, numpy\n"
        f"model = keras.models.load_model({str(path)!r})\n"
        "assert model(numpy.zeros((3, 32, 32, 3), 'uint8')).shape == (3, 5)\n"
    )
    for backend in ("tensorflow", "jax"):
        given = {**PYTHON, "KERAS_BACKEND": backend}
        subprocess.run([sys.executable, "-c", program], env=given, check=True, cwd=tmp_path)


def test_a_stablehlo_file_runs_without_this_package(tmp_path):
    path = tmp_path / "a.stablehlo"
    exporting.written(subject_of(spec_of()), path, "stablehlo")
    program = (
        "import sys; sys.modules['effnet_repro'] = None; import jax, numpy\n"
        "from jax import export\n"
        f"call = export.deserialize(bytearray(open({str(path)!r}, 'rb').read())).call\n"
        "assert call(numpy.zeros((3, 32, 32, 3), 'uint8')).shape == (3, 5)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=PYTHON, check=True, cwd=tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_replaced_is_the_old_one_until_it_is_the_new_one(
    tmp_path, kind, monkeypatch
):
    path = tmp_path / f"a{ENDING[kind]}"
    first = subject_of(spec_of())
    exporting.written(first, path, kind)
    monkeypatch.setattr(exporting, "compare", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exporting.written(replace(first, batch=1), path, kind)
    assert read_metadata(path) == first.metadata and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    exporting.written(replace(first, batch=1), path, kind)
    assert read_metadata(path)["input"]["shape"][0] == 1 and len(list(tmp_path.iterdir())) == 1
