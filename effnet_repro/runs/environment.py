"""Where a number was made, and quiet while libraries start."""

import contextlib
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional


@contextlib.contextmanager
def quiet(
    number: int,  # Of the stream: 1 = standard output, 2 = standard error
):  # A context
    "Drop what libraries write to a stream of the process; exceptions still come through"
    stream = {1: sys.stdout, 2: sys.stderr}[number]
    try:
        if stream is not None:
            stream.flush()
        saved = os.dup(number)
    except (OSError, ValueError):  # closed, or a terminal that is gone: it is quiet already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)
        os.close(nowhere)


def suppress_stderr():  # A context
    "Drop what libraries write to the process's standard error: see `quiet`"
    return quiet(2)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(
    *words: str,  # What follows "git" on the command line
) -> Optional[str]:  # What it prints; None where there is no git, or no repository
    "Ask git about the repository that this package lies in"
    try:
        here = str(Path(__file__).resolve().parent)
        done = subprocess.run(
            ["git", *words],
            cwd=here,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
        "revision": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }
