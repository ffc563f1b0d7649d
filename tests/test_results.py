"""Result files say where every number is from, and nothing can be written that does not."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from effnet_repro import results
from effnet_repro.runs import environment

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {
    "device": "CPU, 2 cores",
    "versions": {"numpy": "2"},
    "command": "make bench",
    "revision": "0123abc",
    "uncommitted_changes": False,
    "seed": 0,
    "n": 3,
    "date": "2026-11-28T03:00:00+00:00",
}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_replace_rows_of_the_same_key(tmp_path):
    path = tmp_path / "speed.csv"
    rows = [dict(name="a", size=1, ms=2.5), dict(name="a", size=2, ms=4.5)]
    results.write_rows(path, rows, ("name", "size"), ABOUT)
    results.write_rows(path, [dict(name="a", size=2, ms=4.0)], ("name", "size"), ABOUT)
    written = read(path)
    assert [(r["name"], r["size"], r["ms"]) for r in written] == [
        ("a", "1", "2.5"),
        ("a", "2", "4.0"),
    ]
    assert list(written[0]) == ["name", "size", "ms", *results.REQUIRED]
    assert json.loads(written[0]["versions"]) == {"numpy": "2"} and written[0]["seed"] == "0"
    assert results.untraceable(path) == []


@pytest.mark.parametrize("name", results.REQUIRED)
def test_a_row_without_its_origin_is_refused(tmp_path, name):
    path = tmp_path / "speed.csv"
    for value in (None, "", "  "):
        with pytest.raises(ValueError, match=f"no {name}"):
            results.write_rows(path, [dict(ms=1)], ("ms",), {**ABOUT, name: value})
    with pytest.raises(ValueError, match=f"no {name}"):
        results.write_values(tmp_path / "a.json", {}, {k: ABOUT[k] for k in ABOUT if k != name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, value", [("n", 0), ("n", "many"), ("date", "today"), ("revision", "main"), ("seed", "?")]
)
def test_a_row_with_half_an_origin_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}'".replace("?", r"\?")):
        results.write_rows(tmp_path / "a.csv", [dict(ms=1)], ("ms",), {**ABOUT, name: value})


def test_a_file_with_such_a_row_is_found(tmp_path):
    path = tmp_path / "speed.csv"
    results.write_rows(path, [dict(ms=1), dict(ms=2)], ("ms",), ABOUT)
    path.write_text(path.read_text().replace("make bench", "", 1))
    assert results.untraceable(path) == ["speed.csv, row 1: no command"]
    path = tmp_path / "one.json"
    results.write_values(path, {"loss": 1.5}, ABOUT)
    assert results.untraceable(path) == [] and json.loads(path.read_text())["loss"] == 1.5
    path.write_text('{"loss": 1.5}')
    assert len(results.untraceable(path)) == len(results.REQUIRED)


def test_origin_is_complete_in_a_checkout(monkeypatch):
    monkeypatch.setenv("EFFNET_REVISION", "0123456789abcdef-dirty")
    about = results.origin(
        "CPU", ["python", "x.py"], seed=results.NO_SEED, n=1, versions={"torch": "2"}
    )
    assert (about["revision"], about["uncommitted_changes"]) == ("0123456789abcdef", True)
    assert about["versions"]["torch"] == "2" and "numpy" in about["versions"]
    assert results.missing(about) == []
    monkeypatch.delenv("EFFNET_REVISION")
    git = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        assert results.revision()["revision"] == done.stdout.strip()


def test_new_results_are_no_changes_of_the_program(tmp_path, monkeypatch):
    (tmp_path / "effnet_repro").mkdir()
    (tmp_path / "results").mkdir()
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    module = tmp_path / "effnet_repro" / "results.py"
    module.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.delenv("EFFNET_REVISION", raising=False)
    monkeypatch.setattr(environment, "__file__", str(module))
    (tmp_path / "results" / "new.csv").write_text("1")
    assert results.revision()["uncommitted_changes"] is False
    module.write_text("changed")
    assert results.revision()["uncommitted_changes"] is True


def test_a_command_names_no_folder_of_this_machine():
    words = [
        "python",
        "a.py",
        "--data",
        "/" + "data/imagenette128",
        "--out=/" + "x/y/",
        "1,2",
        "96 px",
    ]
    said = 'python a.py --data $DATA/imagenette128 --out=$DATA/y 1,2 "96 px"'
    assert results.portable(words) == said


def test_the_gpu_benchmark_writes_whole_rows(tmp_path):
    import bench_gpu

    about = {"flags": "", **results.origin("GPU", ["bench_gpu.py"], 0, 1, bench_gpu.versions())}
    table = bench_gpu.Table(
        tmp_path / "gpu.csv", ("name", "mode"), {**about, "revision": "0123abc"}
    )
    for speed in ([1.0, 3.0, 2.0], [4.0, 5.0]):
        table.add({"name": "a", "mode": "train", **bench_gpu.spread(speed, "images_per_s")})
    (row,) = read(tmp_path / "gpu.csv")
    assert (row["images_per_s"], row["n"], row["seed"]) == ("4.5", "2", "0")
    assert results.untraceable(tmp_path / "gpu.csv") == []


def test_every_committed_row_says_where_it_is_from():
    "`published_figure.csv` alone is the paper's data; each of its rows names its source."
    files = [p for p in sorted((ROOT / "results").iterdir()) if p.name != "README.md"]
    assert len(files) > 10 and {p.suffix for p in files} <= {".csv", ".json"}
    wrong = [w for p in files if p.name != "published_figure.csv" for w in results.untraceable(p)]
    assert wrong == []
    assert all("figure of" in r["source"] for r in read(ROOT / "results" / "published_figure.csv"))


def test_every_file_has_a_line_in_the_folder_s_readme():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert [
        p.name
        for p in (ROOT / "results").iterdir()
        if p.suffix != ".md" and f"`{p.name}`" not in text
    ] == []


def test_best_peer_is_of_the_same_call_mode_and_family():
    row = lambda name, size, speed, call="a", mode="train": dict(
        name=name, image_size=size, images_per_s=speed, call=call, mode=mode
    )
    ours = row("B0-G16-LN_PN-Half", 160, 9)
    best = row("keras.applications EfficientNetB0", 224, 5)
    rows = [ours, row("timm efficientnet_b0, compiled", 224, 4), best]
    rows += [row("keras.applications EfficientNetB0", 160, 7), row("timm efficientnet_b4", 224, 8)]
    rows += [
        row("keras.applications EfficientNetB0", 224, 8, call="b"),
        row("timm resnet50", 224, 8),
    ]
    rows += [row("timm efficientnet_b0", 224, 8, mode="infer"), row("B0-G1-GN-Native", 224, 8)]
    assert results.best_peer(rows, ours, 224) == best
    assert results.best_peer(rows, ours)["image_size"] == 160
    assert results.best_peer(rows, ours, 380) is None
    alone = dict(ours, call="c")
    assert results.best_peer(rows, alone, 224) is None
    assert results.best_peer(rows, alone, 224, same_call=False)["images_per_s"] == 8
    assert results.best_peer(rows, dict(alone, device="x"), 224, same_call=False) is None


def test_a_run_s_rows_say_what_the_run_noted(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    machine = {
        **{k: ABOUT[k] for k in ABOUT if k not in ("command", "seed", "n")},
        "python": "3",
        "backend": "jax",
    }
    (run / "environment.json").write_text(json.dumps(machine))
    config = {"case": {"name": "B0"}, "seed": 7, "data_fingerprint": "f00d"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.csv").write_text("epoch,loss\n1,2.5\n2,2.0\n")
    results.write_curve(tmp_path / "curve.csv", run, ["effnet-train", "B0"])
    rows = read(tmp_path / "curve.csv")
    assert [(r["case"], r["epoch"], r["loss"], r["seed"], r["data_fingerprint"]) for r in rows] == [
        ("B0", "1", "2.5", "7", "f00d"),
        ("B0", "2", "2.0", "7", "f00d"),
    ]
    assert rows[0]["command"] == "effnet-train B0" and rows[0]["revision"] == ABOUT["revision"]
