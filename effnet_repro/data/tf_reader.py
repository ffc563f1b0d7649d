"""The reader that decodes and resizes with TensorFlow, on all cores.

Python reads files and draws crops, `CHUNK` images a call; everything after that is TensorFlow's operations, which
follow `transforms` bit for bit.
"""

import logging
from typing import Dict, Iterator, Tuple

import numpy as np

from effnet_repro.data.damage import problems
from effnet_repro.data.decode import HINT, read_encoded
from effnet_repro.data.request import TrainRequest, ValidationRequest
from effnet_repro.data.threads import core_count
from effnet_repro.data.transforms import resize

LOG = logging.getLogger(__name__)
_DCT = {"published": "INTEGER_FAST", "modern": "INTEGER_ACCURATE"}
# A JPEG with damage that libjpeg steps over is no error to the other decoders; one that ends too early is.
_AS_OTHERS = dict(channels=3, try_recover_truncated=True, acceptable_fraction=1.0)


CHUNK = 64  # Images read by one call


def _resize(image, size, image_resize):
    "All of an image (H, W, 3) resized, still float32"
    import tensorflow as tf

    centers = image_resize == "modern"
    return tf.raw_ops.ResizeBilinear(images=image[None], size=size, half_pixel_centers=centers)[0]


def _to_bytes(image, image_resize):
    "`_to_bytes` for tensors"
    import tensorflow as tf

    if image_resize == "published":
        return tf.cast(tf.cast(image, tf.float16), tf.uint8)
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def _train_image(encoded, crop, flip, image_size, image_resize):
    "Decode a crop, which leaves out the blocks of a JPEG that it does not need; mirror and resize it"
    import tensorflow as tf

    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.image.decode_and_crop_jpeg(
            encoded, crop, dct_method=_DCT[image_resize], **_AS_OTHERS
        ),
        lambda: tf.image.crop_to_bounding_box(
            tf.io.decode_bmp(encoded, channels=3), crop[0], crop[1], crop[2], crop[3]
        ),
    )
    mirror = lambda image: tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    image = mirror(image) if image_resize == "published" else image
    image = _resize(image, (image_size, image_size), image_resize)
    image = _to_bytes(image, image_resize)
    return image if image_resize == "published" else mirror(image)


def _validation_image(encoded, image_size, image_resize):
    "Decode an image, enlarge or shrink it, and cut out the square"
    import tensorflow as tf

    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, dct_method=_DCT[image_resize], **_AS_OTHERS),
        lambda: tf.io.decode_bmp(encoded, channels=3),
    )
    size, (top, left) = _window(tf.shape(image), image_size, image_resize)
    square = image_size, image_size
    part = lambda x, *place: resize(x, place[:2], place[2:], square, image_resize)
    return tf.cond(  # of 1 x 10,000 pixels only the middle is enlarged, not all of it
        tf.reduce_max(size) > 16 * image_size,
        lambda: tf.numpy_function(part, [image, size[0], size[1], top, left], tf.uint8),
        lambda: _to_bytes(
            _resize(image, size, image_resize)[top : top + image_size, left : left + image_size],
            image_resize,
        ),
    )


def _window(shape, image_size, image_resize):
    "`center_crop_box` for tensors"
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


def _in_chunks(stream, read, shapes):
    "Map NumPy's `read` over a stream and take its chunks apart; `shapes` are (type, shape) of each result"
    import tensorflow as tf

    def call(what):
        found = tf.numpy_function(read, [what], [kind for kind, _ in shapes])
        for tensor, (_, shape) in zip(found, shapes):
            tensor.set_shape(shape)
        return tuple(found)

    return stream.map(call, num_parallel_calls=8, deterministic=True).unbatch()


