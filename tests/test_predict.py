"""Images in, classes out: the same pixels and answers as a validation, damaged files named, every form of output."""

import collections
import csv
import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from images import ROOT, encode, folders, smooth_image
from PIL import Image
from tiny import PYTHON, TINY, small_network  # noqa: F401

from effnet_repro import checkpoint, convert, training
from effnet_repro.averaging import WeightAverage
from effnet_repro.config import override
from effnet_repro.data import open_data, validation_arrays
from effnet_repro.data.files import SquaresJob, as_pixels, find_images
from effnet_repro.network import initial_weights
from effnet_repro.predict import Predictor, predict, suitable_batch
from effnet_repro.scaling import ModelSpec

NAMES = ("cat", "dog", "owl")


def write_network(path, names=NAMES, seed=0, **fields):
    "A file of a small network with random weights, and its spec"
    case = override(TINY, **{"image_resize": "modern", **fields})
    spec = ModelSpec.from_case(case, len(names))
    weights = convert.Weights(spec, initial_weights(spec, seed), case, names)
    convert.write_ours(path, weights)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network") / "small.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Class folders with two images of each class, of four kinds; the validation images are all of them"
    root, found = tmp_path_factory.mktemp("images"), {}
    kinds = ("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")
    for i, name in enumerate(NAMES * 2):
        kind, mode = kinds[i % 4]
        data = encode(smooth_image(40 + i, 70 - 3 * i, i), kind, mode)
        found[f"val/{name}/{i}.{kind.lower()}"] = data
    return folders(root, found)


@pytest.fixture
def mixed(images, tmp_path):
    "Three images, a damaged one among them, and what is no image"
    one, two, *_ = sorted(images.rglob("*.jpeg"))
    (tmp_path / "a.jpg").write_bytes(one.read_bytes())
    (tmp_path / "b.jpg").write_bytes(two.read_bytes()[:-40])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.JPG").write_bytes(two.read_bytes())
    return tmp_path


# ---------------------------------------------------------------- as a validation


@pytest.mark.parametrize("resize", ["modern", "published"])
def test_pixels_are_those_of_a_validation(images, tmp_path, resize):
    network = Predictor(write_network(tmp_path / "n.safetensors", image_resize=resize))
    data = open_data(images, verbose=False)
    wanted, _, _ = next(validation_arrays(data, 32, 6, image_resize=resize))
    files = [data.splits["validation"].files[i] for i in data.splits["validation"].file]
    assert np.array_equal([network.see(path) for path in files], wanted)


def test_the_best_guess_is_the_one_that_validation_counts(network, images):
    scores = training.validate(network, images)[network.name]
    found = predict(network, images / "val", top=3, precision="float32")
    right = [p.guesses[0].name == p.image.split("/")[-2] for p in found]
    assert np.mean(right) == scores.top1 and len(found) == scores.pictures == 6
    own = [next(g for g in p.guesses if g.name == p.image.split("/")[-2]) for p in found]
    loss = -np.mean(np.log([g.probability for g in own]))
    assert loss == pytest.approx(scores.loss, rel=1e-5)


def test_whatever_an_image_is_and_however_many_at_a_time(network, images):
    path = sorted(images.rglob("*.png"))[0]
    pixels = Image.open(path)
    same = [path, str(path), path.read_bytes(), np.asarray(pixels), pixels]
    network = Predictor(network)
    found = list(network(same, top=2))
    assert all(p.guesses == found[0].guesses for p in found) and len(found[0].guesses) == 2
    assert len({g.label for g in found[0].guesses}) == 2
    some = sorted(images.rglob("*.*"))
    one, three = (list(network(some[:4], top=3, batch=n)) for n in (1, 3))
    for a, b in zip(one, three):
        assert a.image == b.image and [g.name for g in a.guesses] == [g.name for g in b.guesses]
        np.testing.assert_allclose([g[2] for g in a.guesses], [g[2] for g in b.guesses], rtol=1e-5)
    assert sum(g.probability for g in one[0].guesses) == pytest.approx(1)
    assert network.images_per_s > 0


@pytest.mark.parametrize("kind", ["path", "pillow", "array", "batch", "generator", "folder"])
def test_one_image_and_several_however_they_come(network, images, kind):
    paths = sorted(images.rglob("*.*"))[:3]
    squares = np.stack([Predictor(network).see(path) for path in paths])
    with Image.open(paths[0]) as opened:
        pillow = opened.copy()
    given, n = {
        "path": (paths[0], 1),
        "pillow": (pillow, 1),
        "array": (squares[0], 1),
        "batch": (squares, 3),
        "generator": (iter(paths), 3),
        "folder": (paths[0].parent, len(list(paths[0].parent.iterdir()))),
    }[kind]
    found = predict(network, given)
    assert len(found) == n and not any(p.problem for p in found)
    if kind != "folder":
        given = iter(paths) if kind == "generator" else given
        assert [p.guesses for p in Predictor(network)(given)] == [p.guesses for p in found]


