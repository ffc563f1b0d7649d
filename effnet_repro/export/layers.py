"""The network's vocabulary for programs that keep a network as a list of layers, such as ONNX and Keras.

`LayerOps` is one more implementation of the words of `ops`, so `network.run` writes the very network that it computes
elsewhere: there is no second description that could drift. A word makes a layer instead of a number. Weights are NumPy
arrays, and what is done to them alone is done at once; an affine of a convolution's output goes into its kernel.
"""

from typing import Optional, Tuple

import numpy as np

from effnet_repro.norms import EPSILON, normalise


def _vector(value):
    "A constant of one number for each channel, float32; None stays None"
    return None if value is None else np.asarray(value, "float32").reshape(-1)


class Tensor:
    """What a layer gives: (N, H, W, C), or (N, C) once pixels are pooled away.

    `handle` is what the program calls it; `shape` has None for N.
    """

    __array_ufunc__ = None  # an array on the left leaves the operator to us

    def __init__(self, ops, shape: Tuple, handle):
        self.ops, self.shape, self._handle = ops, tuple(shape), handle

    @property
    def handle(self):
        return self._handle

    def channelwise(self, scale=None, shift=None) -> "Tensor":
        """Return x * scale + shift, constants of one number for each channel; None is 1 and 0."""
        return self.ops.tensor(self.shape, self.ops.scale_shift(self, scale, shift))

    def __add__(self, other):
        if isinstance(other, Tensor):
            return self.ops.tensor(self.shape, self.ops.add(self, other))
        return self.channelwise(None, _vector(other))

    def __sub__(self, other):
        return self.channelwise(None, -_vector(other))

    def __mul__(self, other):
        return self.channelwise(_vector(other))


class Linear(Tensor):
    """A convolution or a dense layer whose weights may still change: it is written when something else reads it.

    `kernel`: (k, k, C / groups, C'), or (C, C') of a dense layer.
    """

    def __init__(self, x: Tensor, kernel, bias=None, strides: int = 1):
        self.x, self.strides = x, strides
        self.kernel, self.bias = np.asarray(kernel, "float32"), _vector(bias)
        sides = [-(-s // strides) for s in x.shape[1:-1]]
        super().__init__(x.ops, (None, *sides, self.kernel.shape[-1]), None)

    @property
    def handle(self):
        if self._handle is None:
            write = self.ops.conv_layer if self.kernel.ndim == 4 else self.ops.dense_layer
            self._handle = write(self)
        return self._handle

    def channelwise(self, scale=None, shift=None):
        if self._handle is not None:
            return super().channelwise(scale, shift)
        wide = lambda v: None if v is None else np.asarray(v, "float64")
        scale, shift, bias = wide(scale), wide(shift), wide(self.bias)
        kernel = self.kernel if scale is None else self.kernel * scale
        bias = bias if bias is None or scale is None else bias * scale
        bias = shift if bias is None else bias if shift is None else bias + shift
        return Linear(self.x, kernel, bias, self.strides)


class LayerOps:
    """The words that the network uses at inference. A program adds the layers that it writes them with.

    Those are: `conv_layer(linear)`, `dense_layer(linear)`, `scale_shift(x, scale, shift)`, `add(x, y)`,
    `multiply(x, gate)`, `swish_layer(x)`, `sigmoid_layer(x)`, `mean_of_pixels(x)`, `group_norm(x, groups, epsilon)`;
    each takes tensors and returns a handle.
    """

    def __getattr__(self, word):
        raise NotImplementedError(
            f"The network uses `{word}`, and exported files have no layer for it."
        )

    def tensor(self, shape, handle) -> Tensor:
        return Tensor(self, shape, handle)

    def shape(self, x):
        return list(x.shape)

    def dtype(self, x):
        return "float32"

    def cast(self, x, dtype):
        return x if isinstance(x, Tensor) else np.asarray(x, dtype)

    def const(self, value, dtype="float32"):
        return np.asarray(value, dtype)

    def rsqrt(self, x):  # Of constants
        return 1 / np.sqrt(np.asarray(x, "float64"))

    def reshape(self, x, shape):  # Of constants, and of a gate: (N, C) to (N, 1, 1, C)
        return x if isinstance(x, Tensor) else np.reshape(x, shape)

    def conv(self, x, kernel, strides=1):
        return Linear(x, kernel, None, strides)

    def matmul(self, x, kernel):
        return Linear(x, kernel)

    def swish(self, x):
        return self.tensor(x.shape, self.swish_layer(x))

    def sigmoid(self, x):
        return self.tensor(x.shape, self.sigmoid_layer(x))

    def pool(self, x):
        return self.tensor((x.shape[0], x.shape[-1]), self.mean_of_pixels(x))

    def affine(self, x, scale, shift=None, activation=None, mean=None, inv_std=None):
        if isinstance(scale, Tensor):  # the gate of squeeze and excite
            return self.tensor(x.shape, self.multiply(x, scale))
        y = x if scale is None and shift is None else x.channelwise(_vector(scale), _vector(shift))
        y = self.swish(y) if activation == "swish" else y
        if mean is None and inv_std is None:
            return y
        mean, inv_std = _vector(mean), _vector(inv_std)
        shift = None if mean is None else -mean if inv_std is None else -mean * inv_std
        return y.channelwise(inv_std, shift)


@normalise.register(LayerOps)
def _normalise(
    ops,
    x,
    gamma=None,
    beta=None,
    norm_groups: int = 1,
    statistics: Optional[tuple] = None,
    activation=None,
    proxy=None,
):
    "Write a batch norm as scale and shift; write another norm as a layer, followed by scale and shift"
    if statistics is not None:
        plain = normalise.dispatch(object)
        return plain(ops, x, gamma, beta, norm_groups, statistics, activation, proxy)
    y = ops.tensor(x.shape, ops.group_norm(x, norm_groups, EPSILON))
    return ops.affine(y, gamma, beta, activation, *(proxy or ()))
