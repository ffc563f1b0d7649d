"""The order of an epoch, processes that share it, and what is announced."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from images import quick

from effnet_repro import data as d
from effnet_repro.data import order


@quick
@given(
    count=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 400),
    run=st.sampled_from([1, 3, 64]),
    pool=st.sampled_from([1, 4, 256]),
)
def test_every_epoch_is_a_permutation(count, seed, epoch, run, pool):
    order = d.epoch_order(count, seed, epoch, run, pool)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_orders_are_uniform():
    # where image 0 lands, over seeds and epochs
    places = [np.flatnonzero(d.epoch_order(8, s, e) == 0)[0] for s in range(40) for e in range(40)]
    counts = np.bincount(places, minlength=8)
    assert np.abs(counts - 200).max() < 4 * 200**0.5


@quick
@given(
    count=st.integers(40, 300),
    batch=st.sampled_from([12, 24, 36]),
    shards=st.sampled_from([1, 2, 3, 4, 6]),
    run=st.sampled_from([1, 5]),
)
def test_processes_share_each_batch(count, batch, shards, run):
    for update in (0, 1, 7, 1000):
        parts = []
        for index in range(shards):
            local = batch // shards
            plan = order.BatchOrder(count, 3, batch, (index, shards), run)
            images, places = plan.take(update, 0, local)
            parts.append(images)
            assert (places // count == update // (count // batch)).all()
        whole = order.BatchOrder(count, 3, batch, run=run).take(update, 0, batch)[0]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert len(set(whole)) == batch


@quick
@given(count=st.integers(0, 50), batch=st.integers(1, 16), shards=st.integers(1, 5))
def test_every_validation_image_counts_once(count, batch, shards):
    ids = [order.validation_ids(count, batch, (index, shards)) for index in range(shards)]
    assert len({part.shape for part in ids}) == 1  # all processes take as many steps
    real = np.concatenate([part[part >= 0] for part in ids])
    np.testing.assert_array_equal(np.sort(real), np.arange(count))


def test_coming_run_is_what_is_read_later():
    plan = order.BatchOrder(count=64 * 600, seed=1, batch=64, run=64)
    announced = np.concatenate([plan.coming(update, 0) for update in range(256)])
    later = np.concatenate([plan.take(update, 0, 64)[0] for update in range(256, 512)])
    np.testing.assert_array_equal(np.sort(announced), np.sort(later))
