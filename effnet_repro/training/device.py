"""The device that Keras computes on: its settings, its name, and the type to compute in.

Nothing is set when this module is imported. `configure` sets what a framework reads once, when it first uses the
device; commands, run notebooks, `train`, `finetune` and `validate` call it before that.
"""

import contextlib
import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Callable, List, Optional, Tuple

import keras

from effnet_repro.config import unknown_name
from effnet_repro.data.threads import core_count
from effnet_repro.kernels.ops import add_xla_flags
from effnet_repro.runs import describe_machine

LOG = logging.getLogger(__name__)
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def tensorflow_runs() -> bool:
    """Return whether TensorFlow has begun to use its devices; imports nothing."""
    module = sys.modules.get("tensorflow.python.eager.context")
    context = module and module.context_safe()
    return getattr(context, "_context_handle", None) is not None


def jax_runs() -> bool:
    """Return whether JAX has begun to use its devices; imports nothing."""
    module = sys.modules.get("jax._src.xla_bridge")
    return bool(module) and module.backends_are_initialized()


@dataclass(frozen=True)
class Setting:
    """Something that a framework reads once, when it first uses the device."""

    name: str  # As a message names it
    effect: str  # What is lost without it: the end of "without it, ..."
    holds: Callable[[], bool]  # Whether it is set already, by the user or by us
    make: Callable[[], None]  # Sets it, for this process and those that it starts
    late: Callable[[], bool]  # Whether the framework has read it already


def variable(name: str, value: str, effect: str, late: Callable[[], bool]) -> Setting:
    """Return the setting of an environment variable; a value that the user gave stays."""
    return Setting(
        f"{name}={value}",
        effect,
        lambda: name in os.environ,
        lambda: os.environ.update({name: value}),
        late,
    )


def _xla_flags() -> Setting:
    given = lambda: os.environ.get("XLA_FLAGS", "")
    return Setting(
        f"XLA_FLAGS={add_xla_flags()}",
        "JAX multiplies matrices more slowly on this GPU",
        lambda: add_xla_flags(given()) == given(),
        lambda: os.environ.update(XLA_FLAGS=add_xla_flags(given())),
        jax_runs,
    )


def settings() -> List[Setting]:
    """Return what `configure` sets for the running backend, in order.

    The two variables of TensorFlow are set whichever backend Keras has: TensorFlow may read images for JAX.
    """
    threads, pool = "TF_NUM_INTEROP_THREADS", "TF_OVERRIDE_GLOBAL_THREADPOOL"
    found = [
        variable(threads, "1", "two runs may differ in their last bits", tensorflow_runs),
        variable(pool, "1", "networks are applied to images on fewer cores", tensorflow_runs),
    ]
    if keras.backend.backend() == "jax" and any(map(find_spec, CUDA_PLUGINS)):
        found.append(_xla_flags())
    return found


def configure(
    backend: Optional[str] = None,  # "tensorflow" or "jax"; refused when Keras runs on the other
) -> Tuple[str, ...]:  # Names of the settings that came too late, each told in a warning once
    """Set what TensorFlow and JAX read when they first use the device. Call it before that.

    A value that is set already stays. Called again, it changes nothing.
    """
    check_backend(backend)
    missing = [setting for setting in settings() if not setting.holds()]
    late = [setting for setting in missing if setting.late()]
    for setting in missing:
        setting.make()
    for setting in late:
        LOG.warning(
            "%s comes too late, the device is in use already: %s. Call "
            "effnet_repro.training.configure() before anything is computed.",
            setting.name,
            setting.effect,
        )
    return tuple(setting.name for setting in late)


def has_jax_gpu() -> bool:
    """Return whether Keras computes with JAX on a GPU."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def is_tensorflow_cpu() -> bool:
    """Return whether Keras computes with TensorFlow on a CPU."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def has_other_processes() -> bool:
    """Return whether Keras computes with JAX in one of several processes that joined each other."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.process_count() > 1


def device_name() -> str:  # e.g. "CPU, 2 cores" or the GPU's name
    "Name the device that the backend computes on"
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


def _computes_float16() -> bool:
    "Whether the backend has every operation in float16 here"
    return not is_tensorflow_cpu()


@contextlib.contextmanager
def plain_keras():  # A context
    """Let Keras make float32 and NHWC within, whatever the user's keras.json asks of new layers and optimizers.

    The precision of a run is its own: see `choose_precision`.
    """
    config = keras.config
    before = config.floatx(), config.image_data_format(), config.epsilon()
    try:
        config.set_floatx("float32")
        config.set_image_data_format("channels_last")
        config.set_epsilon(1e-7)
        yield
    finally:
        config.set_floatx(before[0])
        config.set_image_data_format(before[1])
        config.set_epsilon(before[2])


def choose_precision(
    precision: str = "auto",  # "float32", "bfloat16", "float16", or "auto"
) -> str:  # Type to compute in; weights and statistics are float32 in any case
    """Return the type to compute in; `auto` is bfloat16 on a GPU under JAX, else float32.

    ValueError for an unknown name.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "float16" and not _computes_float16():
        raise ValueError(
            "precision float16 needs a GPU where TensorFlow computes: its group convolutions have no float16 on a "
            "CPU. Use float32, or the backend jax."
        )
    if precision != "auto":
        return precision
    return "bfloat16" if has_jax_gpu() else "float32"


def check_backend(backend: Optional[str]) -> None:
    """Raise ValueError when Keras runs on another backend than `backend`; None is any."""
    if backend is not None and backend != keras.backend.backend():
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}. Received: backend={backend!r}. "
            f"Set KERAS_BACKEND={backend} before Python starts, or before the first import of Keras."
        )
