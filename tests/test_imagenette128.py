"""The program that makes imagenette128, on a small archive of the form of imagenette2."""

import io
import json
import tarfile

import make_imagenette128 as program
import numpy as np
import pytest
from PIL import Image

from effnet_repro import data as d


def photo(i):
    "Images of many sizes; every seventh is gray"
    y, x = np.mgrid[: 40 + 7 * (i % 5), : 60 + 11 * (i % 3)]
    pixels = np.stack([y * 3 + i, x * 2, 200 - y], -1).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert("L" if i % 7 == 0 else "RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    found = {"imagenette2/noisy_imagenette.csv": b"path", "imagenette2/train/.DS_Store": b"x"}
    for s, (split, count) in enumerate([("train", 6), ("val", 4)]):
        for c, (synset, *_) in enumerate(program.CLASSES):
            for i in range(count):
                number = 1000 * s + 10 * c + i
                name = f"imagenette2/{split}/{synset}/{synset}_{number}.JPEG"
                found[name] = photo(number)
                found[name.replace(f"{synset}_", f"._{synset}_")] = b"AppleDouble"
    return found


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root / "imagenette2"


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in reversed(list(files.items())):  # an archive may have any order
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


FEW = ["--train-per-class", "5", "--validation-per-class", "3"]


def test_archive_and_folder_give_the_same_set(tmp_path, files, capsys):
    sources = write_archive(tmp_path / "imagenette2.tgz", files), write_folder(tmp_path, files)
    made = [program.main([str(s), str(tmp_path / n), *FEW]) for s, n in zip(sources, "ab")]
    assert "imagenette2 has 9,469" in capsys.readouterr().out  # a set of other counts is told
    one, other = (d.open_data(tmp_path / name, verbose=False) for name in "ab")
    for name in sorted(p.name for p in (tmp_path / "a").iterdir()):
        same = (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert same or name == "info.json"
    assert len(one.splits["train"].files) == 8 and len(one.splits["validation"].files) == 3
    assert (one.train_count, one.validation_count, one.num_classes) == (50, 30, 10)
    assert one.class_names == tuple(words for _, words, _ in program.CLASSES)
    for split, count in (("train", 5), ("validation", 3)):
        assert list(np.bincount(one.splits[split].label)) == [count] * 10
        info = json.loads((tmp_path / "a/info.json").read_text())
        assert info == made[0] and info["name"] == "imagenette128-fastai"
        for data in (one, other):
            assert info["fingerprint"][split] == data.split_fingerprint(split)
        assert info["chosen_sha256"] == made[1]["chosen_sha256"]


def test_images_are_squashed_and_shuffled(tmp_path, files):
    program.main([str(write_folder(tmp_path, files)), str(tmp_path / "set"), *FEW])
    data = d.open_data(tmp_path / "set", verbose=False)
    assert sorted(data.splits["train"].label) != list(data.splits["train"].label)
    path = data.splits["train"].files[0]
    at, length = d.scan_tfrecord(path)[0]
    with open(path, "rb") as file:
        file.seek(at)
        record = d.parse_example(file.read(length))
    (name,), (synset,) = record["image/filename"], record["image/class/synset"]
    name, synset = name.decode(), synset.decode()
    assert record["image/class/label"] == program.LABELS[synset]
    image = Image.open(io.BytesIO(record["image/encoded"][0]))
    assert (image.size, image.mode) == ((128, 128), "RGB")
    original = Image.open(io.BytesIO(files[f"imagenette2/train/{synset}/{name}"])).convert("RGB")
    squashed = np.asarray(original.resize((128, 128), Image.Resampling.BICUBIC), float)
    assert np.abs(squashed - np.asarray(image)).mean() < 6  # two JPEGs between them


def test_another_image_changes_only_its_own_place(files):
    "The choice hangs on names, so an image more does not draw all the others anew"
    names = program.found_images(files)["train"]
    chosen = set(program.choose(names, 5, 11))
    more = program.choose(names + [names[0].replace(".JPEG", "0.JPEG")], 5, 11)
    assert len(chosen ^ set(more)) in (0, 2) and len(names) == 60
    assert program.choose(names[::-1], 5, 11) == program.choose(names, 5, 11)
    assert set(program.choose(names, 5, 12)) != chosen


def test_refusals(tmp_path, files):
    with pytest.raises(SystemExit, match="does not exist"):
        program.main([str(tmp_path / "nowhere"), str(tmp_path / "x")])
    source = write_folder(tmp_path, files)
    with pytest.raises(SystemExit, match="6 images of n01440764, and 750 are wanted"):
        program.main([str(source), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit, match="is there already"):
        program.main([str(source), str(source)])
