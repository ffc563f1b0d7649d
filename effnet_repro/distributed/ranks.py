"""Which of several processes this one is, by a launcher, variables or flags. Checked before anything waits.

Slurm, Open MPI, the variables of Keras and those of JAX are read; flags come before all of them. What is said must be
whole and must agree with itself: half of it is a `ValueError` that names the rest, since a process that guesses would
wait for others that never come. No framework is imported here.
"""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import List, Mapping, Optional, Tuple

FLAGS = ("--coordinator", "--processes", "--process")
KERAS = tuple(f"KERAS_DISTRIBUTION_{n}" for n in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"))
JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
#: Variables of launchers that are not read: with one of them there are other processes, so this one is not alone.
UNREAD = ("PMI_RANK", "PMIX_RANK", "RANK", "JOB_COMPLETION_INDEX", "FLUX_TASK_RANK")
_PORTS = 61440  # Where ports begin that systems do not hand out by themselves. JAX counts from there, too


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and where the first one listens. Raises ValueError where that cannot be."""

    index: int = 0  # From 0
    count: int = 1
    coordinator: str = ""  # "host:port" of process 0; may be empty where `count` is 1
    source: str = "no launcher"  # What said so, for messages
    local_index: Optional[int] = None  # Among the processes of this host; None = not known
    local_count: Optional[int] = None

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"The number of a process must lie between 0 and the number of processes. Received from "
                f"{self.source}: process {self.index} of {self.count}."
            )
        if self.count > 1:
            _check_address(self.coordinator, self.source)

    def describe(self) -> str:
        """Return one line that says what was found."""
        if self.count == 1:
            return f"distributed: one process ({self.source})"
        return f"distributed: process {self.index} of {self.count}, coordinator {self.coordinator} ({self.source})"


def _check_address(address: str, source: str) -> None:
    "Refuse what is not host:port"
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"The coordinator must be host:port, with a port from 1 to 65535. Received from {source}: {address!r}."
        )


def _number(value, name: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", str(value)):
        raise ValueError(f"{name} must be a whole number from 0. Received: {value!r}.")
    return int(value)


def _whole(names, values, source) -> Optional[Tuple[str, int, int]]:
    "Coordinator, count and index of one source; None where it says nothing, ValueError where it says half"
    missing = [n for n, v in zip(names, values) if v in (None, "")]
    if len(missing) == len(names):
        return None
    if missing:
        given = [n for n in names if n not in missing]
        raise ValueError(
            f"{' and '.join(missing)} missing: {' and '.join(given)} came alone ({source}). Give all of "
            f"{', '.join(names)}, or none."
        )
    return str(values[0]), _number(values[1], names[1]), _number(values[2], names[2])


def _of_keras(env: Mapping[str, str]) -> Optional[Ranks]:
    found = _whole(KERAS, [env.get(n) for n in KERAS], "Keras' variables")
    if found is None:
        return None
    addresses, count, index = found[0].split(","), *found[1:]
    if len(addresses) not in (1, count):
        raise ValueError(
            f"{KERAS[0]} lists {len(addresses)} addresses, {KERAS[1]} says {count}. Give that of the first process, "
            "or one for each."
        )
    return Ranks(index, count, addresses[0].strip(), "Keras' variables")


def _of_jax(env: Mapping[str, str]) -> Optional[Ranks]:
    if env.get(JAX[0]) and not (env.get(JAX[1]) or env.get(JAX[2])):
        return None  # it completes what a launcher says
    found = _whole(JAX, [env.get(n) for n in JAX], "JAX's variables")
    return found and Ranks(found[2], found[1], found[0], "JAX's variables")


# ---------------------------------------------------------------- launchers


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: "gpu[07-09,12],cpu1" begins with "gpu07"."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes.strip())
    if not match:
        raise ValueError(f"SLURM_STEP_NODELIST names no host. Received: {nodes!r}.")
    return "".join(part or "" for part in match.groups())


def _tasks_here(env: Mapping[str, str]) -> Optional[int]:
    "Tasks of a Slurm step on this node: entry SLURM_NODEID of a list such as 4(x2),1"
    spread, node = env.get("SLURM_STEP_TASKS_PER_NODE"), env.get("SLURM_NODEID")
    if not spread or node is None:
        return None
    each: List[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", spread):
        each += [int(tasks)] * int(times or 1)
    return each[int(node)] if int(node) < len(each) else None


def _of_slurm(env: Mapping[str, str], coordinator: Optional[str]) -> Optional[Ranks]:
    if not (env.get("SLURM_JOB_ID") or env.get("SLURM_PROCID")):
        return None
    count = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")
    parts = {"SLURM_JOB_ID": env.get("SLURM_JOB_ID"), "SLURM_PROCID": env.get("SLURM_PROCID")}
    parts.update(SLURM_NTASKS=count, SLURM_STEP_NODELIST=env.get("SLURM_STEP_NODELIST"))
    missing = [name for name, value in parts.items() if not value]
    if missing:
        raise ValueError(
            f"This is inside a Slurm job, but no task of a step: {' and '.join(missing)} missing. Start every "
            "process with srun (deploy/slurm/train.sbatch), or leave out --distributed."
        )
    job = _number(parts["SLURM_JOB_ID"], "SLURM_JOB_ID")
    port = _PORTS + job % 4096
    address = coordinator or f"{first_host(parts['SLURM_STEP_NODELIST'])}:{port}"
    local = env.get("SLURM_LOCALID")
    return Ranks(
        _number(parts["SLURM_PROCID"], "SLURM_PROCID"),
        _number(count, "SLURM_NTASKS"),
        address,
        "Slurm",
        None if local is None else _number(local, "SLURM_LOCALID"),
        _tasks_here(env),
    )


def _of_openmpi(env: Mapping[str, str], coordinator: Optional[str]) -> Optional[Ranks]:
    names = [f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    values = [env.get(n) for n in names]
    if not any(values):
        return None
    missing = [n for n, v in zip(names, values) if not v]
    if missing:
        raise ValueError(f"Open MPI's variables are not whole: {' and '.join(missing)} missing.")
    index, count, local_index, local_count = (_number(v, n) for n, v in zip(names, values))
    address = coordinator or (_openmpi_address(env, count == local_count) if count > 1 else "")
    return Ranks(index, count, address, "Open MPI", local_index, local_count)


def _openmpi_address(env, one_host: bool) -> str:
    "Where process 0 of an mpirun listens: the host that version 4 names, or this one"
    uri = re.match(r"(\d+)\.\d+;tcp://([\d.]+)", env.get("OMPI_MCA_orte_hnp_uri", "").strip('"'))
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    port = _PORTS + zlib.crc32((uri.group(1) if uri else job).encode()) % 4096
    if one_host:
        return f"127.0.0.1:{port}"
    if uri is None:
        raise ValueError(
            "mpirun started processes on several hosts and does not say which is the first. "
            "Name it: --coordinator HOST:PORT, the same for all."
        )
    return f"{uri.group(2)}:{port}"


# ---------------------------------------------------------------- all of them


def find_ranks(
    environ: Optional[Mapping[str, str]] = None,  # None = this process's variables
    coordinator: Optional[
        str
    ] = None,  # What the flags say; a coordinator alone completes a launcher
    processes: Optional[int] = None,
    process: Optional[int] = None,
) -> Ranks:
    """Return which process this is. ValueError where flags or variables are wrong, or say only half.

    The order is flags, Keras' variables, JAX's, Open MPI, Slurm. Where nothing speaks of other processes, this one is
    alone.
    """
    env = os.environ if environ is None else environ
    if processes is not None or process is not None:
        values = [coordinator or ("" if processes == 1 else None), processes, process]
        if processes == 1 and process in (0, None):
            return Ranks(source="flags")
        address, count, index = _whole(FLAGS, values, "flags")
        return Ranks(index, count, address, "flags")
    explicit = _of_keras(env) or _of_jax(env)
    if explicit is not None:
        return explicit
    given = coordinator or env.get(JAX[0])
    found = _of_openmpi(env, given) or _of_slurm(env, given)
    if found is not None:
        return found
    unread = [name for name in UNREAD if env.get(name)]
    if unread or given:
        what = (
            f"a launcher that is not read ({unread[0]})" if unread else f"a coordinator ({given})"
        )
        raise ValueError(
            f"There is {what}, but nothing says which process this is. Give --coordinator HOST:PORT "
            "--processes COUNT --process NUMBER."
        )
    return Ranks()


# ---------------------------------------------------------------- GPUs of a host


def count_gpus(environ: Mapping[str, str], folder: Path = Path("/dev")) -> int:
    """Return how many NVIDIA GPUs this process sees, without waking them."""
    seen = environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        return len([one for one in seen.split(",") if one.strip() not in ("", "-1")])
    return len([p for p in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])


def own_gpus(ranks: Ranks, gpus: int) -> Optional[List[int]]:
    """Return which of the `gpus` that it sees a process takes; None = all.

    A process that is alone on its host takes all, and so does one that sees a single GPU: then the launcher gave it.
    Otherwise the processes of a host share its GPUs in equal parts. ValueError where they cannot.
    """
    there = ranks.local_count
    if ranks.local_index is None or there in (None, 1) or gpus <= 1:
        return None
    if gpus % there:
        raise ValueError(
            f"{there} processes on this host cannot share {gpus} GPUs evenly. Start one a GPU, or one a host."
        )
    each = gpus // there
    return list(range(ranks.local_index * each, (ranks.local_index + 1) * each))
