"""What could cost hours: a run goes on without whatever it can do without, and is stopped by nothing but a reason."""

import errno
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import types

import pytest
from test_loop import Toy, once, train
from test_recorder import left
from tiny import POSIX, PYTHON

from effnet_repro import checkpoint, cli
from effnet_repro.cli.kit import run_program
from effnet_repro.data import open_data
from effnet_repro.messages import BestEffort, say
from effnet_repro.runs import metrics, read_rows, watch


def command(run):
    return cli.COMMANDS["cases"]._replace(run=run)


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- optional things


class BrokenModule(types.ModuleType):
    "An installed package that cannot be imported, for another reason than being absent"

    def __getattr__(self, name):
        raise RuntimeError("libfoo.so.3 is of another version")


def _events_are_a_file(run_dir, monkeypatch):
    pytest.importorskip("tensorboard")
    run_dir.mkdir(parents=True)
    (run_dir / "events").write_text("in the way")


def _no_tensorboard(run_dir, monkeypatch):
    for name in ("tensorboard", "tensorboard.summary"):
        monkeypatch.setitem(sys.modules, name, BrokenModule(name))


def _figure_fails(run_dir, monkeypatch):
    def fail(*_):
        raise TypeError("no axes today")

    monkeypatch.setattr(metrics, "_draw", fail)


