"""Writes rows into `results/`. A row must say where, when, by what and how often it was measured; others are refused.

A page reads its numbers from these files, so that each can be followed to a command. `write_rows` adds what it can find
out itself (versions, revision, date); whoever measures says the rest (device, command, seed, n).
"""

from __future__ import annotations

import csv
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from effnet_repro.outside import read_json
from effnet_repro.paths import local_path
from effnet_repro.runs import append_rows, describe_machine, git, write_json

#: What every row has to say besides its numbers.
REQUIRED = ("device", "versions", "command", "revision", "uncommitted_changes", "seed", "n", "date")
#: `seed` of a row whose command draws nothing at random, or sets no seed.
NO_SEED = "none"


def portable(command: Sequence[str]) -> str:
    """Return a command line in one string, without the folders of this machine.

    `command` is a list of words, such as `["python", "tests/bench_cpu.py", *sys.argv[1:]]`. An absolute path becomes
    `$DATA/` and its last part; a word with spaces gets quotes.
    """
    words = []
    for word in map(str, command):
        flag, equals, value = word.rpartition("=")
        if value.startswith("/") or re.match(r"[A-Za-z]:[\\/]", value):
            word = f"{flag}{equals}$DATA/{re.split(r'[/]+', value.rstrip('/'))[-1]}"
        words.append(f'"{word}"' if re.search(r"\s", word) else word)
    return " ".join(words)


def revision() -> Dict[str, object]:
    """Return `revision` and `uncommitted_changes` of the program that measures.

    Files under `results/` do not count as changes: a program that writes several rows would call itself changed after
    the first. A copy of the tree on another machine has no git; there the variable `EFFNET_REVISION` says it, as
    `git describe --always --abbrev=40 --dirty` prints it.
    """
    given = os.environ.get("EFFNET_REVISION")
    if given:
        return {
            "revision": re.sub("-dirty$", "", given),
            "uncommitted_changes": given.endswith("-dirty"),
        }
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
    return {"revision": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}


def origin(
    device: str,
    command: Sequence[str],
    seed: object,
    n: int,
    versions: Optional[Dict[str, str]] = None,
) -> Dict[str, object]:
    """Return what `write_rows` requires of every row, found on this machine.

    - `device`: what computed, such as "CPU, 2 cores".
    - `command`: words of the command that writes the row again; see `portable`. A string is taken as it is.
    - `seed`: the seed of everything drawn, or `NO_SEED`.
    - `n`: how many measurements the row sums up.
    - `versions`: of packages that `runs.describe_machine` does not look for, such as torch.
    """
    machine = describe_machine("", device)
    return {
        "device": device,
        "versions": {**machine["versions"], "python": machine["python"], **(versions or {})},
        "command": command if isinstance(command, str) else portable(command),
        **revision(),
        "seed": seed,
        "n": n,
        "date": machine["date"],
    }


def origin_of_run(run_dir, command: Sequence[str], n: int = 1) -> Dict[str, object]:
    """Return what `write_rows` requires, as a run noted it when it began, and `backend` and `data_fingerprint`.

    - `run_dir`: folder of the run: its environment.json and config.json are read.
    - `command`: words of the command, or a string, with the data folder as a variable.
    - `n`: how many runs the row sums up.
    """
    machine, config = (read_json(Path(run_dir) / f"{n}.json") for n in ("environment", "config"))
    names = ("device", "revision", "uncommitted_changes", "date", "backend")
    return {
        **{k: machine[k] for k in names},
        "versions": {**machine["versions"], "python": machine["python"]},
        "command": command if isinstance(command, str) else portable(command),
        "seed": config["seed"],
        "n": n,
        "data_fingerprint": config.get("data_fingerprint", ""),
    }


