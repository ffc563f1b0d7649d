"""Runs of a tiny network that are stopped, damaged and validated, through what a user calls."""

import csv
import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
from images import noise_folders
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro.runs import watch
from effnet_repro.training import Evaluator, train, validate

OPTIONS = {**SMOKE, "max_steps": 9, "epochs": 3, "global_batch_size": 4, "micro_batch_size": 4}
OPTIONS["validate_every"] = 1


# A damaged checkpoint costs a line of the run's own, not Python's warning with lines of source.
pytestmark = pytest.mark.filterwarnings("error::UserWarning:effnet_repro")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_folders(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    run = train(TINY, images, tmp_path_factory.mktemp("whole"), **OPTIONS)
    assert run.finished
    return run


def rows(run_dir, name="metrics.csv"):
    with (run_dir / name).open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in found]


def copy_of(run, folder):
    "The files of a run that is done."
    shutil.copytree(run.run_dir, folder)
    return folder


def same(run_dir, whole):
    for name in ("epoch-0003.safetensors", "average.safetensors"):
        ours, theirs = (checkpoint.load(d / "checkpoints" / name)[0] for d in (run_dir, whole))
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], key)
    for name in ("metrics.csv", "validation.csv"):
        assert rows(run_dir, name) == rows(whole, name)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    "Send a signal to this process during a step: the progress bar counts them. SIGHUP takes the terminal, too."
    import tqdm

    done, update = [0], tqdm.tqdm.update

    def counted(bar, *n):
        done[0] += 1
        if done[0] == step:
            os.kill(os.getpid(), number)
        if done[0] >= step and number == signal.SIGHUP:
            raise OSError(errno.EIO, "Input/output error")
        return update(bar, *n)

    monkeypatch.setattr(tqdm.tqdm, "update", counted)


@pytest.mark.parametrize("step, number", [(5, signal.SIGHUP), (6, signal.SIGTERM)])
def test_a_stop_loses_no_row_and_no_step(images, whole, tmp_path, monkeypatch, step, number):
    "Within an epoch its loss left out the steps before, in its last step it had no row."
    stop_at(monkeypatch, step, number)
    run = train(TINY, images, tmp_path, **OPTIONS)
    monkeypatch.undo()
    assert not run.finished and run.update == step
    if step == 6:
        assert [r["update"] for r in rows(tmp_path)] == ["3", "6"]
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    assert train(TINY, images, tmp_path, **OPTIONS).finished
    same(tmp_path, whole.run_dir)


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_the_average_does_not_start_over(images, whole, tmp_path, capsys, damage):
    "The newest checkpoint is lost: the run goes on from the one before, with that one's average."
    run_dir = copy_of(whole, tmp_path / "run")
    newest = run_dir / "checkpoints" / "epoch-0003.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    {
        "cut": lambda: newest.write_bytes(content[:-100]),
        "flip": lambda: newest.write_bytes(content),
    }.get(damage, newest.unlink)()
    finished = train(TINY, images, run_dir, **OPTIONS).finished  # or a signal from outside came
    assert finished and "going on from epoch-0002.safetensors, step 6" in capsys.readouterr().out
    same(run_dir, whole.run_dir)


def test_a_cut_row_and_a_lost_average_come_back(images, whole, tmp_path):
    run_dir = copy_of(whole, tmp_path / "run")
    metrics = run_dir / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    (run_dir / "checkpoints" / "average.safetensors").unlink()
    assert train(TINY, images, run_dir, **OPTIONS).finished
    same(run_dir, whole.run_dir)


def test_keras_json_is_for_layers_of_the_user(images, tmp_path):
    "float16 or channels_first, there, ended a run in its first step."
    from keras import config

    try:
        config.set_floatx("float16")
        config.set_image_data_format("channels_first")
        assert train(TINY, images, tmp_path, **{**OPTIONS, "max_steps": 1}).finished
        assert (config.floatx(), config.image_data_format()) == ("float16", "channels_first")
    finally:
        config.set_floatx("float32")
        config.set_image_data_format("channels_last")


# ---------------------------------------------------------------- validation


@pytest.fixture
def measured(monkeypatch):
    "Counts what is measured; the numbers are those of how many images there are."
    from effnet_repro.runs import Scores

    seen = []

    def evaluate(evaluator, weights, data, size, *args, **how):
        seen.append(data.root)
        n = data.validation_count
        return Scores(1 / n, 1.0, 0.25, n, size, 1.0, np.eye(evaluator.spec.num_classes))

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    return seen


def test_a_validation_knows_its_images(images, whole, tmp_path, monkeypatch, measured):
    "Before, numbers of changed images and of another folder of the same name were taken for today's."
    run_dir = copy_of(whole, tmp_path / "run")
    (run_dir / "validation.csv").unlink()
    for place in ("here", "there"):
        shutil.copytree(images, tmp_path / place / "data")
    (tmp_path / "there" / "data" / "validation" / "a" / "0.png").unlink()
    for place, count in (("here", 6), ("there", 5)):
        monkeypatch.chdir(tmp_path / place)
        found = validate(run_dir, "data", weights="all")
        assert {s.pictures for s in found.values()} == {count} and len(found) == 3
        assert validate(run_dir, "data", weights="all") == {}
        assert (
            validate(run_dir, tmp_path / place / "data", weights="all") == {}
        )  # it is the same folder
    assert {r["data"] for r in rows(run_dir, "validation.csv")} == {
        str(tmp_path / p / "data") for p in ("here", "there")
    }
    a, b = (tmp_path / "here" / "data" / "validation" / n for n in "ab")
    (a / "0.png").rename(a / "x.png")
    (b / "0.png").rename(a / "0.png")
    (a / "x.png").rename(b / "0.png")
    monkeypatch.chdir(tmp_path / "here")
    assert len(validate(run_dir, "data", weights="all")) == 3  # as many images, and others
    table = rows(run_dir, "validation.csv")
    assert len(table) == 6 and len({r["data_fingerprint"] for r in table}) == 2


def test_a_folder_that_cannot_be_written_loses_no_number(
    images, whole, tmp_path, monkeypatch, caplog, measured
):
    "Before, what was computed was lost with the first row that could not be written."

    def refuse(run_dir, *_, **__):
        raise PermissionError(
            errno.EACCES, f"Cannot write {run_dir}/validation.csv: it is read-only."
        )

    monkeypatch.setattr("effnet_repro.training.validation.write_scores", refuse)
    assert set(validate(whole.run_dir, images, weights="both")) == {"last", "average"}
    assert [r.message for r in caplog.records if "validation.csv: left out" in r.message]


def test_the_command_prints_numbers_and_which_images(images, whole, tmp_path, capsys, measured):
    from effnet_repro import cli

    run_dir, other = copy_of(whole, tmp_path / "run"), tmp_path / "v1.0"
    shutil.copytree(images, other)
    for data_dir in (images, other):
        assert cli.main(["validate", str(run_dir), "--data-dir", str(data_dir)]) == 0
    said = capsys.readouterr().out
    assert str(images) in said and str(other) in said
    assert cli.main(["validate", str(run_dir), "--data-dir", str(other), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        numbers = [row[k] for k in ("top1", "top5", "loss", "pictures", "image_size", "update")]
        assert [type(n) for n in numbers] == [float] * 3 + [int] * 3
        assert isinstance(row["data"], str) and isinstance(row["data_fingerprint"], str)
