"""What a run writes down, driven by a loop of NumPy: interrupted anywhere, it leaves what it would have left."""

import csv
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from effnet_repro import checkpoint
from effnet_repro.config import case_to_dict
from effnet_repro.runs import Scores, Stopped, read_metrics, recorder
from effnet_repro.runs.recorder import TIMING, Course, Meter, Recorder

COURSE = Course(TINY, steps_per_epoch=3, last_step=12, validate_every=1, keep=2)
FACTS = {"case": case_to_dict(TINY), "seed": 0, "num_classes": 10}


def weights(step):
    return {"all/w": np.random.default_rng(step).normal(size=50).astype("float32")}


def scores(step):
    top1, top5, loss = np.random.default_rng([step, 1]).random(3)
    return Scores(top1, top5, loss, 8, 32, 1.0, np.eye(10))


class Killed(BaseException):
    "Nothing catches it, and nothing is written after it: a kill, seen from the files."


class Loop:
    "A run of twelve steps; `at` is called with the name of every event and may raise."

    def __init__(self, run_dir, course=COURSE, at=lambda event: None):
        self.recorder, self.at = Recorder(run_dir, course, FACTS), at

    def state(self):
        w = weights(self.recorder.step)
        return {**w, "slots/momentum/all/w": w["all/w"] * 2}

    def measure(self):
        self.at(f"validate {self.recorder.step}")
        return scores(self.recorder.step)

    def run(self):
        r = self.recorder
        found = r.find()
        if found is not None:
            np.testing.assert_array_equal(found[1]["all/w"], weights(found[2]["update"])["all/w"])
        r.resume(found)
        try:
            r.complete_row(self.measure)
            while r.step < r.course.last_step:
                r.step += 1
                r.count(*np.random.default_rng([r.step, 2]).random(2))
                self.at(f"step {r.step}")
                if r.ends_epoch():
                    r.end_epoch(self.state(), self.measure)
        except Stopped:
            r.stop(self.state)
        return self


def rows_of(run_dir):
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if k not in TIMING} for r in csv.DictReader(file)]


def left(run_dir):
    "Rows, names of columns, and bytes of the last checkpoint and of the average."
    folder = Path(run_dir) / "checkpoints"
    last = checkpoint.latest(folder).read_bytes()
    header = (Path(run_dir) / "metrics.csv").read_text().splitlines()[0]
    return rows_of(run_dir), header, last, (folder / "average.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Loop(folder).run()
    return folder


def at(event, what=Stopped):
    "A function that raises when `event` comes."

    def look(now):
        if now == event:
            raise what

    return look


# ---------------------------------------------------------------- stops and kills


def test_an_epoch_has_one_row(whole):
    rows = rows_of(whole)
    assert [r["update"] for r in rows] == ["3", "6", "9", "12"]
    losses = [np.random.default_rng([s, 2]).random(2)[0] for s in (4, 5, 6)]
    assert float(rows[1]["loss"]) == round(np.mean(losses), 6)
    assert float(rows[3]["validation_top5"]) == scores(12).top5


@pytest.mark.parametrize("what", [Stopped, Killed])
@pytest.mark.parametrize("event", ["step 1", "step 5", "step 6", "validate 6", "validate 12"])
def test_an_interrupted_run_leaves_the_same(whole, tmp_path, event, what):
    try:
        Loop(tmp_path, at=at(event, what)).run()
    except Killed:
        pass
    if event == "validate 6":  # a whole epoch has its row at once
        assert [r["update"] for r in rows_of(tmp_path)] == ["3", "6"]
    Loop(tmp_path).run()
    assert left(tmp_path) == left(whole)


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "effnet_repro.checkpoint._write"])
def test_killed_at_every_write(whole, tmp_path, monkeypatch, call):
    "The n-th write, rename or fsync of the run is its last."
    module, _, name = call.rpartition(".")
    real = getattr({"os": os, "effnet_repro.checkpoint": checkpoint}[module], name)
    for number in range(0, 60, 5):
        seen = []

        def die(*args, seen=seen, number=number):
            seen.append(args)
            if len(seen) > number:
                raise Killed
            return real(*args)

        run_dir = tmp_path / str(number)
        monkeypatch.setattr(call, die)
        try:
            Loop(run_dir).run()
        except Killed:
            pass
        monkeypatch.setattr(call, real)
        Loop(run_dir).run()
        assert left(run_dir) == left(whole), number


