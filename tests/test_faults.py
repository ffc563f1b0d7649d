"""Bad input: one message of one line that says what, where and the hint, and nothing lost.

The rows of `nbs/44_errors.ipynb` name the test that proves each; here are those that have no better home.
"""

import ast
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encode, quick, record, smooth_image, write
from tiny import PYTHON, ROOT, SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro import data as d
from effnet_repro.config import Case, get_case, load_cases, override
from effnet_repro.runs import StopSignals, lock_folder, read_metrics, watch
from effnet_repro.training import finetune, train, validate


def one_line(error):
    "The message of an error, which has no second line and no words of a decoder or a parser."
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and "Traceback" not in text and "0x" not in text, text
    return text


# ---------------------------------------------------------------- configurations

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.floats() | st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([f.name for f in dataclasses.fields(Case)]), odd_values)
def test_a_field_is_sound_or_refused_by_name(field, value):
    case = get_case("B0-G16-LN_PN-Half_16IPU_2x8")
    try:
        new = dataclasses.replace(case, **{field: value})
    except ValueError as error:
        assert case.name in one_line(error) or field == "name" or repr(value) in str(error)
    else:
        kept = getattr(new, field)
        assert not isinstance(kept, float) or np.isfinite(kept)
        assert np.isfinite(new.learning_rate) and 0 <= new.rmsprop_decay < 1
        assert json.loads(json.dumps(dataclasses.asdict(new)))["name"] == new.name


@pytest.mark.parametrize(
    "text, says",
    [
        ("cases: {a: [1,2}", "line 1, column 16: expected ',' or ']'"),
        ("cases:\n  a:\n\tb: 1", r"line 3, column 1: found character '\\t'"),
        ("cases:\n  a: 1\n  a: 2", "Key 'a' stands twice, in lines 2 and 3"),
        ("? [a, b]\n: 1\ncases: {}", "line 1: a key must be a plain name"),
        ("cases: !!python/object:os.system {}", "could not determine a constructor"),
        ("cases: {a: {<<: *nope}}", "found undefined alias 'nope'"),
        ("cases: {a: {image_size: 32}}", "Case 'a' in .* lacks model_size"),
        ("- 1", "has no section `cases:`"),
        ("cases: {}\ncase: {}", "Unknown section 'case' in .* Did you mean 'cases'"),
        ("[" * 3000, "is not a valid configuration: it is nested too deeply"),
        ("cases: {a: {epochs: 017}}", "line 1: '017' means 15 in YAML. Write the number itself"),
        ("cases: {a: {epochs: 1:30}}", "line 1: '1:30' means 90 in YAML"),
        ("cases: {a: {epochs: 1:30.5}}", "line 1: '1:30.5' means 90.5 in YAML"),
        ("\x00", "is not a valid configuration"),
    ],
)
def test_a_broken_configuration_names_the_line(tmp_path, text, says):
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        load_cases(path)
    assert str(path) in one_line(error)


@quick
@given(st.integers(0, 10**9), st.sampled_from("{}[]:,&*!|>'\"%@`\t#-? \n0a"))
def test_a_configuration_with_one_wrong_character_is_read_or_refused(tmp_path, place, character):
    text = "cases:\n  a: &x {norm: GN, group_size: 1}\n  b: {<<: *x, image_size: 32}\n"
    place %= len(text)
    path = tmp_path / "c.yml"
    path.write_text(text[:place] + character + text[place + 1 :])
    with pytest.raises(ValueError) as error:  # both lack fields, whatever the character
        load_cases(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(global_batch_size=16_512, micro_batch_size=16), "global batch of at most 16384"),
        (dict(image_size=31), r"`image_size` must be .*Received: image_size=31"),
        (dict(micro_batch_size=7, gradient_accumulation=3), "The product is"),
        (dict(micro_batch_size=7), "Use a micro_batch_size that divides"),
        (dict(imagesize=64), "Did you mean 'image_size'"),
        (dict(name="-a"), "`name` must be usable as the name of a folder"),
        (dict(name="a\ud800"), "`name` must be usable as the name of a folder"),
        (dict(norm="LNPN"), "Unknown norm 'LNPN'.*Did you mean 'LN_PN'"),
    ],
)
def test_rules_of_a_case(values, says):
    with pytest.raises(ValueError, match=says) as error:
        override(get_case("B0-G16-LN_PN-Half_16IPU_2x8"), **values)
    one_line(error)


# ---------------------------------------------------------------- the run folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two steps."
    return train(TINY, run_dir=tmp_path_factory.mktemp("run"), **SMOKE)


