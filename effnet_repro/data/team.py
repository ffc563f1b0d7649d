"""Threads or processes that make images: a job is split into pieces, and each piece is written into its batch.

Threads share one interpreter lock. Decoding releases it, but the dozens of small steps around it do not, so that
sixteen threads made 835 images a second where sixteen cores decode 6,700. Processes do not share the lock. They are
started as programs of their own (no fork, which libraries with threads do not survive; no import of the user's
script), get the job once, and hand images over in memory that both sides map.
"""

import contextlib
import mmap
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from effnet_repro.data.threads import core_count

# A job takes whatever a piece consists of and returns its images (n, ...) and any other result that is small. A list of
# images (H, W, 3) stands for their pixels (P, 3), one image behind the other: nobody has to put them together first.
Job = Callable[..., Tuple[Union[np.ndarray, List[np.ndarray]], Any]]

FEW_CORES = 2  # With fewer, processes gain nothing over threads
FEW_IMAGES = 2048  # With fewer to make, threads are done before processes have started

# The heap keeps what a piece frees: otherwise each large array begins as pages that the system must clear.
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_START = "import sys; sys.path[:] = {!r}; from effnet_repro.data.team import serve; serve()"


def into(array: np.ndarray) -> Callable[[np.ndarray], None]:
    """Return what writes the images of a piece into `array`: for `Team.submit`."""

    def write(images):
        array[...] = images

    return write


def pays_processes(images: int) -> bool:
    """Return whether this many images are worth processes, on a machine that can start them as needed here."""
    able = os.name == "posix" and bool(sys.executable)
    return able and images >= FEW_IMAGES and core_count() >= FEW_CORES


class Team:
    """Runs pieces of one job on all cores; use it in a `with` statement.

    `room` is how many bytes of images a piece mostly has (more go another, slower way); None means threads. What a
    job raises in a process is raised here, too. Raises `RuntimeError` when a process has been ended from outside.
    """

    def __init__(self, job: Job, room: Optional[int] = None, count: Optional[int] = None):
        spare = 0 if room is None else core_count() // 8  # some processes wait for this one
        count = count or core_count() + spare
        self._job, self._pool = job, ThreadPoolExecutor(count)
        self._idle, self._processes, self._shared = queue.SimpleQueue(), [], None
        if room is not None:
            try:
                self._start(room, count)
            except BaseException:
                self.close()
                raise

    def _start(self, room, count):
        self._shared = _Shared.of(self._job)
        for _ in range(count):
            self._processes.append(_Process(self._shared, room))
            self._idle.put(self._processes[-1])

    def submit(self, piece: Sequence, out: Callable[[np.ndarray], Any]) -> Future:
        """Begin a piece: `out` takes its images, in one of the threads here, and must not keep them.

        The future gives what `out` returned and the job's other result.
        """
        return self._pool.submit(self._do, piece, out)

    def _do(self, piece, out):
        if not self._processes:
            images, rest = self._job(*piece)
            return out(_whole(images)), rest
        process = self._idle.get()
        try:
            return process.do(piece, out)
        finally:
            self._idle.put(process)

    def close(self):
        """End the threads and processes; pieces that have not begun are dropped."""
        if sys.version_info >= (3, 9):
            self._pool.shutdown(cancel_futures=True)
        else:
            self._pool.shutdown()
        for process in self._processes:
            process.close()
        if self._shared:
            os.close(self._shared.file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------- memory that processes share


def _shared_file(size):
    "The descriptor of an unnamed file of `size` bytes, in memory where the system can"
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("effnet_repro")
    else:
        file, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(file, max(size, 1))
    return file


class _Shared:
    "A pickled job whose arrays lie in a shared file: they exist once, however many processes there are"

    def __init__(self, file: int, pickled: bytes, places: Sequence[Tuple[int, int]]):
        self.file, self.pickled, self.places = file, pickled, places

    @classmethod
    def of(cls, job):
        arrays = []
        pickled = pickle.dumps(job, protocol=5, buffer_callback=arrays.append)
        views, places, end = [array.raw() for array in arrays], [], 0
        for view in views:
            places.append((end, view.nbytes))
            end = -(-(end + view.nbytes) // 64) * 64
        file = _shared_file(end)
        with mmap.mmap(file, max(end, 1)) as memory:
            for view, (begin, size) in zip(views, places):
                memory[begin : begin + size] = view
        return cls(file, pickled, places)

    def load(self):
        memory = memoryview(mmap.mmap(self.file, 0, access=mmap.ACCESS_READ))
        return pickle.loads(self.pickled, buffers=[memory[a : a + n] for a, n in self.places])


# ---------------------------------------------------------------- this side and the other side


class _Place(NamedTuple):
    "What lies in the memory of a process"

    shape: tuple
    kind: str


class _Process:
    "A process that serves one piece at a time"

    def __init__(self, shared, room):
        file = _shared_file(room)
        self._memory = mmap.mmap(file, max(room, 1))
        environment = {**os.environ, **_HEAP, **dict.fromkeys(_ONE_THREAD, "1")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(shared.file, file),
            env=environment,
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        self._send((shared.file, shared.pickled, shared.places, file, room))
        os.close(file)

    def _send(self, message):
        pickle.dump(message, self._process.stdin, protocol=5)
        self._process.stdin.flush()

    def do(self, piece, out):
        try:
            self._send(piece)
            images, rest, error = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self._process.wait()
            raise RuntimeError(
                f"A process that makes images ended with status {status}. Status -9 mostly means that the "
                "memory did not suffice: use fewer cores (taskset), or a smaller image_size."
            ) from None
        if error is not None:
            raise error
        if isinstance(images, _Place):
            size = int(np.prod(images.shape))
            images = np.frombuffer(self._memory, images.kind, size).reshape(images.shape)
        return out(images), rest

    def close(self):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve():
    """Do pieces of one job, one after the other, until the caller closes its end: what a process runs."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    with contextlib.suppress(EOFError, BrokenPipeError):  # the caller is gone
        *shared, file, room = pickle.load(requests)
        job, memory = _Shared(*shared).load(), mmap.mmap(file, max(room, 1))
        while True:
            pickle.dump(_attempt(job, pickle.load(requests), memory), replies, protocol=5)
            replies.flush()


def _whole(images):
    "What a job returned as one array"
    if not isinstance(images, list):
        return images
    return np.concatenate([one.reshape(-1, 3) for one in images])


def _attempt(job, piece, memory):
    "Write the images of a piece to the shared memory, if they have room there; the rest, or what was raised"
    try:
        images, rest = job(*piece)
        some = images if isinstance(images, list) else [images]
        size, kind = sum(one.size for one in some), some[0].dtype
        if size * kind.itemsize > len(memory):
            return _whole(images), rest, None
        target, at = np.frombuffer(memory, kind, size), 0
        for one in some:
            target[at : at + one.size].reshape(one.shape)[...] = one
            at += one.size
        shape = images.shape if some[0] is images else (size // 3, 3)
        return _Place(shape, kind.str), rest, None
    except Exception as error:
        return None, None, error
