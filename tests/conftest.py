"""What tests of several files share: running a command in this process."""

import pytest


@pytest.fixture
def run(capsys, monkeypatch):
    "Run a command in this process: (exit status, stdout, stderr)"
    from effnet_repro import cli

    for name in ("DATA_DIR", "CONFIG_PATH", "IN_TEST"):
        monkeypatch.delenv(name, raising=False)

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
