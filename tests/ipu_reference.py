"""The weight update of a case written out plainly: what an IPU program must agree with. No Keras, no graph."""

import numpy as np

from effnet_repro.augment import mix
from effnet_repro.ipu import FedMasks, draws
from effnet_repro.network import params, run, segments
from effnet_repro.ops import get_ops
from effnet_repro.recipe import (
    add_weight_decay,
    cross_entropy,
    decay_mask,
    rmsprop_settings,
    rmsprop_step,
    sgd_step,
    trained_segments,
)

MIXING = ("mixup", "cutmix_lambda", "cutmix_centre")


def make_pictures(case, num_classes, updates=1, seed=0):
    "Pictures and labels of some updates, in the order of a global batch"
    rng, n = np.random.default_rng(seed), case.global_batch_size
    size = (updates, n, case.image_size, case.image_size, 3)
    return rng.integers(0, 256, size, "uint8"), rng.integers(0, num_classes, (updates, n), "int32")


def reference_update(case, spec, weights, slots, images, labels, rate, *, seed=0, update=0):
    "One update by eager TensorFlow: (weights, slots, mean loss, accuracy)"
    import tensorflow as tf

    ops = get_ops("tensorflow")
    names = [s.name for s in segments(spec)]
    trained = set(trained_segments(names, case.variable_filter))
    train = [p.name for s in segments(spec) if s.name in trained for p in s.params if p.trainable]
    k, m = case.gradient_accumulation * case.num_replicas, case.micro_batch_size
    tensors = {n: tf.constant(w) for n, w in weights.items()}
    watched = [tensors[n] for n in train]

    @tf.function(autograph=False)
    def micro(images, labels, fed):
        targets = ops.one_hot(labels, spec.num_classes)
        x, soft = ops.cast(images, "float32"), targets
        if "mixup" in fed:
            x, soft = mix(ops, x, targets, **{n: fed[n] for n in MIXING})
        with tf.GradientTape() as tape:
            tape.watch(watched)
            logits = run(ops, spec, tensors, x, FedMasks(ops, spec, fed))
            smoothing = case.label_smoothing, case.label_smoothing_over
            loss = ops.mean(cross_entropy(ops, logits, soft, *smoothing))
        right = ops.sum(ops.cast(ops.sum(logits * targets, -1) >= ops.max(logits, -1), "float32"))
        return tape.gradient(loss, watched), loss, right

    sums, loss, right = [0.0] * len(train), 0.0, 0.0
    for j in range(k):
        part = slice(j * m, (j + 1) * m)
        fed = {n: tf.constant(v) for n, v in draws(case, spec, seed, update, j).items()}
        g, l, r = micro(tf.constant(images[part]), tf.constant(labels[part]), fed)
        sums = [a + b.numpy() for a, b in zip(sums, g)]
        loss, right = loss + float(l), right + float(r)
    new, new_slots, decays = dict(weights), dict(slots), decay_mask(params(spec))
    npo = get_ops("numpy")
    for name, total in zip(train, sums):
        w = weights[name]
        g = add_weight_decay(total / np.float32(k), w, case.weight_decay if decays[name] else 0.0)
        momentum = slots[f"slots/momentum/{name}"]
        if case.optimizer == "sgd":
            w, momentum = sgd_step(npo, w, g, momentum, learning_rate=rate, momentum=case.momentum)
        else:
            square = slots[f"slots/mean_square/{name}"]
            w, square, momentum = rmsprop_step(
                npo, w, g, square, momentum, learning_rate=rate, **rmsprop_settings(case)
            )
            new_slots[f"slots/mean_square/{name}"] = square
        new[name], new_slots[f"slots/momentum/{name}"] = w, momentum
    return new, new_slots, loss / k, right / (k * m)


def fresh_slots(case, spec):
    "Slots before the first update"
    names = [s.name for s in segments(spec)]
    trained = trained_segments(names, case.variable_filter)
    table = [p for s in segments(spec) if s.name in trained for p in s.params if p.trainable]
    start = case.rmsprop_initial_mean_square
    slots = {f"slots/momentum/{p.name}": np.zeros(p.shape, "float32") for p in table}
    if case.optimizer == "rmsprop":
        slots.update(
            {f"slots/mean_square/{p.name}": np.full(p.shape, start, "float32") for p in table}
        )
    return slots
