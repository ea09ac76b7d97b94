"""TFRecord files of images, the form in which CelebA-HQ 256x256 is passed on; read without TensorFlow.

A file is a row of records: length (8 bytes), checksum of it (4), data, checksum of the data (4). The data is a
protocol buffer ``tf.train.Example`` with two features: ``data``, the pixels or an encoded picture, and ``shape``,
``(3, H, W)`` as the authors of progressive growing wrote it or ``(H, W, 3)`` as those of Glow did.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np

__all__ = ["crc32c", "pixels_of", "records"]

_LENGTH = struct.Struct("<QL")
_CHECKSUM = struct.Struct("<L")
_MAX_RECORD_BYTES = 2**28


def records(file: IO[bytes], *, read: bool = True) -> Iterator[bytes]:
    """The data of each record; with ``read=False`` it is skipped, and nothing comes in its place.

    Raises:
        ValueError: damaged.
    """
    number = 0
    while head := file.read(_LENGTH.size):
        if len(head) < _LENGTH.size:
            raise ValueError(f"it ends within record {number}")
        length, checksum = _LENGTH.unpack(head)
        if _masked(crc32c(head[:8])) != checksum or length > _MAX_RECORD_BYTES:
            raise ValueError(f"the length of record {number} is damaged, and all that comes after it is lost")
        if read:
            data = file.read(length)
        else:
            file.seek(length, 1)
            data = b""
        tail = file.read(_CHECKSUM.size)
        if len(tail) < _CHECKSUM.size:
            raise ValueError(f"it ends within record {number}")
        if read and _masked(crc32c(data)) != _CHECKSUM.unpack(tail)[0]:
            raise ValueError(f"record {number} is damaged: its checksum differs")
        yield data
        number += 1


def pixels_of(record: bytes) -> np.ndarray | bytes:
    """The image of a record, ``(3, H, W)``, uint8; or an encoded picture, such as PNG, as it is.

    Raises:
        ValueError: it is not a record of an image.
    """
    features = _features(record)
    data = features.get("data", features.get("image_raw", features.get("image/encoded")))
    if not isinstance(data, bytes):
        raise ValueError(f"it has no feature `data` but {', '.join(sorted(features)) or 'none'}")
    shape = features.get("shape")
    if shape is None:
        return data
    if not isinstance(shape, list) or len(shape) != 3 or min(shape) < 1 or int(np.prod(shape)) != len(data):
        raise ValueError(f"its feature `shape` is {shape}, but its pixels are {len(data)} bytes")
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    if shape[0] in (1, 3):
        return pixels
    if shape[2] in (1, 3):
        return pixels.transpose(2, 0, 1)
    raise ValueError(f"its feature `shape` is {shape}, with neither 1 nor 3 channels")


def _features(example: bytes) -> dict[str, bytes | list[int]]:
    """The features of a ``tf.train.Example`` that hold bytes or whole numbers, by name."""
    found: dict[str, bytes | list[int]] = {}
    for features in _fields(example, 1):
        for entry in _fields(features, 1):
            key, value = b"".join(_fields(entry, 1)), b"".join(_fields(entry, 2))
            if texts := [text for each in _fields(value, 1) for text in _fields(each, 1)]:
                found[key.decode("utf-8", "replace")] = texts[0]
            elif numbers := list(_fields(value, 3)):
                found[key.decode("utf-8", "replace")] = [number for each in numbers for number in _numbers(each)]
    return found


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited fields of that number in a protocol buffer."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 2:
            length, position = _varint(message, position)
            if length > len(message) - position:
                raise ValueError("its protocol buffer is cut short")
            if tag >> 3 == wanted:
                yield message[position : position + length]
            position += length
        elif kind == 0:
            _, position = _varint(message, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError("it is not a protocol buffer")


def _numbers(int64_list: bytes) -> Iterator[int]:
    """The values of an ``Int64List``, packed into one field or one field each."""
    packed = list(_fields(int64_list, 1))
    for values in packed or [int64_list]:
        position = 0
        while position < len(values):
            if not packed:  # the tag of each value
                _, position = _varint(values, position)
            number, position = _varint(values, position)
            yield number


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("its protocol buffer is cut short")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


# CRC-32C (Castagnoli), the checksum of the format --------------------------------------------------------------

_POLYNOMIAL = 0x82F63B78
_LANES = 1024  # bytes that are taken at once: so many checksums side by side in one array


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


_TABLE = _byte_table()
_TABLE_LIST = _TABLE.tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C of ``data``.

    Long data is cut into equal parts, whose checksums grow side by side; since the checksum is linear, that of one
    part followed by another is that of the first followed by zeros, plus that of the second.
    """
    rows = len(data) // _LANES
    value = 0xFFFFFFFF
    if rows > 1:
        # part i is row i: all rows advance by one byte at a time
        columns = np.frombuffer(data, np.uint8, rows * _LANES).reshape(_LANES, rows).T
        parts = np.zeros(_LANES, np.uint32)
        for column in columns:
            parts = _TABLE[(parts ^ column) & 255] ^ (parts >> 8)
        a, b, c, d = _zeros_tables(rows)
        for part in parts.tolist():
            value = a[value & 255] ^ b[value >> 8 & 255] ^ c[value >> 16 & 255] ^ d[value >> 24] ^ part
        data = data[rows * _LANES :]
    for byte in data:
        value = _TABLE_LIST[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=16)
def _zeros_tables(count: int) -> list[list[int]]:
    """What ``count`` zero bytes make of a checksum: four tables, one for each of its bytes."""
    values = np.concatenate([np.arange(256, dtype=np.uint32) << np.uint32(8 * i) for i in range(4)])
    for _ in range(count):
        values = _TABLE[values & 255] ^ (values >> 8)
    return values.reshape(4, 256).tolist()


def _masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
