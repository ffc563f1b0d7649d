"""Checkpoints of TensorFlow 1 in and out, and what a killed writer leaves."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import parity_vectors
import pytest
import tensorflow as tf
from conversions import ROOT, SMALL, logits, moved, same
from tiny import PYTHON

from effnet_repro import convert
from effnet_repro.config import get_case
from effnet_repro.network import pack, run
from effnet_repro.ops import get_ops
from effnet_repro.testing import relative_error
from effnet_repro.testing import test_allclose as check_close

# ---------------------------------------------------------------- TensorFlow 1


def graph_of(spec, variables, size):
    """A v1 graph with the published variables, and logits that read them: (graph, images, logits, saver)."""
    graph, v1 = tf.Graph(), tf.compat.v1
    with graph.as_default():
        x = v1.placeholder(tf.float32, (2, size, size, 3))
        made = {
            n: v1.get_variable(n, initializer=v, use_resource=True) for n, v in variables.items()
        }
        rows = ("beta", "gamma", "mean", "inv_std", "beta_prime", "gamma_prime")
        weights = {n: v.read_value() for n, v in made.items() if not n.endswith("/proxy")}
        for n in set(made) - set(weights):
            weights.update({f"{n}/{r}": made[n][i, 0, 0] for i, r in enumerate(rows)})
        y = run(get_ops("tensorflow"), spec, weights, x)
        return graph, x, y, v1.train.Saver(list(made.values())), made


def test_published_checkpoint_in_and_out(tmp_path):
    """What a v1 session saves is read, and what is written a v1 graph restores: published logits both times."""
    vector, expected = parity_vectors.load("B0-G16-LN_PN_64")
    spec, variables = parity_vectors.spec_of(vector), parity_vectors.published_variables(vector)
    graph, x, y, saver, made = graph_of(spec, variables, 64)
    v1 = tf.compat.v1
    with graph.as_default(), v1.Session() as session:
        v1.train.get_or_create_global_step()
        kernel = made["all/block0/conv/conv2d/kernel"]
        slot = f"{kernel.op.name}/RMSProp"
        v1.get_variable(slot, initializer=np.ones(kernel.shape, "float32"))
        session.run(v1.global_variables_initializer())
        full = v1.train.Saver(v1.global_variables())
        prefix = full.save(session, str(tmp_path / "model.ckpt"), 100)
    case = replace(
        get_case("B0-G16-LN_PN-Native_16IPU_2x8"), input_norm="none"
    )  # as the vectors are
    for source in (tmp_path, prefix, f"{prefix}.index"):
        weights = convert.read(source, case=case)
        left_out = f"Left out 2 variables that are not weights: {slot}, global_step."
        assert weights.notes == (left_out,)
    assert relative_error(logits(weights, parity_vectors.images_of(vector)), expected) < 1e-4
    convert.write_ours(tmp_path / "ours.safetensors", weights)
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "out.ckpt")
    with v1.Session(graph=graph) as session:  # nothing is initialized here but by the file
        saver.restore(session, str(tmp_path / "out.ckpt"))
        found = session.run(y, {x: parity_vectors.images_of(vector)})
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["B0-G1-GN_64", "B3-G16-LN_PN_64"])
def test_published_networks_are_recognised(name, tmp_path):
    """Without a case: size, group size, norm and norm groups from the shapes, and the published logits."""
    vector, expected = parity_vectors.load(name)
    prefix = save_variables(tmp_path / "x.ckpt", parity_vectors.published_variables(vector))
    weights = convert.read(prefix)
    assert f"Taken for {weights.case.name} at" in weights.notes[0] and "Native" in weights.case.name
    weights = weights._replace(spec=replace(weights.spec, input_norm="none"))
    assert weights.spec == replace(
        parity_vectors.spec_of(vector), image_size=weights.spec.native_size
    )
    assert relative_error(logits(weights, parity_vectors.images_of(vector)), expected) < 2e-4


def save_variables(prefix, variables):
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[tf.constant(v) for v in variables.values()],
    )
    return prefix


def test_half_precision_checkpoint_uses_its_float32_copies(tmp_path):
    variables = pack(moved(SMALL).arrays)
    half = {n: v.astype("float16") for n, v in variables.items()}
    copies = {f"{n}/fp32": v for n, v in variables.items() if n.endswith("kernel")}
    found, others = convert.read_tf1(save_variables(tmp_path / "half.ckpt", {**half, **copies}))
    assert sorted(others) == sorted(copies)
    for name, value in variables.items():
        check_close(found[name], value, rtol=0 if name.endswith("kernel") else 1e-3, atol=1e-3)
    kernel = "all/block0/conv/conv2d/kernel"
    assert not np.array_equal(half[kernel].astype("float32"), variables[kernel])


def test_tf1_files_with_something_wrong(tmp_path):
    variables = pack(moved(SMALL).arrays)
    name = "all/block2a/c/conv/conv2d/kernel"
    renamed = {n.replace("block2a/c/", "block2a/d/"): v for n, v in variables.items()}
    with pytest.raises(ValueError, match="Nearest to all/block2a/c/.*: all/block2a/d/"):
        convert.read(save_variables(tmp_path / "renamed.ckpt", renamed))
    wrong = {**variables, name: variables[name][..., :4]}
    with pytest.raises(
        ValueError, match=rf"1 wrong shape: {name} \(1, 1, 32, 4\) for \(1, 1, 32, 16\)"
    ):
        convert.read(save_variables(tmp_path / "wrong.ckpt", wrong))
    extra = {**variables, "all/block9a/c/conv/conv2d/kernel": variables[name]}
    with pytest.raises(ValueError, match="1 unexpected: all/block9a"):
        convert.read(save_variables(tmp_path / "extra.ckpt", extra))
    proxy = {**variables, "all/block0/proxy": np.zeros((4, 1, 1, 16), "float32")}
    with pytest.raises(ValueError, match=r"shape \(6, 1, 1, C\). Received: all/block0/proxy"):
        convert.read(save_variables(tmp_path / "proxy.ckpt", proxy))
    with pytest.raises(ValueError, match="there is no all/block0/conv/conv2d/kernel"):
        convert.read(save_variables(tmp_path / "other.ckpt", {"resnet/w": np.zeros(3, "float32")}))
    save_variables(tmp_path / "cut.ckpt", variables)
    for ending in (".data-00000-of-00001", ".index"):
        file = tmp_path / f"cut.ckpt{ending}"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="not a whole TensorFlow checkpoint"):
            convert.read(tmp_path / "cut.ckpt")
        file.write_bytes(whole)
    (tmp_path / "cut.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(ValueError, match="not a whole TensorFlow checkpoint"):
        convert.read(tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match="holds 6 TensorFlow checkpoints"):
        convert.read(tmp_path)


def test_a_killed_converter_leaves_the_old_or_the_new(tmp_path):
    """At every sixth moment before and after renames, syncs and deletions; all: tests/kill_converter.py."""
    command = [sys.executable, str(ROOT / "tests/kill_converter.py"), str(tmp_path), "x.ckpt", "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=PYTHON)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["killed"] for r in rows} == {True, False} and {r["found"] for r in rows} == {1, 2}
    for row in rows:
        assert row["found"] == row["by_folder"] and row["then"] == 3 - row["found"], row
        assert row["killed"] or row["found"] == 2, row
        assert {name[len("x.ckpt") :] for name in row["left"]} in (ONE, TWO), row  # nothing else


def test_what_an_unreadable_index_may_name_is_left_alone(tmp_path):
    weights, path = moved(SMALL), tmp_path / "x.ckpt"
    convert.write_tf1(path, weights.arrays)
    (tmp_path / "x.ckpt.index").write_bytes(b"cut")
    before = (tmp_path / "x.ckpt.data-00000-of-00001").read_bytes()
    replace_file = os.replace

    def full(old, new):
        if str(new).endswith(".index"):
            raise OSError(28, "No space left on device")
        replace_file(old, new)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="is unchanged"):
        patch.setattr(os, "replace", full)
        convert.write_tf1(path, weights.arrays)
    assert (tmp_path / "x.ckpt.data-00000-of-00001").read_bytes() == before
    convert.write_tf1(path, weights.arrays)
    same(convert.read(path).arrays, weights.arrays)


ONE = {".index", ".data-00000-of-00001"}
TWO = {".index", ".data-00000-of-00002", ".data-00001-of-00002"}
