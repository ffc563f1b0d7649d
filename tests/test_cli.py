"""Command lines: what they print, what they refuse and their exit statuses."""

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from effnet_repro import checkpoint, cli
from effnet_repro.cli import doctor
from effnet_repro.cli.kit import run_program
from effnet_repro.cli.options import finish_run
from effnet_repro.config import case_from_dict, case_to_dict, get_case, load_cases

ROOT = Path(__file__).parents[1]
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"


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


# ---------------------------------------------------------------- what a command line comes to


def plan(*words):
    "The plan of effnet-train, without running it"
    command = cli.COMMANDS["train"]
    return cli.plan_training(command.parser().parse_args([str(w) for w in words]))


def test_every_field_is_a_flag():
    flags = cli.COMMANDS["train"].parser()._option_string_actions
    for name in vars(get_case(CASE)):
        assert name == "name" or "--" + name.replace("_", "-") in flags
    published = (
        "--config --config-path --batch-size --image-size --gradient-accumulation-count --init-path"
    )
    published += (
        " --restore-path --replicas --shards --lr-schedule --epochs --base-learning-rate-exponent"
    )
    published += (
        " --base-learning-rate --train-with-valid-preprocessing --variable-filter --no-validation"
    )
    assert set(published.split()) <= set(flags)


def test_published_batch_flags_give_the_published_global_batch():
    case = get_case(CASE)
    whole = "--batch-size 8 --gradient-accumulation-count 4 --replicas 16 --shards 1".split()
    for words, micro, batch in (
        ([], 24, 768),
        (["--batch-size", 12], 12, 768),
        (["--batch-size", 12, "--gradient-accumulation-count", 4], 12, 12 * 4 * case.num_replicas),
        (["--gradient-accumulation-count", 2, "--replicas", 2], 24, 96),
        (["--replicas", 4, "--shards", 4], 24, 768),
        (whole, 8, 512),
        ([*whole, "--global-batch-size", 512], 8, 512),
        (["--global-batch-size", 512, "--gradient-accumulation", 4, "--num-replicas", 16], 8, 512),
    ):
        made = plan(CASE, "--budget", "case", *words).case
        assert (made.micro_batch_size, made.global_batch_size) == (micro, batch), words
        assert (made.num_replicas, made.num_stages) == (1, 1)
        assert made.learning_rate == 2**-14 * batch


def test_own_names_and_published_names_are_the_same():
    own = "--micro-batch-size 8 --gradient-accumulation 4 --num-replicas 16 --base-learning-rate-exponent -11"
    published = (
        "--batch-size 8 --gradient-accumulation-count 4 --replicas 16 --base-learning-rate=-11"
    )
    more = "--train-preprocessing validation --optimizer sgd --norm GN --norm-groups 4"
    theirs = "--train-with-valid-preprocessing --optimiser SGD --norm GN --groups 4"
    a, b = (plan(CASE, *w.split()).case for w in (f"{own} {more}", f"{published} {theirs}"))
    assert a == b and a.base_learning_rate_exponent == -11 and a.optimizer == "sgd"


def test_the_table_says_why(run):
    status, out, err = run(
        "train", CASE, "--budget", "demo", "--seed", "1", "--dry-run", "--epochs", "3"
    )
    rows = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert (status, err) == (0, "")
    for field, ending in (
        ("epochs", "flag"),
        ("image_size", "budget demo"),
        ("num_replicas", "one device"),
        ("momentum", "0.9"),
    ):
        assert rows[field].endswith(ending), rows[field]
    assert re.fullmatch(r"epochs +3 +350 +flag", rows["epochs"])


