"""The network against the published one, on both backends, in inference and in training."""

import re
from pathlib import Path

import numpy as np
import parity_vectors
import pytest
from tiny import SMALL

from effnet_repro import mbconv, scaling
from effnet_repro.network import initial_weights, params, run, segments
from effnet_repro.ops import NumpyOps, TrainContext, get_ops
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error, test_allclose


def _forward(ops, spec, weights, images, labels, outputs, context=None):
    logits = run(ops, spec, weights, images, context, outputs)
    picked = ops.one_hot(ops.asarray(np.asarray(labels, "int32")), spec.num_classes)
    return logits, -ops.mean(ops.sum(ops.log_softmax(logits) * picked, -1))


def _with_gradients(name, spec, weights, images, labels, context=None):
    """Logits, loss, gradients by name and segment outputs, on one backend."""
    ops, outputs = get_ops(name), {}
    trainable = [p.name for p in params(spec) if p.trainable]
    if name == "tensorflow":
        tf = ops.tf
        w = {k: tf.constant(v) for k, v in weights.items()}
        with tf.GradientTape() as tape:
            for k in trainable:
                tape.watch(w[k])
            logits, loss = _forward(ops, spec, w, tf.constant(images), labels, outputs, context)
        gradients = tape.gradient(loss, [w[k] for k in trainable])
    else:
        import jax

        def loss_of(values):
            outputs.clear()
            w = {**weights, **dict(zip(trainable, values))}
            logits, loss = _forward(ops, spec, w, ops.asarray(images), labels, outputs, context)
            return loss, (logits, dict(outputs))

        grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        (loss, (logits, aux)), gradients = grad([weights[k] for k in trainable])
        outputs = aux
    return (
        np.asarray(logits),
        float(loss),
        dict(zip(trainable, map(np.asarray, gradients))),
        outputs,
    )


@pytest.mark.parametrize("name", parity_vectors.NAMES)
def test_equals_the_published_network(name):
    vector, logits = parity_vectors.load(name)
    spec, weights = parity_vectors.spec_of(vector), parity_vectors.weights_of(vector)
    assert set(weights) == {p.name for p in params(spec)}
    assert all(weights[p.name].shape == p.shape for p in params(spec))
    assert [s.name for s in segments(spec)] == list(vector["stage_outputs"])
    ours, loss, gradients, outputs = _with_gradients(
        "tensorflow", spec, weights, parity_vectors.images_of(vector), vector["labels"]
    )
    assert relative_error(ours, logits) < 1e-4
    assert abs(loss - vector["loss"]) < 1e-4 * vector["loss"]
    for segment, (mean, std, *shape) in vector["stage_outputs"].items():
        y = np.asarray(outputs[segment], "float64")
        assert list(y.shape) == shape, segment
        # a mean near zero is judged by the spread of what it averages
        test_allclose(y.mean(), np.float64(mean), rtol=1e-4, atol=1e-4 * std, msg=segment)
        test_allclose(y.std(), np.float64(std), rtol=1e-4, msg=segment)
    for variable, norm in vector["grad_norms"].items():
        got = np.linalg.norm(gradients[variable].astype("float64"))
        test_allclose(got, np.float64(norm), rtol=2e-3, msg=variable)


@pytest.mark.parametrize("size", [SMALL, pytest.param({}, marks=pytest.mark.long, id="all of B0")])
def test_back_ends_agree_on_a_whole_network(size):
    """Logits, every gradient and every segment of a proxy-normalised network, with the same masks."""
    spec = ModelSpec.from_name("B0-G16-LN_PN", num_classes=10, **size)
    weights = initial_weights(spec, seed=3)
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")

    class Masks:
        statistics = {}

        def mask(self, segment, kind, rate, shape):
            rng = np.random.default_rng(len(segment) + int(1000 * rate))
            return np.where(rng.random([int(s) for s in shape]) < rate, 0, 1 / (1 - rate)).astype(
                "float32"
            )

    runs = [
        _with_gradients(b, spec, weights, images, [1, 3], Masks()) for b in ("tensorflow", "jax")
    ]
    (logits, loss, gradients, outputs), (logits2, loss2, gradients2, outputs2) = runs
    assert relative_error(logits, logits2) < 1e-4 and abs(loss - loss2) < 1e-4
    for name in gradients:
        # float32 through many layers; a gradient that is itself noise is judged by the network's scale
        scale = max(np.linalg.norm(gradients[name]), 1e-4)
        assert np.linalg.norm(gradients[name] - gradients2[name]) < 2e-3 * scale, name
    for name in outputs:
        assert relative_error(outputs[name], outputs2[name]) < 1e-4, name


def test_batch_norm_reports_moving_averages():
    spec = ModelSpec.from_name("CIFAR-G1-BN", num_classes=10, input_norm="none")
    weights = initial_weights(spec)
    ops = get_ops("numpy")
    x = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
    context = TrainContext(ops, seed=0)
    run(ops, spec, weights, x, context)
    moving = {p.name for p in params(spec) if not p.trainable}
    assert set(context.statistics) == moving and moving
    y = ops.conv(x, weights["all/block0/conv/conv2d/kernel"], 1)
    got = context.statistics["all/block0/batch_norm/moving_mean"]
    test_allclose(got, 0.03 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    got = context.statistics["all/block0/batch_norm/moving_variance"]
    test_allclose(got, 0.97 + 0.03 * y.var((0, 1, 2)), rtol=1e-4)


def test_masks_change_training_only():
    spec = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10, dropout_rate=0.5)
    weights, ops = initial_weights(spec), get_ops("numpy")
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    plain = run(ops, spec, weights, x)
    test_allclose(run(ops, spec, weights, x), plain, rtol=0)
    trained = run(ops, spec, weights, x, TrainContext(ops, seed=1))
    test_allclose(run(ops, spec, weights, x, TrainContext(ops, seed=1)), trained, rtol=0)
    assert relative_error(trained, plain) > 1e-2


PLAIN = ("group_conv", "norms", "proxy_norm", "mbconv", "network")
ASKS = r"hasattr|getattr\(ops|isinstance\(ops|type\(ops|ops\.name|ops\.\w+ is (not )?None"


@pytest.mark.parametrize("name", PLAIN)
def test_the_network_asks_no_backend_what_it_can_do(name):
    text = (Path(scaling.__file__).parent / f"{name}.py").read_text()
    assert re.findall(ASKS, text) == []
    for mistake in ("if ops.fused is not None:", 'hasattr(ops, "x")', 'ops.name == "jax"'):
        assert re.search(ASKS, mistake)


def test_a_version_serves_its_class_and_those_below_it():
    class Own(NumpyOps):
        pass

    class Below(Own):
        pass

    plain = mbconv.expand.dispatch(NumpyOps)
    mbconv.expand.register(Own, lambda *args: "own")
    assert mbconv.expand(Below(), *[None] * 3) == "own"
    assert mbconv.expand.dispatch(NumpyOps) is plain


def test_whole_blocks_compute_what_their_parts_compute():
    spec = ModelSpec.from_name("CIFAR-G16-LN_PN")
    weights, parts = initial_weights(spec), {}
    x = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype("float32")
    ops = NumpyOps()
    cut = run(ops, spec, weights, x, outputs=parts)
    np.testing.assert_array_equal(run(ops, spec, weights, x), cut)
    whole = segments(spec, whole=True)
    assert len(whole) < len(parts) and not any("/" in s.name for s in whole)
    assert [p for s in whole for p in s.params] == list(params(spec))
