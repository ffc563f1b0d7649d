"""The loop of every run, driven by a runtime of NumPy: cut anywhere, it leaves what it would have left."""

import csv
import json
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_recorder import Killed, left
from tiny import TINY

from effnet_repro import checkpoint
from effnet_repro.config import for_one_device, override
from effnet_repro.runs import Options, Runtime, Scores, StopSignals, Task, execute, watch

CASE = override(for_one_device(TINY, 4, 4), epochs=4)
DATA = SimpleNamespace(
    root="/data/toys",
    format="folder",
    builtin=False,
    train_count=12,
    validation_count=6,
    num_classes=2,
    class_names=("a", "b"),
    fingerprint="0123",
    damaged=(),
    decoder="auto",
    validation_split=None,
    split_fingerprint=lambda split: "4567",
)


class Toy(Runtime):
    """Gradient descent on one array, in loops of `each` steps; a step's values are a promise that may be late.

    `at` is called with the name of every event, and may raise.
    """

    backend, precision = "numpy", "float64"

    def __init__(self, each=1, ahead=1, at=lambda event: None):
        self.each, self.ahead, self.at, self.given, self.closed = each, ahead, at, [], 0

    def begin(self, data, step, arrays):
        self.step, self.classes = step, data.num_classes
        self.w, self.slot = np.zeros(5, "float32"), np.ones(5, "float32")
        if arrays is not None:
            self.w = arrays["all/w"].copy()
            assert step or set(arrays) == {"all/w"}
        if step:
            assert set(arrays) == {"all/w", "slots/momentum/all/w"}  # the average stays outside
            self.slot = arrays["slots/momentum/all/w"].copy()

    def advance(self, n):
        k = min(n, self.each)
        values = []
        for _ in range(k):
            self.step += 1
            self.at(f"step {self.step}")
            draw = np.random.default_rng(self.step).normal(size=5).astype("float32")
            self.slot = np.float32(0.9) * self.slot + draw
            self.w = self.w - np.float32(0.1) * self.slot
            values.append([float(np.square(self.w).sum()), 1 / self.step])
        self.given.append(Late(values, self))
        return self.given[-1]

    def state(self):
        assert all(late.was_read for late in self.given), "saved before all was read"
        return {"all/w": self.w.copy(), "slots/momentum/all/w": self.slot.copy()}

    def scores(self, arrays=None, between=lambda: None):
        self.at(f"validate {self.step}")
        between()
        w = self.w if arrays is None else arrays["all/w"]
        top1 = float(np.abs(w).sum() % 1)
        return Scores(top1, 1.0, 0.5, 6, 32, 1.0, np.eye(self.classes))

    def close(self):
        self.closed += 1


class Late:
    "What some steps say; it remembers when it was read."

    def __init__(self, values, toy):
        self.values, self.toy, self.number, self.was_read = values, toy, len(toy.given), False

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        newer = len(self.toy.given) - 1 - self.number
        self.was_read = True
        self.toy.at(f"read {self.number} {newer} behind")
        return np.array(self.values, dtype)


def train(run_dir, toy=None, case=CASE, data=DATA, weights=None, **options):
    task = Task(case, data, run_dir, weights, Options(**{"progress": False, **options}))
    return execute(task, toy or Toy())


def once(event, act):
    "A function that acts the first time that `event` comes."
    waiting = [event]

    def look(now):
        if waiting == [now]:
            waiting.clear()
            act()

    return look


