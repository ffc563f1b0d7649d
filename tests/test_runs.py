"""What a run writes down: scores, rows, records of validations, and averages."""

import subprocess
import sys

import numpy as np
import pytest
from tiny import PYTHON

from effnet_repro.ops import get_ops
from effnet_repro.recipe import count_correct
from effnet_repro.runs import score

# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_equal_logits_are_right_for_one_class_only(classes):
    "A classifier of zeros guesses class 0. Before, every image counted as right."
    labels = np.arange(1000) % classes
    found = score([(np.zeros((1000, classes)), labels, np.ones(1000))], classes, 32)
    assert found.top1 == 1 / classes and found.top5 == min(5, classes) / classes
    assert found.confusion.trace() == round(found.top1 * 1000)


@pytest.mark.parametrize("backend", ["numpy", "tensorflow", "jax"])
def test_the_first_of_the_largest_logits_decides(backend):
    "As `argmax`, for ties of every size and for logits that are not numbers; top-5 by rank."
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (500, 12)).astype("float32")
    logits[::50, 3] = np.nan
    labels = rng.integers(0, 12, 500).astype("int32")
    whole = np.isfinite(logits).all(1)
    order = np.argsort(-np.where(whole[:, None], logits, 0), axis=1, kind="stable")
    rank = np.where(whole, (order == labels[:, None]).argmax(1), 12)
    found = score([(logits, labels, np.ones(500))], 12, 32)
    assert found.top1 == (rank < 1).mean() and found.top5 == (rank < 5).mean()
    ops = get_ops(backend)  # a loss that is not a number ends a training step before anyone counts
    correct = count_correct(ops, ops.asarray(logits[whole]), ops.asarray(labels[whole]))
    assert float(correct) == (rank < 1).sum()


EVENTS = """
import sys
from pathlib import Path
from effnet_repro.runs.watch import Events
events = Events(Path(sys.argv[1]))
events.write({"epoch": 1, "update": 3, "loss": 0.5})
assert "tensorflow" not in sys.modules
"""


def test_events_are_written_without_tensorflow(tmp_path):
    "Under JAX, TensorBoard would import TensorFlow at the first epoch's end, for its file system"
    env = {**PYTHON, "KERAS_BACKEND": "jax"}
    words = [sys.executable, "-c", EVENTS, str(tmp_path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("events.*")
    assert b"loss" in file.read_bytes()
