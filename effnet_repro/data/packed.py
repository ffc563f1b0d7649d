"""A data set written again in fewer bytes: images made smaller once, in the formats that readers know.

`pack` writes TFRecords of JPEGs, or raw pixels in .npy files that are mapped into memory. Both keep the size of each
original, so that training crops are drawn on it, with the same numbers, and then scaled. Each part (a shard of a
split) is written by one process, checked, and put in place whole: after an interruption, the same call checks what is
there and goes on.

A JPEG that is written anew keeps its orientation. Raw pixels are upright, whatever they are resized like later.

Raw sets: `pixels-train-00000-of-00002.npy` is a flat array of 8-bit values, `index-train-00000-of-00002.npy` says
where each image begins and what it shows (`INDEX`).
"""

import contextlib
import io
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, Optional

import numpy as np

from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import (
    UnreadableImage,
    decode_image,
    located,
    read_image,
    turned_boxes,
)
from effnet_repro.data.layouts import INDEX
from effnet_repro.data.order import epoch_order
from effnet_repro.data.team import Team
from effnet_repro.data.tfrecord import make_example, scan_tfrecord, write_tfrecords
from effnet_repro.data.threads import core_count
from effnet_repro.messages import byte_size, say
from effnet_repro.outside import read_json
from effnet_repro.paths import local_path

FORMS = ("jpeg", "raw")
_LONGEST_JPEG = 65_500  # Pixels a side that libjpeg writes
IN_A_PART = 1250  # Images; ImageNet's training set comes in 1,024 parts of as many
_NAME = "{kind}-{part:05d}-of-{parts:05d}"


@dataclass(frozen=True)
class Packing:
    """How a data set is packed."""

    form: str = "jpeg"  # TFRecords of JPEGs; "raw" = pixels, which need no decoding
    short_side: Optional[int] = (
        256  # Pixels; smaller images stay as they are. None = no image changes
    )
    quality: int = 90  # Of JPEGs that are written anew, 1 to 100
    in_a_part: int = IN_A_PART  # Images

    def check(self) -> None:
        """Raise `ValueError` for options that make no sense."""
        for name, value, lowest, highest in (
            ("short_side", self.short_side or 32, 32, 2**14),
            ("quality", self.quality, 1, 100),
            ("in_a_part", self.in_a_part, 1, 2**31),
        ):
            if not lowest <= value <= highest:
                raise ValueError(
                    f"`{name}` must lie between {lowest} and {highest}. Received: {name}={value}."
                )
        if self.form not in FORMS:
            raise ValueError(f"`form` must be 'jpeg' or 'raw'. Received: form={self.form!r}.")


def _smaller(pixels, short_side):
    "An image whose short side is at most that, by Pillow's bicubic filter with antialiasing"
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    size = [max(1, round(side * scale)) for side in (width, height)]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.BICUBIC))


@contextlib.contextmanager
def _writing(path):
    "Let an OSError say which file could not be written; that of an image that cannot be read stays as it is"
    try:
        yield
    except UnreadableImage:
        raise
    except OSError as error:
        hint = "Make room, or choose another folder; what is packed already is used again."
        text = f"Cannot write {path}: {error.strerror}. {hint}"
        raise OSError(error.errno, text) from None