HOLD = """
import sys, time
from effnet_repro.runs import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_and_free_when_its_run_is_killed(run):
    before = sorted(p.name for p in run.run_dir.rglob("*"))
    command = [sys.executable, "-c", HOLD, str(run.run_dir)]
    holder = subprocess.Popen(command, env=PYTHON, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match=f"in use by another run, process {holder.pid} on") as e:
        train(TINY, run_dir=run.run_dir, **SMOKE)
    one_line(e)
    assert sorted(p.name for p in run.run_dir.rglob("*")) == before
    holder.kill()
    holder.communicate()
    with lock_folder(run.run_dir):  # nothing to clear by hand
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_folder(tmp_path):
        pass
    (told,) = caplog.records
    assert told.name == "effnet_repro.runs.lock" and told.levelname == "WARNING"
    assert re.search("No lock on .*make sure that no other run", told.getMessage())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Cannot write .*Choose another folder") as error:
        train(TINY, run_dir=tmp_path / "file" / "run", **SMOKE)
    one_line(error)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_disk_refuses_is_one_line(tmp_path, monkeypatch, number):
    path = checkpoint.save(tmp_path / "a.safetensors", {"w": np.ones(3)}, {"update": 1})
    whole = path.read_bytes()

    def refuse(path, data):
        Path(path).write_bytes(data[:10])  # half of it is there already
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "_write", refuse)
    with pytest.raises(OSError, match=f"Cannot write .*{os.strerror(number)}") as error:
        checkpoint.save(path, {"w": np.zeros(3)}, {"update": 2})
    assert "What was there before is unchanged" in one_line(error) and error.value.errno == number
    assert path.read_bytes() == whole and os.listdir(tmp_path) == [path.name]


def test_a_full_disk_in_a_run_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    options = {**SMOKE, "max_steps": 4}
    good = train(TINY, run_dir=tmp_path, **{**options, "max_steps": 2})
    whole, written = good.checkpoint.read_bytes(), checkpoint._write

    def full(path, data):
        if ".safetensors" in Path(path).name:
            written(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left on device. Needed: .* free: .*Make room"):
        train(TINY, run_dir=tmp_path, **options)
    monkeypatch.undo()
    assert good.checkpoint.read_bytes() == whole
    assert not list(tmp_path.rglob("*.tmp"))
    assert train(TINY, run_dir=tmp_path, **options).update == 4  # there is room again


def rewrite(path, change):
    arrays, metadata = checkpoint.load(path)
    change(arrays, metadata)
    checkpoint.save(path, arrays, metadata)


def _narrow(arrays, metadata):
    arrays["all/Top/logits/dense/bias"] = arrays["all/Top/logits/dense/bias"][:-1]


def _no_slot(arrays, metadata):
    del arrays["slots/momentum/all/Top/logits/dense/bias"]


@pytest.mark.parametrize(
    "change, says",
    [
        (_narrow, "wrong shape.*bias|bias.*shape"),
        (_no_slot, "the slot momentum of all/Top/logits/dense/bias has shape None"),
        (lambda a, m: m.update(pictures=7), "on 7 training images of 10 classes"),
        (lambda a, m: m.update(num_classes=7), "training images of 7 classes"),
        (lambda a, m: m.update(data_fingerprint="0"), "with other names, bytes or labels"),
        (lambda a, m: m["case"].update(norm="LN"), "norm: LN there, LN_PN here"),
        (lambda a, m: m["case"].update(nrom="LN"), "Unknown key 'nrom'.*Did you mean 'norm'"),
    ],
)
def test_a_checkpoint_that_does_not_fit(run, tmp_path, change, says):
    path = tmp_path / "checkpoints" / run.checkpoint.name
    path.parent.mkdir()
    path.write_bytes(run.checkpoint.read_bytes())
    rewrite(path, change)
    with pytest.raises(ValueError, match=says) as error:
        train(TINY, run_dir=tmp_path, **SMOKE)
    one_line(error)


def test_a_truncated_checkpoint_is_skipped_with_a_warning(run, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "epoch-0001.safetensors").write_bytes(run.checkpoint.read_bytes())
    (folder / "epoch-0002.safetensors").write_bytes(run.checkpoint.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="epoch-0002.safetensors is not a whole checkpoint"):
        assert checkpoint.latest(folder).name == "epoch-0001.safetensors"


# ---------------------------------------------------------------- while it runs


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    options = {**SMOKE, "warmup_epochs": 0}
    good = train(TINY, run_dir=tmp_path, **options)
    whole = good.checkpoint.read_bytes()
    metadata = checkpoint.read_metadata(good.checkpoint)
    arrays, _ = checkpoint.load(good.checkpoint)
    arrays["all/Top/logits/dense/kernel"][:] = 3e38  # the next loss overflows
    checkpoint.save(good.checkpoint, arrays, metadata)
    whole = good.checkpoint.read_bytes()
    with pytest.raises(FloatingPointError, match="The loss of step 3 is .*epoch-0") as error:
        train(TINY, run_dir=tmp_path, **{**options, "max_steps": 4})
    assert str(good.checkpoint) in one_line(error) and good.checkpoint.read_bytes() == whole
    assert checkpoint.latest(tmp_path / "checkpoints") == good.checkpoint


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    from effnet_repro.training import state

    get = state.get_weights
    broken = lambda network: {n: np.full_like(a, np.nan) for n, a in get(network).items()}
    monkeypatch.setattr(state, "get_weights", broken)
    with pytest.raises(FloatingPointError, match="After step 2 .*not finite.*no checkpoint yet"):
        train(TINY, run_dir=tmp_path, **SMOKE)
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_the_second_interrupt_stops_at_once(capsys):
    class Follow:
        stop_requested = False

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match="the last checkpoint is good"):
        with StopSignals(Follow):
            os.kill(os.getpid(), signal.SIGINT)
            assert Follow.stop_requested
            os.kill(os.getpid(), signal.SIGINT)
    assert "run the same command again to go on" in capsys.readouterr().err
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_killed_between_checkpoint_and_row(tmp_path, monkeypatch):
    "The row of an epoch is in its checkpoint, too, and the next run writes it."
    from effnet_repro.runs import recorder

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(recorder, "write_rows", die)
    with pytest.raises(Killed):
        train(TINY, run_dir=tmp_path, **SMOKE)
    monkeypatch.undo()
    monkeypatch.setattr(watch, "save_curves", lambda run_dir: None)
    train(TINY, run_dir=tmp_path, **SMOKE)
    assert read_metrics(tmp_path)["update"].tolist() == [2]


def test_a_set_without_validation_images_trains(tmp_path, capsys):
    data = tmp_path / "data"
    write(
        data, "train", [record(encode(smooth_image(40, 50, i)), label=i % 2 + 1) for i in range(12)]
    )
    options = {**SMOKE, "global_batch_size": 6, "micro_batch_size": 6, "validate_every": 1}
    run = train(TINY, data, tmp_path / "run", **options)
    assert run.finished and run.scores == {}
    assert "no validation images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no validation images in .*needs validation-") as error:
        validate(run.run_dir, data)
    one_line(error)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda r: train(5, **SMOKE), "`case` must be a name or a `Case`"),
        (lambda r: train(TINY, seed=-1, **SMOKE), "`seed` must be a whole number"),
        (lambda r: train(TINY, seed=1.5, **SMOKE), "Received: seed=1.5"),
        (lambda r: train(TINY, keep=0, **SMOKE), "`keep` must be a whole number from 1"),
        (lambda r: train(TINY, on_corrupt="yes", **SMOKE), "Unknown on_corrupt 'yes'"),
        (lambda r: train(TINY, epochs=float("nan"), **SMOKE), "`epochs` must be a finite number"),
        (lambda r: train(TINY, data_dir="nowhere", **SMOKE), "`data_dir` must be a folder"),
        (lambda r: validate("gone", "nowhere"), "There is no file or folder gone"),
        (lambda r: validate(r.run_dir, batch=0), "`batch` must be a whole number from 1"),
        (lambda r: validate(r.run_dir, image_size=16), "`image_size` must be .* from 32"),
        (lambda r: finetune(r.run_dir, image_size=20, **SMOKE), "`image_size` must be"),
        (lambda r: finetune(r.run_dir, variable_filter="Tip", **SMOKE), "names no segment: 'Tip'"),
    ],
)
def test_odd_options(run, tmp_path, monkeypatch, capsys, call, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=says) as error:
        call(run)
    one_line(error)
    assert os.listdir(tmp_path) == []  # nothing was begun
    assert "fine-tuning" not in capsys.readouterr().out  # nor said to be


def test_a_size_that_breaks_the_mod_32_rule_is_warned_of(run, tmp_path, capsys):
    finetune(run.run_dir, run_dir=tmp_path, image_size=80, max_steps=1, **SMOKE)
    assert re.search("warning: .*leaves 16 modulo 32", capsys.readouterr().out)


# ---------------------------------------------------------------- the page


def test_every_row_of_the_page_names_a_test_that_exists():
    nb = json.loads((ROOT / "nbs" / "44_errors.ipynb").read_text())
    text = "\n".join("".join(c["source"]) for c in nb["cells"])
    named = set(re.findall(r"(test_\w+)\.py::(test_\w+)", text))
    assert len(named) > 25
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (file, test)


def test_too_little_memory_is_told_before_the_run(monkeypatch, capsys):
    from effnet_repro.config import for_one_device
    from effnet_repro.training import estimation

    case = for_one_device(get_case("B0-G16-LN_PN-Half_16IPU_2x8"), 384, 768)
    sample = d.open_data(verbose=False)
    monkeypatch.setattr(estimation, "found_gib", lambda: 2.0)
    estimation.say_estimate(case, sample)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    fits = int(re.search(r"micro_batch_size=(\d+) would fit", told)[1])
    assert 768 % fits == 0 and estimation.needed_gib(case, fits) <= 2
    assert estimation.needed_gib(case, next(n for n in range(fits + 1, 385) if 768 % n == 0)) > 2
    estimation.say_estimate(override(case, micro_batch_size=fits), sample)
    assert "warning" not in capsys.readouterr().out
    for found in (None, 0.5):
        monkeypatch.setattr(estimation, "found_gib", lambda found=found: found)
        told = estimation.memory_warning(case)
        assert told is None if found is None else "not even one image" in told
