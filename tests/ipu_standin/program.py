"""Compiled programs: what `ipu_compiler.compile` makes, how it runs, and loops."""

import contextlib

import numpy as np
import tensorflow as tf

from .machine import ReplicasDiverged, current, machine
from .queues import abort

tf1 = tf.compat.v1
errors = tf.errors
WRITES = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp")


def is_write(op):
    return op.type in WRITES or op.type.startswith(("ResourceApply", "ResourceScatter"))


def ancestors(things, control=False):
    "Operations that `things` (tensors or operations) depend on"
    todo = [t if isinstance(t, tf.Operation) else t.op for t in things if t is not None]
    seen = {}
    while todo:
        op = todo.pop()
        if op.name not in seen:
            seen[op.name] = op
            todo += [t.op for t in op.inputs] + (list(op.control_inputs) if control else [])
    return seen


class Program:
    "One compiled computation"

    def __init__(self, m):
        self.machine, self.enqueues, self.collectives = m, [], []
        self.pipelines, self.loops, self.results = [], [], []
        self.op = tf.no_op(name="ipu_program")
        self.replica = tf1.placeholder_with_default(np.int32(0), (), name="replication_index")
        self.phase, self.ran, self.max_device = "build", 0, 0

    def marker(self, tensors):
        return tf.no_op(name="ipu_enqueue")

    # -- what the compiler would refuse

    def check(self):
        "Raise what XLA compilation would raise, before anything runs"
        m = self.machine
        fail = lambda kind, text: kind(None, self.op, text)
        if m.config is None:
            raise fail(
                errors.FailedPreconditionError, "No device target has been configured for device"
            )
        if len(self.pipelines) > 1:
            raise fail(errors.FailedPreconditionError, "Only one pipeline is allowed in a program")
        for pipe in self.pipelines:
            pipe.check(fail)
        ipus, shards = m.configured_ipus(), self.shards
        if ipus % shards:
            text = f"The number of shards needs to divide the number of IPUs: {shards} and {ipus}"
            raise fail(errors.InternalError, text)
        if (ipus // shards) % m.instances:
            raise fail(errors.InternalError, "The processes need to divide the replicas")
        connection = m.config["device_connection.type"].name
        if ipus > m.ipus * m.instances and connection in ("ALWAYS", "ON_DEMAND"):
            text = f"No device matches the requested configuration: {ipus} of {m.ipus} IPUs"
            raise fail(errors.InvalidArgumentError, text)

    @property
    def shards(self):
        return 1 << self.max_device.bit_length()

    @property
    def replicas(self):
        "Of this instance"
        return self.machine.configured_ipus() // self.shards // self.machine.instances

    # -- running

    def execute(self, run):
        "`run(fetches, feed)` runs part of the graph"
        self.check()
        m = self.machine
        if not m.execute:
            raise RuntimeError("This stand-in was installed with execute=False: it only builds.")
        if m.config["device_connection.type"].name == "PRE_COMPILE":
            m.note("compiled_only", program=self)
            for queue in self.enqueues:
                queue.replicas = self.replicas
            return
        if m.config["device_connection.type"].name == "NEVER":
            text = "Device connection NEVER: the program was compiled, and cannot be run"
            raise errors.UnavailableError(None, self.op, text)
        for part in self.pipelines + self.loops:
            part.execute(run)
        self.ran += 1

    def reduced(self, run, feeds):
        "Values of every collective of this program for local replicas fed by `feeds`: {y: array}"
        done, todo = {}, list(self.collectives)
        while todo:
            waiting = {c[1].op.name for c in todo}
            level = [c for c in todo if not waiting & set(ancestors([c[0]]))]
            values = [run([x for x, _, _ in level], {**feed, **done}) for feed in feeds]
            for k, (_, y, group) in enumerate(level):
                done[y] = self._sum([v[k] for v in values], group)
            todo = [c for c in todo if c not in level]
        return done

    def _sum(self, local, group):
        whole = sum(len(v) for v in self.machine.everybody(local)) if group else None
        if group and group != whole:
            raise NotImplementedError("The stand-in reduces over all replicas only.")
        total = None
        for values in self.machine.everybody(local):
            for v in values:
                total = v if total is None else total + v
        return total


def compile(computation, inputs=None):
    m = machine()
    if not m.device or "IPU" not in m.device[-1]:
        raise Exception(
            "A computation has been compiled, however it was not placed on an IPU device."
        )
    if m.building is not None:
        raise RuntimeError("compile within compile")
    inputs = [tf.convert_to_tensor(i) for i in inputs or []]
    program = m.building = Program(m)
    try:
        outputs = computation(*inputs)
    finally:
        m.building = None
    m.programs.append(program)
    program.graph = tf1.get_default_graph()
    flat = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    flat = [o for o in flat if o is not None and not isinstance(o, tf.Operation)]
    if not flat:
        return program.op
    with tf.control_dependencies([program.op]):
        fetch = [
            tf.numpy_function(lambda i=i: program.results[i], [], o.dtype)
            for i, o in enumerate(flat)
        ]
    return tuple(fetch)


# ---------------------------------------------------------------- loops


class Loop:
    "`loops.repeat` and `loops.while_loop`: a body run by every replica, again and again"

    def __init__(self, program, body, inputs, infeed_queue, count=None, condition=None):
        self.program, self.count = program, count
        self.carried = [tf.convert_to_tensor(i) for i in inputs or []]
        self.holes = [tf1.placeholder(t.dtype, t.shape) for t in self.carried]
        args, kwargs = infeed_queue.arguments() if infeed_queue is not None else ((), {})
        self.element = tf.nest.flatten([args, kwargs])
        try:
            outputs = body(*self.holes, *args, **kwargs)
        except TypeError as e:
            if "argument" in str(e):
                raise TypeError(
                    f"Supplied loop body function cannot be called with these: {e}"
                ) from e
            raise
        flat = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        flat = [o for o in flat if o is not None]
        tensors = [o for o in flat if not isinstance(o, tf.Operation)]
        if any(
            isinstance(a, tf.Operation) and not isinstance(b, tf.Operation)
            for a, b in zip(flat, flat[1:])
        ):
            raise ValueError("loop body: tensors must precede operations")
        if len(tensors) != len(self.carried):
            raise ValueError(
                f"loop body returns {len(tensors)} tensors for {len(self.carried)} inputs"
            )
        self.next = [tf.convert_to_tensor(t) for t in tensors]
        for a, b in zip(self.carried, self.next):
            if a.dtype != b.dtype:
                raise TypeError(f"loop body changes a type from {a.dtype} to {b.dtype}")
        self.condition = condition(*self.holes) if condition else None
        self.queues = list(program.enqueues)
        program.loops.append(self)

    def execute(self, run):
        p, done = self.program, 0
        state = [run(self.carried, {})] * p.replicas if self.carried else [[]] * p.replicas
        fetch = [self.next, [tf.nest.flatten(q.structure) for q in self.queues]]
        while self.count is None or done < self.count:
            feeds = [{**dict(zip(self.holes, s)), p.replica: r} for r, s in enumerate(state)]
            if self.condition is not None and not run(self.condition, feeds[0]):
                break
            for feed in feeds:
                feed.update(zip(self.element, run(self.element, {}) if self.element else []))
            sums = p.reduced(run, feeds) if p.collectives else {}
            values = [run(fetch, {**feed, **sums}) for feed in feeds]
            state = [v[0] for v in values]
            for k, queue in enumerate(self.queues):
                queue.replicas = p.replicas
                queue.push([v[1][k] for v in values])
            done += 1
        p.results = state[0]


def repeat(n, body, inputs=None, infeed_queue=None, use_while_v1=True):
    loop = Loop(machine().building, body, inputs, infeed_queue, count=int(n))
    return loop.next or machine().building.op


def while_loop(
    condition, body, inputs=None, infeed_queue=None, maximum_iterations=None, use_while_v1=True
):
    program = machine().building
    loop = Loop(program, body, inputs, infeed_queue, maximum_iterations, condition)
    return loop.next or program.op


# ---------------------------------------------------------------- collectives


def cross_replica_sum(x, replica_group_size=None, name=None):
    x = tf.convert_to_tensor(x)
    program = machine().building
    if program.phase == "stages":
        raise NotImplementedError("The stand-in has no collectives inside pipeline stages.")
    y = tf1.placeholder(x.dtype, x.shape, name="cross_replica_sum")
    program.collectives.append((x, y, replica_group_size))
    machine().note("cross_replica_sum", dtype=x.dtype.name)
    return y


def replicas_constant():
    "1 / the global number of replicas, known when the program runs"
    program = machine().building
    count = lambda: np.float32(1.0 / (program.replicas * program.machine.instances))
    value = tf.numpy_function(count, [], tf.float32)
    value.set_shape(())
    return value


def replication_normalise(x, name=None):
    return x * tf.cast(replicas_constant(), x.dtype)


def cross_replica_mean(x, replica_group_size=None, name=None):
    return replication_normalise(cross_replica_sum(x, replica_group_size))


def replication_index(name=None):
    return machine().building.replica


def _same(a, b):
    "Up to the last bits: a CPU's vector and scalar square roots differ there"
    return np.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)


