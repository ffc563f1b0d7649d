"""Weights in and out: every direction by logits on freshly written files, and every bad file one error."""

import json
import subprocess
import sys
import types
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import keras_models
import numpy as np
import parity_vectors
import pytest
import tensorflow as tf
from safetensors.numpy import load_file, save_file
from tiny import PYTHON

from effnet_repro import checkpoint, convert
from effnet_repro.config import get_case
from effnet_repro.network import initial_weights, pack, params, run
from effnet_repro.ops import get_ops
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error
from effnet_repro.testing import test_allclose as check_close

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent / "data"))
import make_timm_vectors as timm_vectors  # noqa: E402

TIMM = json.loads((ROOT / "tests/data/timm_vectors.json").read_text())
SMALL = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10)


def logits(weights, pictures, dtype="float32"):
    arrays = {n: a.astype(dtype) for n, a in weights.arrays.items()}
    with np.errstate(over="ignore"):  # exp in a sigmoid far below zero
        return run(get_ops("numpy"), weights.spec, arrays, pictures.astype(dtype))


def moved(spec, seed=0):
    """Weights with every array away from its start, so that none can be swapped or dropped unseen."""
    rng = np.random.default_rng(seed)
    arrays = initial_weights(spec, seed)
    for name, value in arrays.items():
        if name.endswith("moving_variance"):
            arrays[name] = rng.uniform(0.5, 2, value.shape).astype("float32")
        elif not name.endswith("kernel") and not name.startswith("input/"):
            arrays[name] = (value + rng.normal(0, 0.2, value.shape)).astype("float32")
    return convert.Weights(spec, arrays, convert.case_for(spec), ("x",) * spec.num_classes)


def pictures(size, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (2, size, size, 3)).astype("float32")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        check_close(a[name], b[name], rtol=0, msg=name)


# ---------------------------------------------------------------- timm


def write_timm(path, arch):
    shapes = TIMM["shapes"].get(arch) or TIMM["shapes"][f"tf_{arch}"]
    save_file(timm_vectors.state_dict(shapes), str(path))
    return path


@pytest.mark.parametrize("row", TIMM["logits"], ids=lambda r: f"{r['arch']}-{r['size']}")
def test_timm_logits(row, tmp_path):
    """Against numbers that timm itself computed (tests/data/make_timm_vectors.py)."""
    weights = convert.read(write_timm(tmp_path / f"{row['arch']}.safetensors", row["arch"]))
    assert weights.spec.num_classes == 10 and weights.spec.input_norm == "keras"
    found = logits(weights, timm_vectors.pictures(row["size"]), "float64")
    error = relative_error(found, row["values"])
    plain = not row["arch"].startswith("tf_")
    said = " ".join(weights.notes)
    assert ("pads symmetrically" in said) == plain and "ImageNet's mean" in said
    if plain and row["size"] % 32 != 1:
        assert error > 0.1  # another padding: what the note warns of
    else:
        assert (
            error < 1e-4
        )  # timm and this in float64; gamma and the centring were stored in float32
    assert weights.case.image_size == {"tf_efficientnet_b3": 300}.get(
        row["arch"], 225 if plain else 224
    )


@pytest.mark.parametrize("size", range(8))
def test_timm_names_and_shapes(size):
    spec = ModelSpec.from_name(f"B{size}-G1-BN")
    arrays = {p.name: np.empty(p.shape, "float16") for p in params(spec)}
    listed = sorted([n, list(v.shape)] for n, v in convert.to_state_dict(spec, arrays).items())
    found = zlib.crc32(json.dumps(listed).encode())
    assert found == TIMM["checksums"][f"tf_efficientnet_b{size}"]
    assert found == TIMM["checksums"][f"efficientnet_b{size}"]
    shapes = {convert.timm_name(p.name): p.shape for p in params(spec)}
    assert convert.network_of(shapes, convert.timm_name) == spec


