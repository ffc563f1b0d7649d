"""Images made by processes: the same ones, errors that say where, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
from images import encode, record, smooth_image, write
from team_job import Numbers

from effnet_repro import data as d
from effnet_repro.data import decode, numpy_reader, rectangles, request, team

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are started on POSIX only")


@pytest.fixture
def processes(monkeypatch):
    "Readers that use two processes whatever there is to do"
    monkeypatch.setattr(team, "core_count", lambda: 2)
    monkeypatch.setattr(numpy_reader, "pays_processes", lambda images: True)


TABLE = np.arange(10_000)


def path_to_tests(monkeypatch):
    here = os.path.dirname(__file__)
    monkeypatch.setattr(team.sys, "path", [here, *team.sys.path])


def test_pieces_are_done_by_processes(monkeypatch):
    path_to_tests(monkeypatch)
    job = Numbers(TABLE)
    out = np.zeros((50, 8), TABLE.dtype)
    with team.Team(job, room=64, count=2) as crew:
        pieces = [np.arange(8 * i, 8 * i + 8) for i in range(50)]
        done = [crew.submit((piece,), team.into(row)) for piece, row in zip(pieces, out)]
        who = {one.result()[1] for one in done}
        np.testing.assert_array_equal(out, 2 * np.array(pieces))
        with pytest.raises(ValueError, match="no number -3"):
            crew.submit((np.array([-3]),), np.copy).result()
        assert crew.submit((pieces[0],), np.copy).result()[1] in who  # it goes on after an error
    assert os.getpid() not in who and 1 <= len(who) <= 2
    for one in who:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


def test_a_process_that_is_killed_is_told(monkeypatch):
    path_to_tests(monkeypatch)
    with team.Team(Numbers(TABLE), room=64, count=1) as crew:
        os.kill(crew.submit((np.arange(8),), np.copy).result()[1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended with status -9.*memory"):
            crew.submit((np.arange(8),), np.copy).result()


def runs(pid):
    "Whether a process is there, and more than an entry that nobody has fetched"
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no /proc, or it has ended just now
        return not os.path.exists("/proc")


def test_processes_end_with_their_caller():
    """Killed without a word, it leaves nobody behind."""
    here = os.path.dirname(__file__)
    code = f"""
import os, signal, sys
sys.path[:0] = [{here!r}, {os.path.dirname(here)!r}]
import numpy as np
from team_job import Numbers
from effnet_repro.data import team
crew = team.Team(Numbers(np.arange(9)), room=64, count=1)
print(crew.submit((np.arange(9),), np.copy).result()[1], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    left, end = int(done.stdout.split()[-1]), time.monotonic() + 10
    while runs(left) and time.monotonic() < end:
        time.sleep(0.02)
    assert not runs(left)


def test_images_without_room_come_another_way(monkeypatch):
    path_to_tests(monkeypatch)
    with team.Team(Numbers(TABLE), room=8, count=1) as crew:
        for n in (1, 500):
            found, _ = crew.submit((np.arange(n),), np.copy).result()
            np.testing.assert_array_equal(found, 2 * np.arange(n))


def test_a_job_travels_with_its_arrays_beside_it():
    shared = team._Shared.of(Numbers(TABLE))
    assert len(shared.pickled) < 1000 < TABLE.nbytes
    found = shared.load()
    np.testing.assert_array_equal(found.table, TABLE)
    assert not found.table.flags.writeable
    os.close(shared.file)


@pytest.mark.parametrize("random", ["train", "validation"])
def test_processes_and_threads_make_the_same_batches(sample, processes, monkeypatch, random):
    request = dict(image_size=24, global_batch_size=20, seed=3, first_update=58)
    request["preprocessing"] = random
    made = list(islice(d.numpy_batches(sample, **request), 4))  # from one epoch into the next
    monkeypatch.setattr(numpy_reader, "pays_processes", lambda images: False)
    for ours, theirs in zip(made, d.numpy_batches(sample, **request)):
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_processes_validate_the_same(sample, processes, monkeypatch):
    made = list(d.validation_arrays(sample, 24, 64, shard=(1, 2)))
    monkeypatch.setattr(numpy_reader, "pays_processes", lambda images: False)
    threads = list(d.validation_arrays(sample, 24, 64, shard=(1, 2)))
    assert len(made) == len(threads) == 3
    for ours, theirs in zip(made, threads):
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("way", ["processes", "threads"])
def test_rectangles_are_those_of_the_crops(sample, processes, monkeypatch, way):
    """Each batch is larger or smaller than the one before: pieces that come late find no room."""
    monkeypatch.setattr(rectangles, "pays_processes", lambda images: way == "processes")
    monkeypatch.setattr(rectangles, "PIECE", 3)
    order = request.batch_order(sample, 20, 3, (0, 1))
    asked = request.TrainRequest(sample, order, 24, first_update=58)
    for update, batch in zip(range(58, 64), rectangles.rectangle_batches(asked)):
        some = asked.read(update, 0, 20)
        np.testing.assert_array_equal(batch.sizes, some.crops[:, 2:])
        np.testing.assert_array_equal(batch.flips, some.flips)
        np.testing.assert_array_equal(batch.labels, some.labels)
        places = sorted((b, b + size.prod()) for b, size in zip(batch.begin, batch.sizes))
        assert [a for a, _ in places[1:]] == [b for _, b in places[:-1]]  # side by side
        for data, crop, at in zip(some.data, some.crops, batch.begin):
            top, left, height, width = crop
            whole = decode.decode_image(data, fast=True)[top : top + height, left : left + width]
            theirs = batch.pixels[at : at + height * width].reshape(height, width, 3)
            np.testing.assert_array_equal(whole, theirs)


def test_a_damaged_image_is_named_by_processes(tmp_path, processes):
    write(tmp_path, "train", [record(encode(smooth_image())), record(encode(smooth_image())[:200])])
    found = d.open_data(tmp_path, verbose=False)
    with pytest.raises(ValueError, match="can be decoded.*image 1 of the train split, at byte"):
        next(d.numpy_batches(found, 16, 2))


def test_few_images_are_left_to_threads(monkeypatch):
    monkeypatch.setattr(team, "core_count", lambda: 16)
    assert team.pays_processes(10**6) and not team.pays_processes(300)
    monkeypatch.setattr(team, "core_count", lambda: 1)
    assert not team.pays_processes(10**6)