def test_a_part_of_an_epoch_gives_way_to_the_epoch(whole, tmp_path):
    "A run that ended within an epoch, and then goes on."
    short = Course(TINY, 3, 5, 1)
    Loop(tmp_path, short).run()
    assert [r["epoch"] for r in rows_of(tmp_path)] == ["1.0", "1.6667"]
    Loop(tmp_path).run()
    assert left(tmp_path) == left(whole)


def test_sums_of_several_processes():
    meters = [Meter(8), Meter(8)]
    for i, meter in enumerate(meters):
        meter.add(1.0 + i, 0.5)
        meter.share([[1.0, 0.5], [2.0, 0.5]])
    assert meters[0].means() == meters[1].means() == (1.5, 0.5)
    again = Meter(8)
    again.restore(json.loads(json.dumps(meters[0].state())), (1, 2))
    assert again.means() == (2.0, 0.5)
    again.restore(meters[0].state(), (0, 1))  # another number of processes: the mean
    assert again.means() == (1.5, 0.5)


# ---------------------------------------------------------------- damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


NEWEST = "checkpoints/epoch-0003.safetensors"
AVERAGE = "checkpoints/average.safetensors"


@pytest.mark.parametrize(
    "name, damage",
    [
        (NEWEST, cut),
        (NEWEST, flip),
        (NEWEST, Path.unlink),
        (AVERAGE, cut),
        (AVERAGE, flip),
        (AVERAGE, Path.unlink),
        (AVERAGE, lambda path: shutil.copy(path.parents[2] / "newer", path)),
        ("metrics.csv", lambda path: path.write_bytes(path.read_bytes()[:-5])),
        ("metrics.csv", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("metrics.csv", lambda path: path.write_bytes(b"")),
        ("metrics.csv", lambda path: path.write_bytes(bytes(range(256)))),
        ("metrics.csv", lambda path: path.write_text(path.read_text() + "1,2,3,4" * 9 + "\n")),
        ("metrics.csv", lambda path: path.write_text(path.read_text().replace(",6,", ",6,9", 1))),
        ("metrics.csv", Path.unlink),
    ],
)
def test_a_damaged_file_costs_a_line_at_most(whole, tmp_path, capsys, name, damage):
    "Before, the average started over, rows were lost or wrong, or the run did not go on."
    shutil.copy(whole / AVERAGE, tmp_path / "newer")
    run_dir, three = tmp_path / "run", replace(COURSE, keep=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a line, not Python's warning with lines of source
        Loop(run_dir, three, at=at("step 10")).run()
        (run_dir / "checkpoints" / "epoch-0003-update-000010.safetensors").unlink()
        damage(run_dir / name)
        capsys.readouterr()
        Loop(run_dir).run()
    said = capsys.readouterr().out
    assert left(run_dir) == left(whole)
    passed = "epoch-0002" if name == NEWEST else "epoch-0003"
    assert f"going on from {passed}.safetensors" in said
    damaged = name == NEWEST and damage is not Path.unlink
    assert said.count("passed over: ") == damaged and said.count("\n") <= 3


def test_nothing_starts_over_when_all_checkpoints_are_damaged(tmp_path):
    Loop(tmp_path, at=at("step 7")).run()
    for path in (tmp_path / "checkpoints").glob("epoch-*"):
        flip(path)
    with pytest.raises(ValueError, match="No checkpoint in .* is whole: .*To start over") as error:
        Loop(tmp_path).run()
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_not_deleted_before_its_step_comes_again(tmp_path):
    three = replace(COURSE, keep=3)
    Loop(tmp_path, three, at=at("step 10")).run()
    (tmp_path / "checkpoints" / "epoch-0003-update-000010.safetensors").unlink()
    flip(tmp_path / NEWEST)
    Loop(tmp_path, at=at("step 8")).run()
    kept = sorted(p.stem for p in (tmp_path / "checkpoints").glob("epoch-*"))
    assert kept == ["epoch-0002", "epoch-0002-update-000008", "epoch-0003"]


def test_a_damaged_file_is_not_one_of_those_kept(tmp_path):
    "Before, it took the place of a whole one: the next damage left none."
    Loop(tmp_path, at=at("step 7")).run()
    flip(tmp_path / "checkpoints" / "epoch-0002-update-000007.safetensors")
    Loop(tmp_path, at=at("validate 9")).run()
    kept = sorted(p.stem for p in (tmp_path / "checkpoints").glob("epoch-*"))
    assert kept == ["epoch-0002", "epoch-0003"]


def test_a_metrics_file_that_cannot_be_read_is_one_line(tmp_path):
    for content in (b"", bytes(range(256)), b"epoch,update\n1,2,3\n"):
        (tmp_path / "metrics.csv").write_bytes(content)
        with pytest.raises(
            ValueError, match="metrics.csv.* The training command, given again, writes it anew"
        ) as error:
            read_metrics(tmp_path)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- runs of older versions


def make_old(run_dir, rows=True):
    "Leave what an older version would have left."
    for path in checkpoint.list_checkpoints(run_dir / "checkpoints"):
        arrays, metadata = checkpoint.load(path, without=checkpoint.AVERAGE)
        for name in ("average", "epoch_sums", "rows", *(() if rows else ("row",))):
            del metadata[name]
        checkpoint.save(path, arrays, metadata)


def same_numbers(one, other):
    (a, b, _, c), (d, e, _, f) = left(one), left(other)
    return (a, b, c) == (d, e, f)


def test_a_run_of_an_older_version_goes_on_with_a_line(whole, tmp_path, capsys):
    Loop(tmp_path, at=at("validate 9")).run()
    make_old(tmp_path)
    capsys.readouterr()
    Loop(tmp_path).run()
    assert "its average is beside it, as older versions had it" in capsys.readouterr().out
    assert same_numbers(tmp_path, whole)
    Loop(tmp_path).run()
    assert "older versions" not in capsys.readouterr().out


def test_an_older_run_within_an_epoch_says_what_its_loss_leaves_out(tmp_path, capsys):
    Loop(tmp_path, at=at("step 8")).run()
    make_old(tmp_path)
    Loop(tmp_path).run()
    assert "leave out its first 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "harm, says",
    [
        (Path.unlink, "the average holds 2 of 3 epochs: there is no average.safetensors"),
        (flip, "the average holds 2 of 3 epochs: .*average.safetensors is damaged"),
        (
            lambda p: shutil.copy(p.parents[2] / "newer", p),
            "the average holds 2 of 3 epochs: average.safetensors is of step 12, after the checkpoint's 9",
        ),
    ],
)
def test_an_older_run_says_when_its_average_is_lost(whole, tmp_path, capsys, harm, says):
    shutil.copy(whole / AVERAGE, tmp_path / "newer")
    run_dir = tmp_path / "run"
    Loop(run_dir, at=at("validate 9")).run()
    make_old(run_dir)
    harm(run_dir / AVERAGE)
    Loop(run_dir).run()
    assert re.search(says, capsys.readouterr().out)


def test_an_older_run_mends_what_its_checkpoints_hold(whole, tmp_path):
    Loop(tmp_path, at=at("validate 9")).run()
    make_old(tmp_path)
    metrics = tmp_path / "metrics.csv"
    whole_file = metrics.read_bytes()
    metrics.write_bytes(whole_file[:-5])  # of the row that the newest checkpoint holds
    Loop(tmp_path).run()
    assert rows_of(tmp_path) == rows_of(whole)


@pytest.mark.parametrize("content", [b"", bytes(range(256)), b"a,b\n1,2\n"])
def test_an_older_run_whose_rows_are_lost_is_refused_with_one_line(tmp_path, content):
    Loop(tmp_path, at=at("validate 9")).run()
    make_old(tmp_path)
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match="metrics.csv.* The checkpoints hold 2 of its 3 rows") as e:
        Loop(tmp_path).run()
    assert "\n" not in str(e.value)
    (tmp_path / "metrics.csv").unlink()
    Loop(tmp_path).run()
    assert [r["update"] for r in rows_of(tmp_path)] == ["6", "9", "12"]


def test_the_module_needs_no_framework():
    assert "keras" not in Path(recorder.__file__).read_text().lower()
