"""Command lines: what they print, what they refuse and their exit statuses."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effnet_repro import cli
from effnet_repro.config import load_cases

ROOT = Path(__file__).parents[1]
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"


@pytest.fixture
def run(capsys, monkeypatch):
    "Run a command in this process: (exit status, stdout, stderr)"
    for name in ("DATA_DIR", "CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)

    def call(*words):
        capsys.readouterr()
        status = cli.main([str(w) for w in words])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run):
    "Run a command that must fail with one line; returns the line"

    def call(*words, status=2):
        got, out, err = run(*words)
        assert got == status, (got, out, err)
        assert err.startswith("effnet") and len(err.splitlines()) == 1, err
        assert "Traceback" not in err
        return err

    return call


def subprocess_run(*words, **env):
    "Run a command as a program of its own"
    return subprocess.run(
        [sys.executable, "-m", "effnet_repro.cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---------------------------------------------------------------- all commands


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_examples_and_exit_statuses(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert f"effnet-{name}" in out and "examples:" in out and "exit status:" in out
    for line in cli.COMMANDS[name].examples.splitlines():
        assert line.startswith("effnet-") and line in out


def test_every_command_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    for name in cli.COMMANDS:
        assert f'\neffnet-{name} = "effnet_repro.cli:{name}_command"\n' in text
        assert callable(getattr(cli, f"{name}_command"))
    assert text.count('"effnet_repro.cli:') == len(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_flag_is_neither_guessed_nor_ignored(refused, name):
    assert "Did you mean '--debug'?" in refused(name, "--debg")
    assert "Unknown flag '--deb'" in refused(name, "--deb")


def test_an_unknown_command(refused):
    assert "Did you mean 'cases'?" in refused("case")


def test_commands_load_nothing_heavy():
    code = (
        "import sys; from effnet_repro import cli; cli.main(['cases']);"
        "heavy = {'keras', 'tensorflow', 'jax', 'pandas', 'matplotlib', 'torch'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m effnet_repro.cli cases {CASE} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_traceback_only_with_debug(run):
    for flag in ([], ["--debug"]):
        status, _, err = run("cases", "no-such-case", *flag)
        assert status == 2 and ("Traceback" in err) == bool(flag)
        assert err.splitlines()[-1].startswith("effnet-cases: Unknown case 'no-such-case'")


# ---------------------------------------------------------------- effnet-cases


def test_cases_as_table_csv_and_json(run):
    table, text, parsed = (run("cases", *flag)[1] for flag in ([], ["--csv"], ["--json"]))
    rows = list(csv.DictReader(io.StringIO(text)))
    parsed = json.loads(parsed)
    names = list(load_cases())
    assert [r["case"] for r in rows] == [r["case"] for r in parsed] == names
    assert [line.split()[0] for line in table.splitlines()[1:]] == names
    assert rows == [{k: str(v) for k, v in r.items()} for r in parsed]


def test_cases_filtered_and_sorted(run):
    out = run("cases", "--size", "B0", "B3", "--group-size", "16", "--sort", "macs", "--reverse")[1]
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert len(names) == 8 and all("-G16-" in n for n in names)
    assert names[0].startswith("B3") and names[-1].startswith("B0") and "Half" in names[-1]


def test_cases_refuses_what_is_not_there(refused):
    assert "Did you mean 'LN_PN'?" in refused("cases", "--norm", "LNPN")
    assert "Did you mean 'macs'?" in refused("cases", "--sort", "mac")
    assert "No case fits all" in refused("cases", "--group-size", "1", "--resolution", "Half")
    assert f"Did you mean '{CASE}'?" in refused("cases", CASE + "x")
    assert "No configuration file nowhere.yml" in refused("cases", "--config-path", "nowhere.yml")
    assert "allowed with" in refused("cases", "--json", "--csv")


def test_one_case_in_full(run):
    _, out, _ = run("cases", CASE, "--json")
    shown = json.loads(out)
    assert (shown["name"], shown["image_size"], shown["learning_rate"]) == (CASE, 160, 0.046875)


def test_cases_of_another_file(run, tmp_path, monkeypatch):
    text = (
        "{model_size: 0, group_size: 1, expand_ratio: 6, norm: BN, norm_groups: 1, image_size: 64,"
    )
    text += " micro_batch_size: 8, gradient_accumulation: 1, global_batch_size: 8}"
    (tmp_path / "mine.yml").write_text(f"cases:\n  mine: {text}\n")
    monkeypatch.setenv("CONFIG_PATH", str(tmp_path / "mine.yml"))
    by_variable = subprocess_run("cases", "mine")
    assert by_variable.returncode == 0 and "BN" in by_variable.stdout
    monkeypatch.delenv("CONFIG_PATH")
    assert run("cases", "mine", "--config-path", tmp_path / "mine.yml")[1] == by_variable.stdout
