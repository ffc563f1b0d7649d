"""TFRecord files and the tf.train.Example in a record, read and written without TensorFlow.

A record is its length (8 bytes), a checksum of the length (4), the data, and a checksum of the data (4). The
checksum is CRC-32C (RFC 3720), rotated and offset so that a file of files does not check its own checksums.
"""

import functools
import mmap
import os
import struct
from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np


def _crc_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return [int(entry) for entry in table]


_CRC_TABLE = _crc_table()


@functools.lru_cache(maxsize=1)
def _fast_crc32c():
    "google-crc32c's function, which uses the processor's instruction; None where it is not installed, or slow"
    try:
        import google_crc32c
    except ImportError:
        return None
    return google_crc32c.value if google_crc32c.implementation == "c" else None


def crc32c(
    data: bytes,  # Any bytes
) -> int:  # 32 bits
    """Compute the CRC-32C (Castagnoli) of `data`

    By google-crc32c where it is installed. Otherwise by NumPy: the register is linear, so the sum of a whole is
    that of its first half, with as many zero bytes behind it as the second half has bytes, XOR that of the second.
    """
    fast = _fast_crc32c()
    if fast:
        return fast(bytes(data))
    return _crc_of_lanes(data) if len(data) > 1024 else _crc_of_bytes(data)


def _crc_of_bytes(data):
    "`crc32c`, byte after byte"
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _zeros_tables():
    "Tables that append 2**k zero bytes to a register: for each of its four bytes, 256 entries"
    table = np.array(_CRC_TABLE, np.uint32)
    ones = np.arange(256, dtype=np.uint32)
    tables = [np.stack([table[x & 255] ^ (x >> 8) for x in (ones << 8 * b for b in range(4))])]
    for _ in range(40):
        tables.append(_append_zeros(tables[-1], tables[-1]))
    return tables


def _append_zeros(crc, table):
    parts = (table[b][(crc >> np.uint32(8 * b)) & 255] for b in range(4))
    return functools.reduce(np.bitwise_xor, parts)


_remembered_tables = functools.lru_cache(maxsize=1)(_zeros_tables)


