"""What a loader, `--dry-run` or the doctor accepts, a run accepts; all else is one line in plain words."""

import ast
import functools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from images import encode, smooth_image
from tiny import ROOT

from effnet_repro import cli
from effnet_repro.config import FIELDS, budget_overrides, get_case, load_cases
from effnet_repro.data import open_data
from effnet_repro.runs import lock_folder, preflight
from effnet_repro.runs.parameters import PARAMETERS, check_parameters

CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
DRY = ("train", CASE, "--dry-run")
#: What no message says: names of classes, structures, addresses and Python's own words.
NO_WORDS = re.compile(
    r"Traceback|0x[0-9a-f]{6}|<class|object at|\b\w+Error\b|NoneType|Hardware\(|dict_|unforeseen|"
    r"fault of effnet_repro|Warning:|\bcodec|Errno"
)


def plain(text):
    "The text, which is one line in plain words."
    assert len(text.splitlines()) == 1 and not NO_WORDS.search(text), text
    return text


# ---------------------------------------------------------------- command lines

DISTRIBUTED = ["--distributed", "--backend", "jax"]  # whatever backend other tests have loaded
LINES = {  # kind -> [(words after `train CASE --dry-run`, words of the answer)]
    "a flag with -- for a value": [
        (["--run-dir=--"], "--run-dir: a value is needed"),
        (["--seed=--"], "--seed: a value is needed"),
        (["--pipeline-splits=--"], "--pipeline-splits: a value is needed"),
        (["--norm=--"], "--norm: a value is needed"),
    ],
    "an empty value": [
        (["--run-dir", ""], "--run-dir: the value is empty"),
        (["--data-dir="], "--data-dir: the value is empty"),
        (["--config-path", ""], "--config-path: the value is empty"),
    ],
    "a flag given twice": [
        (["--seed", "1", "--seed", "2"], "--seed: given twice, as 1 and as 2"),
        (["--budget", "demo", "--budget", "case"], "given twice"),
        (["--run-dir", "a", "--run-dir", "b"], "given twice"),
        (["--data-format", "raw", "--data-format", "cifar"], "given twice"),
        (["--decoder", "pillow", "--decoder", "tensorflow"], "given twice"),
        (["--variable-filter", "Top", "--variable-filter", "block7"], "given twice"),
        (["--validation-split", "0.1", "--validation-split", "0.2"], "given twice"),
    ],
    "a number beyond what a run takes": [
        (["--seed", str(2**31)], "--seed must be a whole number from 0 to 2**31 - 1"),
        (["--keep", str(2**40)], "--keep must be a whole number from 1"),
        (["--validate-every", str(2**31)], "--validate-every must be a whole number"),
        (["--ipus", "0"], "--ipus must be at least 1"),
        (["--ipus", "-3"], "--ipus must be at least 1"),
        (["--validation-split", "7"], "--validation-split must be in (0, 1)"),
        (["--validation-split", "-1"], "--validation-split must be in (0, 1)"),
        (["--epochs", "1e9"], "--epochs must be between -1e9 and 1e9"),
        (["--cutmix-lambda", "1.00009"], "--cutmix-lambda must be in [0, 1]"),
        (["--crop-area-min", "1.00009"], "--crop-area-min must be in [1e-4, 1]"),
        (["--image-size", str(10**400)], "image"),
    ],
    "a value where none is due": [
        (["--no-progress="], "--no-progress takes no value. Received: ''"),
        (["--no-validation=yes"], "--no-validation takes no value. Received: 'yes'"),
    ],
    "what web pages make of a line": [
        (["\u2014epochs", "3"], "Unknown flag '\u2014epochs'. Did you mean '--epochs'?"),
        (["\u2013-epochs=3"], "Did you mean '--epochs'?"),
        (["\u2212\u2212epochs", "3"], "Did you mean '--epochs'?"),
        (["\u00a0--epochs", "3"], "Did you mean '--epochs'?"),
        (["--epochs\u200b", "3"], "Did you mean '--epochs'?"),
        (["--epochs", "\u201c3\u201d"], "--epochs: a finite number is needed"),
        (["-epochs", "3"], "Unknown flag '-epochs'. Did you mean '--epochs'?"),
    ],
    "a number with a unit, or in other digits": [
        (["--epochs", "3 epochs"], "--epochs: a finite number is needed. Received: '3 epochs'"),
        (["--epochs", "1_000"], "--epochs: a finite number is needed"),
        (["--epochs", "\u0663"], "--epochs: a finite number is needed"),
        (["--epochs", "1,5"], "--epochs: a finite number is needed"),
        (["--image-size", "160px"], "--image-size: a whole number is needed. Received: '160px'"),
        (["--image-size", "\uff11\uff16\uff10"], "--image-size: a whole number is needed"),
        (["--checkpoint-every", "5m"], "--checkpoint-every: a finite number is needed"),
        (["--validation-split", "20%"], "--validation-split: a finite number is needed"),
    ],
    "a name that is almost one": [
        (["--device", "IPU"], "Unknown device 'IPU'. Did you mean 'ipu'?"),
        (["--device", "gpu"], "Unknown device 'gpu'. Legal names: auto, ipu, keras."),
        (["--norm", "ln_pn"], "Unknown norm 'ln_pn'. Did you mean 'LN_PN'?"),
        (["--budget", "Demo"], "Unknown budget 'Demo'. Did you mean 'demo'?"),
    ],
    "a value that is needed in a certain form": [
        (["--available-memory-proportion", "-1"], "must be in [0, 1]"),
        (["--available-memory-proportion", "0.1", "7"], "must be in [0, 1]"),
        (["--variable-filter", "Nonsense"], "names no segment: 'Nonsense'"),
        (["--pipeline-splits", "x"], "Unknown split 'x'"),
        (["--loss-scale", "3"], "--loss-scale must be a power of two"),
        (["--cutmix-version", "7"], "Legal names: 1"),
        (["--internal-exchange-optimisation-target", "x"], "balanced, memory, cycles"),
        (["--device", "ipu", "--ipus", "7000000"], "Use fewer replicas"),
    ],
    "several processes, said by half": [
        ([*DISTRIBUTED, "--processes", "2"], "--coordinator and --process missing"),
        (
            [*DISTRIBUTED, "--processes", "2", "--process", "5", "--coordinator", "a:1"],
            "process 5 of 2",
        ),
        (
            [*DISTRIBUTED, "--processes", "2", "--process", "0", "--coordinator", "a"],
            "must be host:port",
        ),
        (
            [*DISTRIBUTED, "--processes", "2", "--process", "0", "--coordinator", "http://a:1"],
            "must be host:port",
        ),
        ([*DISTRIBUTED, "--join-timeout", str(10**12)], "--join-timeout from 1"),
        ([*DISTRIBUTED, "--restarts", str(10**12)], "--restarts must be from 0 to 2,147,483,647"),
        (["--processes", "2"], "--processes: for --distributed"),
    ],
    "a flag that does not exist": [
        (["--list"], "Unknown flag '--list'. effnet-cases lists the cases."),
        (["--epoch", "3"], "Did you mean '--epochs'?"),
        (["--run_dir", "x"], "Did you mean '--run-dir'?"),
        (["--runDir", "x"], "Did you mean '--run-dir'?"),
        (["--lr", "1"], "Did you mean '--base-learning-rate-exponent'?"),
        (["--output-dir", "x"], "Did you mean '--run-dir'?"),
        (["--resume"], "The same command goes on"),
    ],
}


