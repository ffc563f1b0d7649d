"""The stand-in keeps to the written contract of Graphcore's interface, sentence by sentence.

`ipu_standin/contract.csv` names for each sentence the test that holds it; the last tests here check
that table. What the contract could not establish stays in it, marked as such.
"""

import csv
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_standin import ProcessAbort, ReplicasDiverged, install, poprun  # noqa: E402

tf1 = tf.compat.v1
errors = tf.errors
HERE = Path(__file__).parent
ONE = np.float32(1.0)


@pytest.fixture
def graph():
    with tf.Graph().as_default() as g:
        yield g


def ipu():
    return sys.modules["tensorflow.python.ipu"]


def configure(ipus=2, **options):
    config = ipu().config.IPUConfig()
    config.auto_select_ipus = ipus
    for name, value in options.items():
        part, *path = name.split("__")
        at = config
        for step in path:
            at, part = getattr(at, part), step
        setattr(at, part, value)
    config.configure_ipu_system()
    return config


def elements(n=64, start=0):
    "A queue of the numbers start, start + 1, ..., each a vector of one"
    values = np.arange(start, start + n, dtype="float32")[:, None]
    return ipu().ipu_infeed_queue.IPUInfeedQueue(tf.data.Dataset.from_tensor_slices(values))


def outfeed(**kwargs):
    return ipu().ipu_outfeed_queue.IPUOutfeedQueue(**kwargs)


def first(x):
    w = tf1.get_variable("w", [1], initializer=tf1.ones_initializer())
    return [x * w]


def last(y):
    return [tf.reduce_sum(y)]


def sgd(loss, rate=1.0, reduce=True):
    "Gradient descent on the mean over replicas"
    opt = tf1.train.GradientDescentOptimizer(rate)
    if reduce:
        opt = ipu().cross_replica_optimizer.CrossReplicaOptimizer(opt)
    return ipu().pipelining_ops.OptimizerFunctionOutput(opt, loss)


class Toy:
    "Loss w * x summed: the gradient of w is the picture itself"

    def __init__(self, stages=(first, last), ga=4, n=64, **options):
        ops = ipu().pipelining_ops
        self.infeed = elements(n)
        self.outfeed = options.pop("outfeed_queue", None) or outfeed()
        given = dict(
            gradient_accumulation_count=ga,
            infeed_queue=self.infeed,
            outfeed_queue=self.outfeed,
            optimizer_function=sgd,
        )
        given.update(options)
        given = {k: v for k, v in given.items() if v is not ...}
        with ipu().scopes.ipu_scope("/device:IPU:0"):
            self.step = ipu().ipu_compiler.compile(lambda: ops.pipeline(list(stages), **given), [])
        self.report = self.outfeed.dequeue() if self.outfeed.enqueued else None
        self.start = [tf1.global_variables_initializer(), self.infeed.initializer]

    def session(self):
        session = tf1.Session()
        session.run(self.start)
        return session

    def weight(self, session):
        return float(session.run(tf1.global_variables()[0])[0])


# ---------------------------------------------------------------- arithmetic


def test_window_sums_gradients_of_frozen_weights(graph):
    with install():
        configure(2)
        toy = Toy(repeat_count=2)
        with toy.session() as s:
            s.run(toy.step)
            assert toy.weight(s) == 1 - (0 + 1 + 2 + 3) - (4 + 5 + 6 + 7)
            losses = s.run(toy.report)[0]
    # four losses with the first weight, four with the second
    np.testing.assert_array_equal(losses, [0, 1, 2, 3, -20, -25, -30, -35])


@pytest.mark.parametrize(
    "method, factor", [("mean", 1 / 4), ("MEAN", 1 / 4), ("running_mean", 1 / 4)]
)
def test_reduction_methods(graph, method, factor):
    with install():
        configure(2)
        toy = Toy(reduction_method=method)
        with toy.session() as s:
            s.run(toy.step)
            assert toy.weight(s) == pytest.approx(1 - 6 * factor)


def test_reduction_method_is_parsed(graph):
    with install():
        configure(2)
        for wrong in ("average", None):
            with pytest.raises(ValueError, match="Cannot parse"):
                Toy(reduction_method=wrong)


