"""Which decoder is chosen, refused, said, stored and kept when a run goes on."""

import importlib.util
import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from images import bmp, encode, record, smooth_image, write
from tiny import SMOKE, TINY, small_network, without_graphs  # noqa: F401

from effnet_repro import checkpoint
from effnet_repro import data as d
from effnet_repro.config import for_one_device
from effnet_repro.data import decoders
from effnet_repro.training import decoding, stream, train, validate

ALL = {"simplejpeg", "pillow", "tensorflow", "nvimagecodec"}


@pytest.mark.parametrize(
    "backend, gpu, resident, there, chosen",
    [
        ("tensorflow", False, False, ALL, "tensorflow"),
        ("jax", True, False, ALL, "nvimagecodec"),
        ("jax", True, True, ALL, "simplejpeg"),  # decoded once, and as published
        ("jax", True, False, ALL - {"nvimagecodec"}, "simplejpeg"),
        ("jax", True, False, {"tensorflow", "pillow"}, "tensorflow"),
        ("jax", True, True, {"tensorflow", "pillow"}, "pillow"),
        ("jax", False, False, ALL, "simplejpeg"),
        ("jax", False, False, {"tensorflow", "pillow"}, "pillow"),
    ],
)
def test_auto_is_the_fastest_that_is_there(backend, gpu, resident, there, chosen, monkeypatch):
    monkeypatch.setattr(decoders, "is_installed", there.__contains__)
    assert d.choose_decoder("auto", backend, gpu, resident) == chosen


def test_wishes_that_cannot_be_met(sample, monkeypatch):
    with pytest.raises(ValueError, match="Unknown decoder 'pilow'.*Did you mean 'pillow'"):
        d.open_data(decoder="pilow")
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="simplejpeg is not installed. Run: pip install simplejp"):
        d.open_data(decoder="simplejpeg")
    with pytest.raises(ImportError, match=r"pip install 'effnet_repro\[cuda12\]'"):
        d.open_data(decoder="nvimagecodec")
    monkeypatch.setattr(decoders, "find_spec", lambda name: name)
    with pytest.raises(
        ValueError, match="nvimagecodec needs JAX on an NVIDIA GPU.*tensorflow on a"
    ):
        d.choose_decoder("nvimagecodec", "tensorflow")


def test_a_package_within_a_package_that_is_missing(monkeypatch):
    def find(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(decoders, "find_spec", find)
    assert not decoders.is_installed("nvimagecodec")
    monkeypatch.undo()
    for name, package in (("pillow", "PIL"), ("tensorflow", "tensorflow")):
        assert decoders.is_installed(name) == (importlib.util.find_spec(package) is not None)


def test_a_run_says_stores_and_keeps_its_decoder(sample, tmp_path, capsys):
    options = {**SMOKE, "max_steps": 1, "validate_every": None}
    run = train(TINY, None, tmp_path, decoder="simplejpeg", **options)
    assert "images are decoded by simplejpeg" in capsys.readouterr().out
    assert json.loads((run.run_dir / "config.json").read_text())["decoder"] == "simplejpeg"
    assert checkpoint.read_metadata(run.checkpoint)["decoder"] == "simplejpeg"
    assert decoding.settle_decoder(sample, tmp_path).decoder == "simplejpeg"
    assert "bit for bit" not in capsys.readouterr().out
    other = replace(sample, decoder="tensorflow")
    assert decoding.settle_decoder(other, tmp_path).decoder == "tensorflow"
    said = capsys.readouterr().out
    assert "began with images decoded by simplejpeg" in said and "not bit for bit" in said
    with pytest.raises(ValueError, match="Unknown decoder 'pilow'"):
        validate(tmp_path, decoder="pilow")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="batches as tensors")
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_tensorflow_trains_on_images_of_other_decoders(sample, decoder, capsys):
    data = replace(sample, decoder=decoder)
    case = for_one_device(TINY, global_batch_size=5, micro_batch_size=5)
    ours = next(iter(stream.updates(case, data, 2, 4)))
    how = dict(seed=2, first_update=4, area_min=case.crop_area_min)
    images, labels = next(
        d.numpy_batches(data, case.image_size, 5, image_resize=case.image_resize, **how)
    )
    np.testing.assert_array_equal(ours["images"], images)
    np.testing.assert_array_equal(ours["labels"], labels)
    theirs = list(d.validation_arrays(data, 32, 128, image_resize="modern"))
    for ours, other in zip(stream.validation_stream(data, 32, 128, "modern"), theirs):
        for a, b in zip(ours, other):
            np.testing.assert_array_equal(a, b)


