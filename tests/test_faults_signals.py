"""Requests to stop, at any moment: a run saves what it has, a command ends with one line, and nothing is lost."""

import os
import signal
import subprocess
import sys

import pytest
from test_faults_hours import command
from test_loop import Toy, once, train
from tiny import PYTHON

from effnet_repro import checkpoint
from effnet_repro.cli.kit import run_program
from effnet_repro.runs import watch

SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize("number", [getattr(signal, name) for name in SIGNALS])
def test_a_signal_ends_a_command_with_a_line(capsys, number):
    before = signal.getsignal(number)
    assert run_program(command(lambda args: os.kill(os.getpid(), number)), []) == 130
    assert capsys.readouterr().err == "effnet-cases: interrupted\n"
    assert signal.getsignal(number) == before


def test_a_signal_that_a_library_turns_into_an_error_is_still_a_signal(capsys):
    def swallow(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("initialization of _core failed") from None

    assert run_program(command(swallow), []) == 130
    assert capsys.readouterr().err == "effnet-cases: interrupted\n"


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_while_the_stop_is_written_down(
    tmp_path, monkeypatch, capsys, no_events, again
):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    saved = checkpoint.save

    def slow(path, arrays, metadata):
        if "update" in path.name:  # of the stop, within an epoch
            os.kill(os.getpid(), again)
        return saved(path, arrays, metadata)

    monkeypatch.setattr(checkpoint, "save", slow)
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
    run = lambda args: train(tmp_path, Toy(at=once("step 5", ask))).finished
    assert run_program(command(run), []) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "effnet-cases: interrupted"
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "epoch-0001.safetensors"


UNHEARD = """
import hashlib, os, signal, sys, threading, time
from test_loop import Toy, once, train
from effnet_repro import cli
from effnet_repro.cli.kit import run_program
from effnet_repro.runs import signals, watch
signals.PATIENCE = 0.3
watch.save_curves = watch.Events.write = lambda *_: None

def compile(name):  # what nothing interrupts, as a compiler
    if name == sys.argv[2]:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        rounds = int(sys.argv[3])
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds) if rounds else time.sleep(60)

def command(args):
    return 0 if train(sys.argv[1], Toy(at=compile)).finished else 130

sys.exit(run_program(cli.COMMANDS["cases"]._replace(run=command), [], alone=True))
"""
LONG, SHORT, HEARD = (
    2 * 10**9,
    10**6,
    0,
)  # rounds that nothing interrupts; or Python hears the signal


@pytest.mark.parametrize(
    "event, rounds, newest, says",
    [
        ("step 1", LONG, None, "effnet-cases: interrupted"),
        ("step 1", HEARD, None, "effnet-cases: interrupted"),
        ("validate 3", LONG, "epoch-0001.safetensors", "effnet-cases: interrupted"),
        ("step 5", SHORT, "epoch-0001-update-000005.safetensors", "stopping after this step"),
    ],
)
def test_a_signal_while_a_compiler_has_the_thread(tmp_path, event, rounds, newest, says):
    "It ends a run that loses nothing at once; else the step comes first, and is saved."
    words = [sys.executable, "-c", UNHEARD, str(tmp_path), event, str(rounds)]
    done = subprocess.run(words, env=PYTHON, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and says in done.stderr, done.stderr
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert (found and found.name) == newest


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_was_ignored_stays_ignored(capsys, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_program(command(lambda args: os.kill(os.getpid(), number)), []) == 0
    finally:
        signal.signal(number, before)


def test_a_forewarning_of_a_queue_saves_and_goes_on_later(tmp_path, monkeypatch, no_events):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    ask = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert not train(tmp_path, Toy(at=once("step 5", ask))).finished
    assert (
        checkpoint.latest(tmp_path / "checkpoints").name == "epoch-0001-update-000005.safetensors"
    )
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert train(tmp_path).finished


def test_a_signal_that_the_program_handles_stays_its_own(tmp_path, monkeypatch, no_events):
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(True))
    try:
        ask = lambda: os.kill(os.getpid(), signal.SIGUSR2)
        assert train(tmp_path, Toy(at=once("step 5", ask))).finished and heard == [True]
    finally:
        signal.signal(signal.SIGUSR2, before)


EARLY = """
import os, signal, sys
sys.argv[0] = "/usr/local/bin/effnet-train"
class Kill:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
sys.meta_path.insert(0, Kill())
import effnet_repro.cli
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_while_a_command_is_imported(name):
    heard = lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)  # even in the background
    done = subprocess.run(
        [sys.executable, "-c", EARLY, name],
        env=PYTHON,
        capture_output=True,
        text=True,
        preexec_fn=heard,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr
