"""What holds for the project as a whole: order of the notebooks, light imports, Python 3.8, packaging.

Each rule is a function that lists what breaks it, and is shown to find a planted mistake.
"""

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import tree  # noqa: E402

PACKAGE = ROOT / "effnet_repro"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNS = ("40_train", "41_finetune", "42_validate")
# These need Keras when they are imported; nothing else does.
WITH_KERAS = {"efficientnet", "training", "export"}
# The base install, and so all that a module may import at its top.
BASE = {"numpy", "yaml", "safetensors", "effnet_repro"}

by_stem = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_module = pytest.mark.parametrize("module", MODULES)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def directives(cell):
    return [line[2:].strip() for line in source(cell).splitlines() if line.startswith("#|")]


def parsed(cell):
    "The cell's statements, without IPython's `%` and `!` lines."
    text = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source(cell))
    return ast.parse(text).body


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


# ---------------------------------------------------------------- imports point down


def own_imports(text):
    "Names of this package's modules that a module imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").split(".")[0] == "effnet_repro":
                inner = (node.module or "").replace("effnet_repro", "").strip(".")
                found |= {inner.split(".")[0]} if inner else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("effnet_repro.")
            }
    return found


def upward(order, module, text):
    "Imports of modules that stand at or after `module` in the reading order."
    later = order[order.index(module) :]
    return sorted(own_imports(text) & set(later))


def reading_order():
    "Modules in the order of their notebooks."
    order = []
    for path in NOTEBOOKS:
        for cell in read(path)["cells"]:
            for words in map(str.split, directives(cell)):
                if words[:1] == ["default_exp"]:
                    order.append(words[1].split(".")[-1])
    return order


def test_every_module_has_one_notebook():
    assert sorted(reading_order()) == MODULES


@by_module
def test_imports_point_down(module):
    assert upward(reading_order(), module, (PACKAGE / f"{module}.py").read_text()) == []


def test_imports_point_down_sees_mistakes():
    order = ["config", "ops", "norms"]
    assert upward(order, "ops", "from .config import Case\nimport numpy") == []
    assert upward(order, "ops", "from .norms import x") == ["norms"]
    assert upward(order, "ops", "def f():\n    from effnet_repro.norms import x") == ["norms"]
    assert upward(order, "ops", "from . import norms, config") == ["norms"]
    assert upward(order, "config", "import effnet_repro.ops") == ["ops"]


# ---------------------------------------------------------------- light imports

BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in {allowed!r} or top.startswith("_"):
            return None
        raise ImportError("blocked in this test: " + name)
