"""The average of weights: what it is made of, what it refuses, and that a stop in between changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from test_checkpoint import same

from effnet_repro.averaging import WeightAverage, average_files, average_weights
from effnet_repro.checkpoint import epoch_path, list_checkpoints, save
from effnet_repro.testing import test_allclose as check_close


@settings(deadline=None)
@given(
    st.floats(0, 0.999), st_numpy.arrays("float32", (6, 3), elements=st.floats(-100, 100, width=32))
)
def test_the_average_is_the_weighted_sum(decay, checkpoints):
    average = WeightAverage(decay)
    for w in checkpoints:
        average.update({"w": w})
    shares = average_weights(decay, 6)
    assert shares.sum() == pytest.approx(1)
    check_close(
        average.arrays("float64")["w"], shares @ checkpoints.astype("float64"), rtol=1e-9, atol=1e-9
    )


def test_an_average_of_equal_weights_is_those_weights():
    w = np.random.default_rng(0).normal(size=100).astype("float32")
    average = WeightAverage()
    for _ in range(350):
        average.update({"w": w})
    assert (average.arrays()["w"] == w).all()


def test_float32_would_lose_what_float64_keeps():
    average, rng = WeightAverage(), np.random.default_rng(0)
    in_float32 = exact = None
    for _ in range(350):
        w = rng.normal(size=1000).astype("float32")
        average.update({"w": w})
        in_float32 = (
            w if in_float32 is None else np.float32(0.97) * in_float32 + np.float32(0.03) * w
        )
        wide = w.astype("longdouble")
        exact = wide if exact is None else np.longdouble(0.97) * exact + np.longdouble(0.03) * wide
    ours = np.abs(average.arrays("float64")["w"] - exact).max()
    assert ours < 1e-14 and np.abs(in_float32 - exact).max() > 1e4 * ours


def test_the_first_weights_are_copied():
    w = np.ones(3)
    average = WeightAverage()
    average.update({"w": w})
    w[:] = 5
    assert (average.arrays()["w"] == 1).all()
    average.arrays("float64")["w"][:] = 7
    assert (average.arrays()["w"] == 1).all()


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_stopped_average_goes_on_bit_for_bit(tmp_path, stop):
    rng, whole, parts = np.random.default_rng(0), WeightAverage(0.9), WeightAverage(0.9)
    for i in range(6):
        w = {"all/w": rng.normal(size=5).astype("float32"), "all/e": np.zeros((0,), "float32")}
        whole.update(w, at_update=i)
        if i == stop:
            parts = WeightAverage.load(parts.save(tmp_path / "average.safetensors"))
        parts.update(w, at_update=i)
    same(parts.arrays("float64"), whole.arrays("float64"))
    assert (parts.count, parts.last_update, parts.decay) == (6, 5, 0.9)


def test_what_an_average_refuses(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        WeightAverage().arrays()
    for decay in (-0.1, 1.0, 2):
        with pytest.raises(ValueError, match="must be in"):
            WeightAverage(decay)
    average = WeightAverage()
    average.update({"a": np.ones(2), "b": np.ones(2)}, at_update=10)
    for other in (
        {"a": np.ones(2)},
        {"a": np.ones(2), "b": np.ones(3)},
        {"a": np.ones(2), "c": np.ones(2)},
    ):
        with pytest.raises(ValueError, match="same arrays every time"):
            average.update(other)
    for update in (9, 10):
        with pytest.raises(ValueError, match="already holds step 10"):
            average.update({"a": np.ones(2), "b": np.ones(2)}, at_update=update)
    assert average.count == 1
    path = save(tmp_path / "c.safetensors", {"w": np.ones(1)})
    with pytest.raises(ValueError, match="is a checkpoint, not an average"):
        WeightAverage.load(path)


def test_files_average_to_the_same_bits_and_without_slots(tmp_path):
    rng, during = np.random.default_rng(0), WeightAverage()
    for epoch in range(1, 8):
        w = {"all/w": rng.normal(size=4).astype("float32")}
        during.update(w, at_update=epoch * 3)
        slots = {"slots/momentum/all/w": rng.normal(size=4).astype("float32")}
        save(epoch_path(tmp_path, epoch), {**w, **slots}, dict(epoch=epoch, update=epoch * 3))
    after = average_files(list_checkpoints(tmp_path))
    same(after.arrays("float64"), during.arrays("float64"))
    assert after.last_update == during.last_update == 21
