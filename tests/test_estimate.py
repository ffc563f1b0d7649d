"""The printed estimate comes from the run's own first steps, and is corrected after an epoch."""

import re

import pytest

from effnet_repro.training.estimation import CostWatch, process_age, span


def watched(step_s, end_s, epochs, per_epoch, startup=30.0):
    "What a run of such times says, and what it took"
    now, said = [startup], []
    clock = lambda: now[0]
    watch = CostWatch(0, epochs * per_epoch, per_epoch, said.append, clock, clock)
    for step in range(epochs * per_epoch):
        watch.step()
        now[0] += 20.0 if step == 0 else step_s  # the first one compiles
        now[0] += end_s if (step + 1) % per_epoch == 0 else 0
    return said, now[0]


def seconds(line):
    number, unit = re.search(r": ([\d.,]+) (\w+) in all", line).groups()
    sizes = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
    return float(number.replace(",", "")) * sizes[unit]


@pytest.mark.parametrize(
    "step_s, end_s, epochs, per_epoch",
    [(0.031, 5.0, 12, 9), (0.031, 60.0, 350, 1668), (7.0, 30.0, 3, 40), (0.5, 0.2, 1, 200)],
)
def test_the_last_estimate_is_within_a_half(step_s, end_s, epochs, per_epoch):
    said, took = watched(step_s, end_s, epochs, per_epoch)
    assert 1 <= len(said) <= 2
    assert 1 / 1.5 < seconds(said[-1]) / took < 1.5, (said, took)


def test_an_epoch_that_ends_as_expected_is_not_told_again():
    said, _ = watched(1.0, 0.0, 5, 100)
    assert len(said) == 1


def test_a_run_of_a_few_steps_says_nothing():
    assert watched(0.1, 0.0, 1, 3)[0] == []


def test_spans_and_age():
    assert [span(s) for s in (7, 90, 7200, 864000)] == [
        "7 seconds",
        "1.5 minutes",
        "2.0 hours",
        "10.0 days",
    ]
    assert 0 < process_age() < 86400
