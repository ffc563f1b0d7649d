"""How the library is laid out: layers, private names, sizes, and what the cells of a page look like.

Each rule lists what breaks it. `tests/data/house.json` names what broke a rule when the rule came; that
list only shrinks: something new fails, and so does a name that is still listed although it was mended.
`python tests/test_house.py` takes the mended ones off the list, and prints what is new.
"""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import tree  # noqa: E402

LIST = ROOT / "tests" / "data" / "house.json"
KNOWN = json.loads(LIST.read_text())
MODULES = tree.modules()

# The lowest first. A module imports from lines above its own, a package's modules from each other, too.
LAYERS = [
    "registration fields testing proxy_norm messages divisors small_sets outside figures resolution intervals",
    "paths",
    "scaling",
    "case_files case_rules",
    "config",
    "ops norms checkpoint data recipe augment",
    "group_conv classes averaging",
    "mbconv",
    "network kernels",
    "pipeline keras_layers finetuning",
    "efficientnet",
    "runs",
    "results gpu_plan distributed",
    "convert",
    "transfer",
    "training ipu planner",
    "predict",
    "export",
    "cli",
]
MOST_LINES = 500  # Of a module and of a file of tests
MOST_CELL = 45  # Lines of an exported cell
MOST_IN_ROW = 60  # Exported lines without a word of prose
MOST_PARAMETERS = 8
# What a user calls may have more; a layer's `__init__` is its call.
FACES = {"training.begin.train", "training.begin.finetune", "training.validation.validate"}
FACES |= {"ipu.begin.train", "ipu.begin.finetune", "data.readers.training_batches"}
FACES |= {"keras_layers.MBConv.__init__", "keras_layers.GroupConv2D.__init__"}
FACES |= {"efficientnet.build_model"}


# ---------------------------------------------------------------- imports


def own_imports(text, package, known):
    "Modules among `known` that a module in `package` ('' at the top) imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                above = package.split(".") if package else []
                parts = above[: len(above) - node.level + 1] + parts
            elif parts[:1] == ["effnet_repro"]:
                parts = parts[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*parts, alias.name])
                found.add(inner if inner in known else ".".join(parts))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("effnet_repro."):
                    found.add(alias.name.partition(".")[2])
    return found & set(known)


def package_of(module, path):
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def imports(modules):
    "Module -> modules that it imports."
    return {
        name: own_imports(path.read_text(), package_of(name, path), modules)
        for name, path in modules.items()
    }


def against_the_layers(found, layers):
    "Modules without a layer, imports that do not go down, and circles in a package."
    room = lambda module: module.partition(".")[0]
    level = {name: i for i, line in enumerate(layers) for name in line.split()}
    wrong = sorted({f"{room(m)} has no layer" for m in found if room(m) not in level})
    wrong += [f"{n} is no module" for n in level if n not in {room(m) for m in found}]
    for module, others in sorted(found.items()):
        for other in sorted(others):
            if room(other) == room(module) or {room(module), room(other)} - set(level):
                continue
            if level[room(other)] >= level[room(module)]:
                wrong.append(f"{module} imports {other}")
    left = {m: {o for o in others if room(o) == room(m)} for m, others in found.items()}
    while any(not others & set(left) for others in left.values()):
        left = {m: others for m, others in left.items() if others & set(left)}
    return wrong + ([f"a circle: {', '.join(sorted(left))}"] if left else [])


def private_names(modules):
    "Names with an underscore that one module takes from another."
    wrong = []
    for module, path in modules.items():
        text, package = path.read_text(), package_of(module, path)
        aliases = {}  # name in this module -> module of ours
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            for alias in node.names:
                one = type(node)(**{**vars(node), "names": [alias]})
                for other in own_imports(ast.unparse(one), package, modules):
                    if alias.name.startswith("_"):
                        wrong.append(f"{module}: {other}.{alias.name}")
                    elif alias.name.rpartition(".")[2] == other.rpartition(".")[2]:
                        aliases[alias.asname or alias.name] = other
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                other = aliases.get(ast.unparse(node.value))
                if other and not node.attr.startswith("__"):
                    wrong.append(f"{module}: {other}.{node.attr}")
    return sorted(set(wrong))


def speaking(modules):
    "Modules of the library that print by themselves; they say or log, and commands print."
    spoken = re.compile(r"(?m)^(?!\s*#).*?(?<![\w.])print\(")
    quiet = lambda module: module.startswith("cli") or module == "messages"
    return sorted(m for m, p in modules.items() if not quiet(m) and spoken.search(p.read_text()))


