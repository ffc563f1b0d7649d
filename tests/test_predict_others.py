"""Files of other programs predict, too, each with its own way of normalizing images."""

import json

import numpy as np
import pytest
from conversions import logits, write_body, write_timm
from images import smooth_image
from PIL import Image

from effnet_repro import convert
from effnet_repro.convert.settle import usual_crop
from effnet_repro.data.files import timm_square
from effnet_repro.network import initial_weights
from effnet_repro.predict import Predictor, predict
from effnet_repro.scaling import ModelSpec


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    return write_timm(tmp_path_factory.mktemp("timm") / "some.safetensors", "efficientnet_b0")


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory):
    "What keras.applications saves: weights of B0 with ten classes"
    spec = ModelSpec.from_name("B0-G1-BN", num_classes=10, input_norm="keras")
    weights = convert.Weights(spec, initial_weights(spec, 3), convert.case_for(spec), ("x",) * 10)
    path = tmp_path_factory.mktemp("keras") / "b0.weights.h5"
    from effnet_repro.convert.keras_files import write_keras

    write_keras(path, weights)
    return path


def test_a_network_knows_how_its_images_are_made(timm, keras_file):
    with pytest.raises(ValueError, match="Pass arch"):
        Predictor(timm)
    network = Predictor(timm, arch="tf_efficientnet_b0")
    assert network.image_size == 224 and network.case.input_norm == "keras"
    assert network.case.image_resize == "modern" and network.crop_pct == 0.875
    assert network.class_names == tuple(map(str, range(10)))
    about = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"crop_pct": 0.5}}
    (timm.parent / "config.json").write_text(json.dumps(about))
    try:
        assert Predictor(timm).crop_pct == 0.5
        convert.convert(timm, timm.parent / "ours.safetensors")
        assert Predictor(timm.parent / "ours.safetensors").crop_pct == 0.5
    finally:
        (timm.parent / "config.json").unlink()
    network = Predictor(keras_file, image_size=64)
    assert (network.case.input_norm, network.image_size) == ("keras", 64)


def test_a_square_is_that_of_timm():
    "By hand: the short side of 40 becomes floor(64 / 0.875) = 73, the long one floor(73 x 60 / 40) = 109."
    image = smooth_image(60, 40)
    square = timm_square(image, 64, 0.875)
    larger = Image.fromarray(image).resize((73, 109), Image.Resampling.BICUBIC)
    assert np.array_equal(square, np.asarray(larger)[22 : 22 + 64, 4 : 4 + 64])
    assert [usual_crop(s) for s in (224, 240, 260, 300, 380, 456, 528, 600)] == [
        0.875,
        0.882,
        0.89,
        0.904,
        0.922,
        0.934,
        0.943,
        0.949,
    ]


def test_without_a_classifier_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no classifier.*effnet-finetune .*--new-head"):
        Predictor(write_body(tmp_path / "body.safetensors"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm", "keras_file"])
def test_its_answers_are_the_network_s(name, request):
    source = request.getfixturevalue(name)
    more = {"arch": "tf_efficientnet_b0"} if name == "timm" else {}
    image = smooth_image(64 * 256 // 224 + 1, 90)
    network = Predictor(source, image_size=64, precision="float32", **more)
    (found,) = network([image], top=1000)
    weights = convert.read(source, **more)
    own = logits(weights, network.see(image)[None])[0].astype("float64")
    p = np.exp(own - own.max())
    p = np.sort(p / p.sum())[::-1]
    np.testing.assert_allclose([g.probability for g in found.guesses], p, rtol=2e-3)
    assert predict(source, image, image_size=64, **more)[0].guesses[0] == found.guesses[0]
