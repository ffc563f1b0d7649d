"""Train, fine-tune and validate with Keras: a case in, a run folder out.

`begin` and `validation` are what a user calls, `runtime` is what `runs.loop` drives, step by step through `steps`.
`optimizer` and `step` tell how a training step is computed, `stream` what is fed to it, `evaluation` how weights are
measured. `device` names what computes.
"""

from effnet_repro.averaging import load_weights
from effnet_repro.finetuning import finetune_case
from effnet_repro.training.begin import finetune, train
from effnet_repro.training.device import (
    PRECISIONS,
    choose_precision,
    configure,
    device_name,
    environment,
)
from effnet_repro.training.estimation import estimate
from effnet_repro.training.evaluation import Evaluator, evaluate, predictor
from effnet_repro.training.micro_batch import settle_run
from effnet_repro.training.optimizer import RMSpropTF, make_optimizer
from effnet_repro.training.report import plot_predictions, record
from effnet_repro.training.state import training_state
from effnet_repro.training.step import Program, TrainingModel, micro_loss, use_devices
from effnet_repro.training.stream import updates
from effnet_repro.training.validation import validate

__all__ = [
    "PRECISIONS",
    "Evaluator",
    "Program",
    "RMSpropTF",
    "TrainingModel",
    "choose_precision",
    "configure",
    "device_name",
    "environment",
    "estimate",
    "evaluate",
    "finetune",
    "finetune_case",
    "load_weights",
    "make_optimizer",
    "micro_loss",
    "plot_predictions",
    "predictor",
    "record",
    "settle_run",
    "train",
    "training_state",
    "updates",
    "use_devices",
    "validate",
]
