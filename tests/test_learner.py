"""What benchmarks of many trainings rest on: one compiled network, whose seed, rate and weight decay are arguments."""

import numpy as np
import pytest
from learner import Learner
from tiny import TINY

from effnet_repro.config import override
from effnet_repro.data import open_data
from effnet_repro.efficientnet import current_ops
from effnet_repro.network import initial_weights, run
from effnet_repro.ops import TrainContext
from effnet_repro.scaling import ModelSpec


@pytest.fixture(scope="module")
def sample():
    return open_data(None, verbose=False)


CASE = override(TINY, optimizer="adamw", lr_schedule="cosine", mixup_alpha=0.1, device_loop=1)


def test_seed_rate_and_weight_decay_are_arguments(sample):
    learner = Learner(CASE, sample.num_classes, batch=16)
    begun, how = learner.begin(0), dict(rate=0.002, weight_decay=0.05)
    first = learner.learn(begun, sample, 1, 0, **how)
    again = learner.learn(begun, sample, 1, 0, **how)
    kernel = "all/Top/conv/conv2d/kernel"
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    other = learner.learn(begun, sample, 1, 1, **how)
    assert (other[kernel] != first[kernel]).any()
    decayed = learner.learn(begun, sample, 1, 0, **{**how, "weight_decay": 0.55})
    expected = first[kernel] - 0.002 * (0.55 - 0.05) * begun[kernel]
    np.testing.assert_allclose(decayed[kernel], expected, rtol=0, atol=1e-6)
    judged = learner.judge(first, sample)
    assert len(judged.right) == sample.validation_count
    measured = learner.evaluator.evaluate(first, sample, CASE.image_size)
    assert judged.top1 == pytest.approx(measured.top1)
    assert judged.loss == pytest.approx(measured.loss, rel=1e-5)
    with pytest.raises(ValueError, match="slows=True"):
        learner.learn(begun, sample, 1, 0, body_rate=0.1)


def test_batch_norm_sees_as_many_images_as_it_is_told():
    still = override(TINY, norm="BN", drop_path_rate=0.0, dropout_rate=0.0)
    spec = ModelSpec.from_case(still, num_classes=3)
    ops, weights = current_ops(), initial_weights(spec, 0)
    weights = {n: ops.asarray(w) for n, w in weights.items()}
    images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype("float32")
    rng = lambda images: TrainContext(ops, norm_batch=images)
    logits = lambda x, n: np.asarray(run(ops, spec, weights, ops.asarray(x), rng(n)))
    by_two = logits(images, 2)
    np.testing.assert_allclose(by_two[:2], logits(images[:2], None), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits(images, 4), logits(images, None), rtol=1e-3, atol=1e-4)
    assert np.abs(by_two - logits(images, None)).max() > 0.01
