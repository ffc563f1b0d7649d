"""What converters are told and given: flags are applied or refused, files named, and nothing unpacks without end.

A row is kind -> a file that is wrong -> words of the one line that says so.
"""

import io
import json
import os
import pickle
import re
import sys
import types
import zipfile

import h5py
import numpy as np
import pytest
from conversions import SMALL, TIMM, moved, timm_vectors
from safetensors.numpy import save

from effnet_repro import checkpoint, convert
from effnet_repro.scaling import ModelSpec

B0 = ModelSpec.from_name("B0-G1-BN", image_size=64, num_classes=7)
NAMES = [f"name {i}" for i in range(SMALL.num_classes)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "ours.safetensors"
    convert.write_ours(path, moved(SMALL))
    return path


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("to", ["ours", "torch"])
def test_flags_are_applied_to_weights_of_ours(ours, names, tmp_path, run, to):
    target = tmp_path / "out.safetensors"
    how = "--to", to, "--class-names", names, "--image-size", "96"
    status, out, err = run("convert", ours, target, *how, "--num-classes", len(NAMES))
    assert status == 0, err
    found = convert.read(target)
    assert found.class_names == tuple(NAMES) and found.case.image_size == 96


def test_class_names_and_size_stay_in_a_keras_file(tmp_path):
    weights = moved(B0)
    convert.write_ours(tmp_path / "b0.safetensors", weights)
    names = [f"n{i}" for i in range(7)]
    how = dict(class_names=names, image_size=96)
    for target in ("b0.keras", "b0.weights.h5"):
        convert.convert(tmp_path / "b0.safetensors", tmp_path / target, **how)
        found = convert.read(tmp_path / target)
        assert found.class_names == tuple(names) and found.case.image_size == 96


@pytest.mark.parametrize(
    "words, says",
    [
        (["--num-classes", "7"], "has .* classes. Received: num_classes=7"),
        (["--weights", "average"], "chooses among those of a run folder"),
        (["--arch", "tf_efficientnet_b0"], "arch is for PyTorch files"),
        (["--input-mean", "0", "0", "0"], "input_mean is for PyTorch files"),
        (["--input-std", "1", "1", "1"], "input_std is for PyTorch files"),
        (["--class-names", "short.txt"], "1 class names for"),
        (["--class-names", "empty.txt"], "empty.txt has an empty line"),
        (["--class-names", "binary.txt"], "binary.txt is not text in UTF-8: it is a PNG"),
        (["--class-names", "."], "a folder, not a file"),
        (["--config-path", "x.yml"], "pass --case, too"),
        (["--case", "B0-G16-LN_PN-Half_16IPU_2x8"], "holds "),
    ],
)
def test_flags_that_do_not_fit_are_refused(ours, tmp_path, run, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("one\n\ntwo")
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    status, out, err = run("convert", ours, tmp_path / "out.safetensors", "--to", "torch", *words)
    assert status in (1, 2) and len(err.splitlines()) == 1 and re.search(says, err), err
    assert not (tmp_path / "out.safetensors").exists() and not out


@pytest.mark.parametrize("target", ["out.ckpt", "out.pth"])
@pytest.mark.parametrize("name, value", [("class_names", NAMES), ("image_size", 96)])
def test_what_a_target_has_no_place_for_is_refused(ours, tmp_path, target, name, value):
    with pytest.raises(ValueError, match=f"{target} has no place for {name}"):
        convert.convert(ours, tmp_path / target, **{name: value})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- headers


def header(**entries):
    return save({"w": np.ones(2, "float32")}, {k: json.dumps(v) for k, v in entries.items()})


def eight_bits(**metadata):
    "A safetensors file of numbers of eight bits, which some networks are published in"
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    head = json.dumps({"__metadata__": metadata, "w": entry}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(4)


HEADERS = {
    "a list": ("w.safetensors", header(effnet_repro_torch=[1]), "header of .*w.safetensors is a list"),
    "a number": ("w.safetensors", header(effnet_repro_torch=5), "is a number"),
    "a case that is a number": ("w.safetensors", header(effnet_repro_torch={"case": 5}), "`case` in .* is a number"),
    "an unknown case": (
        "w.safetensors", header(effnet_repro_torch={"case": {"x": 1}}), "`case` in .*w.safetensors is none",
    ),
    "a case of wrong types": (
        "w.safetensors", header(effnet_repro_torch={"case": {"model_size": [], "norm": {}}}), "`case` in .* is none",
    ),
    "names that are a number": ("w.safetensors", header(effnet_repro_torch={"class_names": 5}), "`class_names` in"),
    "a mean that is a text": ("w.safetensors", header(effnet_repro_torch={"mean": "x"}), "input_mean"),
    "a crop that is a list": ("w.safetensors", header(effnet_repro_torch={"crop_pct": [1]}), "`crop_pct` of"),
    "ours, a list": ("w.safetensors", header(effnet_repro=[1]), "w.safetensors is damaged: its metadata"),
    "ours, with class names that are a number": (
        "w.safetensors", checkpoint.encode({"w": np.ones(2)}, {"case": {}, "class_names": 5}), "its class_names",
    ),
    "ours, with a number of classes that is text": (
        "w.safetensors", checkpoint.encode({"w": np.ones(2)}, {"case": {}, "num_classes": "x"}), "its num_classes",
    ),
    "eight bits a number": ("w.safetensors", eight_bits(), "that NumPy can hold"),
    "ours, without a case": (
        "w.safetensors", checkpoint.encode({"w": np.ones(2)}, {"case": 5}), "does not say which case",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_wrong_types_are_one_line(tmp_path, run, kind):
    name, data, says = HEADERS[kind]
    (tmp_path / name).write_bytes(data)
    status, _, err = run("convert", tmp_path / name, tmp_path / "out.safetensors", "--to", "torch")
    assert status == 1 and len(err.splitlines()) == 1 and re.search(says, err), err
    assert "unforeseen" not in err


def test_a_checkpoint_of_numbers_that_numpy_lacks(tmp_path):
    path = tmp_path / "epoch-0001.safetensors"
    path.write_bytes(eight_bits(effnet_repro='{"format_version": 1}'))
    with pytest.raises(checkpoint.DamagedFile, match="epoch-0001.safetensors is not a whole"):
        checkpoint.load(path)
    path.write_bytes(eight_bits(effnet_repro="[" * 10**5))
    with pytest.raises(checkpoint.DamagedFile, match="its metadata"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "text", ["[1]", "5", "null", '"x"', "{", '{"architecture": 5}', "[" * 10**5]
)
def test_a_config_beside_a_file_may_be_anything(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "w.safetensors").write_bytes(save({"w": np.ones(2, "float32")}))
    with pytest.raises(ValueError, match="names of no EfficientNet that is read"):
        convert.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize("about", [5, [1], "x"])
def test_a_config_of_timm_with_wrong_types_is_named(tmp_path, about):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": about}))
    (tmp_path / "w.safetensors").write_bytes(save({"w": np.ones(2, "float32")}))
    with pytest.raises(ValueError, match="`pretrained_cfg` in .*config.json is a"):
        convert.read(tmp_path / "w.safetensors")


NO_WEIGHTS = {  # kind -> an array of timm's names, how it is changed, words of the one line
    "quantized": ("conv_stem.weight", lambda a: (9 * a).astype("int8"), "numbers of type int8 in conv_stem.weight"),
    "true and false": ("bn1.bias", lambda a: a > 0, "numbers of type bool in bn1.bias"),
    "not a number": ("bn1.bias", lambda a: a * np.nan, "not finite in bn1.bias"),
    "infinite": ("bn1.weight", lambda a: a + np.inf, "not finite in bn1.weight"),
    "a variance below zero": ("bn1.running_var", lambda a: -1 - a, "variance below zero in bn1.running_var"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_numbers_that_are_no_weights_are_refused(tmp_path, kind):
    name, change, says = NO_WEIGHTS[kind]
    state = timm_vectors.state_dict(TIMM["shapes"]["tf_efficientnet_b0"])
    state[name] = np.ascontiguousarray(change(state[name]))
    (tmp_path / "tf_efficientnet_b0.safetensors").write_bytes(save(state))
    with pytest.raises(ValueError, match=says):
        convert.read(tmp_path / "tf_efficientnet_b0.safetensors")


def test_quantized_weights_of_keras_are_refused(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as made:
        made["conv/kernel"] = np.zeros((3, 3, 3, 8), "int8")
    with pytest.raises(ValueError, match="numbers of type int8 in conv/kernel: quantized"):
        convert.read(tmp_path / "w.h5")


def test_weights_in_bfloat16_are_read(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    state = timm_vectors.state_dict(TIMM["shapes"]["tf_efficientnet_b0"])
    state = {
        k: v.astype(ml_dtypes.bfloat16) if v.dtype.kind == "f" else v for k, v in state.items()
    }
    (tmp_path / "tf_efficientnet_b0.safetensors").write_bytes(save(state))
    found = convert.read(tmp_path / "tf_efficientnet_b0.safetensors").arrays
    wanted = state["conv_stem.weight"].astype("float32").transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found["all/block0/conv/conv2d/kernel"], wanted)


# ---------------------------------------------------------------- files of other kinds

KINDS = {
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "an HTML page": b"<!doctype html><p>not found",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "an empty file": b"",
    "a text": b"not found\n",
    "a gzip archive": b"\x1f\x8b" + bytes(99),
}


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".safetensors", ".pth"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(KINDS[kind])
    with pytest.raises(ValueError, match=f"w{suffix} is .*{kind}") as error:
        convert.read(path)
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_suffix_and_a_fifo(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="w.onnx. Legal: .*a ZIP archive"):
        convert.read(tmp_path / "w.onnx")
    (tmp_path / "w.CKPT").write_bytes(header())
    with pytest.raises(ValueError, match="It is a safetensors file.*call it w.safetensors"):
        convert.read(tmp_path / "w.CKPT")
    os.mkfifo(tmp_path / "w.h5")
    with pytest.raises(ValueError, match="w.h5 is a FIFO"):
        convert.read(tmp_path / "w.h5")


# ---------------------------------------------------------------- limits


def keras_archive(path, config, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", "{}")
        for name, data in entries.items():
            archive.writestr(name.replace("_", "."), data)


def arrays_file(shapes, **how):
    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        for name, shape in shapes.items():
            made.create_dataset(name, shape, "f4", chunks=True, compression="gzip", **how)
    return file.getvalue()


def dense(units):
    return {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": "Dense", "config": {"units": units}}]},
    }


def test_an_empty_data_set_of_hdf5_is_no_weight(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as made:
        made.create_dataset("a", data=h5py.Empty("f4"))
    with pytest.raises(ValueError, match="w.h5 is not a file of keras.applications"):
        convert.read(tmp_path / "w.h5")


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_arrays_of_absurd_sizes_are_not_read(tmp_path, suffix):
    data, path = arrays_file({"a": (2**20, 2**20)}), tmp_path / f"w{suffix}"
    path.write_bytes(data)
    if suffix == ".keras":
        keras_archive(path, dense(2), **{"model.weights_h5": data})
    with pytest.raises(ValueError, match="says to hold 1,099,511,627,776 numbers; at most"):
        convert.read(path)


def test_a_model_whose_layers_are_absurd_is_not_made(tmp_path):
    path = tmp_path / "w.keras"
    data = arrays_file({f"a{i}": (2, 2) for i in range(120)})
    keras_archive(path, dense(10**9), **{"model.weights_h5": data})
    with pytest.raises(ValueError, match="asks for units=1,000,000,000"):
        convert.read(path)
    keras_archive(path, dense(50_000), **{"model.weights_h5": arrays_file({"a": (2, 2)})})
    with pytest.raises(ValueError, match="holds 1 arrays: it is no EfficientNet"):
        convert.read(path)
    for config in ([1], 5, {}, {"class_name": "Nothing", "config": []}):
        keras_archive(path, config, **{"model.weights_h5": data})
        with pytest.raises(ValueError, match="w.keras") as error:
            convert.read(path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", [".keras", ".pth"])
def test_archives_that_unpack_without_end_are_not_unpacked(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("effnet_repro.outside.MOST_UNPACKED", 2**20)
    path = tmp_path / f"w{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**22))
    with pytest.raises(ValueError, match="unpacks to 4,194,304 bytes; at most"):
        convert.read(path)


def test_a_view_that_is_larger_than_its_file_is_not_filled(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(1).expand(2**20, 2**12)
    torch.save({"a": tensor}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="says to hold 4,294,967,296 numbers"):
        convert.read(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [[1, 2], 5, "x", {"a": "no tensor"}])
def test_pickles_of_other_things_are_refused(tmp_path, value):
    pytest.importorskip("torch")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(ValueError, match="w.pth") as error:
        convert.read(tmp_path / "w.pth")
    assert len(str(error.value).splitlines()) == 1


def test_checkpoints_of_tensorflow_of_absurd_shapes_are_refused(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    prefix = str(tmp_path / "m.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=["all/x"], shape_and_slices=[""], tensors=[tf.zeros((64, 64))]
    )
    monkeypatch.setattr("effnet_repro.outside.MOST_NUMBERS", 1000)
    with pytest.raises(ValueError, match="m.ckpt says to hold 4,096 numbers"):
        convert.read(prefix)


# ---------------------------------------------------------------- PyTorch's own files, without PyTorch


class Tensor:
    "As much of a tensor as a reader asks for"

    def __init__(self, shape=(2,), error=None):
        self.shape, self.error = shape, error

    def detach(self):
        return self

    def float(self):
        if self.error:
            raise self.error
        return self

    def numpy(self):
        return np.ones(self.shape, "float32")


def torch_archive(path):
    "A ZIP archive as torch.save writes it: a pickle, which names storages beside it"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", b"3\n")


def raises(error):
    def load():
        raise error

    return load


TORCH = {  # what torch.load gives -> words of the one line
    "nothing but tensors": (lambda: [Tensor()], "holds a list, not a dictionary of tensors"),
    "a tensor": (lambda: Tensor(), "holds one tensor, not a dictionary"),
    "objects": (raises(pickle.UnpicklingError("Weights only\nload failed. See")), "which are not run .it is a ZIP"),
    "a damaged archive": (raises(RuntimeError("PytorchStreamReader failed\n  finding data")), "not a whole file"),
    "a large view": (lambda: {"a": Tensor((2**20, 2**12))}, "says to hold 4,294,967,296 numbers"),
    "sparse tensors": (lambda: {"a": Tensor(error=RuntimeError("sparse"))}, "no plain numbers .sparse."),
    "an average alone": (lambda: {"state_dict_ema": {"a.weight": Tensor()}}, "of no EfficientNet .*There: a.weight"),
    "no tensors": (lambda: {"epoch": 3, "state_dict": {}}, "names of no EfficientNet that is read"),
    "other names": (lambda: {"model": {"a.weight": Tensor()}}, "names of no EfficientNet that is read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TORCH)
def test_what_pytorch_reads_or_refuses_is_one_line(tmp_path, monkeypatch, kind):
    load, says = TORCH[kind]
    torch_archive(tmp_path / "w.pth")
    torch = types.ModuleType("torch")
    torch.load = lambda path, map_location, weights_only: load() if weights_only else None
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(ValueError, match=says) as error:
        convert.read(tmp_path / "w.pth")
    assert "w.pth" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_file_of_pytorch_without_pytorch(tmp_path, monkeypatch):
    torch_archive(tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError, match="Reading w.pth.*Install torch, or save the state"
    ) as error:
        convert.read(tmp_path / "w.pth")
    assert len(str(error.value).splitlines()) == 1
