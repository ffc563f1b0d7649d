"""The reader of a GPU under JAX: cutting and resizing on the device, of images that stay there or are sent."""

import functools
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import decode_image, located, read_encoded, wants_fast_dct
from effnet_repro.data.transforms import validation_window


class _Pixels(NamedTuple):
    "Pictures on the device of JAX, one after the other"

    pixels: Any  # (P, 3) uint8
    begin: np.ndarray  # First pixel of each picture, (n,)
    sizes: np.ndarray  # Height and width, (n, 2)


def lay_out(pictures, most=None):
    "Bring pictures (H, W, 3) to the device; filled up to `most` pixels, so that few programs are compiled"
    import jax.numpy as jnp

    sizes = np.array([p.shape[:2] for p in pictures], np.int32)
    ends = np.cumsum(sizes.prod(1))
    pixels = np.empty((most or ends[-1], 3), np.uint8)
    np.concatenate([p.reshape(-1, 3) for p in pictures], out=pixels[: ends[-1]])
    return _Pixels(jnp.asarray(pixels), (ends - sizes.prod(1)).astype(np.int32), sizes)


def _decode_all(dataset, fast):
    def picture(i):
        encoded, _ = read_encoded(dataset, "train", i)
        with located(dataset, "train", i):
            return decode_image(encoded, fast)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = lay_out(list(pool.map(picture, range(dataset.train_count))))
    size = found.pixels.nbytes / 2**20
    print(f"{dataset.train_count:,} decoded pictures, {size:,.0f} MiB, stay on the device")
    return found


_kept = {}  # the training split of one data set -> its pictures


def _on_device(dataset, fast):
    split = dataset.splits["train"]
    if _kept.get("split") is not split or _kept["fast"] != fast:
        _kept.clear()
        _kept.update(split=split, fast=fast, decoded=_decode_all(dataset, fast))
    return _kept["decoded"]


_sampled = {}  # the training split of one data set -> the mean number of pixels of its pictures


def _mean_pixels(dataset):
    "The mean over 64 pictures, which are looked at once"
    split = dataset.splits["train"]
    if _sampled.get("split") is not split:
        some = np.linspace(0, dataset.train_count - 1, min(dataset.train_count, 64)).astype(int)
        sizes = np.array([read_encoded(dataset, "train", i)[1] for i in some])
        _sampled.update(split=split, pixels=sizes.prod(1).mean())
    return _sampled["pixels"]


def fits_device(
    dataset: DataSet,  # From `open_data`
    share: float = 0.125,  # Of the device's memory that the decoded pictures may take
) -> bool:
    "Say whether the training pictures of a data set fit on the device of JAX"
    import jax

    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**32)
    limit = min(share * memory, 2**32)  # pixels are counted in 31 bits
    if dataset.splits["train"].length.sum() > limit:
        return False
    return bool(3 * _mean_pixels(dataset) * dataset.train_count < limit)


def _rounded(product, zero):
    "Keep a compiler from fusing a product with the sum that follows: it cannot know that `zero` is 0"
    import jax

    bits = jax.lax.bitcast_convert_type(product, "int32") ^ zero
    return jax.lax.bitcast_convert_type(bits, "float32")


def _cut_off(values):
    "`_to_bytes` of `published`: the nearest float16 (ties to even), then cut off"
    import jax

    bits = jax.lax.bitcast_convert_type(values, "int32")
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF  # a float16 has 13 bits less
    return jax.lax.bitcast_convert_type(bits, "float32").astype("uint8")


@functools.lru_cache(maxsize=1)
def _published_cutter():
    "A compiled `resize` of a rectangle of each of many images, by corners"
    import jax
    import jax.numpy as jnp

    def taps(corner, side, scale, size, zero):
        at = corner[:, None] + jnp.arange(side, dtype="float32")
        at = _rounded(at * scale[:, None], zero)
        low = jnp.floor(at)
        second = jnp.minimum(low + 1, size[:, None] - 1)
        return low.astype("int32"), second.astype("int32"), at - low

    def cut(pixels, begin, width, part, numbers, zero, side):
        scale, corner, flips = numbers
        y0, y1, fy = taps(corner[:, 0], side, scale[:, 0], part[:, 2], zero)
        x0, x1, fx = taps(corner[:, 1], side, scale[:, 1], part[:, 3], zero)
        mirror = lambda x: jnp.where(flips[:, None], part[:, 3:] - 1 - x, x)
        x0, x1, begin = mirror(x0), mirror(x1), begin + part[:, 0] * width + part[:, 1]

        def line(y):
            row = (begin[:, None] + y * width[:, None])[:, :, None]
            a, b = (pixels[row + x[:, None, :]].astype("float32") for x in (x0, x1))
            return a + _rounded((b - a) * fx[:, None, :, None], zero)

        upper = line(y0)
        return _cut_off(upper + _rounded((line(y1) - upper) * fy[:, :, None, None], zero))

    compiled = jax.jit(cut, static_argnums=6)
    return lambda *args: compiled(*args[:4], args[4:-1], np.int32(0), args[-1])


