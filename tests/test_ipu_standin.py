"""The stand-in keeps to the written contract of Graphcore's interface: configuration, queues, norms, versions.

`ipu_standin/contract.csv` names for each sentence the test that holds it; the last tests here check
that table. What the contract could not establish stays in it, marked as such.
"""

import csv
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from ipu_standin import install  # noqa: E402
from ipu_toy import Toy, configure, elements, first, ipu, last, outfeed, sgd  # noqa: E402

tf1 = tf.compat.v1
HERE = Path(__file__).parent


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


# ---------------------------------------------------------------- the table


def rows():
    with (HERE / "ipu_standin" / "contract.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


STANDIN = sorted(path.name for path in HERE.glob("test_ipu_standin*.py"))
OURS = ("test_ipu.py", "test_ipu_runs.py")


def names_of_tests(name):
    return set(re.findall(r"(?m)^def (test_\w+)", (HERE / name).read_text(encoding="utf-8")))


def test_table_names_tests_that_exist():
    known = {n: names_of_tests(n) for n in (*STANDIN, *OURS)}
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
    assert set().union(*map(names_of_tests, STANDIN)) - named <= {
        "test_table_names_tests_that_exist",
        "test_table_has_every_test",
    }
