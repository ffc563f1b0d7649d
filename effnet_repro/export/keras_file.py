"""Files of Keras made of its own layers only: `keras.models.load_model` opens them without this package."""

from typing import Callable

import numpy as np

from effnet_repro.convert.weights import needed
from effnet_repro.export.archive import append_metadata, read_appended
from effnet_repro.export.layers import LayerOps, Tensor
from effnet_repro.network import run

HINT = "In the project's folder, run: pip install -e '.[keras]'."
ABOUT = "effnet_repro/metadata.json"  # Entry of the archive, which Keras does not read


class KerasOps(LayerOps):
    """Words that make Keras' layers. A handle is a Keras tensor, (N, H, W, C) or (N, C)."""

    name = "keras"

    def __init__(self):
        self.keras = needed("keras", "A Keras file", HINT)
        self._count = 0

    def layer(self, kind: str, x, *weights, **options):
        """Apply a new layer to a Keras tensor, and set its weights."""
        self._count += 1
        make = getattr(self.keras.layers, kind)
        layer = make(**options, name=f"{kind.lower()}_{self._count}", dtype="float32")
        y = layer(x)
        layer.set_weights([np.asarray(w) for w in weights])
        return y

    def conv_layer(self, linear):
        kernel, bias = linear.kernel, [] if linear.bias is None else [linear.bias]
        *sides, per_group, filters = kernel.shape
        x, channels = linear.x.handle, linear.x.shape[-1]
        given = {"kernel_size": sides, "strides": linear.strides, "padding": "same"}
        given["use_bias"] = bool(bias)
        if per_group == 1 and filters == channels:
            return self.layer("DepthwiseConv2D", x, kernel.transpose(0, 1, 3, 2), *bias, **given)
        groups = channels // per_group
        return self.layer("Conv2D", x, kernel, *bias, filters=filters, groups=groups, **given)

    def dense_layer(self, linear):
        kernel, bias = linear.kernel, [] if linear.bias is None else [linear.bias]
        options = {"units": kernel.shape[-1], "use_bias": bool(bias)}
        return self.layer("Dense", linear.x.handle, kernel, *bias, **options)

    def scale_shift(self, x, scale, shift):
        zeros, ones = (np.full(x.shape[-1], value, "float32") for value in (0, 1))
        scale, shift = ones if scale is None else scale, zeros if shift is None else shift
        frozen = dict(epsilon=0.0, trainable=False)
        return self.layer("BatchNormalization", x.handle, scale, shift, zeros, ones, **frozen)

    def group_norm(self, x, groups, epsilon):
        _, h, w, c = x.shape
        own = dict(groups=groups, epsilon=epsilon, center=False, scale=False)
        if groups == 1:
            return self.layer("GroupNormalization", x.handle, **own)
        y = self.layer("Reshape", x.handle, target_shape=(h, w, c // groups, groups))  # strided
        return self.layer(
            "Reshape", self.layer("GroupNormalization", y, **own), target_shape=(h, w, c)
        )

    def add(self, x, y):
        return self.layer("Add", [x.handle, y.handle])

    def multiply(self, x, gate):
        gate = self.layer("Reshape", gate.handle, target_shape=(1, 1, x.shape[-1]))
        return self.layer("Multiply", [x.handle, gate])

    def sigmoid_layer(self, x):
        return self.layer("Activation", x.handle, activation="sigmoid")

    def swish_layer(self, x):
        return self.layer("Activation", x.handle, activation="silu")

    def mean_of_pixels(self, x):
        return self.layer("GlobalAveragePooling2D", x.handle)


def keras_model(subject):
    """Return a `keras.Model` of a `Subject`: images (N, S, S, 3) uint8 to logits (N, classes) float32."""
    ops, side = KerasOps(), subject.image_size
    given = {"batch_size": subject.batch, "dtype": "uint8", "name": "images"}
    images = ops.keras.Input((side, side, 3), **given)
    x = Tensor(ops, (None, side, side, 3), ops.layer("Rescaling", images, scale=1.0))
    logits = run(ops, subject.folded_spec, subject.folded_arrays, x)
    name = subject.spec.name.replace("/", "_")
    return ops.keras.Model(images, logits.handle, name=name)


def write(subject, path) -> None:
    """Write a `Subject` as a Keras file."""
    keras_model(subject).save(str(path))
    append_metadata(path, subject.metadata, ABOUT)


def opened(path) -> Callable:
    """Return a function from images (N, S, S, 3) uint8 to logits, computed by Keras."""
    keras = needed("keras", "Checking a Keras file", HINT)
    model = keras.models.load_model(str(path), compile=False)
    return lambda images: keras.ops.convert_to_numpy(model(images, training=False))


def runtime() -> str:
    """Return the name and version of the program that opens these files."""
    keras = needed("keras", "Checking a Keras file", HINT)
    return f"Keras {keras.__version__} on {keras.backend.backend()}"


def read_metadata(path) -> dict:
    """Return what a file says of itself."""
    return read_appended(path, ABOUT)
