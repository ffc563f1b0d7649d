"""From the bytes of a file to pixels: here a JPEG becomes an array, in `decode_image`.

`read_encoded` fetches an image of a data set and makes sure that all decoders agree about it (`image_bytes`);
`decode_image` gives its pixels, with the fast DCT of the published runs or the accurate one. The reader of
TensorFlow decodes the same bytes with operations of its own.
"""

import contextlib
import errno
import functools
import io
import os
import re
import struct
import warnings
import zlib
from importlib.util import find_spec
from typing import Any, NamedTuple, Tuple

import numpy as np

from effnet_repro.messages import say
from effnet_repro.outside import MOST_IMAGE_BYTES, MOST_PIXELS, check_pixels, kind_of


class ImageFacts(NamedTuple):
    "What the headers of a JPEG say, looked at without a library; all 0, and 1, for anything else"

    height: int = 0  # As it is stored, pixels
    width: int = 0
    channels: int = 0
    orientation: int = 1  # EXIF's: 1 = upright, ..., 8; see `turned`


def image_facts(data: bytes) -> ImageFacts:
    """Return size, channels and orientation of a JPEG. Headers that are damaged give what was found before."""
    at, orientation = 2, 1
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 255:
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return ImageFacts(height, width, data[at + 9], orientation)
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0" and orientation == 1:
            orientation = _orientation(data[at + 10 : at + 2 + length])
        at += 1 if kind == 255 else 2 + length
    return ImageFacts(orientation=orientation)


def is_whole_jpeg(data: bytes) -> bool:
    """Return whether bytes begin as a JPEG and hold the mark of its end, looked for from the end: for speed."""
    return data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") >= 0


def _orientation(tiff):
    "The orientation, 1 to 8, that EXIF data name; 1 where they name none"
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None or len(tiff) < 8:
        return 1
    at = struct.unpack(order + "I", tiff[4:8])[0]
    if at + 2 > len(tiff):
        return 1
    count = struct.unpack(order + "H", tiff[at : at + 2])[0]
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number, value = struct.unpack(order + "HHIH", tiff[entry : entry + 10])
        if tag == 0x112:
            return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    return 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image (H, W, 3) upright that is stored in one of EXIF's eight orientations."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down, right = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
        orientation, (1, 1)
    )
    return np.ascontiguousarray(pixels[::down, ::right])


_BACK = {6: 8, 8: 6}  # The orientation that undoes another, where it is not the same


