"""Before anything runs on an IPU: the SDK that is found, the device, cases that are refused, poprun's line."""

import re
import sys
from dataclasses import replace

import pytest

pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import get_case  # noqa: E402
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
        m.setattr("builtins.__import__", lambda name, *a, **k: (_ for _ in ()).throw(broken))
        assert "cannot be imported (libpoplar.so" in ipu.describe_tensorflow()
    with ipu_standin.install():
        import tensorflow.python.ipu as module

        monkeypatch.delattr(module.config, "IPUConfig")
        with pytest.raises(ImportError, match="too old"):
            ipu.Graphcore()


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
