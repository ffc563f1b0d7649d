"""Weights in and out: Keras files, our own, the command, and every bad file one error."""

import subprocess
import sys
import zipfile

import h5py
import keras
import keras_models
import numpy as np
import pytest
from conversions import (
    ROOT,
    SMALL,
    TIMM,
    logits,
    moved,
    random_images,
    same,
    timm_vectors,
    write_timm,
)
from safetensors.numpy import load_file, save_file

from effnet_repro import averaging, checkpoint, convert
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error

# ---------------------------------------------------------------- keras.applications


@pytest.fixture(scope="module")
def theirs():
    """A keras.applications B0 with every array moved, input norm included."""
    model = keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classes=7)
    return keras_models.scatter(model, np.random.default_rng(0))


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_keras_files_in(theirs, tmp_path):
    theirs.save_weights(str(tmp_path / "b0.weights.h5"))
    theirs.save(str(tmp_path / "b0.keras"))
    theirs.save(
        str(tmp_path / "whole.h5")
    )  # the weights in it, alone: the form of Keras' ImageNet files
    with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(tmp_path / "b0.h5", "w") as file:
        for name in whole["model_weights"]:
            whole.copy(f"model_weights/{name}", file)
        file.attrs.update(whole["model_weights"].attrs)
    (tmp_path / "whole.h5").unlink()
    found = [convert.read(p) for p in sorted(tmp_path.iterdir())]
    assert [w.spec.name for w in found] == ["B0-G1-BN"] * 3
    assert all(w.spec.num_classes == 7 and w.spec.input_norm == "keras" for w in found)
    for other in found[1:]:
        same(other.arrays, found[0].arrays)
    x = random_images(64)
    expected = keras.ops.convert_to_numpy(theirs(x))
    assert relative_error(softmax(logits(found[0], x)), expected) < 1e-4


def test_keras_files_out(tmp_path):
    weights = moved(ModelSpec.from_name("B0-G1-BN", image_size=64, num_classes=7))
    convert.write_ours(tmp_path / "ours.safetensors", weights)
    said = convert.convert(tmp_path / "ours.safetensors", tmp_path / "b0.keras").notes
    assert "softmax" in said[-1]
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "b0.weights.h5")
    x = random_images(64)
    model = keras.models.load_model(str(tmp_path / "b0.keras"))
    expected = softmax(logits(weights, x))
    assert relative_error(keras.ops.convert_to_numpy(model(x)), expected) < 1e-4
    zero = [np.zeros_like(w) for w in model.get_weights()]
    model.set_weights(zero)
    model.load_weights(str(tmp_path / "b0.weights.h5"))
    assert relative_error(keras.ops.convert_to_numpy(model(x)), expected) < 1e-4


def test_keras_files_with_something_wrong(theirs, tmp_path):
    theirs.save_weights(str(tmp_path / "b0.weights.h5"))
    whole = (tmp_path / "b0.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole Keras file"):
        convert.read(tmp_path / "cut.weights.h5")
    (tmp_path / "text.keras").write_text("no archive")
    with pytest.raises(ValueError, match="not a whole Keras file"):
        convert.read(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match="not a whole Keras file"):
        convert.read(tmp_path / "empty.keras")
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    dense.save_weights(str(tmp_path / "dense.weights.h5"))
    with pytest.raises(ValueError, match="fit none of them"):
        convert.read(tmp_path / "dense.weights.h5")
    with pytest.raises(ValueError, match="asked for: B0-G1-GN.*look like B0-G1-BN"):
        convert.read(tmp_path / "b0.weights.h5", case="B0-G1-GN-Native_16IPU_2x8")
    with pytest.raises(ValueError, match="arch is for PyTorch files"):
        convert.read(tmp_path / "b0.weights.h5", arch="tf_efficientnet_b0")
    convert.write_ours(tmp_path / "ours.safetensors", moved(SMALL))
    with pytest.raises(ValueError, match="Keras writes weights to"):
        convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.h5")
    with pytest.raises(ValueError, match="Received: CIFAR-G16-LN_PN"):
        convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.weights.h5")
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- checkpoints of ours


def test_a_converted_file_validates_and_fine_tunes(tmp_path):
    """The file has everything that validation and fine-tuning ask for."""
    from effnet_repro.training import validate

    weights = moved(SMALL)
    convert.write_tf1(tmp_path / "model.ckpt", weights.arrays)
    convert.convert(tmp_path / "model.ckpt", tmp_path / "ours.safetensors")
    arrays, metadata, _ = averaging.load_weights(tmp_path / "ours.safetensors")
    same(arrays, weights.arrays)
    assert metadata["num_classes"] == 10 and len(metadata["class_names"]) == 10
    scores = validate(tmp_path / "ours.safetensors", image_size=32)
    assert scores["ours.safetensors"].pictures > 0


