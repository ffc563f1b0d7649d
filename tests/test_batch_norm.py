"""The benchmark of small, cut and private batches draws and cuts what it says; its network is the library's."""

import bench_batch_norm
import numpy as np
import pytest

from effnet_repro.ops import NumpyOps
from effnet_repro.testing import test_allclose as allclose


@pytest.fixture(scope="module")
def images():
    from seeds_at_once import MARGIN, Images

    rng = np.random.default_rng(0)
    draw = lambda n, side: rng.integers(0, 256, (n, side, side, 3)).astype("uint8")
    labels = lambda n: np.arange(n, dtype="int32") % 4
    return Images(draw(40, 16 + MARGIN), labels(40), draw(8, 16), labels(8), 4)


@pytest.mark.parametrize("side, size, strides, groups", [(8, 3, 2, 2), (7, 5, 1, 3), (6, 1, 2, 1)])
def test_patches_convolve_as_convolutions_do(side, size, strides, groups):
    from seeds_at_once import PatchOps

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, side, side, 6)).astype("float32")
    kernel = rng.standard_normal((size, size, 6 // groups, 12)).astype("float32")
    found = np.asarray(PatchOps().conv(x, kernel, strides))
    allclose(found, NumpyOps().conv(x, kernel, strides), rtol=1e-4, atol=1e-4)


def test_images_to_choose_rates_with_are_none_of_those_learned(images):
    held = images.split_off()
    assert (len(held.train), len(held.test)) == (32, 8) and held.test.shape[1:] == (16, 16, 3)
    inner = images.train[:, 4:-4, 4:-4]
    same = lambda a, b: (a == b).all((1, 2, 3)).any()
    assert all(same(inner[::5], one) for one in held.test)
    assert not any(same(inner[::5], one) for one in held.train[:, 4:-4, 4:-4])


def test_an_epoch_sees_each_image_once_and_seeds_have_orders_of_their_own(images):
    from seeds_at_once import Seeds

    learner = Seeds("BN", images, (3, 4))
    orders = learner.orders(0, 8, 2)
    assert orders.shape == (5, 2, 4, 2)
    assert all(sorted(orders[:, r].ravel()) == list(range(40)) for r in range(2))
    assert (orders[:, 0] != orders[:, 1]).any() and (orders != learner.orders(1, 8, 2)).any()


def test_images_of_a_private_step_are_drawn_independently(images):
    from seeds_at_once import Seeds

    learner = Seeds("LN_PN", images, (0, 1))
    index, kept = learner.poisson(0, 500, 10)
    counts = kept.sum((2, 3))
    assert abs(counts.mean() - 10) < 0.5 and 6 < counts.var() < 9  # 40 x 1/4 x 3/4 = 7.5
    drawn = index[0, 0][kept[0, 0] > 0]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "private"])
def test_a_step_is_what_single_images_say(images, kind):
    import jax
    from seeds_at_once import WEIGHT_DECAY, Seeds

    learner = Seeds("LN_PN", images, (0, 1))
    learner._prepare = lambda pixels, index, key: pixels[index][:, 4:-4, 4:-4].astype("float32")
    weights, index = learner.weights(), np.arange(8, dtype="int32")
    first = {n: np.asarray(v) for n, v in weights.items()}
    orders = np.broadcast_to(index.reshape(1, 1, 4, 2), (1, 2, 4, 2))
    if kind == "plain":
        new, _, _ = learner.epoch(weights, learner.slots(weights), orders, [0.5], 0)
    else:
        kept = np.ones(orders.shape, "float32")
        kept[..., 3, 1] = 0
        new, _ = learner.private_epoch(
            weights, learner.slots(weights), (orders, kept), [0.5], 0, 8, 0
        )
    pixels, labels = images.train[:8, 4:-4, 4:-4].astype("float32"), images.train_labels
    one = jax.jit(
        jax.grad(lambda w, i: learner.losses(w, pixels[i][None], labels[i][None])[0][0]),
        static_argnums=1,
    )
    for r in range(2):
        own = {n: v[r] for n, v in first.items()}
        each = [{n: np.asarray(g) for n, g in one(own, i).items()} for i in range(8)]
        if kind == "private":
            lengths = [np.sqrt(sum((g**2).sum() for g in tree.values())) for tree in each]
            assert max(lengths) > 1
            each = [{n: g / max(1, s) for n, g in t.items()} for t, s in zip(each, lengths)][:7]
        for n, value in own.items():
            mean = sum(tree[n] for tree in each) / 8
            mean = mean + WEIGHT_DECAY * value if learner.decays[n] else mean
            allclose(np.asarray(new[n][r]), value - 0.5 * mean, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_quick_run_writes_the_columns_of_the_committed_file(tmp_path):
    import csv

    words = ["accumulation", "--norms", "LN_PN", "--quick", "--results", str(tmp_path)]
    assert bench_batch_norm.main(words) == 0
    read = lambda path: list(csv.DictReader(path.open(newline="", encoding="utf-8")))
    rows = read(tmp_path / "batch_norm.csv")
    committed = read(bench_batch_norm.ROOT / "results" / "batch_norm.csv")
    assert list(rows[0]) == list(committed[0])
    assert [r["question"] for r in rows] == ["rate"] * 4 + ["accumulation"]
    assert bench_batch_norm.main(words) == 0  # nothing is measured again
    assert read(tmp_path / "batch_norm.csv") == rows


def test_clients_share_all_images_and_unlike_ones_have_few_classes():
    labels = np.repeat(np.arange(10), 60)
    for clients, most in ((2, 7), (10, 4)):
        own = bench_batch_norm.client_images(labels, clients, False, 0)
        assert sorted(own.ravel()) == list(range(600))
        assert all(len(set(labels[i])) <= most for i in own)
        alike = bench_batch_norm.client_images(labels, clients, True, 0)
        assert sorted(alike.ravel()) == list(range(600))
        assert all(len(set(labels[i])) > 8 for i in alike)


def test_the_schedule_warms_up_and_ends_near_zero():
    rates = bench_batch_norm.schedule(100, np.array([[1.0], [2.0]]))
    assert rates.shape == (2, 100) and rates[0, 0] < 0.3 < 0.9 < rates[0].max() <= 1
    assert rates[0, -1] < 0.01 and np.array_equal(2 * rates[0], rates[1])


def test_fewer_than_two_seeds_and_missing_noise_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_batch_norm.parse(["step", "--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err
    bench = bench_batch_norm.Bench(bench_batch_norm.parse(["privacy"]), [])
    bench.images = type("Ten", (), {"train": np.zeros((10, 1))})
    with pytest.raises(SystemExit, match="privacy_budgets.csv .*budgets --images 10"):
        bench.noise("epsilon 8", 2, 3)
    assert bench.noise("clipped, no noise", 2, 3) == 0


def test_shapes_are_drawn_in_both_classes():
    from shapes_keras import draw_shapes

    pixels, classes = draw_shapes(8, 0)
    assert pixels.shape == (8, 48, 48, 3) and pixels.dtype == np.float32
    assert set(np.unique(classes)) == {0, 1, 2}
    assert np.array_equal(classes, draw_shapes(8, 0)[1])