@pytest.mark.parametrize("input_norm", ["keras", "imagenet_mean"])
def test_to_timm_and_back(tmp_path, input_norm):
    spec = ModelSpec.from_name("B0-G1-BN", num_classes=10, input_norm=input_norm)
    weights = moved(spec)
    convert._write_ours(tmp_path / "ours.safetensors", weights)
    path = tmp_path / "out.safetensors"
    said = convert.convert(tmp_path / "ours.safetensors", path, to="torch").notes
    state = load_file(str(path))
    assert {n: list(v.shape) for n, v in state.items()} == dict(
        TIMM["shapes"]["tf_efficientnet_b0"]
    )
    back = convert.read(path)  # our header says which network, which padding, which centring
    assert back.spec == weights.spec and back.case == weights.case and not back.notes
    same({n: a for n, a in back.arrays.items() if n.startswith("all/")}, pack(weights.arrays))
    # somebody else's file of the same arrays, centred as the note says
    save_file(state, str(tmp_path / "plain.safetensors"))
    mean, std = (
        [float(v) for v in part.split(")")[0].split(",")] for part in said[-1].split("(")[1:]
    )
    how = dict(arch="tf_efficientnet_b0", input_mean=mean, input_std=std)
    again = convert.read(tmp_path / "plain.safetensors", **how)
    x = pictures(64)
    assert relative_error(logits(again, x), logits(weights, x)) < 2e-3  # four digits in the note
    check_close(logits(back, x), logits(weights, x), rtol=1e-5, atol=1e-5)


def test_timm_config_beside_the_file(tmp_path):
    write_timm(tmp_path / "model.safetensors", "tf_efficientnet_b0")
    with pytest.raises(ValueError, match="Pass arch, e.g. 'tf_efficientnet_b0'"):
        convert.read(tmp_path / "model.safetensors")
    said = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}
    about = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": said}
    (tmp_path / "config.json").write_text(json.dumps(about))
    weights = convert.read(tmp_path / "model.safetensors")
    check_close(weights.arrays["input/scale"], np.float32([2, 4, 2]) / 255, rtol=1e-6)
    check_close(weights.arrays["input/shift"], np.float32([-1, -2, -1]), rtol=1e-6)
    assert not any("ImageNet" in n for n in weights.notes)
    mine = convert.read(tmp_path / "model.safetensors", input_mean=[0, 0, 0], input_std=[1, 1, 1])
    check_close(mine.arrays["input/scale"], np.full(3, 1 / 255, "float32"), rtol=1e-6)


class FakeTensor:
    def __init__(self, value):
        self.value = value

    detach = float = lambda self: self

    def numpy(self):
        return self.value


def fake_torch(monkeypatch, contents):
    """A torch whose load hands out `contents`, and which refuses to be asked for anything unsafe."""

    def load(path, map_location, weights_only):
        assert map_location == "cpu" and weights_only is True
        if isinstance(contents, Exception):
            raise contents
        return contents

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))


def test_pth_as_training_scripts_write_it(tmp_path, monkeypatch):
    state = timm_vectors.state_dict(TIMM["shapes"]["tf_efficientnet_b0"])
    wrapped = {f"module.{n}": FakeTensor(v) for n, v in state.items()}
    fake_torch(monkeypatch, {"arch": "tf_efficientnet_b0", "epoch": 3, "state_dict": wrapped})
    (tmp_path / "last.pth.tar").write_bytes(b"PK")
    weights = convert.read(tmp_path / "last.pth.tar")
    plain = convert.read(
        write_timm(tmp_path / "tf_efficientnet_b0.safetensors", "tf_efficientnet_b0")
    )
    same(weights.arrays, plain.arrays)
    fake_torch(monkeypatch, [1, 2])
    with pytest.raises(ValueError, match="holds a list, not a dictionary of tensors"):
        convert.read(tmp_path / "last.pth.tar")
    fake_torch(monkeypatch, RuntimeError("PytorchStreamReader failed reading zip archive\nmore"))
    with pytest.raises(ValueError, match="not a whole file of weights.*PytorchStreamReader failed"):
        convert.read(tmp_path / "last.pth.tar")


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ImportError, match="Install torch, or save.*save_file"):
        convert.read(tmp_path / "model.pth")
    convert._write_ours(tmp_path / "ours.safetensors", moved(SMALL))
    with pytest.raises(ImportError, match="Write .safetensors instead"):
        convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# ---------------------------------------------------------------- our names in PyTorch, by a reference of its own


