"""What `ipu.pipelining_ops` takes: its enumerations and classes of options, and the checks of every argument."""

import enum
import inspect

import numpy as np
import tensorflow as tf

from .machine import machine

tf1 = tf.compat.v1


class PipelineSchedule(enum.IntEnum):
    Grouped, Interleaved, Sequential = range(3)


class RecomputationMode(enum.Enum):
    Auto = "Auto"
    RecomputeThenBackpropagate = "RecomputeThenBackpropagate"
    RecomputeAndBackpropagateInterleaved = "RecomputeAndBackpropagateInterleaved"


class GradientAccumulationReductionMethod(enum.Enum):
    SUM, MEAN, RUNNING_MEAN = range(3)

    @classmethod
    def parse(cls, value):
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        raise ValueError(f"Cannot parse {value} as one of GradientAccumulationReductionMethod")


def _options(**given):
    for name, value in given.items():
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{name} must be a dictionary")
        for k, v in (value or {}).items():
            if not isinstance(k, str) or not isinstance(v, str):
                raise TypeError(f"{name}[{k!r}] = {v!r}: bad argument type for a string field")
    return {k: dict(v or {}) for k, v in given.items()}


class _StageOptions:
    def get_proto(self):
        return self.values

    def __eq__(self, other):
        return type(self) is type(other) and self.values == other.values


def make_stage_options(at_least):
    if at_least("2.4"):

        class PipelineStageOptions(_StageOptions):
            def __init__(self, convolution_options=None, matmul_options=None, slice_options=None):
                self.values = _options(
                    convolution_options=convolution_options,
                    matmul_options=matmul_options,
                    slice_options=slice_options,
                )
    else:

        class PipelineStageOptions(_StageOptions):
            def __init__(self, convolution_options=None, matmul_options=None):
                self.values = _options(
                    convolution_options=convolution_options, matmul_options=matmul_options
                )

    return PipelineStageOptions


class OptimizerFunctionOutput:
    def __init__(
        self,
        opt,
        loss,
        compute_gradients_args=None,
        compute_gradients_kwargs=None,
        apply_gradients_args=None,
        apply_gradients_kwargs=None,
        variables=None,
        tape=None,
    ):
        if not isinstance(opt, tf1.train.Optimizer):
            raise TypeError("OptimizerFunctionOutput.opt must be a TensorFlow optimizer instance")
        if not isinstance(loss, tf.Tensor):
            raise TypeError("OptimizerFunctionOutput.loss must be a TensorFlow Tensor")
        for args in (compute_gradients_args, apply_gradients_args):
            if args is not None and not isinstance(args, tuple):
                raise TypeError("OptimizerFunctionOutput: args must be a tuple")
        for kwargs in (compute_gradients_kwargs, apply_gradients_kwargs):
            if kwargs is not None and not isinstance(kwargs, dict):
                raise TypeError("OptimizerFunctionOutput: kwargs must be a dictionary")
        if variables and not machine().at_least("3.0"):
            raise ValueError("OptimizerFunctionOutput.tape: variables must be empty")  # trap 2
        if variables or tape is not None:
            raise ValueError("variables and tape are for OptimizerV2 only")
        self.opt, self.loss = opt, loss
        self.compute = (compute_gradients_args or (), compute_gradients_kwargs or {})
        self.apply = (apply_gradients_args or (), apply_gradients_kwargs or {})


def recomputation_checkpoint(tensors, name=None):
    return tf.nest.map_structure(tf.identity, tensors)


# Keyword -> (default, first SDK that has it), in the order of SDK 3.4
ARGUMENTS = {
    "computational_stages": (inspect.Parameter.empty, "2.1"),
    "gradient_accumulation_count": (None, "2.1"),
    "gradient_accumulation_dtype": (None, "2.1"),
    "gradient_accumulation_for_captured_grads": (True, "3.0"),
    "repeat_count": (1, "2.1"),
    "batch_serialization_iterations": (1, "2.1"),
    "inputs": (None, "2.1"),
    "infeed_queue": (None, "2.1"),
    "outfeed_queue": (None, "2.1"),
    "optimizer_function": (None, "2.1"),
    "device_mapping": (None, "2.1"),
    "pipeline_schedule": (None, "2.1"),
    "recomputation_mode": (None, "2.1"),
    "forward_propagation_stages_poplar_options": (None, "2.1"),
    "backward_propagation_stages_poplar_options": (None, "2.1"),
    "weight_update_poplar_options": (None, "2.1"),
    "offload_weight_update_variables": (None, "2.1"),
    "replicated_optimizer_state_sharding": (False, "2.1"),
    "offload_activations": (None, "2.1"),
    "offload_gradient_accumulation_buffers": (None, "2.1"),
    "replicated_weight_sharding": (None, "2.1"),
    "offload_weights": (None, "2.1"),
    "continuous_weight_updates": (False, "2.1"),
    "outfeed_loss": (False, "2.1"),
    "accumulate_outfeed": (False, "2.1"),
    "accumulate_outfeed_dtype": (None, "2.1"),
    "outfeed_mask": (None, "2.2"),
    "reduction_method": (GradientAccumulationReductionMethod.SUM, "2.5"),
    "name": (None, "2.1"),
}


