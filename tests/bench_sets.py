"""Data sets for the benchmarks: a few images repeated until there are enough, in files that share their bytes."""

import os
import shutil
from pathlib import Path

import numpy as np

PARTS = 16  # Files of a split, at most


def _linked(first, names):
    "Give a file more names"
    for name in names:
        os.link(first, first.with_name(name))


def repeat_records(source, target, train, validation):
    "Write the TFRecords of `source` again and again into `target`, until the splits have so many"
    from effnet_repro.data import scan_tfrecord

    target.mkdir(parents=True)
    for split, records in (("train", train), ("validation", validation)):
        files = sorted(Path(source).glob(f"{split}-*"))
        once = sum(len(scan_tfrecord(f)) for f in files)
        times = -(-records // once)
        parts = min(PARTS, times)
        names = [f"{split}-{part:05d}-of-{parts:05d}" for part in range(parts)]
        with (target / names[0]).open("wb") as out:
            for _ in range(-(-times // parts)):
                out.writelines(f.read_bytes() for f in files)
        _linked(target / names[0], names[1:])
    shutil.copy(Path(source) / "info.json", target / "info.json")


def repeat_raw(source, target, train, validation):
    "The same for a packed set of raw pixels of one part"
    target.mkdir(parents=True)
    for split, records in (("train", train), ("validation", validation)):
        end = f"-{split}-00000-of-00001.npy"
        pixels, index = (np.load(Path(source) / (kind + end)) for kind in ("pixels", "index"))
        assert (index["boxes"] == 0).all(), "boxes have rows of their own"
        times, begin = -(-records // len(index) // PARTS), int(index["offset"][0])
        many = np.tile(index, times)
        many["offset"] += np.repeat(np.arange(times) * len(pixels), len(index))
        for kind, array in (("pixels", np.tile(pixels, times)), ("index", many)):
            names = [f"{kind}-{split}-{part:05d}-of-{PARTS:05d}.npy" for part in range(PARTS)]
            np.save(target / names[0], array)
            _linked(target / names[0], names[1:])
        assert begin == int(many["offset"][0])
    shutil.copy(Path(source) / "info.json", target / "info.json")


def image_folder(source, target, images):
    "Unpack the training images of a data set into a folder a class, repeated until there are so many"
    from effnet_repro.data import open_data
    from effnet_repro.data.decode import read_encoded

    data = open_data(source, verbose=False)
    times = -(-images // data.train_count)
    for number in range(data.train_count):
        folder = Path(target) / f"{data.splits['train'].label[number]:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"{number}-0.jpg"
        first.write_bytes(read_encoded(data, "train", number)[0])
        _linked(first, [f"{number}-{i}.jpg" for i in range(1, times)])
