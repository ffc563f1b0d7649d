"""The IPU runtime on the CPU stand-in: programs that compute what the recipe says."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_reference import fresh_slots, make_pictures, reference_update  # noqa: E402

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import get_case, override  # noqa: E402
from effnet_repro.network import initial_weights  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402

CLASSES = 5


def small(name, **fields):
    "A published case at 32 pixels: its network, splits and schedule; 2 replicas, 2N micro-batches of 2"
    case = get_case(name)
    micro, n = fields.pop("micro_batch_size", 2), case.num_stages
    shape = dict(image_size=32, micro_batch_size=micro, num_replicas=2)
    off = dict(precision="32.32", mixup_alpha=0.0, cutmix_lambda=0.0)
    return override(case, **{**shape, **off, "global_batch_size": micro * 2 * 2 * n, **fields})


def program(case, images, labels, **how):
    "A training program fed with given pictures, update after update"
    spec, graphcore = ModelSpec.from_case(case, num_classes=CLASSES), ipu.Graphcore()
    per_replica = ipu.ipus_per_replica(case.num_stages)
    local = case.num_replicas // graphcore.instances[1]
    ipu.configure(graphcore, ipu.machine_options(case, local * per_replica), per_replica)

    def dataset():
        batches = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
        return ipu.element_stream(case, spec, batches, shard=graphcore.instances)

    return ipu.TrainingProgram(graphcore, case, spec, dataset, **how)


def worst_difference(got, wanted):
    "Largest difference over all arrays, relative to each array's largest value"
    assert set(got) >= set(wanted)
    scale = lambda a: np.abs(a).max() + 1e-6
    return max(np.abs(got[n] - w).max() / scale(w) for n, w in wanted.items())


def check_updates(case, updates=1, **how):
    "Run updates on the stand-in and by the reference; compare weights, slots, loss and accuracy"
    spec, rates = ModelSpec.from_case(case, num_classes=CLASSES), [0.01, 0.005]
    images, labels = make_pictures(case, CLASSES, updates)
    weights = initial_weights(spec, seed=1)
    with ipu_standin.install(**how):
        p = program(case, images, labels)
        ipu.set_state(p, weights)
        reports = [p.run(rates[u]) for u in range(updates)]
        got = ipu.get_state(p)
    slots = fresh_slots(case, spec)
    for u in range(updates):
        one = (images[u], labels[u], rates[u])
        weights, slots, loss, accuracy = reference_update(
            case, spec, weights, slots, *one, update=u
        )
        np.testing.assert_allclose(reports[u], [[loss, accuracy]], rtol=1e-5)
    # float32 sums in another order, through the square root of RMSProp
    assert worst_difference(got, {**weights, **slots}) < 2e-4


def test_one_update_of_b0_with_proxy_norm():
    check_updates(small("B0-G16-LN_PN-Half_16IPU_2x8"), check_divergence=False)
