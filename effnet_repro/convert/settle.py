"""Checks what was found in a file against the network that it must be, and makes `Weights` of it."""

from dataclasses import replace

import numpy as np

from effnet_repro.config import for_one_device, list_some
from effnet_repro.convert.recognize import case_for, network_of
from effnet_repro.convert.weights import Weights, class_names_of, quantized
from effnet_repro.network import check_matches, initial_value, params, spec_of_arrays
from effnet_repro.scaling import SIZE_TABLE, ModelSpec


def odd_size(native):
    "The size of 32 k + 1 pixels that is nearest to a native one"
    return 32 * round((native - 1) / 32) + 1


def usual_crop(image_size: int) -> float:
    """Return the share of an image's short side that EfficientNet's validation square covers: all but 32 pixels.

    timm writes the same with three digits, but 0.942 for B6.
    """
    return round(image_size / (image_size + 32), 3)


def _new_classifier(path, arrays, spec, wanted):
    "The classifier's classes: the file's, or new ones where it has none"
    has = spec.num_classes
    if has and wanted not in (None, 0, has):
        raise ValueError(
            f"{path} has {has} classes. Received: num_classes={wanted}. Leave it out; for other classes "
            "fine-tune with a new classifier: effnet-finetune --new-head."
        )
    if has or wanted == 0:
        return arrays, spec, ()
    if wanted is None:
        raise ValueError(f"{path} has no classifier. Pass num_classes for a new, untrained one.")
    spec = replace(spec, num_classes=wanted)
    missing = [p for p in params(spec) if p.name.startswith("all/") and p.name not in arrays]
    rng = np.random.default_rng(0)
    arrays = {**arrays, **{p.name: initial_value(p, rng) for p in missing}}
    return arrays, spec, (f"The classifier is new: {wanted} classes, untrained.",)


def as_asked(weights: Weights, path, num_classes, image_size, class_names) -> Weights:
    """Return weights of ours with what the caller says of them; `ValueError` where it does not fit them."""
    arrays, spec, _ = _new_classifier(path, weights.arrays, weights.spec, num_classes)
    names = weights.class_names if class_names is None else tuple(class_names)
    if len(names) != spec.num_classes:
        raise ValueError(f"{len(names)} class names for {spec.num_classes} classes of {path}.")
    case = weights.case if image_size is None else replace(weights.case, image_size=image_size)
    return weights._replace(arrays=arrays, case=case, class_names=names)


def _fit_case(found, guess, given, image_size):
    "The case of a file's weights, and what was assumed for it"
    base = given or found.case
    notes = ()
    if base is None:
        base = replace(case_for(guess), **found.trained)
        groups = f", {guess.norm_groups} norm groups" if guess.norm == "GN" else ""
        notes = (
            f"Taken for {base.name} at {base.image_size} px{groups}, since no case was given.",
        )
    base = for_one_device(base)
    native = SIZE_TABLE[guess.size].native
    size = image_size or (odd_size(native) if found.odd_size else base.image_size)
    notes = tuple(n.replace(f"at {base.image_size} px", f"at {size} px") for n in notes)
    norm = base.input_norm if found.affine is None else "keras"
    case = replace(base, image_size=size, input_norm=norm)
    if found.affine is not None and not (given or found.case):
        case = replace(case, image_resize="modern")  # others resize between pixel centers
    return case, notes


def _check_numbers(path, arrays):
    "Raise `ValueError` for arrays that are no weights: whole numbers, numbers that are not finite, variances below 0"
    kinds = {n: a.dtype for n, a in arrays.items() if a.dtype.kind != "f"}
    if kinds:
        name = min(kinds)
        raise ValueError(quantized(path, kinds[name], name))
    variances = [
        n
        for n, a in arrays.items()
        if n.endswith(("running_var", "moving_variance")) and a.min() < 0
    ]
    broken = [n for n, a in arrays.items() if not np.isfinite(a).all()] or variances
    if broken:
        what = "a variance below zero" if variances else "numbers that are not finite"
        raise ValueError(f"{path} holds {what} in {list_some(broken)}: these weights are broken.")


def settle(path, found, given, num_classes, image_size, class_names):
    "Check what was found against the network that it must be, and name it as we do"
    shapes = {n: np.shape(a) for n, a in found.arrays.items()}
    guess = network_of(shapes, found.name_of)
    case, assumed = _fit_case(found, guess, given, image_size)
    spec = ModelSpec.from_case(case, guess.num_classes)
    every = [p for p in params(replace(spec, stored_proxies=True)) if p.name.startswith("all/")]
    spec = spec_of_arrays(spec, {p.name for p in every if found.name_of(p.name) in shapes})
    own = [p.name for p in params(spec) if p.name.startswith("all/")]
    declared = [p._replace(name=found.name_of(p.name)) for p in params(spec) if p.name in own]
    asked = f"asked for: {spec.name} of {case.name}" if given else "nearest"
    hint = f"{path}: {asked}; its arrays look like {guess.name} (shapes: height, width, in, out)."
    check_matches(found.arrays, declared, hint)
    _check_numbers(path, {n: np.asarray(a) for n, a in found.arrays.items()})
    arrays = {n: np.ascontiguousarray(found.arrays[found.name_of(n)], "float32") for n in own}
    arrays, spec, fresh = _new_classifier(path, arrays, spec, num_classes)
    if found.affine is not None:
        arrays["input/scale"], arrays["input/shift"] = found.affine
    names = tuple(class_names or found.class_names or class_names_of(spec.num_classes))
    if len(names) != spec.num_classes:
        raise ValueError(f"{len(names)} class names for {spec.num_classes} classes of {path}.")
    foreign = found.affine is not None and not (given or found.case)
    crop_pct = (found.crop_pct or usual_crop(case.image_size)) if foreign else None
    return Weights(spec, arrays, case, names, found.notes + assumed + fresh, crop_pct)
