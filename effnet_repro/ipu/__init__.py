"""The same segments, recipe and checkpoints as a pipeline on IPUs: a case in, a run folder out.

`stages` and `program` tell how a case becomes a pipelined training program. `layout` places a case on a machine, `feed`
makes what the host sends, `sdk` is the only place that calls Graphcore's software. `begin` and `validation` are what
a user calls, `resolved` is worked out before, `runtime` is what `runs.loop` drives, `poprun` what several processes
share.
"""

from effnet_repro.ipu.begin import finetune, train
from effnet_repro.ipu.feed import (
    Draws,
    FedMasks,
    draw_masks,
    draws,
    element_stream,
    mask_rates,
    validation_stream,
)
from effnet_repro.ipu.layout import (
    DEVICE_LOOP,
    StagePlan,
    compute_dtype,
    finetune_layout,
    for_ipus,
    ipus_per_replica,
    machine_options,
    pipeline_options,
    plan_stages,
    resolve_for_ipus,
)
from effnet_repro.ipu.poprun import broadcast, count_ipus, gather, poprun_command
from effnet_repro.ipu.program import (
    TrainingProgram,
    assign,
    get_state,
    loss_scale,
    make_optimizer,
    read_report,
    set_state,
    step_variable,
)
from effnet_repro.ipu.resolved import resolve_finetuning, resolve_training
from effnet_repro.ipu.runtime import IPURuntime
from effnet_repro.ipu.sdk import (
    Graphcore,
    IPUOps,
    choose_device,
    configure,
    describe_tensorflow,
    has_graphcore,
    has_graphcore_wheel,
    has_ipu,
    host_collectives,
    infeed,
    outfeed,
    pipeline,
)
from effnet_repro.ipu.stages import Stages, carried, plot_pod
from effnet_repro.ipu.validation import (
    Measurement,
    ValidationProgram,
    evaluate,
    inference_weights,
    validate,
)

__all__ = [
    "Draws",
    "DEVICE_LOOP",
    "FedMasks",
    "Graphcore",
    "IPURuntime",
    "Measurement",
    "IPUOps",
    "StagePlan",
    "Stages",
    "TrainingProgram",
    "ValidationProgram",
    "assign",
    "broadcast",
    "carried",
    "choose_device",
    "compute_dtype",
    "configure",
    "count_ipus",
    "describe_tensorflow",
    "draw_masks",
    "draws",
    "element_stream",
    "evaluate",
    "finetune",
    "finetune_layout",
    "for_ipus",
    "gather",
    "get_state",
    "has_graphcore",
    "has_graphcore_wheel",
    "has_ipu",
    "host_collectives",
    "inference_weights",
    "infeed",
    "ipus_per_replica",
    "loss_scale",
    "machine_options",
    "make_optimizer",
    "mask_rates",
    "outfeed",
    "pipeline",
    "pipeline_options",
    "plan_stages",
    "plot_pod",
    "poprun_command",
    "read_report",
    "resolve_finetuning",
    "resolve_for_ipus",
    "resolve_training",
    "set_state",
    "step_variable",
    "train",
    "validate",
    "validation_stream",
]
