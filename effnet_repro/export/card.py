"""`MODEL_CARD.md`: what a network is, what it was trained on, what it scored, and what it is not for.

The head is YAML, as model hubs read it. A card that somebody has edited is never replaced.
"""

import hashlib
import re
from pathlib import Path
from typing import Dict, List, Optional

import yaml

from effnet_repro import __version__
from effnet_repro.checkpoint import atomic_write
from effnet_repro.messages import shown
from effnet_repro.outside import read_json
from effnet_repro.runs import folder_of, read_rows
from effnet_repro.scaling import count

NAME = "MODEL_CARD.md"
_SEAL = re.compile(r"\n<!-- effnet-export ([0-9a-f]{16}) -->\n\Z")


def _seal(text):
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}\n<!-- effnet-export {mark} -->\n"


def _head(text) -> Optional[dict]:
    "The YAML head of a card that is as we wrote it, or None"
    found = _SEAL.search(text)
    if not found or _seal(text[: found.start()]) != text:
        return None
    return yaml.safe_load(text.split("---\n")[1])


def card_path(target: Path, fingerprint: str) -> Path:
    """Return where the card of `target` goes: MODEL_CARD.md beside it, or, where that is of another network or edited,
    a name with the file's in front."""
    path = target.parent / NAME
    try:
        head = _head(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return path
    except (OSError, UnicodeDecodeError):
        head = None
    same = head is not None and head.get("fingerprint") == fingerprint
    return path if same else target.parent / f"{target.name}.{NAME}"


def _known_of_run(source) -> Dict[str, object]:
    "config.json and validation.csv of the run that a file belongs to; {} and [] where there is none"
    try:
        run = folder_of(source)
        config = read_json(run / "config.json")
    except (OSError, ValueError):
        return {"config": {}, "rows": []}
    return {"config": config, "rows": read_rows(run / "validation.csv")[0]}


def _data_name(config):
    data = config.get("data") or {}
    if data.get("builtin"):
        return "the built-in sample set (crops of ten photographs)"
    root = str(data.get("root") or "")
    return Path(root).name if root else ""


def _results(rows, image_size) -> List[dict]:
    "Rows of validation.csv at the exported size, as numbers"
    found = []
    for row in rows:
        try:
            if int(row["image_size"]) != image_size:
                continue
            own = {"top1": float(row["top1"]), "top5": float(row["top5"])}
            found.append({"weights": row["weights"], **own, "images": int(row["pictures"])})
        except (KeyError, ValueError):
            continue
    return found


def _table(rows):
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *(list(map(str, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _model_index(subject, data, results):
    metric = lambda row: {
        "type": "accuracy",
        "value": row["top1"],
        "name": f"top-1 ({row['weights']})",
    }
    return [
        {
            "name": subject.spec.name,
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": data, "type": "image-folder"},
                    "metrics": [metric(row) for row in results],
                }
            ],
        }
    ]


_WHAT = """\
An EfficientNet-{network} that classifies images, written by effnet_repro {version}, a reproduction of
*Making EfficientNet More Efficient* (arXiv:2106.03640). It sees {size} x {size} pixels and needs {macs:,.0f} million
multiply-adds an image."""
_CHECKED = """\
Each file was opened by its own runtime and agreed with the network on noise and on photographs. `difference` is the
largest of any logit, as a share of the largest logit."""
_USE = """\
Input `images`: uint8, (N, {size}, {size}, 3), red, green, blue, 0 to 255. Resize the short side to {short} pixels
({resizing}) and take {crop}. Output `logits`: float32, (N, {n}); their softmax are probabilities. Class names and this
rule are in the file's metadata."""
_TERMS = """\
The program is under the Apache License 2.0. Weights may be bound by the terms of the images that they were trained on:
ask whoever owns these."""
_LIMITS = """\
The network knows its {n} classes only, and gives one of them to any image. A probability is not calibrated.
Images unlike those it was trained on (other cameras, drawings, other sizes of the subject) lower its accuracy. What
the data lacks or is unfair about, the network lacks or is unfair about. It was not checked for uses that decide about
people."""

_RECIPE = (
    "epochs max_steps global_batch_size optimizer learning_rate lr_schedule weight_decay weight_average_decay "
    "label_smoothing mixup_alpha cutmix_lambda image_resize"
).split()


def _recipe(case):
    values = {name: getattr(case, name) for name in _RECIPE}
    return _table([{"field": n, "value": v} for n, v in values.items() if v is not None])


def _trained_on(config):
    "The sentence about the training images"
    data, images = _data_name(config), config.get("pictures") or {}
    if not data:
        return "The file does not say on what it was trained."
    amount = f", {images['train']:,} images" if images.get("train") else ""
    return f"It was trained on {data}{amount}."


def _score_table(results, size):
    "Scores of the weights, in percent"
    if not results:
        return f"No validation of these weights at {size} pixels is known."
    percent = lambda row: {name: f"{row[name]:.2%}" for name in ("top1", "top5")}
    return _table([{**row, **percent(row)} for row in results])


def _sections(subject, known, results, files) -> List[str]:
    "The card's paragraphs"
    config, case, spec = known["config"], subject.case, subject.spec
    size, n = subject.image_size, len(subject.class_names)
    macs = count(spec, size).macs / 1e6
    names = ", ".join(map(str, subject.class_names[:20])) + (", ..." if n > 20 else "")
    how = subject.metadata["preprocessing"]
    use = _USE.format(size=size, n=n, short=how["short_side"], **how)
    measured = "One run; `images` is how many were measured." if results else ""
    return [
        f"# {spec.name}, {n} classes",
        _WHAT.format(size=size, network=spec.size, version=__version__, macs=macs),
        "## Files",
        _table(files),
        _CHECKED,
        "## Use",
        use,
        f"Classes: {names}",
        "## Data and recipe",
        f"{_trained_on(config)} Case {case.name}, seed {config.get('seed', 'not known')}.",
        _recipe(case) if config else "",
        "## Results",
        _score_table(results, size),
        " ".join(filter(None, (measured, *subject.notes))),
        "## License",
        _TERMS,
        "## Limits",
        _LIMITS.format(n=n),
    ]


def write_card(subject, target: Path, about: dict, license: str = "other") -> Path:
    """Write the card of a file, and return its path.

    - `target`: the file; the card lies beside it.
    - `about`: of the file: format, runtime, difference, MB.
    - `license`: for the card's head, as model hubs spell it.
    """
    path, known = card_path(target, subject.fingerprint), _known_of_run(subject.source)
    head = _head(path.read_text(encoding="utf-8")) if path.exists() else None
    others = [f for f in (head or {}).get("files", ()) if f["file"] != target.name]
    files = [*others, {"file": target.name, **about}]
    results = _results(known["rows"], subject.image_size)
    data = _data_name(known["config"])
    top = {
        "license": license,
        "library_name": "effnet_repro",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "efficientnet", *sorted({f["format"] for f in files})],
        "fingerprint": subject.fingerprint,
        "files": files,
    }
    if results and data:
        top["model-index"] = _model_index(subject, data, results)
    text = yaml.safe_dump(top, sort_keys=False, allow_unicode=True, width=1000)
    paragraphs = [p for p in _sections(subject, known, results, files) if p]
    text = f"---\n{text}---\n\n" + "\n\n".join(paragraphs) + "\n"
    atomic_write(path, _seal(shown(text)).encode())
    return path