def test_what_a_cell_shows_is_one_line(network, images):
    "And not a million numbers, or the paths of all images"
    data = open_data(images, validation_split=0.5, verbose=False)
    shown = [Predictor(network), convert.read(network), data, data.splits["train"]]
    assert [repr(one).partition(":")[0] for one in shown] == [
        "<Predictor",
        "<Weights",
        "<DataSet",
        "<Split",
    ]
    assert all("\n" not in repr(one) and len(repr(one)) < 300 for one in shown)


def test_lists_of_all_lengths_compile_the_network_few_times(network, images, monkeypatch):
    network, path = Predictor(network), sorted(images.rglob("*.png"))[0]
    shown = []
    monkeypatch.setattr(network, "_logits", lambda x: shown.append(len(x)) or np.zeros((len(x), 3)))
    for n in (3, *range(1, 130)):
        shown.clear()
        assert len(list(network([path] * n))) == n
        assert n <= sum(shown) <= 4 * n and len(set(shown)) == 1
    assert network._shapes <= {1, 2, 3, 4, *range(8, 65, 8)}
    shown.clear()
    list(network([path] * 10, batch=3))
    assert shown == [3] * 4  # never more than was asked for


def test_what_cannot_be_predicted(network, images, tmp_path):
    for name, value in (("top", 0), ("top", "2"), ("batch", 0), ("batch", 1.5)):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number from 1"):
            Predictor(network)([], **{name: value})
    with pytest.raises(ValueError, match="`image_size` must be a whole number from 32"):
        Predictor(network, image_size=16)
    with pytest.raises(ValueError, match="2 class names for the 3 classes"):
        Predictor(network, class_names=("a", "b"))
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="array .height, width, 3."):
            as_pixels(wrong)
    assert predict(network, []) == []


def test_other_processes_get_it_pickled(network, images):
    here, one = Predictor(network), str(next(images.rglob("*.png")))
    code = "import pickle, sys; p = pickle.load(sys.stdin.buffer); print(list(p(sys.argv[1:])))"
    how = dict(input=pickle.dumps(here), env=PYTHON, stdout=subprocess.PIPE, check=True)
    said = subprocess.run([sys.executable, "-c", code, one], **how).stdout.decode()
    assert said.splitlines()[-1] == str(list(here([one])))


def test_names_are_numbers_where_there_are_none(tmp_path, images):
    path = write_network(tmp_path / "n.safetensors", ("class 0", "class 1"))
    (found,) = predict(path, sorted(images.rglob("*.png"))[0])
    assert [g.name for g in found.guesses] == [str(g.label) for g in found.guesses]
    assert any("--class-names FILE" in note for note in Predictor(path).notes)
    named = Predictor(path, class_names=("hen", "cow"))
    assert not any("--class-names FILE" in note for note in named.notes)
    (named,) = named(sorted(images.rglob("*.png"))[:1])
    assert {g.name for g in named.guesses} == {"hen", "cow"}


def test_the_weights_of_a_run(tmp_path, images):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    last = write_network(folder / "epoch-0001.safetensors", epochs=2)
    other = checkpoint.load(write_network(tmp_path / "other.safetensors", seed=1))[0]
    average = WeightAverage()
    average.update({n: a for n, a in other.items() if n.startswith("all/")}, 0)
    average.save(folder / "average.safetensors")
    path = sorted(images.rglob("*.png"))[0]
    answer = lambda source, **how: predict(source, path, top=3, **how)[0].guesses
    assert answer(tmp_path / "run") == answer(last) == answer(tmp_path / "run", weights="last")
    assert answer(tmp_path / "run", weights="average") == answer(tmp_path / "other.safetensors")


def test_a_broken_network_gives_no_answer(network, tmp_path, images):
    arrays, metadata = checkpoint.load(network)
    arrays["all/Top/logits/dense/bias"] = np.full(3, np.nan, "float32")
    checkpoint.save(tmp_path / "broken.safetensors", arrays, metadata)
    (found,) = predict(tmp_path / "broken.safetensors", sorted(images.rglob("*.png"))[0])
    assert found.guesses == () and "weights are broken" in found.problem


# ---------------------------------------------------------------- the command


def test_a_table_and_what_is_wrong(run, network, mixed):
    (mixed / "below" / "c.JPG").rename(mixed / "below" / "c\n\x1b[31m.JPG")  # orders to a terminal
    status, out, err = run("predict", network, mixed, mixed / "gone.jpg", "--top", 2)
    assert status == 1
    title, *rows = out.splitlines()
    assert title.split() == ["image", "class", "probability"] and len(rows) == 4
    assert [row.split()[0] for row in rows[::2]] == [
        f"{mixed}/a.jpg",
        f"{mixed}/below/c\\n\\x1b[31m.JPG",
    ]
    assert all(len(row) == len(title) for row in rows)
    assert f"{mixed}/b.jpg: Not an image that can be decoded" in err
    assert f"{mixed}/gone.jpg: No such file" in err
    assert "effnet-predict: 2 of 4 images could not be read; the others are above." in err


