"""The stand-in's programs when they run: what they refuse, their replicas, and several processes."""

import sys

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_standin import ProcessAbort, ReplicasDiverged, install, poprun  # noqa: E402
from ipu_toy import Toy, configure, elements, first, ipu, last, outfeed, sgd  # noqa: E402

tf1 = tf.compat.v1
errors = tf.errors
ONE = np.float32(1.0)


# ---------------------------------------------------------------- refused when running


def test_not_configured(graph):
    with install():
        toy = Toy()
        with toy.session() as s, pytest.raises(
            errors.FailedPreconditionError, match="No device target"
        ):
            s.run(toy.step)


def test_shards_must_divide_the_ipus(graph):
    with install():
        configure(3)
        toy = Toy()
        with toy.session() as s, pytest.raises(errors.InternalError, match="needs to divide"):
            s.run(toy.step)


def test_three_stages_take_four_ipus(graph):
    with install():
        configure(4)
        toy = Toy((first, lambda y: [y + 0.0], last), ga=6)
        with toy.session() as s:
            s.run(toy.step)
        assert ipu_standin.machine().programs[0].replicas == 1


def test_more_ipus_than_there_are(graph):
    with install(ipus=2):
        configure(4)
        toy = Toy()
        with toy.session() as s, pytest.raises(
            errors.InvalidArgumentError, match="No device matches"
        ):
            s.run(toy.step)


def test_variable_on_two_ipus(graph):
    def again(y):
        with tf1.variable_scope("", reuse=True):
            w = tf1.get_variable("w", [1])
        return [tf.reduce_sum(y * w)]

    with install():
        configure(2)
        toy = Toy((first, again))
        with toy.session() as s, pytest.raises(errors.UnimplementedError, match="same IPU"):
            s.run(toy.step)
    with tf.Graph().as_default(), install():
        configure(1)
        sequential = ipu().pipelining_ops.PipelineSchedule.Sequential
        toy = Toy((first, again), device_mapping=[0, 0], pipeline_schedule=sequential)
        with toy.session() as s:
            s.run(toy.step)


def test_two_pipelines_in_one_program(graph):
    with install():
        configure(2)
        pipeline, queues = ipu().pipelining_ops.pipeline, [elements(), elements()]

        def both():
            for i, queue in enumerate(queues):
                with tf1.variable_scope(f"p{i}"):
                    op = pipeline(
                        [first, last],
                        gradient_accumulation_count=4,
                        infeed_queue=queue,
                        outfeed_queue=outfeed(),
                        optimizer_function=sgd,
                    )
            return op

        with ipu().scopes.ipu_scope():
            step = ipu().ipu_compiler.compile(both)
        with tf1.Session() as s, pytest.raises(
            errors.FailedPreconditionError, match="one pipeline"
        ):
            s.run(step)


@pytest.mark.parametrize(
    "mode, schedule",
    [
        ("RecomputeThenBackpropagate", "Sequential"),
        ("RecomputeAndBackpropagateInterleaved", "Interleaved"),
    ],
)
def test_illegal_recomputation(graph, mode, schedule):
    with install():
        configure(2, allow_recompute=True)
        ops = ipu().pipelining_ops
        toy = Toy(
            recomputation_mode=ops.RecomputationMode[mode],
            pipeline_schedule=ops.PipelineSchedule[schedule],
        )
        with toy.session() as s, pytest.raises(errors.UnimplementedError):
            s.run(toy.step)


def test_activations_offloaded_without_remote_buffers(graph):
    with install():
        demand = ipu().config.DeviceConnectionType.ON_DEMAND
        configure(2, device_connection__type=demand)
        toy = Toy(offload_activations=True)
        with toy.session() as s, pytest.raises(
            errors.FailedPreconditionError, match="remote buffers"
        ):
            s.run(toy.step)


def test_not_placed_on_an_ipu(graph):
    with install(), pytest.raises(Exception, match="not placed on an IPU"):
        ipu().ipu_compiler.compile(lambda: tf.no_op())


def test_end_of_the_data_aborts_the_process(graph):
    with install():
        configure(2)
        toy = Toy(n=6)
        with toy.session() as s:
            s.run(toy.step)
            with pytest.raises(ProcessAbort, match="dataset of an infeed has ended"):
                s.run(toy.step)
    assert not issubclass(ProcessAbort, Exception)


def test_infeed_not_initialised_aborts_the_process(graph):
    with install():
        configure(2)
        toy = Toy()
        with tf1.Session() as s:
            s.run(tf1.global_variables_initializer())
            with pytest.raises(ProcessAbort, match="not initialized"):
                s.run(toy.step)


