"""The benchmark program runs, and its rows have the columns that the page reads. Nothing is timed."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "tests" / "bench_cpu.py"
FILES = ("cpu_speed.csv", "cpu_memory.csv", "cpu_sizes.csv", "reader_speed.csv")


def _read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    words = [sys.executable, str(BENCH), "--quick", "--results", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_columns_of_the_committed_file(quick, name):
    rows, committed = _read(quick / name), _read(ROOT / "results" / name)
    assert rows and set(rows[0]) == set(committed[0])
    for row in rows:
        numbers = [float(row[k]) for k in row if k.endswith(("_median", "_gib", "_s", "macs"))]
        assert numbers and all(n > 0 for n in numbers)
        assert row["device"] and row["versions"] and "bench_cpu.py" in row["command"]


def test_an_unknown_part_is_refused():
    words = [sys.executable, str(BENCH), "sped"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "no part called sped" in done.stderr


def test_bench_pixels_compares_the_device_with_the_host(tmp_path, capsys, monkeypatch):
    import bench_pixels

    words = ["--images", "6", "--sides", "24", "--results", str(tmp_path)]
    assert bench_pixels.main(words) == 0
    rows = _read(tmp_path / "pixels.csv")
    assert [(row["image_resize"], row["crop"]) for row in rows] == [
        (a, b) for a in ("published", "modern") for b in ("training", "validation")
    ]
    for row in rows:
        assert row["seed"] == "0" and int(row["values"]) == 6 * 24 * 24 * 3
        assert int(row["differing"]) == 0 or row["image_resize"] == "modern"
    # A host that rounds is caught.
    monkeypatch.setattr(
        bench_pixels.transforms, "_to_bytes", lambda v, _: np.rint(v).astype(np.uint8)
    )
    assert bench_pixels.main(words[:4]) == 1 and "NOT met" in capsys.readouterr().out