def test_elements_go_to_replicas_in_turn(graph):
    with install():
        configure(4)
        toy = Toy()
        with toy.session() as s:
            s.run(toy.step)
            report = s.run(toy.report)[0]
            assert toy.weight(s) == 1 - ((0 + 2 + 4 + 6) + (1 + 3 + 5 + 7)) / 2
    np.testing.assert_array_equal(report, [[0, 1], [2, 3], [4, 5], [6, 7]])


def test_accumulators_have_the_variable_s_type_or_the_given_one(graph):
    def half(x):
        w = tf1.get_variable("w", [1], tf.float16, tf1.ones_initializer())
        return [x * tf.cast(w, tf.float32)]

    with install() as m:
        configure(2)
        for given, found in (
            (None, "float16"),
            (tf.float32, "float32"),
            (lambda v: tf.float32, "float32"),
        ):
            with tf.Graph().as_default():
                Toy((half, last), gradient_accumulation_dtype=given, repeat_count=1)
            assert m.calls["optimizer"][-1]["accumulators"][0].dtype.name == found


def test_inference_needs_a_multiple_of_the_stages(graph):
    with install():
        configure(2)
        toy = Toy(optimizer_function=None, ga=3)
        with toy.session() as s:
            with pytest.raises(errors.FailedPreconditionError, match="multiple of 2, but it is 3"):
                s.run(toy.step)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "schedule, stages, good, bad",
    [
        ("Grouped", 2, 4, 6),
        ("Interleaved", 2, 6, 3),
        ("Sequential", 2, 1, None),
        ("Grouped", 3, 6, 9),
    ],
)
def test_accumulation_count_rule(graph, schedule, stages, good, bad):
    from effnet_repro.pipeline import check_accumulation

    middle = [lambda y: [y + 0.0]] * (stages - 2)
    with install():
        configure(4)
        kind = ipu().pipelining_ops.PipelineSchedule[schedule]
        toy = Toy((first, *middle, last), ga=good, pipeline_schedule=kind)
        with toy.session() as s:
            s.run(toy.step)
        check_accumulation(schedule, stages, good)
        if bad is None:
            return
    with tf.Graph().as_default(), install():
        configure(4)
        kind = ipu().pipelining_ops.PipelineSchedule[schedule]
        toy = Toy((first, *middle, last), ga=bad, pipeline_schedule=kind)  # builds
        with toy.session() as s:
            with pytest.raises(errors.FailedPreconditionError, match=f"but it is {bad}"):
                s.run(toy.step)
        with pytest.raises(ValueError, match="FailedPreconditionError"):
            check_accumulation(schedule, stages, bad)


def test_accumulation_below_the_overlap(graph):
    with install():
        configure(2)
        toy = Toy(ga=0)
        with toy.session() as s:
            with pytest.raises(errors.FailedPreconditionError, match="at least 4"):
                s.run(toy.step)


def test_accumulation_with_io_tiles(graph):
    with install():
        configure(2, io_tiles__num_io_tiles=32, io_tiles__place_ops_on_io_tiles=True)
        toy = Toy(ga=7)
        with toy.session() as s:
            s.run(toy.step)
    with tf.Graph().as_default(), install():
        configure(2, io_tiles__num_io_tiles=32, io_tiles__place_ops_on_io_tiles=True)
        toy = Toy(ga=5)
        with toy.session() as s, pytest.raises(errors.FailedPreconditionError, match="at least 6"):
            s.run(toy.step)


def test_old_sdk_speaks_of_pipeline_depth(graph):
    with install("2.2"):
        configure(2)
        toy = Toy(ga=5)
        with toy.session() as s, pytest.raises(
            errors.FailedPreconditionError, match="pipeline depth"
        ):
            s.run(toy.step)


def test_all_schedules_compute_the_same(graph):
    weights = []
    for schedule in ("Grouped", "Interleaved", "Sequential"):
        with tf.Graph().as_default(), install():
            configure(2)
            toy = Toy(pipeline_schedule=ipu().pipelining_ops.PipelineSchedule[schedule])
            with toy.session() as s:
                s.run(toy.step)
                weights.append(toy.weight(s))
    assert len(set(weights)) == 1


