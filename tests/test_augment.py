"""Mixing over many draws, sizes and frameworks."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.augment import draw_mixing, mix
from effnet_repro.ops import get_ops
from effnet_repro.testing import test_allclose as check_close

check_close.__test__ = False
share = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 7),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    keep=st.none() | st.lists(share, min_size=7, max_size=7),
    kept=st.none() | share,
    centre=st.tuples(share, share),
)
def test_labels_share_what_pixels_share(m, size, keep, kept, centre):
    one_hot = np.eye(m, dtype="float32")
    planes = np.broadcast_to(one_hot[:, None, None, :], (m, *size, m))
    draws = dict(mixup=None if keep is None else np.float32(keep[:m]), cutmix_lambda=kept)
    draws.update(cutmix_centre=centre)
    images, targets = mix(get_ops("numpy"), planes, one_hot, **draws)
    check_close(images.mean((1, 2), dtype="float64"), targets, rtol=1e-4, atol=1e-5)
    check_close(targets.sum(1), np.ones(m, "float32"), atol=1e-6)
    assert targets.min() >= 0 and images.min() >= 0 and images.max() <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(2, 60), st.integers(2, 60)),
    kept=share,
    centre=st.tuples(share, share),
)
def test_the_box(size, kept, centre):
    images = np.arange(3, dtype="float32")[:, None, None, None] * np.ones((1, *size, 1))
    mixed, _ = mix(get_ops("numpy"), images, np.eye(3), cutmix_lambda=kept, cutmix_centre=centre)
    inside = mixed[0, :, :, 0] != 0
    for axis, side in enumerate(size):
        line = np.flatnonzero(inside.any(1 - axis))
        wanted = np.sqrt(1 - kept) * side
        assert abs(len(line) - wanted) <= 1 or not inside.any()  # corners are rounded
        if len(line):
            assert line[-1] - line[0] + 1 == len(line)
            middle = np.clip(centre[axis] * side, wanted / 2, side - wanted / 2)
            assert abs((line[0] + line[-1] + 1) / 2 - middle) <= 1
    assert inside.sum() == inside.any(1).sum() * inside.any(0).sum()  # a rectangle


@pytest.mark.parametrize("m, partner", [(2, 1), (3, 2), (5, 2)])
def test_partners(m, partner):
    images = np.arange(m, dtype="float32")[:, None, None, None] * np.ones((1, 4, 4, 1))
    full = dict(cutmix_lambda=0.0, cutmix_centre=[0.5, 0.5])  # the box is the image
    mixed, targets = mix(get_ops("numpy"), images, np.eye(m), **full)
    np.testing.assert_array_equal(mixed[:, 0, 0, 0], np.roll(np.arange(m), partner))
    np.testing.assert_array_equal(targets, np.roll(np.eye(m), partner, 0))


def test_pasted_images_are_mixed_already():
    one_hot = np.eye(4, dtype="float32")
    planes = np.broadcast_to(one_hot[:, None, None, :], (4, 10, 10, 4))
    draws = dict(mixup=np.float32([0.5] * 4), cutmix_lambda=0.75, cutmix_centre=[0.5, 0.5])
    images, targets = mix(get_ops("numpy"), planes, one_hot, **draws)
    assert (targets > 0).sum(1).tolist() == [4] * 4
    half = mix(get_ops("numpy"), planes, one_hot, mixup=draws["mixup"])[0]
    np.testing.assert_array_equal(images[0, 5, 5], half[2, 5, 5])


@pytest.mark.parametrize("name", ["tensorflow", "jax"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_frameworks_agree(name, dtype):
    images = np.random.default_rng(0).integers(0, 256, (6, 13, 17, 3)).astype(dtype)
    targets = np.eye(6, dtype="float32")
    many = dict(mixup_alpha=0.2, cutmix_lambda=0.8, seed=3, groups=20, group_size=6)
    draws = draw_mixing(**many, update=0)
    for i in range(20):
        one = {key: value[i] for key, value in draws.items()}
        plain = mix(get_ops("numpy"), images, targets, **one)
        for a, b in zip(mix(get_ops(name), images, targets, **one), plain):
            check_close(a, b, rtol=1e-6, atol=1e-4)


def test_in_a_while_loop():
    images = tf.constant(np.random.default_rng(0).random((3, 4, 8, 8, 3)), tf.float32)
    targets = tf.eye(4)
    many = dict(mixup_alpha=0.2, cutmix_lambda=0.8, seed=3, groups=3, group_size=4)
    draws = draw_mixing(**many, update=0)

    @tf.function
    def total():
        def body(i, mixed, labels):
            one = {key: tf.gather(value, i) for key, value in draws.items()}
            x, y = mix(get_ops("tensorflow"), images[i], targets, **one)
            return i + 1, mixed + x, labels + y

        return tf.while_loop(
            lambda i, *_: i < 3, body, (0, tf.zeros((4, 8, 8, 3)), tf.zeros((4, 4)))
        )[1:]

    plain = [
        mix(get_ops("numpy"), images[i].numpy(), np.eye(4), **{k: v[i] for k, v in draws.items()})
        for i in range(3)
    ]
    for a, b in zip(total(), map(sum, zip(*plain))):
        check_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_of_unknown_or_single_size():
    with pytest.raises(ValueError, match="Received: groups of 1"):
        mix(get_ops("jax"), np.zeros((1, 2, 2, 3)), np.eye(1), mixup=[1.0])
    unknown = tf.function(
        lambda x: mix(get_ops("tensorflow"), x, tf.eye(4), mixup=[1.0] * 4),
        input_signature=[tf.TensorSpec([None, 2, 2, 3])],
    )
    with pytest.raises(ValueError, match="groups of two or more"):
        unknown.get_concrete_function()
    off = dict(mixup_alpha=None, cutmix_lambda=None)
    assert draw_mixing(**off, seed=0, update=0, groups=2, group_size=1)["mixup"].shape == (2, 1)
    with pytest.raises(ValueError, match="switch off"):
        draw_mixing(
            mixup_alpha=0.1,
            cutmix_lambda=None,
            seed=0,
            update=0,
            groups=2,
            group_size=1,
        )


def test_draws_follow_their_distributions():
    many = dict(mixup_alpha=0.2, cutmix_lambda=0.8, seed=1, groups=40_000, group_size=2)
    draws = draw_mixing(**many, update=0)
    assert all(value.dtype == np.float32 for value in draws.values())
    mixup, kept = draws["mixup"], draws["cutmix_lambda"]
    assert mixup.min() >= 0.5 and mixup.max() <= 1
    # E |2b - 1|^2 = 1 / (2 alpha + 1) for Beta(alpha, alpha)
    check_close(np.mean((2 * mixup.astype("float64") - 1) ** 2), 1 / 1.4, rtol=0.01)
    check_close(np.mean(kept == 1, dtype="float64"), 1.55 * 0.8 - 0.96, rtol=0.03)
    boxed = kept[kept < 1].astype("float64")
    e4 = np.exp(-4)
    check_close(boxed.mean(), 1 + (-1 + e4 * 5) / (1 - e4) / 4, rtol=0.01)  # 1 + E[ln u] / 4
    assert boxed.min() > 0
    centre = draws["cutmix_centre"]
    assert centre.min() >= 0 and centre.max() < 1 and abs(centre.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(centre.T)[0, 1]) < 0.03
