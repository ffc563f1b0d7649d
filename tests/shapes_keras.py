"""A small segmentation network in Keras with one of three norms (batch, group, layer + Proxy Norm); shapes to find."""

from __future__ import annotations

import keras
import numpy as np

from effnet_repro.efficientnet import ProxyNormAct, xla_pays

SIDE, CLASSES = 48, 3  # Background, disk, square


def draw_shapes(count: int, seed: int):
    """Return `count` images, (N, 48, 48, 3) float32 in 0..1, and the class of each pixel, (N, 48, 48) int32.

    Each image has a brightness, a contrast and noise of its own; a disk and a square of random place and size.
    """
    rng = np.random.default_rng([seed, count])
    y, x = np.mgrid[:SIDE, :SIDE]
    images = np.empty((count, SIDE, SIDE, 3), "float32")
    classes = np.zeros((count, SIDE, SIDE), "int32")
    for i in range(count):
        level, contrast = rng.uniform(0.2, 0.8), rng.choice((-1, 1)) * rng.uniform(0.1, 0.3)
        for kind in rng.permutation((1, 2)):
            (a, b), r = rng.uniform(8, SIDE - 8, 2), rng.uniform(4, 9)
            inside = np.hypot(y - a, x - b) if kind == 1 else np.maximum(abs(y - a), abs(x - b))
            classes[i][inside < r] = kind
        tint = contrast * rng.uniform(0.8, 1.2, 3)
        images[i] = level + (classes[i] > 0)[..., None] * tint + rng.normal(0, 0.1, (SIDE, SIDE, 3))
    return images, classes


def norm_act(norm: str, images: int):
    """Return the function that puts norm and activation behind a convolution; `images`: of a training step."""
    if norm == "LN_PN":
        return lambda x: ProxyNormAct()(x)
    if norm == "GN":
        group_norm = lambda x: keras.layers.GroupNormalization(4)(x)
        return lambda x: keras.layers.Activation("swish")(group_norm(x))
    momentum = 0.9 ** (images / 8)  # The moving averages look back over as many images
    batch_norm = lambda: keras.layers.BatchNormalization(momentum=momentum)
    return lambda x: keras.layers.Activation("swish")(batch_norm()(x))


def segmenter(norm: str, images: int, seed: int = 0):
    """Return a network of two halvings and two doublings with shortcuts: images to a score for each pixel's class."""
    keras.utils.set_random_seed(seed)
    act = norm_act(norm, images)
    how = dict(padding="same", use_bias=False, kernel_initializer="he_normal")
    conv = lambda x, filters, strides=1: act(keras.layers.Conv2D(filters, 3, strides, **how)(x))
    x = pixels = keras.Input((SIDE, SIDE, 3))
    kept = []
    for filters in (16, 32):
        x = conv(x, filters)
        kept.append(x)
        x = conv(x, 2 * filters, 2)
    for filters in (32, 16):
        x = keras.layers.UpSampling2D()(x)
        x = conv(keras.layers.concatenate([x, kept.pop()]), filters)
    return keras.Model(pixels, keras.layers.Conv2D(CLASSES, 1)(x))


def mean_iou(model, images, classes) -> float:
    """Return the mean over classes of intersection over union."""
    found = model.predict(images, batch_size=64, verbose=0).argmax(-1)
    both = [((found == c) & (classes == c)).sum() for c in range(CLASSES)]
    either = [((found == c) | (classes == c)).sum() for c in range(CLASSES)]
    return float(np.mean(np.divide(both, either)))


def train_shapes(norm: str, images: int, seed: int, count: int = 2048, check=lambda: None) -> float:
    """Train on `count` drawn images, `images` a step, twice over them; returns mean IoU on 256 others."""
    check()
    model = segmenter(norm, images, seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rate = 3e-3 * (images / 8) ** 0.5
    steps = 2 * count // images
    decay = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(decay), loss, jit_compile=xla_pays())
    model.fit(*draw_shapes(count, seed), batch_size=images, epochs=2, verbose=0)
    return mean_iou(model, *draw_shapes(256, 1000))
