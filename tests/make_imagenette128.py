"""Make imagenette128 from fast.ai's imagenette2: 10 classes of ImageNet, 7,500 and 2,500 images of 128 x 128 pixels.

The rule is that of the set that the results call imagenette128; the bytes are not, because that one was made from
another copy of the images. So this one is called imagenette128-fastai, and its info.json holds fingerprints of its own.
Download `imagenette2.tgz` yourself (see github.com/fastai/imagenette for the address and the terms), then

    python tests/make_imagenette128.py imagenette2.tgz imagenette128-fastai

takes the archive, or the folder that it unpacks to. The rule:

1. Of each class 750 images of `train` and 250 of `val`, drawn by a hash of a seed (11 and 12) and the file's name.
2. Each to RGB, squashed to 224 x 224 and written as a JPEG of quality 75, as the other copy was.
3. Each to 128 x 128, bicubic, and written as a JPEG of quality 74, 4:2:0.
4. In an order drawn in the same way (21 and 22), dealt to 8 and 3 TFRecord files.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effnet_repro.data import make_example, open_data, random_bits, write_tfrecords  # noqa: E402

NAME = "imagenette128-fastai"
CLASSES = [  # synset, words, label in ImageNet from 1
    ("n01440764", "tench", 1),
    ("n02102040", "English springer", 218),
    ("n02979186", "cassette player", 483),
    ("n03000684", "chain saw", 492),
    ("n03028079", "church", 498),
    ("n03394916", "French horn", 567),
    ("n03417042", "garbage truck", 570),
    ("n03425413", "gas pump", 572),
    ("n03445777", "golf ball", 575),
    ("n03888257", "parachute", 702),
]
LABELS = {synset: label for label, (synset, _, _) in enumerate(CLASSES, 1)}
SPLITS = {  # folder, seeds of the choice and of the order, files
    "train": ("train", 11, 21, 8),
    "validation": ("val", 12, 22, 3),
}
OFFICIAL = {"train": 9469, "validation": 3925}


def found_images(names):
    "Split -> names of its images (paths in the archive); what is not `split/synset/x.JPEG` is left out"
    found = {split: [] for split in SPLITS}
    folders = {folder: split for split, (folder, *_) in SPLITS.items()}
    for name in names:
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or parts[-2] not in LABELS or parts[-3] not in folders:
            continue
        if parts[-1].startswith(".") or not parts[-1].lower().endswith((".jpeg", ".jpg")):
            continue
        found[folders[parts[-3]]].append(name)
    return found


def order_of(names, seed):
    "Names in an order that depends on the seed and on each name only"
    keys = [zlib.crc32(PurePosixPath(name).name.encode()) for name in names]
    bits = random_bits(seed, np.array(keys, np.uint64))
    return [name for _, name in sorted(zip(bits.tolist(), names))]


def choose(names, count, seed):
    "`count` names of each class"
    chosen = []
    for synset in LABELS:
        of_class = [name for name in names if PurePosixPath(name).parts[-2] == synset]
        if len(of_class) < count:
            raise SystemExit(f"{len(of_class)} images of {synset}, and {count} are wanted.")
        chosen += order_of(of_class, seed)[:count]
    return chosen


class Source:
    "The archive, or the folder"

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise SystemExit(f"{path} does not exist.")

    def names(self):
        if self.path.is_dir():
            return [p.relative_to(self.path.parent).as_posix() for p in self.path.rglob("*")]
        with tarfile.open(self.path) as archive:
            return [member.name for member in archive if member.isfile()]

    def read(self, wanted):
        "Yield (name, bytes) of the files wanted, in whatever order they come"
        wanted = set(wanted)
        if self.path.is_dir():
            for name in sorted(wanted):
                yield name, (self.path.parent / name).read_bytes()
            return
        with tarfile.open(self.path) as archive:
            for member in archive:
                if member.isfile() and member.name in wanted:
                    yield member.name, archive.extractfile(member).read()


def shrink(data):
    "An image of any size as a JPEG of 128 x 128 pixels"
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for side, quality in ((224, 75), (128, 74)):
        file = io.BytesIO()
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=side == 128)
        image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    return file.getvalue()


def example(name, jpeg):
    synset = PurePosixPath(name).parts[-2]
    return make_example(
        {
            "image/encoded": jpeg,
            "image/format": "JPEG",
            "image/class/label": LABELS[synset],
            "image/class/synset": synset,
            "image/class/text": CLASSES[LABELS[synset] - 1][1],
            "image/filename": PurePosixPath(name).name,
            "image/height": 128,
            "image/width": 128,
            "image/colorspace": "RGB",
            "image/channels": 3,
        }
    )


def write_split(folder, split, jpegs):
    "Write the records, in order, dealt to files in turn"
    _, _, seed, shards = SPLITS[split]
    records = [example(name, jpegs[name]) for name in order_of(sorted(jpegs), seed)]
    for shard in range(shards):
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}"
        write_tfrecords(path, records[shard::shards])


def describe(folder, source, facts, found):
    "The info.json of the set"
    info = {
        "name": NAME,
        "num_classes": len(CLASSES),
        "classes": [
            {"label": i, "synset": synset, "text": words, "imagenet_label_1based": number}
            for i, (synset, words, number) in enumerate(CLASSES, 1)
        ],
        "source": source.path.name,
        "source_images": {split: len(names) for split, names in found.items()},
        "chosen_sha256": {split: fact["sha256"] for split, fact in facts.items()},
        "how": " ".join(__doc__.split("The rule:")[1].split()),
        "made_with": {
            "pillow": Image.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        },
        "splits": {split: fact["counts"] for split, fact in facts.items()},
        "licence": "ImageNet's images: non-commercial research and education; copyright is their owners'.",
    }
    path = folder / "info.json"
    path.write_text(json.dumps(info, indent=1))
    data = open_data(folder, verbose=False)  # names of the classes are part of a fingerprint
    info["fingerprint"] = {split: data.split_fingerprint(split) for split in SPLITS}
    path.write_text(json.dumps(info, indent=1))
    return info


def make(source, target, per_class):
    source, target = Source(source), Path(target)
    if target.exists():
        raise SystemExit(f"{target} is there already. Name another folder.")
    found = found_images(source.names())
    chosen = {s: choose(found[s], per_class[s], SPLITS[s][1]) for s in SPLITS}
    for split, names in found.items():
        if len(names) != OFFICIAL[split]:
            said = (
                f"{len(names):,} images in {SPLITS[split][0]}, imagenette2 has {OFFICIAL[split]:,}"
            )
            print(f"note: {said}")
    split_of = {name: split for split, names in chosen.items() for name in names}
    jpegs, digests = {s: {} for s in SPLITS}, {s: {} for s in SPLITS}
    for name, data in source.read(split_of):
        jpegs[split_of[name]][name] = shrink(data)
        digests[split_of[name]][PurePosixPath(name).name] = hashlib.sha256(data).hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(target.parent), prefix=".imagenette128-") as temporary:
        folder, facts = Path(temporary) / "set", {}
        folder.mkdir()
        for split in SPLITS:
            write_split(folder, split, jpegs[split])
            labels = Counter(LABELS[PurePosixPath(name).parts[-2]] for name in jpegs[split])
            text = json.dumps(sorted(digests[split].items()))
            facts[split] = {
                "counts": {
                    "records": len(jpegs[split]),
                    "shards": SPLITS[split][3],
                    "per_class": {str(k): labels[k] for k in sorted(labels)},
                },
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        info = describe(folder, source, facts, found)
        os.rename(str(folder), str(target))
    print(f"{target}: {NAME}, fingerprints {info['fingerprint']}")
    return info


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="imagenette2.tgz, or the folder that it unpacks to")
    parser.add_argument("target", help="folder to make")
    parser.add_argument("--train-per-class", type=int, default=750)
    parser.add_argument("--validation-per-class", type=int, default=250)
    args = parser.parse_args(words)
    per_class = {"train": args.train_per_class, "validation": args.validation_per_class}
    return make(args.source, args.target, per_class)


if __name__ == "__main__":
    main()
