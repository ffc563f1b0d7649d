"""Files of TensorFlow: a SavedModel, which is a folder, and a LiteRT file (.tflite)."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np

from effnet_repro.convert.weights import needed
from effnet_repro.export.archive import ABOUT, append_metadata, read_appended
from effnet_repro.network import run
from effnet_repro.ops import TFOps
from effnet_repro.outside import read_json
from effnet_repro.paths import utf8_path

HINT = "In the project's folder, run: pip install -e '.[keras]'."
EXTRA = "assets.extra"  # The folder of a SavedModel that is its owner's


def _tensorflow(what):
    return needed("tensorflow", what, HINT)


def _module(subject):
    "A module of TensorFlow with the network as its function `logits`, and that function's one signature"
    tf, ops = _tensorflow("This file"), TFOps()
    side, spec = subject.image_size, subject.folded_spec
    module = tf.Module(name="network")
    module.weights = {
        name.replace("/", "."): tf.Variable(value, trainable=False)
        for name, value in subject.folded_arrays.items()
    }

    def logits(images):
        weights = {name: module.weights[name.replace("/", ".")] for name in subject.folded_arrays}
        weights = {name: tf.convert_to_tensor(value) for name, value in weights.items()}
        return {"logits": run(ops, spec, weights, tf.cast(images, "float32"))}

    images = tf.TensorSpec([subject.batch, side, side, 3], tf.uint8, "images")
    module.logits = tf.function(logits, input_signature=[images], autograph=False)
    return module, module.logits.get_concrete_function()


def write_saved_model(subject, path) -> None:
    """Write a `Subject` as a SavedModel."""
    module, signature = _module(subject)
    _tensorflow("A SavedModel").saved_model.save(
        module, utf8_path(path), {"serving_default": signature}
    )
    (Path(path) / EXTRA).mkdir()
    (Path(path) / EXTRA / ABOUT).write_text(
        json.dumps(subject.metadata, indent=1), encoding="utf-8"
    )


def open_saved_model(path) -> Callable:
    """Return a function from images (N, S, S, 3) uint8 to logits, computed by TensorFlow."""
    tf = _tensorflow("Checking a SavedModel")
    signature = tf.saved_model.load(utf8_path(path)).signatures["serving_default"]
    return lambda images: signature(images=tf.constant(images))["logits"].numpy()


def read_saved_metadata(path) -> dict:
    """Return what a SavedModel says of itself."""
    return read_json(Path(path) / EXTRA / ABOUT)


def write_litert(subject, path) -> None:
    """Write a `Subject` as a LiteRT file. What it says of itself is an archive at its end, as LiteRT's labels are."""
    tf = _tensorflow("A LiteRT file")
    module, signature = _module(subject)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([signature], module)
    Path(path).write_bytes(converter.convert())
    labels = "\n".join(subject.class_names) + "\n"
    append_metadata(path, subject.metadata, texts={"labels.txt": labels})


def _litert():
    "LiteRT's own package, or the copy in TensorFlow"
    if find_spec("ai_edge_litert"):
        from ai_edge_litert import interpreter

        return interpreter.Interpreter, "LiteRT"
    tf = _tensorflow("Checking a LiteRT file")
    if not hasattr(tf.lite, "Interpreter"):
        raise ImportError("Checking a LiteRT file needs LiteRT: pip install ai-edge-litert.")
    return tf.lite.Interpreter, f"LiteRT of TensorFlow {tf.__version__}"


def open_litert(path) -> Callable:
    """Return a function from images (N, S, S, 3) uint8 to logits, computed by LiteRT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's copy says that it will move
        interpreter = _litert()[0](model_path=str(path))
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images):
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(given["index"], images.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], np.ascontiguousarray(images))
        interpreter.invoke()
        return interpreter.get_tensor(wanted["index"])

    return call


def read_litert_metadata(path) -> dict:
    """Return what a LiteRT file says of itself."""
    return read_appended(path)


def _tf_version():
    return f"TensorFlow {_tensorflow('A SavedModel').__version__}"


saved_model = SimpleNamespace(
    write=write_saved_model,
    opened=open_saved_model,
    runtime=_tf_version,
    read_metadata=read_saved_metadata,
)
litert = SimpleNamespace(
    write=write_litert,
    opened=open_litert,
    runtime=lambda: _litert()[1],
    read_metadata=read_litert_metadata,
)
