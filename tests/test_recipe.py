"""The recipe against its references: TensorFlow 1's optimizers, a step-by-step schedule, exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.config import load_cases, override
from effnet_repro.network import Param, segments
from effnet_repro.ops import get_ops
from effnet_repro.recipe import (
    LEGAL_FILTERS,
    add_weight_decay,
    cross_entropy,
    decay_mask,
    is_trained,
    learning_rate,
    plot_schedule,
    rmsprop_settings,
    rmsprop_step,
    sgd_step,
    smooth_targets,
    steps_per_epoch,
    total_updates,
    trained_segments,
    unscale,
    warmup_updates,
)
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import test_allclose as check_close

CASES = load_cases()
CASE = CASES["B0-G16-LN_PN-Half_16IPU_2x8"]
BACKENDS = ("numpy", "tensorflow", "jax")
numpy_ops = get_ops("numpy")


def gradients(updates=50, size=33, scale=1.0):
    rng = np.random.default_rng(7)
    start = rng.normal(size=size).astype("float32")
    return start, scale * rng.normal(size=(updates, size)).astype("float32")


# ---------------------------------------------------------------- RMSProp


def tf1_run(make_optimizer, start, grads, rates):
    "Weights after each step by an optimizer of TensorFlow 1, its rate fed step by step."
    tf = pytest.importorskip("tensorflow")
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        gradient, rate = v1.placeholder(tf.float32, start.shape), v1.placeholder(tf.float32, [])
        weight = v1.get_variable("weight", initializer=start)
        step = make_optimizer(v1.train, rate).apply_gradients([(gradient, weight)])
        session.run(v1.global_variables_initializer())
        seen = []
        for g, lr in zip(grads, rates):
            session.run(step, {gradient: g, rate: lr})
            seen.append(session.run(weight))
    return np.stack(seen)


def rmsprop_run(ops, start, grads, rates, first=1.0, **constants):
    weight, mean_square, slot, seen = start, np.full_like(start, first), np.zeros_like(start), []
    for g, lr in zip(grads, rates):
        weight, mean_square, slot = rmsprop_step(
            ops, weight, g, mean_square, slot, learning_rate=np.float32(lr), **constants
        )
        seen.append(np.asarray(weight))
    return np.stack(seen)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("global_batch_size", [32, 768, 6144])
def test_rmsprop_is_tensorflow_1s_under_a_schedule(scale, global_batch_size):
    case = override(CASE, global_batch_size=global_batch_size, micro_batch_size=4, epochs=5)
    start, grads = gradients(scale=scale)
    constants = rmsprop_settings(case)
    rates = [learning_rate(case, i, 10) for i in range(50)]
    theirs = tf1_run(lambda t, lr: t.RMSPropOptimizer(lr, **constants), start, grads, rates)
    ours = rmsprop_run(numpy_ops, start, grads, rates, **constants)
    check_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constants", [(0.9, 0.0, 1e-10), (0.5, 0.99, 1.0), (0.0, 0.9, 1e-3)])
def test_rmsprop_is_tensorflow_1s_for_other_constants(constants):
    start, grads = gradients()
    constants = dict(zip(("decay", "momentum", "epsilon"), constants))
    theirs = tf1_run(lambda t, lr: t.RMSPropOptimizer(lr, **constants), start, grads, [0.01] * 50)
    ours = rmsprop_run(numpy_ops, start, grads, [0.01] * 50, **constants)
    check_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_rmsprop_compiles(backend):
    "One compiled step, the rate a tensor, on every backend the same numbers."
    framework = pytest.importorskip(backend)
    ops, constants = get_ops(backend), rmsprop_settings(CASE)

    def step(w, g, s, m, lr):
        return rmsprop_step(ops, w, g, s, m, learning_rate=lr, **constants)

    compiled = framework.function(step) if backend == "tensorflow" else framework.jit(step)
    start, grads = gradients(updates=20)
    state = (start, np.ones_like(start), np.zeros_like(start))
    for g in grads:
        w, s, m = state
        state = tuple(compiled(w, g, s, m, np.float32(CASE.learning_rate)))
    ours = rmsprop_run(numpy_ops, start, grads, [CASE.learning_rate] * 20, **constants)[-1]
    check_close(np.asarray(state[0]), ours, rtol=1e-5, atol=1e-6)
    assert all(np.asarray(x).dtype == np.float32 for x in state)


def test_rmsprop_in_a_graph_without_eager_tensors():
    "The form in which an IPU program meets it: symbolic tensors only."
    tf = pytest.importorskip("tensorflow")
    v1 = tf.compat.v1
    start, grads = gradients(updates=1)
    with tf.Graph().as_default(), v1.Session() as session:
        g, lr = v1.placeholder(tf.float32, start.shape), v1.placeholder(tf.float32, [])
        slots = tf.ones_like(g), tf.zeros_like(g)
        new = rmsprop_step(
            get_ops("tensorflow"),
            tf.constant(start),
            g,
            *slots,
            learning_rate=lr,
            **rmsprop_settings(CASE),
        )
        weight = session.run(new[0], {g: grads[0], lr: 0.5})
    check_close(weight, rmsprop_run(numpy_ops, start, grads, [0.5], **rmsprop_settings(CASE))[0])


def test_a_weight_without_gradient_stays():
    constants = rmsprop_settings(CASE)
    start, grads = gradients()
    assert (rmsprop_run(numpy_ops, start, 0 * grads, [1.0] * 50, **constants) == start).all()


def test_sgd_is_tensorflow_1s_at_a_constant_rate():
    start, grads = gradients()
    theirs = tf1_run(lambda t, lr: t.MomentumOptimizer(lr, 0.9), start, grads, [0.05] * 50)
    w, m = start, np.zeros_like(start)
    for g, expected in zip(grads, theirs):
        w, m = sgd_step(
            numpy_ops, w, g, m, learning_rate=np.float32(0.05), momentum=np.float32(0.9)
        )
        check_close(w, expected, rtol=1e-4, atol=1e-5)


def test_sgd_is_keras_under_a_schedule():
    keras = pytest.importorskip("keras")
    start, grads = gradients()
    optimizer, v = keras.optimizers.SGD(1.0, momentum=0.9), keras.Variable(start)
    w, m = start, np.zeros_like(start)
    for i, g in enumerate(grads):
        lr = 0.1 / (i + 1)
        optimizer.learning_rate = lr
        optimizer.apply([keras.ops.convert_to_tensor(g)], [v])
        w, m = sgd_step(numpy_ops, w, g, m, learning_rate=np.float32(lr), momentum=np.float32(0.9))
    check_close(w, keras.ops.convert_to_numpy(v), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- learning rate


def by_walking(case, updates_per_epoch):
    "The same schedule told another way: walk through the run, drop when a boundary has passed, in exact fractions."
    total = total_updates(case, updates_per_epoch)
    interval, drops, rate, rates = Fraction(total, case.lr_drops), 0, case.learning_rate, []
    for update in range(total):
        while update >= (drops + 1) * interval:
            drops, rate = drops + 1, rate * case.lr_decay
        warmup = Fraction(total) * Fraction(case.warmup_epochs) / Fraction(case.epochs)
        rates.append(rate * min(1.0, update / float(warmup)) if warmup else rate)
    return rates


@pytest.mark.parametrize("epochs, updates_per_epoch", [(350, 3), (350, 7), (146, 1), (20, 97)])
def test_exponential_drops_where_a_walk_drops(epochs, updates_per_epoch):
    case = override(CASE, epochs=epochs)
    rates = [learning_rate(case, i, updates_per_epoch) for i in range(epochs * updates_per_epoch)]
    check_close(rates, by_walking(case, updates_per_epoch), rtol=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 3000), st.integers(1, 300))
def test_exponential_ends_after_all_drops(epochs, updates_per_epoch, lr_drops):
    case = override(CASE, epochs=epochs, lr_drops=lr_drops, warmup_epochs=0)
    total = total_updates(case, updates_per_epoch)
    assert learning_rate(case, 0, updates_per_epoch) == case.learning_rate
    assert (
        learning_rate(case, total, updates_per_epoch)
        == case.learning_rate * case.lr_decay**lr_drops
    )
    for k in {
        0,
        lr_drops // 2,
        lr_drops - 1,
    }:  # First step at or after a boundary, and the one before
        boundary = -(-k * total // lr_drops)
        expected = case.learning_rate * case.lr_decay ** (boundary * lr_drops // total)
        assert learning_rate(case, boundary, updates_per_epoch) == expected
        if k:
            before = learning_rate(case, boundary - 1, updates_per_epoch)
            assert before > expected


@pytest.mark.parametrize("name", CASES)
def test_every_published_case_has_the_published_rate(name):
    rates = [learning_rate(CASES[name], 1668 * epoch, 1668) for epoch in (0, 1, 5, 350)]
    base = 768 / 2**14
    check_close(rates, [0, base / 5, base * 0.97**2, base * 0.97**146], rtol=1e-12)


def test_the_warm_up_multiplies():
    warm, cold = CASE, override(CASE, warmup_epochs=0)
    for update in (1, 250, 499, 500, 501):
        ratio = learning_rate(warm, update, 100) / learning_rate(cold, update, 100)
        assert ratio == pytest.approx(min(1, update / 500))
    assert warmup_updates(warm, 100) == 500 and warmup_updates(cold, 100) == 0


@pytest.mark.parametrize("epochs, warmup", [(2, 5), (2, 0), (10, 3), (1, 1)])
def test_cosine(epochs, warmup):
    case = override(CASE, lr_schedule="cosine", epochs=epochs, warmup_epochs=warmup)
    total, length = epochs * 50, warmup * 50
    for update in range(total + 1):
        expected = case.learning_rate * math.cos(math.pi * update / total / 2) ** 2
        expected *= min(1, update / length) if length else 1
        assert learning_rate(case, update, 50) == pytest.approx(expected, abs=1e-15)


@settings(deadline=None)
@given(st.integers(0, 583_800), st.sampled_from(["exponential", "cosine"]))
def test_a_rate_is_a_plain_float_within_bounds(update, schedule):
    case = override(CASE, lr_schedule=schedule)
    rate = learning_rate(case, np.int64(update), 1668)
    assert type(rate) is float and 0 <= rate <= case.learning_rate


@pytest.mark.parametrize("update", [-1, 1001])
def test_an_update_outside_the_run_is_refused(update):
    with pytest.raises(ValueError, match="must be in .0, 1000.*Raise `epochs`"):
        learning_rate(override(CASE, epochs=10), update, 100)


def test_a_run_without_an_update_is_refused():
    with pytest.raises(ValueError, match="at least one weight update.*Raise `epochs`"):
        learning_rate(override(CASE, epochs=0.1), 0, 4)


def test_max_steps_does_not_squeeze_the_schedule():
    cut = override(CASE, max_steps=10)
    assert learning_rate(cut, 7, 100) == learning_rate(CASE, 7, 100)


# ---------------------------------------------------------------- device loops

IMAGENET = 1_281_167


def published_rate(step, total=583_865, warmup=8_340, loop=104):
    """Written out: one rate a loop, the one of its first step; 146 drops; linear warm-up."""
    begin = step // loop * loop
    rate = 768 / 16_384 * 0.97 ** ((begin * 146) // total)
    return rate * begin / warmup if begin < warmup else rate


@pytest.mark.parametrize("name", CASES)
def test_the_published_run_in_device_loops(name):
    case = override(CASES[name], device_loop=104)
    steps = steps_per_epoch(case, IMAGENET)
    assert total_updates(case, steps) == 583_960 == 5_615 * 104
    some = [*range(0, 1_000, 7), 103, 104, 8_319, 8_320, 8_423, 8_424, 300_000, 583_855, 583_959]
    ours = [learning_rate(case, i, steps) for i in some]
    check_close(ours, [published_rate(i) for i in some], rtol=1e-12)
    assert ours[0] == learning_rate(case, 103, steps) == 0 < learning_rate(case, 104, steps)
    assert ours[-1] == case.learning_rate * 0.97**145


def test_without_device_loops_nothing_changed():
    one = override(CASE, device_loop=1)
    assert steps_per_epoch(CASE, IMAGENET) == steps_per_epoch(one, IMAGENET) == 1668
    for case in (CASE, one):
        assert total_updates(case, 1668) == 583_800
        assert learning_rate(case, 1, 1668) == 768 / 16_384 / 8_340


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0.5, 20), st.integers(2, 500))
def test_a_run_ends_with_a_whole_loop(loop, epochs, per_epoch):
    case = override(CASE, device_loop=loop, epochs=epochs, warmup_epochs=0)
    nominal = total_updates(override(case, device_loop=1), per_epoch)
    total = total_updates(case, per_epoch)
    assert total % loop == 0 and nominal <= total < nominal + loop
    plain = override(case, device_loop=1)
    last = [learning_rate(case, total - 1 - i, per_epoch) for i in range(loop)]
    assert set(last) == {learning_rate(plain, total - loop, per_epoch)}


def test_plot_schedule_draws_the_rate():
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = plot_schedule(CASE, updates_per_epoch=10)
    x, y = ax.lines[0].get_data()
    assert x[-1] == CASE.epochs and y[100] == learning_rate(CASE, 100, 10)
    assert ax.get_xlabel() == "epoch" and ax.get_ylim()[0] == 0
    plt.close(ax.figure)


# ---------------------------------------------------------------- weight decay


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("B0", "B3"))])
def test_what_decays_by_the_published_rule(name):
    "The published rule reads names; ours is declared. They agree on every parameter."
    params = [p for s in segments(ModelSpec.from_case(CASES[name])) for p in s.params]
    for param, decays in zip(params, decay_mask(params).values()):
        last = param.name.split("/")[-1]
        published = not any(word in param.name for word in ("beta", "gamma", "proxy", "moving_"))
        assert decays == (param.trainable and (published or last in ("beta_prime", "gamma_prime")))


def test_what_is_not_trained_does_not_decay():
    fixed = Param("all/block0/moving_mean", (1,), "zeros", decay=True, trainable=False)
    assert decay_mask([fixed]) == {fixed.name: False}


def test_weight_decay_is_the_gradient_of_half_the_square():
    g, w = np.zeros(3, "float32"), np.float32([1, -2, 3])
    step = 1e-3
    for i in range(3):
        up, down = (0.5e-2 * np.sum((w + d * np.eye(3)[i]) ** 2) for d in (step, -step))
        assert add_weight_decay(g, w, 1e-2)[i] == pytest.approx((up - down) / (2 * step), rel=1e-5)
    assert add_weight_decay(g, w, 0.0) is g


# ---------------------------------------------------------------- loss


def soft_targets(m=12, classes=7):
    rng = np.random.default_rng(3)
    logits = 4 * rng.normal(size=(m, classes)).astype("float32")
    return logits, rng.dirichlet(np.ones(classes), size=m).astype("float32")


def log_probabilities(logits):
    """In float64, from the definition."""
    z = logits.astype("float64")
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 7, 10, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_is_the_published_one(backend, classes):
    """Published: one-hot labels of 1 - e and e/(K-1), made first, then mixed; the mean of -t log p."""
    pytest.importorskip(backend)
    rng, e = np.random.default_rng(classes), 0.1
    logits, labels = rng.normal(size=(9, classes)).astype("float32"), rng.integers(classes, size=9)
    smooth = np.full((9, classes), e / (classes - 1))
    smooth[np.arange(9), labels] = 1 - e
    share = rng.uniform(0.5, 1, (9, 1))
    smooth = share * smooth + (1 - share) * np.roll(smooth, 1, 0)
    hard = np.eye(classes)[labels]
    targets = (share * hard + (1 - share) * np.roll(hard, 1, 0)).astype("float32")
    ours = cross_entropy(get_ops(backend), logits, targets, e)
    check_close(
        np.asarray(ours, "float64"), -(smooth * log_probabilities(logits)).sum(1), rtol=2e-6
    )


def test_the_smoothed_values_of_ten_classes_are_the_published_ones():
    smooth = smooth_targets(numpy_ops, np.eye(10, dtype="float32"), 0.1)
    assert smooth[3, 3] == np.float32(0.9) and smooth[3, 4] == np.float32(0.1 / 9)
    every = smooth_targets(numpy_ops, np.eye(10, dtype="float32"), 0.1, "all")
    check_close(every[3, 3:5], np.float32([0.91, 0.01]), rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_over_all_classes_is_tensorflow_1s(backend, label_smoothing):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip(backend)
    logits, targets = soft_targets()
    theirs = tf.compat.v1.losses.softmax_cross_entropy(
        targets, logits, label_smoothing=label_smoothing, reduction="none"
    )
    ours = cross_entropy(get_ops(backend), logits, targets, label_smoothing, "all")
    check_close(np.asarray(ours), theirs, rtol=1e-5)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_cross_entropy_is_float32_whatever_the_logits(backend, half):
    pytest.importorskip(backend)
    ops, (logits, targets) = get_ops(backend), soft_targets()
    narrow = ops.cast(ops.asarray(logits), half)
    loss = cross_entropy(ops, narrow, targets, 0.1)
    assert ops.dtype(loss) == "float32" and tuple(loss.shape) == (12,)
    check_close(
        np.asarray(loss), cross_entropy(ops, ops.cast(narrow, "float32"), targets, 0.1), rtol=0
    )


def test_cross_entropy_survives_huge_logits():
    logits = np.float32([[6e4, -6e4, 0], [-6e4, 6e4, 0]])
    loss = cross_entropy(numpy_ops, logits.astype("float16"), np.eye(3)[[0, 0]].astype("float32"))
    assert loss[0] == 0 and loss[1] == pytest.approx(1.2e5, rel=1e-3)


def test_cross_entropy_gradient_is_softmax_minus_target():
    tf = pytest.importorskip("tensorflow")
    logits, targets = soft_targets()
    x, ops = tf.constant(logits), get_ops("tensorflow")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(cross_entropy(ops, x, targets, 0.1))
    expected = tf.nn.softmax(logits) - smooth_targets(ops, targets, 0.1)
    check_close(tape.gradient(loss, x).numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


@given(st.floats(0, 0.99), st.integers(1, 50), st.sampled_from(["others", "all"]))
def test_smoothed_targets_stay_a_distribution(label_smoothing, classes, over):
    targets = np.random.default_rng(0).dirichlet(np.ones(classes), size=4).astype("float32")
    smooth = smooth_targets(numpy_ops, targets, label_smoothing, over)
    assert smooth.dtype == np.float32 and smooth.min() >= 0
    check_close(smooth.sum(-1), np.ones(4, "float32"), rtol=1e-5)


@given(st.integers(-20, 20), st.lists(st.floats(-1e3, 1e3, width=32), min_size=1))
def test_a_loss_scale_is_undone_exactly(exponent, values):
    g = np.float32(values)
    g = g[(np.abs(g) > 1e-30) | (g == 0)]  # Float32's own subnormal numbers aside
    scale = 2.0**exponent
    assert (unscale(numpy_ops, g * np.float32(scale), scale) == g).all()


@pytest.mark.parametrize("loss_scale", [0, -128, 100, 0.3, math.inf, math.nan])
def test_a_loss_scale_that_cannot_be_undone_is_refused(loss_scale):
    with pytest.raises(ValueError, match="power of two"):
        unscale(numpy_ops, np.ones(1, "float32"), loss_scale)


# ---------------------------------------------------------------- training a part

SEGMENTS = [s.name for s in segments(ModelSpec.from_case(override(CASE, model_size=5)))]


def test_filters_of_whole_network_stages_cover_the_network_once():
    parts = [trained_segments(SEGMENTS, (name,)) for name in LEGAL_FILTERS]
    assert sorted(sum(parts, ())) == sorted(SEGMENTS)
    assert trained_segments(SEGMENTS, LEGAL_FILTERS) == tuple(SEGMENTS)
    assert trained_segments(SEGMENTS, None) == tuple(SEGMENTS)


@pytest.mark.parametrize("part", [n for n in SEGMENTS])
def test_every_segment_is_a_legal_filter_of_itself(part):
    trained = trained_segments(SEGMENTS, (part,))
    assert part in trained
    assert all(name == part or name.startswith(part + "/") for name in trained)


@pytest.mark.parametrize(
    "wrong", ["top", "blok", "block8", "block71", "block7A", "head", "", "Top/"]
)
def test_an_unknown_filter_is_refused_with_the_legal_ones(wrong):
    with pytest.raises(ValueError, match="Legal: Top, block7, block6"):
        is_trained("Top", ("Top", wrong))


@pytest.mark.parametrize("wrong", ["Top", (), []])
def test_a_filter_that_is_no_list_is_refused(wrong):
    with pytest.raises(ValueError, match="must be None"):
        is_trained("Top", wrong)
    with pytest.raises(ValueError, match="must be None"):
        trained_segments(SEGMENTS, wrong)