# ---------------------------------------------------------------- sizes


def long_files(paths):
    long = [p for p in paths if len(p.read_text().splitlines()) > MOST_LINES]
    return sorted("/".join(p.parts[-2:]) for p in long)


def functions(text, prefix=""):
    "Qualified name -> function, methods and functions inside functions included."
    found = {}
    for node in ast.iter_child_nodes(text if isinstance(text, ast.AST) else ast.parse(text)):
        name = getattr(node, "name", None)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[prefix + name] = node
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.update(functions(node, f"{prefix}{name}."))
    return found


def many_parameters(modules, faces=FACES):
    "Functions with more than eight parameters, a user's calls apart."
    wrong = []
    for module, path in modules.items():
        for name, node in functions(path.read_text()).items():
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            given = [a for a in given if a.arg not in ("self", "cls")]
            if len(given) > MOST_PARAMETERS and f"{module}.{name}" not in faces:
                wrong.append(f"{module}.{name}")
    return sorted(wrong)


# ---------------------------------------------------------------- cells of a page


def statements(cell):
    text = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]))
    return ast.parse(text).body


def code_lines(cell):
    lines = "".join(cell["source"]).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#|")]


def exported(cell):
    text = "".join(cell["source"])
    return cell["cell_type"] == "code" and bool(re.search(r"(?m)^#\| *exporti?s?\b", text))


