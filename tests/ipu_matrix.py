"""Every network of the thirty cases makes one update on the stand-in: python tests/ipu_matrix.py [OUT.csv [ROWS]]

Writes results/ipu_standin.csv: the difference to the written-out recipe (tests/ipu_reference.py), relative
to the largest value of each array; `changes_difference` is relative to what the steps changed, over all
weights or slots of a kind, the worst kind. Two networks make a second step, too, and some train with
mixing and masks, with slots from zero, in float32 and in the 16 bits of their case, loss scale and all.
Minutes a network, ROWS at most a call, which is why tests/test_ipu.py runs short ones. With TensorFlow
2.6.3 on Python 3.8, which Graphcore's build is made from, the networks without group convolutions run as
well.
"""

import csv
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent))

from ipu_reference import make_images, reference_update  # noqa: E402
from ipu_updates import (  # noqa: E402
    CLASSES,
    EVERYTHING,
    PLAIN_SLOTS,
    both,
    change_differences,
    small,
    worst_difference,
)

from effnet_repro.config import load_cases  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402

TWICE = ("B0-G16-LN_PN", "B2-G1-GN")  # two stages with proxy norm, four stages without
# Network with everything on, and its precision; a CPU has no 16-bit gradient of group convolutions
FULL = (("B0-G16-LN_PN", "32.32"), ("B0-G1-GN", "16.32"), ("B5-G1-GN", "16.16"))
# Those of ipu_updates.check_updates
LIMITS = {"weights": 5e-4, "slots": 5e-4, "loss": 2e-5, "changes": 1e-3}
COMMAND, SEED = "python tests/ipu_matrix.py", 1  # the seed that ipu_updates.both gives


def measure(network, name, updates, precision=None):
    "A row: how far some steps of a case's network are from the recipe; with a precision, everything on"
    fields = dict(precision=precision, **EVERYTHING, **PLAIN_SLOTS) if precision else {}
    case, began = small(name, **fields), time.perf_counter()
    _, (got, reports), (wanted, losses), start = both(case, updates, check_divergence=False)
    slots = {n: w for n, w in wanted.items() if n.startswith("slots/")}
    weights = {n: w for n, w in wanted.items() if n not in slots}
    row = {
        "network": network,
        "case": name,
        "updates": updates,
        "stages": case.num_stages,
        "replicas": case.num_replicas,
        "gradient_accumulation": case.gradient_accumulation,
        "image_size": case.image_size,
        "precision": case.precision,
        "mixing": bool(case.mixup_alpha),
        "loss_scale": 1 if case.precision == "32.32" else case.loss_scale,
        "arrays": len(got),
        "weights_difference": f"{worst_difference(got, weights):.2e}",
        "slots_difference": f"{worst_difference(got, slots):.2e}",
        "loss_difference": f"{abs(reports / losses - 1)[:, 0].max():.2e}",
        "changes_difference": f"{max(change_differences(got, wanted, start).values()):.2e}",
        "ran_on": "CPU stand-in",
        "seconds": round(time.perf_counter() - began, 1),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    if case.precision != "32.32":
        row["rounding"] = f"{rounding(case, start, wanted):.2e}"
    return {**row, "passed": passes(row)}


def passes(row):
    "Whether the differences of a row are small enough"
    limits = dict(LIMITS)
    if row["precision"] != "32.32":  # two that round, each so far from the exact one
        limits = {"loss": 5e-3, "changes": 2 * float(row["rounding"])}
    elif row[
        "mixing"
    ]:  # slots from zero: where a gradient nearly cancels, an array is all rounding
        limits = {kind: LIMITS[kind] for kind in ("loss", "changes")}
    return all(float(row[f"{k}_difference"]) < most for k, most in limits.items())


def rounding(case, start, wanted):
    "How far the recipe in 16 bits is from the one in float32 after a step: the changes' difference"
    spec, wide = ModelSpec.from_case(case, num_classes=CLASSES), replace(case, precision="32.32")
    images, labels = (v[0] for v in make_images(case, CLASSES))
    parts = (
        {n: w for n, w in start.items() if n.startswith("slots/") is slots}
        for slots in (False, True)
    )
    weights, slots, *_ = reference_update(wide, spec, *parts, images, labels, 0.01)
    return max(change_differences(wanted, {**weights, **slots}, start).values())


def main(path, most=99):
    "One case for each network, the smallest first, then two steps of two; the file grows row by row"
    networks = {}
    for name, case in load_cases().items():
        networks.setdefault(ModelSpec.from_case(case).name, name)
    rows, path = [], Path(path)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    full = lambda r: r["precision"] if r.get("mixing") == "True" else None
    here = [r for r in rows if r["tensorflow"] == tf.__version__]
    done = {(r["network"], int(r["updates"]), full(r)) for r in here}
    wanted = [(n, 1, p) for n, p in FULL]
    wanted += [(n, 1, None) for n in sorted(networks)] + [(n, 2, None) for n in TWICE]
    if tuple(map(int, tf.__version__.split(".")[:2])) < (
        2,
        8,
    ):  # its CPU kernels have no gradient of group convolutions
        wanted = [w for w in wanted if "-G1-" in w[0]]
    for network, updates, precision in [w for w in wanted if w not in done][: int(most)]:
        row = measure(network, networks[network], updates, precision)
        print(row, flush=True)
        versions = {"tensorflow": tf.__version__}
        about = origin(f"CPU, {platform.machine()}", COMMAND, SEED, 1, versions)
        write_rows(path, [row], ("network", "updates", "precision", "mixing", "tensorflow"), about)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    main(*(sys.argv[1:] or [root / "results" / "ipu_standin.csv"]))
