"""The reader of a GPU under JAX: the device cuts and resizes, images that stay there or are sent.

A set that fits is decoded once and its pixels stay on the device (`_resident`); a training step then sends numbers only
(`Cuts`): which images, which rectangles, which are mirrored. Of a larger set the rectangles are decoded and sent
(`_streamed`). `resident_cuts` gives the numbers alone, for a training step that cuts its images itself (`cut_images`).
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import decode_for, located, read_encoded, read_image, wants_fast_dct
from effnet_repro.data.rectangles import rectangle_batches
from effnet_repro.data.request import TrainRequest
from effnet_repro.data.threads import core_count
from effnet_repro.data.transforms import center_crop_box
from effnet_repro.messages import say


class Pixels(NamedTuple):
    """Images on the device, one after the other."""

    pixels: Any  # (P, 3) uint8, on the device
    begin: np.ndarray  # First pixel of each image, (n,)
    sizes: np.ndarray  # Height and width, (n, 2)


class Cuts(NamedTuple):
    """What is cut out of pixels on the device, an entry for each image; `zero` is a 0 that a compiler must not see."""

    begin: np.ndarray  # First pixel of the image, (B,) int32
    width: np.ndarray  # Of the image, pixels, (B,) int32
    parts: np.ndarray  # Top, left, height, width of each rectangle, (B, 4) int32
    scale: (
        np.ndarray
    )  # Height and width of the rectangle over those of its resized version, (B, 2) float32
    corner: np.ndarray  # Top and left of what is taken of that, pixels, (B, 2) float32
    flips: np.ndarray  # Whether it is mirrored, (B,) bool
    zero: np.ndarray  # () int32


class _Batch(NamedTuple):
    "What the device needs for a training step"

    pixels: Any  # As in `Pixels`
    begin: np.ndarray  # (B,)
    sizes: np.ndarray  # (B, 2)
    parts: np.ndarray  # Top, left, height, width of each rectangle, (B, 4)
    flips: np.ndarray  # (B,) bool
    labels: np.ndarray  # (B,) int32


def lay_out(images: Sequence[np.ndarray]) -> Pixels:
    """Bring images (H, W, 3) to the device."""
    import jax.numpy as jnp

    sizes = np.array([image.shape[:2] for image in images], np.int32)
    ends = np.cumsum(sizes.prod(1))
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    return Pixels(jnp.asarray(pixels), (ends - sizes.prod(1)).astype(np.int32), sizes)


def _decode_all(dataset, fast):
    how = "published" if fast else "modern"

    def image(number):
        encoded, _, turn = read_image(dataset, "train", number, True, upright=not fast)
        with located(dataset, "train", number):
            return decode_for(dataset, encoded, how), turn

    with ThreadPoolExecutor(core_count()) as pool:
        images, turns = zip(*pool.map(image, range(dataset.train_count)))
    dataset.kept["turns"] = np.array(turns)
    found = lay_out(images)
    size = found.pixels.nbytes / 2**20
    say(f"{dataset.train_count:,} decoded images, {size:,.0f} MiB, stay on the device")
    return found


def _on_device(dataset, fast):
    "The decoded training images, which stay on the device as long as `dataset` lives, with one DCT at a time"
    kept = dataset.kept.get("on the device")
    if kept is None or kept[0] != fast:
        dataset.kept.pop("on the device", None)  # makes room first
        kept = dataset.kept["on the device"] = fast, _decode_all(dataset, fast)
    return kept[1]


def _mean_pixels(dataset):
    "The mean over 64 training images, which are looked at once"
    if "mean pixels" not in dataset.kept:
        some = np.linspace(0, dataset.train_count - 1, min(dataset.train_count, 64)).astype(int)
        sizes = np.array([read_encoded(dataset, "train", i)[1] for i in some])
        dataset.kept["mean pixels"] = sizes.prod(1).mean()
    return dataset.kept["mean pixels"]


def memory_of_gpu() -> Optional[int]:
    """Return the bytes that JAX may use on its first device; None where it does not tell, as on a CPU."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def fits_device(
    dataset: DataSet,  # From `open_data`
    share: float = 0.125,  # Of the device's memory that the decoded images may take
) -> bool:
    """Say whether the training images of a data set fit on the device of JAX"""
    limit = min(share * (memory_of_gpu() or 2**32), 2**32)  # pixels are counted in 31 bits
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


def _published_cut(pixels, cuts, side):
    "`resize` of a rectangle of each of many images, by corners"
    import jax.numpy as jnp

    def taps(axis):
        at = cuts.corner[:, axis, None] + jnp.arange(side, dtype="float32")
        at = _rounded(at * cuts.scale[:, axis, None], cuts.zero)
        low = jnp.floor(at)
        second = jnp.minimum(low + 1, cuts.parts[:, 2 + axis, None] - 1)
        return low.astype("int32"), second.astype("int32"), at - low

    (y0, y1, fy), (x0, x1, fx) = taps(0), taps(1)
    last = cuts.parts[:, 3:] - 1
    x0, x1 = (jnp.where(cuts.flips[:, None], last - x, x) for x in (x0, x1))
    begin = cuts.begin + cuts.parts[:, 0] * cuts.width + cuts.parts[:, 1]

    def line(y):
        row = (begin[:, None] + y * cuts.width[:, None])[:, :, None]
        a, b = (pixels[row + x[:, None, :]].astype("float32") for x in (x0, x1))
        return a + _rounded((b - a) * fx[:, None, :, None], cuts.zero)

    upper = line(y0)
    return _cut_off(upper + _rounded((line(y1) - upper) * fy[:, :, None, None], cuts.zero))


