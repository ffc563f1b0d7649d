"""Pipelines: every published split, schedules as properties, and the staged step against the unstaged one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.config import load_cases
from effnet_repro.network import initial_weights, params, segments
from effnet_repro.ops import get_ops
from effnet_repro.pipeline import (
    SCHEDULES,
    Pipeline,
    apply_update,
    check_accumulation,
    describe_schedule,
    duration,
    first_slots,
    overlap,
    plot_pipeline,
    schedule,
    split_segments,
)
from effnet_repro.recipe import cross_entropy, rmsprop_settings
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import relative_error

CASES = load_cases()

# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("name", CASES)
def test_published_splits_cut_the_network_without_loss(name):
    case = CASES[name]
    spec = ModelSpec.from_case(case)
    stages = split_segments(spec, case.pipeline_splits, case.num_stages)
    assert len(stages) == case.num_stages and all(stages)
    assert [s.name for stage in stages for s in stage] == [s.name for s in segments(spec)]
    assert [stage[0].name for stage in stages[1:]] == list(case.pipeline_splits)
    check_accumulation(case.pipeline_schedule, case.num_stages, case.gradient_accumulation)


@pytest.mark.parametrize(
    "splits, stages, message",
    [
        (["block3z"], None, "Unknown split 'block3z'.*block1a/b.*block3b.*Top"),
        (["block0"], None, "Unknown split 'block0'"),
        (["block4b", "block3b"], None, "follow the network"),
        (["block3b", "block3b"], None, "follow the network"),
        (["block3b"], 4, "4 stages need 3 splits.*block3b.*Legal names"),
        ([], 2, "2 stages need 1 splits"),
        ("block3b", None, "list of names"),
    ],
)
def test_wrong_splits_are_refused_with_the_legal_names(splits, stages, message):
    with pytest.raises(ValueError, match=message):
        split_segments(ModelSpec.from_name("B0-G16-LN_PN"), splits, stages)


# ---------------------------------------------------------------- schedules

shapes = given(
    name=st.sampled_from(SCHEDULES),
    num_stages=st.integers(1, 6),
    blocks=st.integers(1, 4),
    training=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@shapes
def test_every_micro_batch_visits_every_stage_once_and_in_order(name, num_stages, blocks, training):
    count = blocks * overlap(name, num_stages, training)
    table = schedule(name, num_stages, count, training)
    kinds = ("forward", "backward")[: 1 + training]
    assert len(table) == len(set(table)) == count * num_stages * len(kinds)
    for m in range(count):
        mine = [w for w in table if w.micro_batch == m]
        journey = [("forward", i) for i in range(num_stages)]
        journey += [("backward", i) for i in reversed(range(num_stages))] * training
        assert [(w.kind, w.stage) for w in mine] == journey
        assert [w.clock - mine[0].clock for w in mine] == list(range(len(journey)))


@settings(max_examples=60, deadline=None)
@shapes
def test_no_stage_does_one_kind_of_work_twice_in_a_clock(name, num_stages, blocks, training):
    table = schedule(name, num_stages, blocks * overlap(name, num_stages, training), training)
    places = [(w.clock, w.stage, w.kind) for w in table]
    assert len(places) == len(set(places))
    if name != "Grouped":  # only Grouped gives a stage two pieces of work in one clock
        assert len({(w.clock, w.stage) for w in table}) == len(table)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(2, 6), st.integers(-3, 60), st.booleans())
def test_a_count_is_accepted_exactly_when_it_fills_whole_blocks(name, stages, count, training):
    block = overlap(name, stages, training)
    assert (
        block
        == {"Grouped": 1 + training, "Interleaved": 1, "Sequential": 1 / stages}[name] * stages
    )
    if count > 0 and count % block == 0:
        check_accumulation(name, stages, count, training)
    else:
        with pytest.raises(ValueError, match=f"multiple of {block}, but it is {count}"):
            check_accumulation(name, stages, count, training)


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'Grouped'"):
        check_accumulation("grouped", 4, 8)
    with pytest.raises(ValueError, match="at least one stage"):
        schedule("Grouped", 0, 8)


@settings(max_examples=60, deadline=None)
@shapes
def test_the_description_counts_what_the_table_does(name, num_stages, blocks, training):
    count = blocks * overlap(name, num_stages, training)
    table = schedule(name, num_stages, count, training)
    facts = json.loads(json.dumps(describe_schedule(name, num_stages, count, training)))
    assert facts["clocks"] == max(w.clock for w in table) + 1
    assert 0 <= facts["bubble"] < 1 and facts["overlap"] == count // blocks
    if not training:
        return
    for stage in range(num_stages):
        alive = peak = 0
        for w in table:
            alive += (w.stage == stage) * (w.kind == "forward")
            peak = max(peak, alive)
            alive -= (w.stage == stage) * (w.kind == "backward")
        assert peak == min(facts["alive"][stage], count)
        assert (
            facts["stash"][stage]
            == {
                "Grouped": 2 * (num_stages - 1 - stage),
                "Interleaved": num_stages - 1 - stage,
                "Sequential": 0,
            }["Sequential" if num_stages == 1 else name]
        )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_duration_is_bounded_by_its_busiest_stage_and_by_no_overlap(name, stages, blocks, seed):
    count = blocks * overlap(name, stages)
    times = np.random.default_rng(seed).uniform(0.1, 1, (2, 3, stages))
    table = schedule(name, stages, count)
    took = duration(table, *times)
    assert took.shape == (3,)
    assert (took >= count * times.sum(0).max(-1) - 1e-9).all()
    assert (took <= count * times.sum((0, 2)) + 1e-9).all()
    one_by_one = [float(duration(table, f, b)) for f, b in zip(*times)]
    np.testing.assert_allclose(took, one_by_one)


def test_a_schedule_can_be_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = plot_pipeline("Grouped", 2, 4)
    assert len(ax.patches) == len(schedule("Grouped", 2, 4)) == len(ax.texts)
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------- the staged step

IMAGES = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
TARGETS = np.eye(10, dtype="float32")[np.arange(8) % 10]
CASE = CASES["B0-G16-LN_PN-Half_16IPU_2x8"]
RATE = CASE.learning_rate
STAGES = (
    "r1_k3_s1_e1_i8_o8",
    "r1_k3_s2_i8_o8",
    "r1_k5_s2_i8_o16",
    "r1_k3_s2_i16_o24",
    "r1_k5_s1_i24_o32",
    "r2_k5_s2_i32_o48",
    "r1_k3_s1_i48_o80",
)
FIVE = (*STAGES[:2], "r2_k5_s2_i8_o16", "r1_k3_s2_i16_o24")  # blocks, one of them residual


def network(norm, drop_path_rate=0.0, stages=STAGES):
    "These blocks, one of them residual, a quarter as wide as B0's"
    arm = dict(norm=norm, norm_groups=4 if norm == "GN" else 1, drop_path_rate=drop_path_rate)
    small = dict(net_stages=stages, top_filters=320, image_size=32, dropout_rate=0.0)
    return ModelSpec("B0", num_classes=10, **arm, **small)


def parts(ops, size):
    "The images in micro-batches"
    pair = lambda i: (ops.asarray(IMAGES[i : i + size]), ops.asarray(TARGETS[i : i + size]))
    return [pair(i) for i in range(0, len(IMAGES), size)]


def make(backend, spec, splits, begin="block0", end=None):
    "A pipeline over the segments from `begin` to before `end`; cut short, its loss is a mean square"
    ops = get_ops(backend)
    names = [s.name for s in segments(spec)]
    inside = names[names.index(begin) : names.index(end) if end else None]

    def loss(y, targets):
        whole = cross_entropy(ops, y, targets, 0.1) if end is None else ops.square(y - 1.0)
        return ops.mean(whole) * CASE.loss_scale

    stages = [[s for s in stage if s.name in inside] for stage in split_segments(spec, splits)]
    stages = [stage for stage in stages if stage]
    owned = {p.name for stage in stages for s in stage for p in s.params}
    weights = {n: ops.asarray(w) for n, w in initial_weights(spec).items() if n in owned}
    return ops, stages, weights, Pipeline(ops, stages, loss)


def flat(arrays, names):
    return np.concatenate([np.ravel(np.asarray(arrays[n])) for n in names])


ENDS = {"GN": "block3b", "LN_PN": None}  # group norm on half of the network: compiling takes long


@pytest.fixture(scope="module")
def unstaged():
    "Gradients of the uncut network, all images at once, and the weights they lead to in NumPy"
    found = {}

    def get(norm):
        if norm not in found:
            ops, stages, weights, whole = make(
                "tensorflow", network(norm, stages=FIVE), [], end=ENDS[norm]
            )
            result = whole.gradients(weights, parts(ops, 8))
            found[norm] = {n: np.asarray(g) for n, g in result.gradients.items()}
        return found[norm]

    return get


def numpy_update(weights, gradients, spec):
    "RMSProp in the published form, written out"
    decay = {p.name: p.decay for p in params(spec)}
    constants, new = rmsprop_settings(CASE), {}
    for n, g in gradients.items():
        w = np.asarray(weights[n])
        g = g / CASE.loss_scale + (CASE.weight_decay * w if decay[n] else 0)
        s = 1.0 + (1 - constants["decay"]) * (g * g - 1.0)
        new[n] = w - RATE * g / np.sqrt(s + constants["epsilon"])
    return new


@pytest.mark.parametrize("norm", ["GN", "LN_PN"])
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_staged_step_equals_unstaged_step(backend, norm, unstaged):
    "Float32 sums in another order: 1e-5 for all gradients together, 1e-3 for each (some nearly cancel)"
    spec = network(norm, stages=FIVE)
    splits = ["block2a", "block3a"] if norm == "GN" else ["block4a/b"]
    ops, stages, weights, pipeline = make(backend, spec, splits, end=ENDS[norm])
    pieces = parts(ops, 1)  # two replicas with four micro-batches of one image
    name = "Grouped" if len(stages) == 2 else "Sequential"
    runs = [
        pipeline.gradients(weights, p, name, replica=r)
        for r, p in enumerate((pieces[:4], pieces[4:]))
    ]
    assert runs[0].alive == tuple(describe_schedule(name, len(stages), 4)["alive"])
    desired = unstaged(norm)
    mean = {n: sum(np.asarray(r.gradients[n]) for r in runs) / 2 for n in desired}
    assert relative_error(flat(mean, desired), flat(desired, desired)) < 1e-5
    assert max(relative_error(mean[n], desired[n]) for n in desired) < 1e-3

    slots = first_slots(CASE, weights)
    update = lambda *state: apply_update(ops, CASE, stages, *state, RATE)
    update = ops.jax.jit(update) if backend == "jax" else update
    new, slots = update(weights, slots, [r.gradients for r in runs])
    whole = numpy_update(weights, desired, spec)
    moved = flat(new, desired) - flat(weights, desired)
    assert relative_error(moved, flat(whole, desired) - flat(weights, desired)) < 1e-4
    assert set(slots["mean_square"]) == set(weights)


def test_recomputation_draws_the_same_masks_as_the_uncut_network():
    spec = network("LN_PN", drop_path_rate=0.8)
    part = dict(begin="block6b", end="block7a/b")
    ops, stages, weights, pipeline = make("tensorflow", spec, ["block7a"], **part)
    assert [[s.name for s in stage] for stage in stages] == [["block6b"], ["block7a"]]
    channels = stages[0][0].params[0].shape[2]
    x = np.random.default_rng(1).normal(size=(8, 2, 2, channels)).astype("float32")
    data = [(ops.asarray(x[i : i + 2]), ops.asarray(TARGETS[i : i + 2])) for i in range(0, 8, 2)]
    key = dict(seed=3, update=5, replica=1)
    staged = pipeline.gradients(weights, data, "Sequential", **key).gradients
    whole = make("tensorflow", spec, [], **part)[3].gradients(weights, data, **key).gradients
    assert relative_error(flat(staged, whole), flat(whole, whole)) < 1e-5
    other = pipeline.gradients(weights, data, "Sequential", **{**key, "update": 6}).gradients
    assert relative_error(flat(other, whole), flat(whole, whole)) > 1e-2


def test_batch_norm_depends_on_the_micro_batch_but_not_on_the_cut():
    spec, found = network("BN"), []
    for splits, size in ((["block1a"], 2), ([], 2), ([], 8)):
        ops, stages, weights, pipeline = make("tensorflow", spec, splits, end="block2a/c")
        assert len(stages) == len(splits) + 1
        found.append(pipeline.gradients(weights, parts(ops, size), "Sequential").gradients)
    cut, same, whole = found
    assert relative_error(flat(cut, same), flat(same, same)) < 1e-5
    assert relative_error(flat(cut, whole), flat(whole, whole)) > 1e-2


def test_numpy_has_no_gradients():
    with pytest.raises(ValueError, match="backend for gradients 'numpy'.*tensorflow, jax"):
        make("numpy", network("GN"), [])
