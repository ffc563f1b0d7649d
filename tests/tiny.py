"""A network of four blocks for the tests of runs: every kind of part, compiled in a third of the time."""

import os
from pathlib import Path

import pytest

from effnet_repro.config import get_case, override

ROOT = Path(__file__).parents[1]
PYTHON = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TF_CPP_MIN_LOG_LEVEL": "3"}
# A locale without letters beyond ASCII, as in containers and cron jobs.
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# One block that does not widen, one with strides, one residual, one of another kernel size.
STAGES = ("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40")
SMALL = dict(net_stages=STAGES, top_filters=128)
TINY = override(get_case("B0-G16-LN_PN-Half_16IPU_2x8"), model_size="cifar", image_size=32, **SMALL)
ONE_BLOCK = override(TINY, net_stages=STAGES[:1])  # where tracing it several times is the point
SMOKE = dict(budget="smoke", precision="float32", progress=False, validate_every=None)
EPOCHS_OF_THREE = {
    **SMOKE,
    "max_steps": 40,
    "global_batch_size": 400,
    "micro_batch_size": 40,
    "epochs": 40,
}


def shrink(patch=setattr):
    """Leave out the figure of each epoch, which costs more than the epoch."""
    from effnet_repro.runs import watch

    patch(watch, "save_curves", lambda run_dir: None)  # has its own test in 34_runs


@pytest.fixture(scope="module", autouse=True)
def small_network():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


def _eagerly():
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module", autouse=True)
def without_graphs():
    """For files about what a run keeps, refuses and says: tracing a step costs more than doing ten."""
    yield from _eagerly()


@pytest.fixture
def eagerly():
    """The same for single tests."""
    yield from _eagerly()
