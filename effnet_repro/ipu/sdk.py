"""Every call to Graphcore's software: the only module that imports `tensorflow.python.ipu`."""

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict, Tuple

import numpy as np

from effnet_repro.config import unknown_name
from effnet_repro.norms import EPSILON, check_activation, normalise
from effnet_repro.ops import TFOps
from effnet_repro.proxy_norm import half_proxy_statistics, proxy_statistics

LOG = logging.getLogger(__name__)
_INSTALL = (
    "Install Graphcore's TensorFlow wheel (2.6.3, SDK 2.6 to 3.4, Python 3.8) in the SDK's virtual environment, "
    "source the SDK's enable scripts, then `pip install .` in this project's folder: see the page on a POD16. "
    "On a CPU or a GPU leave `device` out."
)


def _has_ipu_folder() -> bool:
    "Whether the installed TensorFlow comes with `tensorflow.python.ipu`, by its files: importing takes seconds"
    if "tensorflow.python.ipu" in sys.modules:
        return True
    spec = importlib.util.find_spec("tensorflow")
    places = spec.submodule_search_locations if spec else None
    return any(os.path.isdir(os.path.join(p, "python", "ipu")) for p in places or ())


def describe_tensorflow() -> str:  # e.g. "TensorFlow 2.21.0, not Graphcore's build"
    """Return which TensorFlow is installed, for messages."""
    if "tensorflow" not in sys.modules and not _has_ipu_folder():
        for name in ("tensorflow", "tensorflow-cpu"):
            with contextlib.suppress(PackageNotFoundError):
                return f"TensorFlow {version(name)}, not Graphcore's build"
    try:
        import tensorflow as tf
    except ModuleNotFoundError as e:
        if e.name == "tensorflow":
            return "no TensorFlow at all"
        return f"a TensorFlow that lacks {e.name}"
    except ImportError as e:  # libpoplar.so: the SDK's enable script was not sourced
        return f"a TensorFlow that cannot be imported ({e})"
    built = "Graphcore's build" if has_graphcore() else "not Graphcore's build"
    return f"TensorFlow {tf.__version__}, {built}"


def has_graphcore_wheel() -> bool:  # Without importing it, which takes seconds
    """Return whether the installed TensorFlow names itself Graphcore's."""
    try:
        return "+gc" in version("tensorflow")
    except PackageNotFoundError:
        return False


def has_graphcore() -> bool:  # Whether programs can be built; an IPU may still be missing
    """Return whether Graphcore's TensorFlow can be imported. It is imported by it, which takes seconds."""
    if not _has_ipu_folder():
        return False
    try:
        importlib.import_module("tensorflow.python.ipu")
    except ImportError:
        return False
    return True


