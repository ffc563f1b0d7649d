"""The processes that train together: what they tell each other, beside the gradients of a training step.

JAX's distributed runtime carries all of it. Small messages go through its store of keys and values, large arrays
through a collective. A process that fails says why in that store, and the others end with the same line; where one is
gone without a word, the runtime's heartbeats notice.
"""

import contextlib
import os
import pickle
import re
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from effnet_repro.distributed.addresses import offered, own_address
from effnet_repro.distributed.child import AGAIN, is_child
from effnet_repro.distributed.ranks import Ranks, count_gpus, find_ranks, own_gpus
from effnet_repro.messages import mute, say
from effnet_repro.runs.environment import quiet

#: Seconds to wait for the other processes at the start.
JOIN_SECONDS = 300
#: Seconds without a sign of life after which the runtime gives up a process. It looks at most once in that time.
HEARTBEAT_SECONDS = 10
_SHUTDOWN_SECONDS, _LINGER = 10, 2
_SMALL = 2**20  # Bytes of a message that goes through the store
_LONG = 24 * 3600 * 1000  # Milliseconds: process 0 may write or measure for long
_LOST = re.compile(r"gloo|nccl|coordination service|unhealthy|CoordinationService", re.IGNORECASE)
_FAILED = "effnet/failed"


class LostProcess(RuntimeError):
    "Another process is gone: nothing is wrong here, and the same command goes on from the last checkpoint"

    exit_status = AGAIN