def turned_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Return boxes (m, 4) of an image, in shares of its sides, on the upright image."""
    top, left, bottom, right = boxes.T
    if orientation >= 5:
        top, left, bottom, right = left, top, right, bottom
    if orientation in (3, 4, 7, 8):
        top, bottom = 1 - bottom, 1 - top
    if orientation in (2, 3, 6, 7):
        left, right = 1 - right, 1 - left
    return np.stack([top, left, bottom, right], 1)


def encode_bmp(pixels: np.ndarray) -> bytes:
    """Return an image (H, W, 3) uint8 as a 24-bit BMP: rows from the bottom up, blue first."""
    h, w, _ = pixels.shape
    body = np.zeros((h, -(-3 * w // 4) * 4), np.uint8)  # rows are filled up to 4 bytes
    body[:, : 3 * w] = pixels[::-1, :, ::-1].reshape(h, 3 * w)
    sizes = (54 + body.size, 0, 0, 54, 40, w, h, 1, 24, 0, body.size, 0, 0, 0, 0)
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", *sizes) + body.tobytes()


def _plain_png(data):
    "A PNG without texts, color profile and the like, which may be damaged or larger than Pillow takes"
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    at, kept = 8, [data[:8]]
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        exif = kind == b"eXIf" and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(
            data[end - 4 : end], "big"
        )
        if not kind[:1].islower() or kind == b"tRNS" or exif:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def over_background(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 4) uint8 with an alpha channel as RGB: over white, or over black where it is all white."""
    colors, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(colors)
    seen = colors[alpha[..., 0] > 0]
    behind = 0 if len(seen) and seen.min() >= 250 else 255
    return ((colors * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)


def rgb_of(image) -> np.ndarray:
    """Return an image of Pillow's as (H, W, 3) uint8; of 16 bits the upper eight.

    Raises `ValueError` for pixels that are floats or 32 bits: nothing says what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        gray = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)  # Pillow would clip
        return np.repeat(gray[..., None], 3, 2)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of type {image.mode} have no agreed white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return over_background(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _exif_orientation(image):
    try:
        found = image.getexif().get(0x112, 1)
        return found if found in range(1, 9) else 1
    except (
        Exception
    ):  # damaged EXIF data, of which Pillow raises many kinds, do not damage the image
        return 1


_OF_IMAGES = {
    f"a {name}" for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WebP image", "JPEG 2000 image")
}
_OF_IMAGES.add("an AVIF image")
#: What Pillow may take a file for. It knows more, such as PostScript, for which it would start another program.
_FORMATS = set("JPEG MPO PNG BMP DIB GIF WEBP TIFF PPM JPEG2000 TGA PCX AVIF".split())


@functools.lru_cache(maxsize=1)
def _formats():
    "Those of `_FORMATS` that this Pillow knows"
    from PIL import Image

    Image.init()
    return sorted(_FORMATS & set(Image.OPEN))


def _decode_accurate(data):
    "An image as it is stored, (H, W, 3) uint8, and its orientation; whatever is wrong with it is one ValueError"
    try:
        from PIL import Image
    except ImportError:
        kinds = "Only gray and RGB JPEGs can be read without Pillow. Run: pip install pillow."
        raise ImportError(kinds) from None
    # What is wrong with a file is an error or nothing: Pillow's warnings tell it in Python's words.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        if data[:2] == b"\xff\xd8" and not is_whole_jpeg(data):
            raise ValueError("a JPEG without an end")  # TensorFlow refuses it, Pillow does not
        image = Image.open(io.BytesIO(_plain_png(data)), formats=_formats())
        check_pixels(*image.size[::-1])
        jpeg, orientation = data[:2] == b"\xff\xd8", _exif_orientation(image)
        orientation = image_facts(data).orientation if jpeg else orientation
        pixels = rgb_of(image)
        if image.format == "TIFF":  # which Pillow has turned
            pixels = turned(pixels, _BACK.get(orientation, orientation))
        return pixels, orientation
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        text = re.sub(r" <_io.BytesIO[^>]*>", "", " ".join(str(error).split()))[:300]
        if isinstance(error, Image.DecompressionBombError):
            text = f"too many pixels: at most {MOST_PIXELS:,} are read"
        if type(error).__name__ == "UnidentifiedImageError":
            kind = kind_of(data[:64])
            text = f"it begins as {kind}" if kind in _OF_IMAGES else f"it is {kind}"
        raise ValueError(f"Not an image that can be decoded ({text}).") from None


def _decode_turbo(data, fast, strict):
    "A JPEG decoded by simplejpeg, fast DCT or not; None where that cannot be done, or only with a warning"
    if not is_whole_jpeg(data) or not has_fast_dct():
        return None
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, strict=strict)
    except ValueError:
        return None


def decode_image(
    data: bytes, fast: bool = False, turbo: bool = True, upright: bool = False
) -> np.ndarray:
    """Return the pixels of an image file, (H, W, 3) uint8.

    `fast` asks for the fast DCT of a JPEG, which needs simplejpeg; where that cannot be done, it is the accurate
    one. simplejpeg decodes JPEGs where it is installed and `turbo` allows it, Pillow everything else: their pixels
    are the same. `upright` turns the image as its EXIF data ask. Raises `ValueError`, of one line, for a file that
    is damaged or no image.
    """
    facts = image_facts(data)
    if facts.height:
        check_pixels(facts.height, facts.width)
    turbo = turbo and facts.channels in (1, 3)  # of CMYK the two make other colors
    pixels, orientation = _decode_turbo(data, fast, strict=True) if turbo else None, 1
    if pixels is None:
        pixels, orientation = _decode_accurate(data)  # decides whether the file is damaged
        again = _decode_turbo(data, fast, strict=False) if turbo and fast else None
        pixels = pixels if again is None else again
    orientation = max(orientation, facts.orientation)
    return turned(pixels, orientation) if upright else pixels


@functools.lru_cache(maxsize=1)
def has_fast_dct() -> bool:
    """Return whether simplejpeg is installed, which has the fast DCT."""
    return find_spec("simplejpeg") is not None


_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", "")


def has_jpegs(dataset) -> bool:
    """Return whether there may be JPEGs in a `DataSet`: the names of class folders' files tell."""
    if dataset.format != "folder":
        return dataset.format == "tfrecord"
    files = (path for split in dataset.splits.values() for path in split.files)
    return any(os.path.splitext(path)[1].lower() in _JPEG_SUFFIXES for path in files)


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
    fast = image_resize == "published" and dataset.decoder != "nvimagecodec"
    return decode_image(data, fast, dataset.decoder != "pillow")


def image_bytes(
    data: bytes,  # An image file: JPEG, PNG or whatever Pillow reads
    upright: bool = False,  # Turn it as its EXIF data ask
) -> Tuple[bytes, Tuple[int, int]]:  # A gray or RGB JPEG or a BMP; height and width
    """Make sure that all decoders agree on `data`

    A gray or RGB JPEG passes untouched unless it must be turned; anything else becomes a BMP, which has one meaning
    only. Raises `ValueError` for a file that cannot be decoded.
    """
    pixels, size, _ = _agreed(data, upright)
    return (pixels if isinstance(pixels, bytes) else encode_bmp(pixels)), size


def _agreed(data, upright):
    "A JPEG on which all decoders agree, or pixels; height and width; the orientation of the file"
    height, width, channels, orientation = image_facts(data)
    if height and width and channels in (1, 3):
        if orientation == 1 or not upright:
            check_pixels(height, width)
            if not is_whole_jpeg(data):  # some decoders make an end up, others refuse
                raise ValueError("Not an image that can be decoded (a JPEG without an end).")
            return data, (height, width), orientation
        pixels = decode_image(data)
    else:
        pixels, orientation = _decode_accurate(data)
    pixels = turned(pixels, orientation) if upright else pixels
    return pixels, pixels.shape[:2], orientation


def _read(path, at, length):
    "Bytes of a file, with the fewest calls: this is done for every image"
    how = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a FIFO is empty
    file = os.open(path, how)
    try:
        if at:
            os.lseek(file, at, os.SEEK_SET)
        return os.read(file, length)
    finally:
        os.close(file)


class ReadImage(NamedTuple):
    "An image of a data set as it is read"

    data: Any  # JPEG or BMP; an array (H, W, 3) uint8 where `raw` asks for it and it is no JPEG
    size: Tuple[int, int]  # Height and width, pixels
    orientation: int  # EXIF's; with `upright` the image is turned already


def read_image(dataset, split: str, i: int, raw: bool = False, upright: bool = False) -> ReadImage:
    """Return image `i` of a split of a `DataSet` as JPEG or BMP, or with `raw` as JPEG or pixels.

    `upright` turns it as its EXIF data ask: the way of resizing called "modern" does, the published one does not.
    Raises `ValueError` with the place of an image that is cut off or cannot be decoded; only headers of JPEGs are
    looked at.
    """
    places = dataset.splits[split]
    path, at, length = places.files[places.file[i]], int(places.offset[i]), int(places.length[i])
    with located(dataset, split, i):
        if length > MOST_IMAGE_BYTES:
            raise ValueError(
                f"An image of {length:,} bytes: at most {MOST_IMAGE_BYTES:,} are read."
            )
        data = _read(path, at, length)
        if len(data) < length:
            raise ValueError(f"Truncated file: {len(data)} of {length} bytes are there.")
        if dataset.format == "raw":
            height, width = map(int, places.stored[i])
            pixels, orientation = np.frombuffer(data, np.uint8).reshape(height, width, 3), 1
        elif dataset.format == "cifar":
            planes = np.frombuffer(data, np.uint8).reshape(3, 32, 32)
            pixels, orientation = planes.transpose(1, 2, 0), 1
        else:
            pixels, size, orientation = _agreed(data, upright)
            if isinstance(pixels, bytes):
                return ReadImage(pixels, size, orientation)
    return ReadImage(pixels if raw else encode_bmp(pixels), pixels.shape[:2], orientation)


def read_encoded(
    dataset, split: str, i: int, raw: bool = False, upright: bool = False
) -> Tuple[Any, Tuple[int, int]]:
    """Return `data` and `size` of `read_image`."""
    return read_image(dataset, split, i, raw, upright)[:2]


def place_of(dataset, split: str, i: int) -> str:
    """Return where an image lies, for a message: the byte at which it begins, and the file."""
    places = dataset.splits[split]
    return f"byte {places.offset[i]} of {places.files[places.file[i]]}"


#: The end of a message about a damaged image, where it is not left out.
HINT = "Replace it, or leave damaged images out with on_corrupt='skip'."


class UnreadableImage(OSError):
    """A disk does not give an image, or its file is gone."""


@contextlib.contextmanager
def located(dataset, split: str, i: int):
    """Let a `ValueError` about an image say where the image is, and the hint; an OSError is an `UnreadableImage`."""
    try:
        yield
    except ValueError as error:
        where = place_of(dataset, split, i)
        raise ValueError(
            f"{error} It is image {i} of the {split} split, at {where}. {HINT}"
        ) from None
    except OSError as error:  # of a disk, or a file that is gone
        file = place_of(dataset, split, i)
        text = f"Cannot read image {i} of the {split} split, at {file}: {error.strerror or error}."
        raise UnreadableImage(error.errno or errno.EIO, f"{text} {HINT}") from None
