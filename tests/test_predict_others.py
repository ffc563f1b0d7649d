"""Files of other programs predict, too, each with its own way of normalizing images."""

import numpy as np
import pytest
from conversions import SMALL, logits, moved, write_timm
from pictures import picture
from safetensors.numpy import save_file

from effnet_repro import convert
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
    assert network.case.image_resize == "modern"
    assert network.class_names == tuple(map(str, range(10)))
    network = Predictor(keras_file, image_size=64)
    assert (network.case.input_norm, network.image_size) == ("keras", 64)


def test_without_a_classifier_it_says_what_to_do(tmp_path):
    weights = moved(SMALL)
    state = convert.to_state_dict(weights.spec, weights.arrays)
    body = {n: np.array(a, order="C") for n, a in state.items() if ".logits." not in n}
    save_file(body, str(tmp_path / "body.safetensors"))
    with pytest.raises(ValueError, match="no classifier.*effnet-finetune .*--new-head"):
        Predictor(tmp_path / "body.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm", "keras_file"])
def test_its_answers_are_the_network_s(name, request):
    source = request.getfixturevalue(name)
    more = {"arch": "tf_efficientnet_b0"} if name == "timm" else {}
    image = picture(64 * 256 // 224 + 1, 90)
    network = Predictor(source, image_size=64, precision="float32", **more)
    (found,) = network([image], top=1000)
    weights = convert.read(source, **more)
    own = logits(weights, network.see(image)[None])[0].astype("float64")
    p = np.exp(own - own.max())
    p = np.sort(p / p.sum())[::-1]
    np.testing.assert_allclose([g.probability for g in found.guesses], p, rtol=2e-3)
    assert predict(source, image, image_size=64, **more)[0].guesses[0] == found.guesses[0]