def has_ipu() -> bool:  # Whether Graphcore's `gc-info` lists at least one
    """Return whether this machine has an IPU."""
    lister = shutil.which("gc-info")
    if lister is None:
        return False
    try:
        found = subprocess.run([lister, "-l"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "Id" in found.stdout


def choose_device(
    device: str = "auto",  # "ipu", "keras" or "auto"
) -> str:  # "ipu" or "keras"
    """Choose the runtime: "auto" takes IPUs where there are some; Keras finds CPUs and GPUs itself.

    Warns when there are IPUs that cannot be used. Raises ValueError for an unknown name, and ImportError for "ipu"
    without Graphcore's TensorFlow; the message says what to install.
    """
    if device not in ("auto", "ipu", "keras"):
        raise unknown_name("device", device, ("auto", "ipu", "keras"))
    if device == "ipu":
        Graphcore()  # says what to install
    if device != "auto" or not has_ipu():
        return "keras" if device == "auto" else device
    if has_graphcore():
        return "ipu"
    LOG.warning(
        "There are IPUs here, but they stay unused. Found: %s. %s", describe_tensorflow(), _INSTALL
    )
    return "keras"


class Graphcore:
    """Graphcore's modules, and the process that this is among those that `poprun` started.

    What is installed is looked at, not version numbers: constructors and functions are asked for their parameters. So
    the differences from SDK 2.1 to 3.4 stand in this module. Raises ImportError where Graphcore's TensorFlow is missing
    or older than SDK 2.1.
    """

    def __init__(self):
        if not has_graphcore():
            raise ImportError(
                f"`device` 'ipu' needs Graphcore's TensorFlow. Found: {describe_tensorflow()}. {_INSTALL}"
            )
        import tensorflow as tf
        from tensorflow.python import ipu

        self.tf, self.v1, self.ipu = tf, tf.compat.v1, ipu
        if not hasattr(getattr(ipu, "config", None), "IPUConfig"):
            raise ImportError(
                f"This SDK is too old: it has no IPUConfig, which came with SDK 2.1. Found: "
                f"{describe_tensorflow()}. {_INSTALL}"
            )
        self.popdist, self.shared = self._find_popdist(), {}

    def _find_popdist(self):
        "popdist, when poprun started this process"
        try:
            popdist = importlib.import_module("popdist")
        except ImportError:
            return None
        if not popdist.isPopdistEnvSet():
            return None
        importlib.import_module("popdist.tensorflow")
        if hasattr(popdist, "init"):  # needed from SDK 2.6 on, unknown before
            popdist.init()
        return popdist

    @property
    def instances(self) -> Tuple[int, int]:  # (index of this process, processes)
        if self.popdist is None:
            return 0, 1
        return self.popdist.getInstanceIndex(), self.popdist.getNumInstances()

    def scope(self):  # Operations made inside go to the IPU
        return self.ipu.scopes.ipu_scope("/device:IPU:0")

    def compile(self, function, inputs=()):  # An operation, or the function's outputs
        with self.scope():
            return self.ipu.ipu_compiler.compile(function, inputs=list(inputs))


def _set(config, name, value):
    "Set a field by its dotted name"
    *path, last = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, last, value)


def configure(
    graphcore: Graphcore,  # The SDK
    options: Dict[str, Any],  # From `machine_options`
    per_replica: int,  # IPUs of a replica
):  # The `IPUConfig` that is now in force
    """Fill an `IPUConfig` with `options` and configure the machine; under poprun with the IPUs that it gave."""
    module, options = graphcore.ipu.config, dict(options)
    config = module.IPUConfig()
    rounding = options.pop("floating_point_behaviour.esr")
    if hasattr(module, "StochasticRoundingBehaviour"):  # a plain bool before SDK 2.4
        rounding = module.StochasticRoundingBehaviour.from_bool(rounding)
    options["floating_point_behaviour.esr"] = rounding
    for name, kind in (
        ("device_connection.type", module.DeviceConnectionType),
        ("scheduling.algorithm", module.SchedulingAlgorithm),
    ):
        options[name] = kind[options[name]]
    for name, value in options.items():
        _set(config, name, value)
    if graphcore.popdist is not None:
        settings = dict(ipus_per_replica=per_replica, configure_device=True)
        config = graphcore.popdist.tensorflow.set_ipu_config(config, **settings)
    config.configure_ipu_system()
    return config


def _named(make, name, *args, **kwargs):
    "Call a queue's constructor; SDK 2.1 wants a `feed_name`, later ones ignore or refuse it"
    wanted = inspect.signature(make.__init__).parameters.get("feed_name")
    if wanted is not None and wanted.default is inspect.Parameter.empty:
        kwargs["feed_name"] = name
    return make(*args, **kwargs)


def infeed(
    graphcore,  # `Graphcore`
    dataset,  # `tf.data.Dataset` of micro-batches
    name="infeed",  # Of the queue, where the SDK takes one
):  # IPUInfeedQueue
    """Make the queue that feeds a program."""
    return _named(graphcore.ipu.ipu_infeed_queue.IPUInfeedQueue, name, dataset)


def outfeed(
    graphcore,  # `Graphcore`
    name="outfeed",  # Of the queue, where the SDK takes one
):  # IPUOutfeedQueue that keeps all it is given
    """Make the queue that a program answers in."""
    return _named(graphcore.ipu.ipu_outfeed_queue.IPUOutfeedQueue, name)


def pipeline(
    graphcore: Graphcore,  # The SDK
    stages,  # Callables
    optimizer_function,  # Of the last stage's outputs; returns (optimizer, loss)
    inputs,  # Tensors that stay the same for a program run
    infeed_queue,
    outfeed_queue,
    options: Dict[str, Any],  # From `pipeline_options`
):  # An operation
    """Call `pipelining_ops.pipeline`, by keyword only, since positions move between SDKs."""
    ops, options = graphcore.ipu.pipelining_ops, dict(options)
    options["pipeline_schedule"] = ops.PipelineSchedule[options["pipeline_schedule"]]
    memory = options.pop("stage_memory", None)
    if memory:
        share = lambda v: {"availableMemoryProportion": str(v)}
        own = [ops.PipelineStageOptions(share(conv), share(matmul)) for conv, matmul in memory]
        options["forward_propagation_stages_poplar_options"] = own
        options["backward_propagation_stages_poplar_options"] = own
    output = lambda *outs: ops.OptimizerFunctionOutput(*optimizer_function(*outs))
    queues = dict(infeed_queue=infeed_queue, outfeed_queue=outfeed_queue)
    return ops.pipeline(stages, inputs=inputs, optimizer_function=output, **queues, **options)


def host_collectives(graphcore):
    """Return Graphcore's module with `broadcast` between processes, which moved in SDK 3.0.

    Raises ImportError without one.
    """
    for name in ("distributed", "horovod"):  # since SDK 3.0, and before
        try:
            module = importlib.import_module(f"tensorflow.python.ipu.{name}")
        except ImportError:
            continue
        if hasattr(module, "init"):
            module.init()
        return module
    raise ImportError(f"No host collectives in this SDK. Found: {describe_tensorflow()}.")


class IPUOps(TFOps):
    """The operations on an IPU: TensorFlow's, with PopLibs' norm and swish.

    PopLibs has one operation for statistics, normalizing and affine, with strided groups: channel c belongs to group
    c mod G, as in `group_statistics`. The activation and the proxy follow in the type of the activations.
    """

    def __init__(
        self,
        graphcore: Graphcore,
        compute: str = "float32",  # Type of activations; with float16 the proxies are in float16, too
    ):
        super().__init__()
        self.compute = compute
        self.swish = graphcore.ipu.nn_ops.swish
        popnn = importlib.import_module("tensorflow.compiler.plugin.poplar.ops.gen_popnn_ops")
        self.group_norm = popnn.popnn_group_norm_training


@normalise.register(IPUOps)
def _ipu_normalise(
    ops, x, gamma=None, beta=None, norm_groups=1, statistics=None, activation=None, proxy=None
):
    if statistics is not None:  # batch norm, at inference
        return normalise(TFOps(), x, gamma, beta, 1, statistics, activation, proxy)
    check_activation(activation)
    kind, channels = ops.dtype(x), ops.shape(x)[-1]
    gamma = ops.const(np.ones(channels), kind) if gamma is None else ops.cast(gamma, kind)
    beta = ops.const(np.zeros(channels), kind) if beta is None else ops.cast(beta, kind)
    y, _, _ = ops.group_norm(
        inputs=x,
        gamma=gamma,
        beta=beta,
        data_format="NHWC",
        epsilon=EPSILON,
        num_groups=norm_groups,
        strided_channel_grouping=True,
    )
    y = ops.swish(y) if activation == "swish" else y
    if proxy is not None:
        mean, inv_std = proxy
        y = y - ops.cast(mean, kind)
        y = y if inv_std is None else y * ops.cast(inv_std, kind)
    return y


@proxy_statistics.register(IPUOps)
def _ipu_proxy_statistics(ops, gamma, beta, gamma_prime, beta_prime):
    half = ops.compute == "float16"
    own = half_proxy_statistics if half else proxy_statistics.dispatch(TFOps)
    return own(ops, gamma, beta, gamma_prime, beta_prime)
