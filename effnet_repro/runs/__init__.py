"""What a run writes and how it resumes, the same for every runtime. No framework is imported here.

`folder` finds a run, `lock` keeps it for one process, `recorder` writes checkpoints, averages and rows, `tables` small
files, `metrics` and `scores` what was trained and measured, `environment` where. `resolved` works out what a run will
do, `preflight` checks all of it before it begins, `start` says which weights it begins from, `resume` which run may go
on; `signals` says when it stops, `watch` shows it. `task` says what to train, `runtime` what has to be computed for it,
and `loop` is the one loop over training steps.
"""

from effnet_repro.finetuning import PROTOCOLS, finetune_budget, finetune_case, finetune_size
from effnet_repro.runs.environment import describe_machine, git, suppress_stderr
from effnet_repro.runs.folder import Run, find_run, read_case
from effnet_repro.runs.lock import lock_folder, wait_for_folder
from effnet_repro.runs.loop import execute
from effnet_repro.runs.metrics import plot_run, read_metrics, save_curves
from effnet_repro.runs.preflight import Reading, check_run, notes_on
from effnet_repro.runs.recorder import Course, Meter, Recorder, describe_epoch
from effnet_repro.runs.resolved import (
    Resolved,
    choose_budget,
    folder_of,
    may_change_micro_batch,
    refuse_more,
    resolve_finetuning,
    resolve_training,
    settle_fields,
    starting_case,
    trained_case,
    training_folder,
)
from effnet_repro.runs.resume import (
    NETWORK_FIELDS,
    average_until,
    check_init,
    data_notes,
    list_fields,
    refuse_other_case,
    refuse_other_data,
    refuse_other_run,
    settle_case,
    stored_split,
)
from effnet_repro.runs.runtime import Runtime
from effnet_repro.runs.scores import (
    Scores,
    measured_data,
    plot_confusion,
    print_scores,
    refuse_unmeasurable,
    score,
    score_row,
    score_table,
    write_scores,
)
from effnet_repro.runs.signals import Stopped, StopSignals
from effnet_repro.runs.start import Start, begin_from
from effnet_repro.runs.tables import append_rows, read_rows, write_json, write_rows
from effnet_repro.runs.task import Options, Task

__all__ = [
    "NETWORK_FIELDS",
    "PROTOCOLS",
    "Course",
    "Meter",
    "Options",
    "Reading",
    "Recorder",
    "Resolved",
    "Run",
    "Runtime",
    "Scores",
    "Start",
    "StopSignals",
    "Stopped",
    "Task",
    "append_rows",
    "average_until",
    "begin_from",
    "check_init",
    "choose_budget",
    "check_run",
    "data_notes",
    "describe_epoch",
    "describe_machine",
    "execute",
    "find_run",
    "finetune_budget",
    "finetune_case",
    "finetune_size",
    "folder_of",
    "git",
    "list_fields",
    "lock_folder",
    "may_change_micro_batch",
    "measured_data",
    "notes_on",
    "plot_confusion",
    "plot_run",
    "print_scores",
    "read_case",
    "read_metrics",
    "read_rows",
    "refuse_more",
    "refuse_other_case",
    "refuse_other_data",
    "refuse_other_run",
    "refuse_unmeasurable",
    "resolve_finetuning",
    "resolve_training",
    "save_curves",
    "score",
    "score_row",
    "score_table",
    "settle_case",
    "settle_fields",
    "starting_case",
    "stored_split",
    "suppress_stderr",
    "trained_case",
    "training_folder",
    "wait_for_folder",
    "write_json",
    "write_rows",
    "write_scores",
]

quiet_stderr, say_scores = suppress_stderr, print_scores  # what earlier programs import