# ---------------------------------------------------------------- refused when building


def options_of(conv):
    return ipu().pipelining_ops.PipelineStageOptions(conv)


REFUSED = {
    "count missing": (dict(ga=None), ValueError, "must be specified"),
    "count negative": (dict(ga=-1), ValueError, "gradient_accumulation_count"),
    "count too large": (dict(ga=2**31), ValueError, "gradient_accumulation_count"),
    "one stage": (dict(stages=(first,)), ValueError, "at least two computational stages"),
    "mapping is no list": (dict(device_mapping=3), TypeError, "device_mapping"),
    "mapping too long": (dict(device_mapping=[0, 1, 2]), ValueError, "3 mappings != 2 stages"),
    "schedule is no enum": (dict(pipeline_schedule="Grouped"), TypeError, "PipelineSchedule"),
    "recomputation is no enum": (dict(recomputation_mode="Auto"), TypeError, "RecomputationMode"),
    "continuous updates": (dict(continuous_weight_updates=True), NotImplementedError, "Continuous"),
    "infeed of wrong class": (dict(infeed_queue=object()), TypeError, "IPUInfeedQueue"),
    "outfeed of wrong class": (dict(outfeed_queue=object()), TypeError, "IPUOutfeedQueue"),
    "loss outfeed without optimizer": (
        dict(outfeed_loss=True, optimizer_function=None),
        ValueError,
        "optimizer_function",
    ),
    "mask without optimizer": (
        dict(outfeed_mask=[True], optimizer_function=None),
        ValueError,
        "optimizer_function",
    ),
    "loss outfeed and mask": (dict(outfeed_loss=True, outfeed_mask=[True]), ValueError, "Only one"),
    "mask too long": (dict(outfeed_mask=[True, False]), ValueError, "2 entries for 1"),
    "optimizer function returns a number": (
        dict(optimizer_function=lambda loss: 3),
        AttributeError,
        "opt",
    ),
    "unknown keyword": (dict(banana=1), TypeError, "banana"),
    "state sharding without offload": (
        dict(replicated_optimizer_state_sharding=True, offload_weight_update_variables=False),
        ValueError,
        "offloaded",
    ),
    "batch serialisation, two IPUs": (
        dict(batch_serialization_iterations=2, device_mapping=[0, 1]),
        NotImplementedError,
        "one IPU",
    ),
    "stage returns an object": (
        dict(stages=(lambda x: object(), last)),
        TypeError,
        "zero or more Tensors",
    ),
    "stage returns a dictionary": (dict(stages=(lambda x: [{"a": x}], last)), ValueError, "Tensor"),
    "stage takes too little": (dict(stages=(lambda: 1.0, last)), TypeError, "argument"),
    "no trainable variables": (
        dict(stages=(lambda x: [x], last)),
        ValueError,
        "No variables to optimize",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_when_building(graph, what):
    options, kind, text = REFUSED[what]
    with install():
        configure(2)
        with pytest.raises(kind, match=text):
            Toy(**options)


def test_refused_with_an_outfeed_or_none(graph):
    with install():
        configure(2)
        pipeline = ipu().pipelining_ops.pipeline
        common = dict(
            infeed_queue=elements(), optimizer_function=sgd, gradient_accumulation_count=4
        )
        build = lambda **o: ipu().ipu_compiler.compile(
            lambda: pipeline([first, last], **common, **o)
        )
        with ipu().scopes.ipu_scope():
            with pytest.raises(ValueError, match="tensor outputs"):
                build()
            for option in ("outfeed_loss", "accumulate_outfeed"):
                with tf1.variable_scope(option), pytest.raises(ValueError, match="outfeed_queue"):
                    build(**{option: True})
            mode = ipu().ipu_outfeed_queue.IPUOutfeedMode.LAST
            with pytest.raises(ValueError, match="mode ALL"):
                build(accumulate_outfeed=True, outfeed_queue=outfeed(outfeed_mode=mode))
            with pytest.raises(TypeError, match="list or tuple"):
                ipu().ipu_compiler.compile(lambda: pipeline(first, **common))


def test_refused_stage_options(graph):
    with install():
        configure(2)
        good = options_of({"availableMemoryProportion": "0.2"})
        name = "forward_propagation_stages_poplar_options"
        with pytest.raises(TypeError, match="string field"):
            options_of({"availableMemoryProportion": 0.2})
        with pytest.raises(TypeError, match="dictionary"):
            options_of("0.2")
        for value, kind in ((good, TypeError), ([good], ValueError), ([good, "x"], TypeError)):
            with pytest.raises(kind, match=name):
                Toy(**{name: value})
        with pytest.raises(TypeError, match="weight_update"):
            Toy(weight_update_poplar_options={"a": "b"})


def test_refused_interleaved_on_one_ipu(graph):
    with install():
        configure(2)
        kind = ipu().pipelining_ops.PipelineSchedule.Interleaved
        with pytest.raises(NotImplementedError, match="Interleaved"):
            Toy(pipeline_schedule=kind, device_mapping=[0, 0])


def test_refused_batch_serialisation(graph):
    with install():
        configure(1)
        grouped = ipu().pipelining_ops.PipelineSchedule.Grouped
        with pytest.raises(NotImplementedError, match="Sequential"):
            Toy(batch_serialization_iterations=2, pipeline_schedule=grouped)
        with pytest.raises(ValueError, match="SUM"):
            Toy(batch_serialization_iterations=2, reduction_method="mean")


def test_optimizer_function_output(graph):
    with install():
        make = ipu().pipelining_ops.OptimizerFunctionOutput
        opt, loss = tf1.train.GradientDescentOptimizer(0.1), tf.constant(1.0)
        for wrong in (
            dict(opt=tf.keras.optimizers.SGD() if hasattr(tf, "keras") else object()),  # trap 1
            dict(loss=1.0),
            dict(compute_gradients_args=[1]),
            dict(apply_gradients_kwargs=(1,)),
        ):
            with pytest.raises(TypeError):
                make(**{"opt": opt, "loss": loss, **wrong})
        with pytest.raises(ValueError, match="OptimizerV2"):
            make(opt, loss, variables=[1])
    with install("2.6"), pytest.raises(ValueError, match="must be empty"):  # trap 2
        ipu().pipelining_ops.OptimizerFunctionOutput(opt, loss, variables=[1])


def test_captured_tensor(graph):
    with install():
        configure(2)
        outside = tf.constant([2.0]) + 1.0
        with pytest.raises(ValueError, match="Trying to capture the tensor"):
            Toy((lambda x: [x * outside], last))


def test_nested_lists_are_stacked_in_silence(graph):
    with install():
        configure(2)
        seen = []

        def takes(y):
            seen.append(y.shape)
            return [tf.reduce_sum(y)]

        Toy((lambda x: [[first(x)[0], x]], takes))
    assert seen[0] == (2, 1)


def test_collections_stay_inside_a_stage(graph):
    def writes(x):
        tf1.add_to_collection("losses", x)
        return first(x)

    with install():
        configure(2)
        Toy((writes, last))
        assert tf1.get_collection("losses") == []
        assert len(tf1.trainable_variables()) == 1


def test_stages_may_not_write_variables(graph):
    def writes(x):
        w = tf1.get_variable("w", [1], initializer=tf1.ones_initializer())
        with tf.control_dependencies([w.assign_add([1.0])]):
            return [x * w]

    with install():
        configure(2)
        with pytest.raises(RuntimeError, match="undefined on hardware"):
            Toy((writes, last))


def test_shapes_must_be_known(graph):
    with install():
        configure(2)
        with pytest.raises(ValueError, match="unknown shape"):
            Toy((lambda x: [tf.boolean_mask(first(x)[0], x > 0)], last))


def test_update_may_not_depend_on_an_element(graph):
    "Not established which micro-batch it would see: our programs pass the rate in `inputs`"
    with install():
        configure(2)
        with pytest.raises(ValueError, match="not established"):
            Toy(
                (lambda x: [*first(x), x], lambda y, x: [tf.reduce_sum(y), tf.reduce_sum(x)]),
                optimizer_function=lambda loss, rate: sgd(loss, rate),
            )


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
            with pytest.raises(ProcessAbort, match="not initialised"):
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


# ---------------------------------------------------------------- configuration


def test_configuration_types_are_exact():
    with install():
        config = ipu().config.IPUConfig()
        for name, value in (("allow_recompute", 1), ("serialization_output_folder", 3)):
            with pytest.raises(TypeError, match="must be of type"):
                setattr(config, name, value)
        with pytest.raises(TypeError, match="io_tiles.num_io_tiles"):
            config.io_tiles.num_io_tiles = True
        config.auto_select_ipus = [4]
        with pytest.raises(TypeError):
            config.auto_select_ipus = ["4"]
        with pytest.raises(ValueError, match="Did you mean 'allow_recompute'"):
            config.allow_recomputation = True
        with pytest.raises(ValueError, match="not a valid attribute"):
            config.convolutions.poplar_option  # noqa: B018
        with pytest.raises(Exception, match="category"):
            config.convolutions = {}
        config.convolutions.poplar_options["availableMemoryProportion"] = 0.2
        with pytest.raises(TypeError, match="string field"):
            config.configure_ipu_system()


def test_engine_options():
    names = ("target.deterministicWorkers", "opt.internalExchangeOptimisationTarget")
    for name, value in ((names[0], "False"), (names[0], "no"), (names[1], "fast")):
        with install(), pytest.raises(ValueError, match=f"{value!r} for {name}"):
            configure(1, compilation_poplar_options={name: value})
    with install() as m:
        configure(1, compilation_poplar_options={names[0]: "false", names[1]: "balanced"})
        assert m.config["compilation_poplar_options"][names[0]] == "false"


def test_configuration_checks():
    with install() as m:
        with pytest.raises(TypeError):
            ipu().config.configure_ipu_system({"auto_select_ipus": 1})
        config = ipu().config.IPUConfig()
        config.auto_select_ipus, config.select_ipus = 1, 1
        with pytest.raises(Exception, match="Only one"):
            config.configure_ipu_system()
        config.auto_select_ipus, config.select_ipus = [], [0, 0]
        with pytest.raises(ValueError, match="unique"):
            config.configure_ipu_system()
        with pytest.raises(ValueError, match="num_io_tiles == 0"):
            configure(1, io_tiles__place_ops_on_io_tiles=True)
        with pytest.raises(RuntimeError, match="No IPU devices"):
            ipu().config.get_ipu_config()
        configure(1)
        configure(1)
        with pytest.warns(UserWarning, match="resetting"):
            configure(2)
        ipu().config.reset_ipu_configuration()
        assert m.config is None


def test_stochastic_rounding_changes_its_type():
    with install("2.2"):
        configure(1, floating_point_behaviour__esr=True)
        assert not hasattr(ipu().config, "StochasticRoundingBehaviour")
    with install("2.4"):
        configure(1, floating_point_behaviour__esr=True)
    with install("2.5"), pytest.raises(TypeError):
        configure(1, floating_point_behaviour__esr=True)


def test_defaults_that_changed():
    for sdk, merged in (("2.2", False), ("2.4", False), ("2.5", True)):
        with install(sdk):
            assert ipu().config.IPUConfig().optimizations.merge_infeed_io_copies is merged


# ---------------------------------------------------------------- queues


def test_infeed_wants_static_shapes(graph):
    with install():
        data = tf.data.Dataset.range(10).batch(3)
        with pytest.raises(ValueError, match="drop_remainder=True"):
            ipu().ipu_infeed_queue.IPUInfeedQueue(data)
        with pytest.raises(ValueError, match="prefetch_depth"):
            ipu().ipu_infeed_queue.IPUInfeedQueue(tf.data.Dataset.range(10), prefetch_depth=0)


def test_infeed_is_initialised_once(graph):
    with install():
        queue = elements()
        queue.initializer  # noqa: B018
        with pytest.raises(ValueError, match="only be accessed once"):
            queue.initializer  # noqa: B018
        with pytest.raises(ValueError, match="obsolete"):
            queue.get_next()


def test_dictionaries_become_keywords(graph):
    with install():
        configure(2)
        data = tf.data.Dataset.from_tensors({"b": np.float32(3), "a": np.float32(2)}).repeat()
        queue = ipu().ipu_infeed_queue.IPUInfeedQueue(data)
        toy = Toy((lambda a, b: first(a - b), last), infeed_queue=queue)
        with tf1.Session() as s:
            s.run([tf1.global_variables_initializer(), queue.initializer])
            s.run(toy.step)
            np.testing.assert_array_equal(s.run(toy.report)[0], -np.ones((4,)))


def test_feed_names(graph):
    with install("2.1"):
        for module, name in (
            ("ipu_infeed_queue", "IPUInfeedQueue"),
            ("ipu_outfeed_queue", "IPUOutfeedQueue"),
        ):
            made = getattr(getattr(ipu(), module), name)
            assert (
                inspect.signature(made.__init__).parameters["feed_name"].default is inspect._empty
            )
    with install("2.2"):
        made = ipu().ipu_outfeed_queue.IPUOutfeedQueue.__init__
        assert inspect.signature(made).parameters["feed_name"].default is None
    with install("2.4"), pytest.raises(TypeError):
        outfeed(feed_name="x")


def test_outfeed_is_used_once_and_in_order(graph):
    with install():
        configure(2)
        queue = outfeed()
        with pytest.raises(ValueError, match="not been enqueued"):
            queue.dequeue()
        toy = Toy(outfeed_queue=queue)
        with pytest.raises(ValueError, match="only be enqueued once"):
            queue.enqueue(tf.constant(1.0))
        with pytest.raises(ValueError):
            outfeed(outfeed_mode="all")
        with toy.session() as s:
            assert s.run(toy.report)[0].shape == (0,)
            s.run(toy.step)
            assert s.run(toy.report)[0].shape == (4,)
            assert s.run(toy.report)[0].shape == (0,)


@pytest.mark.parametrize("ipus, lead", [(2, ()), (4, (2,))])
def test_outfeed_shapes(graph, ipus, lead):
    "The axis of replicas is there only when there are several"
    with install():
        configure(ipus)
        toy = Toy(repeat_count=2)
        summed = outfeed()
        with toy.session() as s:
            s.run(toy.step)
            assert s.run(toy.report)[0].shape == (8, *lead)
        with tf1.variable_scope("again"):
            toy = Toy(repeat_count=2, accumulate_outfeed=True, outfeed_queue=summed)
        with toy.session() as s:
            s.run(toy.step)
            assert s.run(toy.report)[0].shape == (2, *lead)
        mode = ipu().ipu_outfeed_queue.IPUOutfeedMode.LAST
        with tf1.variable_scope("last"):
            toy = Toy(outfeed_queue=outfeed(outfeed_mode=mode))
        with toy.session() as s:
            s.run(toy.step)
            assert s.run(toy.report)[0].shape == lead


def test_accumulated_outfeed_is_a_sum_in_its_own_type(graph):
    def both(y):
        return [tf.reduce_sum(y) * 0 + 1, tf.cast(tf.reduce_sum(y) * 0 + 2000, tf.float16)]

    with install():
        configure(2)
        toy = Toy(
            (first, both), ga=40, accumulate_outfeed=True, optimizer_function=lambda a, b: sgd(a)
        )
        with toy.session() as s:
            s.run(toy.step)
            one, two = s.run(toy.report)
    assert one.tolist() == [40.0]
    assert np.isinf(two) and two.dtype == np.float16  # 80,000 does not fit: nobody is told


def test_outfeed_of_the_loss_and_masks(graph):
    with install():
        configure(2)
        toy = Toy(outfeed_loss=True)
        assert isinstance(toy.report, tf.Tensor)
        with tf1.variable_scope("masked"):
            toy = Toy(
                (first, lambda y: [tf.reduce_sum(y), y]),
                optimizer_function=lambda loss, y: sgd(loss),
                outfeed_mask=[False, True],
            )
        assert len(toy.report) == 1
    with tf.Graph().as_default(), install("2.1"), pytest.raises(TypeError, match="outfeed_mask"):
        feeds = dict(infeed_queue=..., outfeed_queue=...)
        ipu().pipelining_ops.pipeline([first, last], outfeed_mask=[True], **feeds)


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


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("stable", [False, True])
def test_group_norm_is_strided(graph, stable):
    x = np.random.default_rng(0).normal(2, 3, (2, 4, 4, 8)).astype("float32")
    by_hand = np.empty_like(x)
    for g in range(4):
        own = x[..., g::4]  # channel c belongs to group c mod 4
        mean, var = own.mean((1, 2, 3), keepdims=True), own.var((1, 2, 3), keepdims=True)
        by_hand[..., g::4] = (own - mean) / np.sqrt(var + 1e-3)
    with install():
        configure(1, norms__use_stable_statistics=stable)
        make = ipu().normalization_ops.group_norm
        y = make(x, groups=4, epsilon=1e-3)
        other = make(x, groups=4, epsilon=1e-3, strided_channel_grouping=False, scope="other")
        names = sorted(v.name for v in tf1.global_variables())
        with tf1.Session() as s:
            s.run(tf1.global_variables_initializer())
            y, other = s.run([y, other])
    np.testing.assert_allclose(y, by_hand, atol=1e-5)
    assert np.abs(other - by_hand).max() > 0.1
    assert names == ["GroupNorm/beta:0", "GroupNorm/gamma:0", "other/beta:0", "other/gamma:0"]


def test_stable_statistics(graph):
    "A large mean over a small deviation: the short formula cancels, the long one does not"
    x = (4000 + np.random.default_rng(0).normal(size=(1, 8, 8, 4))).astype("float32")
    right, found = x.astype("float64").var((1, 2), keepdims=True), {}
    for stable in (False, True):
        with install():
            configure(1, norms__use_stable_statistics=stable)
            how = dict(center=False, scale=False, epsilon=1e-3, scope=f"s{stable}")
            y = ipu().normalization_ops.group_norm(x, groups=4, **how)
            with tf1.Session() as s:
                found[stable] = s.run(y)
    wanted = (x - x.astype("float64").mean((1, 2), keepdims=True)) / np.sqrt(right + 1e-3)
    np.testing.assert_allclose(found[True], wanted, atol=1e-2)
    assert np.abs(found[False] - wanted).max() > 0.1


def test_strided_is_contiguous_with_channels_moved(graph):
    c, groups = 12, 3
    to = np.array([(i % groups) * (c // groups) + i // groups for i in range(c)])
    x = np.random.default_rng(1).normal(size=(2, 3, 3, c)).astype("float32")
    with install():
        norm = lambda v, name, **k: ipu().normalization_ops.group_norm(
            v, groups, center=False, scale=False, epsilon=1e-3, scope=name, **k
        )
        moved = np.empty_like(x)
        moved[..., to] = x
        with tf1.Session() as s:
            strided, back = s.run([norm(x, "a"), norm(moved, "b", strided_channel_grouping=False)])
    np.testing.assert_allclose(strided, back[..., to], atol=1e-5)


def test_norms_refuse(graph):
    with install():
        n, x = ipu().normalization_ops, np.zeros((1, 2, 2, 6), "float32")
        for args, text in (
            (dict(groups=7), "Invalid groups"),
            (dict(groups=4), "not commensurate"),
            (dict(channels_axis=9), "out of bounds"),
            (dict(channels_axis=2), "channels_axis"),
        ):
            with pytest.raises(ValueError, match=text):
                n.group_norm(x, **args)
        with pytest.raises(ValueError, match="rank"):
            n.group_norm(tf1.placeholder(tf.float32))
        with pytest.raises(ValueError, match="undefined channel"):
            n.group_norm(tf1.placeholder(tf.float32, (1, 2, 2, None)))


def test_layer_and_instance_norm_agree_with_group_norm(graph):
    x = np.random.default_rng(2).normal(size=(2, 3, 3, 6)).astype("float32")
    with install():
        n, off = ipu().normalization_ops, dict(center=False, scale=False, epsilon=1e-3)
        pairs = [
            (n.layer_norm(x, **off), n.group_norm(x, groups=1, **off)),
            (n.instance_norm(x, **off), n.group_norm(x, groups=6, **off)),
        ]
        with tf1.Session() as s:
            for a, b in s.run(pairs):
                np.testing.assert_allclose(a, b, atol=1e-6)


def test_default_epsilon(graph):
    for sdk, default in (("2.2", 1e-6), ("2.4", 1.53e-5), ("3.4", 1.53e-5)):
        with install(sdk):
            found = (
                inspect.signature(ipu().normalization_ops.group_norm).parameters["epsilon"].default
            )
        assert found == default
    with install(), pytest.warns(UserWarning, match="epsilon"):
        ipu().normalization_ops.group_norm(np.zeros((1, 2, 2, 4), "float32"), epsilon=1e-6)


def test_low_level_norm_wants_one_type(graph):
    with install():
        low = sys.modules["tensorflow.compiler.plugin.poplar.ops.gen_popnn_ops"]
        x, one = tf.zeros((1, 2, 2, 4), tf.float16), tf.ones(4)
        with pytest.raises(TypeError, match="one dtype"):
            low.popnn_group_norm_training(x, one, one, "NHWC", 1e-3, 1)


def test_swish_and_checkpoint(graph):
    with install(), tf1.Session() as s:
        x = np.linspace(-4, 4, 9, dtype="float32")
        y, z = s.run(
            [ipu().nn_ops.swish(x), ipu().pipelining_ops.recomputation_checkpoint(tf.constant(x))]
        )
    np.testing.assert_allclose(y, x / (1 + np.exp(-x)), rtol=1e-5)
    np.testing.assert_array_equal(z, x)


# ---------------------------------------------------------------- versions and modules


def test_keywords_by_sdk():
    has = lambda name: name in inspect.signature(ipu().pipelining_ops.pipeline).parameters
    for sdk, mask, method, captured in (
        ("2.1", False, False, False),
        ("2.2", True, False, False),
        ("2.4", True, False, False),
        ("2.5", True, True, False),
        ("3.4", True, True, True),
    ):
        with install(sdk):
            found = has("outfeed_mask"), has("reduction_method")
            assert found == (mask, method)
            assert has("gradient_accumulation_for_captured_grads") == captured


def test_slice_options_by_sdk():
    for sdk, there in (("2.2", False), ("2.4", True)):
        with install(sdk):
            make = ipu().pipelining_ops.PipelineStageOptions
            assert ("slice_options" in inspect.signature(make.__init__).parameters) is there


def test_modules_by_sdk():
    import importlib

    for sdk, horovod, distributed in (
        ("2.2", True, False),
        ("3.0", True, True),
        ("3.4", False, True),
    ):
        with install(sdk):
            for name, there in (("horovod", horovod), ("distributed", distributed)):
                if there:
                    importlib.import_module(f"tensorflow.python.ipu.{name}")
                else:
                    with pytest.raises(ImportError):
                        importlib.import_module(f"tensorflow.python.ipu.{name}")
    with pytest.raises(ImportError):
        importlib.import_module("tensorflow.python.ipu")  # nothing stays behind


def test_reset_ipu_seed():
    with install() as m:
        ipu().utils.reset_ipu_seed(7, experimental_identical_replicas=True)
        assert m.seed == (7, True)


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


# ---------------------------------------------------------------- the table


def rows():
    with (HERE / "ipu_standin" / "contract.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_of_tests(name):
    import re

    return set(re.findall(r"(?m)^def (test_\w+)", (HERE / name).read_text(encoding="utf-8")))


def test_table_names_tests_that_exist():
    known = {n: names_of_tests(n) for n in ("test_ipu_standin.py", "test_ipu.py")}
    for row in rows():
        assert row["status"] in ("held", "not established", "left out"), row
        if row["status"] != "held":
            assert row["why"], row
            continue
        for test in row["test"].split():
            assert any(test in names for names in known.values()), f"{test}: {row['sentence']}"


def test_table_has_every_test():
    "A test of the stand-in that no sentence asks for is a fact without a source"
    named = {test for row in rows() for test in row["test"].split()}
    assert names_of_tests("test_ipu_standin.py") - named <= {
        "test_table_names_tests_that_exist",
        "test_table_has_every_test",
    }
