"""Kill a converter at its steps and see what is left: python tests/kill_converter.py FOLDER [TARGET [EVERY]]

TARGET is the file to replace, e.g. model.ckpt; EVERY = 3 takes each third step. A step is the moment
before or after a rename, a sync or a deletion. Prints a JSON line a kill: the number that a reader
finds (1 = the old weights, 2 = the new ones), by the name of the file and by its folder; the number
after the next write; and the files that are left then. TensorFlow is imported once; each life is a
fork from before its first operation.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf  # noqa: F401

from effnet_repro import convert
from effnet_repro.network import initial_weights
from effnet_repro.scaling import ModelSpec

STEPS = ("replace", "fsync", "unlink")
SPEC = ModelSpec.from_name("CIFAR-G16-LN_PN", num_classes=10)


def child(work):
    "Run in a fork; its exit status, or minus the signal"
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(int(work() or 0))
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(number):
    return {n: np.full_like(w, number) for n, w in initial_weights(SPEC).items()}


def ours(path, number):
    arrays = weights(number)
    convert.write_ours(path, convert.Weights(SPEC, arrays, convert.case_for(SPEC), ("x",) * 10))


def kill_at(n):
    "Patch the file system: this process dies before or after the n-th step"
    count = iter(range(1, 10**6))

    def wrap(name):
        real = getattr(os, name)

        def step(*args, **kwargs):
            if next(count) == n:
                os._exit(7)
            done = real(*args, **kwargs)
            if next(count) == n:
                os._exit(7)
            return done

        return step

    for name in STEPS:
        setattr(os, name, wrap(name))


def read(path):
    "Which of the two is there: its number"
    found = convert.read(path).arrays["all/Top/conv/conv2d/kernel"]
    return int(found.flat[0]) if (found == found.flat[0]).all() else 5


def kill(write, path, times, n):
    "Kill the writer that replaces `path` at step `n`: what is found then, and after one more write"
    path.parent.mkdir()
    # a checkpoint that was replaced before has other data files
    assert child(lambda: [write(1, path) for _ in range(times)] and 0) == 0
    killed = child(lambda: write(2, path, n)) == 7
    found, by_folder = divmod(child(lambda: 10 * read(path) + read(path.parent)), 10)
    row = dict(times=times, step=n, killed=killed, found=found, by_folder=by_folder)
    then = child(lambda: write(3 - found, path) or read(path))
    return {**row, "then": then, "left": sorted(os.listdir(path.parent))}


def main(folder, target="model.ckpt", every="1"):
    folder, to = Path(folder), "tf1" if target.endswith(".ckpt") else "torch"
    for i in (1, 2):
        ours(folder / f"{i}.safetensors", i)

    def write(i, path, dies_at=0):
        if dies_at:
            kill_at(dies_at)
        convert.convert(folder / f"{i}.safetensors", path, to=to, overwrite=True)

    for times in (1, 2):
        row = {"step": 1 - int(every), "killed": True}
        while row["killed"]:
            n = row["step"] + int(every)
            row = kill(write, folder / f"{times}-{n}" / target, times, n)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
