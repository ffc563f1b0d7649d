"""Any file of cases, command line and parameters: an exit status and a line, or a case that a run accepts.

    FUZZ_SEED=7 python -m pytest -s -m long tests/test_faults_any.py

`FUZZ_SEED` repeats a run; without it the seed is drawn, and printed.
"""

import contextlib
import importlib
import io
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_faults_words import CASE, WHOLE, listed, plain

from effnet_repro import checkpoint, cli
from effnet_repro.config import FIELDS, case_to_dict, get_case, load_cases, override
from effnet_repro.runs import Options, Reading, check_run, preflight, resolve_training
from effnet_repro.runs.parameters import PARAMETERS, check_parameters

FEW, MANY = 60, 10_000
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(-2, 70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats() | st.text(max_size=3) | st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
    st.sampled_from(["Top", "block7", "1e-5", "B0", "GN", "sgd", "~", "gs://b", "rmsprop", "0.1"]),
)
fields = st.sampled_from(sorted(FIELDS))
files = st.builds(
    lambda case, budget, sections: {
        "cases": {"mine": {**WHOLE, **case}},
        "budgets": {"case": {}, "mine": budget},
        **sections,
    },
    st.dictionaries(fields, odd, max_size=3),
    st.dictionaries(fields, odd, max_size=2),
    st.dictionaries(st.sampled_from(["sizes", "norms", "case", "x"]), odd, max_size=1),
)
texts = st.one_of(
    st.text(alphabet="abc:{}[]&*!|>'\"%@`\t#-? \n0123.e\u00e9\x00\x85", max_size=60),
    st.builds(
        lambda kind, v: f"cases: {{a: !!{kind} '{v}'}}",
        st.sampled_from(
            "int float bool null str timestamp binary set omap pairs seq map python/name:os.system".split()
        ),
        st.text(alphabet="0x1_:.-e+ ab", max_size=6),
    ),
)


def _a_file(folder, text):
    "A file of cases is refused in plain words that name it, or each of its cases runs."
    path = folder / "my.yml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        cases = load_cases(path)
    except (ValueError, OSError) as error:
        assert str(path) in plain(shown(error)), text
        return
    for name, case in cases.items():
        with contextlib.suppress(ValueError):  # what two fields together do not allow
            resolve_training(case, folder / "run", "mine", config_path=path)
        resolved = resolve_training(case, folder / "run", "case", config_path=path)
        try:
            check_run(resolved, Reading(), Options())
        except ValueError as error:  # the sample set may be too small for its batch or its epochs
            assert re.search("exceeds the|at least one weight update", plain(shown(error))), name


def shown(error):
    return str(error).replace("\n", " ")


def _answer(words):
    "What a command answers: its status, its output, and its one line in plain words where it did not do it"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(words))
    assert status in (0, 1, 2), err.getvalue()
    if status and (words[0] != "doctor" or err.getvalue()):  # which lists what is wrong
        plain(err.getvalue())
    return status, out.getvalue()


def _a_line(folder, words):
    "A command line has an exit status and one line, or is a case that a run accepts."
    status, out = _answer(["train", *words, "--dry-run", "--run-dir", str(folder / "run")])
    assert status in (0, 1) or out == ""


def _another_line(folder, words):
    "So has a line of any other command; none of them begins to compute."
    _answer(words)


def _parameters(values):
    "Parameters are refused by name, or are what a case accepts or refuses by name."
    try:
        found = check_parameters(values)
        case = override(get_case(CASE), **{n: v for n, v in found.items() if n in FIELDS})
    except ValueError as error:
        plain(shown(error))
    else:
        assert case.global_batch_size > 0