def conv2d(x, weight, stride=1):
    """A convolution as PyTorch stores it, (N, C, H, W) by (O, C / groups, k, k), SAME padding."""
    (n, c, h, w), (o, per_group, k, _) = x.shape, weight.shape
    pads = [max((-(-s // stride) - 1) * stride + k - s, 0) for s in (h, w)]
    x = np.pad(x, [(0, 0), (0, 0), *((p // 2, p - p // 2) for p in pads)])
    x = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
    groups = c // per_group
    x = x.reshape(n, groups, per_group, *x.shape[2:])
    weight = weight.reshape(groups, o // groups, per_group, k, k)
    y = np.einsum("ngchwij,gocij->ngohw", x, weight, optimize=True)
    return y.reshape(n, o, *y.shape[3:])


def silu(x):
    return x / (1 + np.exp(-x))


class Reference:
    """The network from a state dict with our names, written without our functions."""

    def __init__(self, state, groups):
        self.state, self.groups = {n: v.astype("float64") for n, v in state.items()}, groups

    def __contains__(self, name):
        return f"{name}.weight" in self.state

    def norm(self, x, name, act):
        n, c, h, w = x.shape
        gamma, beta = (
            self.state[f"{name}.norm.weight"],
            self.state.get(f"{name}.norm.bias", np.zeros(c)),
        )
        y = x.reshape(
            n, c // self.groups, self.groups, h, w
        )  # channel i belongs to group i mod groups
        mean, var = (f(y, axis=(1, 3, 4), keepdims=True) for f in (np.mean, np.var))
        y = ((y - mean) / np.sqrt(var + 1e-3)).reshape(n, c, h, w)
        y = y * gamma[:, None, None] + beta[:, None, None]
        y = silu(y) if act else y
        if f"{name}.proxy.gamma_prime" not in self.state:
            return y, np.ones(c)
        q = np.array([self._quantile((i + 0.5) / 200) for i in range(200)])[:, None]
        scale, shift = (self.state[f"{name}.proxy.{k}_prime"] for k in ("gamma", "beta"))
        proxy = silu(gamma * (q * (1 + scale) + shift) + beta)
        return y - proxy.mean(0)[:, None, None], 1 / np.sqrt(proxy.var(0) + 0.03)

    @staticmethod
    def _quantile(p):
        from scipy.special import ndtri

        return ndtri(p)

    def conv(self, x, name, stride=1):
        return conv2d(x, self.state[f"{name}.weight"], stride)

    def block(self, x, at, stride, residual):
        y = x
        if f"{at}.a.conv" in self:
            y, inv = self.norm(self.conv(y, f"{at}.a.conv"), f"{at}.a", True)
            y = y * inv[:, None, None]
        y, inv = self.norm(self.conv(y, f"{at}.b.conv", stride), f"{at}.b", True)
        gate = y.mean((2, 3), keepdims=True)
        for layer, act in (("1", silu), ("2", lambda v: 1 / (1 + np.exp(-v)))):
            bias = self.state[f"{at}.SE.{layer}.conv.bias"][:, None, None]
            gate = act(self.conv(gate, f"{at}.SE.{layer}.conv") + bias)
        y = y * gate * inv[:, None, None]
        y, _ = self.norm(self.conv(y, f"{at}.c.conv"), f"{at}.c", False)
        return x + y if residual else y

    def __call__(self, x, strides):
        x, inv = self.norm(self.conv(x, "block0.conv", strides[0]), "block0", True)
        x = x * inv[:, None, None]
        names = sorted({n.split(".")[0] for n in self.state if n.startswith("block")} - {"block0"})
        for at in names:
            first = at.endswith("a")
            stride = strides[int(at[5])] if first else 1
            x = self.block(x, at, stride, not first)
        x, _ = self.norm(self.conv(x, "Top.conv"), "Top", True)
        x = x.mean((2, 3))
        return x @ self.state["Top.logits.weight"].T + self.state["Top.logits.bias"]


@pytest.mark.parametrize("name", ["B0-G16-LN_PN_64", "B0-G1-GN_64"])
def test_our_networks_in_pytorch_form(name, tmp_path):
    """A network rebuilt from the written names and layout alone gives the published logits."""
    vector, expected = parity_vectors.load(name)
    spec = parity_vectors.spec_of(vector)
    weights = convert.Weights(
        spec, parity_vectors.weights_of(vector), convert.case_for(spec), ("x",) * 1000
    )
    convert._write_ours(tmp_path / "ours.safetensors", weights)
    path = tmp_path / "out.safetensors"
    notes = convert.convert(tmp_path / "ours.safetensors", path, to="torch").notes
    assert any("timm has no such network" in n for n in notes)
    state = load_file(str(path))
    x = parity_vectors.pictures_of(vector).transpose(0, 3, 1, 2).astype("float64")
    y = Reference(state, spec.norm_groups)(x, {0: 2, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 2, 7: 1})
    assert relative_error(y, expected) < 1e-4
    back = convert.read(path)
    assert back.spec == spec
    same(back.arrays, weights.arrays)


# ---------------------------------------------------------------- TensorFlow 1


def graph_of(spec, variables, size):
    """A v1 graph with the published variables, and logits that read them: (graph, pictures, logits, saver)."""
    graph, v1 = tf.Graph(), tf.compat.v1
    with graph.as_default():
        x = v1.placeholder(tf.float32, (2, size, size, 3))
        made = {
            n: v1.get_variable(n, initializer=v, use_resource=True) for n, v in variables.items()
        }
        rows = ("beta", "gamma", "mean", "inv_std", "beta_prime", "gamma_prime")
        weights = {n: v.read_value() for n, v in made.items() if not n.endswith("/proxy")}
        for n in set(made) - set(weights):
            weights.update({f"{n}/{r}": made[n][i, 0, 0] for i, r in enumerate(rows)})
        y = run(get_ops("tensorflow"), spec, weights, x)
        return graph, x, y, v1.train.Saver(list(made.values())), made


def test_published_checkpoint_in_and_out(tmp_path):
    """What a v1 session saves is read, and what is written a v1 graph restores: published logits both times."""
    vector, expected = parity_vectors.load("B0-G16-LN_PN_64")
    spec, variables = parity_vectors.spec_of(vector), parity_vectors.published_variables(vector)
    graph, x, y, saver, made = graph_of(spec, variables, 64)
    v1 = tf.compat.v1
    with graph.as_default(), v1.Session() as session:
        v1.train.get_or_create_global_step()
        kernel = made["all/block0/conv/conv2d/kernel"]
        slot = f"{kernel.op.name}/RMSProp"
        v1.get_variable(slot, initializer=np.ones(kernel.shape, "float32"))
        session.run(v1.global_variables_initializer())
        full = v1.train.Saver(v1.global_variables())
        prefix = full.save(session, str(tmp_path / "model.ckpt"), 100)
    case = replace(
        get_case("B0-G16-LN_PN-Native_16IPU_2x8"), input_norm="none"
    )  # as the vectors are
    for source in (tmp_path, prefix, f"{prefix}.index"):
        weights = convert.read(source, case=case)
        left_out = f"Left out 2 variables that are not weights: {slot}, global_step."
        assert weights.notes == (left_out,)
    assert relative_error(logits(weights, parity_vectors.pictures_of(vector)), expected) < 1e-4
    convert._write_ours(tmp_path / "ours.safetensors", weights)
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.ckpt")
    with v1.Session(graph=graph) as session:  # nothing is initialised here but by the file
        saver.restore(session, str(tmp_path / "out.ckpt"))
        found = session.run(y, {x: parity_vectors.pictures_of(vector)})
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["B0-G1-GN_64", "B3-G16-LN_PN_64"])
def test_published_networks_are_recognised(name, tmp_path):
    """Without a case: size, group size, norm and norm groups from the shapes, and the published logits."""
    vector, expected = parity_vectors.load(name)
    prefix = save_variables(tmp_path / "x.ckpt", parity_vectors.published_variables(vector))
    weights = convert.read(prefix)
    assert f"Taken for {weights.case.name} at" in weights.notes[0] and "Native" in weights.case.name
    weights = weights._replace(spec=replace(weights.spec, input_norm="none"))
    assert weights.spec == replace(
        parity_vectors.spec_of(vector), image_size=weights.spec.native_size
    )
    assert relative_error(logits(weights, parity_vectors.pictures_of(vector)), expected) < 2e-4


def save_variables(prefix, variables):
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[tf.constant(v) for v in variables.values()],
    )
    return prefix


def test_half_precision_checkpoint_uses_its_float32_copies(tmp_path):
    variables = pack(moved(SMALL).arrays)
    half = {n: v.astype("float16") for n, v in variables.items()}
    copies = {f"{n}/fp32": v for n, v in variables.items() if n.endswith("kernel")}
    found, others = convert.read_tf1(save_variables(tmp_path / "half.ckpt", {**half, **copies}))
    assert sorted(others) == sorted(copies)
    for name, value in variables.items():
        check_close(found[name], value, rtol=0 if name.endswith("kernel") else 1e-3, atol=1e-3)
    kernel = "all/block0/conv/conv2d/kernel"
    assert not np.array_equal(half[kernel].astype("float32"), variables[kernel])


def test_tf1_files_with_something_wrong(tmp_path):
    variables = pack(moved(SMALL).arrays)
    name = "all/block2a/c/conv/conv2d/kernel"
    renamed = {n.replace("block2a/c/", "block2a/d/"): v for n, v in variables.items()}
    with pytest.raises(ValueError, match="Nearest to all/block2a/c/.*: all/block2a/d/"):
        convert.read(save_variables(tmp_path / "renamed.ckpt", renamed))
    wrong = {**variables, name: variables[name][..., :4]}
    with pytest.raises(
        ValueError, match=rf"1 wrong shape: {name} \(1, 1, 32, 4\) for \(1, 1, 32, 16\)"
    ):
        convert.read(save_variables(tmp_path / "wrong.ckpt", wrong))
    extra = {**variables, "all/block9a/c/conv/conv2d/kernel": variables[name]}
    with pytest.raises(ValueError, match="1 unexpected: all/block9a"):
        convert.read(save_variables(tmp_path / "extra.ckpt", extra))
    proxy = {**variables, "all/block0/proxy": np.zeros((4, 1, 1, 16), "float32")}
    with pytest.raises(ValueError, match=r"shape \(6, 1, 1, C\). Received: all/block0/proxy"):
        convert.read(save_variables(tmp_path / "proxy.ckpt", proxy))
    with pytest.raises(ValueError, match="there is no all/block0/conv/conv2d/kernel"):
        convert.read(save_variables(tmp_path / "other.ckpt", {"resnet/w": np.zeros(3, "float32")}))
    save_variables(tmp_path / "cut.ckpt", variables)
    for ending in (".data-00000-of-00001", ".index"):
        file = tmp_path / f"cut.ckpt{ending}"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="not a whole TensorFlow checkpoint"):
            convert.read(tmp_path / "cut.ckpt")
        file.write_bytes(whole)
    (tmp_path / "cut.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(ValueError, match="not a whole TensorFlow checkpoint"):
        convert.read(tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match="holds 6 TensorFlow checkpoints"):
        convert.read(tmp_path)


def test_a_killed_converter_leaves_the_old_or_the_new(tmp_path):
    """At every sixth moment before and after renames, syncs and deletions; all: tests/kill_converter.py."""
    command = [sys.executable, str(ROOT / "tests/kill_converter.py"), str(tmp_path), "x.ckpt", "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=PYTHON)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["killed"] for r in rows} == {True, False} and {r["found"] for r in rows} == {1, 2}
    for row in rows:
        assert row["found"] == row["by_folder"] and row["then"] == 3 - row["found"], row
        assert row["killed"] or row["found"] == 2, row
        assert {name[len("x.ckpt") :] for name in row["left"]} in (ONE, TWO), row  # nothing else


def test_what_an_unreadable_index_may_name_is_left_alone(tmp_path):
    weights, path = moved(SMALL), tmp_path / "x.ckpt"
    convert.write_tf1(path, weights.arrays)
    (tmp_path / "x.ckpt.index").write_bytes(b"cut")
    before = (tmp_path / "x.ckpt.data-00000-of-00001").read_bytes()
    replace_file = convert.os.replace

    def full(old, new):
        if str(new).endswith(".index"):
            raise OSError(28, "No space left on device")
        replace_file(old, new)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="is unchanged"):
        patch.setattr(convert.os, "replace", full)
        convert.write_tf1(path, weights.arrays)
    assert (tmp_path / "x.ckpt.data-00000-of-00001").read_bytes() == before
    convert.write_tf1(path, weights.arrays)
    same(convert.read(path).arrays, weights.arrays)


ONE = {".index", ".data-00000-of-00001"}
TWO = {".index", ".data-00000-of-00002", ".data-00001-of-00002"}


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
    x = pictures(64)
    expected = keras.ops.convert_to_numpy(theirs(x))
    assert relative_error(softmax(logits(found[0], x)), expected) < 1e-4


def test_keras_files_out(tmp_path):
    weights = moved(ModelSpec.from_name("B0-G1-BN", image_size=64, num_classes=7))
    convert._write_ours(tmp_path / "ours.safetensors", weights)
    said = convert.convert(tmp_path / "ours.safetensors", tmp_path / "b0.keras").notes
    assert "softmax" in said[-1]
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "b0.weights.h5")
    x = pictures(64)
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
    convert._write_ours(tmp_path / "ours.safetensors", moved(SMALL))
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
    arrays, metadata, _ = checkpoint.load_weights(tmp_path / "ours.safetensors")
    same(arrays, weights.arrays)
    assert metadata["num_classes"] == 10 and len(metadata["class_names"]) == 10
    scores = validate(tmp_path / "ours.safetensors", image_size=32)
    assert scores["ours.safetensors"].pictures > 0


def test_a_run_folder_and_its_average(tmp_path):
    weights = moved(SMALL)
    run_dir = tmp_path / "run"
    convert._write_ours(checkpoint.epoch_path(run_dir / "checkpoints", 1), weights)
    average = checkpoint.WeightAverage()
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
    assert logits(weights, pictures(32)).shape == (2, 5)
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
    with pytest.raises(ValueError, match="torchvision's files are not read"):
        convert.read(path)
    save_file({"layer1.0.conv1.weight": np.zeros((8, 8, 3, 3), "float32")}, str(path))
    with pytest.raises(ValueError, match="neither timm's names nor ours"):
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
    convert._write_ours(ours, moved(SMALL))
    with pytest.raises(ValueError, match="Pass to='torch' or to='ours'"):
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
        ("ours.safetensors out.onnx", 1, "Unknown kind of target: out.onnx"),
        ("ours.safetensors out.ckpt --to tf", 2, "Unknown format 'tf'"),
        (
            "ours.safetensors out.ckpt --case B0-G1-GN-Natve_16IPU_2x8",
            2,
            "Did you mean 'B0-G1-GN-Nat",
        ),
        ("ours.safetensors out.ckpt --case B0-G1-GN-Native_16IPU_2x8", 1, "holds CIFAR-G16-LN_PN"),
        ("ours.safetensors out.ckpt --image-size 8", 2, "--image-size must be at least 32"),
        ("ours.safetensors out.ckpt --class-names none.txt", 1, "none.txt"),
        ("ours.safetensors out.ckpt --arch efficientnet_b0", 1, "arch is for PyTorch files"),
        ("ours.safetensors out.ckpt --weights best", 2, "Unknown weights 'best'"),
        ("ours.safetensors ours.safetensors --to ours", 1, "exists. Pass overwrite"),
        ("ours.safetensors", 2, "TARGET"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, command, monkeypatch, words, status, answer):
    convert._write_ours(tmp_path / "ours.safetensors", moved(SMALL))
    monkeypatch.chdir(tmp_path)
    got, out, err = command(*words.split())
    assert got == status and answer in err and len(err.splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors"]
