"""The IPU runtime on the CPU stand-in: programs that compute what the recipe says."""

from dataclasses import replace

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_reference import make_images  # noqa: E402
from ipu_updates import (  # noqa: E402
    CLASSES,
    check_updates,
    program,
    short_case,
    worst_difference,
)

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import override  # noqa: E402
from effnet_repro.network import initial_weights  # noqa: E402
from effnet_repro.norms import EPSILON  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402


@pytest.fixture
def short():
    return short_case


# ---------------------------------------------------------------- numbers


def test_two_updates_with_mixing(short):
    machine, _ = check_updates(short(mixup_alpha=0.2, cutmix_lambda=0.9, micro_batch_size=4), 2)
    norms = machine.calls["group_norm"]
    assert {(c["groups"], c["strided"], c["epsilon"]) for c in norms} == {(1, True, EPSILON)}
    assert all(c["dtype"] == "float32" for c in norms)


def test_two_updates_in_one_run_of_four_stages(short):
    splits = ("block1a/c", "block2a/b", "block2b")
    layout = dict(num_stages=4, pipeline_splits=splits, num_replicas=1, global_batch_size=16)
    case = short("B0-G16-GN-Half_16IPU_2x8", **layout)
    check_updates(case, 2, updates_per_run=2)


def test_gradient_descent_and_group_norm_on_the_oldest_sdk(short):
    case = short("B1-G1-GN-Native_16IPU_4x4", num_stages=2, optimizer="sgd")
    machine, _ = check_updates(case, sdk="2.1")
    (config,) = machine.calls["configure_ipu_system"]
    assert config["floating_point_behaviour.esr"] is False  # a bool there


def test_every_sdk_builds_the_program(short):
    case = short(num_replicas=1, global_batch_size=8, stochastic_rounding=True)
    images, labels = make_images(case, CLASSES)
    for sdk in ("2.4", "2.5", "3.4"):
        with ipu_standin.install(sdk, shallow=True) as machine:
            program(case, images, labels)
            (config,) = machine.calls["configure_ipu_system"]
            assert config["floating_point_behaviour.esr"].name == "ON"
            assert config["compilation_poplar_options"]["target.deterministicWorkers"] == "portable"


def test_mistakes_that_ours_does_not_make(short, monkeypatch):
    "What the real interface accepts in silence"
    case = short(precision="16.32")
    images, labels = make_images(case, CLASSES)
    with ipu_standin.install(shallow=True) as machine:
        p = program(case, images, labels)
        (made,) = machine.calls["pipeline"]
        pipe = made["pipeline"]
        assert made["accumulate_outfeed"] and set(pipe.out_kinds) == {np.float32}
        assert made["reduction_method"].name == "SUM"  # divided by hand, as every SDK can
        assert {c["strided"] for c in machine.calls["group_norm"]} == {True}
        assert {c["dtype"] for c in machine.calls["group_norm"]} == {"float16"}
        assert len(machine.calls["cross_replica_sum"]) == len(pipe.accumulators)
        assert {v.dtype.base_dtype for v in p.variables.values()} == {tf.float32}
    with pytest.raises(TypeError, match="flat list"):
        ipu.stages._flat(0, [[tf.zeros(1)]])
    case = short()
    monkeypatch.setattr(ipu.program, "_mean_over_replicas", lambda graphcore, ops, replicas, g: g)
    with ipu_standin.install():
        p = program(case, images, labels)
        ipu.set_state(p, initial_weights(p.spec))
        with pytest.raises(ipu_standin.ReplicasDiverged):
            p.run(0.01)


def test_sixteen_bit_weights_keep_float32_copies(short):
    case = short(
        precision="16.16", offload_fp32_weight_copy=True, disable_variable_offloading=False
    )
    images, labels = make_images(case, CLASSES)
    spec = ModelSpec.from_case(case, num_classes=CLASSES)
    weights = initial_weights(spec)
    with ipu_standin.install(execute=False) as machine:
        p = program(case, images, labels)
        (made,), (optimizer,) = machine.calls["pipeline"], machine.calls["optimizer"]
        assert made["offload_weight_update_variables"] is True
        assert {v.dtype.base_dtype for v in p.variables.values()} == {tf.float16}
        assert {h.dtype for h in optimizer["accumulators"]} == {tf.float16}
        assert {v.dtype.base_dtype for v in p.optimizer.slots["fp32"].values()} == {tf.float32}
        ipu.set_state(p, weights)
        got = ipu.get_state(p)
    for name, value in weights.items():  # the float32 copies, not the 16-bit weights
        np.testing.assert_array_equal(got[name], value)


# ---------------------------------------------------------------- several processes


def test_poprun_equals_one_process(short):
    case = short(mixup_alpha=0.2, micro_batch_size=2)
    images, labels = make_images(case, CLASSES)
    weights = initial_weights(ModelSpec.from_case(case, num_classes=CLASSES))
    with ipu_standin.install():
        p = program(case, images, labels)
        ipu.set_state(p, weights)
        p.run(0.01)
        alone = ipu.get_state(p)

    def instance(index):
        own = [j for j in range(8) if j % 2 == index]  # micro-batches of replica `index`
        pick = lambda a: np.concatenate([a[:, 2 * j : 2 * j + 2] for j in own], 1)
        p = program(case, pick(images), pick(labels))
        begin = weights if index == 0 else {n: w * 0 for n, w in weights.items()}
        ipu.set_state(p, begin)
        ipu.set_state(p, ipu.broadcast(p.graphcore, ipu.get_state(p)))
        report = p.run(0.01)
        return ipu.get_state(p), report

    (first, _), (second, _) = ipu_standin.poprun(instance, 2, 2, ipus_per_replica=2)
    assert worst_difference(first, second) < 1e-6
    assert worst_difference(first, alone) < 1e-6


# ---------------------------------------------------------------- one IPU, and what is refused


def test_fine_tuning_is_sequential_on_one_ipu(short):
    case = override(short(variable_filter=("Top",)), num_stages=1, pipeline_splits=())
    plan = ipu.plan_stages(case, ModelSpec.from_case(case))
    assert plan == (("Top",), (0, 0), "Sequential")
    check_updates(replace(case, gradient_accumulation=3, global_batch_size=12))


def test_batch_norm_is_refused(short):
    with ipu_standin.install(shallow=True):
        case = short(norm="BN")
        with pytest.raises(ValueError, match="Batch norm cannot be trained in a pipeline"):
            program(case, *make_images(case, CLASSES))


def test_a_rate_of_the_body_is_for_keras():
    "Before anything is compiled: programs for IPUs have one rate."
    from effnet_repro.ipu.resolved import resolve_training

    with pytest.raises(ValueError, match="one rate. Received: body_rate=0.5. Leave it out"):
        resolve_training("B0-G16-LN_PN-Half_16IPU_2x8", body_rate=0.5)
