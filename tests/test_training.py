"""The Keras runtime: resume to the bit, accumulation, frozen variables, both backends, bad input."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from tiny import EPOCHS_OF_THREE, ONE_BLOCK, PYTHON, SMOKE, TINY, eagerly, small_network  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro.config import for_one_device, get_case, override
from effnet_repro.data import open_data
from effnet_repro.runs import read_case, read_metrics
from effnet_repro.testing import relative_error, test_allclose
from effnet_repro.training import (
    Evaluator,
    choose_precision,
    finetune,
    finetune_case,
    load_weights,
    train,
    validate,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps, two epochs of a shrunken set."""
    return train(TINY, run_dir=tmp_path_factory.mktemp("whole"), **{**SMOKE, "max_steps": 4})


def _same_bytes(one, two):
    a, b = (checkpoint.load(p)[0] for p in (one, two))
    assert list(a) == list(b)
    for name in a:
        test_allclose(a[name], b[name], rtol=0, msg=name)


def test_a_run_cut_in_two_is_the_same_to_the_bit(whole, tmp_path):
    train(TINY, run_dir=tmp_path, **{**SMOKE, "max_steps": 3})
    resumed = train(TINY, run_dir=tmp_path, **{**SMOKE, "max_steps": 4})
    assert resumed.update == 4
    _same_bytes(resumed.checkpoint, whole.checkpoint)


LOOPS = {
    "budget": "case",
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "epochs": 0.1,
    "warmup_epochs": 0.05,
    "lr_decay": 1.0,
    "precision": "float32",
    "progress": False,
    "validate_every": None,
}


def test_a_run_goes_on_inside_a_device_loop(tmp_path):
    """Loops of four training steps, cut after the sixth; the second command need not name the loop."""
    whole = train(ONE_BLOCK, run_dir=tmp_path / "whole", **LOOPS, device_loop=4, max_steps=8)
    train(ONE_BLOCK, run_dir=tmp_path / "cut", **LOOPS, device_loop=4, max_steps=6)
    resumed = train(ONE_BLOCK, run_dir=tmp_path / "cut", **LOOPS, max_steps=8)
    assert resumed.case.device_loop == 4
    _same_bytes(resumed.checkpoint, whole.checkpoint)
    stored = json.loads((tmp_path / "cut" / "config.json").read_text())["case"]
    assert stored["device_loop"] == 4
    # 15 training steps, 7 of them warm-up; the eighth has the rate of the fifth
    rate = read_metrics(whole.run_dir)["learning_rate"].iloc[-1]
    assert rate == pytest.approx(8 / 2**14 * 4 / 7)


def _once_there_is_a_checkpoint(run_dir, act, patience=240):
    """Call `act` as soon as a run has written its first checkpoint."""
    deadline = time.time() + patience
    while checkpoint.latest(run_dir / "checkpoints") is None and time.time() < deadline:
        time.sleep(0.02)
    act()


def test_a_signal_finishes_the_update_and_saves(tmp_path, capfd):
    assert threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come too late
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)
    sender = threading.Thread(target=_once_there_is_a_checkpoint, args=(tmp_path, send))
    try:
        sender.start()
        run = train(ONE_BLOCK, run_dir=tmp_path, **EPOCHS_OF_THREE)
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, old)
    said = capfd.readouterr()
    assert "run the same command again to go on" in said.err
    assert f"stopped after step {run.update}" in said.out
    newest = checkpoint.read_metadata(checkpoint.latest(tmp_path / "checkpoints"))
    assert not run.finished and 3 <= newest["update"] == run.update < 40


KILLED = """
import sys, tiny
tiny.shrink()
from effnet_repro.training import train
train(tiny.ONE_BLOCK, run_dir=sys.argv[1], **tiny.EPOCHS_OF_THREE)
"""


def _kill_after_the_first_checkpoint(run_dir):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(run_dir)], env=PYTHON, stdout=subprocess.PIPE
    )
    _once_there_is_a_checkpoint(run_dir, process.kill)
    process.communicate(timeout=60)
    return process.returncode


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    """Three steps an epoch: killed after the first checkpoint, then resumed; against a run nobody killed."""
    assert _kill_after_the_first_checkpoint(tmp_path / "cut") == -signal.SIGKILL
    resumed = train(ONE_BLOCK, run_dir=tmp_path / "cut", **{**EPOCHS_OF_THREE, "max_steps": 5})
    straight = train(
        ONE_BLOCK, run_dir=tmp_path / "straight", **{**EPOCHS_OF_THREE, "max_steps": 5}
    )
    assert resumed.update == straight.update == 5
    _same_bytes(resumed.checkpoint, straight.checkpoint)
    _same_bytes(resumed.average, straight.average)
    assert list(read_metrics(tmp_path / "cut")["update"])[-1] == 5


