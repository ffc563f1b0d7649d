"""Images as cameras and programs write them: orientation, transparency, 16 bits, sizes; alike in every reader."""

import io
import struct
import zlib

import numpy as np
import pytest
from images import encode, folders, record, smooth_image, write
from PIL import Image
from test_gpu_reader import maker

from effnet_repro import data as d
from effnet_repro.data import decode, gpu_reader, packed
from effnet_repro.data.files import SquaresJob, timm_square
from effnet_repro.data.request import TrainRequest, ValidationRequest, batch_order
from effnet_repro.outside import MOST_IMAGE_BYTES, MOST_PIXELS

ORIENTATIONS = range(1, 9)
PILLOWS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation: Image.Transpose


def exif(orientation):
    found = Image.Exif()
    found[0x112] = orientation
    return found


def stored(orientation, kind="JPEG", seed=0, mode="RGB"):
    return encode(smooth_image(24, 40, seed), kind, mode, exif=exif(orientation))


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_is_turned_as_pillow_turns_it(orientation):
    pixels = smooth_image(24, 40)
    image = Image.fromarray(pixels)
    turn = PILLOWS.get(orientation)
    wanted = np.asarray(image if turn is None else image.transpose(turn))
    np.testing.assert_array_equal(decode.turned(pixels, orientation), wanted)
    boxes = np.array([[0.25, 0.1, 0.75, 0.4], [0, 0, 1, 0.5]])
    for box, there in zip(boxes, decode.turned_boxes(boxes, orientation)):
        painted = np.zeros((24, 40, 3), np.uint8)
        painted[
            tuple(slice(round(a * n), round(b * n)) for a, b, n in zip(box, box[2:], (24, 40)))
        ] = 1
        whole = decode.turned(painted, orientation)
        h, w, _ = whole.shape
        top, left, bottom, right = (round(v * n) for v, n in zip(there, (h, w, h, w)))
        assert whole[top:bottom, left:right].all() and whole.sum() == 3 * (bottom - top) * (
            right - left
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_every_kind_of_file_is_turned_or_left(kind, orientation):
    lossless = dict(lossless=True) if kind == "WEBP" else {}
    data = encode(smooth_image(24, 40), kind, exif=exif(orientation), **lossless)
    plain = decode.decode_image(encode(smooth_image(24, 40), kind, **lossless))
    np.testing.assert_array_equal(decode.decode_image(data), plain)
    upright = decode.decode_image(data, upright=True)
    np.testing.assert_array_equal(upright, decode.turned(plain, orientation))
    assert d.image_bytes(data, upright=True)[1] == upright.shape[:2]


@pytest.mark.parametrize(
    "tail",
    [b"", b"\xff" * 20, b"\x12\x01\x03\0\xff\xff\xff\xff", b"\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0"],
)
@pytest.mark.parametrize("order", [b"II*\0", b"MM\0*", b"XX*\0"])
def test_damaged_exif_data_do_not_damage_an_image(order, tail):
    block = b"Exif\0\0" + order + struct.pack("<I", 8) + tail
    plain = encode(smooth_image(8, 9))
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert decode.image_facts(data) == (8, 9, 3, 1)
    np.testing.assert_array_equal(
        decode.decode_image(data, upright=True), decode.decode_image(plain)
    )


@pytest.fixture(scope="module")
def turned_set(tmp_path_factory):
    "Sixteen images in all orientations, some with boxes, of three formats"
    records = []
    for i in range(16):
        kind = "PNG" if i == 5 else "JPEG"
        box = {
            f"image/object/bbox/{s}": v
            for s, v in zip(("ymin", "xmin", "ymax", "xmax"), ([0.1], [0.2], [0.5], [0.9]))
        }
        records.append(
            record(
                stored(1 + i % 8, kind, i, "L" if i == 9 else "RGB"),
                1 + i % 2,
                **(box if i % 3 else {}),
            )
        )
    folder = tmp_path_factory.mktemp("turned")
    write(folder, "train", records)
    return d.open_data(write(folder, "validation", records), verbose=False)


def batches(data, reader, how):
    order = batch_order(data, 8, 3, (0, 1))
    if reader == "nvimagecodec":
        stream = gpu_reader.training_stream(TrainRequest(data, order, 16, how), maker())
    else:
        stream = d.training_batches(data, 16, 8, seed=3, image_resize=how, reader=reader)
    return [np.asarray(images) for _, (images, _) in zip(range(2), stream)]


@pytest.mark.parametrize("reader", ["tensorflow", "jax", "nvimagecodec"])
def test_readers_agree_on_turned_images(turned_set, reader):
    wanted = batches(turned_set, "numpy", "modern")
    for ours, theirs in zip(wanted, batches(turned_set, reader, "modern")):
        assert np.abs(ours.astype(int) - theirs).mean() < 0.1  # TensorFlow decodes only a crop
    n = turned_set.validation_count
    validated = d.load_arrays(turned_set, "validation", 16, "modern")[0]
    if reader == "nvimagecodec":
        request = ValidationRequest(turned_set, 16, n, image_resize="modern")
        ((images, *_),) = gpu_reader.validation_stream(request, maker())
    elif reader == "tensorflow":
        ((images, *_),) = d.validation_batches(turned_set, 16, n, image_resize="modern")
    else:
        return
    assert np.abs(np.asarray(images).astype(int) - validated).max() <= 1


@pytest.mark.parametrize("how", ["modern", "published"])
def test_modern_images_are_upright_and_published_ones_as_stored(turned_set, tmp_path, how):
    found = d.load_arrays(turned_set, "validation", 16, how)[0]
    plain = {}
    for i, orientation in enumerate(ORIENTATIONS):
        pixels = decode.decode_image(
            stored(orientation, "PNG" if i == 5 else "JPEG", i), how == "published"
        )
        plain[f"val/a/{i}.png"] = encode(
            decode.turned(pixels, orientation) if how == "modern" else pixels, "PNG"
        )
    wanted = d.open_data(folders(tmp_path, plain), verbose=False)
    np.testing.assert_array_equal(d.load_arrays(wanted, "validation", 16, how)[0], found[:8])
    files = [stored(o, "PNG" if i == 5 else "JPEG", i) for i, o in enumerate(ORIENTATIONS)]
    squares, problems = SquaresJob(16, how)(files)  # what a prediction sees
    assert not any(problems)
    np.testing.assert_array_equal(squares, found[:8])


@pytest.mark.parametrize("form, close", [("jpeg", 12), ("raw", 12)])
def test_packed_images_stay_upright(turned_set, tmp_path, form, close):
    packed.pack(turned_set, tmp_path, packed.Packing(form, 32), 1, say=lambda text: None)
    there = d.open_data(tmp_path, verbose=False)
    before, after = (
        d.load_arrays(x, "validation", 16, "modern")[0].astype(int) for x in (turned_set, there)
    )
    assert np.abs(before - after).mean() < close
    for ours, theirs in zip(
        batches(turned_set, "numpy", "modern"), batches(there, "numpy", "modern")
    ):
        assert np.abs(ours.astype(int) - theirs).mean() < close  # crops lie on the same part


# ---------------------------------------------------------------- transparency, 16 bits


def with_alpha(colors, alpha=None):
    alpha = np.zeros((8, 8), np.uint8) if alpha is None else alpha
    alpha[2:6, 2:6] = 255
    return np.dstack([np.full((8, 8, 3), colors, np.uint8), alpha])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("colors, behind", [(0, 255), (255, 0), (128, 255)])
def test_what_only_alpha_shows_is_seen(kind, colors, behind):
    how = dict(lossless=True, exact=True) if kind == "WEBP" else {}
    found = decode.decode_image(encode(with_alpha(colors), kind, "RGBA", **how))
    assert (found[3, 3] == colors).all() and (found[0, 0] == behind).all()


def test_other_ways_to_be_transparent():
    shape = Image.fromarray(with_alpha(0))
    two = shape.convert("LA")
    palette = Image.fromarray(np.eye(8, dtype=np.uint8))
    palette.putpalette([9, 9, 9, 0, 0, 0])
    for image, how in ((two, {}), (palette.convert("P"), dict(transparency=0))):
        file = io.BytesIO()
        image.save(file, "PNG", **how)
        pixels = decode.decode_image(file.getvalue())
        assert pixels.max() == 255 and pixels.min() < 10
    half = decode.over_background(with_alpha(0, np.full((8, 8), 51, np.uint8)))
    assert (half[0, 0] == 204).all()
    opaque = np.dstack([smooth_image(8, 8), np.full((8, 8), 255, np.uint8)])
    np.testing.assert_array_equal(decode.over_background(opaque), smooth_image(8, 8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_the_upper_eight_in_every_format(kind):
    gray = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(gray).save(file, kind)
    np.testing.assert_array_equal(decode.decode_image(file.getvalue())[..., 1], gray >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_color(order):
    tifffile = pytest.importorskip("tifffile")
    pixels = (np.arange(8 * 8 * 3).reshape(8, 8, 3) * 300).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", byteorder=order)
    np.testing.assert_array_equal(decode.decode_image(file.getvalue()), pixels >> 8)


# ---------------------------------------------------------------- chunks, sizes, kinds


def chunk(kind, body, damaged=False):
    crc = zlib.crc32(kind + body) ^ damaged
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tIME", b"pHYs"])
def test_chunks_that_are_no_pixels_do_not_damage_a_png(kind, damaged):
    plain = encode(smooth_image(8, 8), "PNG")
    bodies = [b"k\0\0" + zlib.compress(bytes(3 * 10**6)), b"\0" * 7, b"k" * 2000, b""]
    for body in bodies[not damaged :]:
        data = plain[:33] + chunk(kind, body, damaged) + plain[33:]
        np.testing.assert_array_equal(decode.decode_image(data, upright=True), smooth_image(8, 8))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_an_image_with_a_damaged_header_is_called_one(kind):
    data = encode(smooth_image(8, 8), kind)[:10] + bytes(99)
    with pytest.raises(ValueError, match=f"it begins as a {kind}"):
        decode.decode_image(data)


def test_pillow_is_not_asked_to_start_other_programs():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(ValueError, match="it is a PostScript file"):
        decode.decode_image(script)


@pytest.mark.parametrize("shape", [(1, 501), (500, 1), (3, 606)])
def test_squares_of_very_long_images_are_those_of_the_whole(shape, monkeypatch):
    pixels = smooth_image(*shape)
    middle = timm_square(pixels, 64, 0.875)
    monkeypatch.setattr("effnet_repro.data.files._LONGEST", 10**9)
    np.testing.assert_allclose(middle, timm_square(pixels, 64, 0.875), atol=1)


def test_a_square_takes_no_memory_for_what_is_not_seen():
    assert timm_square(np.zeros((1, 10**7, 3), np.uint8), 64, 0.875).shape == (64, 64, 3)


def jpeg_of(height, width):
    data = bytearray(encode(smooth_image(8, 8)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(height, width):
    data = encode(smooth_image(8, 8), "PNG")
    return data[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "data", [jpeg_of(10_000, 9_000), png_of(10_000, 9_000), png_of(2**20, 2**20)]
)
def test_one_limit_on_the_size_of_an_image_for_all_readers(tmp_path, data):
    write(tmp_path, "train", [record(data)])
    found = d.open_data(write(tmp_path, "validation", [record(data)]), verbose=False)
    for reader in ("numpy", "tensorflow", "jax"):
        with pytest.raises(Exception, match=f"at most {MOST_PIXELS:,} are read"):
            next(iter(d.training_batches(found, 16, 1, reader=reader)))
    with pytest.raises(ValueError, match="at most .* are read"):
        next(gpu_reader.validation_stream(ValidationRequest(found, 16, 1), maker()))
    _, (problem,) = SquaresJob(16, "modern")([data])
    assert f"at most {MOST_PIXELS:,} are read" in problem


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    root = folders(tmp_path, {"train/a/x.jpg": b"x", "train/a/y.jpg": encode(smooth_image())})
    with open(root / "train/a/x.jpg", "r+b") as file:
        file.truncate(MOST_IMAGE_BYTES + 1)  # of holes
    with pytest.raises(ValueError, match="at most .* are read.*x.jpg"):
        d.load_arrays(d.open_data(root, verbose=False), "train", 8)
    _, (problem,) = SquaresJob(8, "modern")([root / "train/a/x.jpg"])
    assert "at most" in problem


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><p>not found", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC image"),
        (b"not found\n", "a text"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (bytes(999), "a file of zeros"),
        (b"8BPS\0\1" + bytes(99), "a Photoshop file"),
        (b"\xff\x0a" + bytes(99), "a JPEG XL image"),
    ],
)
def test_a_file_that_is_no_image_is_called_what_it_is(tmp_path, data, kind):
    found = d.open_data(folders(tmp_path, {"train/a/x.jpg": data}), verbose=False)
    with pytest.raises(ValueError, match=f"Not an image.*it is {kind}.*x.jpg"):
        d.load_arrays(found, "train", 8)