def write_curve(path, run_dir, command: Sequence[str]) -> None:
    """Write a run's metrics.csv, a row for each epoch, as a result.

    - `path`: the file; rows of the same case, seed and epoch are replaced.
    - `run_dir`, `command`: as in `origin_of_run`.
    """
    with (Path(run_dir) / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    config = read_json(Path(run_dir) / "config.json")
    rows = [{"case": config["case"]["name"], **row} for row in rows]
    write_rows(path, rows, ("case", "seed", "epoch"), origin_of_run(run_dir, command))


def missing(row: Dict[str, object]) -> List[str]:
    """Return what is wrong with a row's account of where it is from; nothing, if it can be traced."""
    text = {k: "" if row.get(k) is None else str(row[k]).strip() for k in REQUIRED}
    wrong = [f"no {name}" for name in REQUIRED if not text[name]]
    checks = {
        "revision": lambda v: re.fullmatch("[0-9a-f]{7,40}", v),
        "uncommitted_changes": lambda v: v in ("True", "False"),
        "n": lambda v: v.isdigit() and int(v) > 0,
        "seed": lambda v: v == NO_SEED or re.fullmatch(r"-?\d+( to \d+)?", v),
        "date": _is_date,
    }
    return wrong + [
        f"{name} is {text[name]!r}"
        for name, good in checks.items()
        if text[name] and not good(text[name])
    ]


def _is_date(text):
    try:
        return bool(datetime.strptime(text[:10], "%Y-%m-%d"))
    except ValueError:
        return False


def _complete(row, where):
    versions = row.get("versions")
    row = {**row, "versions": json.dumps(versions) if isinstance(versions, dict) else versions}
    wrong = missing(row)
    if wrong:
        raise ValueError(
            f"A result for {where} does not say where it is from ({'; '.join(wrong)}). Measure it in a git checkout, "
            "or set EFFNET_REVISION; give device, command, seed and n to `results.origin`."
        )
    return row


def write_rows(
    path,
    rows: Sequence[Dict[str, object]],
    key: Sequence[str],
    about: Optional[Dict[str, object]] = None,
) -> None:
    """Write result rows into a CSV file, in place of older rows of the same key.

    - `path`: the file, usually in `results/`; made when missing. Other rows stay as they are.
    - `rows`: dictionaries of numbers and labels.
    - `key`: names of the columns that tell rows apart.
    - `about`: what `origin` returns; added to every row. A row's own value comes first.

    Raises `ValueError` when a row lacks one of `REQUIRED`, and writes nothing then.
    """
    whole = [_complete({**(about or {}), **row}, path) for row in rows]
    # Numbers and labels first, then where they are from.
    ordered = [
        {
            k: "" if row[k] is None else row[k]
            for k in [*(k for k in row if k not in REQUIRED), *REQUIRED]
        }
        for row in whole
    ]
    new = {tuple(str(row[k]) for k in key) for row in ordered}
    append_rows(path, ordered, lambda old: tuple(old.get(k) or "" for k in key) not in new)


def write_values(path, values: Dict[str, object], about: Dict[str, object]) -> None:
    """Write one result that is no table into a JSON file, with the same account as a row."""
    whole = {**values, **_complete({**about, **values}, path)}
    write_json(path, {**whole, "versions": json.loads(whole["versions"])})


def untraceable(path) -> List[str]:
    """Return a line for each row of a result file that does not say where it is from."""
    path = local_path(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [json.load(file)] if path.suffix == ".json" else list(csv.DictReader(file))
    found = [f"{path.name}, row {i}: {w}" for i, row in enumerate(rows, 1) for w in missing(row)]
    return found or ([] if rows else [f"{path.name} has no rows"])


def _family(name):
    found = re.search(r"(?:efficientnet_?|^)(b\d)(?![0-9a-z])", name, re.IGNORECASE)
    return found[1].lower() if found else None


def best_peer(
    rows: Sequence[Dict[str, object]],
    ours: Dict[str, object],
    image_size: Optional[int] = None,
    columns: Sequence[str] = ("name", "mode", "images_per_s"),
    same_call: bool = True,
) -> Optional[Dict[str, object]]:
    """Return the fastest network of another library that one of our networks may be compared with.

    It is an EfficientNet of the same size, measured in the same call and in the same mode. None, if there is none.

    - `rows`: dictionaries of a speed file.
    - `ours`: the row of our network.
    - `image_size`: only peers of this size, pixels; None = of any size.
    - `columns`: what the file calls name, mode and speed.
    - `same_call`: False: where the call has no peer, take one of another call on the same kind of device.
    """
    name, mode, speed = columns
    peers = [
        row
        for row in rows
        if not re.match(r"B\d-", str(row[name]))
        and _family(str(row[name])) == _family(str(ours[name]))
        and (row.get("device"), row[mode]) == (ours.get("device"), ours[mode])
        and image_size in (None, int(row["image_size"]))
    ]
    near = [row for row in peers if str(row["call"]) == str(ours["call"])]
    peers = near or ([] if same_call else peers)
    return max(peers, key=lambda row: float(row[speed]), default=None)
