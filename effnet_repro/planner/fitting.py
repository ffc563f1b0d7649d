"""The fit of the model to published throughputs, and the program that writes what comes out of it."""

import csv
import math
from pathlib import Path
from typing import Dict, Tuple

import numpy as np

from effnet_repro.config import load_cases
from effnet_repro.planner.model import MK2, PARTS, Constants, Plan, plan, predict
from effnet_repro.results import NO_SEED, origin, write_rows, write_values
from effnet_repro.scaling import ModelSpec

ARMS = ("G1-GN-Native", "G16-GN-Native", "G16-GN-Half", "G16-LN_PN-Native", "G16-LN_PN-Half")


def size_and_arm(name: str) -> Tuple[str, str]:
    """Return ("B4", "G16-GN-Half") for the name of a published case."""
    size, arm = name.split("_16IPU")[0].split("-", 1)
    return size, arm


def anchor_cases() -> Tuple[str, ...]:  # Names of published cases, in the order of `config.yml`
    """Return the six cases that the model is fitted to, chosen by their names.

    One for each size, the arms in the order of `config.yml`, one after the other. The start is shifted by one arm, so
    that B5-G1 is left out, whose offloaded weights the model does not time.
    """
    chosen = []
    for name in load_cases():
        size, arm = size_and_arm(name)
        if ARMS.index(arm) == (int(size[1:]) + 1) % len(ARMS):
            chosen.append(name)
    return tuple(chosen)


def published_throughputs(
    path,  # results/published_figure.csv
) -> Dict[str, float]:  # Case -> images/s of a POD16, read off the authors' figure
    """Read the thirty published throughputs."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(r["size"], r["series"].replace("LN+PN", "LN_PN")): r for r in rows}
    return {n: float(found[size_and_arm(n)]["train_img_s_pod16"]) for n in load_cases()}


GUESS = Constants(amp=0.2, depthwise=0.02, data=0.1, operation_s=2e-6, update_s=1e-3, working=2.0)
_TIMED = ("amp", "depthwise", "data", "operation_s", "update_s")


def _fit(published, names, free=_TIMED, fixed=None, pull=0.02):
    "Constants that bring the modeled throughputs of the named cases nearest to the published"
    from scipy.optimize import least_squares

    cases = {n: c for n, c in load_cases().items() if n in names}
    start = np.log([getattr(GUESS, f) for f in free])

    def constants(logs):
        return GUESS._replace(**{**(fixed or {}), **dict(zip(free, np.exp(logs).tolist()))})

    def misses(logs):
        found = constants(logs)
        ours = [_case_prediction(c, found).images_per_s for c in cases.values()]
        wanted = [published[n] for n in cases]
        return np.concatenate([np.log(np.divide(ours, wanted)), pull * (logs - start)])

    return constants(least_squares(misses, start).x)


def _case_prediction(case, constants):
    spec, plan = ModelSpec.from_case(case), Plan.from_case(case)
    return predict(spec, plan, None, constants)


def fit(
    published: Dict[str, float],  # Case -> images/s
    names: Tuple[str, ...],  # Cases to fit to
) -> Constants:
    """Fit the six constants to the named cases.

    Five of them by least squares on the logarithm of the throughput; `working` is the largest with which the plans of
    these cases fit their memory. Needs SciPy.
    """
    timed, room = _fit(published, names), []
    for case in (c for n, c in load_cases().items() if n in names):
        parts = _case_prediction(case, timed._replace(working=1.0)).memory
        for stage in zip(*parts.values()):
            by_part = dict(zip(PARTS, stage))
            kept = by_part.pop("activations")
            room.append((MK2.memory_bytes - sum(by_part.values())) / kept)
    return timed._replace(working=math.floor(1000 * min(room)) / 1000)


def _errors(published, constants, anchors):
    "Relative errors of the cases that were not fitted, by name"
    held = {n: c for n, c in load_cases().items() if n not in anchors}
    return {
        n: _case_prediction(c, constants).images_per_s / published[n] - 1 for n, c in held.items()
    }


def _summary(errors):
    sizes = sorted((abs(e), n) for n, e in errors.items())
    inside = [e for e, n in sizes if not load_cases()[n].offload_fp32_weight_copy]
    return {
        "median_error": round(float(np.median([e for e, _ in sizes])), 4),
        "worst_error": round(sizes[-1][0], 4),
        "worst_case": sizes[-1][1],
        "worst_error_on_chip": round(inside[-1], 4),
    }


VARIANTS = {
    "no update time": dict(free=_TIMED[:4], fixed={"update_s": 0.0}),
    "no start of operations": dict(
        free=("amp", "depthwise", "data", "update_s"), fixed={"operation_s": 0.0}
    ),
    "no depthwise penalty": dict(
        free=("amp", "data", "operation_s", "update_s"), fixed={"depthwise": 1.0}
    ),
    "data at full bandwidth": dict(
        free=("amp", "depthwise", "operation_s", "update_s"), fixed={"data": 1.0}
    ),
}


def _row(name, case, published, anchors, constants):
    "A case as a row of results/pod16_prediction.csv"
    ours = _case_prediction(case, constants)
    best = plan(ModelSpec.from_case(case), constants=constants)
    size, arm = size_and_arm(name)
    busiest = lambda p: max(p.stage_bytes) / 1e6
    return {
        "case": name,
        "size": size,
        "arm": arm,
        "fitted": name in anchors,
        "published_images_per_s": round(published[name]),
        "modeled_images_per_s": round(ours.images_per_s, 1),
        "error": round(ours.images_per_s / published[name] - 1, 4),
        "busy": round(ours.busy, 4),
        "fullest_stage_mb": round(busiest(ours), 1),
        "fits": ours.fits,
        "best_images_per_s": round(best.images_per_s, 1),
        "best_stages": best.plan.num_stages,
        "best_splits": " ".join(best.plan.splits),
        "best_micro_batch_size": best.plan.micro_batch_size,
        "best_gradient_accumulation": best.plan.gradient_accumulation,
        "best_busy": round(best.busy, 4),
        "best_fullest_stage_mb": round(busiest(best), 1),
    }


def write_results(
    folder="results",  # Holds published_figure.csv; gets pod16_model.json and pod16_prediction.csv
):
    """Fit the model to the anchors, predict and plan all thirty cases, and write what comes out. Takes minutes."""
    folder = Path(folder)
    published, anchors = published_throughputs(folder / "published_figure.csv"), anchor_cases()
    constants = fit(published, anchors)
    summaries = {
        name: _summary(_errors(published, _fit(published, anchors, **kw), anchors))
        for name, kw in VARIANTS.items()
    }
    model = {
        "what": "modeled: six constants fitted to six published throughputs of a POD16; about twenty "
        "forms of the model were tried with the errors of all thirty in sight",
        "hardware": MK2._asdict(),
        "fitted_to": list(anchors),
        "constants": {k: float(f"{v:.6g}") for k, v in constants._asdict().items()},
        "held_out": _summary(_errors(published, constants, anchors)),
        "variants": summaries,
    }
    constants = Constants(**model["constants"])
    rows = [_row(n, c, published, anchors, constants) for n, c in load_cases().items()]
    about = origin("CPU, a model of a POD16", "python -m effnet_repro.planner", NO_SEED, 1)
    write_rows(folder / "pod16_prediction.csv", rows, ("case",), about)
    write_values(folder / "pod16_model.json", model, about)
