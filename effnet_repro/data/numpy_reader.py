"""The reader without TensorFlow: Pillow decodes and NumPy resizes, in threads."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import decode_image, located, read_encoded, wants_fast_dct
from effnet_repro.data.request import TrainRequest, ValidationRequest, check_resize
from effnet_repro.data.threads import core_count, made_ahead
from effnet_repro.data.transforms import train_image, validation_image

PIECE = 8  # Images of a batch that a thread makes at a time


def training_stream(request: TrainRequest) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8 and labels (B,) int32 of one update after the other, without end."""
    fast = wants_fast_dct(request.dataset, request.image_resize)
    how = request.image_size, request.image_resize

    def square(number, data, crop, flip):
        with located(request.dataset, "train", number):
            pixels = decode_image(data, fast)
        if not request.random:
            return validation_image(pixels, *how)
        top, left, height, width = crop
        return train_image(pixels[top : top + height, left : left + width], flip, *how)

    def piece(update, begin):
        some = request.read(update, begin, min(begin + PIECE, request.order.local))
        return [square(*one) for one in zip(*some[:4])], some.labels

    def batches():
        with ThreadPoolExecutor(core_count()) as pool:
            begins = range(0, request.order.local, PIECE)
            begin = lambda update: [pool.submit(piece, update, i) for i in begins]
            for pieces in made_ahead(begin, itertools.count(request.first_update)):
                images, labels = zip(*(one.result() for one in pieces))
                yield np.stack(sum(images, [])), np.concatenate(labels)

    return batches()


def _validation_image(dataset, split, number, image_size, image_resize):
    encoded, _ = read_encoded(dataset, split, number)
    with located(dataset, split, number):
        pixels = decode_image(encoded, fast=image_resize == "published")
    return validation_image(pixels, image_size, image_resize)


def validation_stream(
    request: ValidationRequest,
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield images (B, S, S, 3) uint8, labels (B,) int32 and mask (B,) float32; fillers are black."""
    wants_fast_dct(request.dataset, request.image_resize)
    how = request.image_size, request.image_resize

    def square(number):
        if number < 0:
            return np.zeros((request.image_size, request.image_size, 3), np.uint8)
        return _validation_image(request.dataset, "validation", number, *how)

    with ThreadPoolExecutor(core_count()) as pool:
        for ids in request.ids:
            yield (np.stack(list(pool.map(square, ids))), *request.known(ids))


def load_arrays(
    dataset: DataSet,  # From `open_data`
    split: str,  # "train" or "validation"
    image_size: int,  # Side of the pictures, S, pixels
    image_resize: str = "published",  # Or "modern": see `resize`
) -> Tuple[np.ndarray, np.ndarray]:  # Images (n, S, S, 3) uint8 and labels (n,) int32
    """Decode a whole split into memory, with the validation crop"""
    if split not in dataset.splits:
        raise unknown_name("split", split, dataset.splits)
    check_resize(image_resize)
    wants_fast_dct(dataset, image_resize)
    labels = dataset.splits[split].label
    images = np.empty((len(labels), image_size, image_size, 3), np.uint8)

    def place(number):
        images[number] = _validation_image(dataset, split, number, image_size, image_resize)

    with ThreadPoolExecutor(core_count()) as pool:
        list(pool.map(place, range(len(labels))))
    return images, labels
