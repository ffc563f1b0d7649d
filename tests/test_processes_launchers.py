"""Open MPI and Slurm start the processes, where they are installed. All of it is marked long."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from images import encode, folders, smooth_image
from process_runs import Runs, checkpoint, environment, worst

pytest.importorskip("jax")
pytestmark = pytest.mark.long
TOLERANCE = 2e-6  # As in test_processes.py
SCRIPT = Path(__file__).resolve().parent.parent / "deploy" / "slurm" / "train.sbatch"


def run(words, **more):
    "Run a launcher, and show what it said where it failed"
    done = subprocess.run(
        [str(w) for w in words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def equal_to_one(tmp_path, runs, steps, *more):
    "Whether what was launched trained as one process does"
    (tmp_path / "one").mkdir()
    whole = Runs(tmp_path / "one", count=1)
    whole.alone("--max-steps", steps, "--no-validation", *more)
    (step, ours), (last, theirs) = checkpoint(runs.run_dir()), checkpoint(whole.run_dir())
    assert step == last == steps and worst(ours, theirs) < TOLERANCE


def test_mpirun_starts_two_processes(tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun (Open MPI)")
    runs = Runs(tmp_path)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    words = runs.words(0, "--distributed", "--max-steps", 2, "--no-validation")
    start = ["mpirun", *root, "--oversubscribe", "-np", 2, "--bind-to", "none"]
    said = run([*start, sys.executable, "-m", "effnet_repro.cli", *words])
    assert "process 1 of 2" in said and "(Open MPI)" in said
    equal_to_one(tmp_path, runs, 2)


def test_the_script_for_slurm_starts_two_tasks(tmp_path):
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("needs Slurm: sbatch, and a controller that answers")
    runs, log = Runs(tmp_path), tmp_path / "log"
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "effnet-train"  # as installed
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m effnet_repro.cli train "$@"\n')
    command.chmod(0o755)
    size = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    places = [
        (f"{split}/{c}/{i}.jpg", i) for split in ("train", "val") for c in "xy" for i in range(9)
    ]
    data = folders(tmp_path / "data", {place: encode(smooth_image(seed=i)) for place, i in places})
    case = dict(CASE="Tiny", DATA_DIR=str(data), RUN_DIR=str(runs.run_dir()))
    case["PATH"] = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    words = ["--config-path", runs.case, "--budget", "case", "--seed", 3, "--decoder", "pillow"]
    words += ["--max-steps", 2, "--no-validation"]
    run(["sbatch", "--wait", *size, f"--output={log}", SCRIPT, *words], **case)
    assert "process 1 of 2" in log.read_text() and "(Slurm)" in log.read_text()
    equal_to_one(tmp_path, runs, 2, "--data-dir", data, "--decoder", "pillow")
