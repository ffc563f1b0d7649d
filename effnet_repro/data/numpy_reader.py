"""The reader without TensorFlow: Pillow and NumPy in threads."""

import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import decode_image, located, read_encoded, wants_fast_dct
from effnet_repro.data.order import validation_ids
from effnet_repro.data.request import check_resize, validation_labels
from effnet_repro.data.transforms import train_image, validation_image


def read_validation_image(dataset, split, i, image_size, image_resize):
    encoded, _ = read_encoded(dataset, split, i)
    with located(dataset, split, i):
        pixels = decode_image(encoded, fast=image_resize == "published")
    return validation_image(pixels, image_size, image_resize)


def arrays(dataset, plan, inputs, how):
    "The stream of `training_batches` without TensorFlow"
    fast = wants_fast_dct(dataset, how.image_resize)

    def part(update, begin):
        end = min(begin + 8, plan.local)
        encoded, crops, flips, labels = inputs(update, begin, end)
        images = []
        for i, data, crop, flip in zip(plan.take(update, begin, end)[0], encoded, crops, flips):
            with located(dataset, "train", i):
                pixels = decode_image(data, fast)
            if how.random:
                top, left, height, width = crop
                pixels = pixels[top : top + height, left : left + width]
                images.append(train_image(pixels, flip, *how[:2]))
            else:
                images.append(validation_image(pixels, *how[:2]))
        return images, labels

    def batches():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = deque()
            for update in itertools.count(how.first_update):
                ahead.append([pool.submit(part, update, i) for i in range(0, plan.local, 8)])
                if len(ahead) > 2:  # two batches are made while one is used
                    images, labels = zip(*(piece.result() for piece in ahead.popleft()))
                    yield np.stack(sum(images, [])), np.concatenate(labels)

    return batches()


def validation_arrays(
    dataset: DataSet,  # From `open_data`
    image_size: int,  # Side of the pictures, S, pixels
    batch: int,  # Pictures in a batch of this process, B
    *,
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    image_resize: str = "published",  # Or "modern": see `resize`
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:  # images, labels, mask
    "Read the batches of `validation_batches` as NumPy arrays"
    check_resize(image_resize)
    wants_fast_dct(dataset, image_resize)

    def picture(i):
        if i < 0:
            return np.zeros((image_size, image_size, 3), np.uint8)
        return read_validation_image(dataset, "validation", i, image_size, image_resize)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for ids in validation_ids(dataset.validation_count, batch, shard):
            images = np.stack(list(pool.map(picture, ids)))
            yield (images, *validation_labels(dataset, ids))


def load_arrays(
    dataset: DataSet,  # From `open_data`
    split: str,  # "train" or "validation"
    image_size: int,  # Side of the pictures, S, pixels
    image_resize: str = "published",  # Or "modern": see `resize`
) -> Tuple[np.ndarray, np.ndarray]:  # Images (n, S, S, 3) uint8 and labels (n,) int32
    "Decode a whole split into memory, with the validation crop"
    if split not in dataset.splits:
        raise unknown_name("split", split, dataset.splits)
    check_resize(image_resize)
    wants_fast_dct(dataset, image_resize)
    labels = dataset.splits[split].label
    images = np.empty((len(labels), image_size, image_size, 3), np.uint8)

    def place(i):
        images[i] = read_validation_image(dataset, split, i, image_size, image_resize)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(place, range(len(labels))))
    return images, labels
