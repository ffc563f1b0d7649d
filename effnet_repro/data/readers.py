"""The streams of batches that training and validation ask for: images, labels, and a mask of what counts."""

import functools
from typing import Any, Iterator, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data.catalog import DataSet
from effnet_repro.data.device import device_arrays
from effnet_repro.data.numpy_reader import arrays
from effnet_repro.data.request import How, batch_order, check_request, check_resize, train_inputs
from effnet_repro.data.tf_reader import tensors
from effnet_repro.data.transforms import ASPECTS


def training_batches(
    dataset: DataSet,  # From `open_data`
    image_size: int,  # Side of the pictures, S, pixels
    global_batch_size: int,  # Pictures of one weight update, all processes together
    *,
    seed: int = 0,  # Decides order, crops and flips
    first_update: int = 0,  # Begin here, as if the updates before had been taken
    area_min: float = 0.05,  # Smallest crop, share of the area
    preprocessing: str = "train",  # "validation" = no chance: the validation crop, for fine-tuning
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    image_resize: str = "published",  # Or "modern": see `resize`
    reader: str = "tensorflow",  # or "numpy" or "jax": see `array_batches` and `device_batches`
):  # Endless tf.data.Dataset of (images uint8 (B, S, S, 3), labels int32 (B,)); B = this process's
    "Stream shuffled training batches"
    if reader not in READERS:
        raise unknown_name("reader", reader, READERS)
    check_request(image_size, area_min, preprocessing)
    check_resize(image_resize)
    plan = batch_order(dataset, global_batch_size, seed, shard)
    chance = dict(area_min=area_min, aspects=ASPECTS[image_resize])
    read = functools.partial(train_inputs, dataset, plan, chance)
    stream = tensors if reader == "tensorflow" else arrays if reader == "numpy" else device_arrays
    how = How(image_size, image_resize, preprocessing == "train", first_update)
    return stream(dataset, plan, read, how)


READERS = ("tensorflow", "numpy", "jax")


def array_batches(
    *request,  # The arguments of `training_batches`: dataset, image_size, global_batch_size
    **options,  # and its options: seed, first_update, area_min, preprocessing, shard, image_resize
) -> Iterator[Tuple[np.ndarray, np.ndarray]]:  # Endless: images (B, S, S, 3) uint8, labels (B,)
    "Stream the batches of `training_batches` as NumPy arrays"
    return training_batches(*request, reader="numpy", **options)


def device_batches(
    *request,  # The arguments of `training_batches`: dataset, image_size, global_batch_size
    **options,  # and its options: seed, first_update, area_min, preprocessing, shard, image_resize
) -> Iterator[Tuple[Any, np.ndarray]]:  # Endless: images (B, S, S, 3) uint8 on the device, labels
    "Stream the batches of `training_batches` from pictures on the device of JAX"
    return training_batches(*request, reader="jax", **options)


def update_pictures(
    dataset: DataSet,  # From `open_data`
    global_batch_size: int,  # Pictures of one weight update
    update: int,  # Number of the update, from 0
    seed: int = 0,  # Of the run
) -> np.ndarray:  # (global_batch_size,) numbers of training pictures
    "Tell which pictures an update sees"
    plan = batch_order(dataset, global_batch_size, seed, (0, 1))
    return plan.take(update, 0, plan.local)[0]