def ran_and_shown(monkeypatch, command):
    "Replaces what trains; returns a list that gets what was shown and what was given to `train` or `finetune`."
    import importlib

    seen, module = [], importlib.import_module(f"effnet_repro.cli.{command}")
    done = types.SimpleNamespace(finished=True, run_dir="there")
    trains = lambda what, *words, **how: seen.append(what) or done
    stub = types.SimpleNamespace(train=trains, finetune=trains, settle_run=lambda run, _: run)
    monkeypatch.setitem(sys.modules, "effnet_repro.training", stub)
    monkeypatch.setattr(module, "start_keras", lambda args: None)
    monkeypatch.setattr(module, "show_plan", seen.append)
    return seen


def test_what_is_shown_is_what_runs(run, monkeypatch, tmp_path):
    seen = ran_and_shown(monkeypatch, "train")
    words = ("--budget", "demo", "--epochs", 3, "--batch-size", 8, "--run-dir", tmp_path)
    assert run("train", CASE, *words)[0] == 0
    shown, given = seen
    assert shown.resolved is given and shown.case is given.case and given.run_dir == tmp_path
    assert (given.case.epochs, given.case.device_loop, given.budget) == (3, 1, "demo")


def test_the_micro_batch_of_a_gpu_is_shown(run, monkeypatch, tmp_path):
    seen = ran_and_shown(monkeypatch, "train")

    def settle_run(resolved, precision):
        "As on a GPU that holds 384 images"
        assert precision == "bfloat16"
        case = dataclasses.replace(resolved.case, micro_batch_size=384, gradient_accumulation=2)
        return dataclasses.replace(resolved, case=case, settled=("micro_batch_size",))

    monkeypatch.setattr(sys.modules["effnet_repro.training"], "settle_run", settle_run)
    words = ("--budget", "case", "--backend", "jax", "--precision", "bfloat16")
    assert run("train", CASE, *words, "--run-dir", tmp_path)[0] == 0
    shown, given = seen
    assert shown.resolved is given and shown.case.micro_batch_size == 384
    assert shown.reasons["micro_batch_size"] == "the run's own, or the device's"
    assert shown.reasons["num_stages"] == "one device"


