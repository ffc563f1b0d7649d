"""Paths as users write them, names of any bytes, and places that are not on this machine."""

import argparse
import os
import subprocess
import sys

import pytest
from tiny import POSIX, PYTHON

from effnet_repro import cli
from effnet_repro.data import open_data
from effnet_repro.messages import shown
from effnet_repro.paths import local_path

ELSEWHERE = ("gs://bucket/run", "s3://b/x", "https://host/x", "ftp://host/x", "hdfs://x/y")


@pytest.mark.parametrize(
    "place", [*ELSEWHERE, "", "a\0b", "~nobody-has-this-name/x", 1.5, None, [1]]
)
def test_what_is_no_path_of_this_machine_is_refused(place):
    with pytest.raises(ValueError, match="^`run_dir` ") as error:
        local_path(place, "run_dir")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, found",
    [("~/x", "HOME/x"), ("~", "HOME"), (b"caf\xe9", "caf\udce9"), (20240115, "20240115")],
)
def test_paths_as_users_write_them(monkeypatch, tmp_path, given, found):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(local_path(given)) == found.replace("HOME", str(tmp_path))


@pytest.mark.parametrize("locale", [{}, POSIX])
def test_paths_for_libraries_that_encode_by_themselves(locale):
    code = """
import os, sys
from effnet_repro.paths import utf8_path
assert utf8_path(os.fsdecode(b"\\xc3\\xa9")) == utf8_path("\\xe9") == "\\xe9"
try:
    utf8_path(os.fsdecode(b"caf\\xe9"))
except ValueError as error:
    assert "not UTF-8, which TensorFlow cannot use. Rename it" in str(error)
else:
    sys.exit("accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**PYTHON, **locale}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_what_tensorflow_cannot_name_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    from effnet_repro import convert
    from effnet_repro.export import export, exporting

    monkeypatch.setattr(exporting, "read_subject", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match="not UTF-8"):
        export("run", tmp_path / "caf\udce9", "saved_model")
    (tmp_path / "caf\udce9.ckpt.index").write_bytes(b"")
    with pytest.raises(ValueError, match="not UTF-8"):
        convert.read(tmp_path / "caf\udce9.ckpt")


def _calls():
    "Everything that takes a path: name -> a call with that path"
    from effnet_repro.averaging import load_weights
    from effnet_repro.checkpoint import atomic_write, latest, load, load_metadata, newest_file
    from effnet_repro.config import load_cases
    from effnet_repro.convert import convert
    from effnet_repro.data.files import find_images
    from effnet_repro.data.packed import Packing, pack
    from effnet_repro.runs import (
        find_run,
        lock_folder,
        read_metrics,
        resolve_finetuning,
        resolve_training,
        write_json,
    )

    def lock(path):
        with lock_folder(path):
            pass

    return {
        "open_data": lambda p: open_data(p),
        "load_cases": lambda p: load_cases(p),
        "load": load,
        "load_metadata": load_metadata,
        "newest_file": newest_file,
        "latest": latest,
        "load_weights": load_weights,
        "atomic_write": lambda p: atomic_write(p, b""),
        "write_json": lambda p: write_json(p, {}),
        "lock_folder": lock,
        "read_metrics": read_metrics,
        "resolve_training": lambda p: resolve_training("B0-G1-GN-Native_16IPU_2x8", p).run_dir,
        "resolve_finetuning": resolve_finetuning,
        "find_run": lambda p: find_run(p, None, None, "runs"),
        "convert from": lambda p: convert(p, "x.safetensors"),
        "find_images": lambda p: find_images([p]),
        "pack": lambda p: pack(open_data(verbose=False), p, Packing()),
    }


@pytest.mark.parametrize("name", _calls())
def test_every_function_refuses_a_place_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be on this machine. Received: gs://bucket/run"):
        _calls()[name]("gs://bucket/run")
    assert os.listdir(tmp_path) == []  # no folder called "gs:"


@pytest.mark.parametrize("name", ["atomic_write", "lock_folder", "resolve_training"])
def test_every_function_knows_the_home_folder(tmp_path, monkeypatch, name):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    _calls()[name]("~/new")
    assert sorted(os.listdir(tmp_path)) == ["home"]  # nothing called "~"


FLAGS = [
    (("train", "CASE", "--dry-run"), ("--run-dir", "--data-dir", "--init", "--config-path")),
    (("train", "CASE", "--dry-run"), ("--restore-path",)),
    (("finetune",), ("", "--restore-path", "--init-path", "--data-dir", "--config-path")),
    (("validate",), ("", "--run-dir", "--data-dir")),
    (("predict", "x"), ("", "--class-names")),
    (("convert", "x"), ("", "--class-names", "--config-path")),
    (("convert",), ("",)),
    (("pack",), ("", "--data-dir")),
    (("export", "x"), ("", "--class-names", "--int8")),
    (("export",), ("",)),
    (("doctor",), ("--data-dir", "--config-path")),
    (("plan", "CASE"), ("--figure", "--config-path")),
    (("cases",), ("--config-path",)),
    (("compare",), ("",)),
    (("compare", "x"), ("",)),
]
#: What a help text calls the value of a flag or argument that is a place.
A_PLACE = {"DIR", "PATH", "FILE", "SOURCE", "TARGET", "OUT", "RUN_OR_FILE"}


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS} - {"compare"}))
def test_every_flag_that_is_a_place_refuses_one_elsewhere(name):
    "So one that comes later does."
    actions = cli.COMMANDS[name].parser()._actions
    places = [a for a in actions if a.metavar in A_PLACE]
    assert len(places) > 0
    for action in places:
        with pytest.raises(argparse.ArgumentTypeError, match="on this machine"):
            action.type("s3://bucket/x.png")


@pytest.mark.parametrize("words, flag", [(w, f) for w, flags in FLAGS for f in flags])
def test_every_command_refuses_a_place_elsewhere(refused, words, flag):
    words = [w.replace("CASE", "B0-G1-GN-Native_16IPU_2x8") for w in words]
    line = refused(*words, *([flag] if flag else []), "gs://bucket/run.png")
    assert "on this machine" in line and "gs://bucket/run.png" in line


def test_names_that_are_not_utf8_can_be_shown():
    assert shown("caf\udce9.jpg") == "caf\\xe9.jpg" and shown("café") == "café"


NAMES = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_loop import Toy, train, DATA
from effnet_repro.runs import watch, read_rows
from effnet_repro.data import open_data
from effnet_repro.messages import say
root = sys.argv[1]
data = open_data(os.path.join(root, "data"))
assert data.train_count == 4 and data.class_names and len(data.fingerprint) == 16
data.split_fingerprint("validation")
watch.Events.write = lambda self, row: None
import dataclasses
from types import SimpleNamespace
made = SimpleNamespace(**{**vars(DATA), "root": data.root, "class_names": ("a", "b")})
run = train(os.path.join(root, "run"), data=made)
assert run.finished and read_rows(run.run_dir / "validation.csv")[0]
assert train(os.path.join(root, "run"), data=made).finished
say(f"done {run.run_dir}")
"""


@pytest.mark.parametrize("name", [b"caf\xe9", "café".encode()])
@pytest.mark.parametrize("locale", [{}, POSIX])
def test_names_of_any_bytes_in_any_locale(tmp_path, name, locale):
    "Of an image, a class, the data folder and the run folder"
    from PIL import Image

    root = os.path.join(os.fsencode(tmp_path), name)
    for split in (b"train", b"val"):
        for label in (b"cat", name):
            folder = os.path.join(root, b"data", split, label)
            os.makedirs(folder)
            for i in range(2):
                with open(os.path.join(folder, name + b"%d.jpg" % i), "wb") as file:
                    Image.new("RGB", (40, 40), (i * 40, 0, 0)).save(file, "JPEG")
    tests = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", NAMES, root, tests]
    done = subprocess.run(command, env={**PYTHON, **locale}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-600:]
    assert done.stdout.splitlines()[-1].startswith(b"done ")
