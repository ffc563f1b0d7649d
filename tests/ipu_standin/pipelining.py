"""`ipu.pipelining_ops`: stages traced once, micro-batches driven one after the other."""

import inspect
import warnings

import numpy as np
import tensorflow as tf

from .arguments import (
    ARGUMENTS,
    GradientAccumulationReductionMethod,
    PipelineSchedule,
    RecomputationMode,
    check_arguments,
)
from .machine import machine
from .program import ancestors, check_same, is_write

tf1 = tf.compat.v1
errors = tf.errors


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
        self.mapping, self.schedule, self.method = check_arguments(
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