@pytest.mark.usefixtures("eagerly")
def test_micro_batches_do_not_matter(tmp_path):
    """One update of 8 images at once and as 4 x 2: the gradient in the slot agrees to rounding."""
    plain = dict(mixup_alpha=0.0, drop_path_rate=0.0, max_steps=1)
    slots = []
    for micro in (8, 2):
        options = {**SMOKE, **plain, "micro_batch_size": micro}
        run = train(TINY, run_dir=tmp_path / str(micro), **options)
        slots.append(checkpoint.load(run.checkpoint, "slots/momentum/")[0])
    for name, a in slots[0].items():
        # float32 in another order through 50 layers; arrays whose gradient is rounding noise are left to their size
        assert np.linalg.norm(a - slots[1][name]) <= 5e-3 * np.linalg.norm(a) + 1e-7, name


@pytest.mark.usefixtures("eagerly")
def test_frozen_variables_do_not_move(whole, tmp_path):
    run = finetune(
        whole.run_dir,
        run_dir=tmp_path,
        image_size=64,
        variable_filter=("Top", "block3"),
        budget="smoke",
        progress=False,
        base_learning_rate_exponent=-2,
        protocol="clean",
        validate_every=None,
    )
    before, after = (checkpoint.load(p, "all/")[0] for p in (whole.checkpoint, run.checkpoint))
    changed = {n for n in before if (before[n] != after[n]).any()}
    assert {n.split("/")[1] for n in changed} == {"Top", "block3a"}
    slots = checkpoint.load(run.checkpoint, "slots/")[0]
    assert {n.split("/")[3] for n in slots} == {"Top", "block3a"}