def definitions(cell):
    return [n.name for n in statements(cell) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def first_name(cell):
    "A name for a cell that does not change when others come and go."
    for node in statements(cell):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return node.name
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return ast.unparse(getattr(node, "targets", [getattr(node, "target", None)])[0])
    return cell.get("id", "a cell")


def large_cells(pages):
    "Exported cells of more than 45 lines, and those with more than two definitions."
    return sorted(
        f"{page}: {first_name(cell)}"
        for page, cells in pages.items()
        for cell in filter(exported, cells)
        if len(code_lines(cell)) > MOST_CELL or len(definitions(cell)) > 2
    )


def long_rows(pages):
    "Where more than 60 exported lines follow each other without prose."
    wrong = []
    for page, cells in pages.items():
        lines, first = 0, None
        for cell in [*cells, {"cell_type": "markdown", "source": ""}]:
            if cell["cell_type"] == "markdown":
                if lines > MOST_IN_ROW:
                    wrong.append(f"{page}: {first}")
                lines, first = 0, None
            elif exported(cell):
                lines, first = lines + len(code_lines(cell)), first or first_name(cell)
    return sorted(wrong)


def without_lesson(pages):
    "Public functions and classes that no visible cell below them uses."
    wrong = []
    for page, cells in pages.items():
        for number, cell in enumerate(cells):
            for name in definitions(cell) if exported(cell) else ():
                below = [
                    "".join(c["source"])
                    for c in cells[number + 1 :]
                    if c["cell_type"] == "code" and not exported(c)
                ]
                used = re.compile(rf"\b{name}\b")
                shown = any(used.search(t) and not re.search(r"(?m)^#\| *hide\b", t) for t in below)
                if not name.startswith("_") and not shown:
                    wrong.append(f"{page}: {name}")
    return sorted(wrong)


def pages():
    "Notebook -> its cells, for those that export a module."
    found = {}
    for path in tree.notebooks():
        cells = json.loads(path.read_text())["cells"]
        if "default_exp" in "".join(cells[0]["source"]):
            found[path.stem] = cells
    return found


RULES = {
    "private names across modules": lambda: private_names(MODULES),
    "prints outside commands": lambda: speaking(MODULES),
    "files of more than 500 lines": lambda: long_files(
        [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    ),
    "functions of more than 8 parameters": lambda: many_parameters(MODULES),
    "exported cells of more than 45 lines or two definitions": lambda: large_cells(pages()),
    "more than 60 exported lines without prose": lambda: long_rows(pages()),
    "public names without a lesson": lambda: without_lesson(pages()),
}


# ---------------------------------------------------------------- tests


def test_imports_go_down_the_layers():
    assert against_the_layers(imports(MODULES), LAYERS) == []


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    found, known = RULES[rule](), KNOWN[rule]
    assert [one for one in found if one not in known] == [], "new: mend it"
    mended = [one for one in known if one not in found]
    assert mended == [], "mended: run `python tests/test_house.py`, which takes it off the list"


def test_layers_see_mistakes():
    layers = ["config", "ops", "cli"]
    good = {"config": set(), "ops": {"config"}, "cli": {"cli.kit", "ops"}, "cli.kit": {"config"}}
    assert against_the_layers(good, layers) == []
    for more, said in [
        ({"config": {"ops"}}, "config imports ops"),
        ({"cli.kit": {"cli"}}, "a circle: cli, cli.kit"),
        ({"ops": {"cli.kit"}}, "ops imports cli.kit"),
        ({"new": set()}, "new has no layer"),
    ]:
        assert against_the_layers({**good, **more}, layers) == [said]
    assert against_the_layers({"config": set(), "ops": set()}, layers) == ["cli is no module"]


@pytest.mark.parametrize(
    "text, package, found",
    [
        ("from .norms import x", "", {"norms"}),
        ("def f():\n    from effnet_repro.norms import x", "", {"norms"}),
        ("from . import norms, config", "", {"norms", "config"}),
        ("import effnet_repro.norms, numpy", "cli", {"norms"}),
        ("from .kit import x", "cli", {"cli.kit"}),
        ("from . import kit", "cli", {"cli.kit"}),
        ("from .. import norms\nfrom ..config import x", "cli", {"norms", "config"}),
        ("from effnet_repro.cli import kit, main", "", {"cli.kit", "cli"}),
        ("from numpy import norms", "", set()),
    ],
)
def test_imports_are_found(text, package, found):
    known = {"norms", "config", "cli", "cli.kit"}
    assert own_imports(text, package, known) == found


def test_rules_for_modules_see_mistakes(tmp_path):
    texts = {
        "a": "from .b import _hidden, shown\nfrom . import b as other\nother._also\nother.__doc__",
        "b": "class C:\n    def f(self, a, b, c, d, e, f, g, h): pass\n"
        "    def g(self, a, b, c, d, e, f, g, h, *, i): pass",
        "c": "x = 1\n" * 501,
        "d": "def f():\n    print('x')",
        "e": "fingerprint('x')\n# print('x')\nname = 'print'",
        "cli.f": "print('x')",
        "g": "if x: print('x')",
    }
    modules = {name: tmp_path / f"{name}.py" for name in texts}
    for name, path in modules.items():
        path.write_text(texts[name])
    assert private_names(modules) == ["a: b._also", "a: b._hidden"]
    assert speaking(modules) == ["d", "g"]
    assert many_parameters(modules) == ["b.C.g"]
    assert many_parameters(modules, {"b.C.g"}) == [] and long_files(modules.values()) == [
        f"{tmp_path.name}/c.py"
    ]


def test_rules_for_pages_see_mistakes():
    code = lambda text: {"cell_type": "code", "source": text}
    prose = {"cell_type": "markdown", "source": "Why."}
    lines = lambda n: "\n".join(f"    x = {i}" for i in range(n - 1))
    f, g = (code(f"#| export\ndef {name}():\n{lines(n)}") for name, n in (("f", 45), ("g", 46)))
    three = code("#| export\ndef a(): pass\ndef b(): pass\ndef _c(): pass")
    two = code("#| exports\ndef a(): pass\nTABLE = 1\ndef b(): pass")
    assert large_cells({"p": [f, two]}) == [] and large_cells({"p": [g]}) == ["p: g"]
    assert large_cells({"p": [three]}) == ["p: a"]
    assert long_rows({"p": [f, prose, f]}) == [] and long_rows({"p": [f, two, g]}) == ["p: f"]
    assert long_rows({"p": [f, code("f()"), g, prose]}) == ["p: f"]
    assert without_lesson({"p": [f, code("f()")]}) == without_lesson({"p": [code("x = 1")]}) == []
    hidden = code("#| hide\na()")
    assert without_lesson({"p": [code("f()"), f, three, hidden, code("b")]}) == ["p: a", "p: f"]


if __name__ == "__main__":
    left = {rule: [n for n in KNOWN[rule] if n in find()] for rule, find in RULES.items()}
    LIST.write_text(json.dumps(left, indent=1) + "\n")
    new = [
        f"{rule}: {one}" for rule, find in RULES.items() for one in find() if one not in left[rule]
    ]
    sys.exit("\n".join(new) or 0)
