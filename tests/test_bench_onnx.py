"""The benchmark of exported files runs, and its rows have the columns that the page reads. Nothing is timed."""

import csv

import bench_onnx
import pytest
from test_export import RUN


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_speed_has_a_row_for_every_file_and_batch(tmp_path):
    assert bench_onnx.main(["--quick", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path / "onnx_cpu.csv")
    names = {(r["name"], r["precision"], r["batch"]) for r in found}
    assert {(n, "float32", str(b)) for n, _ in bench_onnx.OURS for b in (1, 32)} <= names
    assert all(float(r["cpu_ms_an_image"]) > 0 and r["device"] and r["revision"] for r in found)


@pytest.mark.long
def test_accuracy_in_int8_is_measured_on_all_validation_images(tmp_path, sample):
    assert (
        bench_onnx.main(["--run", str(RUN), "--data", str(sample.root), "--out", str(tmp_path)])
        == 0
    )
    found = rows(tmp_path / "onnx_int8.csv")
    assert [r["precision"] for r in found] == ["float32", "int8"]
    assert {r["images"] for r in found} == {"300"} and 0.8 < float(found[1]["same"]) <= 1
