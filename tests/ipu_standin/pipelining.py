"""`ipu.pipelining_ops`: stages traced once, micro-batches driven one after the other."""

import enum
import inspect
import warnings

import numpy as np
import tensorflow as tf

from .machine import machine
from .program import ancestors, check_same, is_write

tf1 = tf.compat.v1
errors = tf.errors


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


def make_pipeline(at_least, infeed_class, outfeed_class, options_class):
    kinds = inspect.Parameter
    parameters = [
        kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=d)
        for n, (d, since) in ARGUMENTS.items()
        if at_least(since)
    ]
    signature = inspect.Signature(parameters)
    defaults = {n: d for n, (d, _) in ARGUMENTS.items()}

    def pipeline(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)  # TypeError, as Python's own
        given = {**defaults, **bound.arguments}
        return Pipeline(given, infeed_class, outfeed_class, options_class).op

    pipeline.__signature__ = signature
    return pipeline


def _check_arguments(a, infeed_class, outfeed_class, options_class):
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


def _as_inputs(values):
    "As `convert_n_to_tensor` does between stages: nested lists are stacked, None and dict refused"
    out = []
    for v in values:
        if v is None or isinstance(v, dict):
            raise ValueError(f"Attempt to convert a value ({v!r}) to a Tensor.")
        if isinstance(v, (list, tuple)):
            v = tf.stack([tf.convert_to_tensor(x) for x in v])
        out.append(tf.identity(v))
    return out


def _as_outputs(result):
    if result is None:
        return []
    out = []
    for v in result if isinstance(result, (list, tuple)) else [result]:
        if not (v is None or isinstance(v, (dict, list, tuple, tf.Tensor))):
            try:
                v = tf.convert_to_tensor(v)
            except (TypeError, ValueError):
                raise TypeError(
                    "To be compatible with tf.function, Python functions must return zero or more "
                    f"Tensors; found return value of type {type(v)}"
                ) from None
        out.append(v)
    return out


