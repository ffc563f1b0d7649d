"""Records that are written, read, cut off, damaged or foreign."""

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from pictures import quick

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
