"""Several processes that train one case: equal to one, and all that can happen to one of them.

What fits into seconds is checked always: two processes on CPUs train as one, and one goes on where two stopped. The
rest is marked long.
"""

import csv
import json
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from images import encode, folders, smooth_image
from process_runs import AS_ON_GPU, Runs, alone, ask, checkpoint, free_port, worst

pytest.importorskip("jax")
AGAIN = 75
TOLERANCE = 2e-6  # Of float32 sums in another order, over the largest value of an array


def rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lasting(row):
    return {n: float(v) for n, v in row.items() if n not in ("images_per_s", "seconds")}


def test_two_processes_train_as_one_and_one_goes_on(tmp_path):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    two, one = Runs(tmp_path / "two"), Runs(tmp_path / "one", count=1)
    two.start("--max-steps", 2, parents=False)
    assert two.wait() == [0, 0], (two.err(0), two.err(1))
    assert not two.run_dir(1).exists()  # process 0 alone writes
    (row,) = rows(two.run_dir())
    assert 0 <= float(row["validation_top1"]) <= 1
    (score,) = csv.DictReader((two.run_dir() / "validation.csv").open(newline=""))
    assert score["pictures"] == "300"  # each image once
    assert json.loads((two.run_dir() / "environment.json").read_text())["processes"] == 2
    alone(one, two, more=("--max-steps", 3, "--no-validation"))  # anew, and where two stopped
    (step, ours), (last, theirs) = checkpoint(two.run_dir()), checkpoint(one.run_dir())
    assert step == last == 3
    assert worst(ours, theirs) < TOLERANCE
    ours, theirs = (lasting(rows(r.run_dir())[-1]) for r in (two, one))
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name


# ---------------------------------------------------------------- what takes minutes


@pytest.mark.long
def test_any_number_goes_on_where_another_stopped(tmp_path):
    "One process, then two, then four: the weights and scores of one that nobody stopped"
    (tmp_path / "one").mkdir()
    whole = Runs(tmp_path / "one", count=1)
    whole.alone("--max-steps", 4)
    Runs(tmp_path, count=1).alone("--max-steps", 1)
    for count, steps in ((2, 2), (4, 4)):
        some = Runs(tmp_path, count=count).start("--max-steps", steps)
        assert some.wait(400) == [0] * count, [some.err(i) for i in range(count)]
    (step, ours), (last, theirs) = checkpoint(tmp_path / "run"), checkpoint(whole.run_dir())
    assert step == last == 4 and worst(ours, theirs) < TOLERANCE
    ours, theirs = (lasting(rows(f)[-1]) for f in (tmp_path / "run", whole.run_dir()))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("stays", [True, False], ids=["stay on the device", "sent to the device"])
def test_images_that_the_devices_cut_are_shared(tmp_path, stays):
    "As on GPUs: each process cuts its own images out of what it has; together they are those of one process"
    (tmp_path / "one").mkdir()
    two, one = Runs(tmp_path), Runs(tmp_path / "one", count=1)
    two.before = one.before = AS_ON_GPU.format(stays)
    more = ("--max-steps", 2, "--no-validation", "--decoder", "simplejpeg")
    two.start(*more, parents=False)
    assert two.wait(400) == [0, 0], (two.err(0), two.err(1))
    one.alone(*more)
    (step, ours), (last, theirs) = checkpoint(two.run_dir()), checkpoint(one.run_dir())
    assert step == last == 2 and worst(ours, theirs) < TOLERANCE


@pytest.mark.long
def test_three_processes_train_as_one(tmp_path):
    "A step of 24 images has six micro-batches of four: two for each process"
    (tmp_path / "one").mkdir()
    three, one = Runs(tmp_path, count=3), Runs(tmp_path / "one", count=1)
    more = ("--global-batch-size", 24, "--mix-group-size", 4, "--max-steps", 2)
    three.start(*more)
    assert three.wait(400) == [0] * 3, [three.err(i) for i in range(3)]
    one.alone(*more)
    (step, ours), (last, theirs) = checkpoint(three.run_dir()), checkpoint(one.run_dir())
    assert step == last == 2 and worst(ours, theirs) < TOLERANCE
    ours, theirs = (lasting(rows(r.run_dir())[-1]) for r in (three, one))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)