def kill():
    raise Killed


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    "TensorBoard would start TensorFlow."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "save_curves", lambda run_dir: None)
        patch.setattr(watch.Events, "write", lambda self, row: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = train(folder)
    assert run.finished and run.update == 12 and set(run.scores) == {"last", "average"}
    return folder


def validated(run_dir):
    with (run_dir / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- cut and gone on with


@pytest.mark.parametrize("act", [ask, kill])
@pytest.mark.parametrize("step", range(1, 13))
def test_cut_in_any_step(whole, tmp_path, act, step):
    toy = Toy(at=once(f"step {step}", act))
    if act is ask:
        run = train(tmp_path, toy)
        assert (run.finished, run.update, run.scores) == (False, step, {})
        assert checkpoint.read_metadata(run.checkpoint)["update"] == step
    else:
        with pytest.raises(Killed):
            train(tmp_path, toy)
    assert toy.closed == 1
    assert train(tmp_path).finished
    assert left(tmp_path) == left(whole) and validated(tmp_path) == validated(whole)


@pytest.mark.parametrize("act", [ask, kill])
@pytest.mark.parametrize("step", [3, 12])
def test_cut_in_a_validation(whole, tmp_path, act, step):
    "The epoch has its checkpoint and its row; what was not measured is measured when the run goes on."
    try:
        assert not train(tmp_path, Toy(at=once(f"validate {step}", act))).finished
    except Killed:
        pass
    assert checkpoint.read_metadata(checkpoint.latest(tmp_path / "checkpoints"))["update"] == step
    measured = []
    assert train(tmp_path, Toy(at=measured.append)).finished
    assert f"validate {step}" in measured
    assert left(tmp_path) == left(whole) and validated(tmp_path) == validated(whole)


def test_a_stop_before_the_first_step_does_none(whole, tmp_path):
    class Slow(Toy):
        def begin(self, data, step, arrays):
            super().begin(data, step, arrays)
            ask()

    assert train(tmp_path, Slow()).update == 0
    assert not (tmp_path / "checkpoints").exists()
    train(tmp_path)
    assert left(tmp_path) == left(whole)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("each", [1, 2, 3, 104])
def test_loops_on_the_device_leave_the_same(whole, tmp_path, each, ahead):
    "A loop ends with the epoch; a stop waits for its end."
    run = train(tmp_path, Toy(each, ahead, once("step 4", ask)))
    assert run.update == 3 + min(each, 3)
    train(tmp_path, Toy(each, ahead))
    assert left(tmp_path) == left(whole)


def test_the_device_has_its_next_step_before_a_loss_is_read(tmp_path):
    "The result of a step is read one step later, and within an epoch at no other time."
    events = []
    train(tmp_path, Toy(at=events.append), validate_every=None)
    read = [e for e in events if e.startswith("read")]
    assert read == [f"read {i} {0 if i % 3 == 2 else 1} behind" for i in range(12)]
    assert events.index("step 2") < events.index("read 0 1 behind") < events.index("step 3")


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    class Broken(Toy):
        def advance(self, n):
            values = super().advance(n)
            values.values = [[np.nan, 0] if self.step >= 5 else v for v in values.values]
            return values

    toy = Broken()
    with pytest.raises(FloatingPointError, match="The loss of step 5 is nan.*epoch-0001"):
        train(tmp_path, toy)
    assert toy.closed == 1
    assert [p.stem for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["epoch-0001"]


# ---------------------------------------------------------------- what is refused, and what is said


def test_another_run_is_refused_before_anything_is_built(whole, tmp_path):
    class Never(Toy):
        def begin(self, *args):
            raise AssertionError

    with pytest.raises(ValueError, match="seed 0. Received: seed=1"):
        train(whole, Never(), seed=1)
    with pytest.raises(ValueError, match="image_size: 32 there, 64 here"):
        train(whole, Never(), override(CASE, image_size=64))
    few = SimpleNamespace(**{**vars(DATA), "train_count": 3})
    with pytest.raises(ValueError, match="global_batch_size=4 exceeds the 3 training images"):
        train(tmp_path / "few", Never(), data=few)
    assert not (tmp_path / "few").exists()


def test_arrays_that_do_not_fit_name_their_file(whole, tmp_path):
    class Picky(Toy):
        def begin(self, data, step, arrays):
            raise ValueError("the slot momentum of w is missing.")

    with pytest.raises(ValueError, match="epoch-0004.safetensors does not fit: the slot .* Go on"):
        train(whole, Picky())
    with pytest.raises(ValueError, match="^the slot momentum of w is missing.$"):
        train(tmp_path, Picky())  # fresh: there is no file to name


@pytest.mark.parametrize(
    "name, value", [("seed", -1), ("keep", 0), ("validate_every", True), ("seed", 1.5)]
)
def test_odd_options(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number from"):
        Options(**{name: value})


def test_given_weights_begin_a_run_and_a_finished_run_stays(tmp_path):
    w = np.full(5, 7, "float32")
    run = train(tmp_path, weights={"all/w": w}, case=replace(CASE, max_steps=1))
    first = np.random.default_rng(1).normal(size=5).astype("float32")
    want = w - np.float32(0.1) * (np.float32(0.9) * np.ones(5, "float32") + first)
    np.testing.assert_array_equal(checkpoint.load(run.checkpoint)[0]["all/w"], want)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["backend"], config["precision"], config["seed"]) == ("numpy", "float64", 0)
    before = run.checkpoint.read_bytes()
    again = train(tmp_path, case=replace(CASE, max_steps=1))
    assert again.finished and run.checkpoint.read_bytes() == before


def test_a_set_without_validation_images_trains(tmp_path, capsys):
    data = SimpleNamespace(**{**vars(DATA), "validation_count": 0})
    run = train(tmp_path, data=data)
    assert run.finished and run.scores == {} and not (tmp_path / "validation.csv").exists()
    assert capsys.readouterr().out.count("no validation images in /data/toys") == 1


def test_epochs_are_shown(tmp_path, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(watch.Events, "write", lambda self, row: rows.append(dict(row)))
    train(tmp_path, progress=True)
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()[:4]] == [
        f"epoch {i}/4" for i in (1, 2, 3, 4)
    ]
    assert "12/12" in said.err.split("\r")[-1] and "loss=" in said.err
    assert [r["update"] for r in rows] == [3, 6, 9, 12] and "validation_top1" in rows[0]


def test_what_training_shows_is_written_down(tmp_path):
    class Finder(Toy):
        environment = lambda self: {"device": "toy"}
        findings = lambda self: {"fast": self.step > 5} if self.step > 3 else {}

    told = lambda: json.loads((tmp_path / "environment.json").read_text())
    train(tmp_path, Finder(), override(CASE, max_steps=3))
    assert told() == {"device": "toy"}
    (tmp_path / "environment.json").unlink()
    train(tmp_path, Finder(), override(CASE, max_steps=9))
    assert told() == {"device": "toy", "fast": True}


def test_no_bar_where_tqdm_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert train(tmp_path, progress=True).finished
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- several processes


class Part(Toy):
    "One of several processes, which sees its own losses."

    def __init__(self, index, together, at=lambda event: None):
        super().__init__(at=at)
        self.process, self.together = (index, together.count), together

    def advance(self, n):
        late = super().advance(n)
        late.values = [
            list(np.random.default_rng([self.step, self.process[0]]).random(2)) for _ in late.values
        ]
        return late

    def gather(self, values):
        return self.together.gather(self.process[0], values)

    def environment(self):
        assert self.process[0] == 0, "only the first process writes"
        return {}


class Together:
    "Threads that meet, each with what it says."

    def __init__(self, count):
        self.count, self.meeting, self.said = count, threading.Barrier(count, timeout=60), {}

    def gather(self, index, values):
        self.said[index] = np.array(values)
        self.meeting.wait()
        found = [self.said[i] for i in range(self.count)]
        self.meeting.wait()
        return found


def in_threads(run_dir, monkeypatch, count=2, at=None, case=CASE):
    "Train in threads that stand for processes; `at`: what the second one does at an event."
    together, runs, failed = Together(count), {}, []
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: self)  # threads get no signals
    monkeypatch.setattr(StopSignals, "__exit__", lambda self, *error: None)  # and give none back

    def process(index):
        try:
            look = at if at and index == count - 1 else lambda event: None
            runs[index] = train(run_dir, Part(index, together, look), case, validate_every=None)
        except BaseException as e:
            failed.append(e)
            together.meeting.abort()

    threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return [runs[i] for i in range(count)]


def test_a_row_has_the_mean_over_all_processes(tmp_path, monkeypatch):
    runs = in_threads(tmp_path, monkeypatch)
    assert all(run.finished and run.update == 12 for run in runs)
    losses = [[np.random.default_rng([s, i]).random(2)[0] for i in (0, 1)] for s in (4, 5, 6)]
    assert float(left(tmp_path)[0][1]["loss"]) == round(np.mean(losses), 6)


@pytest.mark.parametrize("step, until", [(2, 3), (4, 4), (5, 6)])
def test_all_processes_stop_after_the_same_step(tmp_path, monkeypatch, step, until):
    "The second process is asked; they agree after every fourth step here, and at the ends of epochs."
    from effnet_repro.runs import loop

    in_threads(tmp_path / "whole", monkeypatch)
    monkeypatch.setattr(loop, "AGREE_EVERY", 4)
    asked = {}
    monkeypatch.setattr(
        StopSignals,
        "stop_requested",
        property(lambda self: asked.get(threading.get_ident(), False), lambda self, value: None),
        raising=False,
    )
    look = once(f"step {step}", lambda: asked.update({threading.get_ident(): True}))
    runs = in_threads(tmp_path / "cut", monkeypatch, at=look)
    assert [(run.finished, run.update) for run in runs] == [(False, until)] * 2
    asked.clear()
    in_threads(tmp_path / "cut", monkeypatch)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_the_next_batch_is_made_while_a_step_is_started(monkeypatch):
    from effnet_repro.training import steps

    monkeypatch.setattr(steps, "_placement", lambda: lambda batch: batch)
    made, begun = threading.Event(), threading.Event()

    def stream():
        yield 0
        assert begun.wait(20)  # the step of batch 0 is being started
        made.set()
        yield 1
        raise OSError("the disk is gone")

    def train_function(state, batches):
        begun.set()
        assert made.wait(20)
        loss = SimpleNamespace(value=next(batches), copy_to_host_async=lambda: None)
        return {"loss": loss}, state

    none = dict.fromkeys(
        ["trainable_variables", "non_trainable_variables", "metrics_variables"], ()
    )
    model = SimpleNamespace(train_function=train_function, make_train_function=lambda: None, **none)
    model.optimizer = SimpleNamespace(variables=())
    running = steps.JaxSteps(model, stream())
    assert running.do()["loss"].value == 0
    assert running.do()["loss"].value == 1  # what follows is broken, this is not
    with pytest.raises(OSError, match="the disk is gone"):
        running.do()
    running.close()