def test_a_list_without_an_end_is_refused(run, network, monkeypatch):
    monkeypatch.setattr("effnet_repro.cli.predict.MOST_LIST", 1000)
    monkeypatch.setattr("sys.stdin", open("/dev/zero"))
    status, out, err = run("predict", network, "-")
    assert (status, out) == (2, "") and "is longer than 1,000 bytes" in err


def test_json_and_csv_say_the_same(run, network, mixed, monkeypatch):
    listed = f"{mixed}/a.jpg\n\n{mixed}/b.jpg\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    status, out, _ = run("predict", network, "-", "--json", "--top", 9)
    whole = json.loads(out)
    assert status == 1 and [one["image"] for one in whole] == listed.split()
    assert "decoded" in whole[1]["problem"] and len(whole[0]["guesses"]) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO(listed.replace("\n\n", "\0").replace("\n", "\0")))
    status, out, _ = run("predict", network, "-", "--csv", "--top", 9)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1 and [r["rank"] for r in rows] == ["1", "2", "3", ""]
    guesses = [{"class": r["class"], "label": int(r["label"])} for r in rows[:3]]
    assert guesses == [{k: g[k] for k in ("class", "label")} for g in whole[0]["guesses"]]
    assert [float(r["probability"]) for r in rows[:3]] == [
        g["probability"] for g in whole[0]["guesses"]
    ]
    assert rows[3]["problem"] == whole[1]["problem"]


def test_ctrl_c_leaves_what_was_printed(run, network, mixed, monkeypatch):
    real = Predictor.__call__

    def interrupted(self, *words):
        yield next(real(self, *words))
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    status, out, err = run("predict", network, mixed, "--json")
    assert status == 130 and err.splitlines()[-1] == "effnet-predict: interrupted"
    assert [one["image"] for one in json.loads(out)] == [f"{mixed}/a.jpg"]


def test_mistakes_are_one_line(refused, network, mixed, tmp_path):
    assert "--top must be at least 1" in refused("predict", network, mixed, "--top", 0)
    assert "required: PATH" in refused("predict", network)
    assert "No file, run folder" in refused("predict", tmp_path / "no", mixed, status=1)
    assert "folder without a checkpoint" in refused("predict", mixed, mixed, status=1)


def test_what_is_no_network_is_refused_at_once(refused, mixed, tmp_path, monkeypatch):
    "Before Keras is imported, which takes seconds."
    from effnet_repro.cli import finetune
    from effnet_repro.cli import predict as command

    for module in (command, finetune):
        monkeypatch.setattr(module, "start_keras", None)
    no = tmp_path / "no"
    assert "No file, run folder" in refused("predict", no, mixed, status=1)
    words = ("finetune", no, "--data-dir", mixed, "--new-head")
    assert "No file, run folder" in refused(*words, status=1)


def test_folders_are_searched(mixed):
    (mixed / ".thumbnails").mkdir()
    (mixed / ".thumbnails" / "a.jpg").write_bytes(b"")
    (mixed / "empty").mkdir()
    names = ["a.jpg", "b.jpg", "below/c.JPG"]
    assert find_images([mixed]) == [f"{mixed}/{name}" for name in names]
    (mixed / "below" / "again").symlink_to(mixed)  # a link that leads back
    shutil.copy(mixed / "a.jpg", mixed / "below" / "photo")
    (mixed / "below" / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    left = collections.Counter()
    assert find_images([mixed], left) == [f"{mixed}/{name}" for name in (*names, "below/photo")]
    assert left[".heic"] == 1 and left[".txt"] == 1
    given = [mixed / "notes.txt", mixed / "empty", mixed / "gone"]
    assert find_images(given) == [str(path) for path in given]
    _, (text, empty, gone) = SquaresJob(32, "modern")(find_images(given))
    assert "it is a text" in text and gone == "No such file or directory"
    assert empty.startswith("A folder without images (.jpg")


def test_batches_suit_the_device(monkeypatch):
    from effnet_repro.training import device, memory

    large, small = ModelSpec.from_name("B7-G1-BN"), ModelSpec.from_name("B0-G1-BN")
    monkeypatch.setattr(memory, "found_gib", lambda: 8.0)
    cpu = suitable_batch(large, 600), suitable_batch(small, 224)
    assert cpu[0] < cpu[1] <= 64 and all(n & (n - 1) == 0 for n in cpu)
    monkeypatch.setattr(memory, "found_gib", lambda: 0.01)
    assert suitable_batch(large, 600) == 1
    monkeypatch.setattr(device, "has_jax_gpu", lambda: True)
    monkeypatch.setattr("effnet_repro.predict.memory_of_gpu", lambda: 80 * 2**30)
    assert suitable_batch(small, 224) == 256


@pytest.mark.long
def test_a_closed_pipe_is_no_error(network, images):
    command = f"{sys.executable} -m effnet_repro.cli predict {network} {images} | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=PYTHON, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Broken" not in done.stderr and "Trace" not in done.stderr
