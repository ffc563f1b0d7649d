"""What a gradient of B0 takes: planned memory with a feature pyramid, and time where it is made of single images'."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from seeds_at_once import small_network

from effnet_repro.network import initial_weights, params, run, segments
from effnet_repro.ops import TrainContext, get_ops
from effnet_repro.recipe import cross_entropy
from effnet_repro.scaling import ModelSpec


def pyramid_memory(norm, images, side, small):
    "GiB that a compiled training step of B0 with a feature pyramid of 64 channels plans to hold"
    spec, ops = ModelSpec.from_name(f"B0-G16-{norm}", num_classes=0), get_ops("jax")
    ends = ("block3b", "block5c", "block7a/c")  # a map of 1/8, 1/16 and 1/32 of the side
    if small:
        spec, ends = small_network(norm, 0, side), ("block1a/c", "block2b", "block3a/c")

    def maps(weights, lateral, x):
        found = {}
        run(ops, spec, weights, x, TrainContext(ops), found)
        up = lambda y: jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)
        levels = [found[e] @ k for e, k in zip(ends, lateral)]
        for i in (1, 0):
            levels[i] += up(levels[i + 1])[:, : levels[i].shape[1], : levels[i].shape[2]]
        return sum(jnp.mean(jnp.square(y)) for y in levels)

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    weights = {p.name: shape(*p.shape) for p in params(spec)}
    wide = {s.name: s.filters for s in segments(spec)}
    lateral = [shape(wide[e], 64) for e in ends]
    step = jax.jit(jax.grad(maps, (0, 1)))
    plan = step.lower(weights, lateral, shape(images, side, side, 3)).compile().memory_analysis()
    sizes = ("temp", "argument", "output")
    return sum(getattr(plan, f"{s}_size_in_bytes") for s in sizes) / 2**30


def b0_step(norm, images, side, single, small):
    """Milliseconds of a gradient of B0, five times, and the GiB that it plans to hold beside weights and images.

    With `single`, the gradient of each image is clipped to length 1 before they are added up.
    """
    spec, ops = ModelSpec.from_name(f"B0-G16-{norm}", num_classes=10), get_ops("jax")
    spec = small_network(norm, 10, side) if small else spec

    def loss(weights, x, labels):
        logits = run(ops, spec, weights, x, TrainContext(ops))
        return cross_entropy(ops, logits, ops.one_hot(labels, 10)).mean()

    def clipped(weights, x, label):
        g = jax.grad(loss)(weights, x[None], label[None])
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(v)) for v in g.values()))
        return {n: v / jnp.maximum(norm, 1.0) for n, v in g.items()}

    def private(weights, x, labels):
        g = jax.vmap(clipped, (None, 0, 0))(weights, x, labels)
        return {n: v.sum(0) for n, v in g.items()}

    x = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (images, side, side, 3)), "float32")
    given = jax.device_put((initial_weights(spec), x, jnp.arange(images) % 10))
    step = jax.jit(private if single else jax.grad(loss)).lower(*given).compile()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(5):
            found = step(*given)
        jax.block_until_ready(found)
        times.append(1e3 * (time.perf_counter() - begin) / 5)
    return times[2:], step.memory_analysis().temp_size_in_bytes / 2**30
