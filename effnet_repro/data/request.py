"""What a reader is asked for, and what it needs to decode the images of a batch.

`TrainRequest` and `ValidationRequest` say it once for all readers, so that these see the same images, crops, flips
and labels. Numbers of images count from 0 in the list of the split.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data import layouts
from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import read_image, turned_boxes
from effnet_repro.data.order import BatchOrder, validation_ids
from effnet_repro.data.places import Split
from effnet_repro.data.transforms import ASPECTS, RESIZES, draw_crops, draw_flips
from effnet_repro.fields import check_whole

_PREPROCESSING = ("train", "validation")


def check_resize(image_resize: str) -> None:
    """Raise `ValueError` unless `image_resize` is "published" or "modern"."""
    if image_resize not in RESIZES:
        raise unknown_name("image_resize", image_resize, RESIZES)


def check_request(dataset: DataSet, image_size: int, image_resize: str, **counts) -> None:
    """Raise `ValueError` unless these can be read; `counts` are numbers of images, by the name of the argument."""
    if not isinstance(dataset, DataSet):
        raise ValueError(f"`dataset` must come from `open_data`. Received: dataset={dataset!r}.")
    for name, value in {"image_size": image_size, **counts}.items():
        check_whole(1, **{name: value})
    check_resize(image_resize)


def check_preprocessing(image_size: int, area_min: float, preprocessing: str) -> None:
    """Raise `ValueError` for values with which no image can be made."""
    if preprocessing not in _PREPROCESSING:
        raise unknown_name("preprocessing", preprocessing, _PREPROCESSING)
    if not 0 < area_min <= 1 or image_size < 1:
        raise ValueError(
            f"`area_min` must lie in (0, 1] and `image_size` be positive. Received: "
            f"area_min={area_min}, image_size={image_size}."
        )


def batch_order(
    dataset: DataSet, global_batch_size: int, seed: int, shard: Tuple[int, int]
) -> BatchOrder:
    """Return the order in which process `shard` (index, count) reads the training images.

    Of records beyond `layouts.LARGE` bytes, 64 neighbors are read together. Raises `ValueError` for a batch of
    more images than there are, or one that the processes cannot share.
    """
    large = dataset.format == "tfrecord" and dataset.splits["train"].length.sum() > layouts.LARGE
    run = 64 if large else 1
    order = BatchOrder(dataset.train_count, seed, global_batch_size, shard, run)
    if dataset.train_count < global_batch_size:
        raise ValueError(
            f"`global_batch_size` must not exceed the training images. Received: "
            f"{global_batch_size}, with {dataset.train_count} images in {dataset.root}."
        )
    return order


def announce(split: Split, numbers: np.ndarray) -> None:
    """Tell the operating system which images will be read soon, where it has a call for that."""
    if hasattr(os, "posix_fadvise"):
        for file in np.unique(split.file[numbers]):
            mine = numbers[split.file[numbers] == file]
            begin, end = split.offset[mine].min(), (split.offset[mine] + split.length[mine]).max()
            with open(split.files[file], "rb") as opened:
                where = opened.fileno(), int(begin), int(end - begin)
                os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)


def scale_crops(crops: np.ndarray, drawn_on: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the crops (n, 4) that were drawn on images of one size, on the same images of other `sizes`, (n, 2)."""
    scale = np.asarray(sizes) / np.asarray(drawn_on)
    begin, end = (np.rint(edge * scale) for edge in (crops[:, :2], crops[:, :2] + crops[:, 2:]))
    begin = np.minimum(begin, np.asarray(sizes) - 1)
    return np.concatenate([begin, np.maximum(end - begin, 1)], 1).astype(np.int32)


class Encoded(NamedTuple):
    """Some images of a batch as they are read, with what is to be done to them."""

    numbers: np.ndarray  # In the training split, (n,)
    data: Sequence[bytes]  # JPEG or BMP, n of them
    crops: np.ndarray  # (n, 4) int32: top, left, height, width, pixels
    flips: np.ndarray  # (n,) bool
    labels: np.ndarray  # (n,) int32


