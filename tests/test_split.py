"""A folder of class folders: names decide which images validate, and a run keeps its share."""

import numpy as np
import pytest
from images import bmp, folders
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro.data import open_data
from effnet_repro.data.split import place_of
from effnet_repro.training import train, validate

WORDS = {**SMOKE, "max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8}


def names(data, split):
    part = data.splits[split]
    return {"/".join(part.files[i].split("/")[-2:]) for i in part.file}


@pytest.fixture
def root(tmp_path):
    found = {f"{c}/{i}.bmp": bmp(ord(c) + i) for c in "ab" for i in range(25)}
    return folders(tmp_path / "all", found)


def test_names_choose(root, tmp_path, capsys):
    data = open_data(root)
    assert "0.2 of them validate, chosen by their names" in capsys.readouterr().out
    train_names, held = names(data, "train"), names(data, "validation")
    assert held == {n for n in train_names | held if place_of(n) < 0.2} and 4 < len(held) < 18
    assert data.class_names == ("a", "b") and data.train_count + data.validation_count == 50
    folders(root, {f"{c}/new{i}.bmp": bmp(i) for c in "abc" for i in range(9)})
    more = open_data(root, verbose=False)
    assert held <= names(more, "validation") and train_names <= names(more, "train")
    moved = root.rename(tmp_path / "elsewhere")
    assert names(open_data(moved, verbose=False), "validation") == names(more, "validation")
    half = open_data(moved, validation_split=0.5, verbose=False)
    assert names(half, "validation") > names(more, "validation")


def test_every_class_keeps_an_image_to_train_on(tmp_path):
    name = next(f"{i}.bmp" for i in range(99) if place_of(f"a/{i}.bmp") < 0.1)
    root = folders(tmp_path, {f"a/{name}": bmp(0), "b/1.bmp": bmp(1)})
    data = open_data(root, verbose=False)
    assert sorted(data.splits["train"].label) == [0, 1] and data.validation_count == 0


def test_where_there_are_validation_images_nothing_moves(tmp_path, capsys):
    places = {f"{s}/{c}/{i}.bmp": bmp(i) for s in ("train", "val") for c in "ab" for i in range(9)}
    root = folders(tmp_path, places)
    assert open_data(root, validation_split=0.5).validation_count == 18
    assert "validation_split is left aside" in capsys.readouterr().out
    only = folders(tmp_path / "only", {n: d for n, d in places.items() if "train" in n})
    assert open_data(only, verbose=False).validation_count == 0
    assert open_data(only, validation_split=0.5, verbose=False).validation_count > 0
    for share in (0, 1, -0.1, 1.5, "0.2", [0.5]):
        with pytest.raises(ValueError, match="must be in .0, 1."):
            open_data(only, validation_split=share)
    with pytest.raises(FileNotFoundError, match="No data set"):
        open_data(folders(tmp_path / "no", {"a/notes.txt": b""}))


def test_a_run_keeps_its_share(root, tmp_path, run):
    done = train(TINY, root, tmp_path / "run", validation_split=0.4, **WORDS)
    assert checkpoint.read_metadata(done.checkpoint)["validation_split"] == 0.4
    again = train(TINY, root, tmp_path / "run", **{**WORDS, "max_steps": 2})
    assert again.update == 2
    held = open_data(root, validation_split=0.4, verbose=False).validation_count
    assert validate(done.run_dir, root)["last"].pictures == held
    status, out, err = run("doctor", "--data-dir", root, "--validation-split", 0.4, "--no-trial")
    assert f"{held} validation" in out, err
    with pytest.raises(ValueError, match="other training|training images"):
        train(TINY, root, tmp_path / "run", validation_split=0.3, **{**WORDS, "max_steps": 3})


def test_hashes_are_even():
    places = np.array([place_of(f"cat/{i}.jpg") for i in range(4000)])
    assert abs((places < 0.2).mean() - 0.2) < 0.03 and 0 <= places.min() and places.max() < 1
