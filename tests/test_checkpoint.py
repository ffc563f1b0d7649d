"""Checkpoints under property-based round trips, damaged files, failing disks and killed writers."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors.numpy import save_file

from effnet_repro import checkpoint
from effnet_repro.checkpoint import (
    FORMAT_VERSION,
    epoch_path,
    latest,
    list_checkpoints,
    load,
    read_metadata,
    remove_leftovers,
    save,
)
from effnet_repro.config import case_from_dict, case_to_dict, load_cases
from effnet_repro.network import Param, check_matches, initial_weights, params
from effnet_repro.scaling import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
CASE = load_cases()["B0-G16-LN_PN-Half_16IPU_2x8"]
several = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a, b):
    "Equal in names, types, shapes and every bit, not-a-number included."
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype.newbyteorder("=") and a[name].shape == b[name].shape
        native = np.asarray(b[name], b[name].dtype.newbyteorder("="))
        assert a[name].tobytes() == native.tobytes()


# ---------------------------------------------------------------- round trip

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda name: name != "__metadata__"
)
dtypes = st.one_of(
    st_numpy.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
    st_numpy.integer_dtypes(endianness="?"),
    st_numpy.unsigned_integer_dtypes(endianness="?"),
    st_numpy.boolean_dtypes(),
)
shapes = st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
arrays_of_any_kind = st.dictionaries(names, st_numpy.arrays(dtypes, shapes), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@several
@given(arrays=arrays_of_any_kind, metadata=st.dictionaries(st.text(), json_values, max_size=4))
def test_round_trip(tmp_path, arrays, metadata):
    metadata.pop("format_version", None)
    path = save(tmp_path / "c.safetensors", arrays, metadata)
    back, said = load(path)
    same(back, arrays)
    assert said == {**metadata, "format_version": FORMAT_VERSION} == read_metadata(path)
    assert os.listdir(tmp_path) == ["c.safetensors"]


@several
@given(
    array=st_numpy.arrays("float32", (3, 4, 5)),
    axes=st.permutations(range(3)),
    step=st.sampled_from([1, 2, -1]),
)
def test_views_come_back_in_order(tmp_path, array, axes, step):
    view = array.transpose(axes)[::step, ..., ::step]
    same(load(save(tmp_path / "c.safetensors", {"v": view}))[0], {"v": view})
    broadcast = np.broadcast_to(array[:1], (6, 4, 5))
    same(load(save(tmp_path / "c.safetensors", {"v": broadcast}))[0], {"v": broadcast})


@several
@given(arrays=arrays_of_any_kind, prefix=st.text(max_size=2))
def test_a_prefix_reads_a_part(tmp_path, arrays, prefix):
    path = save(tmp_path / "c.safetensors", arrays)
    same(load(path, prefix)[0], {k: v for k, v in arrays.items() if k.startswith(prefix)})


def test_bfloat16_round_trip(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(5).astype(ml_dtypes.bfloat16)
    same(load(save(tmp_path / "c.safetensors", {"b": array}))[0], {"b": array})


def test_equal_contents_make_equal_bytes(tmp_path):
    arrays = {f"all/{i}": np.full(i, i, "float32") for i in range(20)}
    metadata = {f"key{i}": i for i in range(20)}
    one = save(tmp_path / "1.safetensors", arrays, metadata).read_bytes()
    two = save(tmp_path / "2.safetensors", dict(reversed(arrays.items())), metadata).read_bytes()
    assert one == two


def test_tensors_of_both_frameworks_are_taken(tmp_path):
    jnp, tf = pytest.importorskip("jax.numpy"), pytest.importorskip("tensorflow")
    given_arrays = {"j": jnp.ones((2, 3)), "t": tf.Variable([1.0, 2.0])}
    same(
        load(save(tmp_path / "c.safetensors", given_arrays))[0],
        {"j": np.ones((2, 3), "float32"), "t": np.float32([1, 2])},
    )


def test_a_whole_network_with_its_case(tmp_path):
    declared = params(ModelSpec.from_case(CASE))
    weights = initial_weights(ModelSpec.from_case(CASE), seed=1)
    path = save(epoch_path(tmp_path, 1), weights, dict(case=case_to_dict(CASE), update=1, epoch=1))
    back, metadata = load(path, prefix="all/")
    check_matches(back, declared)
    same(back, {k: np.asarray(v) for k, v in weights.items()})
    assert case_from_dict(metadata["case"]) == CASE


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([None]), np.ones(2, "complex128"), np.ones(2, "datetime64[s]")],
)
def test_other_types_are_refused_before_anything_is_written(tmp_path, array):
    with pytest.raises(ValueError, match="'odd' has a type.*Legal: float16"):
        save(tmp_path / "c.safetensors", {"fine": np.ones(2), "odd": array})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [object(), {1, 2}, np.ones(2), b"bytes"])
def test_metadata_that_is_not_json_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="must hold JSON values"):
        save(tmp_path / "c.safetensors", {}, {"key": value})
    assert os.listdir(tmp_path) == []


def test_numbers_of_numpy_become_plain(tmp_path):
    metadata = {"update": np.int64(3), "loss": np.float32(0.5), "nested": [np.bool_(True)]}
    said = read_metadata(save(tmp_path / "c.safetensors", {}, metadata))
    assert said == {"update": 3, "loss": 0.5, "nested": [True], "format_version": FORMAT_VERSION}


def test_the_new_file_can_be_read_by_the_group(tmp_path):
    "Temporary files made for secrets are private; a checkpoint follows the user's own mask."
    old = os.umask(0o022)
    try:
        path = save(tmp_path / "c.safetensors", {"w": np.ones(1)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# ---------------------------------------------------------------- damaged files


def test_every_way_of_cutting_a_file_is_noticed(tmp_path):
    path = save(tmp_path / "c.safetensors", {"w": np.ones(7, "float32")}, {"update": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match="c.safetensors is not a whole checkpoint.*same command"
        ):
            load(path)


@pytest.mark.parametrize(
    "text", [b"\x80\x04pickle", b"PK\x03\x04" * 100, b"text " * 100, b"\xff" * 64]
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "c.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        read_metadata(tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ["imagenet.weights.h5", "b0.pth"])
def test_files_of_other_programs_lead_to_transfer_and_conversion(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF of another program")
    with pytest.raises(ValueError, match="--new-head trains for other classes.*effnet-convert"):
        read_metadata(tmp_path / name)
    theirs = {"conv_stem.weight": np.ones(2, "float32")}
    save_file(theirs, str(tmp_path / "timm.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a checkpoint.*--new-head.*effnet-convert"):
        read_metadata(tmp_path / "timm.safetensors")


def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    "Every bit of a small file in turn. Harmless: the name of the entry with the checksums."
    arrays = {"w": np.ones((3, 4), "float32"), "b": np.int8(3)}
    path = save(tmp_path / "c.safetensors", arrays, {"update": 1})
    whole, harmless = path.read_bytes(), 0
    for place in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            back, metadata = load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            same(back, {k: np.asarray(v) for k, v in arrays.items()})
            assert metadata["update"] == 1
            harmless += 1
    assert harmless < 200


def test_files_from_before_the_checksums_are_read(tmp_path):
    header = {"effnet_repro": json.dumps({"update": 7, "format_version": 1})}
    save_file({"w": np.ones(2)}, str(tmp_path / "old.safetensors"), metadata=header)
    assert load(tmp_path / "old.safetensors")[1]["update"] == 7


def test_a_file_from_the_future_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)
    path = save(tmp_path / "c.safetensors", {})
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=f"format_version {FORMAT_VERSION + 1}.*Update effnet_repro"
    ):
        load(path)


def test_a_missing_file_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="The folder has no checkpoint"):
        load(tmp_path / "epoch-0001.safetensors")
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        load(tmp_path / "no" / "folder" / "epoch-0001.safetensors")
    for epoch in range(1, 6):
        save(epoch_path(tmp_path, epoch), {})
    with pytest.raises(FileNotFoundError, match="There: epoch-0003.*epoch-0005"):
        load(tmp_path / "epoch-0009.safetensors")
    with pytest.raises(ValueError, match="is a folder, not a checkpoint"):
        load(tmp_path)


# ---------------------------------------------------------------- the folder


def test_the_newest_is_the_one_with_the_most_updates(tmp_path):
    for name, update in (("epoch-0002", 20), ("epoch-0010", 5), ("epoch-0001-update-000030", 30)):
        save(tmp_path / f"{name}.safetensors", {}, dict(update=update))
    order = ["epoch-0010", "epoch-0002", "epoch-0001-update-000030"]
    assert [p.stem for p in list_checkpoints(tmp_path)] == order
    assert latest(tmp_path).stem == order[-1]


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    good = save(epoch_path(tmp_path, 1), {}, dict(update=1))
    for name in (
        "average.safetensors",
        "epoch-0002.safetensors.bak",
        "epoch-x.safetensors",
        ".epoch-0003.safetensors.aa.tmp",
    ):
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / ".x.abcdef12.tmp").mkdir()  # a folder is nobody's half-written file
    assert list_checkpoints(tmp_path) == [good]
    (tmp_path / "epoch-0004.safetensors").write_bytes(good.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="epoch-0004.safetensors is not a whole checkpoint"):
        assert latest(tmp_path) == good
    assert remove_leftovers(tmp_path) == [".epoch-0003.safetensors.aa.tmp"]
    assert len(os.listdir(tmp_path)) == 6


def test_a_folder_that_is_not_there(tmp_path):
    assert latest(tmp_path / "no") is None and list_checkpoints(tmp_path / "no") == []
    assert remove_leftovers(tmp_path / "no") == []


# ---------------------------------------------------------------- failing disks, killed writers


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_failure_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = save(epoch_path(tmp_path, 1), {"w": np.float32([1])}, dict(update=1))
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"os.{call}" if call != "open" else "builtins.open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(path, {"w": np.float32([2])}, dict(update=2))
    monkeypatch.undo()
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from effnet_repro.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save(sys.argv[1], {"w": np.ones(10_000)}, {"update": 2})
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_is_full_half_way_leaves_the_old_file(tmp_path):
    "The system refuses to write more than 1000 bytes."
    path = save(epoch_path(tmp_path, 1), {"w": np.float32([1])}, dict(update=1))
    old = path.read_bytes()
    said = child(FULL_DISK, path).communicate()[0].decode()
    assert f"Cannot write {path}: File too large. Needed: 0.1 MB, free: " in said
    assert said.endswith("What was there before is unchanged.\n")
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "Order of the system calls: force the file, rename, force the folder."
    calls, sizes, fsync, replace = [], [], os.fsync, os.replace

    def seen_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(f"fsync {kind}")
        if kind == "file":
            sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", seen_fsync)
    monkeypatch.setattr("os.replace", lambda *a: (calls.append("rename"), replace(*a)))
    path = save(tmp_path / "c.safetensors", {"w": np.ones(3)})
    assert calls == ["fsync file", "rename", "fsync folder"]
    assert sizes == [path.stat().st_size]  # Nothing was still in a buffer of the process


def child(code, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE
    )


KILLED_AT_THE_RENAME = """
import os, signal, sys
import numpy as np
from effnet_repro.checkpoint import save
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save(sys.argv[1], {"w": np.float32([2])}, {"update": 2})
"""


def test_killed_right_before_the_rename(tmp_path):
    path = save(epoch_path(tmp_path, 1), {"w": np.float32([1])}, dict(update=1))
    old = path.read_bytes()
    assert child(KILLED_AT_THE_RENAME, path).wait() == -signal.SIGKILL
    assert path.read_bytes() == old and latest(tmp_path) == path
    assert len(remove_leftovers(tmp_path)) == 1 and os.listdir(tmp_path) == [path.name]


SAVING_FOR_EVER = """
import sys
import numpy as np
from effnet_repro.checkpoint import epoch_path, save
folder, update = sys.argv[1], int(sys.argv[2])
while True:
    update += 1
    arrays = {f"all/{i}": np.full(50_000, update, "float32") for i in range(10)}
    save(epoch_path(folder, update % 4), arrays, {"update": update})
    if update % 4 == 0:
        print(update, flush=True)