def test_compiling_without_a_device(graph):
    with install():
        kind = ipu().config.DeviceConnectionType.PRE_COMPILE
        with pytest.raises(ValueError, match="version"):
            configure(16, device_connection__type=kind)
        configure(16, device_connection__type=kind, device_connection__version="ipu2")
        toy = Toy()
        with toy.session() as s:
            s.run(toy.step)
            for _ in range(2):  # one element of zeros, every time
                np.testing.assert_array_equal(s.run(toy.report)[0], np.zeros((1, 8)))
            assert toy.weight(s) == 1


# ---------------------------------------------------------------- replicas


def test_forgotten_reduction_over_replicas(graph):
    "The real system lets replicas drift apart; the stand-in says so when asked to look"
    alone = lambda loss: sgd(loss, reduce=False)
    with install():
        configure(4)
        toy = Toy(optimizer_function=alone)
        with toy.session() as s, pytest.raises(ReplicasDiverged, match="w"):
            s.run(toy.step)
    with tf.Graph().as_default(), install(check_divergence=False):
        configure(4)
        toy = Toy(optimizer_function=alone)
        with toy.session() as s:
            s.run(toy.step)
            assert toy.weight(s) == 1 - (0 + 2 + 4 + 6)


def test_collectives(graph):
    with install():
        configure(2)
        ops, queue = ipu().cross_replica_ops, outfeed()
        normalise = sys.modules["tensorflow.compiler.plugin.poplar.ops.gen_poputil_ops"]

        def body(x):
            index = ipu().replication_ops.replication_index()
            total = ops.cross_replica_sum(x)
            mean = ops.cross_replica_mean(total * 0 + x)  # of something made after a collective
            share = normalise.ipu_replication_normalise(x)
            return queue.enqueue([total, mean, share, index])

        feed = elements()
        with ipu().scopes.ipu_scope():
            step = ipu().ipu_compiler.compile(lambda: ipu().loops.repeat(2, body, [], feed))
        report = queue.dequeue()
        with tf1.Session() as s:
            s.run(feed.initializer)
            s.run(step)
            total, mean, share, index = s.run(report)
    np.testing.assert_array_equal(total[..., 0], [[1, 1], [5, 5]])
    np.testing.assert_array_equal(mean[..., 0], [[0.5, 0.5], [2.5, 2.5]])
    np.testing.assert_array_equal(share[..., 0], [[0, 0.5], [1, 1.5]])
    np.testing.assert_array_equal(index, [[0, 1], [0, 1]])


def test_mean_over_replicas_is_missing_in_old_sdks():
    with install("2.2"):
        assert not hasattr(ipu().cross_replica_ops, "cross_replica_mean")
    with install("2.4"):
        assert hasattr(ipu().cross_replica_ops, "cross_replica_mean")


def test_loops(graph):
    with install():
        configure(1)
        with ipu().scopes.ipu_scope():
            (four,) = ipu().ipu_compiler.compile(
                lambda: ipu().loops.repeat(4, lambda x: x + 1.0, [ONE * 0])
            )
            (eight,) = ipu().ipu_compiler.compile(
                lambda: ipu().loops.while_loop(lambda x: x < 8.0, lambda x: x * 2.0, [ONE])
            )
            compile_, repeat = ipu().ipu_compiler.compile, ipu().loops.repeat
            with pytest.raises(ValueError, match="1 tensors for 0 inputs"):
                compile_(lambda: repeat(2, lambda: ONE))
            with pytest.raises(TypeError, match="cannot be called"):
                compile_(lambda: repeat(2, lambda a, b: a, [ONE]))
            with pytest.raises(TypeError, match="changes a type"):
                compile_(lambda: repeat(2, lambda a: tf.cast(a, tf.float16), [ONE]))
        with tf1.Session() as s:
            assert s.run([four, eight]) == [4.0, 8.0]


# ---------------------------------------------------------------- popdist


def test_popdist_outside_poprun():
    with install():
        popdist = sys.modules["popdist"]
        assert not popdist.isPopdistEnvSet()
        found = popdist.getNumInstances(), popdist.getInstanceIndex(), popdist.getNumTotalReplicas()
        assert found == (1, 0, 1)


def test_instances_reduce_over_all_replicas():
    def instance(index):
        import importlib

        popdist = sys.modules["popdist"]
        host = importlib.import_module("tensorflow.python.ipu.distributed")
        with tf.Graph().as_default():
            config = ipu().config.IPUConfig()
            config = popdist.tensorflow.set_ipu_config(config, ipus_per_replica=2)
            config.configure_ipu_system()
            toy = Toy(ga=4)
            with toy.session() as s:
                s.run(toy.step)
                shared = host.broadcast(tf.constant([float(index)]), root_rank=0)
                total = host.allreduce(tf.constant([float(index)]), "MEAN")
                return toy.weight(s), s.run(toy.report)[0].shape, s.run([shared, total])

    for weight, shape, (shared, mean) in poprun(instance, 2, 2, ipus_per_replica=2):
        assert weight == 1 - 6  # both got the same data here
        assert shape == (4,)  # the axis of replicas counts the local ones
        assert shared == [0.0] and mean == [0.5]
