"""Small cases, their updates on the stand-in and by the written-out recipe, and how far the two differ."""

import ipu_standin
import numpy as np
import tensorflow as tf
from ipu_reference import fresh_slots, make_images, reference_update

from effnet_repro import ipu
from effnet_repro.config import get_case, override
from effnet_repro.network import initial_weights
from effnet_repro.scaling import ModelSpec

CLASSES = 5
NAME = "B0-G16-LN_PN-Half_16IPU_2x8"
STAGES = ("r1_k3_s1_e1_i32_o16", "r2_k3_s2_i16_o24")  # the first two of B0


def small(name=NAME, **fields):
    "A published case at 32 pixels: its network, splits and schedule; 2 replicas, 2N micro-batches of 2"
    case = get_case(name)
    micro, n = fields.pop("micro_batch_size", 2), fields.get("num_stages", case.num_stages)
    shape = dict(image_size=32, micro_batch_size=micro, num_replicas=2)
    off = dict(precision="32.32", mixup_alpha=0.0, cutmix_lambda=0.0)
    return override(case, **{**shape, **off, "global_batch_size": micro * 2 * 2 * n, **fields})


def short_case(name=NAME, **fields):
    "`small` with a network of three blocks instead of sixteen and more, in two stages"
    return small(name, **{"pipeline_splits": ("block2b",), "net_stages": STAGES, **fields})


def program(case, images, labels, **how):
    "A training program fed with given images, step after step"
    spec, graphcore = ModelSpec.from_case(case, num_classes=CLASSES), ipu.Graphcore()
    per_replica = ipu.ipus_per_replica(case.num_stages)
    index, count = graphcore.instances
    local = case.num_replicas // count * per_replica
    options = ipu.machine_options(case, None if graphcore.popdist else local)
    ipu.configure(graphcore, options, per_replica)

    def dataset():
        batches = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
        return ipu.element_stream(case, spec, batches, shard=(index, count))

    return ipu.TrainingProgram(graphcore, case, spec, dataset, **how)


def worst_difference(got, wanted):
    "Largest difference over all arrays, relative to each array's largest value"
    assert set(got) >= set(wanted)
    scale = lambda a: np.abs(a).max() + 1e-6
    return max(np.abs(got[n] - w).max() / scale(w) for n, w in wanted.items())


def change_differences(got, wanted, start):
    "For weights and each kind of slot: the difference of the changes, relative to the size of the change"
    found = {}
    for kind in ("all", "slots/mean_square", "slots/momentum"):
        names = [n for n in wanted if n.startswith(f"{kind}/")]
        change = [(wanted[n] - start[n]).ravel().astype("float64") for n in names]
        other = [(got[n] - wanted[n]).ravel().astype("float64") for n in names]
        if names:
            size, off = (np.linalg.norm(np.concatenate(v)) for v in (change, other))
            found[kind.rpartition("/")[2]] = off / size
    return found


def both(case, updates=1, updates_per_run=1, **how):
    "Steps on the stand-in and by the reference: machine, then (weights and slots, reports) of each, and the start"
    spec, rates = ModelSpec.from_case(case, num_classes=CLASSES), [0.01] * updates_per_run + [0.005]
    images, labels = make_images(case, CLASSES, updates)
    weights = initial_weights(spec, seed=1)
    with ipu_standin.install(**how) as machine:
        p = program(case, images, labels, updates_per_run=updates_per_run)
        ipu.set_state(p, weights)
        runs = range(0, updates, updates_per_run)
        reports = np.concatenate([p.run(rates[u]) for u in runs])
        got = ipu.get_state(p)
    slots, wanted = fresh_slots(case, spec), []
    start = {**weights, **slots}
    for u in range(updates):
        one = (images[u], labels[u], rates[u])
        weights, slots, *report = reference_update(case, spec, weights, slots, *one, update=u)
        wanted.append(report)
    return machine, (got, reports), ({**weights, **slots}, np.array(wanted)), start


def check_updates(case, updates=1, updates_per_run=1, **how):
    "Compare weights, slots, loss and accuracy of some steps"
    machine, (got, reports), (state, wanted), start = both(case, updates, updates_per_run, **how)
    np.testing.assert_allclose(reports, wanted, rtol=2e-5)
    # float32 sums in another order, through the square root of RMSProp
    assert worst_difference(got, state) < 5e-4
    # what is left of 24 bits where a change is a thousandth of the value
    assert max(change_differences(got, state, start).values()) < 1e-3
    return machine, got


EVERYTHING = dict(mixup_alpha=0.2, cutmix_lambda=0.9, micro_batch_size=4)
# From zero the mean square is the gradient's square, and not one less a thousandth of it
PLAIN_SLOTS = dict(rmsprop_initial_mean_square=0.0, rmsprop_epsilon=1e-6)