class Processes:
    """The processes that train together, as one of them sees them. `ALONE` is a single one.

    - `index`, `count`: which of how many this is. The first one reads and writes for all.
    - `client`: of JAX's distributed runtime; None where there is one process.

    `lead`, `gather`, `add`, `compare`, `stops` and `close` are called by every process, in the same order.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        self.index, self.count, self._client, self._messages = index, count, client, 0
        self._done = threading.Event()
        if client is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def shard(self):
        """Return (index, count), as readers of images take it."""
        return self.index, self.count

    # ---------------------------------------------------------------- messages

    def _key(self) -> str:
        self._messages += 1
        return f"effnet/{self._messages}"

    def lead(self, work: Callable[[], Any]) -> Any:
        """Return in every process what `work` returns in the first one; what it raises there is raised everywhere.

        The result must be something that pickle takes. The others do not call `work`.
        """
        if self.count == 1:
            return work()
        key = self._key()
        if self.index:
            error, result = pickle.loads(self._receive(key))
        else:
            error, result = None, None
            try:
                result = work()
            except Exception as e:
                error = e
            self._send(key, pickle.dumps((error, result)))
        if error is not None:
            error.told = True  # in every process
            raise error
        return result

    def _send(self, key, data):
        from jax.experimental import multihost_utils

        if len(data) <= _SMALL:
            self._client.key_value_set_bytes(key, b"=" + data)
            return
        self._client.key_value_set_bytes(key, str(len(data)).encode())
        with explain_loss(self):
            multihost_utils.broadcast_one_to_all(_padded(data), True)

    def _receive(self, key) -> bytes:
        from jax.experimental import multihost_utils

        head = self._client.blocking_key_value_get_bytes(key, _LONG)
        if head[:1] == b"=":
            return head[1:]
        size = int(head)
        with explain_loss(self):
            data = multihost_utils.broadcast_one_to_all(_padded(b"", size), False)
        return data[:size].tobytes()

    def gather(self, values: np.ndarray) -> List[np.ndarray]:
        """Return the `values` of every process, which have the same shape and type everywhere."""
        if self.count == 1:
            return [values]
        from jax.experimental import multihost_utils

        values = np.ascontiguousarray(values)
        own = np.frombuffer(values.tobytes(), np.uint8)  # JAX would make 32 bits of 64
        with explain_loss(self):
            parts = multihost_utils.process_allgather(own)
        return [np.frombuffer(p.tobytes(), values.dtype).reshape(values.shape) for p in parts]

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of the `values` of all processes."""
        return np.sum(self.gather(values), 0, dtype=values.dtype)

    def compare(self, facts: Dict[str, Any]) -> None:
        """Raise ValueError in every process unless all have the same facts; it names the first that differ."""
        if self.count == 1:
            return
        key, facts = self._key(), {"host": socket.gethostname(), **facts}
        self._client.key_value_set_bytes(f"{key}/{self.index}", pickle.dumps(facts))
        every = [
            pickle.loads(self._client.blocking_key_value_get_bytes(f"{key}/{i}", _LONG))
            for i in range(self.count)
        ]
        self._client.wait_at_barrier(f"{key}/read", _LONG)  # the store ends with process 0
        for i, theirs in enumerate(every):
            other = [n for n in every[0] if n != "host" and theirs.get(n) != every[0][n]]
            if other:
                listed = "; ".join(
                    f"{n}: {every[0][n]} in process 0, {theirs.get(n)} there" for n in other[:3]
                )
                error = ValueError(
                    f"Process {i} of {self.count} ({theirs.get('host', '?')}) would train something else: "
                    f"{listed}. Give all processes the same data, versions and flags."
                )
                error.told = True
                raise error

    def stops(self, step: int, asked: bool) -> bool:
        """Return whether all processes stop after training step `step`, because one was asked to.

        A SIGTERM is noticed by the runtime itself, which then chooses a step that no process has passed. `asked` is
        another request to stop, such as Ctrl-C; it is handed on as a SIGTERM. Called after every step.
        """
        if self.count == 1:
            return asked
        import signal

        from jax.experimental import multihost_utils

        if asked and not self._done.is_set():
            self._done.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(multihost_utils.reached_preemption_sync_point(step))

    # ---------------------------------------------------------------- the end

    def fail(self, error: BaseException) -> Optional[str]:
        """Tell the others why this process ends; returns what another one had said before, or None."""
        if self.count == 1 or isinstance(error, LostProcess) or getattr(error, "told", False):
            return None
        self._done.set()
        text = f"process {self.index} of {self.count}: {' '.join(str(error).split())[:700]}"
        try:
            self._client.key_value_set(_FAILED, text)
            time.sleep(0 if self.index else _LINGER)  # the store ends with process 0
        except Exception:  # another one was first, or the runtime is gone
            return self.reason()
        return None

    def linger(self, error: BaseException) -> None:
        """Wait a moment in process 0 before it leaves with an error that all have: the runtime ends with it."""
        if self.count > 1 and self.index == 0 and getattr(error, "told", False):
            time.sleep(_LINGER)

    def reason(self, seconds: float = 2.0) -> Optional[str]:
        """Return why another process has failed, where it said so within some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                return self._client.key_value_try_get(_FAILED)
            except Exception:
                time.sleep(0.2)
        return None

    def _watch(self):
        "End this process once another one has said why it failed: a collective would wait for it"
        while not self._done.wait(0.5):
            try:
                why = self._client.key_value_try_get(_FAILED)
            except Exception:
                continue
            if not self._done.is_set():
                sys.stdout.flush()
                mute(False)
                say(f"effnet: {why}", sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def close(self):
        """Leave the runtime, once all are here."""
        if self.count == 1 or self._client is None:
            return
        import jax

        self._done.set()
        self._client = None
        jax.distributed.shutdown()


ALONE = Processes()
_JOINED: List[Processes] = []


def here() -> Processes:
    """Return the processes that this one has joined; `ALONE` before `join`."""
    return _JOINED[-1] if _JOINED else ALONE


def has_joined() -> bool:
    """Return whether `join` was called here, be it for one process."""
    return bool(_JOINED)


def _padded(data: bytes, size: Optional[int] = None) -> np.ndarray:
    "Bytes in an array of whole MiB: few sizes to compile for"
    size = len(data) if size is None else size
    array = np.zeros(-(-size // _SMALL) * _SMALL, np.uint8)
    array[: len(data)] = np.frombuffer(data, np.uint8)
    return array


@contextlib.contextmanager
def explain_loss(processes: Processes):
    """Turn what a collective says when another process is gone into a `LostProcess`."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__} {error}"
        if processes.count == 1 or isinstance(error, LostProcess) or not _LOST.search(text):
            raise
        why = processes.reason()
        if why:
            failed = RuntimeError(why)
            failed.told = True
            raise failed from None
        raise LostProcess(
            f"process {processes.index} of {processes.count} lost another one "
            f"({' '.join(str(error).split())[:160]}). The same command goes on from the last checkpoint."
        ) from None