def test_what_a_published_run_is_told(tmp_path, monkeypatch, capsys):
    write(tmp_path, "train", [record(encode(smooth_image(60, 60)))])
    data = d.open_data(tmp_path, verbose=False)
    next(d.numpy_batches(replace(data, decoder="simplejpeg"), 32, 1))
    assert capsys.readouterr().out == ""
    fast, accurate = (
        next(d.numpy_batches(replace(data, decoder=name), 32, 1))[0].astype(int)
        for name in ("simplejpeg", "pillow")
    )
    assert "accurate DCT" in capsys.readouterr().out and 0 < abs(fast - accurate).mean() < 3
    write(tmp_path / "b", "train", [record(bmp(1))])
    no_jpeg = replace(d.open_data(tmp_path / "b", verbose=False), decoder="pillow")
    next(d.numpy_batches(no_jpeg, 8, 1, image_resize="modern"))
    assert capsys.readouterr().out == ""


@pytest.fixture
def on_gpu(monkeypatch):
    "JAX has a GPU here, with 16 cores; the data set does not stay on it"
    monkeypatch.setattr(decoding, "has_jax_gpu", lambda: True)
    monkeypatch.setattr(decoding, "fits_device", lambda data: False)
    monkeypatch.setattr(decoding, "core_count", lambda: 16)
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    monkeypatch.setattr("jax.local_device_count", lambda: 1)


def test_auto_leaves_out_what_does_not_work(sample, on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "is_installed", lambda name: True)
    monkeypatch.setattr(decoding.gpu_decode, "problem", lambda: "RuntimeError: an old driver")
    decoding._works.cache_clear()
    assert [decoding.decoder_here(sample) for _ in range(2)] == ["simplejpeg"] * 2
    assert capsys.readouterr().out.count("does not work here (RuntimeError: an old driver)") == 1
    decoding._works.cache_clear()


@pytest.mark.parametrize("form, said", [("raw", "nothing to decode"), ("cifar", "by simplejpeg")])
def test_the_gpu_decodes_only_jpegs(sample, on_gpu, monkeypatch, capsys, form, said):
    monkeypatch.setattr(decoding, "_works", lambda name: True)
    assert decoding.settle_decoder(replace(sample, format=form)).decoder == "simplejpeg"
    found = capsys.readouterr().out
    assert said in found and "may wait" not in found


def test_a_run_of_before_keeps_what_read_it(sample, on_gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    monkeypatch.setattr(decoding, "_works", lambda name: True)
    for there, kept in ((ALL, "tensorflow"), (ALL - {"tensorflow"}, "simplejpeg")):
        monkeypatch.setattr(decoding, "is_installed", there.__contains__)
        assert decoding.settle_decoder(sample, tmp_path).decoder == kept
        assert decoding.settle_decoder(sample, tmp_path / "new").decoder == "nvimagecodec"
    assert "bit for bit" not in capsys.readouterr().out


def as_packed(data):
    train = data.splits["train"]
    train = train._replace(original=np.full((len(train.label), 2), 500))
    return replace(data, splits={**data.splits, "train": train})


def test_the_gpu_waits_and_it_is_said(sample, on_gpu, monkeypatch, capsys):
    faster = "Faster: pip install 'effnet_repro[cuda12]'"
    sample = replace(sample, decoder="simplejpeg")
    decoding.settle_decoder(sample)
    assert faster in capsys.readouterr().out
    decoding.settle_decoder(as_packed(sample))
    assert "Faster" not in capsys.readouterr().out  # the cores bring more small images than a GPU
    monkeypatch.setattr(decoding, "core_count", lambda: 4)
    decoding.settle_decoder(as_packed(sample))
    assert faster in capsys.readouterr().out


@pytest.mark.parametrize(
    "packed, cores, gpus, wish, chosen",
    [
        (False, 16, 1, "auto", "nvimagecodec"),
        (True, 16, 1, "auto", "simplejpeg"),
        (True, 8, 1, "auto", "nvimagecodec"),
        (True, 32, 4, "auto", "nvimagecodec"),
        (True, 64, 4, "auto", "simplejpeg"),
        (True, 16, 1, "nvimagecodec", "nvimagecodec"),
    ],
)
def test_small_images_are_for_the_cores_where_there_are_enough(
    sample, on_gpu, monkeypatch, packed, cores, gpus, wish, chosen
):
    monkeypatch.setattr(decoding, "_works", lambda name: True)
    monkeypatch.setattr("effnet_repro.data.decoders.is_installed", lambda name: True)
    monkeypatch.setattr(decoding, "core_count", lambda: cores)
    monkeypatch.setattr("jax.local_device_count", lambda: gpus)
    data = replace(as_packed(sample) if packed else sample, decoder=wish)
    assert decoding.decoder_here(data) == chosen
