"""Train, fine-tune, validate and look things up from a shell, where every mistake gets one line.

A file for each command; `kit` makes a function a program, `fields` and `options` read flags, `resolve`
says what will run.
"""

from effnet_repro.cli.early import answer_signals

answer_signals()

from effnet_repro.cli.cases import cases_command
from effnet_repro.cli.compare import compare_command
from effnet_repro.cli.convert import convert_command
from effnet_repro.cli.doctor import doctor_command
from effnet_repro.cli.export import export_command
from effnet_repro.cli.finetune import finetune_command
from effnet_repro.cli.kit import COMMANDS, EXIT_STATUSES, Command, UsageError, main
from effnet_repro.cli.options import BACKENDS
from effnet_repro.cli.pack import pack_command
from effnet_repro.cli.plan import plan_command
from effnet_repro.cli.predict import predict_command
from effnet_repro.cli.resolve import CommandPlan, plan_training
from effnet_repro.cli.train import train_command
from effnet_repro.cli.validate import validate_command

__all__ = [
    "BACKENDS",
    "COMMANDS",
    "EXIT_STATUSES",
    "Command",
    "CommandPlan",
    "UsageError",
    "cases_command",
    "compare_command",
    "convert_command",
    "doctor_command",
    "export_command",
    "finetune_command",
    "main",
    "pack_command",
    "plan_command",
    "plan_training",
    "predict_command",
    "train_command",
    "validate_command",
]
