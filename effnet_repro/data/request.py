"""What every reader is asked for, and what decoding needs for it."""

import os
from typing import NamedTuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data import layouts
from effnet_repro.data.decode import read_encoded
from effnet_repro.data.order import BatchOrder
from effnet_repro.data.transforms import RESIZES, draw_crops, draw_flips

_PREPROCESSING = ("train", "validation")


def check_request(image_size, area_min, preprocessing):
    if preprocessing not in _PREPROCESSING:
        raise unknown_name("preprocessing", preprocessing, _PREPROCESSING)
    if not 0 < area_min <= 1 or image_size < 1:
        raise ValueError(
            f"`area_min` must lie in (0, 1] and `image_size` be positive. Received: "
            f"area_min={area_min}, image_size={image_size}."
        )


def check_resize(image_resize):
    if image_resize not in RESIZES:
        raise unknown_name("image_resize", image_resize, RESIZES)


class How(NamedTuple):
    "What the three readers are told about the images"

    image_size: int
    image_resize: str
    random: bool  # Crops and flips; False = the validation crop
    first_update: int


def batch_order(dataset, global_batch_size, seed, shard):
    index, count = shard
    if not 0 <= index < count or global_batch_size % count or global_batch_size < 1:
        raise ValueError(
            f"`shard` must be (index, count) with index < count, and count must divide "
            f"`global_batch_size`. Received: shard={shard}, global_batch_size={global_batch_size}."
        )
    if dataset.train_count < global_batch_size:
        raise ValueError(
            f"`global_batch_size` must not exceed the training pictures. Received: "
            f"{global_batch_size}, with {dataset.train_count} pictures in {dataset.root}."
        )
    large = dataset.format == "tfrecord" and dataset.splits["train"].length.sum() > layouts.LARGE
    local = global_batch_size // count
    run = 64 if large else 1
    return BatchOrder(dataset.train_count, seed, global_batch_size, local, index * local, run)


def announce(split, pictures):
    "Tell the operating system which bytes will be read soon"
    if hasattr(os, "posix_fadvise"):
        for file in np.unique(split.file[pictures]):
            mine = pictures[split.file[pictures] == file]
            begin, end = split.offset[mine].min(), (split.offset[mine] + split.length[mine]).max()
            with open(split.files[file], "rb") as opened:
                where = opened.fileno(), int(begin), int(end - begin)
                os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)


def train_inputs(dataset, plan, chance, update, begin, end, known_sizes=None):
    "What decoding needs: encoded pictures or their numbers, crops (n, 4), flips and labels (n,)"
    split = dataset.splits["train"]
    pictures, places = plan.take(update, begin, end)
    if known_sizes is not None:  # decoded long ago
        encoded, sizes = pictures, known_sizes[pictures]
    else:
        if plan.run > 1:
            announce(split, plan.coming(update, begin))
        encoded, sizes = zip(*(read_encoded(dataset, "train", i) for i in pictures))
    boxes = [split.boxes[split.box_begin[i] : split.box_begin[i + 1]] for i in pictures]
    crops = draw_crops(np.array(sizes), boxes, plan.seed, places, **chance)
    return encoded, crops, draw_flips(plan.seed, places), split.label[pictures]


def validation_labels(dataset, ids):
    real = ids >= 0
    labels = np.where(real, dataset.splits["validation"].label[ids], 0)
    return labels.astype(np.int32), real.astype(np.float32)
