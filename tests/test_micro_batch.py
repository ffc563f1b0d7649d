"""The micro-batch that a machine gets: it fits, divides, keeps mixing groups whole, and stays what a run began with."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from effnet_repro.config import get_case
from effnet_repro.runs import resolve_training
from effnet_repro.training import memory, settle_run
from effnet_repro.training import micro_batch as module

RESULTS = Path(__file__).parents[1] / "results"
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
GIB = 2**30


def _peaks():
    "Rows of training steps of ours: case, images at a time, measured GiB"
    with (RESULTS / "gpu_speed.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "train" and r["peak_gib"]]
    layouts = {"B0": "2x8", "B4": "4x4"}
    ours = [r for r in rows if r["name"][:2] in layouts and "G1-GN-Half" not in r["name"]]
    return [
        (f"{r['name']}_16IPU_{layouts[r['name'][:2]]}", int(r["batch"]), float(r["peak_gib"]))
        for r in ours
    ]


@pytest.mark.parametrize("name, images, peak", _peaks())
def test_the_model_of_memory_covers_what_was_measured(name, images, peak):
    modeled = memory.needed_bytes(get_case(name), images) / GIB
    assert peak < modeled < 1.25 * peak


@pytest.fixture
def gpus(monkeypatch):
    "Pretends that JAX computes on so many GPUs of so much memory"
    import jax

    def pretend(count, memory):
        monkeypatch.setattr(module, "has_jax_gpu", lambda: True)
        monkeypatch.setattr(jax, "local_devices", lambda: [object()] * count)
        monkeypatch.setattr(module, "memory_of_gpu", lambda: memory)

    return pretend


@pytest.mark.parametrize(
    "count, memory, micro",
    [(1, 79 * GIB, 768), (4, 79 * GIB, 192), (1, 8 * GIB, 384), (1, 1, 1), (5, 79 * GIB, 192)],
)
def test_the_largest_that_fits_and_divides(gpus, tmp_path, count, memory, micro):
    gpus(count, memory)
    run = resolve_training(CASE, tmp_path, "case", True)
    settled = settle_run(run, "bfloat16")
    case = settled.case
    assert case.micro_batch_size == micro
    assert case.micro_batch_size * case.gradient_accumulation == case.global_batch_size == 768
    assert case.mix_groups == run.case.mix_groups  # what is drawn does not depend on the GPU
    assert "micro_batch_size" in settled.settled and settle_run(settled, "bfloat16") is settled


@pytest.mark.parametrize("words", [[], ["--precision", "16.32"], ["--precision", "bfloat16"]])
def test_the_command_gives_it_with_any_precision(gpus, tmp_path, monkeypatch, capsys, words):
    from effnet_repro.cli import train, train_command

    gpus(1, 16 * GIB)
    monkeypatch.setattr(train, "chosen_backend", lambda args: "jax")
    monkeypatch.setattr(train, "start_keras", lambda args: None)
    words = [CASE, "--run-dir", str(tmp_path / "run"), "--budget", "case", "--dry-run", *words]
    assert not train_command(words)
    most = 768 if words[-1] == "bfloat16" else 384  # auto is float32 here
    assert f"micro-batch: {most} images" in capsys.readouterr().out


def test_what_was_asked_for_or_begun_stays(gpus, tmp_path):
    gpus(1, 79 * GIB)
    asked = resolve_training(CASE, tmp_path, "case", True, micro_batch_size=48)
    begun = replace(resolve_training(CASE, tmp_path, "case", True), begun=True)
    run = resolve_training(CASE, tmp_path, "case", True)
    batch_norm = replace(run, case=replace(run.case, norm="BN"))
    earlier = replace(run, case=replace(run.case, mix_group_size=0))
    for one in (asked, begun, batch_norm, earlier):
        assert settle_run(one, "bfloat16") is one


@pytest.mark.parametrize(
    "gib, size, micro", [(64, 160, 96), (12, 160, 48), (4, 160, 24), (16, 64, 96), (None, 64, 24)]
)
def test_a_cpu_takes_many_images_where_there_is_memory(monkeypatch, tmp_path, gib, size, micro):
    monkeypatch.setattr(module, "found_gib", lambda: gib)
    monkeypatch.setattr(module, "has_jax_gpu", lambda: False)
    monkeypatch.setattr(module, "is_tensorflow_cpu", lambda: True)
    run = resolve_training(CASE, tmp_path, "case", True, image_size=size)
    case = settle_run(run).case
    assert case.micro_batch_size == micro and case.micro_batch_size % case.mix_group_size == 0
    assert case.micro_batch_size * case.gradient_accumulation == 768
    if micro > 24:
        assert memory.needed_gib(case, micro) <= module.CPU_SHARE * gib


def test_jax_on_a_cpu_keeps_the_case(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "has_jax_gpu", lambda: False)
    monkeypatch.setattr(module, "is_tensorflow_cpu", lambda: False)
    run = resolve_training(CASE, tmp_path, "case", True)
    assert settle_run(run) is run
