"""Where a number was made, and quiet while libraries start."""

import contextlib
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@contextlib.contextmanager
def quiet_stderr():  # A context
    "Drop what libraries write to the process's stderr; exceptions still come through"
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*args):
    try:
        here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
        out = subprocess.run(
            ["git", *args], cwd=str(here), capture_output=True, text=True, timeout=10
        )
        return out.stdout.strip() if out.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def describe_machine(
    backend: str,  # What computes: "tensorflow", "jax", "graphcore"
    device: str,  # e.g. "CPU, 2 cores"
) -> dict:  # What `environment.json` holds
    "Describe where a number was made"
    packages = (
        "effnet_repro",
        "keras",
        "tensorflow",
        "tensorflow-cpu",
        "jax",
        "numpy",
        "safetensors",
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "backend": backend,
        "versions": {p: v for p in packages if (v := _version(p))},
        "revision": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }
