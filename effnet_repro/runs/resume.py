"""Which runs may resume from a checkpoint, with which case and which average."""

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Optional

from effnet_repro import checkpoint as checkpoints
from effnet_repro.averaging import WeightAverage
from effnet_repro.config import (
    NETWORK_FIELDS,
    Case,
    case_from_dict,
    differing_fields,
    earlier_fields,
    say_earlier,
)
from effnet_repro.messages import say
from effnet_repro.paths import local_path


def average_until(
    folder: Path,  # Folder of the checkpoints
    case: Case,  # Its decay
    update: int,  # Weight updates done
) -> WeightAverage:
    "Work out the weight average of a run of an older version, up to the checkpoint of `update`"
    average, why = _average_beside(folder, case, update)
    epochs = 0
    for file in checkpoints.find_checkpoints(folder)[0]:
        metadata = checkpoints.read_metadata(file)
        if metadata["update"] > update:
            continue
        epochs = metadata.get("epoch", 0)
        if average.last_update < metadata["update"] and metadata.get("whole_epoch"):
            average.update(checkpoints.load(file, "all/")[0], metadata["update"])
    if average.count < epochs:
        say(f"the average holds {average.count} of {epochs} epochs: {why}")
    return average


def _average_beside(folder, case, update):
    "The average beside the checkpoints, if it is whole and not newer than `update`; else a fresh one, and why"
    path = folder / "average.safetensors"
    fresh, why = (
        WeightAverage(case.weight_average_decay),
        "the other checkpoints are gone",
    )
    try:
        found = WeightAverage.load(path)
    except FileNotFoundError:
        return fresh, f"there is no {path.name}"
    except ValueError as e:
        return fresh, str(e)
    if found.last_update > update:
        return (
            fresh,
            f"{path.name} is of step {found.last_update}, after the checkpoint's {update}",
        )
    return found, why


def refuse_other_case(
    path,  # The checkpoint
    theirs: Case,  # Its case
    ours: Case,  # The case to go on with
):  # None; raises ValueError that lists the differing fields
    "Refuse to resume with another case; length, and a micro-batch that only changes rounding, may differ"
    fields = differing_fields(theirs, ours)
    fields.pop("max_steps", None)
    if set(fields) == {"micro_batch_size", "gradient_accumulation"} and _only_rounds(ours):
        say(f"{path}: {list_fields(fields)}: the result is equal only to rounding")
        return
    if fields:
        raise ValueError(
            f"{path} belongs to another run ({list_fields(fields)}). Use another run_dir, or the same settings."
        )


def _only_rounds(case):
    "Whether the micro-batch of a case changes nothing but the order of sums"
    return case.mix_group_size != 0 and case.norm != "BN"


def refuse_other_data(
    path,  # The checkpoint
    metadata: dict,  # What it says
    data,  # `DataSet` to go on with
):  # None; raises ValueError
    "Refuse to resume on other images than those the run began with"
    there = metadata.get("num_classes"), metadata.get("pictures", data.train_count)
    if there != (data.num_classes, data.train_count):
        raise ValueError(
            f"{path} belongs to a run on {there[1]} training images of {there[0]} classes. Received: "
            f"{data.train_count} images of {data.num_classes} classes. "
            "Give the same data, or use another run_dir."
        )
    if metadata.get("data_fingerprint") not in (None, data.fingerprint):
        place = "the built-in sample set" if data.builtin else data.root
        raise ValueError(
            f"{path} belongs to a run on other training images: as many as in {place}, but with other "
            "names, bytes or labels. Give the same data, or use another run_dir."
        )


def data_notes(
    data,  # `DataSet` that a run trains on
) -> dict:  # What its checkpoints say of it: `refuse_other_data` compares
    "Note down which images a run began with"
    return {
        "class_names": list(data.class_names),
        "pictures": data.train_count,
        "data_fingerprint": data.fingerprint,
        "decoder": data.decoder,
        **({} if data.validation_split is None else {"validation_split": data.validation_split}),
    }


