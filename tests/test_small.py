"""The budget `small`: when it is chosen, what it sets, and how a run with AdamW begins, stops and goes on."""

import json

import keras
import numpy as np
import pytest
from PIL import Image
from test_cli import plan
from tiny import SMOKE, STAGES, TINY, small_network  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro.config import get_case, override, resolve
from effnet_repro.data import open_data
from effnet_repro.efficientnet import build_model, get_weights, weights_by_name
from effnet_repro.finetuning import PROTOCOLS, finetune_case
from effnet_repro.ipu import finetune_layout
from effnet_repro.runs import resolve_training
from effnet_repro.scaling import ModelSpec
from effnet_repro.testing import test_allclose as same
from effnet_repro.training import Program, TrainingModel, train

NAME = "B0-G16-LN_PN-Half_16IPU_2x8"
CASE = get_case(NAME)
ADAMW = {**SMOKE, "optimizer": "adamw", "base_learning_rate_exponent": -12, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Class folders: 20 images of each of two classes to train with, 2 to validate."
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 20), ("val", 2)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (200 * label + i,) * 3).save(
                    root / split / name / f"{i}.png"
                )
    return root


def test_auto_counts_the_images_and_says_so(run, folder, tmp_path):
    said = run("train", NAME, "--data-dir", folder, "--run-dir", tmp_path, "--dry-run")[1]
    first = said.splitlines()[0]
    assert f"{NAME}, budget small for 40 training images: 150 epochs of 2 steps of 16" in first
    assert "fewer than 50,000" in first and "--budget case" in first
    small = plan(NAME, "--data-dir", folder, "--run-dir", tmp_path)
    assert (small.budget, small.case.optimizer, small.case.image_resize) == (
        "small",
        "adamw",
        "modern",
    )
    whole = plan(NAME, "--data-dir", folder, "--run-dir", tmp_path, "--budget", "case")
    assert (whole.case.optimizer, whole.case.epochs, whole.resolved.why) == ("rmsprop", 350, "")


def test_what_the_user_gives_stands_and_the_rest_follows(folder, tmp_path):
    words = ("--data-dir", folder, "--run-dir", tmp_path, "--epochs", 20, "--global-batch-size", 8)
    case = plan(NAME, *words, "--micro-batch-size", 4).case
    assert (case.epochs, case.warmup_epochs, case.weight_average_decay) == (20, 6, 0.5)
    assert (case.global_batch_size, case.gradient_accumulation) == (8, 2)
    assert case.learning_rate == pytest.approx(2**-8 / 4)
    part = plan(NAME, *words, "--micro-batch-size", 4, "--variable-filter", "Top")
    assert part.budget == "case"  # a fine-tuning as the published command does it
    assert plan(NAME, *words, "--warmup-epochs", 3).case.warmup_epochs == 3
    assert plan(NAME, *words, "--optimizer", "sgd").case.optimizer == "sgd"
    keys = ("weight_decay", "drop_path_rate", "mixup_alpha")
    hard = lambda *more: tuple(getattr(plan(NAME, *words[:4], *more).case, key) for key in keys)
    assert hard() == (0.2, 0.2, 0.2) and hard("--epochs", 20) == (0.05, 0.1, 0.1)
    assert hard("--weight-decay", 0.1) == (0.1, 0.2, 0.2)
    assert hard("--optimizer", "sgd") == tuple(getattr(CASE, key) for key in keys)


def test_a_file_of_cases_may_have_budgets_of_its_own(run, folder, tmp_path):
    one = "cases: {mine: {model_size: 0, group_size: 16, expand_ratio: 4, norm: LN_PN, norm_groups: 1, "
    one += "image_size: 64, micro_batch_size: 24, gradient_accumulation: 32}}\n"
    (tmp_path / "mine.yml").write_text(one + "budgets: {case: {}}\n")
    words = ("--config-path", tmp_path / "mine.yml", "--data-dir", folder, "--run-dir", tmp_path)
    assert plan("mine", *words).budget == "case"  # that file knows no small runs
    (tmp_path / "mine.yml").write_text(one + "budgets: {case: {}, small: {epochs: 7}}\n")
    case = plan("mine", *words).case
    assert (case.epochs, case.global_batch_size, case.optimizer) == (7, 16, "rmsprop")
    (tmp_path / "mine.yml").write_text(one + "budgets: {small: {epochs: many}}\n")
    status, _, said = run("train", "mine", *words, "--dry-run")
    assert status == 2 and said.count("\n") == 1 and "epochs" in said


