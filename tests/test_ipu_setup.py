"""Before anything runs on an IPU: the SDK that is found, the device, cases that are refused, poprun's line."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402
from tiny import PYTHON  # noqa: E402

from effnet_repro import checkpoint, ipu  # noqa: E402
from effnet_repro.config import case_to_dict, get_case  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402

NAME = "B0-G16-LN_PN-Half_16IPU_2x8"


def test_missing_and_wrong_sdk(monkeypatch):
    with pytest.raises(
        ImportError,
        match=r"Found: TensorFlow 2\.\d+\.\d+, not Graphcore's build\. Install .*Python 3\.8\)",
    ):
        ipu.Graphcore()
    broken = ImportError("libpoplar.so: cannot open shared object file")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "tensorflow", None)
        assert ipu.describe_tensorflow() == "no TensorFlow at all"
        m.setattr(ipu.sdk, "_has_ipu_folder", lambda: True)
        m.setattr("builtins.__import__", lambda name, *a, **k: (_ for _ in ()).throw(broken))
        assert "cannot be imported (libpoplar.so" in ipu.describe_tensorflow()
    with ipu_standin.install():
        import tensorflow.python.ipu as module

        monkeypatch.delattr(module.config, "IPUConfig")
        with pytest.raises(ImportError, match="too old"):
            ipu.Graphcore()


def test_a_missing_sdk_is_told_without_importing_tensorflow():
    "Which takes seconds."
    code = "import sys; from effnet_repro import cli; print(cli.main(sys.argv[1:]), 'tensorflow' in sys.modules)"
    words = [sys.executable, "-c", code, "train", NAME, "--device", "ipu"]
    done = subprocess.run(words, env=PYTHON, capture_output=True, text=True)
    assert done.stdout == "1 False\n" and "--device 'ipu' needs Graphcore's" in done.stderr
    assert re.search(r"Found: TensorFlow 2\.\d+\.\d+, not Graphcore's build", done.stderr)


def test_devices(monkeypatch, caplog):
    assert ipu.choose_device("auto") == "keras"
    monkeypatch.setattr(ipu.sdk, "has_ipu", lambda: True)
    assert ipu.choose_device("auto") == "keras"
    assert re.search("IPUs here.* unused. Found: .*not Graphcore's build", caplog.text)
    monkeypatch.setattr(ipu.sdk, "has_ipu", lambda: False)
    with pytest.raises(ValueError, match="Unknown device 'tpu'"):
        ipu.choose_device("tpu")
    with ipu_standin.install():
        assert ipu.choose_device("ipu") == "ipu"
        assert ipu.choose_device("auto") == "keras"  # the build without an IPU
        monkeypatch.setattr(ipu.sdk, "has_ipu", lambda: True)
        assert ipu.choose_device("auto") == "ipu"


def test_refused_cases():
    with pytest.raises(ValueError, match="stages must divide the IPUs"):
        ipu.resolve_for_ipus("B4-G16-GN-Half_16IPU_4x4", 6, "case")
    with pytest.raises(ValueError, match="in blocks of 8 on 4 stages"):
        ipu.resolve_for_ipus("B4-G16-GN-Half_16IPU_4x4", 16, "case", global_batch_size=8 * 4 * 6)
    case = replace(get_case(NAME), pipeline_splits=("block9z",))
    with pytest.raises(ValueError, match="Unknown split 'block9z'. Legal names"):
        ipu.plan_stages(case, ModelSpec.from_case(case))
    odd = replace(get_case(NAME), available_memory_proportion=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="one value, or two a stage"):
        ipu.pipeline_options(odd, ipu.plan_stages(odd, ModelSpec.from_case(odd)))


def test_the_mixing_of_a_step_is_drawn_once(monkeypatch):
    case, made, draw = get_case(NAME), [], ipu.feed.draw_mixing
    monkeypatch.setattr(ipu.feed, "draw_mixing", lambda **how: made.append(how) or draw(**how))
    random = ipu.Draws(case, ModelSpec.from_case(case), seed=5)
    found = [random.of(3, j) for j in range(4)]
    assert len(made) == 1 and len({float(one["cutmix_centre"][0]) for one in found}) == 4
    random.of(4, 0)
    again = random.of(3, 2)  # a step that comes again is drawn again, alike
    assert len(made) == 3
    for name, value in again.items():
        np.testing.assert_array_equal(value, found[2][name])


@pytest.fixture
def seen(monkeypatch):
    "What commands show, and then give to `ipu.train` and `ipu.finetune`, which do nothing"
    from effnet_repro.cli import ipus

    found = []
    monkeypatch.setattr(ipus, "show_plan", found.append)
    for name in ("train", "finetune"):
        monkeypatch.setattr(ipu, name, lambda what, *args, **how: found.append(what))
    return found


def on_ipus(*words):
    from effnet_repro import cli

    return cli.main([*map(str, words), "--device", "ipu", "--compile-only"])


def test_what_is_shown_is_what_runs(seen, tmp_path):
    "Also the device loop, which neither the case nor a flag names"
    words = ("--budget", "case", "--ipus", 4, "--epochs", 3, "--run-dir", tmp_path)
    train = ipu.begin.train
    with ipu_standin.install():
        assert on_ipus("train", NAME, *words) == 0
        shown, given = seen
        with pytest.raises(ValueError, match="is complete. Received: image_size"):
            train(given, image_size=64)
    assert shown.resolved is given and shown.case is given.case and given.run_dir == tmp_path
    assert (given.case.epochs, given.case.num_replicas, given.case.device_loop) == (3, 2, 104)
    assert {"device_loop", "epochs", "num_replicas"} <= set(shown.reasons)


def test_what_is_shown_is_what_is_fine_tuned(seen, tmp_path):
    metadata = {"case": case_to_dict(get_case(NAME)), "update": 1, "epoch": 1, "num_classes": 10}
    checkpoint.save(tmp_path / "checkpoints" / "epoch-0001.safetensors", {}, metadata)
    with ipu_standin.install():
        assert on_ipus("finetune", tmp_path, "--ipus", 8, "--epochs", 3) == 0
    shown, given = seen
    assert shown.resolved is given and shown.case is given.case and given.init == tmp_path
    assert given.case.image_size == 224 and given.run_dir == tmp_path / "finetune-224"
    assert (given.case.num_replicas, given.case.global_batch_size, given.case.epochs) == (8, 512, 3)


def test_under_poprun_its_ipus_are_shown(seen, tmp_path):
    def instance(index):
        if index == 0:
            return on_ipus("train", NAME, "--budget", "case", "--run-dir", tmp_path)

    def other(index):
        return ipu.begin.train(given)

    assert ipu_standin.poprun(instance, 2, 2, ipus_per_replica=2)[0] == 0
    shown, given = seen
    assert shown.case is given.case and given.case.num_replicas == 2
    with pytest.raises(ValueError, match="laid out for 4 IPUs. Received: 8 from poprun"):
        ipu_standin.poprun(other, 2, 4, ipus_per_replica=2)


def test_under_poprun_the_stages_that_are_asked_for_count(monkeypatch):
    monkeypatch.setattr(ipu.begin, "_run", lambda graphcore, task, connection: task.case)
    how = dict(num_stages=2, pipeline_splits=("block4b",), budget="case")
    instance = lambda index: ipu.train("B4-G16-GN-Half_16IPU_4x4", **how)
    for case in ipu_standin.poprun(instance, 2, 4, ipus_per_replica=2):
        assert (case.num_stages, case.num_replicas, case.global_batch_size) == (2, 4, 768)


def test_poprun_lines_of_all_cases():
    from effnet_repro.config import load_cases

    for case in load_cases().values():
        line = ipu.poprun_command(case)
        replicas, each = (
            int(n) for n in re.findall(r"--num-replicas (\d+).*?replica (\d+)", line)[0]
        )
        assert (replicas, each) == (case.num_replicas, case.num_stages)
        assert f"effnet-train {case.name} --no-validation --device ipu" in line
        assert "--numa-aware 1" in line and "--only-output-from-instance 0" in line