def check_same(program, run, feeds, sums, update):
    "Would every replica write the same values? Then one copy of the variables is enough."
    below = ancestors([update], control=True)  # in no fixed order: instances compare by name
    writes = [below[name] for name in sorted(below) if is_write(below[name])]
    fetch = [t for op in writes for t in op.inputs if t.dtype != tf.resource]
    names = [op.inputs[0].op.name for op in writes for t in op.inputs if t.dtype != tf.resource]
    first = run(fetch, {**feeds[0], **sums})
    for r, feed in enumerate(feeds[1:], 1):
        for name, a, b in zip(names, first, run(fetch, {**feed, **sums, program.replica: r})):
            if not _same(a, b):
                raise ReplicasDiverged(f"Replicas 0 and {r} would update {name} differently.")
    for i, other in enumerate(program.machine.everybody(first)):
        for name, a, b in zip(names, first, other):
            if not _same(a, b):
                raise ReplicasDiverged(f"Instance {i} would update {name} differently.")


# ---------------------------------------------------------------- sessions


def _programs_below(fetches, programs):
    flat = tf.nest.flatten(fetches)
    things = [f if isinstance(f, (tf.Operation, tf.Tensor)) else None for f in flat]
    below = ancestors([t for t in things if t is not None], control=True)
    return [p for p in programs if below.get(p.op.name) is p.op]