# ---------------------------------------------------------------- the start


def _await_coordinator(ranks: Ranks, seconds: float) -> None:
    "Raise RuntimeError unless something listens at the coordinator's address within some seconds"
    host, _, port = ranks.coordinator.rpartition(":")
    until, why = time.monotonic() + seconds, None
    while time.monotonic() < until:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as e:
            why = e
            time.sleep(0.2)
    raise RuntimeError(
        f"Process {ranks.index} of {ranks.count} found nobody at the coordinator {ranks.coordinator} within "
        f"{seconds:g} s ({why}). Is process 0 started, and may this host reach that port? "
        f"What named it: {ranks.source}."
    )


def _bindable(ranks: Ranks) -> None:
    "Raise RuntimeError where process 0 cannot listen at the port"
    port = int(ranks.coordinator.rpartition(":")[2])
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("", port))
    except OSError as e:
        if e.errno == 98:
            raise RuntimeError(
                f"Port {port} of {ranks.coordinator} is in use on this host ({e.strerror}). Give another "
                "--coordinator HOST:PORT, the same for all."
            ) from None


def join(
    ranks: Ranks, seconds: float = JOIN_SECONDS, heartbeat: int = HEARTBEAT_SECONDS
) -> Processes:
    """Join the processes that `ranks` speaks of, before JAX is used, and return them.

    RuntimeError where JAX is in use already, where the coordinator does not answer within `seconds`, or where its port
    is taken. Where process 0 waits in vain for another one, JAX ends the process.
    """
    if _JOINED:
        return here()
    if not is_child():  # its parent has said so
        say(ranks.describe())
    if ranks.count == 1:
        _JOINED.append(ALONE)
        return ALONE
    import jax
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "JAX has computed in this process before it joined the others. Train first, or call "
            "effnet_repro.distributed.join at the start."
        )
    if ranks.index:
        _await_coordinator(ranks, seconds)
    else:
        _bindable(ranks)
        say(f"waiting up to {seconds:g} s for {ranks.count - 1} more at {ranks.coordinator}")
    mute(ranks.index > 0)
    jax.distributed.initialize(
        ranks.coordinator,
        ranks.count,
        ranks.index,
        own_gpus(ranks, count_gpus(os.environ)),
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    _JOINED.append(Processes(ranks.index, ranks.count, _client()))
    with quiet(1), offered(own_address(ranks, _client())):  # gloo counts its peers there
        here().gather(np.zeros(1, np.uint8))  # connects all devices while all are here
    return here()


def join_others(ranks: Optional[Ranks] = None, seconds: float = JOIN_SECONDS) -> Processes:
    """Join the processes that a launcher or variables speak of, for a training with Keras. Raises as `join` does.

    ValueError, too, where Keras does not run on JAX.
    """
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            "Several processes train with JAX only: TensorFlow's strategy for them does not work with Keras 3. Set "
            f"KERAS_BACKEND=jax, or give --backend jax. Received: {keras.backend.backend()}."
        )
    if _JOINED:
        return here()
    return join(find_ranks() if ranks is None else ranks, seconds)


@contextlib.contextmanager
def told(processes: Processes, same: Dict[str, Any]):
    """Check that all processes were asked for the `same`; within, tell the others of an error here."""
    try:
        processes.compare(same)
        yield
        processes.lead(lambda: None)  # nobody leaves before all is written
    except BaseException as error:
        why = processes.fail(error)
        if why is not None:
            failed = RuntimeError(why)
            failed.told = True
            raise failed from None
        processes.linger(error)
        raise


def _client():
    from jax._src import distributed

    return distributed.global_state.client
