"""The built-in sample set: crops of ten photographs, written as TFRecords.

The photographs ship inside the scikit-image and scikit-learn packages; each is a class. A part of each is held out:
crops for validation lie inside it, and no training crop touches it.
"""

import atexit
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np

from effnet_repro.data.cache import cache_folder
from effnet_repro.data.order import random_bits, random_uniform
from effnet_repro.data.tfrecord import make_example, write_tfrecords

LOG = logging.getLogger(__name__)


class _Photo(NamedTuple):
    name: str  # Class name
    package: str  # Installed package that ships the photograph
    path: str  # Place inside the package
    subject: Tuple[float, float, float, float]  # Where crops lie: left, top, right, bottom
    held_out: Tuple[float, float, float, float]  # Part of the image for validation only


_IMAGES = "datasets/images/"


PHOTOS = (
    _Photo("astronaut", "skimage", "data/astronaut.png", (0, 0, 1, 1), (0, 0.62, 1, 1)),
    _Photo("cat", "skimage", "data/chelsea.png", (0, 0, 0.85, 1), (0.36, 0, 0.66, 1)),
    _Photo("coffee", "skimage", "data/coffee.png", (0.1, 0, 0.85, 1), (0.36, 0, 0.61, 1)),
    _Photo("flower", "sklearn", _IMAGES + "flower.jpg", (0.2, 0.15, 0.8, 1), (0.47, 0, 0.75, 1)),
    _Photo("galaxies", "skimage", "data/hubble_deep_field.jpg", (0, 0, 1, 1), (0, 0.7, 1, 1)),
    _Photo("motorcycle", "skimage", "data/motorcycle_left.png", (0, 0, 1, 1), (0.56, 0, 0.8, 1)),
    _Photo("pagoda", "sklearn", _IMAGES + "china.jpg", (0, 0, 1, 1), (0, 0.45, 1, 0.78)),
    _Photo("retina", "skimage", "data/retina.jpg", (0, 0, 1, 1), (0, 0.6, 1, 0.85)),
    _Photo("rocket", "skimage", "data/rocket.jpg", (0, 0.1, 1, 1), (0.64, 0, 1, 1)),
    _Photo("tissue", "skimage", "data/ihc.png", (0, 0, 1, 1), (0, 0.65, 1, 1)),
)


def open_photo(photo: _Photo):
    """Return the photograph as an RGB image of Pillow. Raises `FileNotFoundError` without its package."""
    from PIL import Image

    spec = find_spec(photo.package)
    path = Path(spec.origin).parent / photo.path if spec else None
    if path is None or not path.exists():
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photo.package]
        raise FileNotFoundError(
            f"The built-in sample set needs the photograph {photo.path} of the package {package}, "
            f"which is not there. Run `pip install {package}`, or give `data_dir`."
        )
    return Image.open(path).convert("RGB")


def part_pixels(part, size) -> Tuple[int, ...]:
    """Return left, top, right and bottom in pixels of a part that is given in shares of (width, height)."""
    width, height = size
    return tuple(round(share * side) for share, side in zip(part, (width, height) * 2))


_SAMPLE_VERSION = 1  # part of the folder's name: raise it when the set changes


SAMPLE_CROPS = {"train": 120, "validation": 30}  # of each photograph


def sample_boxes(photo: _Photo, split: str, size: Tuple[int, int]):
    """Yield boxes (left, top, right, bottom), without end, on the held-out part of a photograph, or off it."""
    label = [p.name for p in PHOTOS].index(photo.name)
    left, top, right, bottom = part_pixels(photo.held_out, size)
    x0, y0, x1, y1 = part_pixels(photo.subject, size)
    if split == "validation":
        x0, y0, x1, y1 = max(x0, left), max(y0, top), min(x1, right), min(y1, bottom)
    for i in itertools.count():
        u = random_uniform(_SAMPLE_VERSION, label, len(split), i, np.arange(4))
        side, stretch = 72 * (0.45 * min(size) / 72) ** u[0], (4 / 3) ** (u[1] - 0.5)
        w, h = round(side * stretch), round(side / stretch)
        x, y = x0 + int(u[2] * (x1 - x0 - w + 1)), y0 + int(u[3] * (y1 - y0 - h + 1))
        fits = w <= x1 - x0 and h <= y1 - y0
        overlaps = x < right and x + w > left and y < bottom and y + h > top
        if fits and overlaps == (split == "validation"):
            yield x, y, x + w, y + h


