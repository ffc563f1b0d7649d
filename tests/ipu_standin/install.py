"""Put the stand-in under the published module names, and take it away again."""

import contextlib
import importlib
import sys
import threading
import types
import unittest.mock

import tensorflow as tf

from . import arguments, norms, pipelining, program, queues
from . import config as config_module
from .machine import Machine, ProcessAbort, World, current, machine, set_machine

tf1 = tf.compat.v1


def _module(name, **values):
    module = types.ModuleType(name)
    module.__dict__.update(values)
    module.__path__ = []
    return module


@contextlib.contextmanager
def ipu_scope(device="/device:IPU:0"):
    m = machine()
    m.device.append(device)
    try:
        with tf1.variable_scope("", use_resource=True):
            yield
    finally:
        m.device.pop()


@contextlib.contextmanager
def _inert(*args, **kwargs):
    yield


def reset_ipu_seed(
    seed, device="/device:IPU:0", cpu_device="cpu", experimental_identical_replicas=False
):
    machine().seed = (seed, experimental_identical_replicas)


def move_variable_initialization_to_cpu(graph=None):
    machine().note("move_variable_initialization_to_cpu")


def get_num_of_ipus_in_device(device="/device:IPU:0"):
    return machine().configured_ipus()


class CrossReplicaOptimizer(tf1.train.Optimizer):
    "Means of the gradients over replicas, then the wrapped optimizer"

    def __init__(self, opt, name="CrossReplicaOptimizer"):
        if not isinstance(opt, tf1.train.Optimizer):
            raise ValueError("CrossReplicaOptimizer only works with Optimizer instances")
        super().__init__(False, name)
        self._opt = opt

    def compute_gradients(self, loss, var_list=None, **kwargs):
        return self._opt.compute_gradients(loss, var_list=var_list, **kwargs)

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        mean = program.cross_replica_mean
        pairs = [(g if g is None else mean(g), v) for g, v in grads_and_vars]
        return self._opt.apply_gradients(pairs, global_step, name)


def _host_collectives():
    "Between instances, on the host"

    def init():
        machine().note("distributed_init")

    def broadcast(value, root_rank=0, tensor_name=None):
        graph_value = tf.convert_to_tensor(value)
        get = lambda v: machine_in_thread().everybody(v)[root_rank]
        owner = machine()

        def machine_in_thread():
            return owner

        out = tf.numpy_function(get, [graph_value], graph_value.dtype)
        out.set_shape(graph_value.shape)
        return out

    def allreduce(value, op=None, tensor_name=None):
        graph_value, owner = tf.convert_to_tensor(value), machine()
        average = op is None or str(op).upper().endswith(("MEAN", "AVERAGE"))

        def reduce(v):
            everybody = owner.everybody(v)
            total = sum(everybody[1:], everybody[0])
            return (total / len(everybody)).astype(v.dtype) if average else total

        out = tf.numpy_function(reduce, [graph_value], graph_value.dtype)
        out.set_shape(graph_value.shape)
        return out

    return dict(init=init, broadcast=broadcast, allreduce=allreduce)


