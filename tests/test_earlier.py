"""A run that was written before some fields of a case existed goes on, validates and converts as it was trained.

`data/earlier_run` is such a run: four training steps of six, with the weights and scores that the same version reached
when it went on (`earlier_run_at_6.npz`, `earlier_run_scores.json`). The fields of its small network were added to its
stored case afterwards, when a case could name them; before, its table of blocks was replaced in memory.
"""

import json
import shutil

import numpy as np
import pytest
from tiny import EPOCHS_OF_THREE, ROOT, TINY, small_network  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro.config import (
    EARLIER,
    case_from_dict,
    case_to_dict,
    for_one_device,
    get_case,
    override,
)
from effnet_repro.convert import convert, read
from effnet_repro.network import initial_weights
from effnet_repro.runs import read_case
from effnet_repro.scaling import ModelSpec
from effnet_repro.training import finetune, train, validate

DATA = ROOT / "tests" / "data"
SAYS = "before these fields existed"
STAGES = ("r1_k3_s2_e1_i32_o16", "r1_k3_s2_i16_o16")
CASE = override(TINY, group_size=4, net_stages=STAGES, top_filters=32)
HOW = {**EPOCHS_OF_THREE, "epochs": 2, "max_steps": 6, "validate_every": 1}
HOW.update(base_learning_rate_exponent=-12, warmup_epochs=0.5)
SCORES = json.loads((DATA / "earlier_run_scores.json").read_text())


@pytest.fixture
def run_dir(tmp_path):
    return shutil.copytree(DATA / "earlier_run", tmp_path / "run")


def close(scores, expected):
    for weights, values in expected.items():
        found = scores[weights]
        assert (found.top1, found.top5) == (values["top1"], values["top5"]), weights
        assert found.loss == pytest.approx(values["loss"], rel=1e-5)


def weights_apart(path):
    """Distance from the weights that the earlier version reached, relative to what the last two steps changed."""
    ours, before = checkpoint.load(path, "all/")[0], _before()
    theirs = np.load(DATA / "earlier_run_at_6.npz")
    assert set(ours) == set(theirs.files)
    flat = lambda arrays: np.concatenate([np.ravel(arrays[n]) for n in sorted(theirs.files)])
    ours, theirs, before = flat(ours), flat(theirs), flat(before)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - before)


def _before():
    return checkpoint.load(checkpoint.latest(DATA / "earlier_run" / "checkpoints"), "all/")[0]


def test_it_goes_on_as_it_began(run_dir, capsys):
    """To the bit on the machine that wrote it; elsewhere float32 may round in another order."""
    run = train(CASE, run_dir=run_dir, **HOW)
    said = capsys.readouterr().out
    assert said.count(SAYS) == 1
    assert all(f in said for f in ("image_resize=modern", "label_smoothing_over=all"))
    assert run.update == 6 and weights_apart(run.checkpoint) < 1e-4
    close(run.scores, SCORES["at_6"])
    stored = json.loads((run_dir / "config.json").read_text())["case"]
    for case in (stored, checkpoint.read_metadata(run.checkpoint)["case"]):
        assert {name: case[name] for name in EARLIER} == EARLIER


@pytest.mark.parametrize("field", ["image_resize", "label_smoothing_over", "mix_group_size"])
def test_another_arithmetic_is_refused(run_dir, field):
    others = {"image_resize": "published", "label_smoothing_over": "others", "mix_group_size": 16}
    new = others[field]
    with pytest.raises(ValueError, match=f"{field}: {EARLIER[field]} there, {new} here"):
        train(CASE, run_dir=run_dir, **{**HOW, field: new})


def test_it_validates_to_the_same_numbers(run_dir, capsys):
    close(validate(run_dir), SCORES["at_4"])
    assert capsys.readouterr().out.count(SAYS) == 1


def test_it_is_fine_tuned_as_it_was_trained(run_dir, capsys):
    tuned = finetune(run_dir, image_size=32, budget="smoke", progress=False, validate_every=None)
    assert capsys.readouterr().out.count(SAYS) == 1
    assert {name: getattr(tuned.case, name) for name in EARLIER} == EARLIER


def test_it_is_converted_as_it_was_trained(run_dir, tmp_path):
    source = checkpoint.latest(run_dir / "checkpoints")
    assert any(SAYS in note for note in read(source).notes)
    convert(source, tmp_path / "a.safetensors", to="torch")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="ours")
    case = read_case(tmp_path / "b.safetensors")
    assert {name: getattr(case, name) for name in EARLIER} == EARLIER


@pytest.mark.parametrize("name", sorted(EARLIER))
def test_each_field_is_filled_by_itself(name):
    values = case_to_dict(override(CASE, device_loop=7))
    assert (
        getattr(case_from_dict({k: v for k, v in values.items() if k != name}), name)
        == EARLIER[name]
    )
    assert case_from_dict(values) == override(CASE, device_loop=7)


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.ckpt", "a.safetensors"])
def test_converted_files_keep_the_fields(tmp_path, name):
    """A network that keras.applications has, so that every format can hold it."""
    changed = dict(image_resize="modern", label_smoothing_over="all", device_loop=3)
    case = for_one_device(get_case("B0-G1-GN-Native_16IPU_2x8"))
    case = override(case, norm="BN", norm_groups=1, input_norm="keras", image_size=32, **changed)
    spec = ModelSpec.from_case(case, num_classes=2)
    path, back = tmp_path / name, tmp_path / "back.safetensors"
    source = tmp_path / "ours.safetensors"
    about = dict(case=case_to_dict(case), num_classes=2, update=0, epoch=0, seed=0)
    checkpoint.save(source, initial_weights(spec, 0), about)
    convert(source, path, to="torch" if name.endswith("a.safetensors") else None)
    convert(path, back, to="ours")
    assert {n: getattr(read_case(back), n) for n in changed} == changed