@pytest.fixture
def dry(run, monkeypatch):
    "Run `train CASE --dry-run` with words; the sample set is listed once"
    monkeypatch.setattr(preflight, "open_data", listed)
    return lambda *words: run(*DRY, *words)


@functools.lru_cache(maxsize=None)
def _sample():
    return open_data(verbose=False)


def listed(data_dir=None, data_format=None, **how):
    return _sample() if data_dir is data_format is None else open_data(data_dir, data_format, **how)


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_cannot_run_is_refused_before_it_runs(dry, kind):
    for words, says in LINES[kind]:
        status, out, err = dry(*words)
        assert (status, out) == (2, "") and says in plain(err), (words, out, err)


def test_no_flag_of_ipus_is_suggested_for_a_list(dry):
    assert "--ipus" not in dry("--list")[2]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--data-dir", "/nowhere/at/all"], "must be a folder. Received: '/nowhere/at/all'"),
        (["--run-dir", "/dev/null/x"], "Cannot write /dev/null/x: /dev/null is no folder"),
        (["--run-dir", "x/" * 2100], "File name too long"),
        (["--run-dir", "/proc/x"], "Cannot write /proc/x: /proc takes no file"),
        (["--init", "/dev/null"], "/dev/null is no regular file"),
        (["--init", "nowhere"], "There is no file or folder nowhere"),
        (["--restore-path", "nowhere"], "There is no file or folder nowhere"),
        (["--data-format", "raw"], "No images in"),
        (["--epochs", "1e-9"], "at least one weight update"),
        (["--epochs", "0.001"], "at least one weight update"),
        (["--global-batch-size", "1600"], "exceeds the 1200 training"),
    ],
)
def test_what_is_not_there_is_asked_for_before_a_run(dry, words, says):
    status, _, err = dry(*words)
    assert status == 1 and says in plain(err)


