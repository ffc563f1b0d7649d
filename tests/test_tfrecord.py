"""Records that are written, read, cut off, damaged or foreign."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from images import quick

from effnet_repro import data as d
from effnet_repro.data import tfrecord


@quick
@given(records=st.lists(st.binary(max_size=200), max_size=8))
def test_records_round_trip(tmp_path, records):
    path = tmp_path / "records"
    d.write_tfrecords(path, records)
    places, data = d.scan_tfrecord(path, check_data=True), path.read_bytes()
    assert [data[at : at + length] for at, length in places] == records
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records


@quick
@given(keep=st.integers(0, 10_000), flip=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_damage_is_found(tmp_path, keep, flip, bit):
    path = tmp_path / "records"
    d.write_tfrecords(path, [b"one", b"", b"three" * 5])
    whole = path.read_bytes()
    ends = {0} | {int(at + length + 4) for at, length in d.scan_tfrecord(path)}
    keep %= len(whole)
    path.write_bytes(whole[:keep])
    if keep in ends:
        assert len(d.scan_tfrecord(path)) == sorted(ends).index(keep)
    else:
        with pytest.raises(ValueError, match="records"):
            d.scan_tfrecord(path)
    damaged = bytearray(whole)
    damaged[flip % len(whole)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="record [012] of"):
        d.scan_tfrecord(path, check_data=True)


values = st.one_of(
    st.lists(st.binary(max_size=20), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
)


@quick
@given(features=st.dictionaries(st.text(max_size=10), values, max_size=5))
def test_examples_round_trip(features):
    ours = d.make_example(features)
    theirs = tf.train.Example.FromString(ours).SerializeToString()
    for data in (ours, theirs):
        found = d.parse_example(data)
        assert {key: list(value) for key, value in found.items()} == features


def test_numbers_that_are_not_packed():
    # Old writers store each number as a field of its own: tag 8, value.
    body = b"".join(tfrecord._number(8) + tfrecord._number(n) for n in (3, 300, -1))
    feature = tfrecord._message(3, body)
    example = tfrecord._message(
        1, tfrecord._message(1, tfrecord._message(1, b"n") + tfrecord._message(2, feature))
    )
    assert list(tf.train.Example.FromString(example).features.feature["n"].int64_list.value) == [
        3,
        300,
        -1,
    ]
    assert list(d.parse_example(example)["n"]) == [3, 300, -1]


@quick
@given(data=st.binary(max_size=60))
def test_noise_is_refused_or_read(data):
    try:
        assert isinstance(d.parse_example(data), dict)
    except ValueError as error:
        assert "tf.train.Example" in str(error)


# --- checksums -------------------------------------------------------------------------------


def crc_without_library(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord, "_fast_crc32c", lambda: None)
        return d.crc32c(data)


@pytest.mark.parametrize("size", [0, 1, 9, 63, 64, 1024, 1025, 5000])
def test_checksums_by_either_way_are_those_of_bytes(size, monkeypatch):
    data = bytes(d.random_bits(3, np.arange(size)).astype(np.uint8))
    expected = tfrecord._crc_of_bytes(data)
    assert crc_without_library(data, monkeypatch) == d.crc32c(data) == expected
    assert d.crc32c(memoryview(data)) == expected


def test_checksums_of_the_rfc(monkeypatch):
    for data, crc in [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
    ]:
        assert d.crc32c(data) == crc_without_library(data, monkeypatch) == crc


@pytest.mark.parametrize("made, used", [("c", True), ("python", False)])
def test_the_library_is_used_where_it_is_fast(made, used, monkeypatch):
    library = SimpleNamespace(implementation=made, value=lambda data: 7)
    monkeypatch.setitem(sys.modules, "google_crc32c", library)
    tfrecord._fast_crc32c.cache_clear()
    try:
        assert (d.crc32c(b"123456789") == 7) == used
    finally:
        tfrecord._fast_crc32c.cache_clear()


def test_the_library_agrees():
    library = pytest.importorskip(
        "google_crc32c", reason="google-crc32c is in the lock: run `make venv`"
    )
    data = bytes(range(256)) * 9
    assert library.value(data) == tfrecord._crc_of_lanes(data)
