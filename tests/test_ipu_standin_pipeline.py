"""The stand-in's pipelines: what they compute, their schedules, and what they refuse when they are built."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from ipu_standin import install  # noqa: E402
from ipu_toy import Toy, configure, elements, first, ipu, last, outfeed, sgd  # noqa: E402

tf1 = tf.compat.v1
errors = tf.errors


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
    "batch serialization, two IPUs": (
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
