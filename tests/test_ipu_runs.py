"""Runs on IPUs on the CPU stand-in: they resume, move between runtimes and processes, and refuse what does not fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from ipu_updates import NAME, STAGES, short_case  # noqa: E402

from effnet_repro import checkpoint, config, ipu  # noqa: E402
from effnet_repro.config import override  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.network import initial_weights, params  # noqa: E402
from effnet_repro.runs import Options, lock_folder, watch  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402


@pytest.fixture
def short():
    return short_case


@pytest.fixture
def tiny(short):
    "A case small enough for whole runs on the built-in images"
    size = dict(model_size="cifar", top_filters=128)
    return short(**size, global_batch_size=16, epochs=1, num_replicas=2)


@pytest.fixture
def without_figures(monkeypatch):
    "The figure of an epoch costs as much as two of its steps"
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)


def train(case, run_dir, **how):
    "Two steps on two replicas"
    given = dict(ipus=4, budget="case", max_steps=2, validation=False)
    return ipu.train(case, None, run_dir, **{**given, **how})


@pytest.mark.usefixtures("without_figures")
def test_poprun_trains_and_only_the_first_writes(tiny, tmp_path, monkeypatch):
    writers, save = [], checkpoint.save

    def noted(path, *args):
        writers.append(ipu_standin.machine().index)
        return save(path, *args)

    monkeypatch.setattr(checkpoint, "save", noted)

    def instance(index):
        return train(tiny, tmp_path / "run", ipus=None)

    done = ipu_standin.poprun(instance, 2, 2, ipus_per_replica=2)
    assert [d.update for d in done] == [2, 2] and set(writers) == {0}
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert (
        len(rows) == 2
        and json.loads((tmp_path / "run" / "config.json").read_text())["kind"] == "train"
    )

    def wrong(index):
        return train(replace(tiny), tmp_path / "wrong", ipus=None)

    with pytest.raises(ValueError, match="--ipus-per-replica 1"):
        ipu_standin.poprun(wrong, 2, 2, ipus_per_replica=1)


@pytest.mark.usefixtures("without_figures")
def test_run_resumes_and_its_files_are_keras_files(tiny, tmp_path, monkeypatch):
    "Also inside a device loop: one learning rate a loop, 0 in the first, however many steps a program run has"
    from effnet_repro import training

    rates, run = [], ipu.TrainingProgram.run
    monkeypatch.setattr(ipu.TrainingProgram, "run", lambda p, r: rates.append(r) or run(p, r))
    with ipu_standin.install() as machine:
        whole = train(tiny, tmp_path / "whole", max_steps=6, device_loop=3)
        assert [made["repeat_count"] for made in machine.calls["pipeline"]] == [3]
    first, second = rates
    assert first == 0 < second
    with ipu_standin.install():
        train(tiny, tmp_path / "cut", max_steps=4, device_loop=3)
    assert rates[2:] == [first] * 3 + [second]
    with ipu_standin.install():
        cut = train(tiny, tmp_path / "cut", max_steps=6)  # its own device loop
        assert rates[6:] == [second] * 2
        with lock_folder(tmp_path / "cut"), pytest.raises(RuntimeError, match="in use by"):
            train(tiny, tmp_path / "cut")
    with ipu_standin.install(execute=False) as machine:
        for change, says in (
            (dict(data_fingerprint="0"), "as many as in the built-in.*with other names, bytes or"),
            (dict(pictures=7), "on 7 training images of 10 classes"),
            (dict(seed=3), "with seed 3. Received: seed=0"),
        ):
            arrays, metadata = checkpoint.load(cut.checkpoint)
            other = tmp_path / says[:9] / "checkpoints" / cut.checkpoint.name
            checkpoint.save(other, arrays, {**metadata, **change})
            with pytest.raises(ValueError, match=f"belongs to a run .*{says}"):
                train(tiny, other.parent.parent, max_steps=3)
        assert not machine.programs  # refused before anything is compiled
    assert cut.update == whole.update == 6
    (a, meta), (b, _) = checkpoint.load(whole.checkpoint), checkpoint.load(cut.checkpoint)
    assert set(a) == set(b) and meta["precision"] == "32.32"
    assert meta["case"]["device_loop"] == 3
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
    spec = ModelSpec.from_case(tiny, num_classes=meta["num_classes"])
    trained = [p.name for p in params(spec) if p.trainable]
    slots = [f"slots/{k}/{n}" for k in ("mean_square", "momentum") for n in trained]
    assert set(a) == {p.name for p in params(spec)} | set(slots)
    keras = training.validate(whole.checkpoint)
    with ipu_standin.install():
        ours = ipu.validate(whole.checkpoint, ipus=3)
    (k,), (o,) = keras.values(), ours.values()
    assert (o.top1, o.top5, o.pictures) == pytest.approx((k.top1, k.top5, k.pictures), abs=1e-6)
    assert o.loss == pytest.approx(k.loss, rel=1e-4) and o.images_per_s > 0
    np.testing.assert_array_equal(o.confusion.sum(1), k.confusion.sum(1))


@pytest.mark.parametrize(
    "device_loop, per_epoch, last, first, steps",
    [(104, 1668, 583_800, 0, 4), (104, 1668, 583_800, 1668, 4), (104, 1668, 583_800, 50, 2)]
    + [(104, 1668, 5, 0, 1), (2, 8, 6, 0, 2), (2, 8, 6, 3, 1), (1, 8, 8, 0, 1)],
)
def test_program_runs_end_with_loops_epochs_and_runs(
    device_loop, per_epoch, last, first, steps, monkeypatch
):
    "ImageNet has 1,668 steps an epoch: four of them, with one learning rate, are one run of the program"
    monkeypatch.setattr(ipu.runtime, "learning_rate", lambda *_: 0.0)
    task = SimpleNamespace(case=replace(config.get_case(NAME), device_loop=device_loop))
    runtime = ipu.IPURuntime(SimpleNamespace(instances=(0, 1)), task)
    runtime.course = SimpleNamespace(steps_per_epoch=per_epoch, last_step=last, schedule=per_epoch)
    runtime.step, done = first, first
    each = runtime.steps_of_a_run()  # fixed when the program is built
    runtime.program = SimpleNamespace(run=lambda rate: np.zeros((each, 2)))
    assert each == steps
    for _ in range(5):
        if done < last:
            until, loop = min(per_epoch - done % per_epoch, last - done), done // device_loop
            done += len(runtime.advance(until))
            assert done == runtime.step and each <= until and (done - 1) // device_loop == loop
    assert runtime.step == min(last, first + 5 * steps)


def test_processes_that_see_different_checkpoints_are_refused(tiny, monkeypatch):
    "Before anything is exchanged or compiled: the run folder is not the same for both"
    task = SimpleNamespace(case=tiny, options=Options(), run_dir="runs/x")
    runtime = ipu.IPURuntime(SimpleNamespace(instances=(0, 2), popdist="poprun"), task)
    monkeypatch.setattr(ipu.runtime, "configure", lambda *_: None)
    monkeypatch.setattr(ipu.runtime, "gather", lambda graphcore, arrays: [arrays, [np.int32([7])]])
    monkeypatch.setattr(ipu.runtime, "broadcast", lambda graphcore, arrays: arrays)
    weights = initial_weights(ModelSpec.from_case(tiny, num_classes=10))
    data = SimpleNamespace(num_classes=10)
    with pytest.raises(RuntimeError, match="runs/x: processes see different checkpoints"):
        runtime.begin(data, 5, weights)
    runtime.begin(data, 7, weights)
    assert runtime.state() == weights


@pytest.mark.usefixtures("without_figures")
def test_a_keras_run_goes_on_to_ipus(tiny, tmp_path):
    from effnet_repro import training

    smoke = dict(budget="smoke", precision="float32", progress=False, validate_every=None)
    run = training.train(tiny, run_dir=tmp_path / "keras", **smoke)
    with ipu_standin.install():
        tuned = ipu.finetune(
            run.run_dir, image_size=32, ipus=2, global_batch_size=32, epochs=1, warmup_epochs=0
        )
    before, after = checkpoint.load(run.checkpoint)[0], checkpoint.load(tuned.checkpoint)[0]
    moved = {n for n, v in before.items() if n.startswith("all/") and (after[n] != v).any()}
    assert moved and all(n.startswith("all/Top/") for n in moved)
    assert tuned.run_dir == run.run_dir / "finetune-32" and set(tuned.scores) == {"last", "average"}
    assert (tuned.run_dir / "validation.csv").exists()


def run_page(name, **values):
    "Execute a run notebook with these parameters; returns its variables"
    page, space = Path(__file__).parent.parent / "nbs" / f"{name}.ipynb", {}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(values) <= set(space)
            space.update(values)
    return space


def test_run_notebooks_on_ipus_without_keras(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("pandas")
    monkeypatch.setattr(config, "load_cases", lambda *path: {NAME: tiny})
    for name in ("keras", "effnet_repro.training"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    how = dict(device="ipu", ipus=4)
    with pytest.raises(ImportError, match="not Graphcore's build. Install"):
        run_page("42_validate", run_dir=tmp_path, **how)
    run_dir = str(tmp_path / "run")
    with ipu_standin.install():
        page = run_page("40_train", case=NAME, run_dir=run_dir, budget="case", max_steps=1, **how)
        assert page["resolved"].num_replicas == 2 and set(page["run"].scores) == {"last"}
        assert page["run"].case.device_loop == ipu.DEVICE_LOOP == 104  # the published one is stored
        small = dict(image_size=32, max_steps=1, global_batch_size=16, warmup_epochs=0)
        tuned = run_page("41_finetune", init=run_dir, **small, **how)["run"]
        scores = run_page("42_validate", run_dir=str(tuned.run_dir), **how)["scores"]
    assert scores["last"].top1 == tuned.scores["last"].top1
    assert (tuned.run_dir / "curves.png").exists()


def test_compiling_and_attaching(tiny, tmp_path):
    with ipu_standin.install() as machine:
        done = train(tiny, tmp_path / "c", connection="PRE_COMPILE")
        (config,) = machine.calls["configure_ipu_system"]
    assert config["device_connection.version"] == "ipu2" and done.update == 0
    assert config["device_connection.enable_remote_buffers"] and not list(tmp_path.glob("c/*.csv"))
    assert ipu.machine_options(tiny, 4, "ON_DEMAND")["device_connection.enable_remote_buffers"]


def test_command_line(short, tmp_path, capsys):
    from effnet_repro import cli

    words = (
        f"train {NAME} --budget case --image-size 32 --batch-size 2 --global-batch-size 16 --ipus 4"
    )
    words += f" --precision 32.32 --pipeline-splits block2b --run-dir {tmp_path} --net-stages "
    words += ",".join(STAGES)
    with ipu_standin.install() as machine:
        assert cli.main(words.split() + ["--device", "ipu", "--compile-only"]) == 0
        assert "compiled; nothing was run" in capsys.readouterr().out
        (made,) = machine.calls["pipeline"]
        assert made["gradient_accumulation_count"] == 4 and machine.programs[0].replicas == 2
    assert cli.main(words.split() + ["--device", "ipu"]) == 1
    assert "not Graphcore's build. Install" in capsys.readouterr().err
    assert cli.main(words.split() + ["--compile-only"]) == 2


def test_refused_checkpoints(tiny, tmp_path):
    spec = ModelSpec.from_case(tiny, num_classes=3)
    metadata = dict(case=config.case_to_dict(tiny), num_classes=3, update=1, epoch=0, seed=0)
    path = checkpoint.save(tmp_path / "epoch-0001.safetensors", initial_weights(spec), metadata)
    with ipu_standin.install():
        with pytest.raises(ValueError, match="has 3 classes, the data"):
            ipu.validate(path)
        with pytest.raises(ValueError, match="has 3 classes, the data"):
            ipu.finetune(path)
        other = override(tiny, group_size=1)
        with pytest.raises(ValueError, match="another network .*group_size: 16 there, 1 here"):
            train(other, tmp_path / "run", init=path)
        data = open_data()
        wrong = replace(spec, num_classes=data.num_classes, norm="GN")
        with pytest.raises(ValueError, match="not this network's"):
            sets = {"last": initial_weights(spec)}
            ipu.evaluate(ipu.Graphcore(), tiny, wrong, sets, data, 32, 2)