@dataclass(frozen=True)
class TrainRequest:
    """Which training images a reader delivers, and how."""

    dataset: DataSet
    order: BatchOrder
    image_size: int  # Side of the square, pixels
    image_resize: str = "published"  # or "modern"
    random: bool = True  # Crops and flips; False = the validation crop
    area_min: float = 0.05  # Smallest crop, share of the area
    first_update: int = 0
    gpus: Tuple[int, ...] = (0,)  # That make the images where GPUs decode, each its part of a batch

    @property
    def upright(self) -> bool:
        """Whether images are turned as their EXIF data ask: not in the published runs."""
        return self.image_resize == "modern"

    def draw(
        self, numbers: np.ndarray, places: np.ndarray, sizes: np.ndarray, turns: Sequence[int]
    ):
        """Return crops, flips and labels of some images; `sizes` are their heights and widths, (n, 2) pixels.

        `turns` are the orientations of their files, as in `ReadImage`. Crops of images that were made smaller are
        drawn on the originals.
        """
        split, seed = self.dataset.splits["train"], self.order.seed
        turns = np.asarray(turns) if self.upright else np.ones(len(numbers), int)
        boxes = [split.boxes[split.box_begin[i] : split.box_begin[i + 1]] for i in numbers]
        boxes = [turned_boxes(b, t) if t > 1 and len(b) else b for b, t in zip(boxes, turns)]
        chance = dict(area_min=self.area_min, aspects=ASPECTS[self.image_resize])
        drawn_on = sizes
        if len(split.original):
            drawn_on = split.original[numbers]
            drawn_on = np.where((turns >= 5)[:, None], drawn_on[:, ::-1], drawn_on)
        crops = draw_crops(drawn_on, boxes, seed, places, **chance)
        if len(split.original):
            crops = scale_crops(crops, drawn_on, sizes)
        return crops, draw_flips(seed, places), split.label[numbers]

    def take(self, update: int, begin: int, end: int):
        """Return numbers and places of images `begin` to `end` of this process's part of a step.

        Images that are due soon are announced.
        """
        if self.order.run > 1:
            announce(self.dataset.splits["train"], self.order.coming(update, begin))
        return self.order.take(update, begin, end)

    def read(self, update: int, begin: int, end: int) -> Encoded:
        """Read images `begin` to `end` of this process's part of a step. Damaged ones raise `ValueError`."""
        return self.read_images(*self.take(update, begin, end))

    def read_images(self, numbers: np.ndarray, places: np.ndarray, raw: bool = False) -> Encoded:
        """Read the images of these numbers, which have these places in the run; `raw` as in `read_image`."""
        found = (read_image(self.dataset, "train", i, raw, self.upright) for i in numbers)
        data, sizes, turns = zip(*found)
        return Encoded(numbers, data, *self.draw(numbers, places, np.array(sizes), turns))


@dataclass(frozen=True)
class ValidationRequest:
    """Which validation images a reader delivers, and how."""

    dataset: DataSet
    image_size: int  # Side of the square, pixels
    batch: int  # Images in a batch of this process
    shard: Tuple[int, int] = (0, 1)  # (index, count) of this process
    image_resize: str = "published"  # or "modern"

    @property
    def upright(self) -> bool:
        """As in `TrainRequest`."""
        return self.image_resize == "modern"

    @property
    def ids(self) -> np.ndarray:
        """Numbers of the images in each batch, (batches, batch); -1 is a filler."""
        return validation_ids(self.dataset.validation_count, self.batch, self.shard)

    def known(self, ids: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Return labels (int32) and mask (float32, 0 for a filler) of these images, in the shape of `ids`."""
        real = ids >= 0
        labels = np.where(real, self.dataset.splits["validation"].label[ids], 0)
        return labels.astype(np.int32), real.astype(np.float32)
