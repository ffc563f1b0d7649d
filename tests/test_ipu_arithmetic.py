"""What the comparison of stand-in and recipe covers and notices, and the arithmetic of 16-bit cases."""

from dataclasses import replace

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_reference import (  # noqa: E402
    fresh_slots,
    full_gradient,
    half_statistics,
    make_images,
    reference_gradients,
    reference_step,
)
from ipu_updates import (  # noqa: E402
    CLASSES,
    EVERYTHING,
    PLAIN_SLOTS,
    both,
    change_differences,
    short_case,
)

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import get_case, override  # noqa: E402
from effnet_repro.network import initial_weights  # noqa: E402
from effnet_repro.ops import NumpyOps  # noqa: E402
from effnet_repro.proxy_norm import proxy_statistics  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402


@pytest.fixture
def short():
    return short_case


@pytest.mark.parametrize("precision", ["16.32", "16.16"])
def test_training_in_16_bits_with_everything_on(short, precision):
    "Mixing, masks, weight decay, loss scale and slots, against the recipe written out in the same types"
    how = dict(precision=precision, offload_fp32_weight_copy=precision == "16.16")
    depthwise = dict(norm="LN_PN", norm_groups=1)  # a CPU has no 16-bit gradient of wider groups
    case = short("B0-G1-GN-Native_16IPU_2x8", **how, **depthwise, **EVERYTHING, **PLAIN_SLOTS)
    _, (got, reports), (state, wanted), start = both(case)
    np.testing.assert_allclose(reports[:, 0], wanted[:, 0], rtol=5e-3)
    found = change_differences(got, state, start)
    assert max(found.values()) < 0.05, found  # 11 bits, through the norms of six segments


def test_statistics_and_gradients_of_16_bit_cases_are_16_bits_wide():
    rng = np.random.default_rng(0)
    four = [(start + rng.normal(0, 0.3, 64)).astype("float32") for start in (1, 0, 0, 0)]
    case = override(get_case("B5-G1-GN-Native_16IPU_4x4"), **PLAIN_SLOTS, momentum=0.0)
    assert case.precision == "16.16" and case.loss_scale == 128
    with ipu_standin.install(shallow=True):
        ops = ipu.IPUOps(ipu.Graphcore(), "float16")
        found = proxy_statistics(ops, *map(tf.constant, four))
        var = tf.Variable(rng.normal(0, 0.1, 64).astype("float16"))
        slots = {k: tf.Variable(tf.zeros(64)) for k in ("mean_square", "momentum")}
        slots["fp32"] = tf.Variable(tf.cast(var, "float32"))
        scaled = (128e-4 * rng.normal(size=64)).astype("float16")
        (new, square), *_ = ipu.step_variable(ops, case, slots, var, tf.constant(scaled), 0.1, 1e-5)
    wanted = half_statistics(ops, *map(tf.constant, four))
    exact = proxy_statistics(NumpyOps(), *four)
    for value, right, other in zip(found, wanted, exact):
        assert value.dtype == tf.float16
        np.testing.assert_array_equal(value, tf.cast(right, tf.float16))
        assert 1e-4 < np.abs(value - other).max() < 1e-2
    g = full_gradient(replace(case, weight_decay=1e-5), scaled, var.numpy(), "float16", True)
    wide = scaled.astype("float32") / 128 + 1e-5 * var.numpy().astype("float32")
    share = np.float32(1 - case.rmsprop_decay)
    assert new is slots["mean_square"]
    np.testing.assert_allclose(square, share * g**2, rtol=1e-5)
    assert np.abs(np.sqrt(square / share) / np.abs(wide) - 1).max() > 1e-4


def test_the_comparison_notices(short):
    "Each part of the recipe, changed on one side only, is seen in weights, slots or loss"
    case = short(**EVERYTHING, **PLAIN_SLOTS, weight_decay=1e-3)
    spec = ModelSpec.from_case(case, num_classes=CLASSES)
    images, labels = (v[0] for v in make_images(case, CLASSES))
    weights, slots = initial_weights(spec, seed=1), fresh_slots(case, spec)
    start, known = {**weights, **slots}, reference_gradients(case, spec, weights, images, labels)

    def update(gradients, **changes):
        new = reference_step(replace(case, **changes), spec, weights, slots, gradients, 0.01)
        return {**new[0], **new[1]}

    state = update(known[0])
    for changes in (dict(mixup_alpha=0.0), dict(label_smoothing_over="all")):
        other = replace(case, **changes)
        gradients, loss, _ = reference_gradients(other, spec, weights, images, labels)
        found = change_differences(update(gradients), state, start)
        assert min(found.values()) > 1e-2 and abs(loss / known[1] - 1) > 1e-4, changes
    for changes in (
        dict(weight_decay=0.0),
        dict(rmsprop_epsilon=1e-5),
        dict(rmsprop_decay_exponent=-13),
    ):
        found = change_differences(update(known[0], **changes), state, start)
        assert max(found.values()) > 1e-2, changes
