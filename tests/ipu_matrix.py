"""Every network of the thirty cases makes one update on the stand-in: python tests/ipu_matrix.py [OUT.csv]

Writes results/ipu_standin.csv: the difference to the written-out recipe (tests/ipu_reference.py), relative
to the largest value of each array. Minutes a network: tests/test_ipu.py runs one of them, and short ones.
"""

import csv
import datetime
import platform
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent))

import ipu_standin  # noqa: E402
from ipu_reference import fresh_slots, make_pictures, reference_update  # noqa: E402
from test_ipu import CLASSES, program, small, worst_difference  # noqa: E402

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import load_cases  # noqa: E402
from effnet_repro.network import initial_weights  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402


def measure(name):
    "A row: how far one update of a case's network is from the recipe"
    case, began = small(name), time.perf_counter()
    spec = ModelSpec.from_case(case, num_classes=CLASSES)
    images, labels = make_pictures(case, CLASSES)
    weights = initial_weights(spec, seed=1)
    with ipu_standin.install(check_divergence=False):
        p = program(case, images, labels)
        ipu.set_state(p, weights)
        ((loss, _),) = p.run(0.01)
        got = ipu.get_state(p)
    wanted = reference_update(
        case, spec, weights, fresh_slots(case, spec), images[0], labels[0], 0.01
    )
    return {
        "network": spec.name,
        "case": name,
        "stages": case.num_stages,
        "replicas": case.num_replicas,
        "gradient_accumulation": case.gradient_accumulation,
        "image_size": case.image_size,
        "precision": case.precision,
        "arrays": len(got),
        "weights_difference": f"{worst_difference(got, wanted[0]):.2e}",
        "slots_difference": f"{worst_difference(got, wanted[1]):.2e}",
        "loss_difference": f"{abs(loss - wanted[2]) / wanted[2]:.2e}",
        "ran_on": "CPU stand-in",
        "n": 1,
        "seed": 1,
        "seconds": round(time.perf_counter() - began, 1),
        "device": f"CPU, {platform.machine()}",
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(path):
    "One case for each network, the smallest first; the file grows row by row"
    networks = {}
    for name, case in load_cases().items():
        networks.setdefault(ModelSpec.from_case(case).name, name)
    done, path = [], Path(path)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            done = list(csv.DictReader(file))
    for network in sorted(networks):
        if network in {row["network"] for row in done}:
            continue
        done.append(measure(networks[network]))
        print(done[-1], flush=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, done[0])
            writer.writeheader()
            writer.writerows(sorted(done, key=lambda row: row["network"]))


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    main(sys.argv[1] if len(sys.argv) > 1 else root / "results" / "ipu_standin.csv")