@contextlib.contextmanager
def patched_sessions():
    "`Session.run` that drives programs of this thread's machine first"
    from tensorflow.python.client import session as module

    original, original_init = module.BaseSession.run, module.BaseSession.__init__

    def init(self, target="", graph=None, config=None):
        # Instances are threads here: one that waits at a collective must not hold the others' only thread.
        own = dict(use_per_session_threads=True, inter_op_parallelism_threads=1)
        original_init(self, target, graph, config or tf.compat.v1.ConfigProto(**own))

    def run(self, fetches, feed_dict=None, options=None, run_metadata=None):
        m = current()
        if m is not None and m.programs:
            mine = [p for p in m.programs if p.graph is self.graph]

            def inner(things, feed):
                try:
                    return original(self, things, {**(feed_dict or {}), **feed})
                except errors.OutOfRangeError as e:
                    abort(f"The dataset of an infeed has ended ({e.message[:60]}).")
                except errors.FailedPreconditionError as e:
                    if "iterator" not in e.message:
                        raise
                    abort("An infeed was not initialized.")

            for program in _programs_below(fetches, mine):
                program.execute(inner)
        return original(self, fetches, feed_dict, options, run_metadata)

    module.BaseSession.run, module.BaseSession.__init__ = run, init
    try:
        yield
    finally:
        module.BaseSession.run, module.BaseSession.__init__ = original, original_init
