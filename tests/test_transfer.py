"""Other classes: the body is kept to the bit, the classifier begins anew, and shared names keep their part."""

import json
import re

import numpy as np
import pytest
from conversions import write_body
from images import encode, folders, smooth_image
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint, convert, transfer
from effnet_repro.config import override
from effnet_repro.data import open_data
from effnet_repro.network import initial_weights, params, segments
from effnet_repro.predict import predict
from effnet_repro.scaling import ModelSpec
from effnet_repro.training import finetune, train, validate

RATE = transfer.PROTOCOLS["transfer"]["base_learning_rate_exponent"]
CLASSIFIER = "all/Top/logits/dense/"
OLD, NEW = ("cat", "dog", "owl"), ("bee", "cat")


def network(names=OLD, seed=0, **fields):
    case = override(TINY, **{"image_resize": "modern", **fields})
    spec = ModelSpec.from_case(case, len(names))
    return convert.Weights(spec, initial_weights(spec, seed), case, tuple(names))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "old.safetensors"
    convert.write_ours(path, network())
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    "Forty dark and light images of two classes to train on, eight to validate"
    found, root = {}, tmp_path_factory.mktemp("data") / "pets"
    for split, n in (("train", 20), ("val", 4)):
        for kind, name in enumerate(NEW):
            for i in range(n):
                image = encode(smooth_image(40, 40, i) // 2 + np.uint8(100 * kind))
                found[f"{split}/{name}/{i}.jpg"] = image
    return folders(root, found)


def head_of(path):
    arrays = checkpoint.load(path)[0]
    return {n: a for n, a in arrays.items() if not n.startswith(("slots/", "average/"))}


# ---------------------------------------------------------------- the weights


def test_shared_names_keep_their_part_of_the_classifier():
    body = network(seed=3)
    body.arrays[CLASSIFIER + "bias"][:] = [5, 6, 7]
    start = transfer.new_head_for(body, ("owl", "bee", "cat"), seed=1)
    kernel, bias = (start.arrays[CLASSIFIER + n] for n in ("kernel", "bias"))
    assert start.carried == ("owl", "cat") and bias.tolist() == [7, 0, 5]
    there = body.arrays[CLASSIFIER + "kernel"]
    assert (kernel[:, 0] == there[:, 2]).all() and (kernel[:, 2] == there[:, 0]).all()
    again = transfer.new_head_for(body, ("x", "y", "z"), seed=1).arrays[CLASSIFIER + "kernel"]
    assert (kernel[:, 1] == again[:, 1]).all() and (kernel[:, 0] != again[:, 0]).any()
    other = transfer.new_head_for(body, ("x", "y", "z"), seed=2).arrays[CLASSIFIER + "kernel"]
    assert (again != other).any()
    for name, value in body.arrays.items():
        if not name.startswith(CLASSIFIER):
            np.testing.assert_array_equal(start.arrays[name], value)
    assert body.arrays[CLASSIFIER + "bias"].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    "there, here, shared",
    [
        (("a", "b"), ("b", "c"), {0: 1}),
        (("a ", "a"), (" a",), {0: 0}),
        (("0", "1"), ("0", "1"), {}),
        (("class 0", "class 1"), ("class 0",), {}),
        (("a", "b"), ("0", "1"), {}),
    ],
)
def test_numbers_are_no_names(there, here, shared):
    assert transfer.shared_classes(there, here) == shared


def test_a_body_without_a_classifier(tmp_path):
    found = transfer.read_body(write_body(tmp_path / "body.safetensors"))
    assert found.spec.num_classes == 0
    start = transfer.new_head_for(found, NEW)
    spec = ModelSpec.from_case(found.case, 2)
    assert {n: a.shape for n, a in start.arrays.items()} == {p.name: p.shape for p in params(spec)}
    assert start.carried == () and "2 classes" in transfer.describe_head(start, NEW)


@pytest.mark.parametrize(
    "count, given, batch",
    [
        (5, {}, (4, 4)),
        (40, {}, (16, 16)),
        (3000, {}, (32, 32)),
        (10**6, {}, (256, 32)),
        (200, {"global_batch_size": 12}, None),
        (200, {"micro_batch_size": 12}, None),
    ],
)
def test_the_size_of_a_step(count, given, batch):
    found = transfer.transfer_batches(count, given)
    assert tuple(found.values()) == (batch or ())


