"""The device that Keras computes on: its settings, its name, and the type to compute in."""

import os
from importlib.util import find_spec

import keras

from effnet_repro.config import unknown_name
from effnet_repro.data.threads import core_count
from effnet_repro.gpu_ops import add_xla_flags
from effnet_repro.runs import describe_machine

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_OVERRIDE_GLOBAL_THREADPOOL", "1")
if keras.backend.backend() == "jax" and any(map(find_spec, CUDA_PLUGINS)):
    os.environ["XLA_FLAGS"] = add_xla_flags(os.environ.get("XLA_FLAGS", ""))


PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def has_jax_gpu():
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def device_name() -> str:  # e.g. "CPU, 2 cores" or the GPU's name
    "Name the device that the back end computes on"
    if keras.backend.backend() == "jax":
        import jax

        first = jax.devices()[0]
        if first.platform != "cpu":
            return f"{first.device_kind} x {jax.device_count()}"
    else:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            details = tf.config.experimental.get_device_details(gpus[0])
            return f"{details.get('device_name', 'GPU')} x {len(gpus)}"
    return f"CPU, {core_count()} cores"


def environment() -> dict:  # What `environment.json` holds
    "Describe where a number was made"
    return describe_machine(keras.backend.backend(), device_name())


def choose_precision(
    precision: str = "auto",  # "float32", "bfloat16", "float16", or "auto"
) -> str:  # Type to compute in; weights and statistics are float32 in any case
    "Choose the type to compute in; `auto` is bfloat16 on a GPU under JAX, else float32"
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "bfloat16" if has_jax_gpu() else "float32"


def check_backend(backend):
    if backend is not None and backend != keras.backend.backend():
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}. Received: backend={backend!r}. "
            f"Set KERAS_BACKEND={backend} before Python starts, or before the first import of Keras."
        )
