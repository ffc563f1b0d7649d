"""PyTorch's files in and out: timm's names and logits, and ours by a reference of its own."""

import json
import sys
import types
import zlib

import numpy as np
import parity_vectors
import pytest
from conversions import SMALL, TIMM, logits, moved, random_images, same, timm_vectors, write_timm
from safetensors.numpy import load_file, save_file

from effnet_repro import convert
from effnet_repro.network import pack, params
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error
from effnet_repro.testing import test_allclose as check_close

# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("row", TIMM["logits"], ids=lambda r: f"{r['arch']}-{r['size']}")
def test_timm_logits(row, tmp_path):
    """Against numbers that timm itself computed (tests/data/make_timm_vectors.py)."""
    weights = convert.read(write_timm(tmp_path / f"{row['arch']}.safetensors", row["arch"]))
    assert weights.spec.num_classes == 10 and weights.spec.input_norm == "keras"
    found = logits(weights, timm_vectors.images(row["size"]), "float64")
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
    convert.write_ours(tmp_path / "ours.safetensors", weights)
    path = tmp_path / "out.safetensors"
    said = convert.convert(tmp_path / "ours.safetensors", path, to="torch").notes
    state = load_file(str(path))
    assert {n: list(v.shape) for n, v in state.items()} == dict(
        TIMM["shapes"]["tf_efficientnet_b0"]
    )
    back = convert.read(path)  # our header says which network, which padding, which centring
    assert back.spec == weights.spec and back.case == weights.case and not back.notes
    same({n: a for n, a in back.arrays.items() if n.startswith("all/")}, pack(weights.arrays))
    # somebody else's file of the same arrays, centered as the note says
    save_file(state, str(tmp_path / "plain.safetensors"))
    mean, std = (
        [float(v) for v in part.split(")")[0].split(",")] for part in said[-1].split("(")[1:]
    )
    how = dict(arch="tf_efficientnet_b0", input_mean=mean, input_std=std)
    again = convert.read(tmp_path / "plain.safetensors", **how)
    x = random_images(64)
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
    convert.write_ours(tmp_path / "ours.safetensors", moved(SMALL))
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
    convert.write_ours(tmp_path / "ours.safetensors", weights)
    path = tmp_path / "out.safetensors"
    notes = convert.convert(tmp_path / "ours.safetensors", path, to="torch").notes
    assert any("timm has no such network" in n for n in notes)
    state = load_file(str(path))
    x = parity_vectors.images_of(vector).transpose(0, 3, 1, 2).astype("float64")
    y = Reference(state, spec.norm_groups)(x, {0: 2, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 2, 7: 1})
    assert relative_error(y, expected) < 1e-4
    back = convert.read(path)
    assert back.spec == spec
    same(back.arrays, weights.arrays)