class Pipeline:
    "One pipeline: built at once, run by its program"

    def __init__(self, a, infeed_class, outfeed_class, options_class):
        m = machine()
        self.mapping, self.schedule, self.method = _check_arguments(
            a, infeed_class, outfeed_class, options_class
        )
        self.program, self.a = m.building, a
        if self.program is None:
            raise RuntimeError("pipeline() outside ipu_compiler.compile() is not in the stand-in.")
        m.note("pipeline", **a, schedule=self.schedule, mapping=self.mapping, pipeline=self)
        self.stages, self.op = len(self.mapping), self.program.op
        self.program.phase = "stages"
        outputs = self._trace(a["computational_stages"])
        self.program.phase = "apply"
        self.training = a["optimizer_function"] is not None
        loss = self._optimize(outputs) if self.training else None
        self.program.phase = "built"
        self._enqueue(outputs, loss)
        self.program.max_device = max(self.mapping)
        self.program.pipelines.append(self)

    # -- building

    def _trace(self, stages):
        graph, a = tf1.get_default_graph(), self.a
        constants = []
        for value in a["inputs"] or []:
            if isinstance(value, tf.Variable):
                warnings.warn("A variable in `inputs` is passed by value", stacklevel=3)
            constants.append(tf.convert_to_tensor(value))
        args, kwargs = list(constants), {}
        if a["infeed_queue"] is not None:
            fed, kwargs = a["infeed_queue"].arguments()
            args += fed
        self.uses = []  # Variables by stage
        keep = {tf1.GraphKeys.GLOBAL_VARIABLES, tf1.GraphKeys.TRAINABLE_VARIABLES}
        keep |= {tf1.GraphKeys.LOCAL_VARIABLES, ("__variable_store",), ("__varscope",)}
        for i, stage in enumerate(stages):
            known = {op.name for op in graph.get_operations()}
            args = _as_inputs(args)
            kwargs = {k: tf.identity(v) for k, v in kwargs.items()}
            entry = {t.op.name for t in [*args, *kwargs.values()]}
            written = {k: list(graph.get_collection_ref(k)) for k in graph.collections}
            args = _as_outputs(stage(*args, **kwargs))
            kwargs = {}
            for k in list(graph.collections):  # a function graph keeps its collections to itself
                if k not in keep and isinstance(k, str):
                    graph.get_collection_ref(k)[:] = written.get(k, [])
            self._look(i, args, known, entry)
        return _as_inputs(args) if args else []

    def _look(self, i, outputs, known, entry):
        "Captures, writes and shapes of a traced stage"
        flat = [t for t in tf.nest.flatten(outputs) if isinstance(t, tf.Tensor)]
        todo, seen, used = [t.op for t in flat], set(), set()
        while todo:
            op = todo.pop()
            if op.name in seen or op.name in entry:
                continue
            seen.add(op.name)
            if op.type == "VarHandleOp":
                used.add(op.name)
            elif op.name in known and op is not self.program.replica.op:
                raise ValueError(
                    f"Trying to capture the tensor {op.outputs[0].name} in stage {i}, which is not a "
                    "resource. It must be passed as either part of the input or infeed_queue."
                )
            else:
                todo += [t.op for t in op.inputs]
        self.uses.append(used)
        graph = tf1.get_default_graph()
        initializers = {v.initializer.name for v in tf1.global_variables()}
        for op in graph.get_operations():
            if op.name not in known and is_write(op) and op.name not in initializers:
                raise RuntimeError(
                    f"Stage {i} writes {op.inputs[0].name}: undefined on hardware, refused here."
                )
        for t in flat:
            if not t.shape.is_fully_defined():
                raise ValueError(f"Stage {i} returns {t.name} of unknown shape {t.shape}.")

    def _optimize(self, outputs):
        a = self.a
        result = a["optimizer_function"](*outputs)
        opt, loss = result.opt, result.loss  # AttributeError when it returned something else
        args, kwargs = result.compute
        if machine().shallow:  # one variable a type and rank, its gradient not taken
            kinds = {(v.dtype, len(v.shape)): v for v in tf1.trainable_variables()}
            pairs = [(tf1.placeholder(v.dtype, v.shape), v) for v in kinds.values()]
        else:
            pairs = opt.compute_gradients(loss, *args, **kwargs)
        self.gradients = [(g, v) for g, v in pairs if g is not None]
        dtype, holes = a["gradient_accumulation_dtype"], []
        self.accumulators = []
        for g, v in pairs:
            if g is None:
                holes.append((None, v))
                continue
            kind = dtype(v) if callable(dtype) and not isinstance(dtype, tf.DType) else dtype
            kind = tf.as_dtype(kind) if kind else v.dtype.base_dtype
            hole = tf1.placeholder(kind, v.shape, name="accumulated")
            self.accumulators.append(hole)
            holes.append((hole, v))
        args, kwargs = result.apply
        self.update = opt.apply_gradients(holes, *args, **kwargs)
        if any(op.type == "IteratorGetNext" for op in ancestors([self.update], True).values()):
            raise ValueError(
                "The update depends on an element of the infeed: which micro-batch it would see is "
                "not established. Pass such values in `inputs`."
            )
        machine().note(
            "optimizer", opt=opt, gradients=self.gradients, accumulators=self.accumulators
        )
        return loss

    def _enqueue(self, outputs, loss):
        a, queue = self.a, self.a["outfeed_queue"]
        self.queue = queue
        if queue is None:
            if outputs:
                raise ValueError(
                    "The last computational stage has tensor outputs: "
                    f"{', '.join(t.name for t in outputs)}, but no outfeed_queue was given."
                )
            self.out = []
            return
        mask = a["outfeed_mask"]
        if mask is not None and len(mask) != len(outputs):
            raise ValueError(f"outfeed_mask has {len(mask)} entries for {len(outputs)} outputs")
        kept = [t for i, t in enumerate(outputs) if not (mask and mask[i])]
        self.out = [loss] if a["outfeed_loss"] else kept
        kinds = [t.dtype for t in self.out]
        dtype = a["accumulate_outfeed_dtype"]
        if a["accumulate_outfeed"] and dtype is not None:
            kinds = [
                tf.as_dtype(
                    dtype(t) if callable(dtype) and not isinstance(dtype, tf.DType) else dtype
                )
                for t in self.out
            ]
        self.out_kinds = [k.as_numpy_dtype for k in kinds]
        fed = [tf.cast(t, k) for t, k in zip(self.out, kinds)]
        queue.enqueue(fed[0] if a["outfeed_loss"] else fed)

    # -- compile time

    @property
    def overlap(self):
        n = self.stages
        grouped = 2 * n if self.training else n
        return {0: grouped, 1: n, 2: 1}[int(self.schedule)]

    def check(self, fail):
        a, config = self.a, machine().config
        devices = {}
        for names, device in zip(self.uses, self.mapping):
            for name in names:
                if devices.setdefault(name, device) != device:
                    raise fail(
                        errors.UnimplementedError,
                        f"The input {name} can only be used by pipeline stages on the same IPU: "
                        "check the device_mapping",
                    )
        mode, recompute = a["recomputation_mode"], config["allow_recompute"]
        illegal = {
            (RecomputationMode.RecomputeThenBackpropagate, PipelineSchedule.Sequential),
            (RecomputationMode.RecomputeAndBackpropagateInterleaved, PipelineSchedule.Interleaved),
        }
        if recompute and (mode, self.schedule) in illegal:
            raise fail(errors.UnimplementedError, f"{mode} is not supported with {self.schedule}")
        count = a["gradient_accumulation_count"]
        if isinstance(count, (int, np.integer)):
            if config["io_tiles.num_io_tiles"] and self.schedule is PipelineSchedule.Grouped:
                least, step = (2 if self.training else 1) * self.stages + 2, 1
            else:
                least, step = self.overlap, self.overlap
            word = "number of iterations" if machine().at_least("2.4") else "pipeline depth"
            if count % step:
                text = (
                    f"The {word} of the pipeline must be a multiple of {step}, but it is {count}."
                )
                raise fail(errors.FailedPreconditionError, text)
            if count < least:
                text = f"The {word} of the pipeline must be at least {least}, but it is {count}."
                raise fail(errors.FailedPreconditionError, text)
        connection = config["device_connection.type"].name
        if a["offload_activations"] and connection != "ALWAYS":
            if not config["device_connection.enable_remote_buffers"]:
                text = "offload_activations needs a target with remote buffers"
                raise fail(errors.FailedPreconditionError, text)

    # -- running

    def _accumulate(self, acc, g, n):
        kind = acc.dtype
        count = int(self.a["gradient_accumulation_count"])
        if self.method is GradientAccumulationReductionMethod.MEAN:
            return acc + (g.astype(kind) * kind.type(1.0 / count))
        if self.method is GradientAccumulationReductionMethod.RUNNING_MEAN:
            return acc * kind.type(n / (n + 1)) + g.astype(kind) * kind.type(1.0 / (n + 1))
        return acc + g.astype(kind)

    def execute(self, run):
        for _ in range(int(self.a["repeat_count"])):
            self._window(run)

    def _window(self, run):
        p, r_local = self.program, self.program.replicas
        count = int(self.a["gradient_accumulation_count"])
        zeros = lambda: [np.zeros(h.shape, h.dtype.as_numpy_dtype) for h in self.accumulators]
        sums = [zeros() if self.training else [] for _ in range(r_local)]
        totals = None
        fetch = [[g for g, _ in self.gradients] if self.training else [], self.out]
        for n in range(count):
            row = []
            for r in range(r_local):
                gradients, out = run(fetch, {p.replica: r})
                sums[r] = [
                    self._accumulate(s, np.asarray(g), n) for s, g in zip(sums[r], gradients)
                ]
                row.append([np.asarray(o, k) for o, k in zip(out, self.out_kinds)] if out else [])
            if self.queue is not None and not self.a["accumulate_outfeed"]:
                self.queue.replicas = r_local
                self.queue.push(row)
            elif self.queue is not None:
                old = totals or [[np.zeros_like(v) for v in values] for values in row]
                totals = [[a + b for a, b in zip(x, y)] for x, y in zip(old, row)]
        if totals is not None:
            self.queue.replicas = r_local
            self.queue.push(totals)
        if self.training:
            self._update(run, sums)

    def _update(self, run, sums):
        p = self.program
        feeds = [dict(zip(self.accumulators, s)) for s in sums]
        reduced = p.reduced(run, feeds)
        if p.machine.check_divergence:
            check_same(p, run, feeds, reduced, self.update)
        run(self.update, {**feeds[0], **reduced})
