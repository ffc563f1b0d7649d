"""Commands on home and on the pages of tasks: each is understood by its program, and the shortest way runs."""

import json
import re
import shlex

import pytest
from conversions import convert, write_timm
from images import ROOT, encode, folders, smooth_image
from tiny import STAGES, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import cli
from effnet_repro.config import load_cases, override
from effnet_repro.network import initial_weights
from effnet_repro.scaling import ModelSpec

PAGES = (
    "index",
    "06_your_classes",
    "07_export",
    "08_tasks",
    "41_finetune",
    "43_commands",
    "46_own_pictures",
    "90_cli",
)


def commands(page):
    "The lines that begin with effnet- in the shell blocks of a page, as words"
    found = []
    for cell in json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            for block in re.findall(r"(?ms)^```sh\n(.*?)^```", "".join(cell["source"])):
                lines = block.replace("\\\n", " ").splitlines()
                found += [
                    shlex.split(li, comments=True) for li in lines if li.startswith("effnet-")
                ]
    return found


def next_lines(text):
    "The commands that a command names at its end, as words"
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  effnet-")]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_s_commands_are_understood(page):
    for name, *words in commands(page):
        if "..." not in words:
            args = cli.COMMANDS[name.partition("-")[2]].parser().parse_args(words)
            cases = getattr(args, "case", None) or ()  # a name that is none cannot be pasted
            assert set([cases] if isinstance(cases, str) else cases) <= set(load_cases()), words


def test_there_are_commands_to_look_at():
    assert sum(len(commands(page)) for page in PAGES) > 12
    assert {words[0] for words in commands("08_tasks")} == {
        f"effnet-{name}" for name in cli.COMMANDS
    }
    assert [words[0] for words in commands("06_your_classes")] == [
        "effnet-finetune",
        "effnet-validate",
        "effnet-predict",
        "effnet-predict",
    ]
    with pytest.raises(cli.UsageError):
        cli.COMMANDS["predict"].parser().parse_args(["run", "image", "--topp", "1"])


def test_the_commands_for_other_classes_run(run, tmp_path, monkeypatch):
    "On a folder of two classes, with a network that knows three others."
    monkeypatch.chdir(tmp_path)
    kinds = {"cat": 0, "dog": 100}
    image = lambda i, light: encode(smooth_image(40, 40, i) // 2 + light)
    places = {f"{k}/{i}.jpg": image(i, v) for k, v in kinds.items() for i in range(12)}
    folders(tmp_path / "photographs", places)
    case = override(TINY, image_resize="modern")
    spec = ModelSpec.from_case(case, 3)
    names = ("bee", "hen", "owl")
    weights = convert.Weights(spec, initial_weights(spec), case, names)
    (tmp_path / "old-run" / "checkpoints").mkdir(parents=True)
    convert.write_ours(tmp_path / "old-run" / "checkpoints" / "epoch-0001.safetensors", weights)
    again, (*mine, theirs) = [], commands("06_your_classes")
    for name, *words in mine:
        more = ["--max-steps", 2, "--no-progress", "--weights", "last"] * (
            name == "effnet-finetune"
        )
        status, out, err = run(name.partition("-")[2], *words, *more)
        assert status == 0, (name, err)
        again += next_lines(out) if name == "effnet-finetune" else []
    assert "photographs/cat/0.jpg" in out
    assert [words[0] for words in again] == ["effnet-validate", "effnet-predict"]
    for name, *words in again:  # a run says what comes next
        assert run(name.partition("-")[2], *words)[0] == 0
    write_timm(tmp_path / "tf_efficientnet_b0.safetensors", "tf_efficientnet_b0")
    (tmp_path / "imagenet.txt").write_text("\n".join(f"kind {i}" for i in range(10)))
    (tmp_path / "photo.jpg").write_bytes(encode(smooth_image(40, 40)))
    status, out, err = run("predict", *theirs[1:], "--image-size", 32)  # a network of ten classes
    assert status == 0 and "kind " in out, err
    status, out, err = run("pack", "packed", "--data-dir", "photographs")
    ((name, *words),) = next_lines(out)
    how = ("--budget", "case", "--global-batch-size", 8, "--dry-run")  # of 24 images
    assert run(name.partition("-")[2], *words, *how)[0] == 0


def test_the_program_on_home_runs(tmp_path, monkeypatch):
    "As it stands, on a folder of 200 images; the network of the training is smaller, and it takes one step."
    from effnet_repro import training

    text = (ROOT / "nbs" / "index.ipynb").read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    (program,) = [p for c in cells for p in re.findall(r"(?ms)^```python\n(.*?)^```", c)]
    monkeypatch.chdir(tmp_path)
    image = lambda i, light: encode(smooth_image(40, 40, i) // 2 + light)
    kinds = {"cat": 0, "dog": 100}
    places = {f"{k}/{i}.jpg": image(i, v) for k, v in kinds.items() for i in range(100)}
    folders(tmp_path / "images", places)
    brief = dict(net_stages=STAGES, top_filters=128, max_steps=1, progress=False)
    real = training.train
    monkeypatch.setattr(training, "train", lambda *words, **how: real(*words, **how, **brief))
    found = {}
    exec(compile(program, "home", "exec"), found)
    run = found["run"]
    assert run.update == 1 and run.finished and run.case.global_batch_size == 16
    assert run.case.image_size == 96 and found["model"].output_shape == (None, 10)
