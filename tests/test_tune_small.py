"""The search of a recipe for small sets: which trials it runs, and what its rows say. Nothing is timed."""

import csv
import json

import pytest
import tune_small


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Made:
    "A network whose top-1 is its weight decay"

    def __init__(self, args, data):
        self.args = args

    def train(self, rate, warmup, decay, mixup, epochs, seed):
        return dict(top1=decay, loss=1.0, judged_loss=1.0, seconds=1e-6)


def test_the_best_trial_is_trained_again_for_longer_and_every_row_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_small, "Ours", Made)
    out = tmp_path / "trials.jsonl"
    words = ["trials", "--out", str(out), "--drop-path", "0.2", "--quick"]
    trials = ["0.004,0.3,0.05,0.1,60", "0.008,0.3,0.5,0.2,60", "0.004,0.3,0.2,0.2,60", "best,150"]
    assert tune_small.main([*words, *trials]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["epochs"] for row in found] == [60, 60, 60, 150]
    assert (found[-1]["rate"], found[-1]["weight_decay"], found[-1]["mixup"]) == (0.008, 0.5, 0.2)
    assert {row["images"] for row in found} == {960}  # every fifth of 1,200 is held back
    assert tune_small.main(["rows", str(out), "--results", str(tmp_path)]) == 0
    written = rows(tmp_path / "recipe.csv")
    assert [row["kind"] for row in written] == ["trial"] * 4
    assert all(row["drop_path"] == "0.2" and row["command"] and row["revision"] for row in written)


@pytest.mark.long
def test_batch_norm_is_judged_in_three_ways(tmp_path):
    out = tmp_path / "norm.jsonl"
    assert tune_small.main(["norm", "--quick", "--out", str(out)]) == 0
    assert tune_small.main(["rows", str(out), "--results", str(tmp_path)]) == 0
    found = rows(tmp_path / "norm_judged.csv")
    assert [row["norm_batch"] for row in found] == ["0", "16"]
    assert all(0 <= float(row[way]) <= 1 for row in found for way in ("moving", "anew", "own"))


@pytest.mark.long
def test_the_command_says_what_it_reached(tmp_path, sample):
    out = tmp_path / "command.jsonl"
    words = ["command", "--quick", "--out", str(out), "--data-dir", str(sample.root)]
    assert tune_small.main(words) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["epochs"], row["weight_decay"], row["drop_path"]) == (150, 0.2, 0.2)
    assert 0 <= row["top1"] <= 1 and row["seconds"] > 0
