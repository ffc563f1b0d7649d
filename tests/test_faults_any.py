"""Any file of cases, command line and parameters: an exit status and a line, or a case that a run accepts."""

import contextlib
import io
import re
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults_words import CASE, WHOLE, listed, plain

from effnet_repro import cli
from effnet_repro.config import FIELDS, get_case, load_cases, override
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


def _a_line(folder, words):
    "A command line has an exit status and one line, or is a case that a run accepts."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["train", *words, "--dry-run", "--run-dir", str(folder / "run")])
    assert status in (0, 1, 2), err.getvalue()
    if status:
        plain(err.getvalue())
        assert out.getvalue() == "" or status == 1


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
parameters = st.dictionaries(st.sampled_from(sorted({*PARAMETERS, *FIELDS})), odd, max_size=4)


def some(count):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet, database=None)


@pytest.fixture
def once_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "open_data", listed)
    monkeypatch.chdir(tmp_path)
    for name in ("DATA_DIR", "CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    # Keras is started by no test of this kind: flags that need it are refused before.
    monkeypatch.setattr("effnet_repro.cli.options.start_keras", lambda args: sys.exit(2))
    return tmp_path


def few_and_many(check, strategy):
    "Two tests of one property: a few hundred examples, and ten thousand in the long run."

    def few(once_listed):
        some(FEW)(given(strategy)(lambda value: check(once_listed, value)))()

    @pytest.mark.long
    def many(once_listed):
        some(MANY)(given(strategy)(lambda value: check(once_listed, value)))()

    few.__doc__ = many.__doc__ = check.__doc__
    return few, many


test_any_file, test_10_000_files = few_and_many(
    lambda folder, data: _a_file(folder, yaml.safe_dump(data, allow_unicode=True)), files
)
test_any_text, test_10_000_texts = few_and_many(_a_file, texts)
test_any_line, test_10_000_lines = few_and_many(_a_line, lines)
test_any_parameters, test_10_000_parameters = few_and_many(
    lambda folder, values: _parameters(values), parameters
)