def test_a_run_goes_on_with_the_budget_that_it_began_with(folder, tmp_path):
    data = open_data(folder, verbose=False)
    how = dict(data_given=True, data=data, epochs=8, image_size=32)
    for began, expected in (("small", "adamw"), ("case", "rmsprop"), (None, "rmsprop")):
        run_dir = tmp_path / str(began)
        (run_dir / "checkpoints").mkdir(parents=True)
        first = resolve_training(CASE, run_dir, began or "case", **how)
        about = {"case": json.loads(json.dumps(vars(first.case))), "update": 1}
        about.update({"budget": began} if began else {})  # earlier versions did not say
        path = run_dir / "checkpoints" / "epoch-0001.safetensors"
        checkpoint.save(path, {"all/x": np.zeros(1, "float32")}, about)
        plan = resolve_training(CASE, run_dir, **how)
        assert (plan.case, plan.case.optimizer) == (first.case, expected)
    assert resolve_training(CASE, tmp_path / "new", **how).budget == "small"


def test_adamw_goes_on_to_the_same_bytes(tmp_path):
    """Both slots are in the checkpoint, and the step number, which Adam corrects them by."""
    one_block = override(TINY, net_stages=STAGES[:1])
    run = lambda name, steps: train(
        one_block, run_dir=tmp_path / name, **{**ADAMW, "max_steps": steps}
    )
    whole = run("whole", 4)
    run("cut", 3)
    cut = run("cut", 4)
    ours, theirs = (checkpoint.load(r.checkpoint)[0] for r in (cut, whole))
    assert list(ours) == list(theirs)
    assert {n.split("/")[1] for n in ours if n.startswith("slots/")} == {"momentum", "velocity"}
    for name in ours:
        same(ours[name], theirs[name], rtol=0, msg=name)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["budget"] == "smoke"


def test_norms_do_not_decay():
    """Gradients of zero: kernels shrink by rate x decay, and scales of norms stay."""
    case = resolve(TINY, "small", images=7_500, weight_decay=64.0)[0]
    spec = ModelSpec.from_case(case, num_classes=10)
    network = build_model(spec, image_size=32, dtype="float32", seed=0)
    model = TrainingModel(network, Program(case, spec, ("block0", "Top"), "float32", 0))
    variables, before = weights_by_name(network), get_weights(network)
    model.optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables])
    after = get_weights(network)
    assert {v.path for v in model.trainable_variables} >= {
        variables["all/Top/logits/dense/bias"].path
    }
    for name in model.names:
        kept = 1.0 if name.endswith(("/gamma", "/beta")) else 1 - 64 * case.learning_rate
        same(after[name], kept * before[name], rtol=1e-5, msg=name)
    assert any(n.endswith("/gamma") for n in model.names)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fine_tuning_has_its_protocol_s_optimizer_and_decay(protocol):
    small = resolve(CASE, "small", images=7_500)[0]
    of = lambda case: (case.optimizer, case.weight_decay)
    assert of(finetune_case(small, 224, protocol)) == of(finetune_case(CASE, 224, protocol))
    assert finetune_case(small, 224, protocol, optimizer="adamw").optimizer == "adamw"


def test_ipus_refuse_it_in_a_line(run, folder):
    for words, says in (
        (("--budget", "small"), "budget small trains with AdamW"),
        (("--optimizer", "adamw"), "optimizer is rmsprop or sgd"),
    ):
        status, out, said = run("train", NAME, *words, "--device", "ipu", "--dry-run")
        assert (status, out, said.count("\n")) == (2, "", 1) and says in said
    words = ("--device", "ipu", "--dry-run", "--data-dir", folder)
    assert "budget case" not in run("train", NAME, *words)[1]  # as published: nothing differs
    with pytest.raises(ValueError, match="rmsprop or sgd"):
        finetune_layout(override(CASE, optimizer="adamw"), 16)
