"""The reader that decodes and resizes with TensorFlow, on all cores."""

import contextlib
import os
from typing import Iterator, Tuple

import numpy as np

from effnet_repro.data.catalog import DataSet
from effnet_repro.data.decode import read_encoded
from effnet_repro.data.order import validation_ids
from effnet_repro.data.request import check_resize, validation_labels
from effnet_repro.data.transforms import resize

_DCT = {"published": "INTEGER_FAST", "modern": "INTEGER_ACCURATE"}


CHUNK = 64  # pictures read by one call


def _tf_resize(image, size, image_resize):
    "All of an image (H, W, 3) resized, still float32"
    import tensorflow as tf

    centers = image_resize == "modern"
    return tf.raw_ops.ResizeBilinear(images=image[None], size=size, half_pixel_centers=centers)[0]


def _tf_to_bytes(image, image_resize):
    "`_to_bytes` for tensors"
    import tensorflow as tf

    if image_resize == "published":
        return tf.cast(tf.cast(image, tf.float16), tf.uint8)
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def _tf_train_picture(encoded, crop, flip, image_size, image_resize):
    import tensorflow as tf

    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.image.decode_and_crop_jpeg(
            encoded, crop, channels=3, dct_method=_DCT[image_resize]
        ),
        lambda: tf.image.crop_to_bounding_box(
            tf.io.decode_bmp(encoded, channels=3), crop[0], crop[1], crop[2], crop[3]
        ),
    )
    mirror = lambda image: tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    image = mirror(image) if image_resize == "published" else image
    image = _tf_resize(image, (image_size, image_size), image_resize)
    image = _tf_to_bytes(image, image_resize)
    return image if image_resize == "published" else mirror(image)


def _tf_validation_picture(encoded, image_size, image_resize):
    import tensorflow as tf

    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT[image_resize]),
        lambda: tf.io.decode_bmp(encoded, channels=3),
    )
    size, (top, left) = _tf_window(tf.shape(image), image_size, image_resize)
    square = image_size, image_size
    part = lambda x, *place: resize(x, place[:2], place[2:], square, image_resize)
    return tf.cond(  # of 1 x 10,000 pixels only the middle is enlarged, not all of it
        tf.reduce_max(size) > 16 * image_size,
        lambda: tf.numpy_function(part, [image, size[0], size[1], top, left], tf.uint8),
        lambda: _tf_to_bytes(
            _tf_resize(image, size, image_resize)[top : top + image_size, left : left + image_size],
            image_resize,
        ),
    )


def _tf_window(shape, image_size, image_resize):
    "`validation_window` for tensors"
    import tensorflow as tf

    sides, target = tf.cast(shape[:2], tf.int64), image_size * 256 // 224
    short = tf.reduce_min(sides)
    if image_resize == "published":
        ratio = tf.cast(target, tf.float32) / tf.cast(short, tf.float32)
        new = tf.cast(tf.cast(sides, tf.float32) * ratio, tf.int32)
        new = tf.maximum(new, image_size)
    else:
        new = tf.cast((2 * sides * target + short) // (2 * short), tf.int32)
    corner = (new - image_size) // 2
    return new, (corner[0], corner[1])


def tensors(dataset, plan, inputs, how):
    "The stream of `training_batches` for TensorFlow"
    import tensorflow as tf

    chunks = -(-plan.local // CHUNK)  # in one batch

    def read(k):
        update, chunk = divmod(int(k), chunks)
        encoded, *rest = inputs(update, chunk * CHUNK, min((chunk + 1) * CHUNK, plan.local))
        return (np.array(encoded, object), *rest)

    def tf_read(k):
        inputs = tf.numpy_function(read, [k], (tf.string, tf.int32, tf.bool, tf.int32))
        for tensor, shape in zip(inputs, ([None], [None, 4], [None], [None])):
            tensor.set_shape(shape)
        return tuple(inputs)

    def decode(encoded, crop, flip, label):
        if how.random:
            image = _tf_train_picture(encoded, crop, flip, *how[:2])
        else:
            image = _tf_validation_picture(encoded, *how[:2])
        return tf.ensure_shape(image, (how.image_size, how.image_size, 3)), label

    auto = tf.data.experimental.AUTOTUNE
    stream = tf.data.Dataset.range(how.first_update * chunks, np.iinfo(np.int64).max)
    stream = stream.map(tf_read, num_parallel_calls=8, deterministic=True).unbatch()
    stream = stream.map(decode, num_parallel_calls=auto, deterministic=True)
    return stream.batch(plan.local, drop_remainder=True).prefetch(auto)


def validation_batches(
    dataset: DataSet,  # From `open_data`
    image_size: int,  # Side of the pictures, S, pixels
    batch: int,  # Pictures in a batch of this process, B
    *,
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    image_resize: str = "published",  # Or "modern": see `resize`
):  # tf.data.Dataset of (images uint8 (B, S, S, 3), labels int32 (B,), mask float32 (B,))
    "Read every validation picture once, in the order of the files"
    import tensorflow as tf

    check_resize(image_resize)
    ids = validation_ids(dataset.validation_count, batch, shard)

    def read(ids):
        encoded = [read_encoded(dataset, "validation", i)[0] if i >= 0 else b"" for i in ids]
        return np.array(encoded, object)

    def tf_read(ids):
        encoded = tf.numpy_function(read, [ids], tf.string)
        encoded.set_shape([None])
        return encoded

    def decode(encoded):
        image = tf.cond(
            tf.strings.length(encoded) > 0,
            lambda: _tf_validation_picture(encoded, image_size, image_resize),
            lambda: tf.zeros((image_size, image_size, 3), tf.uint8),
        )
        return tf.ensure_shape(image, (image_size, image_size, 3))

    auto = tf.data.experimental.AUTOTUNE
    stream = tf.data.Dataset.from_tensor_slices(ids.reshape(-1)).batch(CHUNK)
    stream = stream.map(tf_read, num_parallel_calls=8, deterministic=True).unbatch()
    stream = stream.map(decode, num_parallel_calls=auto, deterministic=True).batch(batch)
    known = tf.data.Dataset.from_tensor_slices(validation_labels(dataset, ids))
    both = tf.data.Dataset.zip((stream, known))
    return both.map(lambda images, rest: (images, *rest)).prefetch(auto)


def tensorflow_arrays(
    make,  # `training_batches` or `validation_batches`
    *request,  # Its arguments
    **options,  # and options
) -> Iterator[Tuple[np.ndarray, ...]]:  # Its batches, as arrays that are not to be changed
    "Read with TensorFlow's threads for another back end, whose GPU TensorFlow leaves alone"
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow runs already
        tf.config.set_visible_devices([], "GPU")
    threads = tf.data.Options()
    threads.threading.private_threadpool_size = os.cpu_count()  # not the program's
    return make(*request, **options).with_options(threads).as_numpy_iterator()
