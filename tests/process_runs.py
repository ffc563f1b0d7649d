"""Runs of a tiny case by several processes on this machine, for tests: the commands, and a program of the library."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tiny import PYTHON

from effnet_repro.checkpoint import load_newest

CASE = """
cases:
  Tiny:
    {model_size: 0, group_size: 16, expand_ratio: 4, norm: LN_PN, norm_groups: 1, image_size: 32,
     image_resize: modern, micro_batch_size: 4, global_batch_size: 16, gradient_accumulation: 4,
     mix_group_size: 4, num_stages: 1, num_replicas: 1, pipeline_splits: [], top_filters: 32,
     net_stages: [r1_k3_s2_e1_i32_o16, r2_k3_s2_i16_o16], mixup_alpha: 0.1, cutmix_lambda: 0.9, epochs: 2}
"""
#: A compiler that takes seconds, not the best code.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
#: What a run of the tests leaves out: figures and TensorBoard's events cost more than the training.
PLAIN = """
import json, sys
from effnet_repro.cli import main
from effnet_repro.cli.processes import leave
from effnet_repro.runs import watch
watch.Events.write, watch.save_curves = (lambda self, row: None), (lambda run_dir: None)
if sys.argv[1].startswith("["):  # several commands
    sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
status = main(sys.argv[1:])
leave(status)
sys.exit(status)
"""


#: What runs before, so that images are made as on a GPU: of a set that stays on the device, or one after the other.
AS_ON_GPU = """
from effnet_repro.training import stream
stream.has_jax_gpu, stream.fits_device = (lambda: True), (lambda data: {})
"""


def environment(**more):
    return {**PYTHON, "KERAS_BACKEND": "jax", "XLA_FLAGS": FAST, **more}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Runs:
    "Starts the processes of one training; `folder` holds its case and its run folders."

    def __init__(self, folder, count=2, port=None, coordinator=None, hosts=None):
        self.folder, self.count = Path(folder), count
        self.before = ""  # What the program of a process does first
        self.hosts = hosts  # As in `two_hosts`, a process on each; None = all on this one
        self.port = port or free_port()
        self.coordinator = coordinator or f"127.0.0.1:{self.port}"
        self.case = self.folder / "tiny.yml"
        self.case.write_text(CASE)
        self.processes = []

    def run_dir(self, index=0):
        return self.folder / ("run" if index == 0 else f"other-{index}")

    def words(self, index, *more):
        words = ["train", "Tiny", "--config-path", self.case, "--run-dir", self.run_dir(index)]
        return [*map(str, words), "--budget", "case", "--seed", "3", *map(str, more)]

    def command(self, index, *more, parents):
        rank = ["--distributed", "--coordinator", self.coordinator, "--processes", str(self.count)]
        words = self.words(index, *rank, "--process", index, *more)
        program = ["-m", "effnet_repro.cli"] if parents else ["-c", self.before + PLAIN]
        words = [sys.executable, *program, *words]
        return words if self.hosts is None else self.hosts.command(index, words)

    def start(self, *more, only=None, each=lambda index: (), parents=True):
        "Start all processes, or `only` some; without `parents` these are what the parents would start"
        child = {} if parents else {"EFFNET_PARENT": str(os.getpid())}
        for index in range(self.count) if only is None else only:
            self.processes.append(
                subprocess.Popen(
                    self.command(index, *more, *each(index), parents=parents),
                    env=environment(**child),
                    stdout=(self.folder / f"out-{index}").open("w"),
                    stderr=(self.folder / f"err-{index}").open("w"),
                )
            )
        return self

    def out(self, index=0):
        return (self.folder / f"out-{index}").read_text()

    def err(self, index=0):
        return (self.folder / f"err-{index}").read_text()

    def wait(self, seconds=240):
        "Statuses of all processes"
        until = time.monotonic() + seconds
        try:
            return [p.wait(max(1, until - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def until(self, what, seconds=240):
        "Wait until `what()` is true"
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, (self.out(), self.err(), self.out(1), self.err(1))
            assert any(p.poll() is None for p in self.processes), (
                self.out(),
                self.err(),
                self.err(1),
            )
            time.sleep(0.2)

    def child(self, index):
        "The process that a parent has started"
        parent = self.processes[index].pid
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        return int(text.split()[0])

    def alone(self, *more):
        "The same run by one process without --distributed"
        alone(self, more=more)


def alone(*runs, more=()):
    "Each of these runs by one process without --distributed, one after the other"
    words = [
        sys.executable,
        "-c",
        runs[0].before + PLAIN,
        json.dumps([one.words(0, *more) for one in runs]),
    ]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def checkpoint(run_dir):
    "(step, arrays) of the newest checkpoint"
    _, arrays, metadata, damaged = load_newest(Path(run_dir) / "checkpoints")
    assert not damaged
    return metadata["update"], arrays


def worst(one, other):
    "The largest difference of two sets of arrays, each over the largest value of its array"
    assert set(one) == set(other)
    scale = lambda a: np.abs(a).max() + 1e-12
    return max(float(np.abs(one[n] - other[n]).max() / scale(other[n])) for n in other)


def ask(pid, number):
    os.kill(pid, number)