"""


def test_killed_at_random_moments(tmp_path):
    "Whatever the moment: what is there is whole, and nothing that was reported as saved is lost."
    moments, update, leftovers = np.random.default_rng(0), 0, 0
    for _ in range(6):
        process = child(SAVING_FOR_EVER, tmp_path, update)
        reported = int(process.stdout.readline())
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.communicate()[0].split()[:-1])])
        arrays, metadata = load(latest(tmp_path))
        update = metadata["update"]
        assert update >= reported and len(arrays) == 10
        for path in list_checkpoints(tmp_path):  # Warns, and so fails the test, about a broken file
            arrays, metadata = load(path)
            assert all(
                (a == metadata["update"]).all() and a.size == 50_000 for a in arrays.values()
            )
        leftovers += len(remove_leftovers(tmp_path))
        assert all(p.suffix == ".safetensors" for p in tmp_path.iterdir())
    assert update > 24


# ---------------------------------------------------------------- does it fit the network


def some_params():
    return [Param(f"all/block{i}/kernel", (i, 2), "fan_out", True) for i in range(1, 9)]


def some_weights():
    return {p.name: np.zeros(p.shape, "float32") for p in some_params()}


def test_weights_that_fit():
    check_matches(some_weights(), some_params())


def test_one_error_tells_all_that_does_not_fit():
    weights = some_weights()
    weights["all/block3/kernel"] = np.zeros((2, 3))
    weights["extra"] = weights.pop("all/block1/kernel")
    with pytest.raises(ValueError) as error:
        check_matches(weights, some_params())
    for part in (
        "1 missing: all/block1/kernel",
        "1 unexpected: extra",
        "1 wrong shape: all/block3/kernel (2, 3) for (3, 2)",
    ):
        assert part in str(error.value)


def test_a_long_list_is_cut_to_a_count():
    with pytest.raises(ValueError, match="8 missing: all/block1.*and 5 more") as error:
        check_matches({}, some_params())
    assert str(error.value).count("kernel") == 3


def test_another_network_of_the_family_is_refused():
    other = type(CASE)(**{**CASE.__dict__, "model_size": 1})
    weights = initial_weights(ModelSpec.from_case(CASE), seed=0)
    with pytest.raises(ValueError, match="missing.*metadata"):
        check_matches(weights, params(ModelSpec.from_case(other)))


def test_the_header_is_plain_json_for_other_readers(tmp_path):
    "What the page says of the file, read without any library."
    arrays = {"all/w": np.float32([1, 2])}
    raw = save(tmp_path / "c.safetensors", arrays, {"update": 3}).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert json.loads(header["__metadata__"]["effnet_repro"]) == {
        "update": 3,
        "format_version": FORMAT_VERSION,
    }
    begin, end = header["all/w"]["data_offsets"]
    assert np.frombuffer(raw[8 + size :][begin:end], "<f4").tolist() == [1, 2]


def test_a_folder_of_damaged_checkpoints_is_not_called_empty(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="No checkpoint in .*Train first"):
        checkpoint.newest_file(tmp_path)
    (tmp_path / "checkpoints" / "epoch-0001.safetensors").write_bytes(b"cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="is whole: .*epoch-0001.safetensors is not a whole"):
            checkpoint.newest_file(tmp_path)
