"""Classes are compared by name: other names are refused, another order is mapped, numbers compare by count."""

import json
import re
import shutil

import numpy as np
import pytest
from images import encode, record, smooth_image, write
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint, training
from effnet_repro.classes import match_classes, new_labels
from effnet_repro.data import open_data

NAMES = ("cat", "dog", "owl")


def make_set(folder, names, validation=24):
    "TFRecords of the same images whatever the order of `names`; classes 0, 1, 2 by `NAMES` where they are these"
    order = NAMES if sorted(names) == sorted(NAMES) else names
    for split, count in (("train", 48), ("validation", validation)):
        records = []
        for i in range(count):
            kind = i * i % 3  # uneven: two of three are of kind 1
            image = encode(smooth_image(40, 48, 100 * (split == "train") + i) // 2 + 60 * kind)
            label = 1 + list(names).index(order[kind])
            records.append(record(image, label=label))
        write(folder, split, records)
    classes = [{"label": i + 1, "text": name} for i, name in enumerate(names)]
    (folder / "info.json").write_text(json.dumps({"num_classes": len(names), "classes": classes}))
    return folder


def words(**more):
    return {**SMOKE, "max_steps": 2, "global_batch_size": 16, "micro_batch_size": 8, **more}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    top = tmp_path_factory.mktemp("sets")
    return {
        "same": make_set(top / "same", NAMES),
        "other order": make_set(top / "other", ("owl", "cat", "dog")),
        "other names": make_set(top / "names", ("apple", "pear", "plum")),
        "numbers": make_set(top / "numbers", ("0", "1", "2")),
    }


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    return training.train(TINY, sets["same"], tmp_path_factory.mktemp("run"), **words())


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "there, here, labels",
    [
        (("a", "b"), ("a", "b"), None),
        (("a", "b"), ("b", "a"), [1, 0]),
        (("a", "b", "c"), ("c", "a", "b"), [2, 0, 1]),
        (("0", "1"), ("a", "b"), None),  # one side has no names
        (("a", "b"), ("0", "1"), None),
        (("0", "1"), ("1", "2"), None),  # numbers alone, counted from 0 or from 1
        (("1", "2", "10"), ("1", "10", "2"), [0, 2, 1]),  # folders sorted as text
        (("a", "b", "c"), ("a", "1", "c"), None),  # a class without a name
        (("a", "b", "2"), ("b", "a", "2"), [1, 0, 2]),
        (("a", "a", "b"), ("a", "a", "b"), None),
        ((" a", "b"), ("a", "b "), None),
    ],
)
def test_labels_by_name(there, here, labels):
    found = new_labels(there, here)
    assert labels is None and found is None or list(found) == labels


@pytest.mark.parametrize(
    "there, here, says",
    [
        (
            ("cat", "dog"),
            ("apple", "pear"),
            "the data has 'apple', 'pear', the network 'cat', 'dog'",
        ),
        (("cat", "dog"), ("dog", "owl"), "the data has 'owl', the network 'cat'"),
        (("a", "a", "b"), ("a", "b", "a"), "some stand for more than one class"),
    ],
)
def test_other_names_are_refused(there, here, says):
    with pytest.raises(ValueError, match=says):
        new_labels(there, here)


def test_a_mapped_set_is_the_network_s_set(sets, capsys):
    one, other = (open_data(sets[k], verbose=False) for k in ("same", "other order"))
    assert one.fingerprint != other.fingerprint
    mapped = match_classes("run", {"class_names": list(NAMES)}, other)
    assert capsys.readouterr().out.count("\n") == 1
    assert mapped.class_names == one.class_names and mapped.fingerprint == one.fingerprint
    for split in ("train", "validation"):
        np.testing.assert_array_equal(mapped.splits[split].label, one.splits[split].label)
    assert match_classes("run", {"class_names": list(NAMES)}, mapped) is mapped
    assert match_classes("run", {}, other) is other
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the Keras runtime


def test_validation_maps_another_order(run, sets, capsys):
    there, here = (training.validate(run.run_dir, sets[k]) for k in ("same", "other order"))
    assert "mapped to the network's ('cat', 'dog', 'owl')" in capsys.readouterr().out
    assert (there["last"].top1, there["last"].loss) == (here["last"].top1, here["last"].loss)
    np.testing.assert_array_equal(there["last"].confusion, here["last"].confusion)
    by_count = training.validate(run.run_dir, sets["numbers"])["last"]
    assert by_count.pictures == there["last"].pictures


