"""`--distributed`: the same command in several processes, each started by a parent that tells how it ended."""

import importlib.util
import os
import sys
from dataclasses import replace

from effnet_repro.cli.kit import UsageError, whole_number
from effnet_repro.distributed import (
    JOIN_SECONDS,
    find_ranks,
    here,
    is_child,
    join_others,
    supervise,
    watch_parent,
)

# What may differ between the processes of a training
_OWN = {
    "process",
    "coordinator",
    "data_dir",
    "run_dir",
    "restore_path",
    "init_path",
    "source",
    "config_path",
}
_OWN |= {"words", "given_once", "debug", "no_progress", "restarts", "join_timeout"}


def distributed_arguments(parser):
    "Flags of a training by several processes."
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="train together with the other processes that Slurm, mpirun or variables speak of",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0; the same for all processes"
    )
    group.add_argument("--processes", type=whole_number, metavar="COUNT", help="of all hosts")
    group.add_argument("--process", type=whole_number, metavar="NUMBER", help="of this one, from 0")
    group.add_argument(
        "--join-timeout",
        type=whole_number,
        metavar="SECONDS",
        default=JOIN_SECONDS,
        help=f"to wait for the others at the start; default: {JOIN_SECONDS}",
    )
    group.add_argument(
        "--restarts",
        type=whole_number,
        metavar="N",
        default=0,
        help="how often this process may be started again after one was lost; default: 0",
    )


def check_distributed(args, on_ipus: bool = False) -> bool:
    """Return whether a command line asks for several processes; UsageError where it does so in part, or cannot."""
    flags = ("coordinator", "processes", "process")
    given = [f"--{name}" for name in flags if getattr(args, name) is not None]
    if not args.distributed:
        if given or args.restarts:
            raise UsageError(f"{' and '.join(given) or '--restarts'}: for --distributed. Add it.")
        return False
    if on_ipus:
        raise UsageError("--distributed is for CPUs and GPUs. On IPUs: --print-poprun.")
    if not 0 <= args.restarts < 2**31 or not 1 <= args.join_timeout < 2**31:
        raise UsageError(
            "--restarts must be from 0 to 2,147,483,647, --join-timeout from 1 to as many."
        )
    backend = args.backend or os.environ.get("KERAS_BACKEND") or "jax"
    if backend != "jax":
        raise UsageError(
            f"--distributed trains with JAX only: TensorFlow's strategy for several processes does not work with "
            f"Keras 3. Received: {backend}. Use --backend jax."
        )
    if importlib.util.find_spec("jax") is None:
        raise UsageError(
            "--distributed trains with JAX, which is not installed: pip install -e '.[keras,jax]'."
        )
    args.backend = "jax"
    if args.dry_run:  # the run itself asks when it starts the process
        ranks_of(args)
    return True


def ranks_of(args):
    """Return which process this is; UsageError where flags or variables are wrong or say only half."""
    try:
        return find_ranks(None, args.coordinator, args.processes, args.process)
    except ValueError as e:
        raise UsageError(str(e)) from None


def launch(args, name: str) -> int:
    """Run these words in a process of their own, and return how it ended."""
    ranks = ranks_of(args)
    print(ranks.describe(), flush=True)
    command = [sys.executable, "-m", "effnet_repro.cli", name, *args.words]
    return supervise(command, ranks, args.restarts, f"effnet-{name}", args.debug)


def join_by_flags(args):
    """Join the processes that flags and variables speak of, and check that all have the same flags."""
    watch_parent()
    processes = join_others(ranks_of(args), args.join_timeout)
    same = {n: v for n, v in vars(args).items() if n not in _OWN}
    processes.compare({n: v for n, v in same.items() if not isinstance(v, dict)})


def lead_plan(work):
    """Return the plan that `work` makes in process 0. Data have paths of one host: every process opens its own."""
    if here().count == 1:
        return work()

    def bare():
        plan = work()
        return plan._replace(resolved=replace(plan.resolved, data=None))

    return here().lead(bare)


def leave(status: int):
    """End a process that `launch` started, without waiting for others where it failed; elsewhere do nothing."""
    if not is_child():
        return
    if status in (0, 130):
        here().close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
