"""Importing a module changes nothing for the program that imports it. `configure` does, and says when it is late."""

import json
import subprocess
import sys

import pytest
from tiny import PYTHON, ROOT

from effnet_repro.config import budget_overrides

sys.path.insert(0, str(ROOT / ".ci"))
import tree  # noqa: E402

# A program: what differs after importing the names that it is given, what `configure` says before and after a module
# that meddles with everything, and what differs then.
PROGRAM = """
import importlib, json, logging, os, signal, sys, warnings
import jax, keras, numpy, tensorflow as tf
import jax._src.xla_bridge as bridge

def state():
    threading = tf.config.threading
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "tensorflow": [
            str(tf.config.get_visible_devices()), tf.config.get_soft_device_placement(),
            threading.get_inter_op_parallelism_threads(), threading.get_intra_op_parallelism_threads(),
            tf.config.optimizer.get_jit(), tf.config.functions_run_eagerly(),
        ],
        "jax": {k: repr(v) for k, v in jax.config.values.items()},
        "keras": [keras.config.floatx(), keras.config.image_data_format(), keras.config.dtype_policy().name],
        "logging": [str(logging.root.handlers), logging.root.level, str(logging.getLogger("effnet_repro").handlers)],
        "warnings": str(warnings.filters), "numpy": numpy.geterr(), "random": str(numpy.random.get_state()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "running": [bridge.backends_are_initialized()],
    }

def changes(names):
    before = state()
    for name in names:
        importlib.import_module(name)
    after = state()
    return {k: [v, after[k]] for k, v in before.items() if v != after[k]}

def configured():
    late = list(effnet_repro.training.configure())
    return late, [os.environ.get(n) for n in READ_ONCE], len(said)

found, said, log = {"imported": changes(sys.argv[1:])}, [], logging.Handler()
import effnet_repro.training
log.emit = lambda record: said.append(record.getMessage())
logging.getLogger("effnet_repro").addHandler(log)
READ_ONCE = ("TF_NUM_INTEROP_THREADS", "TF_OVERRIDE_GLOBAL_THREADPOOL", "XLA_FLAGS")
found["early"] = configured()
for n in READ_ONCE:
    os.environ.pop(n)
found["meddled"] = sorted(changes(["meddles"]))
found["late"], found["again"] = configured(), configured()
print(json.dumps({**found, "said": said}))
"""
MEDDLES = """
import os, jax, keras, tensorflow as tf
os.environ["SOME"] = "1"
tf.config.threading.set_inter_op_parallelism_threads(3)
jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float16")
jax.devices(), tf.constant(1)
"""


def test_the_library_does_not_know_that_a_page_is_tested(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert budget_overrides()[0] == "demo" and budget_overrides(data_given=True)[0] == "case"
    texts = {name: path.read_text() for name, path in tree.modules().items()}
    assert [name for name, text in texts.items() if "IN_TEST" in text] == []


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What that program finds in a fresh process, on a machine whose JAX seems to have CUDA"
    folder = tmp_path_factory.mktemp("here")
    (folder / "jax_cuda12_plugin.py").touch()
    (folder / "meddles.py").write_text(MEDDLES)
    path = f"{folder}:{PYTHON['PYTHONPATH']}"
    env = {**PYTHON, "PYTHONPATH": path, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    for name in ("TF_NUM_INTEROP_THREADS", "TF_OVERRIDE_GLOBAL_THREADPOOL", "XLA_FLAGS"):
        env.pop(name, None)
    modules = [f"effnet_repro.{n}" for n in tree.modules() if "__main__" not in n]
    command = [sys.executable, "-c", PROGRAM, *sorted(modules)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_every_module_changes_nothing(found):
    assert found["imported"] == {}


def test_changes_would_be_seen(found):
    assert found["meddled"] == ["environment", "jax", "keras", "running", "tensorflow"]


def test_configure_sets_what_is_read_once(found):
    assert found["early"] == [[], ["1", "1", "--xla_gpu_enable_triton_gemm=false"], 0]


def test_configure_says_once_what_comes_too_late(found):
    late, values, said = found["late"]
    assert [name.partition("=")[0] for name in late] == [
        "TF_NUM_INTEROP_THREADS",
        "TF_OVERRIDE_GLOBAL_THREADPOOL",
        "XLA_FLAGS",
    ]
    assert said == 3 and all(name in message for name, message in zip(late, found["said"]))
    assert found["again"] == [[], values, 3]