def test_going_on_maps_another_order(run, sets, tmp_path):
    ends = {}
    for name in ("same", "other order"):
        shutil.copytree(run.run_dir, tmp_path / name)
        ends[name] = training.train(TINY, sets[name], tmp_path / name, **words(max_steps=3))
        assert ends[name].update == run.update + 1
    a, b = (checkpoint.load(end.checkpoint) for end in ends.values())
    assert all((a[0][n] == b[0][n]).all() for n in a[0])
    assert a[1]["class_names"] == b[1]["class_names"] == list(NAMES)


def test_fine_tuning_and_init_map_another_order(run, sets, tmp_path):
    how = words(max_steps=1, image_size=32)
    one, other = (
        training.finetune(run.run_dir, sets[k], tmp_path / k, **how)
        for k in ("same", "other order")
    )
    a, b = (checkpoint.load(end.checkpoint) for end in (one, other))
    assert all((a[0][n] == b[0][n]).all() for n in a[0])
    assert b[1]["class_names"] == list(NAMES)
    how = words(max_steps=1, init=run.run_dir)
    begun = training.train(TINY, sets["other order"], tmp_path / "init", **how)
    assert checkpoint.read_metadata(begun.checkpoint)["class_names"] == list(NAMES)


def test_other_names_are_refused_everywhere(run, sets, tmp_path):
    wrong, says = sets["other names"], "trained on other classes .*'apple', 'pear', 'plum'"
    calls = [
        lambda: training.validate(run.run_dir, wrong),
        lambda: training.validate(run.checkpoint, wrong),
        lambda: training.finetune(run.run_dir, wrong, tmp_path / "f", **words()),
        lambda: training.train(TINY, wrong, tmp_path / "t", init=run.run_dir, **words()),
        lambda: training.train(TINY, wrong, run.run_dir, **words(max_steps=4)),
        lambda: training.plot_predictions(run.run_dir, open_data(wrong, verbose=False)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()


def test_predictions_name_the_truth_in_the_network_s_words(run, sets):
    import matplotlib

    matplotlib.use("Agg")
    titles = {}
    for name in ("same", "other order"):
        axes = training.plot_predictions(run.run_dir, open_data(sets[name], verbose=False), n=6)
        titles[name] = [a.get_title() for a in np.ravel(axes)]
    assert titles["same"] == titles["other order"]
    assert any(re.search("cat|dog|owl", title) for title in titles["same"])


# ---------------------------------------------------------------- the IPU runtime


@pytest.mark.long
def test_the_ipu_runtime_does_the_same(sets, tmp_path):
    ipu = pytest.importorskip("effnet_repro.ipu")
    ipu_standin = pytest.importorskip("ipu_standin")
    from ipu_updates import small

    case = small(pipeline_splits=("block2b",), model_size="cifar", epochs=1, global_batch_size=16)
    how = dict(ipus=4, budget="case", validation=False)
    with ipu_standin.install():
        done = ipu.train(case, sets["same"], tmp_path / "run", max_steps=1, **how)
    scores = []
    for name in ("same", "other order"):
        with ipu_standin.install():
            scores.append(ipu.validate(done.checkpoint, sets[name], ipus=2))
    (a,), (b,) = (s.values() for s in scores)
    assert (a.top1, a.loss) == (b.top1, b.loss)
    np.testing.assert_array_equal(a.confusion, b.confusion)
    with ipu_standin.install(execute=False) as machine:
        wrong, says = sets["other names"], "trained on other classes"
        with pytest.raises(ValueError, match=says):
            ipu.validate(done.checkpoint, wrong, ipus=2)
        with pytest.raises(ValueError, match=says):
            ipu.finetune(done.run_dir, wrong, tmp_path / "f", ipus=2, image_size=32)
        with pytest.raises(ValueError, match=says):
            ipu.train(case, wrong, tmp_path / "run", max_steps=2, **how)
        with pytest.raises(ValueError, match=says):
            ipu.train(case, wrong, tmp_path / "new", init=done.checkpoint, max_steps=2, **how)
        assert not machine.programs
