"""A small network that learns with several seeds at once, in plain JAX.

Training one image a step keeps a GPU waiting: each kernel is tiny. Here all seeds of an experiment are the rows of one
computation (`jax.vmap`), and an epoch is one loop on the device (`jax.lax.scan`), so that six seeds take little more
time than one. The network is `effnet_repro.network.run`; the step is `effnet_repro.recipe.sgd_step`.

Weights are dictionaries by published name, with a first axis of seeds, R. What `tests/bench_batch_norm.py` measures is
built from `Seeds.epoch`, `Seeds.private_epoch` and `Seeds.top1`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effnet_repro.data import numpy_batches, open_data, validation_arrays
from effnet_repro.mbconv import BATCH_NORM_MOMENTUM
from effnet_repro.network import initial_weights, params, run
from effnet_repro.ops import JAXOps, TrainContext
from effnet_repro.recipe import cross_entropy, decay_mask, sgd_step
from effnet_repro.scaling import ModelSpec, same_padding

STAGES = ("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k3_s1_i24_o40")
MARGIN = 8  # Pixels by which training images are larger than the network's
MOMENTUM, SMOOTHING, WEIGHT_DECAY = 0.9, 0.1, 5e-4
WINDOW = 32  # Images of a training step at which batch norm's moving averages keep 0.97
CHUNK, RECOMPUTED = (
    250,
    500,
)  # Images judged at a time; training images that statistics are computed from


class PatchOps(JAXOps):
    """The operations in JAX with every convolution as a matrix product of patches.

    Convolutions whose kernels differ from row to row, as under `vmap` over seeds or in gradients of single images,
    become batches of products; as convolutions with thousands of groups they would be slow.
    """

    def conv(self, x, kernel, strides=1):
        kh, kw, per_group, filters = kernel.shape
        n, h, w, c = x.shape
        if (kh, kw, strides) == (1, 1, 1) and per_group == c:
            return super().conv(x, kernel)
        pads = [same_padding(s, k, strides) for s, k in ((h, kh), (w, kw))]
        x, groups = jnp.pad(x, [(0, 0), *pads, (0, 0)]), c // per_group
        height, width = -(-h // strides), -(-w // strides)
        cut = lambda i, j: x[
            :, i : i + strides * height : strides, j : j + strides * width : strides
        ]
        patches = jnp.stack([cut(i, j) for i in range(kh) for j in range(kw)], 3)
        patches = patches.reshape(n * height * width, kh * kw, groups, per_group)
        kernel = kernel.reshape(kh * kw, per_group, groups, filters // groups)
        return jnp.einsum("mkgc,kcgf->mgf", patches, kernel).reshape(n, height, width, filters)


class Images(NamedTuple):
    """Images to learn from and to judge on, uint8 in (N, S, S, 3), with labels (N,) int32."""

    train: np.ndarray  # `MARGIN` pixels larger than the network's
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: int

    def split_off(self) -> Images:
        """Return the same training images with every fifth of them to judge on, to choose rates with."""
        fifth = np.arange(len(self.train)) % 5 == 0
        half = MARGIN // 2
        held = self.train[fifth][:, half:-half, half:-half]
        own, labels = self.train[~fifth], self.train_labels
        return Images(own, labels[~fifth], held, labels[fifth], self.classes)


def read_images(data_dir, size: int, most: int = 10**6) -> Images:
    """Return a data set as arrays: its center squares, `size` pixels, or `MARGIN` more for training.

    `most`: images of either kind to keep. Test images are cut from `size + MARGIN` pixels, too: one scale for both.
    """
    data, side, half = open_data(data_dir, verbose=False), size + MARGIN, MARGIN // 2
    how = dict(image_resize="modern")
    count = min(data.train_count, most)
    train, labels = next(numpy_batches(data, side, count, preprocessing="validation", **how))
    found = [(x[m > 0], y[m > 0]) for x, y, m in validation_arrays(data, side, 250, **how)]
    test, test_labels = (np.concatenate(part)[:most] for part in zip(*found))
    test = test[:, half:-half, half:-half]
    return Images(train, labels, test, test_labels, data.num_classes)


def small_network(norm: str, classes: int, size: int) -> ModelSpec:
    """Return a network of four blocks, groups of 16, with `norm` "BN", "GN" (4 groups) or "LN_PN"."""
    fields = dict(group_size=16, expand_ratio=4, norm=norm, norm_groups=4 if norm == "GN" else 1)
    fields.update(net_stages=STAGES, top_filters=128, dropout_rate=0.0, drop_path_rate=0.0)
    return ModelSpec(num_classes=classes, image_size=size, **fields)


class Seeds:
    """A network with R rows of weights that are trained and judged side by side."""

    def __init__(self, norm: str, images: Images, seeds):
        self.images, self.seeds, self.ops = images, list(seeds), PatchOps()
        self.size = images.test.shape[1]
        self.spec = small_network(norm, images.classes, self.size)
        table = params(self.spec)
        self.moving = [p.name for p in table if not p.trainable]
        self.decays = decay_mask(table)
        self.train = jnp.asarray(images.train), jnp.asarray(images.train_labels)
        count = max(CHUNK, len(images.test) // CHUNK * CHUNK)
        chunk = min(CHUNK, len(images.test))
        cut = lambda a: jnp.asarray(a[:count]).reshape(-1, chunk, *a.shape[1:])
        self.test = cut(images.test), cut(images.test_labels)

    @property
    def count(self):
        return len(self.images.train)

    def weights(self):
        """Return first weights, a row for each seed."""
        rows = [initial_weights(self.spec, s) for s in self.seeds]
        return {n: jnp.stack([row[n] for row in rows]) for n in rows[0]}

    def orders(self, epoch: int, batch: int, micro: int):
        """Return which images an epoch's steps see: (steps, R, batch // micro, micro)."""
        steps = self.count // batch
        draw = lambda s: np.random.default_rng([s, epoch, 7]).permutation(self.count)
        rows = [draw(s)[: steps * batch].reshape(steps, -1, micro) for s in self.seeds]
        return np.stack(rows, 1).astype("int32")

    # ------------------------------------------------------------ one row of weights

    def _prepare(self, images, index, key):
        "Random crops and flips of the images `index`, float32"
        a, b, c = jax.random.split(key, 3)
        n, s = index.shape[0], self.size
        corner = jax.random.randint(a, (n, 2), 0, MARGIN + 1)
        flip = jax.random.bernoulli(b, shape=(n, 1, 1, 1))
        take = lambda i, at: jax.lax.dynamic_slice(images[i], (at[0], at[1], 0), (s, s, 3))
        x = jax.vmap(take)(index, corner)
        return jnp.where(flip, x[:, :, ::-1], x).astype("float32")

    def losses(self, weights, x, labels):
        """Return each image's loss, (n,), and the statistics that batch norm saw."""
        context = TrainContext(self.ops)
        logits = run(self.ops, self.spec, weights, x, context)
        soft = self.ops.one_hot(labels, self.spec.num_classes)
        return cross_entropy(self.ops, logits, soft, SMOOTHING, "all"), context.statistics

    def seen(self, weights, statistics):
        """Return the batch's own mean and variance from the moving averages that a layer reports."""
        keep = BATCH_NORM_MOMENTUM
        return {n: (s - keep * weights[n]) / (1 - keep) for n, s in statistics.items()}

    def gradient(self, weights, x, labels):
        """Return the mean loss and its gradient over micro-batches, and their mean statistics.

        `x`: (k, m, S, S, 3). Each micro-batch is normalized by itself, as where gradients are accumulated.
        """

        def loss(trained, x, labels):
            each, statistics = self.losses({**weights, **trained}, x, labels)
            return each.mean(), self.seen(weights, statistics)

        trained = {n: v for n, v in weights.items() if n not in self.moving}
        each = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0, 0))
        (value, statistics), gradients = each(trained, x, labels)
        mean = lambda tree: {n: v.mean(0) for n, v in tree.items()}
        return value.mean(), mean(gradients), mean(statistics)

    def apply(self, weights, slots, gradients, statistics, rate, images):
        """Return weights and slots after a step of SGD with momentum; `images`: of the step."""
        keep = BATCH_NORM_MOMENTUM ** (images / WINDOW)
        new = {n: keep * weights[n] + (1 - keep) * s for n, s in statistics.items()}
        slots_new = {}
        for n, g in gradients.items():
            g = g + WEIGHT_DECAY * weights[n] if self.decays[n] else g
            how = dict(learning_rate=rate, momentum=MOMENTUM)
            new[n], slots_new[n] = sgd_step(self.ops, weights[n], g, slots[n], **how)
        return {**weights, **new}, slots_new

    # ------------------------------------------------------------ all rows, a whole epoch

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _epoch(self, weights, slots, train, orders, rates, key):
        pixels, labels = train

        def row(weights, slots, index, rate, key):
            k, m = index.shape
            x = self._prepare(pixels, index.reshape(-1), key).reshape(k, m, self.size, self.size, 3)
            loss, gradients, statistics = self.gradient(weights, x, labels[index])
            return (*self.apply(weights, slots, gradients, statistics, rate, k * m), loss)

        def step(state, now):
            order, rate, number = now
            keys = jax.random.split(jax.random.fold_in(key, number), order.shape[0])
            *state, loss = jax.vmap(row)(*state, order, rate, keys)
            return tuple(state), loss

        now = orders, rates, jnp.arange(orders.shape[0])
        (weights, slots), losses = jax.lax.scan(step, (weights, slots), now)
        return weights, slots, losses.mean(0)

    def slots(self, weights):
        """Return momentum at rest."""
        return {n: jnp.zeros_like(v) for n, v in weights.items() if n not in self.moving}

    def epoch(self, weights, slots, orders, rates, number: int):
        """Train for the steps of `orders`, (steps, R, k, m); `rates`: (steps,) or (steps, R).

        Returns weights, slots and the mean loss, (R,). What was given is used up.
        """
        rates = np.broadcast_to(
            np.asarray(rates, "float32").reshape(len(orders), -1), orders.shape[:2]
        )
        key = jax.random.fold_in(jax.random.PRNGKey(17), number)
        return self._epoch(weights, slots, self.train, orders, rates, key)

    @functools.partial(jax.jit, static_argnums=0)
    def _recompute(self, weights, pixels):
        half = MARGIN // 2
        x = pixels[:RECOMPUTED, half:-half, half:-half].astype("float32")
        labels = jnp.zeros(x.shape[0], "int32")
        one = lambda w: {**w, **self.seen(w, self.losses(w, x, labels)[1])}
        return jax.lax.map(one, weights)

    def recompute(self, weights):
        """Return weights whose moving averages are the statistics of 500 training images in one batch."""
        return self._recompute(weights, self.train[0]) if self.moving else weights

    @functools.partial(jax.jit, static_argnums=0)
    def _top1(self, weights, test):
        def chunk(both):
            x, labels = both
            logits = jax.vmap(lambda w: run(self.ops, self.spec, w, x.astype("float32")))(weights)
            return (logits.argmax(-1) == labels).mean(-1)

        return jax.lax.map(chunk, test).mean(0)

    def top1(self, weights) -> np.ndarray:
        """Return the share of test images that each row gets right, (R,)."""
        return np.asarray(self._top1(weights, self.test))

    # ------------------------------------------------------------ differential privacy

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _private(self, weights, slots, train, drawn, numbers, key):
        pixels, labels = train
        orders, kept = drawn
        rates, noise, lot = numbers

        def clipped(weights, x, label):
            trained = {n: v for n, v in weights.items() if n not in self.moving}
            loss = lambda t: self.losses({**weights, **t}, x[None], label[None])[0][0]
            g = jax.grad(loss)(trained)
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(v)) for v in g.values()))
            return {n: v / jnp.maximum(norm, 1.0) for n, v in g.items()}

        def row(weights, slots, index, kept, rate, key):
            crops, own = jax.random.split(key)
            x = self._prepare(pixels, index.reshape(-1), crops)
            x = x.reshape(*index.shape, self.size, self.size, 3)

            def part(total, now):
                g = jax.vmap(clipped, (None, 0, 0))(weights, now[0], now[1])
                add = lambda n, v: v + jnp.einsum("i...,i->...", g[n], now[2])
                return {n: add(n, v) for n, v in total.items()}, None

            total, _ = jax.lax.scan(part, slots_like(slots), (x, labels[index], kept))
            keys = dict(zip(total, jax.random.split(own, len(total))))
            draw = lambda n, v: v + noise * jax.random.normal(keys[n], v.shape)
            g = {n: draw(n, v) / lot for n, v in total.items()}
            return self.apply(weights, slots, g, {}, rate, lot)

        def step(state, now):
            order, kept, rate, number = now
            keys = jax.random.split(jax.random.fold_in(key, number), order.shape[0])
            return jax.vmap(row)(*state, order, kept, rate, keys), None

        slots_like = lambda tree: {n: jnp.zeros_like(v) for n, v in tree.items()}
        now = orders, kept, rates, jnp.arange(orders.shape[0])
        (weights, slots), _ = jax.lax.scan(step, (weights, slots), now)
        return weights, slots

    def private_epoch(self, weights, slots, drawn, rates, noise: float, lot: int, number: int):
        """Train with gradients of single images, clipped to norm 1 and noised.

        - `drawn`: what `poisson` returns: images and which of them count.
        - `noise`: standard deviation of what is added to the sum of clipped gradients; 0 = only clipped.
        - `lot`: expected images of a step, by which the sum is divided.
        """
        rates = np.broadcast_to(
            np.asarray(rates, "float32").reshape(len(drawn[0]), -1), drawn[0].shape[:2]
        )
        key = jax.random.fold_in(jax.random.PRNGKey(23), number)
        numbers = rates, np.float32(noise), np.float32(lot)
        return self._private(weights, slots, self.train, drawn, numbers, key)

    def poisson(self, epoch: int, steps: int, lot: int, parts: int = 4):
        """Draw each image of each step with probability lot / N, as the accountant assumes.

        Returns numbers of images (steps, R, parts, m) and 1.0 where they count, 0.0 where they fill up.
        """
        share = lot / self.count
        most = lot + 6 * math.sqrt(lot * (1 - share)) + 1
        m = math.ceil(min(most, self.count) / parts)
        index = np.zeros((steps, len(self.seeds), parts * m), "int32")
        kept = np.zeros(index.shape, "float32")
        for r, seed in enumerate(self.seeds):
            rng = np.random.default_rng([seed, epoch, 11])
            for i in range(steps):
                own = np.flatnonzero(rng.random(self.count) < share)
                if len(own) > parts * m:
                    raise RuntimeError(f"{len(own)} images drawn where {parts * m} have room.")
                index[i, r, : len(own)], kept[i, r, : len(own)] = own, 1.0
        shape = (steps, len(self.seeds), parts, m)
        return index.reshape(shape), kept.reshape(shape)