def _modern_cut(pixels, cuts, side):
    "`resize` of a rectangle of each of many images, by centers"
    import jax.numpy as jnp

    def taps(axis):
        at = cuts.corner[:, axis, None] + jnp.arange(side, dtype="float32") + 0.5
        at = at * cuts.scale[:, axis, None] - 0.5
        low, last = jnp.floor(at), cuts.parts[:, 2 + axis, None] - 1
        first, second = jnp.maximum(low, 0), jnp.minimum(low + 1, last)
        return first.astype("int32"), second.astype("int32"), at - low

    (y0, y1, fy), (x0, x1, fx) = taps(0), taps(1)
    begin = cuts.begin + cuts.parts[:, 0] * cuts.width + cuts.parts[:, 1]

    def line(y):
        row = (begin[:, None] + y * cuts.width[:, None])[:, :, None]
        a, b = (pixels[row + x[:, None, :]].astype("float32") for x in (x0, x1))
        return a + (b - a) * fx[:, None, :, None]

    upper = line(y0)
    out = upper + (line(y1) - upper) * fy[:, :, None, None]
    out = jnp.clip(jnp.rint(out), 0, 255).astype("uint8")
    return jnp.where(cuts.flips[:, None, None, None], out[:, :, ::-1], out)


def cut_images(pixels, cuts: Dict[str, Any], side: int, image_resize: str):
    """Cut and resize: images (B, side, side, 3) uint8 out of `pixels`, to be called in a compiled function.

    `cuts` are `Cuts` by name, and arguments of that function: if it knew that `zero` is 0, it would round otherwise.
    """
    cut = _published_cut if image_resize == "published" else _modern_cut
    return cut(pixels, Cuts(**cuts), side)


@functools.lru_cache(maxsize=2)
def cutter(image_resize: str):
    """Return `cut_images` compiled, a function of (pixels, cuts, side)."""
    import jax

    cut = functools.partial(cut_images, image_resize=image_resize)
    return jax.jit(cut, static_argnums=2)


def whole_images(sizes: np.ndarray) -> np.ndarray:
    """Return the rectangles (n, 4) that cover images of these heights and widths, (n, 2)."""
    return np.concatenate([0 * sizes, sizes], 1)


def _cuts(request, batch: _Batch) -> Cuts:
    "What is to be cut of the images of a batch"
    size, parts, flips = request.image_size, batch.parts, batch.flips
    new, corner = np.tile((size, size), (len(parts), 1)), np.zeros((len(parts), 2))
    if not request.random:
        windows = [center_crop_box(*one, size, request.image_resize) for one in batch.sizes]
        new, corner = np.array(windows).swapaxes(0, 1)
        flips = np.zeros(len(parts), bool)
    scale, zero = (parts[:, 2:] / new).astype("float32"), np.int32(0)
    where = batch.begin, batch.sizes[:, 1], parts.astype("int32")
    return Cuts(*where, scale, corner.astype("float32"), flips, zero)


def training_stream(request: TrainRequest) -> Iterator[Tuple[Any, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 on the device and labels (B,) int32 of one training step after the other."""
    source = _resident if fits_device(request.dataset) else _streamed
    fast = wants_fast_dct(request.dataset, request.image_resize)
    cut = cutter(request.image_resize)
    for batch in source(request, fast):
        yield cut(batch.pixels, _cuts(request, batch)._asdict(), request.image_size), batch.labels


def resident_cuts(request: TrainRequest) -> Tuple[Any, Iterator[Tuple[dict, np.ndarray]]]:
    """Return the pixels of a set that stays on the device; what each training step cuts out, by name; and labels."""
    fast = wants_fast_dct(request.dataset, request.image_resize)
    pixels = _on_device(request.dataset, fast).pixels
    batches = _resident(request, fast)
    return pixels, ((_cuts(request, batch)._asdict(), batch.labels) for batch in batches)


def _resident(request, fast):
    "Yield the batches of images that stay"
    kept, order = _on_device(request.dataset, fast), request.order
    for update in itertools.count(request.first_update):
        images, places = order.take(update, 0, order.local)
        sizes = kept.sizes[images]
        parts, flips, labels = request.draw(
            images, places, sizes, request.dataset.kept["turns"][images]
        )
        parts = parts if request.random else whole_images(sizes)
        yield _Batch(kept.pixels, kept.begin[images], sizes, parts, flips, labels)


def _streamed(request, fast):
    "Yield the batches of images that are decoded for each step; of an image only the rectangle is sent"
    import jax.numpy as jnp

    for pixels, begin, sizes, flips, labels in rectangle_batches(request):
        yield _Batch(jnp.asarray(pixels), begin, sizes, whole_images(sizes), flips, labels)
