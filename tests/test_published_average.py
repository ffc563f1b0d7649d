"""A published average has proxy statistics of its own: they are used, said to be, and given back."""

import keras
import numpy as np
import parity_vectors
import pytest
from tiny import SMALL, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint, convert
from effnet_repro.efficientnet import build_model, fold, load_published, to_published
from effnet_repro.network import initial_weights, pack, run, unpack
from effnet_repro.ops import get_ops
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error

SPEC = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10, image_size=32, **SMALL)
CASE = convert.case_for(SPEC)
X = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")


def averaged(spec=SPEC):
    "Published variables of three networks, averaged as the published code does: every number of every variable"
    rng, moved = np.random.default_rng(3), []
    for _ in range(3):
        arrays = initial_weights(spec, 1)
        for name, value in arrays.items():
            if not name.endswith("kernel"):
                arrays[name] = value + rng.normal(0, 0.1, value.shape).astype("float32")
        moved.append(pack(arrays))
    return {n: np.float32(np.mean([m[n] for m in moved], axis=0)) for n in moved[0]}


def own_logits(variables, spec=SPEC):
    "What the published network gives: statistics from the rows that hold them, whatever the vectors say"
    weights = {}
    for name, value in variables.items():
        rows = ("beta", "gamma", "mean", "inv_std") if name.endswith("/proxy") else ()
        weights.update({f"{name}/{r}": value[i, 0, 0] for i, r in enumerate(rows)})
        weights.update({} if rows else {name: value})
    folded = ModelSpec(**{**spec.__dict__, "folded": True})
    with np.errstate(over="ignore"):
        return run(get_ops("numpy"), folded, weights, X)


def predict(model):
    return model.predict(X, verbose=0)


def test_a_model_that_loads_an_average_gives_its_logits(tmp_path, capsys):
    variables, model = averaged(), build_model(SPEC)
    wanted = own_logits(variables)
    recomputed = {n: v.copy() for n, v in variables.items()}
    for name in (n for n in variables if n.endswith("/proxy")):
        recomputed[name][2:4] = 0  # nobody wrote them: they follow from the vectors
    load_published(model, recomputed)
    assert capsys.readouterr().out == ""
    assert relative_error(predict(model), wanted) > 1e-4  # what this is about
    load_published(model, variables)
    assert "Stored proxy statistics are used" in capsys.readouterr().out
    assert relative_error(predict(model), wanted) < 1e-5
    assert relative_error(predict(fold(model)), wanted) < 1e-5
    model.save(tmp_path / "average.keras")
    loaded = keras.models.load_model(tmp_path / "average.keras")
    assert relative_error(predict(loaded), wanted) < 1e-5
    for again in (model, loaded):
        back = to_published(again)
        assert back.keys() == variables.keys()
        assert all((back[n] == v).all() for n, v in variables.items())
    loaded(X, training=True)  # training computes them, and stores them anew
    weights = unpack(to_published(loaded), statistics=False)
    assert relative_error(predict(loaded), run(get_ops("numpy"), SPEC, weights, X)) < 1e-5


@pytest.mark.parametrize("statistics", ["stored", "computed"])
def test_a_folded_model_takes_both(statistics):
    variables = averaged()
    if statistics == "computed":
        variables = pack(unpack(variables, statistics=False))
    model = build_model(ModelSpec(**{**SPEC.__dict__, "folded": True}))
    load_published(model, variables)
    assert relative_error(predict(model), own_logits(variables)) < 1e-5


def test_an_average_goes_through_every_format(tmp_path):
    variables = averaged()
    wanted = own_logits(variables)
    weights = unpack(variables)
    convert.write_tf1(tmp_path / "average.ckpt", weights)
    written, _ = convert.read_tf1(tmp_path / "average.ckpt")
    assert all((written[n] == v).all() for n, v in variables.items())
    said = convert.convert(
        tmp_path / "average.ckpt", tmp_path / "ours.safetensors", case=CASE
    ).notes
    assert any("Stored proxy statistics are used" in note for note in said)
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.safetensors", to="torch")
    convert.convert(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    convert.convert(tmp_path / "again.safetensors", tmp_path / "again.ckpt")
    for name in ("average.ckpt", "ours.safetensors", "out.safetensors", "again.ckpt"):
        found = convert.read(tmp_path / name, case=CASE)
        with np.errstate(over="ignore"):
            logits = run(get_ops("numpy"), found.spec, found.arrays, X)
        assert relative_error(logits, wanted) < 1e-5, name
    written, _ = convert.read_tf1(tmp_path / "again.ckpt")
    assert all((written[n] == v).all() for n, v in variables.items())


def test_an_ordinary_checkpoint_is_read_as_before(tmp_path):
    weights = unpack(averaged(), statistics=False)
    convert.write_tf1(tmp_path / "model.ckpt", weights)
    found = convert.read(tmp_path / "model.ckpt", case=CASE)
    assert found.arrays.keys() == weights.keys() and not found.spec.stored_proxies
    assert any("computed: the stored ones are the same" in note for note in found.notes)


def test_validation_uses_them_and_fine_tuning_goes_on(tmp_path, capsys):
    from effnet_repro.data import open_data
    from effnet_repro.training import evaluate, finetune, validate

    weights, path = unpack(averaged()), tmp_path / "ours.safetensors"
    convert.write_ours(path, convert.Weights(SPEC, weights, CASE, tuple("0123456789")))
    (score,) = validate(path, image_size=32).values()
    data, spec = open_data(verbose=False), ModelSpec.from_case(CASE, num_classes=10)
    plain = unpack(pack(weights), statistics=False)
    assert score.loss != evaluate(spec, plain, data, 32).loss
    capsys.readouterr()
    how = dict(image_size=32, budget="smoke", precision="float32", progress=False)
    done = finetune(path, run_dir=tmp_path / "run", **how)
    assert "left out: training computes its own" in capsys.readouterr().out
    after = checkpoint.load(done.checkpoint)[0]
    assert not any(n.endswith("/proxy/mean") for n in after)


@pytest.mark.parametrize("name", ["B0-G16-LN_PN_64"])
def test_the_parity_vectors_have_none(name, capsys):
    vector, logits = parity_vectors.load(name)
    spec = parity_vectors.spec_of(vector)
    weights = unpack(parity_vectors.published_variables(vector))
    assert not any(n.endswith("/proxy/mean") for n in weights)
    ordinary = pack(weights)
    assert unpack(ordinary).keys() == weights.keys()  # float32 against float64
    assert spec.proxy_norm and logits.shape[1] == 1000
