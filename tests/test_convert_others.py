"""State dicts of torchvision and efficientnet-pytorch, and of networks inside other modules.

Their networks are timm's, so timm's arrays under their names must give timm's logits. Names are spelled out here from
the order of their modules.
"""

import re

import numpy as np
import pytest
from conversions import TIMM, logits, timm_vectors
from safetensors.numpy import save_file

from effnet_repro import convert
from effnet_repro.predict import Predictor
from effnet_repro.testing import relative_error

SHAPES = TIMM["shapes"]["tf_efficientnet_b0"]
REPEATS = (1, 2, 2, 3, 3, 4, 1)


def torchvision_names():
    "timm's module -> torchvision's"
    found = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    found.update({"conv_head": "features.8.0", "bn2": "features.8.1"})
    for stage, repeats in enumerate(REPEATS):
        for at in range(repeats):
            ours, theirs = f"blocks.{stage}.{at}", f"features.{stage + 1}.{at}.block"
            parts = [("conv_pw", "bn1"), ("conv_dw", "bn2"), "se", ("conv_pwl", "bn3")]
            if stage == 0:
                parts = [("conv_dw", "bn1"), "se", ("conv_pw", "bn2")]
            for number, part in enumerate(parts):
                if part == "se":
                    found[f"{ours}.se.conv_reduce"] = f"{theirs}.{number}.fc1"
                    found[f"{ours}.se.conv_expand"] = f"{theirs}.{number}.fc2"
                else:
                    found.update(
                        {f"{ours}.{n}": f"{theirs}.{number}.{i}" for i, n in enumerate(part)}
                    )
    return found


def efficientnet_pytorch_names():
    "timm's module -> that of efficientnet-pytorch"
    found = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    found["classifier"] = "_fc"
    number = 0
    for stage, repeats in enumerate(REPEATS):
        for at in range(repeats):
            names = dict(conv_pw="_expand_conv", bn1="_bn0", conv_dw="_depthwise_conv", bn2="_bn1")
            names.update(conv_pwl="_project_conv", bn3="_bn2")
            if stage == 0:
                names = dict(
                    conv_dw="_depthwise_conv", bn1="_bn1", conv_pw="_project_conv", bn2="_bn2"
                )
            names.update({"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"})
            for ours, theirs in names.items():
                found[f"blocks.{stage}.{at}.{ours}"] = f"_blocks.{number}.{theirs}"
            number += 1
    return found


def renamed(names, before=""):
    "timm's arrays under other names"
    state = timm_vectors.state_dict(SHAPES)
    return {
        before + re.sub(r"^(.*)\.", lambda m: names[m[1]] + ".", n): v for n, v in state.items()
    }


def expected(arch, size):
    return next(r["values"] for r in TIMM["logits"] if (r["arch"], r["size"]) == (arch, size))


@pytest.mark.parametrize(
    "names, package, arch, size",
    [
        (torchvision_names(), "torchvision", "efficientnet_b0", 65),
        (efficientnet_pytorch_names(), "efficientnet-pytorch", "tf_efficientnet_b0", 64),
    ],
    ids=["torchvision", "efficientnet-pytorch"],
)
def test_logits_are_timm_s(names, package, arch, size, tmp_path):
    save_file(renamed(names), str(tmp_path / "model.safetensors"))
    weights = convert.read(tmp_path / "model.safetensors")
    assert f"Names of {package}." in weights.notes
    assert any("symmetrically" in note for note in weights.notes) == (package == "torchvision")
    found = logits(weights, timm_vectors.images(size), "float64")
    assert relative_error(found, expected(arch, size)) < 1e-4
    with pytest.raises(ValueError, match="Leave it out"):
        convert.read(tmp_path / "model.safetensors", arch="efficientnet_b0")


def test_a_network_inside_other_modules_and_without_its_classifier(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(renamed(torchvision_names(), "module._orig_mod.net."), str(path))
    whole = convert.read(path)
    state = {n: v for n, v in renamed(torchvision_names()).items() if "classifier" not in n}
    save_file(state, str(path))
    body = convert.read(path, num_classes=0)
    assert body.spec.num_classes == 0
    assert all(np.array_equal(v, whole.arrays[n]) for n, v in body.arrays.items())
    with pytest.raises(ValueError, match="effnet-finetune .*--new-head"):
        Predictor(path)


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    state = renamed(torchvision_names())
    odd = state.pop("features.3.1.block.2.fc1.weight")
    save_file({**state, "features.3.1.block.9.fc1.weight": odd}, str(path))
    with pytest.raises(ValueError, match="blocks.2.1.se.conv_reduce.weight"):
        convert.read(path)
    save_file({"embeddings.convolution.weight": odd}, str(path))
    with pytest.raises(ValueError, match="names of no EfficientNet that is read"):
        convert.read(path)


def test_images_are_cut_as_torchvision_cuts_them(tmp_path):
    save_file(renamed(torchvision_names()), str(tmp_path / "model.safetensors"))
    assert convert.read(tmp_path / "model.safetensors").crop_pct == 0.875


def test_relatives_are_refused_by_what_they_lack(tmp_path):
    "Before anybody is asked for `arch`."
    state = timm_vectors.state_dict(SHAPES)
    path = tmp_path / "model.safetensors"
    for lacking in ("conv_dw", "se.conv_reduce"):  # EfficientNetV2; lite
        save_file({n: v for n, v in state.items() if f"blocks.0.0.{lacking}" not in n}, str(path))
        with pytest.raises(ValueError, match=f"none of efficientnet_b0 to b7.*{lacking}"):
            convert.read(path)
