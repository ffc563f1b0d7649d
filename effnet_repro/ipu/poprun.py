"""Several processes started by `poprun`, each with its share of the replicas: the line, the counts, the exchange."""

from typing import Dict, Optional

import numpy as np

from effnet_repro.config import Case, unknown_name
from effnet_repro.ipu.layout import for_ipus, ipus_per_replica
from effnet_repro.ipu.sdk import Graphcore, host_collectives


def count_ipus(
    graphcore: Graphcore,  # The SDK
    per_replica: int,  # IPUs that a replica needs
    ipus: Optional[int] = None,  # What the caller says; None = poprun's, or 16
) -> int:  # IPUs over all processes
    """Return how many IPUs a program has. Raises ValueError where poprun was started for another number a replica."""
    if graphcore.popdist is None:
        return ipus or 16
    given = graphcore.popdist.getNumIpusPerReplica()
    if given != per_replica:
        raise ValueError(
            f"poprun was started with --ipus-per-replica {given}, but this program needs {per_replica}. "
            "Print the right line with --print-poprun."
        )
    return graphcore.popdist.getNumTotalReplicas() * per_replica


def poprun_command(
    case: Case,  # In its layout
    command: str = "train",  # or "validate" or "finetune"
    arguments: str = "",  # What follows the command, e.g. "--data-dir /data/imagenet"
    ipus: int = 16,  # IPUs over all processes
    instances: Optional[int] = None,  # Processes; None = a replica each, at most 8
    source=None,  # Run folder or checkpoint to validate or fine-tune; None = runs/<name of the case>
) -> str:
    """Return the poprun line that runs a `case`: one process feeds sixteen IPUs too slowly.

    A training keeps its replicas; validation and fine-tuning take single IPUs. Raises ValueError for an unknown
    command, and where the processes do not divide the replicas.
    """
    if command not in ("train", "validate", "finetune"):
        raise unknown_name("command", command, ("train", "validate", "finetune"))
    each = ipus_per_replica(case.num_stages) if command == "train" else 1
    replicas = for_ipus(case, ipus).num_replicas if command == "train" else ipus
    instances = instances or max(n for n in range(1, min(8, replicas) + 1) if replicas % n == 0)
    if replicas % instances:
        raise ValueError(
            f"The processes must divide the replicas. Received: {instances} instances, {replicas} replicas."
        )
    first = f"{case.name} --no-validation" if command == "train" else source or f"runs/{case.name}"
    first = f"{first} --no-validation" if command == "finetune" else first
    flags = [
        'poprun --mpi-global-args="--allow-run-as-root --tag-output" --numa-aware 1',
        f"--num-replicas {replicas} --num-instances {instances} --ipus-per-replica {each}",
        "--only-output-from-instance 0",
        f"effnet-{command} {first} --device ipu {arguments}".rstrip(),
    ]
    return " \\\n    ".join(flags)


def broadcast(
    graphcore: Graphcore,  # The SDK
    arrays: Dict[str, np.ndarray],  # The same names and shapes in every process
    root: int = 0,  # The process whose values all get
) -> Dict[str, np.ndarray]:
    """Return the arrays of process `root`, in every process; all call it at the same time.

    Host collectives moved between SDKs, so two that every build has are enough here: this, and `gather` made of it.
    """
    if graphcore.popdist is None:
        return arrays
    found = {}
    for name in sorted(arrays):  # one at a time: all processes meet in the same order
        value = np.asarray(arrays[name])
        session, hole, shared = _broadcast_of(graphcore, value.dtype, value.shape, root)
        found[name] = session.run(shared, {hole: value})
    return found


def _broadcast_of(graphcore, dtype, shape, root):
    "A session, its placeholder and its result: made once for each type, shape and root"
    key, made = (str(dtype), shape, root), graphcore.shared
    if not made:
        graph = graphcore.tf.Graph()
        made["session"] = graphcore.v1.Session(graph=graph)
        made["module"] = host_collectives(graphcore)
    if key not in made:
        with made["session"].graph.as_default():
            hole = graphcore.v1.placeholder(dtype, shape)
            made[key] = hole, made["module"].broadcast(hole, root_rank=root)
    return (made["session"], *made[key])


def gather(
    graphcore: Graphcore,  # The SDK
    arrays,  # Arrays of the same shapes in every process
) -> list:  # One list of arrays a process
    """Return the arrays of every process, in every process; all call it at the same time."""
    named = {str(i): v for i, v in enumerate(arrays)}
    every = (broadcast(graphcore, named, i) for i in range(graphcore.instances[1]))
    return [[found[n] for n in named] for found in every]
