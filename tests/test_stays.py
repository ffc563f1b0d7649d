"""What stays: names that others import, flags, parameters, columns, keys and exit statuses.

`tests/data/stays.json` lists them. More may come; what is listed may not go or change.
`python tests/test_stays.py` adds to the list what is new.
"""

import ast
import csv
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import tiny
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import cli

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "data" / "stays.json"
KEPT = json.loads(LIST.read_text())
RUNS = ("40_train", "41_finetune", "42_validate")
EPOCH = {"global_batch_size": 600, "micro_batch_size": 300, "epochs": 1, "max_steps": 2}


def lost(kept, found, where=""):
    "What `kept` has and `found` has not, a line each. Dictionaries and lists may grow."
    if isinstance(kept, dict) and isinstance(found, dict):
        gone = [f"{where}/{key} is gone" for key in kept if key not in found]
        inner = [lost(kept[k], found[k], f"{where}/{k}") for k in kept if k in found]
        return gone + sum(inner, [])
    if isinstance(kept, list) and isinstance(found, list):
        return [f"{where}: {one} is gone" for one in kept if one not in found]
    return [] if kept == found else [f"{where}: {found!r} in place of {kept!r}"]


# ---------------------------------------------------------------- import paths


def imported_names(text):
    "Module -> public names that a program imports from this package."
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effnet_repro"):
            names = [a.name for a in node.names if not a.name.startswith("_") and a.name != "*"]
            found.setdefault(node.module, []).extend(names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("effnet_repro"):
                    found.setdefault(alias.name, [])
    return found


def programs():
    "What a reader of the pages and of the README would type or copy, a text each."
    fenced = re.compile(r"(?ms)^```python\n(.*?)^```")
    yield from fenced.findall((ROOT / "README.md").read_text())
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                yield from fenced.findall(text)
            elif not re.search(r"(?m)^#\| *exporti?s?\b", text):
                yield re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text)


def import_paths():
    "Module -> names, for every import on a page."
    found = {}
    for text in programs():
        for module, names in imported_names(text).items():
            if "._" not in module:
                found.setdefault(module, set()).update(names)
    return {module: sorted(names) for module, names in sorted(found.items())}


def not_importable(paths):
    "Names of `paths` (module -> names) that cannot be imported."
    wrong = []
    for module, names in paths.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            wrong.append(f"{module}: {error}")
            continue
        for name in names:
            if not hasattr(found, name):
                try:
                    importlib.import_module(f"{module}.{name}")
                except ImportError:
                    wrong.append(f"{module}.{name}")
    return wrong


def test_import_paths_stay():
    assert not_importable(KEPT["imports"]) == []


# ---------------------------------------------------------------- commands and run notebooks


def flags():
    "Command -> flag or argument -> how many values follow it."
    found = {}
    for name, command in sorted(cli.COMMANDS.items()):
        values = {}
        for action in command.parser()._actions:
            for word in action.option_strings or [action.dest]:
                values[word] = 1 if action.nargs is None else action.nargs
        found[name] = values
    return found


def parameters():
    "Run notebook -> parameter -> its default."
    found = {}
    for name in RUNS:
        cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
        (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        body = ast.parse("".join(cell["source"])).body
        found[name] = {n.targets[0].id: ast.literal_eval(n.value) for n in body}
    return found


def test_flags_stay():
    assert lost(KEPT["flags"], flags()) == []


def test_notebook_parameters_stay():
    assert lost(KEPT["parameters"], parameters()) == []


def test_exit_statuses_stay():
    assert lost(KEPT["exit statuses"], [str(n) for n in cli.EXIT_STATUSES]) == []


def test_commands_stay():
    commands = re.findall(r"(?m)^effnet-(\w+) = ", (ROOT / "pyproject.toml").read_text())
    assert lost(sorted(KEPT["flags"]), commands) == []


# ---------------------------------------------------------------- files of a run


def shared_keys(names):
    "Names of arrays without their block: `all/block2a/b/SE/...` is `all/*/b/SE/...`."
    return sorted({re.sub(r"/block\w+", "/*", name) for name in names})


def files_of(run):
    "File of a run -> its columns or keys."
    from effnet_repro import checkpoint

    def columns(name):
        with (run.run_dir / name).open(newline="") as file:
            return next(csv.reader(file))

    def keys(name):
        return sorted(json.loads((run.run_dir / name).read_text()))

    def parts(path):
        arrays, metadata = checkpoint.load(path)
        return {"arrays": shared_keys(arrays), "metadata": sorted(metadata)}

    config = json.loads((run.run_dir / "config.json").read_text())
    return {
        "metrics.csv": columns("metrics.csv"),
        "validation.csv": columns("validation.csv"),
        "config.json": sorted(config),
        "config.json, case": sorted(config["case"]),
        "environment.json": keys("environment.json"),
        "checkpoint": parts(run.checkpoint),
        "average": parts(run.average),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "One epoch of the small network, validated."
    from effnet_repro.training import train

    options = {**SMOKE, **EPOCH, "validate_every": 1}
    return train(TINY, run_dir=tmp_path_factory.mktemp("run"), **options)


def test_files_of_a_run_stay(run):
    assert lost(KEPT["files"], files_of(run)) == []


# ---------------------------------------------------------------- the checks see mistakes


def test_losses_are_seen(monkeypatch):
    kept = {"a": {"--x": 1, "--y": 0}, "b": ["p", "q"]}
    assert lost(kept, {"a": {"--x": 1, "--y": 0, "--z": 2}, "b": ["r", "q", "p"], "c": 1}) == []
    assert lost(kept, {"a": {"--x": 1}, "b": ["q"]}) == ["/a/--y is gone", "/b: p is gone"]
    assert lost(kept, {"a": {"--x": "+", "--y": 0}, "b": ["p", "q"]}) == [
        "/a/--x: '+' in place of 1"
    ]
    gone = {"effnet_repro.config": ["get_case", "no_such"], "effnet_repro.no_such": []}
    assert [line.partition(":")[0] for line in not_importable(gone)] == [
        "effnet_repro.config.no_such",
        "effnet_repro.no_such",
    ]
    text = "from effnet_repro.ops import get_ops, _hidden\nimport effnet_repro.cli, os"
    assert imported_names(text) == {"effnet_repro.ops": ["get_ops"], "effnet_repro.cli": []}
    assert shared_keys(["all/block2a/b/x", "all/block3a/b/x"]) == ["all/*/b/x"]


def grown(kept, found):
    "`kept` with what is new in `found`."
    if isinstance(kept, dict):
        more = {k: v for k, v in found.items() if k not in kept}
        return {**{k: grown(v, found[k]) if k in found else v for k, v in kept.items()}, **more}
    if isinstance(kept, list):
        return kept + [v for v in found if v not in kept]
    return kept


if __name__ == "__main__":
    import tempfile

    from effnet_repro.training import train

    tiny.shrink()
    with tempfile.TemporaryDirectory() as folder:
        made = files_of(train(TINY, run_dir=folder, **{**SMOKE, **EPOCH, "validate_every": 1}))
    now = {
        "imports": import_paths(),
        "flags": flags(),
        "parameters": parameters(),
        "exit statuses": [str(n) for n in cli.EXIT_STATUSES],
        "files": made,
    }
    LIST.write_text(json.dumps(grown(KEPT, now), indent=1) + "\n")
    sys.exit("\n".join(lost(KEPT, now)) or 0)