def _sample_records(photo, label, split):
    "Encode the crops of one photograph, at most 128 pixels a side"
    whole, records = open_photo(photo), []
    for box in sample_boxes(photo, split, whole.size):
        crop, jpeg = whole.crop(box), io.BytesIO()
        if np.asarray(crop.convert("L"), "float32").std() < 10:
            continue  # empty sky, or the black around the retina
        crop.thumbnail((128, 128))
        crop.save(jpeg, "JPEG", quality=90)
        features = {
            "image/encoded": jpeg.getvalue(),
            "image/format": "JPEG",
            "image/class/label": label + 1,
            "image/class/text": photo.name,
            "image/filename": f"{photo.path} {box}",
            "image/height": crop.height,
            "image/width": crop.width,
        }
        records.append(make_example(features))
        if len(records) == SAMPLE_CROPS[split]:
            return records


def _write_sample_set(folder):
    for split, shards in (("train", 2), ("validation", 1)):
        records = [r for i, photo in enumerate(PHOTOS) for r in _sample_records(photo, i, split)]
        order = np.argsort(random_bits(_SAMPLE_VERSION, shards, np.arange(len(records))))
        for shard in range(shards):
            path = folder / f"{split}-{shard:05d}-of-{shards:05d}"
            write_tfrecords(path, [records[i] for i in order[shard::shards]])
    info = {
        "name": "effnet_repro sample set",
        "version": _SAMPLE_VERSION,
        "source": "crops of photographs in the scikit-image and scikit-learn packages",
        "num_classes": len(PHOTOS),
        "classes": [{"label": i, "text": photo.name} for i, photo in enumerate(PHOTOS, 1)],
        "splits": {s: {"records": n * len(PHOTOS)} for s, n in SAMPLE_CROPS.items()},
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


_FILES = ("info.json", "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")


def sample_set(
    cache_dir=None,  # Cache folder; None = EFFNET_REPRO_CACHE, or ~/.cache/effnet_repro
) -> Path:  # Folder of TFRecords, in the layout of ImageNet's
    "Return the folder of the built-in sample set, writing what of it is not there"
    cache = cache_folder(cache_dir)
    folder = cache / f"sample-v{_SAMPLE_VERSION}"
    if not _missing(folder):
        return folder
    try:
        _complete(folder)
        return folder
    except OSError as e:
        folder = _temporary()
        LOG.warning("%s cannot be written (%s): the sample set is in %s", cache, e.strerror, folder)
        _complete(folder)
        return folder


def _missing(folder):
    "Names of the files of a sample set that are not there, e.g. since somebody cleaned the cache"
    return [name for name in _FILES if not (folder / name).is_file()]


@functools.lru_cache(maxsize=None)
def _temporary():
    "A folder for this process, where the cache cannot be written"
    folder = Path(tempfile.mkdtemp(prefix="effnet_repro-sample-"))
    atexit.register(shutil.rmtree, str(folder), ignore_errors=True)
    return folder


def _complete(folder):
    "Write the files that are missing, each whole or not at all; every process would write the same"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_old(folder.parent)
    with tempfile.TemporaryDirectory(dir=str(folder.parent), prefix=".sample-") as temporary:
        _write_sample_set(Path(temporary))
        for name in _missing(folder):
            os.replace(str(Path(temporary) / name), str(folder / name))


def _remove_old(cache):
    "Remove what a process left that was killed while it wrote; an hour is long enough to be sure"
    for left in cache.glob(".sample-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(str(left), ignore_errors=True)