def _crc_of_lanes(data):
    "`crc32c` of more than a few bytes"
    lanes = np.frombuffer(bytes(-len(data) % 64) + bytes(data), np.uint8).copy()
    lanes[-len(data) :][:4] ^= 255  # the register begins with ones
    crc, table = np.zeros(len(lanes) // 64, np.uint32), np.array(_CRC_TABLE, np.uint32)
    for byte in lanes.reshape(-1, 64).T:
        crc = table[(crc ^ byte) & 255] ^ (crc >> np.uint32(8))
    for zeros in _remembered_tables()[6:]:
        if len(crc) == 1:
            return int(crc[0]) ^ 0xFFFFFFFF
        crc = np.concatenate([np.zeros(len(crc) % 2, np.uint32), crc])
        crc = _append_zeros(crc[::2], zeros) ^ crc[1::2]


def masked_crc(data: bytes) -> int:
    """Return the checksum of a record: `crc32c`, rotated by 15 bits and offset, 32 bits."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_tfrecords(
    path,  # File to write
    records: Sequence[bytes],  # Serialized records, for example from `make_example`
):
    "Write `records` into one TFRecord file"
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", masked_crc(length)))
            file.write(record + struct.pack("<I", masked_crc(record)))


def scan_tfrecord(
    path,  # A TFRecord file
    check_data: bool = False,  # Check the data's checksums, too: reads the whole file
    damaged: Optional[
        Callable[[str], None]
    ] = None,  # Told of what cannot be read, which is left out; None = an error
) -> np.ndarray:  # (records, 2) int64: where each record's data begins, and its length in bytes
    "List the records of a file by hopping from length to length"
    places, at, size = [], 0, os.path.getsize(path)
    if not size:
        return np.zeros((0, 2), np.int64)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        while at < size:
            try:
                length = _length_at(view, at, f"record {len(places)} of {path} (byte {at})")
                if check_data:
                    _check_data(view, at, length, f"record {len(places)} of {path} (byte {at})")
            except ValueError as error:
                if damaged is None:
                    raise
                damaged(str(error))
                at = _next_record(view, at + 1)
            else:
                places.append((at + 12, length))
                at += length + 16
    return np.array(places, np.int64).reshape(-1, 2)


def _length_at(view, at, here):
    "How many bytes the data of the record at a byte has; `ValueError` where there is no whole one"
    size = len(view)
    head = view[at : at + 12].ljust(12, b"\0")
    length, crc = struct.unpack("<QI", head)
    _expect(at + 12 <= size, f"Truncated file: {here} ends in its length")
    _expect(crc == masked_crc(head[:8]), f"Not a TFRecord file, or damaged: {here}")
    _expect(at + length + 16 <= size, f"Truncated file: {here} goes beyond byte {size}")
    return length


def _check_data(view, at, length, here):
    (crc,) = struct.unpack_from("<I", view, at + 12 + length)
    fine = crc == masked_crc(view[at + 12 : at + 12 + length])
    _expect(fine, f"Damaged file: {here}")


_SOUGHT = 2**26  # Bytes in which the record after a damaged one is looked for


def _next_record(view, at):
    "Where a record of less than 16 MiB begins, from byte `at` on; the end of the file where there is none"
    end = min(len(view), at + _SOUGHT)
    while True:
        zeros = view.find(bytes(5), at + 3, end)  # the upper bytes of its length
        if zeros < 0:
            return len(view)
        at = zeros - 3
        try:
            _length_at(view, at, "")
            return at
        except ValueError:
            at += 1


def is_tfrecord(path) -> bool:
    """Return whether a file begins as a TFRecord file does: with a length and its checksum."""
    with open(path, "rb") as file:
        head = file.read(12)
    return len(head) == 12 and struct.unpack("<I", head[8:])[0] == masked_crc(head[:8])


def _expect(fine, problem):
    if not fine:
        raise ValueError(f"{problem}. Copy or convert the file again.")


def _varint(data, at):
    "A number of seven bits a byte, the smallest first, and where it ends"
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise IndexError("a number of more than ten bytes")


def message_fields(data, at: int, end: int):
    """Yield number, wire type, and the value (type 0) or the (begin, end) of each field of a protocol buffer.

    `data[at:end]` is the message. Raises `IndexError` or `KeyError` where it is none.
    """
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = (at, at + size), at + size
        else:
            size = {1: 8, 5: 4}[kind]
            value, at = (at, at + size), at + size
        if at > end:
            raise IndexError("a field runs past the end of its message")
        yield tag >> 3, kind, value


def _number(value):
    value, out = int(value) & 0xFFFFFFFFFFFFFFFF, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number, body):
    return _number(number << 3 | 2) + _number(len(body)) + body


def read_feature(data, at: int, end: int):
    """Return the list in a tf.train.Feature: bytes (1), float32 (2) or int64 (3); numbers packed or not."""
    for kind, _, (begin, stop) in message_fields(data, at, end):
        items = list(message_fields(data, begin, stop))
        if kind == 1:
            return [bytes(data[a:b]) for _, _, (a, b) in items]
        if kind == 2:
            return np.frombuffer(b"".join(bytes(data[a:b]) for _, _, (a, b) in items), "<f4")
        numbers = []
        for _, wire, place in items:
            if wire == 0:
                numbers.append(place)
                continue
            a, b = place
            while a < b:
                number, a = _varint(data, a)
                numbers.append(number)
        return np.array(numbers, np.uint64).astype(np.int64)
    return []


def feature_places(data):
    """Yield the key of each feature of a tf.train.Example and where its value lies, (begin, end)."""
    for _, _, (begin, end) in message_fields(data, 0, len(data)):  # the features of the example
        for _, _, (at, stop) in message_fields(data, begin, end):  # an entry: 1 = key, 2 = value
            entry = {number: place for number, _, place in message_fields(data, at, stop)}
            yield bytes(data[slice(*entry[1])]).decode(), entry.get(2, (0, 0))


def parse_example(
    data: bytes,  # A serialized tf.train.Example, or a view of one
) -> Dict[str, Any]:  # Per feature a list of bytes, or a float32 or int64 array
    "Read a tf.train.Example"
    try:
        return {key: read_feature(data, *place) for key, place in feature_places(data)}
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError("The record is not a tf.train.Example.") from error


def make_example(
    features: Dict[str, Any],  # Per key bytes, text, whole numbers or floats: one, or a list
) -> bytes:  # A serialized tf.train.Example
    "Write a tf.train.Example"
    entries = []
    for key, value in features.items():
        values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        first = values[0] if values else b""
        if isinstance(first, (bytes, str)):
            texts = [text.encode() if isinstance(text, str) else text for text in values]
            feature = _message(1, b"".join(_message(1, text) for text in texts))
        elif isinstance(first, (float, np.floating)):
            feature = _message(2, _message(1, np.array(values, "<f4").tobytes()))
        else:
            feature = _message(3, _message(1, b"".join(map(_number, values))))
        entries.append(_message(1, _message(1, key.encode()) + _message(2, feature)))
    return _message(1, b"".join(entries))