words = st.one_of(
    st.sampled_from(
        ["--", "-x", "--json", "", "\u00e9", "--list", "--no-validation", "~", "1e999"]
    ),
    st.sampled_from(sorted(FIELDS)).map(lambda n: "--" + n.replace("_", "-")),
    st.sampled_from(
        ["--seed", "--keep", "--budget", "--data-dir", "--init", "--ipus", "--weights"]
    ),
    odd.map(lambda v: str(v).replace("\0", "")),
    st.tuples(fields, odd).map(lambda p: f"--{p[0].replace('_', '-')}={p[1]}".replace("\0", "")),
)
lines = st.lists(words, max_size=6).map(lambda found: [CASE, *found])
#: What a word may name in the folder of a test; `_places` makes them.
PLACES = ("a-run", "image.png", "fifo", "empty", "text.txt", "folder", "nowhere", "loop", "my.yml")
others = ("finetune", "validate", "predict", "export", "convert", "pack", "plan", "cases", "doctor")


def _flags(name):
    return sorted(
        set(cli.COMMANDS[name].parser()._option_string_actions) - {"-h", "--help", "--debug"}
    )


def _line_of(name):
    "A command, its flags and words for them"
    value = st.one_of(st.sampled_from(PLACES), odd.map(lambda v: str(v).replace("\0", "")))
    flag = st.sampled_from(_flags(name))
    word = st.one_of(value, flag, st.tuples(flag, value).map("=".join))
    first = {"plan": [CASE], "cases": [], "doctor": []}.get(name, ["a-run"])
    begin = st.sampled_from([first, first, []])
    return st.tuples(begin, st.lists(word, max_size=6)).map(lambda two: [name, *two[0], *two[1]])


other_lines = st.sampled_from(others).flatmap(_line_of)
parameters = st.dictionaries(st.sampled_from(sorted({*PARAMETERS, *FIELDS})), odd, max_size=4)


def some(count):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet, database=None)


def _places(folder):
    "What lies in the folder of a test: a run, an image, a FIFO, ..."
    case = get_case(CASE)
    about = {"case": case_to_dict(case), "update": 1, "epoch": 0, "num_classes": 10, "seed": 0}
    checkpoint.save(folder / "a-run" / "checkpoints" / "epoch-0000.safetensors", {}, about)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (folder / "empty").write_bytes(b"")
    (folder / "text.txt").write_text("one\ntwo\n")
    (folder / "folder").mkdir()
    (folder / "my.yml").write_text(yaml.safe_dump({"cases": {"mine": WHOLE}}))
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")


@pytest.fixture
def once_listed(monkeypatch):
    "A folder in memory, where the system has such a place, and commands that stop before they compute"
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    _places(folder)
    monkeypatch.chdir(folder)
    for name in ("DATA_DIR", "CONFIG_PATH", "KERAS_BACKEND"):
        monkeypatch.delenv(name, raising=False)

    def stop(*_, **__):
        raise SystemExit(0)  # all that comes before was accepted

    modules = {name: importlib.import_module(f"effnet_repro.cli.{name}") for name in STARTS}
    for name, names in STARTS.items():
        for each in names:
            monkeypatch.setattr(modules[name], each, stop)
    monkeypatch.setattr(preflight, "open_data", listed)
    yield folder
    shutil.rmtree(folder)


#: Module of a command -> what it begins to compute with.
STARTS = {
    **dict.fromkeys(("options", "train", "finetune", "validate", "predict"), ["start_keras"]),
    **{"doctor": ["start_keras"], "pack": ["pack", "open_data"]},
}


def few_and_many(check, strategy):
    "Two tests of one property: a few dozen examples, and ten thousand in the long run."

    def attempt(folder, count):
        number = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
        print(f"FUZZ_SEED={number}")
        seed(number)(some(count)(given(strategy)(lambda value: check(folder, value))))()

    def few(once_listed):
        attempt(once_listed, FEW)

    @pytest.mark.long
    def many(once_listed):
        attempt(once_listed, MANY)

    few.__doc__ = many.__doc__ = check.__doc__
    return few, many


test_any_file, test_10_000_files = few_and_many(
    lambda folder, data: _a_file(folder, yaml.safe_dump(data, allow_unicode=True)), files
)
test_any_text, test_10_000_texts = few_and_many(_a_file, texts)
test_any_line, test_10_000_lines = few_and_many(_a_line, lines)
test_any_other_line, test_10_000_other_lines = few_and_many(_another_line, other_lines)
test_any_parameters, test_10_000_parameters = few_and_many(
    lambda folder, values: _parameters(values), parameters
)