def check_arguments(a, infeed_class, outfeed_class, options_class):
    stages, count = a["computational_stages"], a["gradient_accumulation_count"]
    if count is None or (not machine().at_least("2.4") and not count):
        raise ValueError("gradient_accumulation_count must be specified")
    if isinstance(count, (int, np.integer)) and not 0 <= count < 2**31:
        raise ValueError("gradient_accumulation_count must be in [0, 2**31)")
    if not isinstance(stages, (list, tuple)):
        raise TypeError("computational_stages must be a list or tuple")
    if len(stages) < 2:
        raise ValueError("Pipeline requires at least two computational stages.")
    if a["device_mapping"] is not None and not isinstance(a["device_mapping"], (list, tuple)):
        raise TypeError("device_mapping must be a list or tuple")
    batched = a["batch_serialization_iterations"] > 1
    mapping = list(a["device_mapping"] or ([0] * len(stages) if batched else range(len(stages))))
    if len(mapping) != len(stages):
        raise ValueError(
            f"Each stage must be mapped to an IPU: {len(mapping)} mappings != {len(stages)} stages"
        )
    if any(isinstance(s, (list, tuple)) for s in stages):
        raise ValueError("Concurrent stages are not in the stand-in, which is stricter here.")
    schedule = a["pipeline_schedule"]
    if schedule is None:
        schedule = PipelineSchedule.Sequential if batched else PipelineSchedule.Grouped
    if not isinstance(schedule, PipelineSchedule):
        raise TypeError("pipeline_schedule must be a PipelineSchedule")
    mode = a["recomputation_mode"]
    if mode is not None and not isinstance(mode, RecomputationMode):
        raise TypeError("recomputation_mode must be a RecomputationMode")
    training = a["optimizer_function"] is not None
    if training and schedule is PipelineSchedule.Interleaved and len(set(mapping)) < len(mapping):
        raise NotImplementedError(
            "The pipelining schedule 'Interleaved' does not support multiple stages on one device."
        )
    if a["continuous_weight_updates"]:
        raise NotImplementedError("Continuous weight updates are not supported.")
    method = a["reduction_method"]
    if training:
        method = GradientAccumulationReductionMethod.parse(method)
    if batched:
        if schedule is not PipelineSchedule.Sequential:
            raise NotImplementedError("Batch serialization is only supported with Sequential.")
        if len(set(mapping)) > 1:
            raise NotImplementedError("Batch serialization is only supported on one IPU.")
        if method is not GradientAccumulationReductionMethod.SUM:
            raise ValueError("Batch serialization requires reduction_method SUM.")
    for name in ("forward_propagation_stages", "backward_propagation_stages"):
        options = a[f"{name}_poplar_options"]
        if options is not None:
            if not isinstance(options, (list, tuple)):
                raise TypeError(f"{name}_poplar_options must be a list or tuple")
            if len(options) != len(stages):
                raise ValueError(f"{name}_poplar_options: {len(options)} for {len(stages)} stages")
            if not all(isinstance(o, options_class) for o in options):
                raise TypeError(f"{name}_poplar_options must hold PipelineStageOptions")
    update_options = a["weight_update_poplar_options"]
    if update_options is not None and not isinstance(update_options, options_class):
        raise TypeError("weight_update_poplar_options must be PipelineStageOptions")
    if a["infeed_queue"] is not None and type(a["infeed_queue"]) is not infeed_class:
        raise TypeError("infeed_queue is not an instance of IPUInfeedQueue")
    if a["outfeed_queue"] is not None and type(a["outfeed_queue"]) is not outfeed_class:
        raise TypeError("outfeed_queue is not an instance of IPUOutfeedQueue")
    if not training and a["outfeed_loss"]:
        raise ValueError("An optimizer_function must be provided when outfeed_loss is True")
    if not training and a["outfeed_mask"]:
        raise ValueError("An optimizer_function must be provided when outfeed_mask is used")
    if a["outfeed_loss"] and a["outfeed_mask"]:
        raise ValueError("Only one of outfeed_loss and outfeed_mask can be set")
    if a["outfeed_loss"] and a["outfeed_queue"] is None:
        raise ValueError("An outfeed_queue must be provided when outfeed_loss is True")
    if a["accumulate_outfeed"]:
        if a["outfeed_queue"] is None:
            raise ValueError("An outfeed_queue must be provided when accumulate_outfeed is True")
        if a["outfeed_queue"].mode.name != "ALL":
            raise ValueError("accumulate_outfeed needs an outfeed in mode ALL")
    if a["replicated_optimizer_state_sharding"] and a["offload_weight_update_variables"] is False:
        raise ValueError("replicated_optimizer_state_sharding: optimizer state must be offloaded")
    return mapping, schedule, method
