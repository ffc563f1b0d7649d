"""The weight update of a case written out plainly: what an IPU program must agree with. No Keras, no graph."""

import numpy as np

from effnet_repro.augment import mix
from effnet_repro.ipu import FedMasks, draws
from effnet_repro.network import params, run, segments
from effnet_repro.ops import TFOps, get_ops
from effnet_repro.proxy_norm import proxy_statistics
from effnet_repro.recipe import (
    decay_mask,
    rmsprop_settings,
    rmsprop_step,
    sgd_step,
    trained_segments,
)

MIXING = ("mixup", "cutmix_lambda", "cutmix_centre")


def make_images(case, num_classes, updates=1, seed=0):
    "Images and labels of some steps, in the order of a global batch"
    rng, n = np.random.default_rng(seed), case.global_batch_size
    size = (updates, n, case.image_size, case.image_size, 3)
    return rng.integers(0, 256, size, "uint8"), rng.integers(0, num_classes, (updates, n), "int32")


class HalfOps(TFOps):
    "TensorFlow's operations with the proxy statistics of the 16-bit cases"


@proxy_statistics.register(HalfOps)
def half_statistics(ops, gamma, beta, gamma_prime, beta_prime):
    "Proxy statistics of the 16-bit cases: 200 quantiles in float16, moments summed in float32"
    import tensorflow as tf
    from scipy.special import ndtri

    q = tf.constant(ndtri((np.arange(200)[:, None] + 0.5) / 200), tf.float16)
    gamma, beta, more, shift = (
        tf.cast(v, tf.float16) for v in (gamma, beta, gamma_prime, beta_prime)
    )
    a = tf.cast(tf.nn.silu(gamma * (q * (1 + more) + shift) + beta), tf.float32)
    mean = tf.reduce_mean(a, 0)
    variance = tf.cast(tf.reduce_mean((a - mean) ** 2, 0), tf.float16)
    inv_std = tf.math.rsqrt(variance + tf.constant(0.03, tf.float16))
    return tf.cast(tf.cast(mean, tf.float16), tf.float32), tf.cast(inv_std, tf.float32)


def arithmetic(case):
    "Tensor operations, type of activations and type of weights of a case's precision"
    ops = TFOps() if case.precision == "32.32" else HalfOps()
    compute = "float32" if case.precision == "32.32" else "float16"
    return ops, compute, "float16" if case.precision == "16.16" else "float32"


def full_gradient(case, total, weight, stored, decays):
    "Mean gradient with weight decay, the loss scale undone; in 16.16 cases all of it in float16"
    scale = 1.0 if case.precision == "32.32" else case.loss_scale
    kind, decay = np.dtype(stored).type, case.weight_decay * scale if decays else 0.0
    g = total.astype(stored) + kind(decay) * weight.astype(stored)
    if case.optimizer == "sgd":
        g = g.astype("float32")
    return (g * g.dtype.type(1 / scale)).astype("float32")


def smooth(case, targets):
    "Label smoothing written out: over the other classes, as published, or over all"
    e, classes = case.label_smoothing, targets.shape[-1]
    if case.label_smoothing_over == "all":
        return targets * (1 - e) + e / classes
    return targets * (1 - e) + (1 - targets) * e / (classes - 1)


def reference_gradients(case, spec, weights, images, labels, seed=0, update=0):
    "Sums over a step's micro-batches by eager TensorFlow: ({name: gradient}, loss, correct images)"
    import tensorflow as tf

    ops, compute, stored = arithmetic(case)
    names = [s.name for s in segments(spec)]
    trained = set(trained_segments(names, case.variable_filter))
    train = [p.name for s in segments(spec) if s.name in trained for p in s.params if p.trainable]
    k, m = case.gradient_accumulation * case.num_replicas, case.micro_batch_size
    scale = 1.0 if case.precision == "32.32" else case.loss_scale
    tensors = {n: tf.constant(w.astype(stored).astype("float32")) for n, w in weights.items()}
    watched = [tensors[n] for n in train]

    @tf.function(autograph=False)
    def micro(images, labels, fed):
        targets = ops.one_hot(labels, spec.num_classes)
        x, soft = ops.cast(images, "float32"), targets
        if "mixup" in fed:
            x, soft = mix(ops, x, targets, **{n: fed[n] for n in MIXING})
        with tf.GradientTape() as tape:
            tape.watch(watched)
            logits = run(ops, spec, tensors, ops.cast(x, compute), FedMasks(ops, spec, fed))
            loss = tf.reduce_mean(
                -tf.reduce_sum(smooth(case, soft) * tf.nn.log_softmax(logits), -1)
            )
            scaled = loss * scale
        right = ops.cast(tf.equal(tf.argmax(logits, -1, labels.dtype), labels), "float32")
        return tape.gradient(scaled, watched), loss, ops.sum(right)

    sums, loss, right = [0.0] * len(train), 0.0, 0.0
    for j in range(k):
        part = slice(j * m, (j + 1) * m)
        fed = {n: tf.constant(v) for n, v in draws(case, spec, seed, update, j).items()}
        g, l, r = micro(tf.constant(images[part]), tf.constant(labels[part]), fed)
        sums = [a + b.numpy() for a, b in zip(sums, g)]
        loss, right = loss + float(l), right + float(r)
    return dict(zip(train, sums)), loss, right


def reference_step(case, spec, weights, slots, gradients, rate):
    "Weights and slots after a step, from summed gradients"
    k, stored = case.gradient_accumulation * case.num_replicas, arithmetic(case)[2]
    new, new_slots, decays = dict(weights), dict(slots), decay_mask(params(spec))
    npo = get_ops("numpy")
    for name, total in gradients.items():
        w = weights[name]
        g = full_gradient(case, total / np.float32(k), w, stored, decays[name])
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
    return new, new_slots


def reference_update(case, spec, weights, slots, images, labels, rate, *, seed=0, update=0):
    "One update: (weights, slots, mean loss, accuracy)"
    gradients, loss, right = reference_gradients(case, spec, weights, images, labels, seed, update)
    k = case.gradient_accumulation * case.num_replicas
    new = reference_step(case, spec, weights, slots, gradients, rate)
    return (*new, loss / k, right / (k * case.micro_batch_size))


def fresh_slots(case, spec):
    "Slots before the first step"
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