import numpy, yaml, safetensors, safetensors.numpy
sys.meta_path.insert(0, Block())
import {module}
"""


def import_with_base_only(module, path=ROOT):
    code = BLOCKER.format(allowed=BASE | {Path(module.split(".")[0]).name}, module=module)
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("module", [m for m in MODULES if m not in WITH_KERAS])
def test_imports_with_the_base_install_only(module):
    "So that an IPU host needs neither Keras nor a TensorFlow of ours, and nothing loads by surprise."
    done = import_with_base_only(f"effnet_repro.{module}")
    assert done.returncode == 0, done.stderr


def test_light_imports_sees_mistakes(tmp_path):
    (tmp_path / "heavy.py").write_text("import keras\n")
    done = import_with_base_only("heavy", tmp_path)
    assert done.returncode and "blocked in this test: keras" in done.stderr


# ---------------------------------------------------------------- Python 3.8


def newer_than_38(path):
    "What in a file needs a Python newer than 3.8."
    text = path.read_text(encoding="utf-8")
    try:
        top = ast.parse(text, feature_version=(3, 8))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    wrong = []
    if not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in top.body):
        for node in ast.walk(top):
            for name in ("annotation", "returns"):
                note = getattr(node, name, None)
                for inner in ast.walk(note) if isinstance(note, ast.AST) else ():
                    if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.BitOr):
                        wrong.append(f"line {inner.lineno}: `X | Y` as a type")
    run = [sys.executable, "-c", "from vermin import main; main()", "-t=3.8-"]
    options = ["--eval-annotations", "--violations", "--no-tips"]
    done = subprocess.run([*run, *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        wrong += [line.strip() for line in done.stdout.splitlines() if "require" in line]
        wrong = wrong or [done.stdout + done.stderr]
    return wrong


@by_module
def test_runs_on_python_38(module):
    pytest.importorskip("vermin", reason="vermin is in the lock: run `make venv`")
    assert newer_than_38(PACKAGE / f"{module}.py") == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(x: int | None): pass",
        "def f(x: list[int]): pass",
        "with (open('a') as a, open('b') as b): pass",
        "match x:\n    case 1: pass",
        "y = 'ab'.removeprefix('a')",
        "z = {'a': 1} | {'b': 2}",
    ],
)
def test_python_38_sees_mistakes(tmp_path, text):
    pytest.importorskip("vermin", reason="vermin is in the lock: run `make venv`")
    (tmp_path / "new.py").write_text(text + "\n")
    assert newer_than_38(tmp_path / "new.py")


# ---------------------------------------------------------------- notebooks


def shape_errors(nb):
    "Where a notebook leaves the order: default_exp, title and sentence, imports in cells of their own."
    wrong, cells = [], nb["cells"]
    first = 0
    if any(d.startswith("default_exp") for c in cells for d in directives(c)):
        if directives(cells[0])[:1] == [] or not directives(cells[0])[0].startswith("default_exp"):
            wrong.append("the first cell is not `#| default_exp`")
        elif any(
            line.strip() and not line.startswith("#|") for line in source(cells[0]).splitlines()
        ):
            wrong.append("the first cell has more than `#| default_exp`")
        first = 1
    while first < len(cells) and "hide" in directives(cells[first]):
        first += 1
    title = cells[first]
    if title["cell_type"] != "markdown" or not re.match(r"# \S.*\n\s*\n?> \S", source(title)):
        wrong.append("the title cell is not `# Title` and `> one sentence`")
    elif first + 1 < len(cells) and not (
        cells[first + 1]["cell_type"] == "markdown" or re.search(r"(?m)^> .*\n\n\S", source(title))
    ):
        wrong.append("no paragraph after the title says why")
    exported = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        nodes = [n for n in parsed(cell) if not isinstance(n, ast.Pass)]
        if any(map(is_import, nodes)) and not all(map(is_import, nodes)):
            wrong.append(f"cell {number}: imports stand with other code:\n{source(cell)[:200]}")
        if any(d.split()[:1] in (["export"], ["exports"], ["exporti"]) for d in directives(cell)):
            exported.append(bool(nodes) and all(map(is_import, nodes)))
    if True in exported and exported.index(True) > 0:
        wrong.append("exported code stands before the exported imports")
    if "exports" in directives(cells[-1]):
        wrong.append(
            "the last cell is `#| exports`, on which nbdev's docs fail: end with its lesson"
        )
    for number, cell in enumerate(cells):
        for line in source(cell).splitlines() if cell["cell_type"] == "code" else ():
            # Quarto's options, such as an alt text, cannot be broken.
            if len(line) > 120 and not line.startswith("#|"):
                wrong.append(f"cell {number}: a line of {len(line)} characters: {line[:60]}...")
    return wrong


def output_errors(nb):
    "Outputs that should not be committed, and a page without any."
    wrong = []
    outputs = [(i, o) for i, c in enumerate(nb["cells"]) for o in c.get("outputs", [])]
    if not outputs and any(c["cell_type"] == "code" for c in nb["cells"]):
        wrong.append("no cell has an output: run the notebook and commit it with its outputs")
    for number, output in outputs:
        if output["output_type"] == "error":
            wrong.append(f"cell {number}: an error as output")
        if output.get("name") == "stderr":
            wrong.append(f"cell {number}: standard error as output")
        data = output.get("data", {})
        picture_only = any(k.startswith("image/") for k in data)
        shown = "" if picture_only else json.dumps([output.get("text"), data])
        for found in re.findall(r"/tmp/[\w.-]+| at 0x[0-9a-f]{6,}", shown):
            wrong.append(f"cell {number}: the output differs each time: {found}")
    return wrong


def parameter_errors(nb):
    "What is wrong with a run notebook's `parameters` cell, which papermill looks for."
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells have the tag `parameters`, not 1"]
    wrong, names = [], set()
    for node in ast.parse(source(tagged[0])).body:
        try:
            ast.literal_eval(node.value)
            names |= {target.id for target in getattr(node, "targets", None) or [node.target]}
        except (AttributeError, ValueError):
            wrong.append(f"line {node.lineno} of the parameters is not `name = literal`")
    return wrong + [
        f"no parameter `{n}`" for n in ("case", "data_dir", "run_dir") if n not in names
    ]


@by_stem
def test_notebook_order(path):
    assert shape_errors(read(path)) == []


@by_stem
def test_notebook_has_outputs(path):
    assert output_errors(read(path)) == []


@pytest.mark.parametrize("name", RUNS)
def test_run_notebook_has_parameters(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    if not path.exists():
        pytest.skip(f"nbs/{name}.ipynb is not written yet")
    assert parameter_errors(read(path)) == []


def cell(text, kind="code", outputs=(), tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": kind, "source": text, "outputs": list(outputs), "metadata": metadata}


GOOD = [
    cell("#| default_exp a"),
    cell("# A\n\n> What it is.", "markdown"),
    cell("Why it is there.", "markdown"),
    cell("#| export\nimport os"),
    cell("#| export\ndef f(): return os"),
    cell("f()", outputs=[{"output_type": "execute_result", "data": {"text/plain": "1"}}]),
]


def test_notebook_rules_accept_a_good_page():
    assert shape_errors({"cells": GOOD}) == [] and output_errors({"cells": GOOD}) == []
    page = GOOD[1:3] + [cell("%matplotlib inline\nimport os"), cell("!ls\n1")]
    assert shape_errors({"cells": page}) == []


@pytest.mark.parametrize(
    "cells, said",
    [
        (GOOD[1:2] + GOOD[:1] + GOOD[2:], "first cell is not"),
        ([cell("#| default_exp a\nx = 1")] + GOOD[1:], "first cell has more"),
        (GOOD[:1] + [cell("# A", "markdown")] + GOOD[2:], "title cell"),
        (GOOD[:2] + GOOD[3:], "no paragraph"),
        (GOOD + [cell("import re\nre.match")], "imports stand with other code"),
        (GOOD[:3] + [GOOD[4], GOOD[3]], "before the exported imports"),
        (GOOD + [cell("x = " + "1 + " * 40 + "1")], "a line of 165 characters"),
    ],
)
def test_notebook_order_sees_mistakes(cells, said):
    assert any(said in w for w in shape_errors({"cells": cells}))


@pytest.mark.parametrize(
    "output, said",
    [
        (None, "no cell has an output"),
        ({"output_type": "error"}, "an error"),
        ({"output_type": "stream", "name": "stderr", "text": "x"}, "standard error"),
        (
            {"output_type": "stream", "name": "stdout", "text": ["in /tmp/x1\n"]},
            "differs each time",
        ),
        (
            {"output_type": "display_data", "data": {"text/plain": "<A at 0x7f3a01b2c3d4>"}},
            "differs each time",
        ),
    ],
)
def test_notebook_outputs_sees_mistakes(output, said):
    nb = {"cells": GOOD[:5] + [cell("f()", outputs=[output] if output else [])]}
    assert any(said in w for w in output_errors(nb))


@pytest.mark.parametrize(
    "text, tags, said",
    [
        ("case = 'x'", (), "0 cells"),
        ("case = 'x'\ndata_dir = None", ("parameters",), "no parameter `run_dir`"),
        ("case = 'x'\ndata_dir = f()\nrun_dir = None", ("parameters",), "not `name = literal`"),
    ],
)
def test_parameters_sees_mistakes(text, tags, said):
    assert any(said in w for w in parameter_errors({"cells": [cell(text, tags=tags)]}))


# ---------------------------------------------------------------- files

MACHINE_PATH = re.compile(r"(?<![\w.:~$}/-])/(?:work|root|home/[a-z_]\w*|Users/\w+)/[\w.]|file:///")


def test_no_path_of_one_machine():
    wrong = []
    for name in tree.files():
        path = ROOT / name
        if (
            path.is_symlink()
            or name.parts[:2] == (".ci", "katex")
            or name.name in ("test_project.py", "test_site.py")
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{name}: {m[0]}" for m in MACHINE_PATH.finditer(text)]
    assert wrong == []


def test_machine_path_sees_mistakes():
    assert MACHINE_PATH.search("open('/home/ann/data')") and MACHINE_PATH.search(
        "in /root/.cache/x"
    )
    assert MACHINE_PATH.search("a /work/x b") and not MACHINE_PATH.search(
        "nbs/work/x https://a.org/home/b/c"
    )


def test_links_are_links():
    "On a checkout without symbolic links all would become text files."
    assert os.readlink(PACKAGE / "config.yml") == "../config.yml"
    assert os.readlink(PACKAGE / "pod16_model.json") == "../results/pod16_model.json"
    assert os.readlink(ROOT / "nbs" / "_quarto.yml") == "../_quarto.yml"


@pytest.mark.slow
def test_wheel(tmp_path):
    "An installed wheel finds the cases: it holds two data files, every module, and nothing else."
    copy = tree.copy(tmp_path / "copy")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-qq", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if ".dist-info/" not in n}
        assert file.read("effnet_repro/config.yml") == (ROOT / "config.yml").read_bytes()
        meta = next(n for n in file.namelist() if n.endswith("METADATA"))
        needs = re.findall(r"(?m)^Requires-Dist: ([\w.-]+)$", file.read(meta).decode())
    assert names == {f"effnet_repro/{p.name}" for p in PACKAGE.glob("*.py")} | {
        "effnet_repro/config.yml",
        "effnet_repro/pod16_model.json",
    }
    assert sorted(needs, key=str.lower) == ["numpy", "PyYAML", "safetensors"]


def test_version_is_said_once():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    version = settings["DEFAULT"]["version"]
    assert f'__version__ = "{version}"' in (PACKAGE / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_settings_keep_the_parameters_tag():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split()


# ---------------------------------------------------------------- the lock


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_lock_is_exact():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.!+]+", line), line


def test_lock_serves_the_extras():
    "Every requirement of pyproject.toml, with its extras, is in the lock at a version that it allows."
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    names = pytest.importorskip("packaging.utils")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    have = {names.canonicalize_name(k): v for k, v in locked().items()}
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for text in wanted:
        need = requirements.Requirement(text)
        if need.marker and not need.marker.evaluate({"platform_system": "Linux"}):
            continue
        version = have.get(names.canonicalize_name(need.name))
        assert version and need.specifier.contains(version), f"{text}: the lock has {version}"


def test_lock_serves_debian_12():
    "Its Python is 3.11.2, and some releases ask for 3.11.5."
    specifiers = pytest.importorskip("packaging.specifiers")
    wrong = []
    for name, version in locked().items():
        try:
            meta = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        python = meta.get("Requires-Python")
        if (
            meta["Version"] == version
            and python
            and not specifiers.SpecifierSet(python).contains("3.11.2")
        ):
            wrong.append(f"{name}=={version} needs Python {python}")
    assert wrong == []


# ---------------------------------------------------------------- make


@pytest.mark.parametrize(
    "target, words",
    [
        (
            "train",
            ["nbs/40_train.ipynb", "runs/CASE/train.ipynb", "-p case CASE", "-p run_dir runs/CASE"],
        ),
        ("finetune", ["nbs/41_finetune.ipynb", "-p init init", "-p run_dir runs/CASE-finetune"]),
        ("validate", ["nbs/42_validate.ipynb", "-p run_dir runs/CASE", "-p epochs 3"]),
    ],
)
def test_make_says_what_it_runs(target, words):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    case = "B1-G16-LN_PN-Half_16IPU_4x4"
    given = [f"CASE={case}", "INIT=init", "DATA_DIR=my data", "ARGS=-p epochs 3", "VENV=none"]
    done = subprocess.run(["make", "-n", target, *given], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.replace('"', "")
    for word in [*words, "-p data_dir my data", "-p epochs 3"]:
        assert word.replace("CASE", case) in said, done.stdout + done.stderr


def names_not_listed(markdown, modules):
    "Public functions and classes of `modules` (name -> text) that the page of all names lacks."
    return [
        f"{module}.{node.name}"
        for module, text in modules.items()
        for node in ast.parse(text).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if f"({module}.html#{node.name.lower()})" not in markdown
    ]


def test_the_page_of_all_names_has_all_names():
    outputs = [
        o for c in read(ROOT / "nbs" / "97_api.ipynb")["cells"] for o in c.get("outputs", [])
    ]
    markdown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    modules = {m: (PACKAGE / f"{m}.py").read_text() for m in MODULES}
    assert names_not_listed(markdown, modules) == [], "run nbs/97_api.ipynb again and commit it"
    assert names_not_listed(markdown, {"config": "def new():\n    pass"}) == ["config.new"]