def stored_split(*places) -> Optional[float]:
    """Return the share of validation images that the first of some runs or checkpoints noted; None where none did."""
    for place in filter(None, places):
        with contextlib.suppress(OSError, ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged ones are the recorder's to tell
            metadata = _stored(place)[1] or checkpoints.load_metadata(place)
            return metadata.get("validation_split")
    return None


def stored_budget(run_dir) -> Optional[str]:
    """Return the budget that a run began with: "" where an old run does not say, None where there is no run."""
    metadata = _stored(run_dir)[1]
    return None if metadata is None else metadata.get("budget", "")


def stored_fields(run_dir, names) -> dict:
    """Return some fields of the case that a run began with, as they are stored; none where there is no run.

    A field that the run's version did not have is left out.
    """
    stored = _stored_case(run_dir)[1] or {}
    return {name: stored[name] for name in names if name in stored}


def refuse_other_run(
    path,  # The checkpoint
    metadata: dict,  # What it says
    data,  # `DataSet` to go on with
    case: Case,  # The case to go on with
    seed: int,  # The seed to go on with
):  # None; raises ValueError
    "Refuse to resume a run with other images, settings or seed; the machine may be another one"
    refuse_other_data(path, metadata, data)
    refuse_other_case(path, case_from_dict(metadata["case"]), case)
    if metadata["seed"] != seed:
        raise ValueError(
            f"{path} belongs to a run with seed {metadata['seed']}. Received: seed={seed}. "
            "Use the same seed to go on, or another run_dir."
        )


def list_fields(
    fields: dict,  # From `differing_fields`
) -> str:  # e.g. "image_size: 32 there, 64 here"
    "What `differing_fields` found, as text"
    return "; ".join(f"{n}: {a} there, {b} here" for n, (a, b) in list(fields.items())[:6])


def check_init(
    source,  # Where the weights come from
    metadata: dict,  # Of their checkpoint
    data,  # `DataSet` to train on
    case: Case,  # Case to train
):  # None; raises ValueError
    "Refuse weights of another network, or of another number of classes"
    fields = differing_fields(case_from_dict(metadata["case"]), case, NETWORK_FIELDS)
    if fields:
        raise ValueError(
            f"{source} holds another network than {case.name} ({list_fields(fields)}). "
            "Begin from a run of the same network."
        )
    if metadata["num_classes"] != data.num_classes:
        raise ValueError(
            f"{source} has {metadata['num_classes']} classes, the data {data.num_classes} ({data.root}). "
            "For other classes give it a new classifier: effnet-finetune --new-head, or finetune(new_head=True)."
        )


def _stored(run_dir):
    "The newest checkpoint of a run that can be read, and what it says; damaged ones are the recorder's to tell"
    for path in sorted(
        (local_path(run_dir, "run_dir") / "checkpoints").glob("epoch-*.safetensors"), reverse=True
    ):
        with contextlib.suppress(ValueError, OSError):
            return path, checkpoints.read_metadata(path)
    return None, None


def _stored_case(run_dir):
    "The same, and the case in it, as it was stored"
    path, metadata = _stored(run_dir)
    return path, metadata and metadata.get("case")


def has_begun(run_dir) -> bool:
    "Whether a folder has a checkpoint to go on from"
    return _stored_case(run_dir)[1] is not None


def settle_case(
    run_dir,  # Of the run, new or begun
    case: Case,  # As the command line and the budget say
    device_loop: int,  # What the runtime takes where the case has None
    given=(),  # Fields that the user named
) -> Case:  # Its device loop is a number
    "Complete a `case` by what its own run, or else the runtime, decides"
    path, stored = _stored_case(run_dir)
    if stored is None:
        return replace(case, device_loop=case.device_loop or device_loop)
    older = {n: v for n, v in earlier_fields(stored).items() if n not in given}
    if older:
        say_earlier(path, stored)
    case = replace(case, **older, **_own_micro_batch(case, stored, given))
    return replace(case, device_loop=case.device_loop or stored.get("device_loop") or device_loop)


def _own_micro_batch(case, stored, given):
    "The micro-batch that a run began with, where nobody asks for another and the rest is the same"
    names = ("micro_batch_size", "gradient_accumulation")
    whole = ("global_batch_size", "num_replicas")
    if any(n in given for n in names) or any(stored[n] != getattr(case, n) for n in whole):
        return {}
    return {n: stored[n] for n in names}
