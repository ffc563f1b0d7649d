"""What is drawn for a training step belongs to the case: the micro-batch and the number of devices change nothing."""

import keras
import numpy as np
import pytest
from tiny import SMALL

from effnet_repro.augment import draw_mixing, mix
from effnet_repro.config import for_one_device, get_case, override
from effnet_repro.data import open_data
from effnet_repro.efficientnet import build_model, current_ops, get_weights
from effnet_repro.network import segments
from effnet_repro.ops import TrainContext
from effnet_repro.runs.resume import refuse_other_case
from effnet_repro.scaling import ModelSpec
from effnet_repro.training import Program, TrainingModel, updates
from effnet_repro.training.step import DRAWS, micro_batches

CASES = ("B0-G16-LN_PN-Half_16IPU_2x8", "B1-G16-LN_PN-Half_16IPU_4x4")
WHOLE, CLASSES = 96, 5
SIZES = (12, 24, 48, 96)  # half a mixing group, one, two, all four


def laid_out(name, micro):
    case = for_one_device(get_case(name), micro, WHOLE)
    return override(case, image_size=32, optimizer="sgd", momentum=0.0, weight_decay=0.0, **SMALL)


def program_of(case):
    spec = ModelSpec.from_case(case, num_classes=CLASSES)
    return Program(case, spec, tuple(s.name for s in segments(spec)), "float32", 3)


def batch_of(case, update=4):
    chance = np.random.default_rng(0)
    settings = dict(mixup_alpha=case.mixup_alpha, cutmix_lambda=case.cutmix_lambda)
    groups, size = case.mix_groups
    return dict(
        draw_mixing(**settings, seed=3, update=update, groups=groups, group_size=size),
        images=chance.integers(0, 256, (WHOLE, 32, 32, 3)).astype("uint8"),
        labels=chance.integers(0, CLASSES, WHOLE).astype("int32"),
        update=np.int32(update),
        learning_rate=np.float32(1.0),
    )


def mixed(case):
    "Images and targets of a training step, as its micro-batches see them"
    program, ops, found = program_of(case), current_ops(), []
    batch = micro_batches(program, {n: ops.asarray(v) for n, v in batch_of(case).items()})
    for i in range(case.gradient_accumulation):
        draws = {n: batch[n][i] for n in DRAWS if n in batch}
        images, targets = batch["images"][i], draws.get("targets")
        if targets is None:
            targets = ops.one_hot(batch["labels"][i], CLASSES)
            images, targets = mix(ops, images, targets, **draws, group_size=program.own_groups)
        found.append((np.asarray(images), np.asarray(targets)))
    return [np.concatenate(part) for part in zip(*found)]


def masks(program, kind, shape):
    "The masks of a training step, micro-batch after micro-batch"
    m = program.case.micro_batch_size
    rngs = [
        TrainContext(current_ops(), program.seed, 4, i, batch=program.mask_batch)
        for i in range(WHOLE // m)
    ]
    return np.concatenate([np.asarray(r.mask("block2b", kind, 0.2, (m, *shape))) for r in rngs])


@pytest.mark.parametrize("name", CASES)
def test_draws_partners_and_masks_are_the_same(name):
    first = program_of(laid_out(name, SIZES[0]))
    assert first.case.mix_group_size == 24  # the published micro-batch
    drawn = batch_of(first.case)
    for micro in SIZES[1:]:
        program = program_of(laid_out(name, micro))
        for n, value in batch_of(program.case).items():
            np.testing.assert_array_equal(value, drawn[n], n)
        images, targets = mixed(program.case)
        np.testing.assert_array_equal(targets, mixed(first.case)[1])
        np.testing.assert_allclose(images, mixed(first.case)[0], atol=1e-3)  # of 255
        for kind, shape in (("drop_path", (1, 1, 1)), ("dropout", (7,))):
            np.testing.assert_array_equal(masks(program, kind, shape), masks(first, kind, shape))


@pytest.mark.parametrize(
    "name, sizes", [(CASES[1], (12, 24, 96)), pytest.param(CASES[0], SIZES, marks=pytest.mark.long)]
)
def test_gradients_are_the_same(name, sizes):
    found = {}
    for micro in sizes:
        case = laid_out(name, micro)
        program = program_of(case)
        model = TrainingModel(
            build_model(program.spec, image_size=32, dtype="float32", seed=1), program
        )
        before = get_weights(model.network)
        given = {n: keras.ops.convert_to_tensor(v) for n, v in batch_of(case).items()}
        model.train_step(given)
        after = get_weights(model.network)
        found[micro] = np.concatenate([(before[n] - after[n]).ravel() for n in sorted(before)])
    size = np.linalg.norm(found[24])
    assert size > 0
    apart = {m: np.linalg.norm(g - found[24]) / size for m, g in found.items()}
    assert max(apart.values()) < 1e-4, apart


def test_earlier_draws_follow_the_micro_batch():
    "0 stands for a run of an earlier version, which goes on with what it drew"
    cases = [override(laid_out(CASES[1], m), mix_group_size=0) for m in (24, 48)]
    assert [c.mix_groups for c in cases] == [(4, 24), (2, 48)]
    one, other = (masks(program_of(c), "dropout", (7,)) for c in cases)
    assert (one[24:] == other[24:]).mean() < 0.9
    old = TrainContext(current_ops(), 3, 4, 1).mask("block2b", "dropout", 0.2, (24, 7))
    np.testing.assert_array_equal(one[24:48], np.asarray(old))


def test_another_micro_batch_may_go_on(capsys):
    there, here = laid_out(CASES[0], 24), laid_out(CASES[0], 48)
    refuse_other_case("x", there, here)
    assert "equal only to rounding" in capsys.readouterr().out
    for off in (dict(mix_group_size=0), dict(norm="BN")):
        with pytest.raises(ValueError, match="micro_batch_size: 24 there, 48 here"):
            refuse_other_case("x", override(there, **off), override(here, **off))


def test_a_case_that_does_not_mix_draws_nothing():
    "What is drawn is shared out over devices by groups, of which there may be too few"
    data = open_data(verbose=False)
    fed = {"images", "labels", "update", "learning_rate"}
    for off, more in ((True, set()), (False, {"mixup", "cutmix_lambda", "cutmix_centre"})):
        case = laid_out(CASES[0], 24)
        case = override(case, mixup_alpha=0.0, cutmix_lambda=None) if off else case
        assert set(updates(case, data, 0).element_spec) == fed | more
