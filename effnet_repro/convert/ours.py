"""Our own checkpoints, read and written as weights."""

import numpy as np

from effnet_repro.averaging import load_weights
from effnet_repro.checkpoint import save
from effnet_repro.config import case_from_dict, case_to_dict, earlier_note
from effnet_repro.convert.weights import Weights, class_names_of
from effnet_repro.network import check_matches, params, spec_of_arrays
from effnet_repro.scaling import ModelSpec


def read_ours(path, weights, given):
    "Read a run folder or one of our files as `Weights`; `given` is the case that it must be, or None"
    arrays, metadata, file = load_weights(path, weights)
    case = case_from_dict(metadata["case"])
    if given is not None and given.name != case.name:
        raise ValueError(
            f"{path} holds {case.name}. Received: case={given.name!r}. Leave `case` out."
        )
    spec = spec_of_arrays(ModelSpec.from_case(case, metadata["num_classes"]), arrays)
    check_matches(arrays, params(spec))
    arrays = {name: np.asarray(array, "float32") for name, array in arrays.items()}
    names = metadata.get("class_names") or class_names_of(spec.num_classes)
    notes = (f"Weights of {file.name}.", earlier_note(metadata["case"]))
    crop_pct = metadata.get("crop_pct")
    return Weights(spec, arrays, case, tuple(names), tuple(filter(None, notes)), crop_pct)


def write_ours(path, weights):
    "Write `Weights` as a checkpoint of no training steps; returns notes: none"
    metadata = {
        "case": case_to_dict(weights.case),
        "num_classes": weights.spec.num_classes,
        "class_names": list(weights.class_names),
        "precision": "float32",
        "update": 0,  # none has been made here
        "epoch": 0,
        "seed": 0,
        "notes": list(weights.notes),
        **({} if weights.crop_pct is None else {"crop_pct": weights.crop_pct}),
    }
    save(path, weights.arrays, metadata)
    return ()