@pytest.mark.long
def test_three_processes_that_cannot_share_a_step_are_refused_in_one_line(tmp_path):
    runs = Runs(tmp_path, count=3).start("--max-steps", 1)
    assert runs.wait() == [1, 1, 1]
    assert "3 devices of 3 processes cannot share" in runs.err(0)
    assert len(runs.err(0).splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize("whom", [0, 1])
def test_sigterm_anywhere_saves_at_one_step_and_asks_to_be_started_again(tmp_path, whom):
    runs = Runs(tmp_path).start("--no-validation", "--checkpoint-every", 0.01)
    runs.until(lambda: list(runs.run_dir().glob("checkpoints/*.safetensors")))
    ask(runs.processes[whom].pid, signal.SIGTERM)
    assert runs.wait() == [AGAIN, AGAIN]
    assert "stopped after step" in runs.out(0)
    step, _ = checkpoint(runs.run_dir())
    assert f"stopped after step {step}, saved" in runs.out(0)
    for index in (0, 1):
        assert "Traceback" not in runs.err(index) and len(runs.err(index).splitlines()) <= 1
    again = Runs(tmp_path).start("--no-validation", "--max-steps", step + 2)
    assert again.wait() == [0, 0]
    assert checkpoint(again.run_dir())[0] == step + 2


@pytest.mark.long
@pytest.mark.parametrize("whom", [0, 1])
def test_a_killed_process_ends_all_within_half_a_minute(tmp_path, whom):
    runs = Runs(tmp_path).start("--no-validation", "--checkpoint-every", 0.01)
    runs.until(lambda: list(runs.run_dir().glob("checkpoints/*.safetensors")))
    ask(runs.child(whom), signal.SIGKILL)
    begin = time.monotonic()
    assert runs.wait() == [AGAIN, AGAIN]
    assert time.monotonic() - begin < 30
    assert "was ended by SIGKILL" in runs.err(whom)
    for index in (0, 1):
        (line,) = runs.err(index).splitlines()
        assert "The same command goes on from the last checkpoint." in line
    assert checkpoint(runs.run_dir())[0] >= 1  # whole


@pytest.mark.long
def test_a_lost_process_is_started_again_a_bounded_number_of_times(tmp_path):
    more = ("--no-validation", "--checkpoint-every", 0.01, "--restarts", 1, "--max-steps", 40)
    runs = Runs(tmp_path).start(*more)
    runs.until(lambda: list(runs.run_dir().glob("checkpoints/*.safetensors")))
    ask(runs.child(1), signal.SIGKILL)
    assert runs.wait(500) == [0, 0], (runs.err(0), runs.err(1))
    assert "starting again in" in runs.err(0) and "starting again in" in runs.err(1)
    assert checkpoint(runs.run_dir())[0] == 40


@pytest.mark.long
def test_a_parent_that_is_killed_leaves_nobody_behind(tmp_path):
    runs = Runs(tmp_path).start("--no-validation")
    runs.until(lambda: "estimate" in runs.out())
    children = [runs.child(i) for i in (0, 1)]
    ask(runs.processes[1].pid, signal.SIGKILL)
    assert runs.processes[0].wait(60) == AGAIN
    runs.wait(5)
    time.sleep(3)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


@pytest.mark.long
@pytest.mark.parametrize("whom", [0, 1])
def test_a_missing_process_ends_the_others_after_the_stated_time(tmp_path, whom):
    runs = Runs(tmp_path).start("--join-timeout", 3, only=[whom])
    begin = time.monotonic()
    assert runs.wait() == [1]
    assert time.monotonic() - begin < 60
    (line,) = runs.err(whom).splitlines()
    assert ("not all 2 processes came" if whom == 0 else "nobody at the coordinator") in line


@pytest.mark.long
def test_other_data_are_refused_in_every_process(tmp_path):
    for at, name in enumerate("ab"):
        image = lambda i, at=at: encode(smooth_image(seed=100 * at + i))
        places = [(f"{s}/{c}/{i}.jpg", i) for s in ("train", "val") for c in "xy" for i in range(9)]
        folders(tmp_path / name, {place: image(i) for place, i in places})
    where = lambda index: ("--data-dir", tmp_path / "ab"[index], "--decoder", "pillow")
    runs = Runs(tmp_path).start("--max-steps", 1, each=where)
    assert runs.wait() == [1, 1]
    (line,) = runs.err(0).splitlines()
    assert "would train something else: training_images" in line
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.long
def test_other_flags_are_refused_in_every_process(tmp_path):
    runs = Runs(tmp_path).start("--max-steps", 1, each=lambda i: ("--epochs", 3 + i))
    assert runs.wait() == [1, 1]
    assert "would train something else: epochs: 3 in process 0, 4 there" in runs.err(0)


@pytest.mark.long
def test_an_error_of_one_process_is_the_line_of_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder should be")
    runs = Runs(tmp_path).start("--max-steps", 1)
    assert runs.wait() == [1, 1]
    for index in (0, 1):
        (line,) = runs.err(index).splitlines()
        assert "Cannot write" in line and "checkpoints" in line


class Slow:
    "A proxy that hands on every byte some milliseconds late"

    def __init__(self, port, seconds):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.seconds, self.to, self.bytes = (
            self.server.getsockname()[1],
            seconds,
            port,
            0,
        )
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            here, _ = self.server.accept()
            try:
                there = socket.create_connection(("127.0.0.1", self.to), 5)
            except OSError:
                here.close()
                continue
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, one, other):
        try:
            while data := one.recv(65536):
                time.sleep(self.seconds)
                self.bytes += len(data)
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            end.close()


@pytest.mark.long
def test_a_slow_way_to_the_coordinator_changes_nothing(tmp_path):
    (tmp_path / "one").mkdir()
    whole = Runs(tmp_path / "one", count=1)
    whole.alone("--max-steps", 2)
    port = free_port()
    proxy = Slow(port, 0.1)
    runs = Runs(tmp_path, port=port)
    runs.start("--max-steps", 2, only=[0])
    runs.coordinator = f"127.0.0.1:{proxy.port}"
    runs.start("--max-steps", 2, only=[1])
    assert runs.wait(400) == [0, 0], (runs.err(0), runs.err(1))
    assert proxy.bytes > 0
    (step, ours), (_, theirs) = checkpoint(runs.run_dir()), checkpoint(whole.run_dir())
    assert step == 2 and worst(ours, theirs) < TOLERANCE


def test_gathered_numbers_keep_their_64_bits():
    from effnet_repro.distributed import ALONE

    (same,) = ALONE.gather(np.float64([1 + 1e-12]))
    assert same[0] == 1 + 1e-12 and ALONE.add(np.int64([2**40]))[0] == 2**40
    assert ALONE.lead(lambda: 3) == 3 and ALONE.stops(1, True) and not ALONE.stops(1, False)
