"""Images on disk, in any of four layouts, become one reproducible stream of 8-bit batches.

A folder: `catalog` (`open_data`) lists it by its layout (`layouts`, `tfrecord`, `cache`), the built-in one is
made by `sample`, and `damage` finds what is broken. An image: `decode` makes pixels of its bytes, `order` says
when it comes and `transforms` how it is cut and resized. A batch: `request` says what is wanted, `readers` hands
that to `tf_reader`, `numpy_reader` or `device`.
"""

from effnet_repro.data.catalog import DataSet, open_data, say_found
from effnet_repro.data.damage import find_damaged
from effnet_repro.data.decode import image_bytes
from effnet_repro.data.decoders import choose_decoder
from effnet_repro.data.device import cut_images, fits_device
from effnet_repro.data.figures import plot_images
from effnet_repro.data.layouts import Split
from effnet_repro.data.numpy_reader import load_arrays
from effnet_repro.data.order import epoch_order, random_bits, random_uniform
from effnet_repro.data.readers import (
    device_batches,
    numpy_batches,
    resident_batches,
    step_images,
    training_batches,
    validation_arrays,
    validation_batches,
)
from effnet_repro.data.sample import sample_set
from effnet_repro.data.tf_reader import tensorflow_arrays
from effnet_repro.data.tfrecord import (
    crc32c,
    make_example,
    parse_example,
    scan_tfrecord,
    write_tfrecords,
)
from effnet_repro.data.transforms import center_crop_box, draw_crops, draw_flips, resize

__all__ = [
    "DataSet",
    "Split",
    "center_crop_box",
    "choose_decoder",
    "crc32c",
    "cut_images",
    "device_batches",
    "draw_crops",
    "draw_flips",
    "epoch_order",
    "find_damaged",
    "fits_device",
    "image_bytes",
    "load_arrays",
    "make_example",
    "numpy_batches",
    "open_data",
    "parse_example",
    "plot_images",
    "random_bits",
    "random_uniform",
    "resident_batches",
    "resize",
    "sample_set",
    "say_found",
    "scan_tfrecord",
    "step_images",
    "tensorflow_arrays",
    "training_batches",
    "validation_arrays",
    "validation_batches",
    "write_tfrecords",
]

array_batches, plot_pictures = numpy_batches, plot_images  # what earlier programs import
