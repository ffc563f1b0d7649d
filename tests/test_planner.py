"""The model of a POD16 and its planner: all thirty cases, what must hold of any plan, and what is refused."""

import csv
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.cli import plan_command
from effnet_repro.config import load_cases
from effnet_repro.network import params, segments
from effnet_repro.pipeline import check_accumulation, overlap, split_segments
from effnet_repro.planner import (
    ARMS,
    MK2,
    Plan,
    anchor_cases,
    candidates,
    fit,
    memory_warning,
    plan,
    plot_plan,
    predict,
    published_throughputs,
    read_constants,
    replicas_on,
    segment_loads,
    time_by_kind,
)
from effnet_repro.scaling import ModelSpec, count

RESULTS = Path(__file__).resolve().parents[1] / "results"
CASES = load_cases()
PUBLISHED = published_throughputs(RESULTS / "published_figure.csv")


@pytest.fixture(scope="module")
def rows():
    with open(RESULTS / "pod16_prediction.csv", newline="") as file:
        return {r["case"]: r for r in csv.DictReader(file)}


# ---------------------------------------------------------------- loads


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("B0", "B3", "B5"))])
def test_loads_add_up_to_the_network(name):
    spec = ModelSpec.from_case(CASES[name])
    loads, whole = segment_loads(spec), count(spec)
    assert [x.name for x in loads] == [s.name for s in segments(spec)]
    assert sum(x.params for x in loads) == whole.params
    assert sum(x.params for x in loads) == sum(np.prod(p.shape) for p in params(spec))
    assert sum(x.dense + x.grouped for x in loads) == whole.macs
    assert all(min(x.memory) >= 0 and x.kept > 0 and x.entering > 0 for x in loads)
    assert (sum(x.memory[3] for x in loads) > 0) == spec.proxy_norm


# ---------------------------------------------------------------- the fit


def test_anchors_are_chosen_by_name_one_for_each_size():
    names = anchor_cases()
    assert [n for n in CASES if n in names] == list(names)
    assert {n[:2] for n in names} == {f"B{i}" for i in range(6)}
    arms = [a for a in ARMS for n in names if n.split("-", 1)[1].startswith(f"{a}_16IPU")]
    assert set(arms) == set(ARMS) and "B5-G1-GN-Native_16IPU_4x4" not in names


def test_stored_constants_and_predictions_are_those_of_the_program(rows):
    model = json.loads((RESULTS / "pod16_model.json").read_text())
    again = fit(PUBLISHED, anchor_cases())
    np.testing.assert_allclose(again, read_constants(), rtol=1e-3)
    assert model["fitted_to"] == list(anchor_cases()) and set(rows) == set(CASES)
    assert model["held_out"]["median_error"] < 0.10
    assert model["held_out"]["worst_error_on_chip"] < 0.25
    held = [abs(float(r["error"])) for r in rows.values() if r["fitted"] == "False"]
    assert len(held) == 24
    assert abs(np.median(held) - model["held_out"]["median_error"]) < 1e-3
    assert abs(max(held) - model["held_out"]["worst_error"]) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_predicted_and_planned(name, rows):
    case, row = CASES[name], rows[name]
    spec = ModelSpec.from_case(case)
    ours = predict(spec, Plan.from_case(case))
    assert ours.plan.num_stages == case.num_stages and ours.plan.global_batch_size == 768
    assert ours.images_per_s == pytest.approx(float(row["modeled_images_per_s"]), rel=1e-4)
    assert float(row["published_images_per_s"]) == PUBLISHED[name]
    assert 0 < ours.busy <= 1 and str(ours.fits) == row["fits"]
    assert sum(time_by_kind(spec, ours.plan).values()) == pytest.approx(16e6 / ours.images_per_s)
    best = plan(spec)
    assert best.fits and best.plan.global_batch_size == 768
    check_accumulation("Grouped", best.plan.num_stages, best.plan.gradient_accumulation)
    split_segments(spec, best.plan.splits, best.plan.num_stages)
    assert best.plan.num_replicas == replicas_on(16, best.plan.num_stages)
    assert best.images_per_s == pytest.approx(float(row["best_images_per_s"]), rel=1e-4)
    assert not ours.fits or best.images_per_s >= ours.images_per_s * (1 - 1e-9)


# ---------------------------------------------------------------- any plan

B0 = ModelSpec.from_name("B0-G16-LN_PN")
NAMES = [s.name for s in segments(B0)][1:]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.sets(st.integers(0, len(NAMES) - 1), max_size=4),
    micro_batch_size=st.integers(1, 16),
    blocks=st.integers(1, 6),
    name=st.sampled_from(("Grouped", "Interleaved", "Sequential")),
)
def test_what_holds_of_any_plan(cuts, micro_batch_size, blocks, name):
    splits = tuple(NAMES[i] for i in sorted(cuts))
    block = overlap(name, len(splits) + 1)
    small = Plan(splits, micro_batch_size, block * blocks, 4, name)
    p = predict(B0, small)
    assert 0 < p.busy <= 1 + 1e-9
    larger = predict(B0, small._replace(micro_batch_size=micro_batch_size + 1))
    assert larger.images_per_s > p.images_per_s  # fewer starts and waits for each image
    assert max(larger.stage_bytes) > max(p.stage_bytes)
    longer = predict(B0, small._replace(gradient_accumulation=2 * small.gradient_accumulation))
    assert longer.images_per_s > p.images_per_s  # a longer window dilutes the ramps
    weights = sum(p.memory["weights"])
    assert weights == pytest.approx(18 * count(B0).params)
    off = predict(B0, small._replace(offloaded=True))
    assert sum(off.memory["weights"]) == pytest.approx(weights * 4 / 18)