def test_what_is_shown_is_what_is_fine_tuned(run, monkeypatch, tmp_path):
    metadata = {"case": case_to_dict(get_case(CASE)), "update": 1, "epoch": 1, "num_classes": 10}
    checkpoint.save(tmp_path / "checkpoints" / "epoch-0001.safetensors", {}, metadata)
    seen = ran_and_shown(monkeypatch, "finetune")
    assert run("finetune", tmp_path, "--budget", "case", "--batch-size", 8, "--epochs", 3)[0] == 0
    shown, given = seen
    assert shown.resolved is given and shown.case is given.case and given.init == tmp_path
    assert given.case.image_size == 224 and given.run_dir == tmp_path / "finetune-224"
    assert (given.case.micro_batch_size, given.case.epochs) == (8, 3)


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "Which case?"),
        (["--config", "B0-G16-LN_PN-Half"], "Did you mean"),
        ([CASE, "--config", "B0-G1-GN-Native_16IPU_2x8"], "More than one case"),
        ([CASE, "--ep", "3"], "Unknown flag '--ep'"),
        ([CASE, "--bathc-size", "3"], "Did you mean '--batch-size'?"),
        ([CASE, "extra"], "Unexpected argument 'extra'"),
        ([CASE, "--epochs", "many"], "a finite number is needed. Received: 'many'"),
        ([CASE, "--epochs", "nan"], "a finite number is needed"),
        ([CASE, "--epochs", "0"], "must be above 0"),
        ([CASE, "--epochs"], "expected one argument"),
        ([CASE, "--image-size", "32.5"], "a whole number is needed"),
        ([CASE, "--image-size", "16"], "at least 32"),
        ([CASE, "--batch-size", "8", "--micro-batch-size", "16"], "given twice"),
        ([CASE, "--norm", "LNPN"], "Did you mean 'LN_PN'?"),
        ([CASE, "--backend", "tensrflow"], "Did you mean 'tensorflow'?"),
        ([CASE, "--precision", "fp16"], "Did you mean 'float16'?"),
        ([CASE, "--budget", "demos"], "Did you mean 'demo'?"),
        ([CASE, "--model-size", "B9"], "Unknown model_size 'B9'"),
        ([CASE, "--budget", "case", "--batch-size", "7"], "must be a multiple"),
        ([CASE, "--budget", "case", "--replicas", "7"], "do not divide the global batch 768"),
        ([CASE, "--batch-size", "0"], "at least 1"),
        (
            [CASE, "--gradient-accumulation", "3", "--global-batch-size", "8"],
            "is not the global batch 8",
        ),
        ([CASE, "--global-batch-size", "32768"], "would be negative"),
        ([CASE, "--num-stages", "2", "--pipeline-splits", "a", "b"], "A split begins a stage"),
        ([CASE, "--keep", "0"], "--keep must be at least 1"),
        ([CASE, "--seed", "-1"], "at least 0"),
        ([CASE, "--run-dir", "a", "--restore-path", "b"], "More than one run folder"),
        ([CASE, "--config-path", "nowhere.yml"], "No configuration file nowhere.yml"),
        ([CASE, "--no-validation", "--validate-every", "2"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_gets_one_line(refused, words, says):
    assert says in refused("train", *words, "--dry-run")


@pytest.mark.parametrize("name", ["finetune", "validate"])
def test_a_source_that_is_not_there(refused, tmp_path, name):
    assert "Which run folder" in refused(name)
    assert "No checkpoint" in refused(name, tmp_path, status=1)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    assert "not a whole checkpoint" in refused(name, tmp_path / "x.safetensors", status=1)
    assert "More than one source" in refused(name, "a", "--restore-path", "b")


SOME_FLAGS = {
    "--batch-size": st.integers(-1, 64),
    "--micro-batch-size": st.integers(-1, 64),
    "--gradient-accumulation-count": st.integers(-1, 32),
    "--replicas": st.integers(-1, 16),
    "--num-stages": st.integers(-1, 4),
    "--global-batch-size": st.sampled_from([0, 1, 96, 512, 768, 16384, 20000]),
    "--image-size": st.integers(0, 600),
    "--epochs": st.floats(-1, 400, allow_nan=False) | st.sampled_from(["inf", "", "1e3", "many"]),
    "--base-learning-rate": st.integers(-20, 3),
    "--norm": st.sampled_from(["GN", "LN", "LN_PN", "GN_PN", "BN", "gn"]),
    "--groups": st.integers(0, 8),
    "--cutmix-lambda": st.floats(-0.5, 1.5),
    "--lr-schedule": st.sampled_from(["cosine", "exponential", "Cosine"]),
    "--budget": st.sampled_from(["case", "small", "demo", "smoke", "auto"]),
    "--variable-filter": st.lists(st.sampled_from(["Top", "block7", ""]), min_size=1, max_size=2),
    "--train-with-valid-preprocessing": st.just([]),
    "--no-eight-bit-io": st.just([]),
    "--no-such-flag": st.just([]),
    "-x": st.just([]),
}


@st.composite
def command_lines(draw):
    words = [CASE]
    for flag in draw(st.lists(st.sampled_from(list(SOME_FLAGS)), max_size=5)):
        value = draw(SOME_FLAGS[flag])
        words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(words=[CASE, "--global-batch-size", "16384"])
@given(words=command_lines())
def test_any_command_line_is_a_consistent_case_or_one_line(capsys, words):
    capsys.readouterr()
    status = cli.main(["train", *words, "--dry-run"])
    out, err = capsys.readouterr()
    assert status in (0, 1, 2), err  # 1: a step of more images than the sample set has
    if status:
        assert out == "" and len(err.splitlines()) == 1 and err.startswith("effnet-train: ")
        assert "unforeseen" not in err
        return
    made = plan(*words)
    case, asked = made.case, dict(zip(words[1:], words[2:]))
    assert case_from_dict(json.loads(json.dumps(case_to_dict(case)))) == case
    assert case.micro_batch_size * case.gradient_accumulation == case.global_batch_size
    for flag, field in (
        ("--image-size", "image_size"),
        ("--norm", "norm"),
        ("--groups", "norm_groups"),
    ):
        if flag in asked:
            assert str(getattr(case, field)) == asked[flag]
    batch = asked.get("--batch-size", asked.get("--micro-batch-size"))
    assert batch is None or case.micro_batch_size == int(batch)
    k, r = (int(asked.get(f, 0)) for f in ("--gradient-accumulation-count", "--replicas"))
    if batch and k and r:
        assert case.global_batch_size == int(batch) * k * r


# ---------------------------------------------------------------- how a run ends


def test_data_that_is_not_there(run, refused, tmp_path):
    line = refused("train", CASE, "--budget", "smoke", "--data-dir", tmp_path / "none", status=1)
    assert "--data-dir must be a folder" in line
    status, out, _ = run("doctor", "--data-dir", tmp_path / "none", "--json")
    report = json.loads(out)
    assert status == 1 and "must be a folder" in report["problems"]["1"]
    status, out, _ = run("doctor", CASE, "--global-batch-size", "2048", "--json", "--no-trial")
    assert status == 1 and "exceeds the 1200" in json.loads(out)["problems"]["1"]
    assert report["versions"]["keras"] and "CPU" in report["backends"]["tensorflow"]


def test_the_doctor_says_what_it_knows_before_it_measures(run, monkeypatch, capsys):
    "Compiling takes minutes on a busy machine"
    seen, trial = [], {"micro-batch (s)": 1.0}
    monkeypatch.setattr(doctor, "_trial", lambda *_: seen.append(capsys.readouterr()) or trial)
    status, out, _ = run("doctor", CASE, "--budget", "smoke")
    assert status == 0 and "measured: training step (s)" in out and "versions" not in out
    ((early, told),) = seen
    for known in ("field ", "versions", "settings", "backends", "data"):
        assert f"\n{known}" in f"\n{early}"
    assert "--no-trial leaves it out" in told
    status, out, _ = run("doctor", CASE, "--budget", "smoke", "--json")
    assert json.loads(out)["versions"]["keras"] and seen[1].out == ""


def test_stopping_is_an_exit_status_of_its_own(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    command = cli.COMMANDS["cases"]._replace(run=stop)
    assert run_program(command, []) == 130
    assert capsys.readouterr().err == "effnet-cases: interrupted\n"


def test_a_run_that_was_stopped_says_how_it_goes_on(capsys, tmp_path):
    class Stopped:
        finished, run_dir = False, tmp_path

    assert finish_run(Stopped, None) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_budgets_of_another_file_are_used(tmp_path):
    text = (ROOT / "config.yml").read_text().replace("    epochs: 6\n", "    epochs: 7\n")
    (tmp_path / "mine.yml").write_text(text)
    assert plan(CASE, "--config-path", tmp_path / "mine.yml", "--budget", "demo").case.epochs == 7


def test_the_published_file_is_read_as_it_is(refused, tmp_path):
    published = ROOT / "tests" / "data" / "published_cases.json"
    assert plan(CASE, "--config-path", published) == plan(CASE)
    other = {CASE: {**json.loads(published.read_text())[CASE], "dataset": "cifar10"}}
    (tmp_path / "other.yml").write_text(json.dumps(other))
    line = refused("train", CASE, "--config-path", tmp_path / "other.yml")
    assert "dataset='cifar10'" in line and "is not supported" in line


def test_an_error_that_nobody_foresaw(monkeypatch, capsys):
    command = cli.COMMANDS["cases"]._replace(run=lambda args: {}["missing"])
    assert run_program(command, []) == 1
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and "KeyError" in line and "--debug" in line
