"""The parent of a process: what each end means, the lines it passes on, restarts and signals. No JAX is needed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from effnet_repro.distributed import AGAIN, Ranks, explain_end, supervise, supervisor

TWO = Ranks(0, 2, "node1:1234", "flags")
DIED = """F1128 10:17:38.197615   31789 client.h:80] Terminating process because the JAX distributed service detected
The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. RPC: /xla.coordination.CoordinationService/PollForError
"""
LATE = "F1128 10:16:56.6 1 client.h:80] DEADLINE_EXCEEDED RPC: /xla.coordination.CoordinationService/RegisterTask\n"
GONE = (
    "F1128 10:16:56.6 1 client.h:80] UNAVAILABLE: failed to connect. coordination service agent\n"
)


@pytest.mark.parametrize(
    "status, text, asked, expected, lost, line",
    [
        (0, "", (), 0, False, ""),
        (1, "", (), 1, False, ""),
        (2, "", (), 2, False, ""),
        (AGAIN, "", (), AGAIN, True, ""),
        (130, "", (), AGAIN, False, ""),  # asked elsewhere
        (130, "", (signal.SIGTERM,), AGAIN, False, ""),
        (130, "", (signal.SIGINT,), 130, False, ""),
        (-signal.SIGTERM, "", (signal.SIGTERM,), AGAIN, False, ""),
        (-signal.SIGABRT, DIED, (), AGAIN, True, "process 0 of 2 lost process 1, which stopped"),
        (-signal.SIGABRT, LATE, (), 1, False, "not all 2 processes came to node1:1234"),
        (-signal.SIGABRT, GONE, (), AGAIN, True, "lost the coordinator node1:1234"),
        (-signal.SIGKILL, "", (), AGAIN, True, "was ended by SIGKILL"),
        (-signal.SIGSEGV, "", (), AGAIN, True, "was ended by SIGSEGV"),
    ],
)
def test_what_an_end_means(status, text, asked, expected, lost, line):
    found = explain_end(status, text, TWO, asked)
    assert (found.status, found.lost) == (expected, lost)
    assert line in found.line and bool(line) == bool(found.line)


def child(code):
    return [sys.executable, "-c", code]


def test_the_text_of_the_runtime_stays_inside_and_ours_goes_on(capfd):
    code = f"import sys, os; sys.stderr.write('effnet: before\\n' + {DIED!r}); sys.stderr.flush(); os.abort()"
    assert supervise(child(code), TWO) == AGAIN
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "effnet: before" and len(lines) == 2
    assert lines[1].startswith("effnet: process 0 of 2 lost process 1")
    assert supervise(child(code), TWO, shows_all=True) == AGAIN
    assert "PollForError" in capfd.readouterr().err


def test_a_line_after_the_runtime_s_is_ours_again(capfd):
    code = f"import sys; sys.stderr.write({GONE!r} + 'more of it\\neffnet-train: the end\\n'); sys.exit(1)"
    assert supervise(child(code), TWO) == 1
    assert capfd.readouterr().err == "effnet-train: the end\n"


def test_restarts_are_bounded_and_an_error_is_not_started_again(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0.01)
    count = tmp_path / "count"
    again = f"open({str(count)!r}, 'a').write('x'); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert supervise(child(again), TWO, restarts=2) == AGAIN
    assert count.read_text() == "xxx"
    assert capfd.readouterr().err.count("starting again") == 2
    count.unlink()
    error = f"open({str(count)!r}, 'a').write('x'); import sys; sys.exit(1)"
    assert supervise(child(error), TWO, restarts=2) == 1 and count.read_text() == "x"
    count.unlink()
    ends = f"import sys; len(open({str(count)!r}).read()) > 1 and sys.exit(0)"
    once = again.replace("; import os, signal", f"; {ends}; import os, signal")
    assert supervise(child(once), TWO, restarts=5) == 0 and count.read_text() == "xx"


PARENT = """
import sys
from effnet_repro.distributed import Ranks, supervise
sys.exit(supervise([sys.executable, "-c", sys.argv[1]], Ranks(0, 2, "a:1", "flags"), 3))
"""
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, AGAIN), (signal.SIGINT, 130)])
def test_a_signal_is_handed_on_and_nothing_is_started_again(number, status):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, SAVES], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    assert parent.wait(20) == status


def test_the_second_signal_ends_at_once():
    stubborn = SAVES.replace("lambda *_: sys.exit(130)", "lambda *_: print('asked', flush=True)")
    stubborn += "time.sleep(60)\n"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, stubborn], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGTERM)
    assert parent.stdout.readline() == "asked\n"
    begin = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == AGAIN and time.monotonic() - begin < 10


CASE = "B0-G16-LN_PN-Half_16IPU_2x8"


@pytest.fixture
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_", "KERAS_", "PMI", "RANK")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "words, line",
    [
        (("--coordinator", "a:1"), "--coordinator: for --distributed"),
        (("--restarts", 1), "--restarts: for --distributed"),
        (("--distributed", "--backend", "tensorflow"), "trains with JAX only"),
        (("--distributed", "--device", "ipu", "--dry-run"), "--print-poprun"),
        (("--distributed", "--processes", 2, "--process", 0), "--coordinator missing"),
        (("--distributed", "--coordinator", "a:1", "--processes", 2), "--process missing"),
        (("--distributed", "--coordinator", "a", "--processes", 2, "--process", 0), "host:port"),
        (("--distributed", "--restarts", -1), "--restarts must be from 0 to"),
        (("--distributed", "--restarts", 2**31), "--restarts must be from 0 to 2,147,483,647"),
        (("--distributed", "--join-timeout", 0), "--join-timeout from 1"),
        (("--checkpoint-every", 0), "--checkpoint-every must be minutes above 0"),
    ],
)
def test_a_wrong_command_line_is_one_line(refused, alone, words, line):
    pytest.importorskip("jax")
    assert line in refused("train", CASE, *words)


def test_half_an_environment_is_one_line(refused, alone):
    pytest.importorskip("jax")
    alone.setenv("JAX_PROCESS_ID", "1")
    assert "JAX_NUM_PROCESSES" in refused("train", CASE, "--distributed")
    alone.delenv("JAX_PROCESS_ID")
    alone.setenv("SLURM_JOB_ID", "5")
    assert "srun" in refused("train", CASE, "--distributed")


def test_the_library_refuses_tensorflow_in_a_sentence():
    keras = pytest.importorskip("keras")
    from effnet_repro.distributed import join_others

    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="train with JAX only"):
            join_others(Ranks(0, 2, "a:1", "flags"))
