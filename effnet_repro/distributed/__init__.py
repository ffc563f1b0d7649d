"""One case trained by several processes, on one host or on many.

`ranks` finds out which process this is, `processes` joins the others and talks to them, `supervisor` starts a process
and turns its end into a line and a status. Gradients are summed by the training step itself: page `53_processes`.
"""

from effnet_repro.distributed.child import AGAIN, is_child, watch_parent
from effnet_repro.distributed.processes import (
    ALONE,
    HEARTBEAT_SECONDS,
    JOIN_SECONDS,
    LostProcess,
    Processes,
    explain_loss,
    has_joined,
    here,
    join,
    join_others,
    told,
)
from effnet_repro.distributed.ranks import Ranks, count_gpus, find_ranks, first_host, own_gpus
from effnet_repro.distributed.supervisor import explain_end, supervise

__all__ = [
    "AGAIN",
    "ALONE",
    "HEARTBEAT_SECONDS",
    "JOIN_SECONDS",
    "LostProcess",
    "Processes",
    "Ranks",
    "count_gpus",
    "explain_end",
    "explain_loss",
    "find_ranks",
    "first_host",
    "has_joined",
    "here",
    "is_child",
    "join",
    "join_others",
    "own_gpus",
    "supervise",
    "told",
    "watch_parent",
]