def test_the_planner_finds_what_trying_everything_finds():
    spec = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10)
    names = [s.name for s in segments(spec)][1:]
    best = plan(spec, 64, 4, global_batch_size=64, stages=(2,))
    tried = [
        predict(spec, Plan((name,), m, 32 // m, 2), 64)
        for name in names
        for m in (1, 2, 4, 8)  # 32 // m is a multiple of 4
    ]
    assert best.images_per_s == pytest.approx(max(p.images_per_s for p in tried if p.fits))


@pytest.mark.parametrize("num_ipus", [1, 2, 4, 16, 64])
def test_plans_for_other_machines(num_ipus):
    found = candidates(B0, 160, num_ipus, stages=(1, 2))
    assert found == sorted(found, key=lambda p: -p.images_per_s)
    for p in found:
        assert p.plan.num_stages * p.plan.num_replicas == num_ipus and p.fits


def test_half_resolution_is_faster_and_uses_the_size_asked_for():
    case = CASES["B2-G16-GN-Native_16IPU_4x4"]
    spec, laid_out = ModelSpec.from_case(case), Plan.from_case(case)
    whole, half = predict(spec, laid_out), predict(spec, laid_out, 196)
    assert half.images_per_s > whole.images_per_s
    assert max(half.stage_bytes) < max(whole.stage_bytes)


def test_a_plan_can_be_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = plot_plan(plan(B0, 160))
    assert "modeled" in axes[0].get_title() and "modeled" in axes[1].get_title()
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------- bad input


def test_stages_that_do_not_divide_the_ipus_are_refused():
    for num_stages, replicas in ((1, 16), (2, 8), (3, 4), (4, 4), (5, 2), (16, 1)):
        assert replicas_on(16, num_stages) == replicas
    says = "4 stages take 4 IPUs, which do not divide 6. Legal numbers of stages: 1, 2"
    with pytest.raises(ValueError, match=says):
        replicas_on(6, 4)
    with pytest.raises(ValueError, match="must be positive"):
        replicas_on(0, 1)
    with pytest.raises(ValueError, match="do not divide 6"):
        plan(B0, num_ipus=6)


def test_a_plan_that_does_not_fit_is_explained_with_its_numbers():
    case = CASES["B4-G16-GN-Native_16IPU_4x4"]
    spec, laid_out = ModelSpec.from_case(case), Plan.from_case(case)
    assert memory_warning(predict(spec, laid_out)) is None
    large = predict(spec, laid_out._replace(micro_batch_size=16, gradient_accumulation=8))
    assert not large.fits
    message = memory_warning(large)
    assert f"{max(large.stage_bytes) / 1e6:,.0f} MB of 900 MB" in message
    assert "micro_batch_size below 16" in message
    with pytest.raises(
        ValueError, match="No plan fits: B0-G16-LN_PN at 224 pixels on 16 IPUs of 20 MB"
    ):
        plan(B0, chip=MK2._replace(memory_bytes=20e6))


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="multiple of 4, but it is 6"):
        predict(B0, Plan(("block3b",), 8, 6, 8))
    with pytest.raises(ValueError, match="Unknown split 'block9a'"):
        predict(B0, Plan(("block9a",), 8, 8, 8))


def test_too_many_cuts_are_refused():
    with pytest.raises(ValueError, match="8 stages .* too many ways"):
        plan(B0, stages=(8,))


# ---------------------------------------------------------------- effnet-plan


def command(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = plan_command(list(words))
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_the_command_prints_both_plans_of_every_case(name, rows):
    status, out, err = command(name, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    for key, column in (("published plan", "modeled"), ("best plan", "best")):
        wanted = float(rows[name][f"{column}_images_per_s"])
        assert told[key]["images/s"] == pytest.approx(wanted, rel=1e-4)
        assert len(told[key]["stages"]) == int(told[key]["stages x replicas"].split(" x ")[0])
    assert bool(told["notes"]) == (rows[name]["fits"] == "False")


def test_the_command_for_other_machines_and_sizes(tmp_path):
    name = "B4-G16-LN_PN-Native_16IPU_4x4"
    for ipus in ("4", "16", "64"):
        status, out, err = command(name, "--ipus", ipus, "--image-size", "300")
        assert (status, err) == (0, "") and f"300 px, {ipus} IPUs" in out
        assert "best plan" in out and "published plan" not in out and "modeled" in out
    figure = tmp_path / "plan.png"
    assert command(name, "--figure", str(figure))[0] == 0 and figure.stat().st_size > 5000


@pytest.mark.parametrize(
    "words, message",
    [
        ("no-such-case", "Unknown case"),
        ("B4-G16-GN-Native_16IPU_4x4 --ipus 6", "do not divide 6"),
        ("B4-G16-GN-Native_16IPU_4x4 --ipus 0", "at least 1"),
        ("B4-G16-GN-Native_16IPU_4x4 --memory-mb 20", "No plan fits"),
        ("B4-G16-GN-Native_16IPU_4x4 --stages 8", "too many ways"),
        ("B4-G16-GN-Native_16IPU_4x4 --image-size 8", "--image-size must be at least 32"),
        ("B4-G16-GN-Native_16IPU_4x4 --pipeline-schedule grouped", "Did you mean 'Grouped'"),
    ],
)
def test_wrong_command_lines_are_one_line(words, message):
    status, out, err = command(*words.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1) and message in err
