"""From the bytes of a file to pixels: here a JPEG becomes an array, in `decode_image`.

`read_encoded` fetches an image of a data set and makes sure that all decoders agree about it (`picture_bytes`);
`decode_image` gives its pixels, with the fast DCT of the published runs or the accurate one. The reader of
TensorFlow decodes the same bytes with operations of its own.
"""

import contextlib
import functools
import io
import os
import re
import struct
from importlib.util import find_spec
from typing import Any, Tuple

import numpy as np

from effnet_repro.messages import say


def _jpeg_shape(data):
    "Height, width and channels in the frame header of a JPEG; (0, 0, 0) for anything else"
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 255:
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return (*struct.unpack(">HH", data[at + 5 : at + 9]), data[at + 9])
        at += 1 if kind == 255 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0, 0


def encode_bmp(pixels: np.ndarray) -> bytes:
    """Return an image (H, W, 3) uint8 as a 24-bit BMP: rows from the bottom up, blue first."""
    h, w, _ = pixels.shape
    body = np.zeros((h, -(-3 * w // 4) * 4), np.uint8)  # rows are filled up to 4 bytes
    body[:, : 3 * w] = pixels[::-1, :, ::-1].reshape(h, 3 * w)
    sizes = (54 + body.size, 0, 0, 54, 40, w, h, 1, 24, 0, body.size, 0, 0, 0, 0)
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", *sizes) + body.tobytes()


def _decode_accurate(data):
    "An image as (H, W, 3) uint8; whatever is wrong with it is one ValueError"
    try:
        from PIL import Image
    except ImportError:
        kinds = "Only gray and RGB JPEGs can be read without Pillow. Run: pip install pillow."
        raise ImportError(kinds) from None
    try:
        if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data:
            raise ValueError("a JPEG without an end")  # TensorFlow refuses it, Pillow does not
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I") and image.format == "PNG":  # 16 bits: Pillow would clip
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of type {image.mode} have no agreed white")
        return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        text = re.sub(r" <_io.BytesIO[^>]*>", "", " ".join(str(error).split()))
        raise ValueError(f"Not a picture that can be decoded ({text}).") from None


def _decode_turbo(data, fast, strict):
    "A JPEG decoded by simplejpeg, fast DCT or not; None where that cannot be done, or only with a warning"
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data or not has_fast_dct():
        return None
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, strict=strict)
    except ValueError:
        return None


def decode_image(data: bytes, fast: bool = False, turbo: bool = True) -> np.ndarray:
    """Return the pixels of an image file, (H, W, 3) uint8.

    `fast` asks for the fast DCT of a JPEG, which needs simplejpeg; where that cannot be done, it is the accurate
    one. simplejpeg decodes JPEGs where it is installed and `turbo` allows it, Pillow everything else: their pixels
    are the same. Raises `ValueError`, of one line, for a file that is damaged or no image.
    """
    pixels = _decode_turbo(data, fast, strict=True) if turbo else None
    if pixels is None:
        pixels = _decode_accurate(data)  # decides whether the file is damaged
        again = _decode_turbo(data, fast, strict=False) if turbo and fast else None
        pixels = pixels if again is None else again
    return pixels


@functools.lru_cache(maxsize=1)
def has_fast_dct() -> bool:
    """Return whether simplejpeg is installed, which has the fast DCT."""
    return find_spec("simplejpeg") is not None


def has_jpegs(dataset) -> bool:
    """Return whether there may be JPEGs in a `DataSet`: the names of class folders' files tell."""
    if dataset.format != "folder":
        return dataset.format == "tfrecord"
    files = (path for split in dataset.splits.values() for path in split.files)
    return any(path.lower().endswith((".jpg", ".jpeg")) for path in files)


def wants_fast_dct(dataset, image_resize: str) -> bool:
    """Return whether JPEGs are to be decoded as in the published runs; where they are not, say so once a data set."""
    wanted, able = image_resize == "published", dataset.decoder not in ("pillow", "nvimagecodec")
    if not wanted or (able and has_fast_dct()) or "said accurate" in dataset.kept:
        return wanted
    if has_jpegs(dataset):
        dataset.kept["said accurate"] = True
        say(
            "data: JPEGs are decoded with the accurate DCT; the published runs used the fast one, "
            "whose colors differ by 1.07 of 255 on average. The same: "
            + ("--decoder simplejpeg." if has_fast_dct() else "pip install simplejpeg.")
        )
    return wanted


def decode_for(dataset, data: bytes, image_resize: str) -> np.ndarray:
    """Return the pixels of an image file as the decoder of a `DataSet` and the way of resizing ask for them.

    What is an array of pixels already, stays so.
    """
    if isinstance(data, np.ndarray):
        return data
    return decode_image(data, image_resize == "published", dataset.decoder != "pillow")


def picture_bytes(
    data: bytes,  # A picture file: JPEG, PNG or whatever Pillow reads
) -> Tuple[bytes, Tuple[int, int]]:  # A gray or RGB JPEG or a BMP; height and width
    """Make sure that all decoders agree on `data`

    A gray or RGB JPEG passes untouched; anything else becomes a BMP, which has one meaning only. Raises
    `ValueError` for a file that cannot be decoded.
    """
    height, width, channels = _jpeg_shape(data)
    if height and width and channels in (1, 3):
        return data, (height, width)
    pixels = decode_image(data, turbo=False)
    return encode_bmp(pixels), pixels.shape[:2]


def _read(path, at, length):
    "Bytes of a file, with the fewest calls: this is done for every image"
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if at:
            os.lseek(file, at, os.SEEK_SET)
        return os.read(file, length)
    finally:
        os.close(file)


def read_encoded(dataset, split: str, i: int, raw: bool = False) -> Tuple[Any, Tuple[int, int]]:
    """Return image `i` of a split of a `DataSet` as JPEG or BMP, and its height and width in pixels.

    With `raw`, an image of a set of raw pixels is an array (H, W, 3) uint8 instead.
    Raises `ValueError` with the place of an image that is cut off or cannot be decoded; only headers of JPEGs are
    looked at.
    """
    places = dataset.splits[split]
    path, at = places.files[places.file[i]], int(places.offset[i])
    data = _read(path, at, int(places.length[i]))
    with located(dataset, split, i):
        if len(data) < places.length[i]:
            raise ValueError(f"Truncated file: {len(data)} of {places.length[i]} bytes are there.")
        if dataset.format == "raw":
            height, width = map(int, places.stored[i])
            pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            return (pixels if raw else encode_bmp(pixels)), (height, width)
        if dataset.format == "cifar":
            planes = np.frombuffer(data, np.uint8).reshape(3, 32, 32)
            return encode_bmp(planes.transpose(1, 2, 0)), (32, 32)
        return picture_bytes(data)


@contextlib.contextmanager
def located(dataset, split: str, i: int):
    """Let a `ValueError` about an image say where the image is, and the way out."""
    try:
        yield
    except ValueError as error:
        places = dataset.splits[split]
        where = f"byte {places.offset[i]} of {places.files[places.file[i]]}"
        raise ValueError(
            f"{error} It is picture {i} of the {split} split, at {where}. Replace it, or leave "
            f"damaged pictures out with on_corrupt='skip'."
        ) from None