@pytest.mark.parametrize(
    "count, whole, given, epochs, exponent",
    [
        (5, 4, {}, 100, -11.5),
        (160, 16, {}, 20, -12.5),
        (100, 16, {}, 34, -12.5),
        (10**6, 256, {}, 20, -14.5),
        (160, 16, {"epochs": 2}, 2, -12.5),
    ],
)
def test_the_length_of_a_run(count, whole, given, epochs, exponent):
    found = transfer.transfer_length(count, whole, given)
    assert (found["epochs"], found["warmup_epochs"]) == (epochs, epochs / 20)
    assert found["base_learning_rate_exponent"] == RATE + exponent + 12.5


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def tuned(old, data_dir, tmp_path_factory):
    "Two epochs of the head, and validated"
    run_dir = tmp_path_factory.mktemp("run")
    return finetune(
        old,
        data_dir,
        run_dir,
        new_head=True,
        variable_filter="Top",
        epochs=2,
        precision="float32",
        progress=False,
    )


def test_the_body_stays_and_the_head_learns(old, tuned):
    before, after = head_of(old), head_of(tuned.checkpoint)
    spec = ModelSpec.from_case(tuned.case, 2)
    top = {p.name for s in segments(spec) if s.name == "Top" for p in s.params}
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name not in top:
            np.testing.assert_array_equal(value, before[name])
    assert all((after[n] != transfer.new_head_for(network(), NEW).arrays[n]).any() for n in top)
    assert (tuned.case.global_batch_size, tuned.case.image_size) == (16, TINY.image_size)
    assert tuned.case.variable_filter == ("Top",) and tuned.case.optimizer == "adamw"


def test_the_run_knows_its_classes_and_goes_on(old, tuned, data_dir, capsys):
    said = checkpoint.read_metadata(tuned.checkpoint)
    assert said["class_names"] == list(NEW) and said["num_classes"] == 2
    notes = json.loads((tuned.run_dir / "config.json").read_text())
    assert notes["new_head"] and notes["protocol"] == "transfer"
    how = dict(new_head=True, epochs=2, precision="float32", progress=False)
    again = finetune(old, data_dir, tuned.run_dir, **how)  # with Top alone, as it began
    assert again.update == tuned.update and "1 of them" in capsys.readouterr().out
    (found,) = predict(tuned.run_dir, data_dir / "val" / "bee" / "0.jpg", top=1)
    assert found.guesses[0].name in NEW


def test_a_new_run_trains_all_and_one_that_has_begun_goes_on_as_it_began(old, tuned, data_dir):
    body, data = transfer.read_body(old), open_data(data_dir, verbose=False)
    planned = lambda run_dir, **how: transfer.resolve_transfer(body, old, data, run_dir, **how).case
    new = planned(tuned.run_dir / "new")
    assert (new.variable_filter, new.body_rate) == (("Top", "block"), 0.3)
    for given in ({}, {"variable_filter": "Top"}):
        again = planned(tuned.run_dir, epochs=2, **given)
        assert (again.variable_filter, again.body_rate) == (("Top",), 1.0)
        assert again.base_learning_rate_exponent == tuned.case.base_learning_rate_exponent
    assert planned(tuned.run_dir, variable_filter=("Top", "block2")).variable_filter[1] == "block2"


def test_what_trains(old, data_dir, tmp_path):
    how = dict(new_head=True, **SMOKE)
    for norm in ("LN_PN", "BN"):
        file = tmp_path / f"{norm}.safetensors"
        convert.write_ours(file, network(norm=norm))
        before = head_of(file)
        for parts in (("Top",), ("Top", "block")):
            run_dir = tmp_path / norm / "-".join(parts)
            done = finetune(file, data_dir, run_dir, variable_filter=parts, **how)
            after = head_of(done.checkpoint)
            body = [n for n in before if not n.startswith("all/Top")]
            moved = [n for n in body if (after[n] != before[n]).any()]
            assert moved == [] if parts == ("Top",) else len(moved) > 0.8 * len(body)
            if norm == "BN" and "block" in parts:  # a trained batch norm moves, a frozen one rests
                assert any(n.endswith("moving_mean") for n in moved)


def test_other_classes_lead_to_a_new_head(old, data_dir, tmp_path):
    calls = [
        lambda: finetune(old, data_dir, tmp_path / "a", **SMOKE),
        lambda: train(TINY, data_dir, tmp_path / "b", init=old, **SMOKE),
        lambda: validate(old, data_dir),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="effnet-finetune --new-head"):
            call()
    names = network(("x", "y"))
    convert.write_ours(tmp_path / "names.safetensors", names)
    with pytest.raises(ValueError, match="effnet-finetune --new-head"):
        validate(tmp_path / "names.safetensors", data_dir)
    with pytest.raises(ValueError, match="need new_head=True"):
        finetune(old, data_dir, arch="tf_efficientnet_b0", **SMOKE)


# ---------------------------------------------------------------- the command