@pytest.mark.parametrize("size, real", [("7", "7, 8"), ("100000", "32, 64, 96")])
def test_a_group_size_that_does_not_divide_is_noted(dry, size, real):
    status, out, _ = dry("--group-size", size)
    assert status == 0 and f"note: group_size={size} does not divide" in out and real in out


def test_the_real_size_of_published_groups_is_no_note(dry):
    assert "note:" not in dry()[1]


def test_one_class_is_noted(tmp_path, run):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / split / "cat" / f"{i}.png")
    words = ("--data-dir", tmp_path, "--budget", "smoke", "--global-batch-size", "4")
    status, out, err = run(*DRY, *words)
    assert status == 0 and "has one class, 'cat': every guess is right" in out, err


def test_a_run_folder_of_another_run_is_refused_before_a_run(tmp_path, dry):
    from effnet_repro import checkpoint
    from effnet_repro.config import case_to_dict, for_one_device

    case = for_one_device(get_case(CASE))
    metadata = {"case": case_to_dict(case), "update": 1, "epoch": 0, "num_classes": 10, "seed": 0}
    checkpoint.save(tmp_path / "checkpoints" / "epoch-0000.safetensors", {}, metadata)
    status, out, err = dry("--run-dir", tmp_path)
    assert (status, out) == (1, "") and "belongs to another run" in plain(err)


SIZES = ("--budget", "smoke", "--global-batch-size", "4")


@pytest.fixture
def folders_of_images(tmp_path):
    "Class folders of eight images each, of which the first is cut off"
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                data = encode(smooth_image(40, 40, i))
                data = data[:99] if (split, name, i) == ("train", "a", 0) else data
                (tmp_path / split / name / f"{i}.jpg").write_bytes(data)
    return tmp_path