@dataclass(frozen=True)
class _Part:
    "The job of a process: writes one part of one split, or finds it whole"

    dataset: DataSet
    folder: str
    how: Packing
    order: Dict[
        str, np.ndarray
    ]  # Numbers of the images of each split, in the order in which they are packed

    def __call__(self, split, part):
        numbers = np.array_split(self.order[split], self.parts(split))[part]
        files = self.files(split, part)
        try:
            whole = self._check(files, len(numbers))
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self._write(files, split, numbers)
            self._check(files, len(numbers))
        size = sum(path.stat().st_size for path in files)
        return np.zeros(0, np.uint8), {"images": len(numbers), "bytes": size, "found": whole}

    def _write(self, files, split, numbers):
        images = (self._image(split, int(number)) for number in numbers)
        write = {"jpeg": self._write_records, "raw": self._write_raw}[self.how.form]
        with _writing(files[0]):
            write(files, split, images)

    def parts(self, split):
        return -(-len(self.order[split]) // self.how.in_a_part)

    def files(self, split, part):
        kinds = [split] if self.how.form == "jpeg" else [f"pixels-{split}", f"index-{split}"]
        ending = "" if self.how.form == "jpeg" else ".npy"
        names = (_NAME.format(kind=kind, part=part, parts=self.parts(split)) for kind in kinds)
        return [Path(self.folder) / (name + ending) for name in names]

    def _image(self, split, number):
        "Number, the file or None, the pixels or None, the original size, the size and the orientation"
        upright = self.how.form == "raw"  # where nothing can say that it is not
        data, size, turn = read_image(self.dataset, split, number, upright=upright)
        places = self.dataset.splits[split]
        original = tuple(places.original[number]) if len(places.original) else size
        original = original[::-1] if upright and turn >= 5 and len(places.original) else original
        shrinks = self.how.short_side is not None and min(size) > self.how.short_side
        if self.how.form == "jpeg" and not shrinks and data[:2] == b"\xff\xd8":
            with located(self.dataset, split, number):
                decode_image(data)  # a damaged one is not copied
            return number, data, None, original, size, turn
        with located(self.dataset, split, number):
            pixels = decode_image(data)
        pixels = _smaller(pixels, self.how.short_side) if shrinks else pixels
        return number, None, pixels, original, pixels.shape[:2], turn

    def _boxes(self, split, number):
        places = self.dataset.splits[split]
        return places.boxes[places.box_begin[number] : places.box_begin[number + 1]]

    def _record(self, split, image):
        from PIL import Image

        number, data, pixels, original, size, turn = image
        kind = "JPEG" if data is not None or max(size) <= _LONGEST_JPEG else "PNG"
        if data is None:
            file, exif = io.BytesIO(), Image.Exif()
            exif[0x112] = turn
            kept = {"exif": exif} if turn > 1 else {}
            Image.fromarray(pixels).save(file, kind, quality=self.how.quality, **kept)
            data = file.getvalue()
        label = int(self.dataset.splits[split].label[number])
        boxes = self._boxes(split, number).T
        sides = dict(zip(("ymin", "xmin", "ymax", "xmax"), boxes))
        return make_example(
            {
                "image/encoded": data,
                "image/format": kind,
                "image/class/label": label + 1,
                "image/class/text": self.dataset.class_names[label],
                "image/height": int(size[0]),
                "image/width": int(size[1]),
                "image/original/height": int(original[0]),
                "image/original/width": int(original[1]),
                **{f"image/object/bbox/{k}": v for k, v in sides.items() if len(v)},
            }
        )

    def _write_records(self, files, split, images):
        (path,) = files
        made = path.with_name("." + path.name)  # no reader takes it for a file of the set
        write_tfrecords(made, (self._record(split, image) for image in images))
        os.replace(str(made), str(path))

    def _write_raw(self, files, split, images):
        pixels_path, index_path = files
        made, rows, boxes = pixels_path.with_name("." + pixels_path.name), [], []
        with made.open("wb") as file:
            file.write(bytes(128))  # the header follows, when the size is known
            for number, data, pixels, original, size, turn in images:
                pixels = np.ascontiguousarray(pixels)
                own = turned_boxes(self._boxes(split, number), turn)
                label = self.dataset.splits[split].label[number]
                crc = zlib.crc32(pixels)
                rows.append((file.tell(), size, original, label, crc, len(own)))
                boxes.extend(own)
                file.write(pixels)
            end = file.tell()
            file.seek(0)
            file.write(_npy_header(end - 128))
        index = np.zeros(len(rows) + len(boxes), INDEX)
        for name, column in zip(INDEX.names, zip(*rows)):
            index[name][: len(rows)] = column
        index["box"][len(rows) :] = np.reshape(boxes, (-1, 4))
        index["boxes"][len(rows) :] = -1  # a row of a box
        hidden = index_path.with_name("." + index_path.name)
        with hidden.open("wb") as file:
            np.save(file, index)
        os.replace(str(made), str(pixels_path))
        os.replace(str(hidden), str(index_path))

    def _check(self, files, count):
        "Whether the files of a part are there; `ValueError` for damaged ones"
        if not all(path.exists() for path in files):
            return False
        if self.how.form == "jpeg":
            found = len(scan_tfrecord(files[0], check_data=True))
        else:
            index = np.load(files[1])
            index, pixels = index[index["boxes"] >= 0], np.load(files[0], mmap_mode="r")
            found = len(index)
            for row in index:
                begin = int(row["offset"]) - 128
                if zlib.crc32(pixels[begin : begin + 3 * int(row["size"].prod())]) != row["crc"]:
                    raise ValueError(f"Damaged file: {files[0]}. Pack again.")
        if found != count:
            raise ValueError(f"{files[0]} holds {found} images instead of {count}. Pack again.")
        return True


def _npy_header(size):
    "The first 128 bytes of a .npy file of `size` 8-bit values"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _orders(dataset):
    "The order in which the images of each split are packed: class folders are shuffled for training"
    orders = {name: np.arange(len(split.label)) for name, split in dataset.splits.items()}
    if dataset.format == "folder":
        orders["train"] = epoch_order(dataset.train_count, seed=0, epoch=0)
    return orders


def _agree(folder, plan):
    "Write down what is packed how; `ValueError` where something else is being packed there"
    path = folder / "pack.json"
    try:
        there = read_json(path)
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty. Pack into a folder of its own.") from None
        with _writing(path):
            path.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        return
    if there != plan:
        differs = ", ".join(k for k in plan if there.get(k) != plan[k])
        raise ValueError(
            f"{folder} holds a set that was packed otherwise ({differs}). Use another."
        )


def pack(
    dataset: DataSet,
    folder,
    how: Packing = Packing(),
    workers: Optional[int] = None,
    say: Callable[[str], None] = say,
) -> Dict[str, Dict[str, int]]:
    """Write a data set into `folder`, or go on where that was interrupted.

    `workers` processes write parts (None = one for each core); `say` is told of every tenth of a split. Returns
    for each split the number of images and bytes, and how many parts were there already. Raises `ValueError` for an
    image that is damaged, and for a folder that holds anything else.
    """
    how.check()
    folder = local_path(folder, "folder")
    if dataset.format == "folder" and Path(dataset.root).resolve() in folder.resolve().parents:
        raise ValueError(f"{folder} is inside {dataset.root}, which is read. Pack somewhere else.")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prints = {name: dataset.split_fingerprint(name) for name in dataset.splits}
    _agree(folder, {**asdict(how), "source": prints})
    job, done = _Part(dataset, str(folder), how, _orders(dataset)), {}
    most = sum(job.parts(split) for split in dataset.splits)
    count = min(workers or core_count(), max(most, 1))
    with Team(job, 1 if count > 1 and os.name == "posix" else None, count) as team:
        for split in dataset.splits:
            parts, facts = job.parts(split), {"images": 0, "bytes": 0, "found": 0}
            begun = [team.submit((split, part), len) for part in range(parts)]
            for i, one in enumerate(begun):
                for key, value in one.result()[1].items():
                    facts[key] += value
                if 10 * (i + 1) // parts > 10 * i // parts:
                    say(f"{split}: {facts['images']:,} images, {byte_size(facts['bytes'])}")
            done[split] = facts
    _write_info(folder, dataset, done)
    return done


def _write_info(folder, dataset, done):
    names = enumerate(dataset.class_names, 1)
    info = {
        "name": f"{Path(dataset.root).name}, packed",
        "num_classes": dataset.num_classes,
        "classes": [{"label": label, "text": name} for label, name in names],
        "splits": {split: {"records": facts["images"]} for split, facts in done.items()},
    }
    made = folder / ".info.json"
    with _writing(folder / "info.json"):
        made.write_text(json.dumps(info, indent=1), encoding="utf-8")
        os.replace(str(made), str(folder / "info.json"))
