"""The table of the paper's claims: who chooses its recipe, what is still missing, and what its rows say."""

import base64
import csv
import json

import bench_claims
import numpy as np
import pytest

from effnet_repro.data import open_data
from effnet_repro.results import untraceable


def line(arm, seed=0, rate=0.004, top1=0.5, **more):
    row = dict(arm=arm, seed=seed, rate=rate, warmup=0.3, weight_decay=0.05, epochs=20, top1=top1)
    row.update(image_size=128, test_size=128, top_epochs=0, judged=16, device="a GPU", n=1)
    row.update(right=base64.b64encode(np.packbits(np.ones(16, bool))).decode(), command="c")
    row.update(versions={"jax": "1"}, revision="abcdef0", uncommitted_changes=False)
    return {**row, "date": "2026-11-28", **more}


def write(state, name, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (state.folder / f"{name}.jsonl").write_text(text)


@pytest.fixture
def state(tmp_path):
    return bench_claims.State(tmp_path / "state")


def test_the_recipe_is_the_best_mean_of_the_tuned_arms(state):
    assert bench_claims.chosen(state) == bench_claims.TRIALS[0]
    a, b = bench_claims.TUNED
    write(state, f"tune {a}", line(a, rate=0.002, top1=0.7), line(a, rate=0.008, top1=0.6))
    write(
        state,
        f"tune {b}",
        line(b, rate=0.002, top1=0.3),
        line(b, rate=0.008, top1=0.6),
        line(b, rate=0.001, top1=0.9),  # which the other arm has not tried
        line(b, rate=0.002, top1=0.99, seed=1),  # of the pilot
    )
    assert bench_claims.chosen(state).rate == 0.008


def test_the_small_recipe_is_chosen_at_its_own_length(state):
    long = bench_claims.ARMS["small"].epochs
    write(
        state,
        "tune small",
        line("small", rate=0.001, top1=0.9),
        line("small", rate=0.002, top1=0.8, epochs=long),
        line("small", rate=0.001, top1=0.7, epochs=long),
    )
    assert bench_claims.small_recipe(state).rate == 0.002


def test_seeds_are_missing_until_all_their_rows_are_there(state):
    args = bench_claims.parse(["run", "--state", str(state.folder), "--seeds", "3"])
    write(state, "G16-LN", line("G16-LN"), line("G16-LN", depth=[]), line("G16-LN", seed=2))
    assert bench_claims.missing(state, "G16-LN", args) == [1]
    half = [line("G16-LN_PN half")] * 6 + [line("G16-LN_PN half", seed=1)] * 5
    write(state, "G16-LN_PN half", *half)
    assert bench_claims.missing(state, "G16-LN_PN half", args) == [1, 2]
    larger = "B4 G16-LN_PN half"  # which has one length
    write(state, larger, *[line(larger)] * 3)
    assert bench_claims.missing(state, larger, args) == [1, 2]
    assert bench_claims.ARMS[larger].fields["name"] == "B4-G16-LN_PN"


def test_an_arm_is_one_process_s(state):
    first = state.take("G1-GN")
    assert first and state.take("G1-GN") is None
    first.close()
    assert state.take("G1-GN")


def test_rows_say_where_they_are_from(state, tmp_path):
    layer = dict(share=0.1, after=0.2, means=[-1, 0, 1], stds=[0.5, 1, 2], channels=8)
    arm = "G16-LN"
    write(state, arm, line(arm), line(arm, seed=1), line(arm, depth=[layer] * 2))
    write(state, "tune G1-GN", line("G1-GN"))
    words = ["rows", "--state", str(state.folder), "--results", str(tmp_path)]
    assert bench_claims.main(words) == 0
    for name, n in (("claims.csv", 3), ("claims_depth.csv", 2)):
        assert untraceable(tmp_path / name) == []
        with (tmp_path / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == n
    assert [r["norm_index"] for r in rows] == ["0", "1"] and rows[0]["stds_90"] == "2"


def test_arms_differ_in_what_they_are_about_and_in_nothing_else():
    args = bench_claims.parse(["run", "--state", "."])
    images = open_data(None, verbose=False).train_count
    cases = {
        n: bench_claims.case_of(a, args, images)
        for n, a in bench_claims.ARMS.items()
        if n not in ("small", "45 minutes")
    }
    own = {"name", "norm", "norm_groups", "group_size", "expand_ratio", "image_size"}
    own |= {"model_size"}
    first = cases["G1-GN"]
    for case in cases.values():
        assert {k for k in vars(case) if getattr(case, k) != getattr(first, k)} <= own
        assert case.name.startswith(f"B{case.model_size}-")
    assert bench_claims.longer(cases["G16-LN_PN"]) == 35  # 20 epochs at 128 pixels, at 96
