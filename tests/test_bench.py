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


def test_a_profile_adds_up_kinds_of_kernels():
    from bench_profile import KINDS, OTHER, by_kind

    from effnet_repro.kernels import conv, norm, norm_product, product_norm

    modules = (conv, norm, norm_product, product_norm)
    functions = {name.strip("_") for module in modules for name in vars(module)}
    named = {one for pattern in list(KINDS)[:-1] for one in pattern.split("|")}
    assert named <= functions  # a kernel that was renamed would be counted among the others
    meta = lambda name, text, **at: {"ph": "M", "name": name, "args": {"name": text}, **at}
    run = lambda name, pid, dur: {"ph": "X", "name": name, "pid": pid, "tid": 7, "dur": dur}
    events = [
        meta("process_name", "/device:GPU:0", pid=1),
        meta("process_name", "/host:CPU", pid=2),
        *(meta("thread_name", "Stream #7", pid=pid, tid=7) for pid in (1, 2)),
        run("conv_rows__3", 1, 4000),
        run("conv_rows", 1, 2000),
        run("nvjet_sm90_tst_32x64", 1, 500),
        run("loop_add_fusion_12", 1, 100),
        run("conv_rows", 2, 9000),
    ]
    found = by_kind(events, 2)
    assert found[KINDS["conv_rows"]] == [3.0, 1.0] and found[OTHER] == [0.05, 0.5]
    assert sum(ms for ms, _ in found.values()) == 3.3
