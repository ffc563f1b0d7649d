"""How long a case takes on GPUs, and what it waits for: from measured rates, none of them measured here.

The rates of training steps are those of an H100; those of readers are what `effnet-train` took from them on an H200
with 16 cores (`gpu_rates.json`, which `collect` makes from the tables in `results/`). Networks whose training step was
not measured are projected: the measured ones handle about the same number of activations a second (`scaling.count`).
"""

import csv
import json
from pathlib import Path
from statistics import median
from typing import Dict, List, NamedTuple

from effnet_repro.config import Case, unknown_name
from effnet_repro.scaling import count

IMAGENET = 1281167  # Training images
# What a run of `gpu_use.csv` reads, as `plan_gpus` calls it
_READERS = {
    "photographs": "photographs, GPU",
    "photographs, cores alone": "photographs",
    "packed, jpeg 256": "jpeg 256",
    "packed, jpeg 256, GPU": "jpeg 256, GPU",
    "packed, raw 192": "raw 192",
}
RATES = "gpu_rates.json"


class GPUPlan(NamedTuple):
    """A case on GPUs, fed by one reader."""

    reader: str
    gpus: int
    step_images_per_s: float  # Of all GPUs
    reader_images_per_s: float  # Of the cores of all GPUs
    projected: str  # What of these was not measured: "", "step", "reader" or "step, reader"
    hours: float  # For the epochs of the case

    @property
    def bottleneck(self) -> str:  # What the other waits for
        return "GPU" if self.step_images_per_s <= self.reader_images_per_s else "reader"


def collect(folder: Path) -> dict:
    """Return the rates that `plan_gpus` needs, from the tables of measured results in a folder."""

    def rows(name):
        with (Path(folder) / name).open(newline="") as file:
            return list(csv.DictReader(file))

    steps = {}
    for row in rows("gpu_speed.csv"):
        if row["mode"] == "train" and row["name"].endswith(("-Native", "-Half")):
            steps[f"{row['name'].rpartition('-')[0]} {row['image_size']}"] = float(
                row["images_per_s"]
            )
    shares = [
        float(r["of_bare_step"]) for r in rows("gpu_use.csv") if r["run"].endswith("defaults")
    ]
    readers = {}
    for row in rows("gpu_use.csv"):  # trainings that waited for their readers
        name = _READERS.get(row["run"])
        if name and row["case"].startswith("B0-G16-LN_PN-Half_"):
            readers[name] = {"images_per_s": float(row["images_per_s"]), "projected": False}
    first = rows("gpu_speed.csv")[0]
    origin = {n: first[n] for n in ("device", "revision", "date")}
    origin["versions"], origin["command"] = (
        json.loads(first["versions"]),
        "python tests/test_gpu_plan.py",
    )
    origin.update(uncommitted_changes=first["uncommitted_changes"] == "True")
    origin.update(seed=int(first["seed"]), n=int(first["n"]))
    return {"of_bare_step": median(shares), "steps": steps, "readers": readers, **origin}


def rates() -> dict:
    """Return the measured rates that come with this package."""
    return json.loads(Path(__file__).with_name(RATES).read_text(encoding="utf-8"))


def step_rate(case: Case, known: dict) -> tuple:
    """Return images a second of one GPU's training step, and whether it is projected."""
    arm, size = case.name.rpartition("_16IPU")[0].rpartition("-")[0], case.image_size
    share = min(known["of_bare_step"], 1.0)
    exact = known["steps"].get(f"{arm} {size}")
    if exact is not None:
        return exact * share, False
    kind = "G1-" if case.group_size == 1 else "G16-"
    per_activation = [
        rate * count(name.split()[0], int(name.split()[1])).activations
        for name, rate in known["steps"].items()
        if kind in name
    ]
    return median(per_activation) / count(case, size).activations * share, True


def _is_large_enough(reader: str, case: Case) -> bool:
    """Return whether images of a set that was packed to a short side serve a case, whose validation scales them to
    256/224 of its image size."""
    kind, _, side = reader.partition(",")[0].partition(" ")
    return kind not in ("raw", "jpeg") or int(side) * 224 >= case.image_size * 256


def plan_gpus(
    case: Case,  # Its network, image size and epochs
    gpus: int = 1,  # Of one host, with 16 cores each
    reader: str = "",  # One of the readers in `rates()`; "" = all whose images are large enough
    images: int = IMAGENET,  # Of an epoch
) -> List[GPUPlan]:  # A plan for each reader, the fastest first
    """Say how many hours the epochs of a case take, and whether GPUs or readers are what it waits for.

    More GPUs than one, with their cores, are taken to be as many times as fast. Raises ValueError for a reader that
    nobody measured, and for a packed set whose images are too small for the case.
    """
    known = rates()
    if reader and reader not in known["readers"]:
        raise unknown_name("reader", reader, known["readers"])
    fitting = [name for name in known["readers"] if _is_large_enough(name, case)]
    if reader and reader not in fitting:
        raise ValueError(
            f"A set packed as {reader!r} has too few pixels for {case.image_size} px, whose validation needs a short "
            f"side of {case.image_size * 256 // 224}. Use one of: {', '.join(fitting)}."
        )
    step, projected = step_rate(case, known)
    found = []
    for name, row in known["readers"].items():
        if name in fitting and reader in ("", name):
            fed = row["images_per_s"] * gpus
            seconds = case.epochs * images / min(step * gpus, fed)
            parts = ["step"] * projected + ["reader"] * row["projected"]
            found.append(GPUPlan(name, gpus, step * gpus, fed, ", ".join(parts), seconds / 3600))
    return sorted(found, key=lambda p: p.hours)


def plan_rows(plans: List[GPUPlan]) -> List[Dict[str, object]]:
    """Return the plans as rows of a table."""
    return [
        {
            "reader": p.reader,
            "GPUs": p.gpus,
            "step, images/s": round(p.step_images_per_s),
            "reader, images/s": round(p.reader_images_per_s),
            "waits for": p.bottleneck,
            "projected": p.projected or "-",
            "hours": round(p.hours, 1),
        }
        for p in plans
    ]
