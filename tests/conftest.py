"""What tests of several files share: running a command in this process, and data sets to read."""

import os
import sys
from pathlib import Path

import pytest
from images import ROOT

from effnet_repro import data as d


def pytest_configure(config):
    """Spare JAX the seconds in which it optimizes what runs for milliseconds; not in the long run.

    The notebooks run its optimized code.
    """
    if config.option.markexpr == "not long":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_finish():
    "Where a test has imported Keras, set what it reads once, before any of them computes"
    if "keras" in sys.modules:
        from effnet_repro.training import configure

        configure()


@pytest.fixture
def run(capsys, monkeypatch):
    "Run a command in this process: (exit status, stdout, stderr)"
    from effnet_repro import cli

    for name in ("DATA_DIR", "CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    backend = os.environ.get("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_BACKEND", backend or "tensorflow")  # put back: a command sets it
    if not backend:
        monkeypatch.delenv("KERAS_BACKEND")

    def call(*words):
        capsys.readouterr()
        status = cli.main([str(w) for w in words])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run):
    "Run a command that must fail with one line; returns the line"

    def call(*words, status=2):
        got, out, err = run(*words)
        assert got == status, (got, out, err)
        assert err.startswith("effnet") and len(err.splitlines()) == 1, err
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture
def no_events(monkeypatch):
    "TensorBoard would start TensorFlow"
    from effnet_repro.runs import watch

    monkeypatch.setattr(watch.Events, "write", lambda self, row: None)


@pytest.fixture
def graph():
    "An empty graph of TensorFlow 1 to build in"
    tf = pytest.importorskip("tensorflow")
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sample(cache_dir):
    return d.open_data(cache_dir=cache_dir, verbose=False)


@pytest.fixture(params=["imagenette128", "imagenet_sample"])
def real(request):
    folders = [os.environ.get("EFFNET_REPRO_DATA"), ROOT.parent / "shared" / "data"]
    for folder in filter(None, folders):
        if (Path(folder) / request.param).is_dir():
            return d.open_data(Path(folder) / request.param, verbose=False)
    pytest.skip(f"no {request.param}: set EFFNET_REPRO_DATA to the folder that holds it")
