"""Two runs side by side: in which fields they differ, how they learned, and what they scored."""

import math
from typing import Any, Dict, List, NamedTuple

from effnet_repro.outside import read_json
from effnet_repro.paths import local_path
from effnet_repro.runs.tables import read_rows

#: Columns of metrics.csv that are compared, in this order; a run that never validated has the first two.
CURVES = ("loss", "accuracy", "validation_loss", "validation_top1")
SCORES = ("top1", "top5", "loss")
#: What differs between any two runs and says nothing about them.
_NOT_TOLD = {"date", "skipped_pictures", "published", "case", "pictures", "data", "versions"}


class Story(NamedTuple):
    """What a run folder says of a run."""

    name: str  # Of the folder, as the user wrote it
    fields: Dict[str, Any]  # The case's fields, and what else was chosen or found
    curves: Dict[float, Dict[str, float]]  # epoch -> column of metrics.csv -> value
    scores: Dict[str, Dict[str, float]]  # weights and pixels -> column of validation.csv -> value


def _numbers(row: Dict[str, str], names) -> Dict[str, float]:
    "The finite numbers of a row; empty cells, and those of a run that diverged, are left out"
    found = {}
    for name in names:
        try:
            value = float(row.get(name) or "nan")
        except ValueError:
            continue
        if math.isfinite(value):
            found[name] = value
    return found


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _chosen(config: dict, machine: dict) -> Dict[str, Any]:
    "The fields of the case, then the run's other choices, its data and its machine, under plain names"
    images, data = _dict(config.get("pictures")), _dict(config.get("data"))
    fields = dict(_dict(config.get("case")))
    fields["case"] = fields.pop("name", None)
    fields.update({n: v for n, v in config.items() if n not in _NOT_TOLD})
    fields.update({f"{split} images": n for split, n in images.items()})
    fields["data"] = data.get("root")
    fields.update({n: v for n, v in machine.items() if n not in _NOT_TOLD})
    fields.update(_dict(machine.get("versions")))
    return fields


def read_story(run_dir) -> Story:
    """Read what a run left in its folder. ValueError where it is no run folder, or a file in it is damaged."""
    folder = local_path(run_dir, "run_dir")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}. Give the folder of a run, which --run-dir named.")
    machine, config = folder / "environment.json", read_json(folder / "config.json")
    if not _dict(config.get("case")).get("name"):
        raise ValueError(
            f"{folder}/config.json does not say which case it belongs to: no run wrote it."
        )
    fields = _chosen(config, read_json(machine) if machine.is_file() else {})
    curves, scores = {}, {}
    for name in ("metrics.csv", "validation.csv"):
        rows, wrong = read_rows(folder / name)
        if wrong:
            raise ValueError(f"{wrong[0]} Mend it, or move it away.")
        for row in rows:
            if name == "metrics.csv":
                epoch = _numbers(row, ["epoch"]).get("epoch")
                if epoch is not None:
                    curves[epoch] = _numbers(row, CURVES)
            else:
                pixels = row.get("image_size")
                scores[f"{row.get('weights')}, {pixels} px"] = _numbers(row, SCORES)
    return Story(str(run_dir), fields, curves, scores)


def differing(a: Story, b: Story) -> List[dict]:
    """Return the fields in which two runs differ, a row each: `field`, `a`, `b` (None where a run has none)."""
    names = dict.fromkeys([*a.fields, *b.fields])
    pairs = ((n, a.fields.get(n), b.fields.get(n)) for n in names)
    return [{"field": n, "a": x, "b": y} for n, x, y in pairs if x != y]


def curves(a: Story, b: Story, most: int = 12) -> List[dict]:
    """Return the curves of two runs, a row for each epoch of either; of more than `most`, some, the last among them."""
    epochs = sorted({*a.curves, *b.curves})
    if len(epochs) > most:
        epochs = [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]
    known = [n for n in CURVES if any(n in row for s in (a, b) for row in s.curves.values())]
    return [
        {
            "epoch": epoch,
            **{
                f"{n} {k}": s.curves.get(epoch, {}).get(n)
                for n in known
                for k, s in zip("ab", (a, b))
            },
        }
        for epoch in epochs
    ]


def scores(a: Story, b: Story) -> List[dict]:
    """Return what two runs scored: `weights`, `score`, `a`, `b`, and `b - a` where both have it."""
    rows = []
    for weights in dict.fromkeys([*a.scores, *b.scores]):
        for name in SCORES:
            x, y = (s.scores.get(weights, {}).get(name) for s in (a, b))
            if x is not None or y is not None:
                less = None if x is None or y is None else y - x
                rows.append({"weights": weights, "score": name, "a": x, "b": y, "b - a": less})
    return rows