def test_the_command(run, refused, old, data_dir, tmp_path):
    words = ["finetune", old, "--data-dir", data_dir, "--new-head"]
    status, out, err = run(*words, "--dry-run")
    assert status == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert rows["variable_filter"].split()[1:3] == ["Top", "block"]
    assert rows["body_rate"].split()[1] == "0.3" and "new classifier" in rows["body_rate"]
    for words_of_user, rate in (
        (["--variable-filter", "Top"], "1.0"),
        (["--variable-filter", "Top", "block2", "--body-rate", 0.1], "0.1"),
    ):
        out = run(*words, "--dry-run", *words_of_user)[1]
        assert re.search(rf"(?m)^body_rate +{rate}\b", out)
    assert "new classifier" in rows["global_batch_size"]
    assert rows["global_batch_size"].split()[1] == "16" and "adamw" in rows["optimizer"]
    assert rows["epochs"].split()[1] == "100"
    file = tmp_path / "theirs.safetensors"
    from effnet_repro.convert.torch_files import write_torch

    write_torch(file, network())
    words = ["finetune", file, *words[2:], "--run-dir", tmp_path / "run", "--no-progress"]
    status, out, err = run(*words, "--epochs", 1, "--max-steps", 1, "--variable-filter", "Top")
    assert status == 0, err
    assert "new classifier for 2 classes; 1 of them" in out
    status, out, _ = run("predict", tmp_path / "run", data_dir / "val", "--top", 1, "--csv")
    assert status == 0 and len(out.splitlines()) == 9
    assert "trains with Keras" in refused(*words, "--print-poprun")
    assert "Unknown protocol" in refused(*words, "--protocol", "transfr")


def test_where_a_run_goes(old, data_dir, tmp_path, monkeypatch):
    data = open_data(data_dir, verbose=False)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    place = tmp_path / "run" / "checkpoints" / "epoch-0001.safetensors"
    place.write_bytes(old.read_bytes())
    for source in (tmp_path / "run", place.parent, place):
        assert transfer.run_folder(source, data) == tmp_path / "run" / "new-head-pets"
    assert transfer.run_folder(tmp_path / "b0.weights.h5", data).as_posix() == "runs/b0-pets"


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_compares_draws_that_both_starts_had():
    import bench_transfer

    about = {"device": "CPU", "command": "x", "seed": 0, "n": 1}
    common = dict(case="B0", image_size=32, images_a_class=10, steps=4, batch=2, about=about)

    def line(start, draw, top1, on="validation", rate=-12.0):
        own = dict(start=start, draw=draw, top1=top1, measured_on=on)
        return {**common, **own, "rate_exponent": rate, "body_rate": 1.0}

    lines = [line("whole", draw, 0.8 + draw / 100) for draw in (2, 0, 1)]
    lines += [line("scratch", draw, 0.5) for draw in (0, 1)]
    lines += [line("whole", 100, 0.1, "held back"), line("whole", 100, 0.3, "held back", -11.0)]
    rows = {
        (r["start"], r["rate_exponent"], r["measured_on"]): (r, o)
        for r, o in bench_transfer.rows_of(lines)
    }
    row, origin = rows["whole", -12.0, "validation"]
    assert (row["top1"], row["gain"], origin["seed"], origin["n"]) == (0.81, 0.305, "0 to 2", 3)
    assert row["gain_n"] == 2 and row["gain_half_interval"] == pytest.approx(
        12.706 * 0.005, abs=1e-4
    )
    assert rows["scratch", -12.0, "validation"][0]["gain"] == ""
    assert rows["whole", -11.0, "held back"][0]["gain"] == ""
    assert bench_transfer.best_rates([x for x in lines if x["measured_on"] == "held back"]) == (
        -11,
        1,
    )


def test_the_benchmark_keeps_apart_what_it_chooses_on_and_what_it_measures():
    import bench_transfer

    bench = bench_transfer.Bench.__new__(bench_transfer.Bench)
    bench.data = open_data(verbose=False)
    bench.new = range(bench.data.num_classes)[-3:]
    bench._set_apart()
    place = lambda split: set(zip(split.file, split.offset))
    drawn, chosen = bench.draw(10, 0), bench.judged["held back"]
    assert not place(drawn.splits["train"]) & place(chosen.splits["validation"])
    assert drawn.class_names == bench.data.class_names[-3:] == chosen.class_names
    assert np.bincount(drawn.splits["train"].label).tolist() == [10] * 3
    again, other = (bench.draw(10, seed).splits["train"] for seed in (0, 1))
    assert place(again) == place(drawn.splits["train"]) != place(other)
    measured = bench.judged["validation"].splits["validation"]
    for label, name in enumerate(drawn.class_names):
        there = bench.data.splits["validation"]
        whole = (there.label == bench.data.class_names.index(name)).sum()
        assert (measured.label == label).sum() == whole > 0