def test_images_are_tried_before_a_run(folders_of_images, run, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNET_REPRO_CACHE", str(tmp_path / "cache"))
    status, out, err = run(*DRY, *SIZES, "--data-dir", folders_of_images)
    assert (status, out) == (1, "") and re.search("0.jpg.*on_corrupt='skip'", plain(err))
    status, out, err = run(*DRY, *SIZES, "--data-dir", folders_of_images, "--on-corrupt", "skip")
    assert (status, err) == (0, "")  # as the run itself
    report = json.loads(run("doctor", "--json", "--data-dir", folders_of_images)[1])
    assert any("0.jpg" in p for p in report["problems"].values())


def test_a_run_without_a_whole_checkpoint_is_refused_before_a_run(tmp_path, dry):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-0001.safetensors").write_bytes(b"cut")
    status, out, err = dry("--run-dir", tmp_path)
    assert (status, out) == (1, "") and "No checkpoint in" in plain(err) and "is whole" in err


def test_a_folder_in_use_is_refused_before_a_run(dry, tmp_path):
    with lock_folder(tmp_path / "run"):
        status, out, err = dry("--run-dir", tmp_path / "run")
        assert (status, out) == (1, "") and "in use by another run, process" in plain(err)
    before = sorted(os.listdir(tmp_path / "run"))
    assert dry("--run-dir", tmp_path / "run")[0] == 0  # nobody is there, as after a kill
    (tmp_path / "run" / ".lock").write_text("process 1 on host since yesterday")
    assert dry("--run-dir", tmp_path / "run")[0] == 0
    assert sorted(os.listdir(tmp_path / "run")) == before


OTHERS = [  # (words, words of the answer, status)
    (("plan", CASE, "--image-size", 10**9), "--image-size must be in [32, 4096]", 2),
    (("plan", CASE, "--stages", "100"), "No plan fits: B0-G16-LN_PN at 160 pixels on 16 IPUs", 2),
    (("plan", CASE, "--ipus", 10**30), "No plan fits", 2),
    (("plan", CASE, "--global-batch-size", 10**30), "--global-batch-size must be from 0", 2),
    (("plan", CASE, "--figure", "x.abc"), "a figure is a .png, .svg or .pdf file", 2),
    (("plan", CASE, "--figure", ".png"), "a figure is a .png, .svg or .pdf file", 2),
    (("cases", "--config-path", "."), "which is a folder. Leave it out for the published cases", 2),
    (("cases", "--config-path", "/dev/null"), "which is a device", 2),
    (("cases", "--config-path", "n" * 300), "File name too long", 2),
    (("pack", "x", "--images-in-a-file", "0"), "--images-in-a-file must lie between", 2),
    (("validate", "nowhere"), "There is no file or folder nowhere", 1),
    (("predict", "nowhere", "x.jpg"), "nowhere", 1),
    (("predict", "x", "y", "--class-names", "nowhere"), "Cannot read nowhere", 2),
]


@pytest.mark.parametrize("words, says, status", OTHERS)
def test_other_commands_answer_in_plain_words(refused, words, says, status):
    assert says in plain(refused(*words, status=status))


def test_a_figure_makes_its_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    assert run("plan", CASE, "--figure", tmp_path / "new" / "x.png")[0] == 0
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_that_no_check_foresaw_says_whose_fault_it_is(capsys):
    from effnet_repro.cli.kit import run_program

    def fail(args):
        raise KeyError("x")

    assert run_program(cli.COMMANDS["cases"]._replace(run=fail), []) == 1
    assert "This is a fault of effnet_repro; --debug shows where" in capsys.readouterr().err


def test_float16_on_a_cpu_is_refused_where_tensorflow_computes(dry):
    status, out, err = dry("--precision", "float16", "--backend", "tensorflow")
    assert (status, out) == (1, "") and "float16 needs a GPU" in plain(err)


def test_the_doctor_lists_what_is_missing(run, monkeypatch):
    from effnet_repro.cli import options

    monkeypatch.setattr(options, "_installed", lambda name: name != "keras")
    status, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert status == 1 and any("keras not found" in p for p in report["problems"].values())
    assert {"versions", "backends", "not installed", "cache", "data"} <= set(report)


# ---------------------------------------------------------------- files of cases

WHOLE = {
    **{"model_size": 0, "group_size": 16, "expand_ratio": 4, "norm": "LN_PN", "norm_groups": 1},
    **{"image_size": 160, "micro_batch_size": 32, "gradient_accumulation": 24},
}


def with_case(**values):
    return yaml.safe_dump({"cases": {"mine": {**WHOLE, **values}}})


FILES = {  # kind -> [(text of a file, words of the answer)]
    "scalars that are not what their tag says": [
        ("cases: {mine: !!int ''}", "line 1: '' is no value of the kind int"),
        ("cases:\n  mine: !!timestamp 'x'", "line 2: 'x' is no value of the kind timestamp"),
        ("cases: {mine: !!float '_'}", "is no value of the kind float"),
        ("cases: {mine: !!bool ''}", "is no value of the kind bool"),
        ("cases: {mine: !!binary 'ü'}", "'ü' is no value of the kind binary"),
        ("cases: {mine: !!set x}", "is not a valid configuration: line 1"),
        ("!%a0", "line 1, column 2: bytes that are no text"),
    ],
    "budgets": [
        ("cases: {}\nbudgets: {mine: {epoch: 3}}", "Unknown field 'epoch' in budget 'mine'"),
        ("cases: {}\nbudgets: {mine: {epochs: many}}", "`epochs` must be a finite number"),
        ("cases: {}\nbudgets: {mine: 3}", "budget 'mine' must map"),
        ("cases: {}\nbudgets: [1]", "`budgets:` must map"),
    ],
    "values": [
        (with_case(epochs=1e10), "`epochs` must be between -1e9 and 1e9"),
        (with_case(epochs={"a": 1}), "Received: epochs=a mapping"),
        (with_case(norm={"a": 1}), "Unknown norm 'a mapping'"),
        (with_case(variable_filter=["Tip"]), "names no segment: 'Tip'"),
        (with_case(num_stages=2, pipeline_splits=["x"]), "Unknown split 'x'"),
        (with_case(available_memory_proportion=[0.1] * 3), "one value, or two a stage"),
        (with_case(loss_scale=3), "`loss_scale` must be a power of two"),
        ("cases: {1: {image_size: 3}}", "The name of a case must be text"),
        ("cases: {a/b: " + json.dumps(WHOLE) + "}", "usable as the name of a folder"),
    ],
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_cases_that_cannot_run_is_refused_by_its_name(tmp_path, kind):
    path = tmp_path / "my.yml"
    for text, says in FILES[kind]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            load_cases(path)
        assert says in plain(str(error.value)) and str(path) in str(error.value), text


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "my.yml").write_bytes(b"cases: \xff\xfe")
    with pytest.raises(ValueError, match="my.yml is not a valid configuration: it is not text"):
        load_cases(tmp_path / "my.yml")


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", ".00001", "0.00001"])
def test_numbers_as_yaml_writes_them(tmp_path, text):
    lines = with_case() + f"    weight_decay: {text}\n"
    (tmp_path / "my.yml").write_text(lines + "budgets: {mine: {epochs: 3e0}}\n")
    assert load_cases(tmp_path / "my.yml")["mine"].weight_decay == 1e-5
    assert float(budget_overrides("mine", path=tmp_path / "my.yml")[1]["epochs"]) == 3


# ---------------------------------------------------------------- parameters of notebooks

WRONG = {
    **{
        "run_dir": [["a"], {}, 1.5, True, ""],
        "case": [1, [], True, "", "B9"],
        "backend": [[], 3, "tf"],
    },
    **{
        "data_dir": [[], "gs://b/x", "nowhere", __file__],
        "seed": ["x", 1.5, -1, 2**31, [], float("nan")],
    },
    **{"image_size": ["a", 64.5, []], "epochs": [[], "many"], "new_head": ["yes", [], 3]},
    **{
        "variable_filter": [3, [3], {}, "Tip", ["Top", "blok7"]],
        "budget": [3, [], "tiny"],
        "precision": [8, []],
        "ipus": [0, "x"],
    },
    **{"on_corrupt": ["yes", 1], "data_format": ["zip", []], "device": ["tpu", 0]},
    **{"decoder": ["fast", 1], "protocol": ["mine", []], "weights": ["best", 0]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_parameter_of_the_wrong_kind_is_refused_by_its_name(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=name):
            check_parameters({name: value})


CELLS = [
    "",
    "# How long\ncase = None\nepochs = None\nmax_steps = None",
    "# Parameters\nepochs = 3\n",
]


@pytest.mark.parametrize(
    "name, says", [("epoch", "Did you mean 'epochs'"), ("run_dir", "max_steps")]
)
def test_a_parameter_that_a_notebook_lacks_is_refused(name, says):
    "papermill warns of it, and would train with the defaults."
    check_parameters({"In": [*CELLS, "globals()"], "epochs": 3})
    with pytest.raises(ValueError, match=f"Unknown parameter '{name}'.*{says}"):
        check_parameters({"In": [*CELLS[:2], CELLS[2] + f"{name} = 3", "globals()"]})
    check_parameters({"In": ["", "import os", CELLS[2], "x = ["], name: None})  # no such notebook


def test_a_parameter_means_what_it_looks_like():
    given = dict(run_dir=20240115, backend=None, precision=16.32, image_size=64.0, seed=None)
    found = check_parameters({**given, "variable_filter": "Top, block7", "weight_decay": "1e-5"})
    assert found["run_dir"] == "20240115" and found["backend"] == "tensorflow"
    assert found["precision"] == "16.32" and found["image_size"] == 64 and found["seed"] == 0
    assert found["variable_filter"] == ("Top", "block7") and found["weight_decay"] == 1e-5


def parameters_of(name):
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    return {t.targets[0].id: t.value for t in ast.parse("".join(cell["source"])).body}


@pytest.mark.parametrize("name", ["40_train", "41_finetune", "42_validate"])
def test_every_parameter_is_checked(name):
    names = parameters_of(name)
    assert set(names) <= {*PARAMETERS, *FIELDS}
    values = {n: ast.literal_eval(v) for n, v in names.items()}
    assert set(check_parameters(values)) == set(values)  # its own defaults are sound
    text = (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "globals().update(check_parameters(globals()))" in text and "quiet_end()" in text


def test_the_end_of_a_kernel_is_no_error(monkeypatch):
    import logging
    from types import SimpleNamespace

    from effnet_repro.runs.parameters import quiet_end

    log, said = logging.getLogger("test-kernel"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    shell = SimpleNamespace(kernel=SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    quiet_end()
    log.error("KeyboardInterrupt caught in kernel.")
    log.error("something else")
    assert said == ["something else"]


# ---------------------------------------------------------------- commands of pages

PAGES = ("README.md", "nbs/40_train.ipynb", "nbs/41_finetune.ipynb", "nbs/42_validate.ipynb")


def commands(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    found = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_papermill_finds_the_folder_that_it_writes_to(page):
    lines = [
        line for line in commands(page) if re.search(r"\bpapermill\b.*\.ipynb .*\.ipynb", line)
    ]
    assert lines
    for line in lines:
        output = re.search(r"nbs/\S+\.ipynb (\S+\.ipynb)", line)[1]
        assert f"mkdir -p {Path(output).parent} && papermill" in line
