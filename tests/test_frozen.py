"""Frozen batch norm stays frozen in Keras' own `fit` and in ours, on both backends, as in keras.applications."""

import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny import ONE_BLOCK, PYTHON, STAGES, small_network  # noqa: F401

from effnet_repro.config import override
from effnet_repro.data import open_data
from effnet_repro.efficientnet import MBConv, build_model, get_weights, weights_by_name
from effnet_repro.network import segments
from effnet_repro.recipe import trained_segments
from effnet_repro.scaling import ModelSpec
from effnet_repro.training import Program, TrainingModel, make_optimizer, updates

SPEC = replace(ModelSpec.from_name("CIFAR-G1-BN", num_classes=0), net_stages=STAGES)
X = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype("float32")


def fitted(body):
    "Fit a classifier on `body`: names of its arrays that moved, and how far its features did"
    pooled = keras.layers.GlobalAveragePooling2D()(body.output)
    model = keras.Model(body.input, [keras.layers.Dense(3, name="dense")(pooled), pooled])
    model.compile("sgd", ["mse", None])
    read = lambda: {n: np.array(v) for n, v in weights_by_name(model).items()}
    before, dense = read(), model.get_layer("dense").get_weights()
    features = model.predict(X, verbose=0)[1]
    model.fit(X, np.ones((4, 3), "float32"), batch_size=2, epochs=2, verbose=0)
    assert not np.allclose(model.get_layer("dense").get_weights()[0], dense[0])  # it did train
    after, now = read(), model.predict(X, verbose=0)[1]
    moved = {n for n in before if (before[n] != after[n]).any()}
    return moved, np.abs(now - features).max() / np.abs(features).max()


def test_a_frozen_network_stands_still_after_save_and_load(tmp_path):
    body = build_model(SPEC)
    body.trainable = False
    body.save(tmp_path / "body.keras")
    moved, difference = fitted(keras.models.load_model(tmp_path / "body.keras"))
    assert moved == set() and difference == 0


def test_frozen_segments_stand_still_and_the_others_move():
    body, parts = build_model(SPEC), segments(SPEC)
    for s in parts[:3]:
        body.get_layer(s.name.replace("/", ".")).trainable = False
    moved, difference = fitted(body)
    assert difference > 0
    assert not moved & {p.name for s in parts[:3] for p in s.params}
    assert {p.name for s in parts[3:] for p in s.params if "/moving_" in p.name} <= moved


def test_a_frozen_layer_is_its_inference_self():
    layer = MBConv(filters=8, expand_ratio=2, group_size=1, norm="BN")
    x = np.random.default_rng(1).normal(2, 3, (4, 6, 6, 8)).astype("float32")
    inference = keras.ops.convert_to_numpy(layer(x))
    training = keras.ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(training - inference).max() > 0.1
    inference = keras.ops.convert_to_numpy(layer(x))
    layer.trainable = False
    frozen = keras.ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_array_equal(frozen, inference)
    layer.trainable = True
    assert np.abs(keras.ops.convert_to_numpy(layer(x, training=True)) - training).max() < 1e-4


def training_model(**fields):
    "Our own training step around a small network with batch norm, and its data"
    small = dict(norm="BN", group_size=1, micro_batch_size=4, global_batch_size=8)
    layout = dict(num_replicas=1, num_stages=1, pipeline_splits=(), norm_groups=1)
    case = override(ONE_BLOCK, **small, **layout, **fields)
    data = open_data()
    spec = ModelSpec.from_case(case, num_classes=data.num_classes)
    trained = trained_segments([s.name for s in segments(spec)], case.variable_filter)
    program = Program(case, spec, trained, "float32", 0)
    return TrainingModel(build_model(spec), program), updates(case, data, seed=0)


def one_step(model, stream):
    "Names of the arrays that one training step moves"
    read = lambda: {n: np.array(v) for n, v in weights_by_name(model.network).items()}
    before = read()
    model.fit(stream, epochs=1, steps_per_epoch=1)
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    after = read()
    return {n for n in before if (before[n] != after[n]).any()}


def test_our_training_step_leaves_what_is_not_trained():
    moved = one_step(*training_model(variable_filter=("Top",)))
    assert moved and all(n.startswith("all/Top/") for n in moved)
    assert "all/Top/batch_norm/moving_mean" in moved


def test_our_training_step_leaves_what_was_frozen_before_compiling():
    model, stream = training_model()
    model.network.get_layer("block0").trainable = False
    model.compile(make_optimizer(model.program.case))
    moved = one_step(model, stream)
    assert moved and not any(n.startswith("all/block0/") for n in moved)
    assert "all/block1a/b/batch_norm/moving_mean" in moved


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_the_body_goes_a_part_of_its_way(optimizer):
    "An eighth of the rate outside `Top` is an eighth of each way; RMSProp and gradient descent alike."
    ways = []
    for rate in (1.0, 0.125):
        how = dict(optimizer=optimizer, warmup_epochs=0, base_learning_rate_exponent=-8)
        model, stream = training_model(body_rate=rate, **how)
        before = get_weights(model.network)
        one_step(model, stream)
        after = get_weights(model.network)
        ways.append({n: after[n] - before[n] for n in before if "moving_" not in n})
    for name, whole in ways[0].items():
        wanted = whole if name.startswith("all/Top/") else whole / 8
        atol = 1e-7 + 2e-7 * np.abs(before[name]).max()  # the weights' own rounding
        np.testing.assert_allclose(ways[1][name], wanted, rtol=1e-4, atol=atol, err_msg=name)
    assert max(np.abs(way).max() for way in ways[0].values()) > 1e-3


def on_jax(chosen):
    "What pytest says of this file on JAX: Keras has one backend a process"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**PYTHON, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="this is the test on JAX")
def test_on_jax():
    "All but one of the two optimizers, which take the same way to their rates"
    assert "6 passed" in on_jax("not sgd and not on_jax")


@pytest.mark.long
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="this is the test on JAX")
def test_gradient_descent_on_jax():
    assert "1 passed" in on_jax("sgd")
