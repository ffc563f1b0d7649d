"""The published commands, as translated: each one runs, in the order of the document."""

import contextlib
import io
import json
import re
import shlex
import string
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_cli import CASE, ROOT, subprocess_run
from tiny import without_graphs  # noqa: F401

from effnet_repro import cli
from effnet_repro.checkpoint import load_metadata
from effnet_repro.cli.validate import validation_rows
from effnet_repro.config import case_to_dict, get_case, override

COMMANDS = yaml.safe_load((ROOT / "tests" / "data" / "commands.yml").read_text())
DOCUMENT = """
export REPO export DATA_DIR export CONFIG_PATH train.py validation.py poprun --config-path --config
--no-validation --restore-path --batch-size --image-size --gradient-accumulation-count --init-path --replicas
--shards --lr-schedule --epochs --train-with-valid-preprocessing --base-learning-rate --variable-filter
""".split()


# Every block that a command names, one of each, and narrow.
STAGES = (
    "r1_k3_s1_e1_i16_o16",
    "r1_k3_s2_i16_o16",
    "r1_k5_s2_i16_o16",
    "r2_k3_s2_i16_o16",
    "r1_k5_s1_i16_o16",
    "r1_k5_s2_i16_o16",
    "r1_k3_s1_i16_o16",
)


def test_nothing_of_the_document_is_left_out():
    published = " ".join(row["published"] for row in COMMANDS)
    assert [word for word in DOCUMENT if word not in published] == []
    assert all(set(row) == {"title", "published", "ours", "differs", "test"} for row in COMMANDS)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    "Two classes of colored squares: 32 images to train on, 8 to validate"
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 4)):
        for label in ("dark", "light"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (40, 40, 3)) + 150 * (label == "light")
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    "A configuration with the published case, its network made small"
    small = override(get_case(CASE), net_stages=STAGES, top_filters=32)
    path = tmp_path_factory.mktemp("config") / "config.yml"
    path.write_text(json.dumps({"cases": {CASE: case_to_dict(small)}}))
    return path


@pytest.fixture(scope="module")
def translated(image_folder, config_path, tmp_path_factory):
    "Run every translated command in the order of the document: title -> (status, stdout, stderr)"
    variables = {
        "CASE": CASE,
        "CONFIG_PATH": str(config_path),
        "RESTORE_PATH": str(tmp_path_factory.mktemp("run")),
        "BATCH_SIZE": "2",
        "GRAD_ACC": "1",
        "IMAGE_SIZE": "64",
        "DATA_DIR": str(image_folder),
    }
    done = {"": variables}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA_DIR", "CONFIG_PATH"):
            patch.setenv(name, variables[name])
        for row in COMMANDS:
            line = string.Template(f"{row['ours']} {row['test']}").substitute(variables)
            name, *words = shlex.split(line)
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = cli.main([name.split("effnet-")[1], *words])
            done[row["title"]] = (status, out.getvalue(), err.getvalue())
    return done


@pytest.mark.parametrize("title", [row["title"] for row in COMMANDS])
def test_a_translated_command_runs(translated, title):
    status, out, err = translated[title]
    assert status == 0, err
    assert out


def test_a_run_ends_with_commands_that_work(translated, run):
    title = next(row["title"] for row in COMMANDS if "effnet-train" in row["ours"])
    said = re.findall(r"^  effnet-(.+)$", translated[title][1], re.M)
    assert [line.split()[0] for line in said] == ["finetune", "validate", "predict"]
    for line, more in zip(said, (["--dry-run"], [], [])):
        assert translated[""]["DATA_DIR"] in line
        assert run(*shlex.split(line), *more)[0] == 0


def test_the_published_fine_tuning_is_the_short_one(translated):
    "Both commands lead to one case, but for the batch that the variables of this test ask for."
    run_dir = Path(translated[""]["RESTORE_PATH"])
    trained, long, short = (load_metadata(run_dir / f)["case"] for f in ("", "tuned", "short"))
    assert trained["global_batch_size"] == 16 and trained["epochs"] == 1
    assert (long["global_batch_size"], long["micro_batch_size"]) == (32, 2)
    for name in (
        "epochs",
        "lr_schedule",
        "variable_filter",
        "base_learning_rate_exponent",
        "image_size",
    ):
        assert long[name] == short[name], name
    assert long["train_preprocessing"] == short["train_preprocessing"] == "validation"
    assert (long["optimizer"], long["warmup_epochs"]) == (
        short["optimizer"],
        short["warmup_epochs"],
    )
    config = json.loads((run_dir / "tuned" / "config.json").read_text())
    assert config["init"].endswith("average.safetensors")


def test_validation_is_done_once_and_for_the_right_case(run, refused, translated, image_folder):
    run_dir = translated[""]["RESTORE_PATH"]
    rows = validation_rows(run_dir)
    assert [r["weights"] for r in rows] == ["last", "average"]
    status, out, _ = run("validate", run_dir, "--data-dir", image_folder, "--json")
    assert status == 0 and json.loads(out) == validation_rows(run_dir)
    other = refused("validate", run_dir, "--config", "B0-G1-GN-Native_16IPU_2x8")
    assert "norm: LN_PN there, GN here" in other and "group_size: 16 there, 1 here" in other
    file = next(Path(run_dir, "checkpoints").glob("epoch-*"))
    status, out, _ = run("validate", file, "--data-dir", image_folder, "--csv")
    assert status == 0 and out.splitlines()[1].startswith(f"{file.name},")


def test_a_program_of_its_own(translated):
    "The same plan through the shell, with the environment variables."
    variables = {k: translated[""][k] for k in ("CONFIG_PATH", "DATA_DIR")}
    done = subprocess_run("train", "--config", CASE, "--epochs", "7", "--dry-run", **variables)
    assert done.returncode == 0 and done.stderr == "" and "budget case" in done.stdout
    done = subprocess_run("train", "--config", CASE, "--epochs", "x", "--dry-run")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    # TensorFlow's own notes, which come before it reads its log level, are not among the lines.
    noisy = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess_run("train", "--config", CASE, "--data-dir", "/nowhere", **noisy)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