def training_stream(request: TrainRequest):
    """Return an endless tf.data.Dataset of images (B, S, S, 3) uint8 and labels (B,) int32."""
    import tensorflow as tf

    local, size = request.order.local, request.image_size
    chunks = -(-local // CHUNK)  # in one batch
    how = size, request.image_resize

    def read(k):
        update, chunk = divmod(int(k), chunks)
        some = request.read(update, chunk * CHUNK, min((chunk + 1) * CHUNK, local))
        return (np.array(some.data, object), some.crops, some.flips, some.labels)

    def decode(encoded, crop, flip, label):
        if request.random:
            image = _train_image(encoded, crop, flip, *how)
        else:
            image = _validation_image(encoded, *how)
        return tf.ensure_shape(image, (size, size, 3)), label

    auto = tf.data.experimental.AUTOTUNE
    stream = tf.data.Dataset.range(request.first_update * chunks, np.iinfo(np.int64).max)
    shapes = (tf.string, [None]), (tf.int32, [None, 4]), (tf.bool, [None]), (tf.int32, [None])
    stream = _in_chunks(stream, read, shapes)
    stream = stream.map(decode, num_parallel_calls=auto, deterministic=True)
    return stream.batch(local, drop_remainder=True).prefetch(auto)


def validation_stream(request: ValidationRequest):
    """Return a tf.data.Dataset of images (B, S, S, 3) uint8, labels (B,) int32 and mask (B,) float32."""
    import tensorflow as tf

    ids, size = request.ids, request.image_size
    how = size, request.image_resize

    def read(ids):
        encoded = (
            read_encoded(request.dataset, "validation", i, upright=request.upright)[0]
            if i >= 0
            else b""
            for i in ids
        )
        return (np.array(list(encoded), object),)

    def decode(encoded):
        image = tf.cond(
            tf.strings.length(encoded) > 0,
            lambda: _validation_image(encoded, *how),
            lambda: tf.zeros((size, size, 3), tf.uint8),
        )
        return tf.ensure_shape(image, (size, size, 3))

    auto = tf.data.experimental.AUTOTUNE
    stream = tf.data.Dataset.from_tensor_slices(ids.reshape(-1)).batch(CHUNK)
    stream = _in_chunks(stream, read, ((tf.string, [None]),))
    stream = stream.map(decode, num_parallel_calls=auto, deterministic=True).batch(request.batch)
    known = tf.data.Dataset.from_tensor_slices(request.known(ids))
    both = tf.data.Dataset.zip((stream, known))
    return both.map(lambda images, rest: (images, *rest)).prefetch(auto)


def refused_by_tensorflow(dataset, split: str, numbers=None) -> Dict[int, str]:
    """Return what is wrong with each of these images that TensorFlow cannot decode, although the other decoders may.

    `numbers` are those of the images to look at; None is all of the split.
    """
    import tensorflow as tf

    places = dataset.splits[split]
    numbers = np.arange(len(places.label)) if numbers is None else np.asarray(numbers, int)

    def problem(i):
        encoded, _ = read_encoded(dataset, split, i)
        try:
            if encoded[:3] == b"\xff\xd8\xff":
                tf.io.decode_jpeg(encoded, **_AS_OTHERS)
        except tf.errors.OpError:
            return (
                f"TensorFlow cannot decode image {i} of the {split} split, at byte {places.offset[i]} of "
                f"{places.files[places.file[i]]}, which Pillow can. Use --decoder pillow, too. {HINT}"
            )
        return ""

    return problems(numbers, problem)


def tensorflow_arrays(
    make,  # `training_batches` or `validation_batches`
    *request,  # Its arguments
    **options,  # and options
) -> Iterator[Tuple[np.ndarray, ...]]:  # Its batches, as arrays that are not to be changed
    """Read with TensorFlow's threads for another backend, whose GPU TensorFlow then leaves alone.

    A warning says so where TensorFlow had taken the GPU before.
    """
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        LOG.warning(
            "TensorFlow has used the GPU already: it keeps memory that the other backend lacks."
        )
    threads = tf.data.Options()
    threads.threading.private_threadpool_size = core_count()  # not the program's
    return make(*request, **options).with_options(threads).as_numpy_iterator()
