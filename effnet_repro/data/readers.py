"""The streams of batches that training and validation ask for.

Whatever the reader, a training stream is endless and yields `(images, labels)` of one training step after the other; a
validation stream yields `(images, labels, mask)` of each image once. Images are (B, S, S, 3) uint8, labels (B,)
int32, the mask (B,) float32: 0 for what only fills the last batch. TensorFlow's come as a `tf.data.Dataset`, which
yields the same tuples of tensors. A reader is a module with `training_stream(request)` and, where it validates,
`validation_stream(request)`.
"""

from types import SimpleNamespace
from typing import Any, Iterator, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.data import device, gpu_decode, gpu_reader, numpy_reader, tf_reader
from effnet_repro.data.catalog import DataSet
from effnet_repro.data.request import (
    TrainRequest,
    ValidationRequest,
    batch_order,
    check_preprocessing,
    check_request,
)

READERS = {
    "tensorflow": tf_reader,
    "numpy": numpy_reader,
    "jax": device,
    "nvimagecodec": gpu_reader,
}
_ALL = {
    **READERS,
    "resident": SimpleNamespace(training_stream=device.resident_cuts),
    "cores": SimpleNamespace(training_stream=gpu_reader.cores_stream),
}


def sending_reader() -> str:
    """Return the reader whose images the cores decode and JAX's GPU resizes: with CUDA's own calls where these work."""
    return "cores" if gpu_decode.problem(decodes=False) is None else "jax"


def training_batches(
    dataset: DataSet,  # From `open_data`
    image_size: int,  # Side of the images, S, pixels
    global_batch_size: int,  # Images of one weight update, all processes together
    *,
    seed: int = 0,  # Decides order, crops and flips
    first_update: int = 0,  # Begin here, as if the steps before had been taken
    area_min: float = 0.05,  # Smallest crop, share of the area
    preprocessing: str = "train",  # "validation" = no chance: the validation crop, for fine-tuning
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    image_resize: str = "published",  # Or "modern": see `resize`
    reader: str = "tensorflow",  # "numpy", "jax": see `numpy_batches`, `device_batches`; or "cores"
    gpus: Tuple[int, ...] = (0,),  # Of "nvimagecodec" and "cores"; with several, a list of arrays
):  # Endless tf.data.Dataset of (images uint8 (B, S, S, 3), labels int32 (B,)); B = this process's
    """Stream shuffled training batches"""
    if reader not in _ALL:
        raise unknown_name("reader", reader, READERS)
    check_request(dataset, image_size, image_resize, global_batch_size=global_batch_size)
    check_preprocessing(image_size, area_min, preprocessing)
    order = batch_order(dataset, global_batch_size, seed, shard)
    random = preprocessing == "train"
    rest = random, area_min, first_update, tuple(gpus)
    request = TrainRequest(dataset, order, image_size, image_resize, *rest)
    return _ALL[reader].training_stream(request)


def numpy_batches(
    *request,  # The arguments of `training_batches`: dataset, image_size, global_batch_size
    **options,  # and its options: seed, first_update, area_min, preprocessing, shard, image_resize
) -> Iterator[Tuple[np.ndarray, np.ndarray]]:  # Endless: images (B, S, S, 3) uint8, labels (B,)
    """Stream the batches of `training_batches` as NumPy arrays"""
    return training_batches(*request, reader="numpy", **options)


def device_batches(
    *request,  # The arguments of `training_batches`: dataset, image_size, global_batch_size
    **options,  # and its options: seed, first_update, area_min, preprocessing, shard, image_resize
) -> Iterator[Tuple[Any, np.ndarray]]:  # Endless: images (B, S, S, 3) uint8 on the device, labels
    """Stream the batches of `training_batches` from images on the device of JAX"""
    return training_batches(*request, reader="jax", **options)


def resident_batches(
    *request,  # The arguments of `training_batches`: dataset, image_size, global_batch_size
    **options,  # and its options: seed, first_update, area_min, preprocessing, shard, image_resize
) -> Tuple[Any, Iterator[Tuple[dict, np.ndarray]]]:  # Pixels on the device; cuts and labels
    """Stream what `cut_images` needs for the batches of `device_batches`, of a set that stays on the device"""
    return training_batches(*request, reader="resident", **options)


def validation_batches(
    dataset: DataSet,  # From `open_data`
    image_size: int,  # Side of the images, S, pixels
    batch: int,  # Images in a batch of this process, B
    *,
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    image_resize: str = "published",  # Or "modern": see `resize`
    reader: str = "tensorflow",  # or "numpy": see `validation_arrays`
):  # tf.data.Dataset of (images uint8 (B, S, S, 3), labels int32 (B,), mask float32 (B,))
    """Read every validation image once, in the order of the files"""
    able = [name for name, module in READERS.items() if hasattr(module, "validation_stream")]
    if reader not in able:
        raise unknown_name("reader", reader, able)
    check_request(dataset, image_size, image_resize, batch=batch)
    request = ValidationRequest(dataset, image_size, batch, shard, image_resize)
    return READERS[reader].validation_stream(request)


def validation_arrays(
    *request,  # The arguments of `validation_batches`: dataset, image_size, batch
    **options,  # and its options: shard, image_resize
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:  # images, labels, mask
    """Read the batches of `validation_batches` as NumPy arrays"""
    return validation_batches(*request, reader="numpy", **options)


def step_images(
    dataset: DataSet,  # From `open_data`
    global_batch_size: int,  # Images of one weight update
    update: int,  # Number of the step, from 0
    seed: int = 0,  # Of the run
) -> np.ndarray:  # (global_batch_size,) numbers of training images
    """Tell which images a step sees"""
    order = batch_order(dataset, global_batch_size, seed, (0, 1))
    return order.take(update, 0, order.local)[0]