def _popdist():
    get = lambda key, default: lambda: machine().popdist.get(key, default)
    total = get("total_replicas", 1)
    instances = lambda: machine().instances

    def set_ipu_config(config, ipus_per_replica=1, configure_device=True):
        m = machine()
        config.experimental.multi_replica_distribution.process_count = m.instances
        config.experimental.multi_replica_distribution.process_index = m.index
        if configure_device:
            config.select_ipus = 0
        m.note(
            "set_ipu_config", ipus_per_replica=ipus_per_replica, configure_device=configure_device
        )
        return config

    def init():
        machine().popdist_initialised = True

    tensorflow = _module("popdist.tensorflow", set_ipu_config=set_ipu_config)
    return tensorflow, _module(
        "popdist",
        isPopdistEnvSet=lambda: bool(machine().popdist),
        init=init,
        getNumTotalReplicas=total,
        getNumLocalReplicas=lambda: total() // instances(),
        getNumInstances=instances,
        getInstanceIndex=lambda: machine().index,
        getLocalInstanceIndex=lambda: machine().index,
        getNumIpusPerReplica=get("ipus_per_replica", 1),
        getReplicaIndexOffset=lambda: machine().index * (total() // instances()),
        getDeviceId=lambda ipusPerReplica=0: 0,
        tensorflow=tensorflow,
    )


def _modules(sdk):
    "All modules of an SDK by name"
    at_least = Machine(sdk).at_least
    infeed, outfeed = queues.make_infeed_class(at_least), queues.make_outfeed_class(at_least)
    options = arguments.make_stage_options(at_least)
    group_norm, layer_norm, instance_norm = norms.make_norms(at_least)
    base = "tensorflow.python.ipu"
    made = {}

    def add(name, **values):
        made[f"{base}.{name}"] = _module(f"{base}.{name}", **values)

    configs = dict(
        IPUConfig=config_module.IPUConfig,
        DeviceConnectionType=config_module.DeviceConnectionType,
        SchedulingAlgorithm=config_module.SchedulingAlgorithm,
        SelectionOrder=config_module.SelectionOrder,
        MergeRemoteBuffersBehaviour=config_module.MergeRemoteBuffersBehaviour,
        configure_ipu_system=config_module.configure_ipu_system,
        reset_ipu_configuration=config_module.reset_ipu_configuration,
        get_ipu_config=config_module.get_ipu_config,
    )
    if at_least("2.4"):
        configs["StochasticRoundingBehaviour"] = config_module.StochasticRoundingBehaviour
    add("config", **configs)
    add("ipu_compiler", compile=program.compile)
    add("ipu_infeed_queue", IPUInfeedQueue=infeed)
    add("ipu_outfeed_queue", IPUOutfeedQueue=outfeed, IPUOutfeedMode=queues.IPUOutfeedMode)
    add("loops", repeat=program.repeat, while_loop=program.while_loop)
    add(
        "scopes",
        ipu_scope=ipu_scope,
        ipu_shard=_inert,
        stochastic_rounding=_inert,
        partials_type=_inert,
        outside_compilation_scope=_inert,
    )
    add(
        "utils",
        reset_ipu_seed=reset_ipu_seed,
        move_variable_initialization_to_cpu=move_variable_initialization_to_cpu,
        get_num_of_ipus_in_device=get_num_of_ipus_in_device,
        DeviceConnectionType=config_module.DeviceConnectionType,
    )
    pipeline = pipelining.make_pipeline(at_least, infeed, outfeed, options)
    add(
        "pipelining_ops",
        pipeline=pipeline,
        PipelineSchedule=arguments.PipelineSchedule,
        RecomputationMode=arguments.RecomputationMode,
        PipelineStageOptions=options,
        OptimizerFunctionOutput=arguments.OptimizerFunctionOutput,
        recomputation_checkpoint=arguments.recomputation_checkpoint,
    )
    add(
        "normalization_ops",
        group_norm=group_norm,
        layer_norm=layer_norm,
        instance_norm=instance_norm,
    )
    add("nn_ops", swish=norms.swish)
    reductions = dict(cross_replica_sum=program.cross_replica_sum)
    if at_least("2.4"):
        reductions["cross_replica_mean"] = program.cross_replica_mean
    add("cross_replica_ops", **reductions)
    add("replication_ops", replication_index=program.replication_index)
    add("cross_replica_optimizer", CrossReplicaOptimizer=CrossReplicaOptimizer)
    method = arguments.GradientAccumulationReductionMethod
    if at_least("2.6"):
        add("gradient_accumulation", GradientAccumulationReductionMethod=method)
    elif at_least("2.5"):
        add("gradient_accumulation_optimizer", GradientAccumulationReductionMethod=method)
    ipu = _module(base, **{n.rsplit(".", 1)[1]: m for n, m in made.items()})
    ipu.ops = _module(
        f"{base}.ops", pipelining_ops=ipu.pipelining_ops, normalization_ops=ipu.normalization_ops
    )
    made[base], made[f"{base}.ops"] = ipu, ipu.ops
    if at_least("3.0"):  # imported on demand only
        made[f"{base}.distributed"] = _module(f"{base}.distributed", **_host_collectives())
    if not at_least("3.4"):
        made[f"{base}.horovod"] = _module(f"{base}.horovod", **_host_collectives())
    plugin = "tensorflow.compiler.plugin"
    popnn = _module("gen_popnn_ops", popnn_group_norm_training=norms.popnn_group_norm_training)
    poputil = _module("gen_poputil_ops", ipu_replication_normalise=program.replication_normalise)
    ops = _module(f"{plugin}.poplar.ops", gen_popnn_ops=popnn, gen_poputil_ops=poputil)
    poplar = _module(f"{plugin}.poplar", ops=ops)
    made.update({f"{plugin}.poplar.ops.gen_popnn_ops": popnn, f"{plugin}.poplar.ops": ops})
    made[f"{plugin}.poplar.ops.gen_poputil_ops"] = poputil
    made.update({f"{plugin}.poplar": poplar, plugin: _module(plugin, poplar=poplar)})
    made["popdist.tensorflow"], made["popdist"] = _popdist()
    return made


@contextlib.contextmanager
def _under_their_names(sdk):
    made = _modules(sdk)
    python = importlib.import_module("tensorflow.python")
    try:
        with unittest.mock.patch.dict(sys.modules, made):
            with unittest.mock.patch.object(
                python, "ipu", made["tensorflow.python.ipu"], create=True
            ):
                yield
    finally:
        set_machine(None)


@contextlib.contextmanager
def install(sdk="3.4", ipus=16, execute=True, check_divergence=True, shallow=False):
    "Pretend that Graphcore's build and `ipus` IPUs are here; yields the `Machine`"
    if current() is not None:
        raise RuntimeError("A stand-in is installed already.")
    with _under_their_names(sdk), program.patched_sessions():
        set_machine(Machine(sdk, ipus, execute and not shallow, check_divergence, shallow))
        yield current()


def poprun(function, num_instances, num_replicas, ipus_per_replica=1, sdk="3.4", ipus=16):
    "Run `function(index)` as so many instances would, one thread each; returns their results in order"
    world, results, failures = World(num_instances), [None] * num_instances, []

    def one(index):
        popdist = dict(
            total_replicas=num_replicas,
            instances=num_instances,
            index=index,
            ipus_per_replica=ipus_per_replica,
            world=world,
        )
        set_machine(Machine(sdk, ipus // num_instances, popdist=popdist))
        try:
            results[index] = function(index)
        except (Exception, ProcessAbort) as e:
            failures.append(e)
            world.barrier.abort()
        finally:
            set_machine(None)

    with _under_their_names(sdk), program.patched_sessions():
        threads = [threading.Thread(target=one, args=(i,)) for i in range(num_instances)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    if failures:
        raise sorted(failures, key=lambda e: isinstance(e, threading.BrokenBarrierError))[0]
    return results
