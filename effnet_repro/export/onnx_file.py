"""ONNX files: the network as nodes that ONNX Runtime does well, and the runtime that opens them.

Everything is (N, C, H, W) inside, which its convolutions want; the input is turned once. A layer norm is one
`InstanceNormalization` of the image as a single channel, and what follows it one `BatchNormalization`: two kernels
instead of the dozen and more small ones of a norm that is spelled out.
"""

import json
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from effnet_repro.convert.weights import needed
from effnet_repro.export.layers import LayerOps, Tensor
from effnet_repro.network import run
from effnet_repro.scaling import same_padding

HINT = "In the project's folder, run: pip install -e '.[onnx]'."
OPSET, IR_VERSION = 17, 8  # What ONNX Runtime reads since 1.12, of 2022


class OnnxOps(LayerOps):
    """Words that write nodes of an ONNX graph. A handle is the name of a value, (N, C, H, W)."""

    name = "onnx"

    def __init__(self):
        self.onnx = needed("onnx", "An ONNX file", HINT)
        self.nodes, self.constants, self._names = [], [], {}

    def node(self, kind: str, *inputs, **attributes) -> str:
        """Write a node with one output and return its name; arrays among the inputs become constants."""
        inputs = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, value) -> str:
        """Write a constant and return its name; small equal ones are written once."""
        value = np.ascontiguousarray(value)
        key = value.size < 10_000 and (value.dtype.str, value.shape, value.tobytes())
        if key and key in self._names:
            return self._names[key]
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(value, name))
        return self._names.setdefault(key, name) if key else name

    def conv_layer(self, linear):
        x, (*sides, per_group, _) = linear.x, linear.kernel.shape
        pads = [same_padding(s, k, linear.strides) for s, k in zip(x.shape[1:3], sides)]
        return self._conv(
            linear,
            linear.kernel,
            group=x.shape[-1] // per_group,
            strides=[linear.strides] * 2,
            pads=[begin for begin, _ in pads] + [end for _, end in pads],
        )

    def dense_layer(self, linear):  # (N, C, 1, 1) stays so: the gate is multiplied as it is
        return self._conv(linear, linear.kernel[None, None])

    def _conv(self, linear, kernel, **attributes):
        bias = [] if linear.bias is None else [linear.bias]
        weights = kernel.transpose(3, 2, 0, 1)  # (C', C / groups, k, k)
        shape = list(kernel.shape[:2])
        return self.node("Conv", linear.x.handle, weights, *bias, kernel_shape=shape, **attributes)

    def scale_shift(self, x, scale, shift):
        wide = lambda v: v.reshape(1, -1, 1, 1)
        if shift is None:
            return self.node("Mul", x.handle, wide(scale))
        if scale is None:
            return self.node("Add", x.handle, wide(shift))
        zeros, ones = np.zeros_like(scale), np.ones_like(scale)
        return self.node("BatchNormalization", x.handle, scale, shift, zeros, ones, epsilon=0.0)

    def group_norm(self, x, groups, epsilon):
        _, h, w, c = x.shape
        y = x.handle
        strided = 1 < groups < c  # channel i * groups + g belongs to group g
        if strided:
            y = self.node("Reshape", y, np.array([0, c // groups, groups, h * w]))
            y = self.node("Transpose", y, perm=[0, 2, 1, 3])
        y = self.node("Reshape", y, np.array([0, groups, -1]))
        ones, zeros = np.ones(groups, "float32"), np.zeros(groups, "float32")
        y = self.node("InstanceNormalization", y, ones, zeros, epsilon=epsilon)
        if strided:
            y = self.node("Reshape", y, np.array([0, groups, c // groups, h * w]))
            y = self.node("Transpose", y, perm=[0, 2, 1, 3])
        return self.node("Reshape", y, np.array([0, c, h, w]))

    def add(self, x, y):
        return self.node("Add", x.handle, y.handle)

    def multiply(self, x, gate):
        return self.node("Mul", x.handle, gate.handle)

    def sigmoid_layer(self, x):
        return self.node("Sigmoid", x.handle)

    def swish_layer(self, x):  # the runtime makes one kernel of the two
        return self.node("Mul", x.handle, self.node("Sigmoid", x.handle))

    def mean_of_pixels(self, x):
        return self.node("GlobalAveragePool", x.handle)


def onnx_model(subject):
    """Return the `onnx.ModelProto` of a `Subject`: images (N, S, S, 3) uint8 to logits (N, classes) float32."""
    ops, side, n = OnnxOps(), subject.image_size, subject.batch or "N"
    helper, types = ops.onnx.helper, ops.onnx.TensorProto
    x = ops.node("Transpose", "images", perm=[0, 3, 1, 2])
    x = Tensor(ops, (None, side, side, 3), ops.node("Cast", x, to=types.FLOAT))
    logits = run(ops, subject.folded_spec, subject.folded_arrays, x)
    ops.nodes.append(helper.make_node("Flatten", [logits.handle], ["logits"], "logits"))
    classes = subject.spec.num_classes
    graph = helper.make_graph(
        ops.nodes,
        subject.spec.name,
        [helper.make_tensor_value_info("images", types.UINT8, [n, side, side, 3])],
        [helper.make_tensor_value_info("logits", types.FLOAT, [n, classes])],
        ops.constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    about = dict(producer_name="effnet_repro", ir_version=IR_VERSION, opset_imports=opsets)
    return describe(helper.make_model(graph, **about), subject)


def describe(model, subject):
    """Set the metadata of an `onnx.ModelProto` to that of a `Subject`, and return the model."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    helper = needed("onnx", "An ONNX file", HINT).helper
    helper.set_model_props(model, {key: text(value) for key, value in subject.metadata.items()})
    return model


def write(subject, path) -> None:
    """Write a `Subject` as an ONNX file."""
    path.write_bytes(onnx_model(subject).SerializeToString())


def opened(path, threads: Optional[int] = None) -> Callable:
    """Return a function from images (N, S, S, 3) uint8 to logits, computed by ONNX Runtime on the CPU."""
    ort = needed("onnxruntime", "Checking an ONNX file", HINT)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = ort.InferenceSession(
        Path(path).read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})[0]


def runtime() -> str:
    """Return the name and version of the program that opens these files."""
    return f"ONNX Runtime {needed('onnxruntime', 'Checking an ONNX file', HINT).__version__}"


def read_metadata(path) -> dict:
    """Return what a file says of itself."""
    ort = needed("onnxruntime", "Reading an ONNX file", HINT)
    session = ort.InferenceSession(Path(path).read_bytes(), providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map

    def value(text):
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {key: value(text) for key, text in said.items()}
