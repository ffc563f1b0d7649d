"""Images, records and folders for the tests of readers, and how long hypothesis may look."""

import io
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from PIL import Image

from effnet_repro import data as d
from effnet_repro.data import decode

ROOT = Path(__file__).resolve().parents[1]
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def smooth_image(height=30, width=40, seed=0):
    "A smooth color image with some noise"
    y, x = np.mgrid[:height, :width]
    base = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1)
    noise = d.random_uniform(seed, np.arange(base.size)).reshape(base.shape)
    return (0.8 * base + 50 * noise).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def record(encoded=None, label=1, **more):
    encoded = encode(smooth_image()) if encoded is None else encoded
    return d.make_example({"image/encoded": encoded, "image/class/label": label, **more})


def write(folder, split, records, name="{}-00000-of-00001"):
    folder.mkdir(parents=True, exist_ok=True)
    d.write_tfrecords(folder / name.format(split), records)
    return folder


def folders(root, contents):
    "Class folders: split/class/name -> bytes"
    for place, data in contents.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(data)
    return root


def noise_folders(root, names="ab"):
    "Class folders of noise: 6 training images and 3 to validate on in each of two classes"
    chance = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        places = [f"{split}/{name}/{i}.png" for name in names for i in range(count)]
        noise = (chance.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in places)
        folders(root, {place: encode(pixels, "PNG") for place, pixels in zip(places, noise)})
    return root


def bmp(seed):
    return decode.encode_bmp(smooth_image(8, 8, seed))  # all of one length


FOLDERS = {
    f"{s}/{c}/{i}.bmp": bmp(len(s) + ord(c) * 2 + int(i))
    for s in ("train", "val")
    for c in "ab"
    for i in "01"
}
