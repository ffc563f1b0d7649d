"""What a notebook looks like: the order of its cells, outputs that may be committed, parameters of the run notebooks.

Each rule is a function that lists what breaks it, and is shown to find a planted mistake.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from effnet_repro.config import FIELDS, RUN_FIELDS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNS = ("40_train", "41_finetune", "42_validate")

by_stem = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


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


def spans(node):
    "Name, first and last line of each parameter or field that a node declares."
    if isinstance(node, ast.AnnAssign):
        yield ast.unparse(node.target), node.lineno, node.end_lineno
    if isinstance(node, ast.arguments):
        own = [*node.posonlyargs, *node.args]
        values = [None] * (len(own) - len(node.defaults)) + node.defaults + node.kw_defaults
        for one, value in zip([*own, *node.kwonlyargs], values):
            yield one.arg, one.lineno, (value or one).end_lineno


def comment_errors(nb):
    "Parameters and fields of exported code with a comment that is not on their first line: no page shows it."
    return [
        f"{name}: a shorter comment stays on its line"
        for cell in nb["cells"]
        if any(d.split()[:1] in (["export"], ["exports"]) for d in directives(cell))
        for statement in parsed(cell)
        for node in ast.walk(statement)
        for name, first, last in spans(node)
        if any("  # " in line for line in source(cell).splitlines()[first:last])
    ]


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
        image_only = any(k.startswith("image/") for k in data)
        shown = "" if image_only else json.dumps([output.get("text"), data])
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
def test_notebook_keeps_comments_of_parameters(path):
    assert comment_errors(read(path)) == []


@by_stem
def test_notebook_has_outputs(path):
    assert output_errors(read(path)) == []


@pytest.mark.parametrize("name", RUNS)
def test_run_notebook_has_parameters(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    if not path.exists():
        pytest.skip(f"nbs/{name}.ipynb is not written yet")
    assert parameter_errors(read(path)) == []


def parameters_of(name):
    cells = read(ROOT / "nbs" / f"{name}.ipynb")["cells"]
    (tagged,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {node.targets[0].id for node in ast.parse(source(tagged)).body}


def test_run_notebooks_offer_the_fields_of_a_run():
    "A new field of a case is a parameter of 40_train: one line, `name = None`."
    fields = {name: parameters_of(name) & set(FIELDS) - {"precision"} for name in RUNS}
    assert fields["40_train"] == set(RUN_FIELDS)
    assert fields["41_finetune"] | fields["42_validate"] < set(RUN_FIELDS)


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
    "text, wrong",
    [
        ("def f(\n    a: int,  # A\n    *,\n    b=1,  # B\n): pass", []),
        ("class A:\n    a: int = f(\n        1\n    )", []),
        (
            "def f(\n    a: Optional[\n        int\n    ] = None,  # A\n    b=1,  # B\n): pass",
            ["a"],
        ),
        ("def f(\n    *,\n    a=(\n        1,\n    ),  # A\n): pass", ["a"]),
        ("class A:\n    a: int = (\n        1  # A\n    )", ["a"]),
    ],
)
def test_comments_of_parameters_sees_mistakes(text, wrong):
    found = comment_errors({"cells": [cell(f"#| export\n{text}"), cell(text)]})
    assert [f.partition(":")[0] for f in found] == wrong


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


TRAIN = str(ROOT / "nbs" / "40_train.ipynb")
PAPERMILL = [  # (words, name of the exception, its words)
    (["gone.ipynb", "o.ipynb"], "FileNotFoundError", "No such file or directory: 'gone.ipynb'"),
    ([TRAIN, "gone/o.ipynb"], "FileNotFoundError", "output folder gone doesn't exist"),
    ([TRAIN, "o.ipynb", "-f", "utf16.yml"], "UnicodeDecodeError", "can't decode byte"),
    ([TRAIN, "o.ipynb", "-k", "gone"], "NoSuchKernel", "No such kernel named gone"),
    ([TRAIN, "o.ipynb", "-p", "seed", "1", "-p", "seed", "2", "--prepare-only"], "NoneType", ""),
]


@pytest.mark.parametrize("words, kind, says", PAPERMILL)
def test_what_papermill_answers_itself(tmp_path, monkeypatch, words, kind, says):
    "The page on errors tells it, since nothing of ours runs before."
    from click.testing import CliRunner
    from papermill.cli import papermill

    monkeypatch.chdir(tmp_path)
    (tmp_path / "utf16.yml").write_bytes("seed: 3\n".encode("utf-16"))
    done = CliRunner().invoke(papermill, words)
    assert type(done.exception).__name__ == kind and says in str(done.exception or "")
    if kind == "NoneType":  # the last one counts
        (cell,) = [c for c in read(tmp_path / "o.ipynb")["cells"] if "# Parameters" in source(c)]
        assert source(cell).split() == ["#", "Parameters", "seed", "=", "2"]