@pytest.mark.usefixtures("eagerly")
def test_averages_and_epochs(tmp_path):
    """Two epochs: a checkpoint each, and an average that is theirs."""
    options = {
        **SMOKE,
        "validate_every": 0,
        "global_batch_size": 600,
        "micro_batch_size": 300,
        "epochs": 2,
        "max_steps": 4,
    }
    run = train(ONE_BLOCK, run_dir=tmp_path, keep=5, **options)
    files = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in files] == ["epoch-0001.safetensors", "epoch-0002.safetensors"]
    first, second = (checkpoint.load(p, "all/")[0] for p in files)
    average, _ = checkpoint.load(run.average)
    for name in average:
        want = 0.97 * first[name].astype("float64") + 0.03 * second[name].astype("float64")
        test_allclose(average[name], want, rtol=1e-12, atol=1e-15, msg=name)
    assert set(run.scores) == {"last", "average"}
    rows = (tmp_path / "validation.csv").read_text().splitlines()
    assert len(rows) == 3
    # What was just measured is not measured again; the first checkpoint is, and another size is.
    assert set(validate(tmp_path, weights="all")) == {"epoch-0001"}
    assert validate(tmp_path, weights="all") == {}
    assert len(validate(tmp_path, image_size=40, weights="all")) == 3
    rows = list(csv.DictReader((tmp_path / "validation.csv").open()))
    assert [(r["weights"], r["update"], r["image_size"]) for r in rows] == [
        ("last", "4", "32"),
        ("average", "4", "32"),
        ("epoch-0001", "2", "32"),
        ("epoch-0001", "2", "40"),
        ("epoch-0002", "4", "40"),
        ("average", "4", "40"),
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["case"]["global_batch_size"] == 600 and config["data"]["builtin"]
    weights, _, path = load_weights(tmp_path, "average")
    assert path == run.average and weights["all/Top/proxy/beta"].dtype == np.float32


@pytest.mark.usefixtures("eagerly")
def test_a_run_begins_from_given_weights_and_need_not_validate(whole, tmp_path):
    """With a learning rate of almost nothing, they are still there afterwards."""
    still = {"max_steps": 1, "base_learning_rate_exponent": -60, "validate_every": None}
    run = train(TINY, run_dir=tmp_path, init=whole.run_dir, **{**SMOKE, **still})
    assert run.finished and run.scores == {} and not (tmp_path / "validation.csv").exists()
    before, after = (checkpoint.load(r.checkpoint, "all/")[0] for r in (whole, run))
    for name in before:
        test_allclose(after[name], before[name], rtol=0, atol=1e-12, msg=name)
    with pytest.raises(ValueError, match="norm: LN_PN there, LN here"):
        train(override(TINY, norm="LN"), run_dir=tmp_path / "ln", init=whole.run_dir, **SMOKE)


@pytest.mark.usefixtures("eagerly")
def test_batch_norm_trains_with_accumulation(tmp_path):
    case = override(TINY, norm="BN", group_size=1, expand_ratio=6)
    run = train(case, run_dir=tmp_path, **SMOKE)
    moving = checkpoint.load(run.checkpoint, "all/block0/batch_norm/")[0]
    assert np.abs(moving["all/block0/batch_norm/moving_mean"]).max() > 0
    tuned = finetune(tmp_path, run_dir=tmp_path / "tuned", image_size=32, **SMOKE)
    still = checkpoint.load(tuned.checkpoint, "all/block0/batch_norm/")[0]
    for name in moving:  # a frozen batch norm stands still
        test_allclose(still[name], moving[name], rtol=0)


JAX = """
import sys, tiny
tiny.shrink()
import numpy as np
from test_training import one_update
np.savez(sys.argv[1], **one_update(sys.argv[2]))
"""


def one_update(optimizer="rmsprop"):
    """Weights and slots after one update without masks, from the backend's own reader."""
    from effnet_repro.training import updates as stream
    from effnet_repro.training import use_devices

    case = for_one_device(
        # The slot starts at zero, so that it holds squared gradients and not mostly its start.
        override(
            TINY,
            drop_path_rate=0.0,
            dropout_rate=0.0,
            cutmix_lambda=0.8,
            warmup_epochs=0,
            rmsprop_initial_mean_square=0.0,
            optimizer=optimizer,
        ),
        4,
        8,
        4,  # a mixing group for each device
    )
    data = open_data(verbose=False)
    batch = next(iter(stream(case, data, 0)))
    batch = batch[0] if isinstance(batch, tuple) else batch
    batch = {**{k: np.asarray(v) for k, v in batch.items()}, "images": _images()}
    with use_devices(case):
        arrays = _after_one_update(case, batch)
    rest = ("mixup", "cutmix_lambda", "cutmix_centre", "labels", "update", "learning_rate")
    return {**arrays, **{f"batch/{k}": batch[k] for k in rest}}


def _after_one_update(case, batch):
    import keras

    from effnet_repro.efficientnet import build_model, get_weights
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import Program, TrainingModel, training_state
    from effnet_repro.training.steps import Unread, compiled_steps

    spec = ModelSpec.from_case(case, num_classes=10)
    network = build_model(spec, image_size=32)
    model = TrainingModel(
        network,
        Program(case, spec, tuple(la.segment.name for la in network.layers[1:]), "float32", 0),
    )
    stream = ((batch,) for _ in range(2))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        stream = tf.data.Dataset.from_tensors(batch).repeat()
    steps = compiled_steps(model, stream)
    said = np.asarray(Unread(steps.do(), contextlib.nullcontext))  # loss and accuracy
    steps.sync()

    if keras.backend.backend() == "jax":
        places = model.trainable_variables[0].value.sharding.device_set
        assert len(places) == case.gradient_accumulation == 2
    arrays = training_state(model)
    assert abs(float(model.optimizer.learning_rate) - float(batch["learning_rate"])) < 1e-9
    assert get_weights(network)
    return {**arrays, "said": said}


def _images():
    return np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("uint8")


@pytest.mark.parametrize("optimizer", ["rmsprop", pytest.param("adamw", marks=pytest.mark.long)])
def test_one_update_on_both_back_ends(tmp_path, optimizer):
    """TensorFlow on one device and JAX on two, a micro-batch each: every weight and slot agrees,
    and the readers feed the same labels and draws."""
    two = "--xla_force_host_platform_device_count=2"
    env = {**PYTHON, "KERAS_BACKEND": "jax", "XLA_FLAGS": two}
    path = tmp_path / "jax.npz"
    run = subprocess.run(
        [sys.executable, "-c", JAX, str(path), optimizer], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ours, theirs = one_update(optimizer), np.load(path)
    assert set(ours) == set(theirs.files)
    for name, value in ours.items():
        scale = {"slots/mean_square": 1e-4, "slots/momentum": 1e-3, "slots/velocity": 2e-3}
        scale = scale.get("/".join(name.split("/")[:2]), 1e-4)
        least = (
            1e-16 if "mean_square" in name or "velocity" in name else 1e-6
        )  # squares of small gradients count, too
        error = np.linalg.norm(value - theirs[name])
        assert error <= scale * np.linalg.norm(value) + least, name


@pytest.mark.parametrize(
    "backend, device, chosen",
    [("jax", "gpu", "bfloat16"), ("jax", "cpu", "float32"), ("tensorflow", "gpu", "float32")],
)
def test_auto_is_bfloat16_on_a_gpu_under_jax(monkeypatch, backend, device, chosen):
    jax = types.SimpleNamespace(default_backend=lambda: device)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr("keras.backend.backend", lambda: backend)
    assert choose_precision("auto") == chosen
    assert choose_precision("float32") == "float32"


@pytest.mark.usefixtures("eagerly")
def test_measuring_counts_every_image_once(whole):
    arrays, metadata, _ = load_weights(whole.run_dir, "last")
    data = open_data(verbose=False)
    from effnet_repro.scaling import ModelSpec

    spec = ModelSpec.from_case(whole.case, num_classes=10)
    evaluate = Evaluator(spec).evaluate
    some = [evaluate(arrays, data, 32, batch) for batch in (70, 300)]
    assert [s.pictures for s in some] == [300, 300]
    assert some[0].top1 == some[1].top1 and abs(some[0].loss - some[1].loss) < 1e-4
    assert (some[0].confusion == some[1].confusion).all() and some[0].confusion.sum() == 300
    broken = {**arrays, "all/Top/logits/dense/bias": np.full(10, np.nan, "float32")}
    assert evaluate(broken, data, 32).top1 == 0
    assert metadata["class_names"] == list(data.class_names)


def test_published_finetuning_case():
    trained = get_case("B2-G16-LN_PN-Half_16IPU_4x4")
    case = finetune_case(trained, 260, micro_batch_size=32)
    assert (case.global_batch_size, case.epochs, case.learning_rate) == (512, 2, 0.25)
    assert (case.optimizer, case.warmup_epochs, case.lr_schedule) == ("rmsprop", 5, "cosine")
    assert (case.variable_filter, case.train_preprocessing) == (("Top",), "validation")
    clean = finetune_case(trained, 260, "clean", micro_batch_size=32)
    assert (clean.optimizer, clean.momentum, clean.warmup_epochs, clean.cutmix_lambda) == (
        "sgd",
        0.0,
        0,
        None,
    )


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda w: train("B1-G16-LN_PN-Half", **SMOKE), ValueError, "Did you mean"),
        (
            lambda w: train(TINY, run_dir="x", **{**SMOKE, "global_batch_size": 2000}),
            ValueError,
            "exceeds the 1200",
        ),
        (
            lambda w: train(TINY, **{**SMOKE, "precision": "fp8"}),
            ValueError,
            "Unknown precision 'fp8'",
        ),
        (lambda w: train(TINY, backend="jax", **SMOKE), ValueError, "KERAS_BACKEND=jax"),
        (lambda w: train(TINY, run_dir=w.run_dir, seed=3, **SMOKE), ValueError, "seed 0"),
        (
            lambda w: train(TINY, run_dir=w.run_dir, epochs=9, **SMOKE),
            ValueError,
            "epochs: 1 there, 9 here",
        ),
        (
            lambda w: finetune(w.run_dir, image_size=64, protocol="best", budget="smoke"),
            ValueError,
            "protocol",
        ),
        (lambda w: finetune("nowhere", image_size=64), FileNotFoundError, "nowhere"),
        (lambda w: validate(w.run_dir, weights="mean"), ValueError, "Unknown weights 'mean'"),
        (
            lambda w: read_case(w.run_dir, "B0-G1-GN-Native_16IPU_2x8"),
            ValueError,
            "norm: LN_PN there, GN here",
        ),
    ],
)
def test_bad_input_gets_one_clear_answer(whole, tmp_path, monkeypatch, call, error, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        call(whole)


@pytest.mark.usefixtures("eagerly")
def test_a_broken_loss_stops_and_names_the_update(tmp_path):
    with pytest.raises(FloatingPointError, match="The loss of step [1-9]"):
        train(
            TINY,
            run_dir=tmp_path,
            **{**SMOKE, "max_steps": 12, "base_learning_rate_exponent": 60, "warmup_epochs": 0},
        )


def test_logits_do_not_depend_on_the_neighbours(whole):
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import predictor

    arrays, _, _ = load_weights(whole.run_dir, "last")
    predict = predictor(ModelSpec.from_case(whole.case, num_classes=10), arrays)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("uint8")
    assert relative_error(predict(images)[:1], predict(images[:1])) < 1e-5
