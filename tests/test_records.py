"""Signals that ask a run to stop, and the rows of validation.csv."""

import csv
import errno
import fcntl
import os
import signal
from types import SimpleNamespace

import pytest
from test_recorder import COURSE, FACTS, scores

from effnet_repro import checkpoint
from effnet_repro.runs import Stopped, StopSignals, tables, watch, write_scores
from effnet_repro.runs.recorder import Recorder

# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            stop.check()
    assert signal.getsignal(number) is before


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_does_not_stop_the_stop(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    monkeypatch.setattr("sys.stderr", Gone())
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.stop_requested


# ---------------------------------------------------------------- validation.csv

PLACE = {"data": "/data/a", "data_fingerprint": "0123"}


def records(run_dir):
    with (run_dir / "validation.csv").open(newline="") as file:
        return [
            (r["weights"], r["update"], r["data"], r["data_fingerprint"])
            for r in csv.DictReader(file)
        ]


def test_an_older_validation_does_not_replace_a_newer_one(tmp_path, capsys):
    assert write_scores(tmp_path, "last", scores(18), 18, PLACE)
    assert not write_scores(tmp_path, "last", scores(15), 15, PLACE)
    assert "the row of step 18 stays; this was 15" in capsys.readouterr().out
    assert write_scores(tmp_path, "average", scores(15), 15, PLACE)
    assert write_scores(tmp_path, "last", scores(21), 21, PLACE)
    assert write_scores(tmp_path, "last", scores(6), 6, PLACE, in_any_case=True)  # it began anew
    assert [(r[0], r[1]) for r in records(tmp_path)] == [("average", "15"), ("last", "6")]


def test_rows_of_several_sets_stand_side_by_side(tmp_path):
    other = {**PLACE, "data": "/data/b"}
    for place in (PLACE, other, {**PLACE, "data_fingerprint": "4567"}):
        write_scores(tmp_path, "last", scores(3), 3, place)
    assert records(tmp_path) == [
        ("last", "3", "/data/b", "0123"),
        ("last", "3", "/data/a", "4567"),  # in place of what was measured before it changed
    ]


def test_a_row_by_another_name_gives_way_when_the_images_changed(tmp_path):
    write_scores(tmp_path, "last", scores(3), 3, PLACE)
    write_scores(tmp_path, "epoch-0001", scores(3), 3, PLACE)
    assert len(records(tmp_path)) == 2
    write_scores(tmp_path, "epoch-0001", scores(4), 3, {**PLACE, "data_fingerprint": "4567"})
    assert [r[0] for r in records(tmp_path)] == ["epoch-0001"]


def test_an_old_file_without_the_new_columns_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = "weights,top1,top5,loss,pictures,image_size,update,data\nlast,0.5,0.6,1,8,32,3,images\n"
    (tmp_path / "validation.csv").write_text(old + "last,0.5,0.6,1,8,64,3,images\n")
    place = {**PLACE, "data": str(tmp_path / "images")}
    write_scores(tmp_path, "last", scores(3), 3, place)
    with (tmp_path / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["image_size"], r["data_fingerprint"]) for r in rows] == [("64", ""), ("32", "0123")]


@pytest.mark.parametrize("content", [b"", bytes(range(256)), b"weights,top1\nlast,0.5,7\nlas"])
def test_a_damaged_validation_file_does_not_end_a_run(tmp_path, capsys, content):
    (tmp_path / "validation.csv").write_bytes(content)
    write_scores(tmp_path, "last", scores(3), 3, PLACE)
    assert "written anew: " in capsys.readouterr().out
    assert records(tmp_path) == [("last", "3", "/data/a", "0123")]


def test_a_disk_that_does_not_give_the_table_costs_no_row(tmp_path, monkeypatch):
    write_scores(tmp_path, "last", scores(3), 3, PLACE)
    before = (tmp_path / "validation.csv").read_bytes()

    def fail(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(tables, "read_file", fail)
        with pytest.raises(OSError, match="Cannot read .*validation.csv: Too many open files"):
            write_scores(tmp_path, "average", scores(3), 3, PLACE)
    assert (tmp_path / "validation.csv").read_bytes() == before
    write_scores(tmp_path, "average", scores(3), 3, PLACE)
    assert [r[0] for r in records(tmp_path)] == ["last", "average"]


def test_a_run_that_begins_leaves_a_validation_its_half_written_file(tmp_path, monkeypatch):
    "A validation of the same folder holds the folder's lock while it writes its row."
    held = []

    def remove(folder):
        here = os.open(str(tmp_path), os.O_RDONLY)
        try:
            fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append("nobody")
        except BlockingIOError:
            held.append(os.path.basename(folder))
        os.close(here)

    monkeypatch.setattr(checkpoint, "remove_leftovers", remove)
    Recorder(tmp_path, COURSE, FACTS).find()
    assert held == [tmp_path.name, "nobody"]  # the folder of checkpoints is the run's own


def test_a_figure_takes_at_most_a_twentieth_of_a_run(tmp_path, monkeypatch):
    "Drawing takes 0.5 s here, an epoch 1 s: the figure is drawn at once, every 10 s, and at the end"
    clock, drawn = [100.0], []

    def draw(run_dir):
        drawn.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(watch, "save_curves", draw)
    monkeypatch.setattr(watch, "describe_epoch", lambda *_: "epoch")
    monkeypatch.setattr(watch.Events, "write", lambda *_: None)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    shown = watch.Watch(tmp_path)
    for _ in range(25):
        clock[0] += 1
        shown.show_epoch(SimpleNamespace(course=None, newest=None), {})
    assert drawn == [101.0, 111.5, 122.0]
    shown.close()
    assert drawn[3:] == [clock[0] - 0.5]
    shown.close()
    assert len(drawn) == 4
