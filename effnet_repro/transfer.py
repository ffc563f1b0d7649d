"""A trained network for other classes: its body is kept, and its classifier is a new one.

The weights come from whatever `convert.read` reads. Classes of the new data that the old network knows by name keep
their part of the classifier. Which segments train then, and at which rate, is a matter of the case, as in any
fine-tuning: `finetuning.PROTOCOLS["transfer"]`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.classes import has_names
from effnet_repro.convert import Weights, format_of, read
from effnet_repro.finetuning import PROTOCOLS, finetune_budget, finetune_case
from effnet_repro.network import drop_statistics, initial_value, params
from effnet_repro.paths import local_path
from effnet_repro.runs.resolved import Resolved, folder_of, settle_fields
from effnet_repro.runs.resume import stored_fields
from effnet_repro.scaling import ModelSpec
from effnet_repro.small_sets import fit_schedule, small_batch

_CLASSIFIER = "all/Top/logits/dense/"
#: The whole network, and the rate of its body over the classifier's: they do best with 10 to 250 images a class.
WHOLE, BODY_RATE = ("Top", "block"), 0.3
#: Training steps of a run, as far as these numbers of epochs allow it.
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 200, 20, 100
_AS_BEGUN = ("variable_filter", "body_rate", "base_learning_rate_exponent")
MOST_AT_A_TIME = 32  # Images of a step; more are accumulated
RATE_BATCH = 16  # Images of a step that the protocol's rate is meant for


class NewHead(NamedTuple):
    """A network with a classifier for other classes."""

    arrays: Dict[str, np.ndarray]  # Full name -> array: all that the network declares
    carried: Tuple[str, ...]  # Classes whose part of the classifier was kept


def read_body(source, weights: str = "auto", arch: Optional[str] = None) -> Weights:
    """Return the weights of `source`, with the old classifier where it has one: else `spec.num_classes` is 0.

    - `weights`: of a run folder: "last", "average", "auto".
    - `arch`: timm's name of a PyTorch file that does not say which of timm's networks it is.
    """
    return read(source, weights=weights, num_classes=0, **({"arch": arch} if arch else {}))


def shared_classes(old: Sequence[str], new: Sequence[str]) -> Dict[int, int]:
    """Return which new label has which old label: the classes of the same name. Numbers are no names."""
    if not has_names(old) or not has_names(new):
        return {}
    labels: Dict[str, int] = {}
    for label, name in enumerate(old):
        labels.setdefault(str(name).strip(), label)
    pairs = ((label, labels.get(str(name).strip())) for label, name in enumerate(new))
    return {label: there for label, there in pairs if there is not None}


def new_head_for(body: Weights, class_names: Sequence[str], seed: int = 0) -> NewHead:
    """Return a network with the body of `body` and a classifier for `class_names`.

    A class that the old network has by the same name keeps its column of the kernel and its bias; the others are drawn
    with `seed`, as at the start of a training.
    """
    spec: ModelSpec = replace(body.spec, num_classes=len(class_names), stored_proxies=False)
    arrays = drop_statistics(body.arrays)
    fresh = {
        p.name: initial_value(p, np.random.default_rng([seed, i]))
        for i, p in enumerate(params(spec))
        if p.name.startswith(_CLASSIFIER)
    }
    shared = shared_classes(body.class_names, class_names) if body.spec.num_classes else {}
    for name, value in fresh.items():
        for label, there in shared.items():
            value[..., label] = arrays[name][..., there]
    carried = tuple(str(class_names[label]) for label in sorted(shared))
    return NewHead({**arrays, **fresh}, carried)


def describe_head(start: NewHead, class_names: Sequence[str]) -> str:
    """Return a sentence about the new classifier."""
    n, kept = len(class_names), len(start.carried)
    text = f"new classifier for {n} class{'es' * (n != 1)}"
    if kept:
        names = ", ".join(start.carried[:3]) + (" ..." if kept > 3 else "")
        text += f"; {kept} of them the network knows by name, and begin with what it has: {names}"
    return text


def transfer_batches(train_count: int, given: dict) -> Dict[str, int]:
    """Return batch fields for a run on so many images, where `given` has none: see `small_sets.small_batch`."""
    if given.get("global_batch_size") or given.get("micro_batch_size"):
        return {}
    whole = small_batch(max(train_count, 1))
    return {"global_batch_size": whole, "micro_batch_size": min(whole, MOST_AT_A_TIME)}


def transfer_length(train_count: int, whole: int, given: dict) -> Dict[str, float]:
    """Return length, warm-up, rate and averaging of a run of protocol "transfer", where `given` has none.

    - `train_count`: images to train on.
    - `whole`: images of a training step.

    There are 20 epochs, or up to 100 until there are 200 training steps. A twentieth is warm-up, the average looks back
    a tenth. The rate grows with the square root of the step, as AdamW's does.
    """
    a_epoch = max(1, train_count // whole)
    epochs = given.get("epochs") or min(max(-(-STEPS // a_epoch), LEAST_EPOCHS), MOST_EPOCHS)
    usual = PROTOCOLS["transfer"]["base_learning_rate_exponent"]
    return {"epochs": epochs, **fit_schedule(epochs, whole, usual, RATE_BATCH)}


def run_folder(source, data) -> Path:
    """Return where a run from `source` on a data set is written by default.

    In the folder of the run that it begins from; for a file of another program under `runs`.
    """
    source = local_path(source, "source")
    name = "sample" if data.builtin else Path(data.root).resolve().name
    ours = source.is_dir() and format_of(source) == "ours"
    if ours or source.parent.name == "checkpoints":
        return folder_of(source) / f"new-head-{name}"
    return Path("runs") / f"{source.name.split('.')[0]}-{name}"


@dataclass(frozen=True)
class Transfer(Resolved):
    """A run on other classes before it begins."""

    body: Optional[Weights] = field(default=None, repr=False, compare=False)  # What it begins from


def resolve_transfer(
    body: Weights,  # From `read_body`
    source,  # The file or run folder that it was read from
    data,  # `DataSet` to train on
    run_dir=None,  # Where everything is written; None = see `run_folder`
    *,
    image_size: Optional[int] = None,  # Side of an image, pixels; None = as trained
    variable_filter: Optional[
        Sequence[str]
    ] = None,  # Beginnings of the segments to train; None = all
    protocol: Optional[str] = None,  # None = "transfer"
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": the batch sizes of these
    **overrides,  # Fields of the case, e.g. epochs=1
) -> Transfer:
    """Work out what `finetune` does with a new classifier. ValueError where the arguments contradict each other."""
    name, batches = finetune_budget(budget, not data.builtin)
    own = {**batches, **{n: value for n, value in overrides.items() if value is not None}}
    own.update(transfer_batches(data.train_count, own))
    run_dir = local_path(run_dir, "run_dir") if run_dir is not None else run_folder(source, data)
    begun = stored_fields(run_dir, _AS_BEGUN)  # by an earlier version's defaults, perhaps
    began_with = begun.pop("variable_filter", None)
    parts = variable_filter or began_with or WHOLE
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    trained, protocol = body.case, protocol or "transfer"
    if protocol == "transfer":
        whole = own.get("global_batch_size") or own["micro_batch_size"]
        slow = {"body_rate": BODY_RATE} if set(parts) != {"Top"} else {}
        length = transfer_length(data.train_count, whole, own)
        own = {**slow, **length, **begun, **own}
    case = finetune_case(trained, image_size or trained.image_size, protocol, parts, **own)
    case, fields = settle_fields(case, run_dir, own)
    notes = {"kind": "finetune", "protocol": protocol, "trained_at": trained.image_size}
    notes["new_head"] = True
    more = dict(named=tuple(n for n, v in overrides.items() if v is not None), data=data, body=body)
    return Transfer(
        case, trained, name, run_dir, fields, notes, local_path(source, "source"), **more
    )
