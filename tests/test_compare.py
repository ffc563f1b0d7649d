"""`effnet-compare`: what two runs differ in, on the files that an earlier version left and on damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import PYTHON

from effnet_repro.cli import main
from effnet_repro.runs.compare import curves, differing, read_story, scores

EARLIER = Path(__file__).with_name("data") / "earlier_run"


@pytest.fixture
def other(tmp_path):
    "A copy of the earlier run with other fields, one epoch more and another score."
    shutil.copytree(EARLIER, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["seed"], config["case"]["mixup_alpha"] = 7, 0.25
    path.write_text(json.dumps(config))
    (tmp_path / "other" / "environment.json").write_text(
        json.dumps({"device": "a GPU", "date": "today", "versions": {"jax": "1.0"}})
    )
    with (tmp_path / "other" / "metrics.csv").open("a") as file:
        file.write("2.0,6,1.5,0.5,nan,0.01,5,,,\n")
    text = (tmp_path / "other" / "validation.csv").read_text()
    (tmp_path / "other" / "validation.csv").write_text(text.replace("0.2033333", "0.3033333"))
    return tmp_path / "other"


def test_two_runs_side_by_side(other):
    a, b = read_story(EARLIER), read_story(other)
    found = {row["field"]: (row["a"], row["b"]) for row in differing(a, b)}
    alpha = json.loads((EARLIER / "config.json").read_text())["case"]["mixup_alpha"]
    assert found == {
        "mixup_alpha": (alpha, 0.25),
        "seed": (0, 7),
        "device": (None, "a GPU"),
        "jax": (None, "1.0"),
    }
    rows = curves(a, b)
    assert [row["epoch"] for row in rows] == [1.0, 1.3333, 2.0]
    assert rows[-1]["loss a"] is None and rows[-1]["loss b"] == 1.5
    assert rows[-1]["validation_top1 b"] is None  # an empty cell
    told = {(row["weights"], row["score"]): row["b - a"] for row in scores(a, b)}
    assert told["last, 32 px", "top1"] == pytest.approx(0.1)
    assert told["average, 32 px", "loss"] == 0


def test_long_curves_are_thinned_to_their_ends(other):
    with (other / "metrics.csv").open("a") as file:
        file.writelines(f"{n}.0,{3 * n},1.5,0.5,nan,0.01,5,,,\n" for n in range(3, 90))
    rows = curves(read_story(other), read_story(EARLIER))
    assert len(rows) == 12 and rows[0]["epoch"] == 1 and rows[-1]["epoch"] == 89


def test_the_command(other, capsys):
    assert main(["compare", str(EARLIER), str(other)]) == 0
    out = capsys.readouterr().out
    assert "fields that differ" in out and "b - a" in out and "scores on the validation" in out
    assert main(["compare", str(EARLIER), str(EARLIER)]) == 0
    assert "no field differs" in capsys.readouterr().out
    assert main(["compare", str(EARLIER), str(other), "--json"]) == 0
    assert {"fields", "curves", "scores"} < set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[1]", "holds no JSON object"),
        ("config.json", "{}", "does not say which case"),
        ("config.json", '{"case": 5}', "does not say which case"),
        ("config.json", '{"case": {}}', "does not say which case"),
        ("environment.json", "\udcff", "environment.json is not text in UTF-8"),
        ("metrics.csv", "epoch,loss\n1", "its last row is cut off"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(other, capsys, name, text, said):
    (other / name).unlink()
    if text is not None:
        (other / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["compare", str(EARLIER), str(other)]) == 1
    err = capsys.readouterr().err
    assert said in err and str(other) in err and err.count("\n") == 1


def test_a_run_that_diverged_is_compared(other, capsys):
    with (other / "metrics.csv").open("a") as file:
        file.write("3.0,9,inf,0.1,nan,0.01,5,,,\n1e999,12,nan,0.1,nan,0.01,5,,,\n")
    assert main(["compare", str(EARLIER), str(other)]) == 0
    assert main(["compare", str(EARLIER), str(other), "--json"]) == 0
    assert "Infinity" not in capsys.readouterr().out


def test_names_of_any_bytes_are_printed_in_a_line(other, tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m"
    shutil.copytree(os.fsencode(other), place)
    for locale in ({}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        words = [sys.executable, "-m", "effnet_repro.cli", "compare", str(EARLIER), place]
        done = subprocess.run(words, env={**PYTHON, **locale}, capture_output=True)
        assert done.returncode == 0 and done.stdout.splitlines()[1].endswith(
            b"caf\\xe9\\n\\x1b[31m"
        )