def _bar_fails(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", BrokenModule("tqdm"))


def _figure_cannot_be_written(run_dir, monkeypatch):
    (run_dir / "curves.png").mkdir(parents=True)


OPTIONAL = {  # kind: (what is broken, the words of its only warning)
    "events is a file": (_events_are_a_file, "events: left out"),
    "TensorBoard is broken": (_no_tensorboard, "events: left out (libfoo.so.3 is of another"),
    "the figure fails": (_figure_fails, "figure: left out (no axes today)"),
    "the bar fails": (_bar_fails, "progress bar: left out (libfoo.so.3"),
    "the figure is a folder": (_figure_cannot_be_written, "figure: left out (Cannot write"),
}


@pytest.mark.parametrize("kind", OPTIONAL)
def test_what_is_optional_ends_no_run(tmp_path, monkeypatch, caplog, kind):
    "Four epochs, one warning."
    break_it, words = OPTIONAL[kind]
    if "vents" not in kind and "Tensor" not in kind:
        monkeypatch.setattr(watch.Events, "write", lambda self, row: None)
    else:
        monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    break_it(tmp_path / "run", monkeypatch)
    run = train(tmp_path / "run", progress=True)
    assert run.finished and len(read_rows(run.run_dir / "metrics.csv")[0]) == 4
    (line,) = warned(caplog)
    assert words in line and "\n" not in line


@pytest.mark.parametrize("key, value", [("text.usetex", True), ("figure.dpi", 3000)])
def test_a_users_settings_of_matplotlib_do_not_matter(
    tmp_path, monkeypatch, no_events, caplog, key, value
):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, key, value)
    monkeypatch.setitem(matplotlib.rcParams, "backend", "module://backend_interagg")
    run = train(tmp_path / "run")
    assert run.finished and warned(caplog) == []
    assert (run.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.rcParams[key] == value  # the user's, as they were


MPLBACKEND = """
import sys
from pathlib import Path
from effnet_repro.runs.metrics import save_curves
save_curves(Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.parametrize("name", ["module://backend_interagg", "nonsense"])
def test_a_back_end_of_matplotlib_that_is_not_there(tmp_path, no_events, name):
    train(tmp_path / "run", Toy(), validate_every=None)
    (tmp_path / "run" / "curves.png").unlink()
    where = {**PYTHON, "MPLBACKEND": name}
    done = subprocess.run(
        [sys.executable, "-c", MPLBACKEND, str(tmp_path / "run")], env=where, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "curves.png").exists()


def test_settings_of_matplotlib_that_are_no_text(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"backend: \xff\n")
    words = ["plan", "B0-G1-GN-Native_16IPU_2x8", "--figure", "x.png"]
    done = subprocess.run(
        [sys.executable, "-m", "effnet_repro.cli", *words],
        env=PYTHON,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "A file matplotlibrc, here or in" in done.stderr.splitlines()[-1]


def test_a_run_without_pandas_goes_on(tmp_path, monkeypatch, no_events):
    monkeypatch.setitem(sys.modules, "pandas", None)
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert not train(tmp_path, Toy(at=once("step 5", ask))).finished
    assert train(tmp_path).finished


def test_a_best_effort_lets_ctrl_c_through(caplog):
    effort = BestEffort("thing")
    with pytest.raises(KeyboardInterrupt):
        with effort:
            raise KeyboardInterrupt
    for _ in range(3):
        with effort:
            sys.exit("a library gives up")
    assert warned(caplog) == ["thing: left out (a library gives up)."]


def test_names_of_classes_are_no_mathematics(tmp_path):
    import matplotlib.pyplot as plt
    import numpy as np

    from effnet_repro.data import plot_images
    from effnet_repro.runs import Scores, plot_confusion

    names = ["$\\frac$", "caf\udce9", "a_b^c", "$"]
    scores = Scores(1.0, 1.0, 0.0, 4, 32, 1.0, np.eye(4, dtype=int))
    ax = plot_confusion(scores, names)
    ax.figure.savefig(tmp_path / "a.png")
    axes = plot_images(np.zeros((4, 8, 8, 3), "uint8"), names)
    axes[0, 0].figure.savefig(tmp_path / "b.png")
    plt.close("all")


def test_another_precision_is_told_where_a_run_goes_on(tmp_path, monkeypatch, no_events, capsys):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
    train(tmp_path, Toy(at=once("step 5", ask)))
    other = Toy()
    other.precision = "float16"
    assert train(tmp_path, other).finished
    assert "precision: float64 so far, float16 from here on" in capsys.readouterr().out


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_that_cannot_be_forced_is_written_all_the_same(
    tmp_path, monkeypatch, no_events, number
):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert train(tmp_path / "run").finished


def failing(real, which, number):
    "A function of the system that fails once, the `which`-th time it is called"
    calls = []

    def call(*words, **named):
        calls.append(words)
        if len(calls) == which:
            raise OSError(number, os.strerror(number))
        return real(*words, **named)

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    "call, which", [("replace", n) for n in (1, 2, 4, 6, 13, 18)] + [("fsync", 5)]
)
def test_each_write_that_fails_costs_a_line_and_no_step(
    tmp_path, monkeypatch, capsys, no_events, call, which, number
):
    "Whichever write it is, the same command goes on to what a run without it leaves."
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    train(tmp_path / "whole")
    run_dir, run = tmp_path / "run", command(lambda args: not train(tmp_path / "run").finished)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), which, number))
        assert run_program(run, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"effnet-cases: Cannot write {run_dir}/") and "unchanged" in line
    assert train(run_dir).finished and left(run_dir) == left(tmp_path / "whole")


def test_a_folder_that_cannot_be_opened_is_written_all_the_same(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, *how, **named):
        if os.path.isdir(path):
            raise OSError(errno.EISDIR, "Is a directory")
        return opened(path, *how, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert checkpoint.atomic_write(tmp_path / "a" / "b", b"whole").read_bytes() == b"whole"


GONE = {
    "metrics.csv": lambda run_dir: (run_dir / "metrics.csv").unlink(),
    "config.json": lambda run_dir: (run_dir / "config.json").unlink(),
    "the folder": lambda run_dir: shutil.rmtree(run_dir),
}


@pytest.mark.parametrize("kind", GONE)
def test_what_vanishes_from_a_run_folder_is_written_anew(
    tmp_path, monkeypatch, no_events, caplog, kind
):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    run_dir = tmp_path / "run"
    train(run_dir, Toy(at=once("step 5", lambda: GONE[kind](run_dir))))
    assert {"config.json", "environment.json", "metrics.csv"} <= set(os.listdir(run_dir))
    assert [row["update"] for row in read_rows(run_dir / "metrics.csv")[0]] == ["3", "6", "9", "12"]
    (line,) = warned(caplog)
    assert "vanished while it trained; written anew" in line


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, caplog):
    from effnet_repro.data import layouts, sample

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFFNET_REPRO_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(sample, "SAMPLE_CROPS", {"train": 2, "validation": 1})
    data = open_data(verbose=False)
    assert data.builtin and data.train_count == 20
    assert open_data(verbose=False, on_corrupt="skip").train_count == 20
    assert any("the sample set is in" in line for line in warned(caplog))
    monkeypatch.setattr(layouts, "LARGE", 0)  # the list of a large set is kept there, too
    for on_corrupt in ("refuse", "skip"):
        assert open_data(data.root, verbose=False, on_corrupt=on_corrupt).train_count == 20
    (line,) = [line for line in warned(caplog) if "left out" in line]
    assert f"cache in {tmp_path / 'file' / 'cache'}: left out" in line


def test_no_home_folder_is_no_reason_to_stop(tmp_path, monkeypatch):
    from effnet_repro.data.cache import cache_folder

    monkeypatch.delenv("EFFNET_REPRO_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "effnet_repro-" in str(cache_folder())


def test_a_sample_set_without_one_of_its_files_is_made_anew(tmp_path, monkeypatch):
    from effnet_repro.data import sample

    monkeypatch.setattr(sample, "SAMPLE_CROPS", {"train": 2, "validation": 1})
    folder = sample.sample_set(tmp_path)
    whole = (folder / "train-00001-of-00002").read_bytes()
    (folder / "train-00001-of-00002").unlink()
    (tmp_path / ".sample-left").mkdir()
    os.utime(tmp_path / ".sample-left", (0, 0))
    assert open_data(None, cache_dir=tmp_path, verbose=False).train_count == 20
    assert (folder / "train-00001-of-00002").read_bytes() == whole
    assert not (tmp_path / ".sample-left").exists()


# ---------------------------------------------------------------- what is in the way


IN_THE_WAY = {  # what lies there instead -> how it is made
    "a folder": lambda path: path.mkdir(parents=True),
    "a FIFO": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to(path.name),
    "an empty file": lambda path: path.write_bytes(b""),
}
PLACES = [
    ".lock",
    "config.json",
    "metrics.csv",
    "validation.csv",
    "checkpoints/epoch-0004.safetensors",
]


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_is_told_before_a_run(tmp_path, no_events, kind):
    "Not after its first epoch, or after its last; and nothing waits for a FIFO."
    places = ["checkpoints"] if "file" in kind else PLACES[1:] if "folder" in kind else PLACES
    for number, place in enumerate(places):
        path = tmp_path / str(number) / place
        path.parent.mkdir(parents=True)
        IN_THE_WAY[kind](path)
        with pytest.raises(OSError, match=f"{place}: there is {kind} where .*Move it away"):
            train(tmp_path / str(number), Toy(at=lambda event: pytest.fail(event)))


# ---------------------------------------------------------------- standard streams


class Gone(io.TextIOBase):
    "A terminal that is not there any more"

    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")


@pytest.mark.parametrize("stream", [Gone, io.StringIO, Ascii, lambda: None])
def test_a_run_does_not_need_its_standard_streams(tmp_path, monkeypatch, no_events, stream):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    there = stream()
    if isinstance(there, io.StringIO):
        there.close()
    monkeypatch.setattr(sys, "stdout", there)
    monkeypatch.setattr(sys, "stderr", there)
    assert train(tmp_path / "caf\udce9 é", progress=True).finished
    say("é \udce9")
    from tqdm import tqdm

    lock, free = tqdm.get_lock(), []

    def take():
        with lock:
            free.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(5)
    assert free, "the lock of all bars was kept: others would wait for ever"


SHELL = [  # what is done to the streams -> status, lines on stderr
    (">&-", 0, 0),
    ("2>&-", 0, 0),
    ("<&- >&- 2>&-", 0, 0),
    ("> /dev/full", 1, 1),
    ("| head -n 1", 0, 0),
]


def test_a_full_disk_behind_standard_output_is_named():
    line = f"{sys.executable} -m effnet_repro.cli cases --json > /dev/full"
    done = subprocess.run(["bash", "-c", line], env=PYTHON, capture_output=True, text=True)
    said = "effnet-cases: Cannot write to standard output: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_what_a_library_says_before_it_ends_the_process_is_heard():
    words = ["doctor", "--no-trial", "--backend", "jax"]
    done = subprocess.run(
        [sys.executable, "-m", "effnet_repro.cli", *words],
        env={**PYTHON, "XLA_FLAGS": "--no_such_flag", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Unknown flag in XLA_FLAGS: --no_such_flag" in done.stderr


@pytest.mark.parametrize("redirect, status, lines", SHELL)
def test_closed_and_full_streams(redirect, status, lines):
    line = f"set -o pipefail; {sys.executable} -m effnet_repro.cli cases {redirect}"
    done = subprocess.run(["bash", "-c", line], env=PYTHON, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == lines and "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (status, 141 if "head" in redirect else status)


def test_a_folder_that_is_gone_is_what_is_told(capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    before = os.getcwd()
    os.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
        assert cli.main(["train", "B0-G1-GN-Native_16IPU_2x8", "--dry-run"]) in (1, 2)
    finally:
        os.chdir(before)
    (line,) = capsys.readouterr().err.splitlines()
    assert "The folder that this was started in is gone" in line


def test_what_is_printed_of_names_never_fails(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.yml")
    done = subprocess.run(
        [sys.executable, "-m", "effnet_repro.cli", "cases", "--config-path", name],
        env={**PYTHON, **POSIX},
        capture_output=True,
    )
    assert done.returncode == 2 and b"caf\\xe9.yml" in done.stderr, done.stderr