def test_a_run_folder_and_its_average(tmp_path):
    weights = moved(SMALL)
    run_dir = tmp_path / "run"
    convert.write_ours(checkpoint.epoch_path(run_dir / "checkpoints", 1), weights)
    average = averaging.WeightAverage()
    average.update({n: 2 * a for n, a in weights.arrays.items()}, 1)
    average.save(run_dir / "checkpoints" / "average.safetensors")
    same(convert.read(run_dir, weights="last").arrays, weights.arrays)
    for kind in ("average", "auto"):  # the case says 350 epochs: a long run
        found = convert.read(run_dir, weights=kind)
        same(found.arrays, {n: 2 * a for n, a in weights.arrays.items()})
    with pytest.raises(ValueError, match="holds CIFAR-G16-LN_PN. Received: case='B0"):
        convert.read(run_dir, case="B0-G1-GN-Native_16IPU_2x8")


def test_a_file_without_a_classifier(tmp_path):
    state = timm_vectors.state_dict(TIMM["shapes"]["tf_efficientnet_b0"])
    body = {n: v for n, v in state.items() if not n.startswith("classifier")}
    path = tmp_path / "tf_efficientnet_b0_features.safetensors"
    save_file(body, str(path))
    with pytest.raises(ValueError, match="has no classifier. Pass num_classes"):
        convert.read(path)
    weights = convert.read(path, num_classes=5, class_names=list("abcde"))
    assert weights.class_names == tuple("abcde") and "untrained" in weights.notes[-1]
    assert logits(weights, random_images(32)).shape == (2, 5)
    with pytest.raises(ValueError, match="2 class names for 5 classes"):
        convert.read(path, num_classes=5, class_names=["a", "b"])
    save_file(state, str(path))
    with pytest.raises(ValueError, match="has 10 classes. Received: num_classes=5"):
        convert.read(path, num_classes=5)


# ---------------------------------------------------------------- bad input


def test_pytorch_files_with_something_wrong(tmp_path):
    path = write_timm(tmp_path / "tf_efficientnet_b0.safetensors", "tf_efficientnet_b0")
    state, whole = load_file(str(path)), path.read_bytes()
    for cut in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            convert.read(path)
    save_file({n.replace("conv_pwl", "conv_p"): v for n, v in state.items()}, str(path))
    with pytest.raises(
        ValueError, match="missing.*Nearest to blocks.1.0.conv_pwl.*: blocks.1.0.conv_p"
    ):
        convert.read(path)
    save_file({**state, "conv_head.weight": state["conv_head.weight"][:-1]}, str(path))
    with pytest.raises(ValueError, match="1 wrong shape: conv_head.weight"):
        convert.read(path)
    save_file({"features.0.0.weight": np.zeros((32, 3, 3, 3), "float32")}, str(path))
    with pytest.raises(ValueError, match="names of no EfficientNet that is read"):
        convert.read(path)
    save_file({"layer1.0.conv1.weight": np.zeros((8, 8, 3, 3), "float32")}, str(path))
    with pytest.raises(ValueError, match="names of no EfficientNet that is read"):
        convert.read(path)
    save_file(state, str(path))
    with pytest.raises(ValueError, match="asked for: B1-G1-GN"):
        convert.read(path, case="B1-G1-GN-Native_16IPU_4x4")
    with pytest.raises(ValueError, match="Unknown case 'B0-G1-BN'"):
        convert.read(path, case="B0-G1-BN")
    with pytest.raises(ValueError, match="Unknown arch 'efficientnet_lite0'"):
        convert.read(path, arch="efficientnet_lite0")
    with pytest.raises(ValueError, match="`input_std` must be positive"):
        convert.read(path, input_std=[1, 0, 1])
    with pytest.raises(ValueError, match="`input_mean` is three numbers"):
        convert.read(path, input_mean=[1, 2])


