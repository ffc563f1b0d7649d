"""The stream of training steps: for each step its images, and the random numbers that the host draws for it."""

import contextlib
import re
from typing import Tuple

import keras
import numpy as np

from effnet_repro.augment import draw_mixing
from effnet_repro.config import Case
from effnet_repro.data import (
    DataSet,
    find_damaged,
    fits_device,
    resident_batches,
    tensorflow_arrays,
    training_batches,
    validation_batches,
)
from effnet_repro.data.decoders import READER_OF
from effnet_repro.data.readers import sending_reader
from effnet_repro.data.tf_reader import refused_by_tensorflow
from effnet_repro.recipe import learning_rate, steps_per_epoch, total_updates
from effnet_repro.training.decoding import decoder_here
from effnet_repro.training.device import has_jax_gpu, has_other_processes
from effnet_repro.training.step import on_all_devices


def _controls(case, update, updates_per_epoch, seed, shard):
    "Everything of a step that is not an image: what is drawn for the mixing groups of this process"
    rate = np.float32(learning_rate(case, update, updates_per_epoch))
    fixed = {"update": np.int32(update), "learning_rate": rate}
    if case.body_rate != 1:
        fixed["body_rate"] = np.float32(case.body_rate)
    if not case.mixes:
        return fixed
    draws = draw_mixing(
        mixup_alpha=case.mixup_alpha,
        cutmix_lambda=case.cutmix_lambda,
        seed=seed,
        update=update,
        groups=case.mix_groups[0],
        group_size=case.mix_groups[1],
    )
    own = lambda v: np.split(v, shard[1])[shard[0]]
    return {**fixed, **(draws if shard[1] == 1 else {n: own(v) for n, v in draws.items()})}


def updates(
    case: Case,  # Laid out for one device
    data: DataSet,  # Images
    seed: int,  # Of the run
    first_update: int = 0,  # Where to begin
    shard: Tuple[int, int] = (
        0,
        1,
    ),  # (index, count) of this process; it gets its part of every step
):  # Endless stream of dictionaries, one a training step: a tf.data.Dataset, or a generator of 1-tuples on JAX
    "Stream the training steps of a `case`; where the images stay on the device, what is to be cut out of them"
    per_epoch = steps_per_epoch(case, data.train_count)
    last = total_updates(case, per_epoch)
    how = dict(seed=seed, first_update=first_update, area_min=case.crop_area_min)
    args = (data, case.image_size, case.global_batch_size)
    controls = lambda update: _controls(case, min(int(update), last), per_epoch, seed, shard)
    how.update(shard=shard, preprocessing=case.train_preprocessing, image_resize=case.image_resize)
    if keras.backend.backend() == "tensorflow":
        tensors = _tensors(training_batches, args, how)
        return _tf_updates(tensors, controls, first_update)
    numbered = enumerate(_arrays(args, how), first_update)
    return (({**batch, **controls(i)},) for i, batch in numbered)  # Keras wants tuples


def _arrays(args, how):
    "The training batches of a backend that takes arrays, as dictionaries"
    reader = READER_OF[decoder_here(args[0])]
    if reader == "numpy" and has_jax_gpu():
        if fits_device(args[0]):
            return _resident(*resident_batches(*args, **how))
        reader = sending_reader()  # the GPU resizes
    if reader == "tensorflow":
        stream = tensorflow_arrays(training_batches, *args, **how)
    elif reader in ("nvimagecodec", "cores"):
        stream = training_batches(*args, reader=reader, gpus=range(_sharing()), **how)
    else:
        stream = training_batches(*args, reader=reader, **how)
    return ({"images": joined(images), "labels": labels} for images, labels in stream)


def _mesh():
    "The mesh of the devices that share a training step; None where there is one device"
    distribution = keras.distribution.distribution()
    return None if distribution is None else distribution.device_mesh.backend_mesh


def _sharing():
    "How many devices of this process share a training step"
    mesh = _mesh()
    return 1 if mesh is None else len(mesh.local_devices)


def joined(images):
    """Return the images of a training step as one array, where GPUs made them: parts, one made on each device.

    No part leaves its device. Other processes have parts of the array, too. Images of the host stay as they are.
    """
    parts, mesh = images if isinstance(images, list) else [images], _mesh()
    alone = not isinstance(images, list) and not (has_other_processes() and _sharing() == 1)
    if isinstance(parts[0], np.ndarray) or alone:
        return images
    import jax

    count = sum(map(len, parts)) * mesh.devices.size // len(mesh.local_devices)
    shape = (count, *parts[0].shape[1:])
    layout = keras.distribution.distribution().get_data_layout(shape).backend_layout
    parts = [jax.device_put(one, device) for one, device in zip(parts, mesh.local_devices)]
    return jax.make_array_from_single_device_arrays(shape, layout, parts)


def _resident(pixels, stream):
    "What each training step cuts out of the pixels that stay on every device"
    pixels = on_all_devices(pixels)
    return ({"pixels": pixels, "cuts": cuts, "labels": labels} for cuts, labels in stream)


def _tensors(make, args, how, more=()):
    "The batches of `make` as a tf.data.Dataset, whatever decodes; `more` are types of what follows the labels"
    reader = READER_OF[decoder_here(args[0])]
    if reader == "tensorflow":
        return make(*args, **how)
    import tensorflow as tf

    _, size, batch = args  # known to the compiled step
    images = tf.TensorSpec((batch, size, size, 3), "uint8")
    signature = (images, *(tf.TensorSpec((batch,), kind) for kind in ("int32", *more)))
    batches = lambda: make(*args, reader=reader, **how)
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


def _tf_updates(stream, controls, first_update):
    import tensorflow as tf

    example = controls(first_update)
    kinds = [tf.as_dtype(v.dtype) for v in example.values()]

    def add(update, batch):
        values = tf.numpy_function(lambda u: list(controls(u).values()), [update], kinds)
        for value, like in zip(values, example.values()):
            value.set_shape(like.shape)
        return {**dict(zip(("images", "labels"), batch)), **dict(zip(example, values))}

    return stream.enumerate(first_update).map(add).prefetch(2)


@contextlib.contextmanager
def explain_failures(data, split, due, doing):
    "Turn what a backend says about images or memory into one message"
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__} {error}"
        if re.search("RESOURCE_EXHAUSTED|ResourceExhausted|out of memory", text):
            raise MemoryError(f"The device has too little memory for {doing()}.") from None
        if type(error).__module__.startswith("tensorflow"):
            for damage in find_damaged(data, split, due()).values():
                raise ValueError(damage) from None
            for refused in refused_by_tensorflow(data, split, due()).values():
                raise ValueError(refused) from None
        raise


def validation_stream(data, image_size, batch, image_resize="published", shard=(0, 1)):
    "The validation batches of the running backend; of several processes each has its part of the images"
    args, how = (data, image_size, batch), dict(image_resize=image_resize, shard=shard)
    if keras.backend.backend() == "tensorflow":
        make = lambda: _tensors(validation_batches, args, how, ["float32"])
    elif READER_OF[decoder_here(data)] == "tensorflow":
        make = lambda: tensorflow_arrays(validation_batches, *args, **how)
    else:
        make = lambda: validation_batches(*args, reader=READER_OF[decoder_here(data)], **how)
    at = [0]
    due = lambda: np.arange(data.validation_count)[shard[0] :: shard[1]][at[0] : at[0] + 4 * batch]
    doing = lambda: f"{batch} images of {image_size} pixels at a time: use a smaller batch"
    with explain_failures(data, "validation", due, doing):
        for one in make():
            yield one
            at[0] += batch
