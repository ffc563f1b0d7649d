"""Pipelines: every published split, schedules as properties, and the staged step against the unstaged one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.config import load_cases
from effnet_repro.network import segments
from effnet_repro.pipeline import (
    SCHEDULES,
    check_accumulation,
    overlap,
    schedule,
    split_segments,
)
from effnet_repro.scaling import ModelSpec

CASES = load_cases()

# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("name", CASES)
def test_published_splits_cut_the_network_without_loss(name):
    case = CASES[name]
    spec = ModelSpec.from_case(case)
    stages = split_segments(spec, case.pipeline_splits, case.num_stages)
    assert len(stages) == case.num_stages and all(stages)
    assert [s.name for stage in stages for s in stage] == [s.name for s in segments(spec)]
    assert [stage[0].name for stage in stages[1:]] == list(case.pipeline_splits)
    check_accumulation(case.pipeline_schedule, case.num_stages, case.gradient_accumulation)


@pytest.mark.parametrize(
    "splits, stages, message",
    [
        (["block3z"], None, "Unknown split 'block3z'.*block1a/b.*block3b.*Top"),
        (["block0"], None, "Unknown split 'block0'"),
        (["block4b", "block3b"], None, "follow the network"),
        (["block3b", "block3b"], None, "follow the network"),
        (["block3b"], 4, "4 stages need 3 splits.*block3b.*Legal names"),
        ([], 2, "2 stages need 1 splits"),
        ("block3b", None, "list of names"),
    ],
)
def test_wrong_splits_are_refused_with_the_legal_names(splits, stages, message):
    with pytest.raises(ValueError, match=message):
        split_segments(ModelSpec.from_name("B0-G16-LN_PN"), splits, stages)


# ---------------------------------------------------------------- schedules

shapes = given(
    name=st.sampled_from(SCHEDULES),
    num_stages=st.integers(1, 6),
    blocks=st.integers(1, 4),
    training=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@shapes
def test_every_micro_batch_visits_every_stage_once_and_in_order(name, num_stages, blocks, training):
    count = blocks * overlap(name, num_stages, training)
    table = schedule(name, num_stages, count, training)
    kinds = ("forward", "backward")[: 1 + training]
    assert len(table) == len(set(table)) == count * num_stages * len(kinds)
    for m in range(count):
        mine = [w for w in table if w.micro_batch == m]
        journey = [("forward", i) for i in range(num_stages)]
        journey += [("backward", i) for i in reversed(range(num_stages))] * training
        assert [(w.kind, w.stage) for w in mine] == journey
        assert [w.clock - mine[0].clock for w in mine] == list(range(len(journey)))


@settings(max_examples=60, deadline=None)
@shapes
def test_no_stage_does_one_kind_of_work_twice_in_a_clock(name, num_stages, blocks, training):
    table = schedule(name, num_stages, blocks * overlap(name, num_stages, training), training)
    places = [(w.clock, w.stage, w.kind) for w in table]
    assert len(places) == len(set(places))
    if name != "Grouped":  # only Grouped gives a stage two pieces of work in one clock
        assert len({(w.clock, w.stage) for w in table}) == len(table)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(2, 6), st.integers(-3, 60), st.booleans())
def test_a_count_is_accepted_exactly_when_it_fills_whole_blocks(name, stages, count, training):
    block = overlap(name, stages, training)
    assert (
        block
        == {"Grouped": 1 + training, "Interleaved": 1, "Sequential": 1 / stages}[name] * stages
    )
    if count > 0 and count % block == 0:
        check_accumulation(name, stages, count, training)
    else:
        with pytest.raises(ValueError, match=f"multiple of {block}, but it is {count}"):
            check_accumulation(name, stages, count, training)


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'Grouped'"):
        check_accumulation("grouped", 4, 8)
    with pytest.raises(ValueError, match="at least one stage"):
        schedule("Grouped", 0, 8)