@functools.lru_cache(maxsize=1)
def _modern_cutter():
    "A compiled `resize` of a rectangle of each of many images, by centers"
    import jax
    import jax.numpy as jnp

    def taps(corner, side, scale, size):
        at = (corner[:, None] + jnp.arange(side, dtype="float32") + 0.5) * scale[:, None] - 0.5
        low = jnp.floor(at)
        first, second = jnp.maximum(low, 0), jnp.minimum(low + 1, size[:, None] - 1)
        return first.astype("int32"), second.astype("int32"), at - low

    def cut(pixels, begin, width, part, scale, corner, flips, side):
        y0, y1, fy = taps(corner[:, 0], side, scale[:, 0], part[:, 2])
        x0, x1, fx = taps(corner[:, 1], side, scale[:, 1], part[:, 3])
        begin = begin + part[:, 0] * width + part[:, 1]

        def line(y):
            row = (begin[:, None] + y * width[:, None])[:, :, None]
            a, b = (pixels[row + x[:, None, :]].astype("float32") for x in (x0, x1))
            return a + (b - a) * fx[:, None, :, None]

        upper = line(y0)
        out = upper + (line(y1) - upper) * fy[:, :, None, None]
        out = jnp.clip(jnp.rint(out), 0, 255).astype("uint8")
        return jnp.where(flips[:, None, None, None], out[:, :, ::-1], out)

    return jax.jit(cut, static_argnums=7)


def cutter(image_resize):
    return _published_cutter() if image_resize == "published" else _modern_cutter()


def device_arrays(dataset, plan, inputs, how):
    "The stream of `training_batches` on the device"
    source = _resident if fits_device(dataset) else _streamed
    square, cut = (how.image_size, how.image_size), cutter(how.image_resize)
    fast = wants_fast_dct(dataset, how.image_resize)
    for at, begin, whole, part, flips, labels in source(dataset, plan, inputs, how, fast):
        new, corner = np.tile(square, (len(part), 1)), np.zeros((len(part), 2))
        if not how.random:
            windows = np.array([validation_window(*size, *how[:2]) for size in whole])
            new, corner = windows[:, 0], windows[:, 1]
            flips = np.zeros(len(part), bool)
        numbers = (part[:, 2:] / new).astype("float32"), corner.astype("float32"), flips
        yield cut(at, begin, whole[:, 1], part, *numbers, how.image_size), labels


def whole_images(sizes):
    return np.concatenate([0 * sizes, sizes], 1)


def _resident(dataset, plan, inputs, how, fast):
    "Pictures that stay: pixels, first pixels, sizes, rectangles, flips, labels"
    kept = _on_device(dataset, fast)
    for update in itertools.count(how.first_update):
        pictures, part, flips, labels = inputs(update, 0, plan.local, kept.sizes)
        sizes = kept.sizes[pictures]
        part = part if how.random else whole_images(sizes)
        yield kept.pixels, kept.begin[pictures], sizes, part, flips, labels


def _streamed(dataset, plan, inputs, how, fast):
    "The same of pictures that are decoded for each update; of a picture only the rectangle is sent"

    def part(update, begin):
        end = min(begin + 8, plan.local)
        encoded, crops, flips, labels = inputs(update, begin, end)
        images = []
        for i, data, crop in zip(plan.take(update, begin, end)[0], encoded, crops):
            with located(dataset, "train", i):
                top, left, height, width = crop if how.random else (0, 0, None, None)
                image = decode_image(data, fast)
                images.append(image[top:, left:][:height, :width])
        return images, flips, labels

    def assemble(pieces):
        images, flips, labels = zip(*(piece.result() for piece in pieces))
        images = sum(images, [])
        pixels = sum(image.shape[0] * image.shape[1] for image in images)
        step = 2 ** max(pixels.bit_length() - 3, 0)
        sent = lay_out(images, -(-pixels // step) * step)
        return (*sent, whole_images(sent.sizes), np.concatenate(flips), np.concatenate(labels))

    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as assembler:
        ahead = deque()
        for update in itertools.count(how.first_update):
            pieces = [pool.submit(part, update, i) for i in range(0, plan.local, 8)]
            ahead.append(assembler.submit(assemble, pieces))
            if len(ahead) > 2:  # two batches are made while one is used
                yield ahead.popleft().result()