def test_paths_with_something_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file, run folder or TensorFlow checkpoint"):
        convert.convert(tmp_path / "none.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="is a folder without a checkpoint"):
        convert.read(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(
        ValueError, match="Unknown kind of weights: model.onnx. Legal: .safetensors"
    ):
        convert.read(tmp_path / "model.onnx")
    ours = tmp_path / "ours.safetensors"
    convert.write_ours(ours, moved(SMALL))
    with pytest.raises(ValueError, match="Pass `to`: 'torch' or 'ours'"):
        convert.convert(ours, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="Unknown kind of target: out.onnx"):
        convert.convert(ours, tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="Unknown format 'tf'"):
        convert.convert(ours, tmp_path / "out.onnx", to="tf")
    with pytest.raises(ValueError, match="Unknown format 'pytorch'"):
        convert.read(ours, "pytorch")
    convert.convert(ours, tmp_path / "out.ckpt")
    for target in ("out.ckpt", "out.ckpt.index"):
        with pytest.raises(FileExistsError, match="out.ckpt.index exists"):
            convert.convert(ours, tmp_path / target)
    convert.convert(ours, tmp_path / "out.ckpt", overwrite=True)
    for to in ("tf1", "ours", "torch", "keras"):
        with pytest.raises(IsADirectoryError, match="is a folder. Name a file in it"):
            convert.convert(ours, tmp_path, to=to, overwrite=True)
    for name in ("x.ckpt", "x.safetensors"):  # a file where a folder should be
        with pytest.raises(OSError, match="Cannot write .*What was there before is unchanged"):
            convert.convert(ours, ours / name, to="torch" if "safe" in name else "tf1")
    whole = ours.read_bytes()
    ours.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        convert.convert(ours, tmp_path / "new.ckpt")
    assert not list(tmp_path.glob("new*")) and not list(tmp_path.glob(".*"))


def test_needs_no_framework_until_it_meets_its_file(tmp_path):
    """From timm to ours without TensorFlow, Keras or PyTorch, as a small server would do it."""
    path = write_timm(tmp_path / "tf_efficientnet_b0.safetensors", "tf_efficientnet_b0")
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'keras', 'torch', 'jax', 'h5py'): sys.modules[name] = None\n"
        "from effnet_repro.convert import convert\n"
        f"print(convert({str(path)!r}, {str(tmp_path / 'ours.safetensors')!r}).spec.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=str(ROOT), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "B0-G1-BN"


def test_a_saved_model_of_ours(tmp_path):
    """`build_model(...).save(...)` is a Keras file, too: the network and its centring come from the layers."""
    from effnet_repro.efficientnet import build_model, get_weights

    for input_norm in ("imagenet_mean", "keras"):
        model = build_model("CIFAR-G16-LN_PN", num_classes=10, input_norm=input_norm)
        model.save(str(tmp_path / "own.keras"))
        weights = convert.read(tmp_path / "own.keras")
        assert weights.spec.input_norm == input_norm and weights.spec.name == "CIFAR-G16-LN_PN"
        same(weights.arrays, get_weights(model))


# ---------------------------------------------------------------- effnet-convert


@pytest.fixture
def command(capsys):
    """Run effnet-convert in this process: (exit status, stdout, stderr)."""
    from effnet_repro.cli import convert_command

    def call(*words):
        return (convert_command([str(w) for w in words]), *capsys.readouterr())

    return call


def test_the_command_end_to_end(tmp_path, command):
    timm = write_timm(tmp_path / "model.safetensors", "tf_efficientnet_b0")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"animal {i}" for i in range(10)))
    ours = tmp_path / "ours.safetensors"
    status, out, err = command(
        *(timm, ours, "--arch", "tf_efficientnet_b0", "--class-names", names, "--image-size", 192),
        *("--input-mean", 0.5, 0.5, 0.5, "--input-std", 0.5, 0.5, 0.5),
    )
    assert (status, err) == (0, "") and "B0-G1-BN, 10 classes, 4," in out and "ImageNet" not in out
    metadata = checkpoint.read_metadata(ours)
    assert metadata["class_names"][9] == "animal 9" and metadata["case"]["image_size"] == 192
    status, out, err = command(ours, tmp_path / "out.ckpt")
    assert status == 0 and "The published code subtracts its own mean" in out
    status, out, _ = command(tmp_path / "out.ckpt", tmp_path / "again.safetensors", "--from", "tf1")
    assert status == 0 and "Taken for B0-G1-BN at 224 px" in out
    kept = {n: a for n, a in checkpoint.load(ours)[0].items() if n.startswith("all/")}
    same(checkpoint.load(tmp_path / "again.safetensors")[0], kept)


@pytest.mark.parametrize(
    "words, status, answer",
    [
        ("none.pth out.safetensors", 1, "No file, run folder or TensorFlow checkpoint none.pth"),
        ("ours.safetensors out.onnx", 2, "Unknown kind of target: out.onnx"),
        ("ours.safetensors out.ckpt --to tf", 2, "Unknown format 'tf'"),
        (
            "ours.safetensors out.ckpt --case B0-G1-GN-Natve_16IPU_2x8",
            2,
            "Did you mean 'B0-G1-GN-Nat",
        ),
        ("ours.safetensors out.ckpt --case B0-G1-GN-Native_16IPU_2x8", 1, "holds CIFAR-G16-LN_PN"),
        ("ours.safetensors out.ckpt --image-size 8", 2, "--image-size must be at least 32"),
        ("ours.safetensors out.ckpt --class-names none.txt", 2, "none.txt"),
        ("ours.safetensors out.ckpt --arch efficientnet_b0", 1, "arch is for PyTorch files"),
        ("ours.safetensors out.ckpt --weights best", 2, "Unknown weights 'best'"),
        ("ours.safetensors ours.safetensors --to ours", 1, "exists. Pass --overwrite"),
        ("ours.safetensors", 2, "TARGET"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, command, monkeypatch, words, status, answer):
    convert.write_ours(tmp_path / "ours.safetensors", moved(SMALL))
    monkeypatch.chdir(tmp_path)
    got, out, err = command(*words.split())
    assert got == status and answer in err and len(err.splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors"]
