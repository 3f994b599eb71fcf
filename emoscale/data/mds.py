"""Reading the records of a shard: the columns of an utterance in MDS, and no others.

`streaming` writes MDS and its reader decodes every type, pickles among them, through three copies of a record. Here a record is
read once, by a single `pread` at the place its offset names, and its arrays are views of what was read. What does not add up is
an error: lengths, offsets and shapes are checked against the bytes that are there.

Format, all integers little-endian: uint32 count of records, uint32 [count + 1] offsets, a JSON header, the records. A record is
the uint32 lengths of its columns without a fixed width, then its columns. An array is one byte (axes × 4 + log2 of the width of
an extent), its extents, its values.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

FIXED = {"int": struct.Struct("<q"), "float64": struct.Struct("<d")}
"""Encodings of fixed width."""
PAIR = struct.Struct("<II")


class ShardReader:
    """The records of one shard by their number; holds no file open, so that whoever removes the shard frees its space.

    Args:
        path: of the shard.
        names, encodings: of its columns, in the order of the shard's index entry.
        count: records.
    """

    def __init__(self, path: Path, names: Sequence[str], encodings: Sequence[str], count: int) -> None:
        self._path, self._count = os.fspath(path), count
        self._columns = [(name, FIXED.get(encoding), DECODERS.get(encoding)) for name, encoding in zip(names, encodings, strict=True)]
        self._lengths = struct.Struct(f"<{sum(encoding not in FIXED for encoding in encodings)}I")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Give a record as column → value; arrays are views of one buffer and may be written to.

        Raises:
            OSError: the file is not there, or ends before the record does.
            ValueError: the record is not made of such columns.
        """
        if not 0 <= number < self._count:
            raise ValueError(f"record {number} of {self._count}")
        record = self._read(number)
        try:
            return self._decoded(record)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"record {number}: {error}") from error

    def _read(self, number: int) -> np.ndarray:
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            pair = os.pread(file, PAIR.size, 4 * (1 + number))
            first, last = PAIR.unpack(pair) if len(pair) == PAIR.size else (0, 0)
            if not first < last <= os.fstat(file).st_size:
                raise OSError(f"record {number} lies at {first}:{last}, outside the file")
            record = np.empty(last - first, np.uint8)
            if os.preadv(file, [record.data], first) != last - first:
                raise OSError(f"the file ends within record {number}")
        finally:
            os.close(file)
        return record

    def _decoded(self, record: np.ndarray) -> dict[str, Any]:
        view, row = record.data, {}
        lengths, at = iter(self._lengths.unpack_from(view)), self._lengths.size
        for name, fixed, decode in self._columns:
            if fixed is not None:
                (row[name],) = fixed.unpack_from(view, at)
                at += fixed.size
                continue
            end = at + next(lengths)
            if end > len(record):
                raise ValueError(f"column {name} ends at byte {end} of {len(record)}")
            assert decode is not None  # an encoding has a width or a decoder
            row[name] = decode(record, view, at, end)
            at = end
        if at != len(record):
            raise ValueError(f"its columns take {at} of {len(record)} bytes")
        return row


def _text(record: np.ndarray, view: memoryview, first: int, last: int) -> str:
    return str(view[first:last], "utf-8")


def _bytes(record: np.ndarray, view: memoryview, first: int, last: int) -> bytes:
    return bytes(view[first:last])


def _array(record: np.ndarray, view: memoryview, first: int, last: int) -> np.ndarray:
    if first == last:
        raise ValueError("an array takes no bytes")
    axes, width = view[first] >> 2, 1 << (view[first] & 3)
    begin = first + 1 + axes * width
    if begin > last:
        raise ValueError("an array's shape takes more bytes than the array")
    shape = [int.from_bytes(view[at : at + width], "little") for at in range(first + 1, begin, width)]
    if 2 * prod(shape) != last - begin:
        raise ValueError(f"an array of shape {shape} takes {last - begin} bytes")
    values = record[begin:last].view(np.float16)
    # Texts of any length stand before it: half of all arrays begin at an odd byte, where no fast loop reads.
    return (values if values.flags.aligned else values.copy()).reshape(shape)


DECODERS: dict[str, Callable[[np.ndarray, memoryview, int, int], Any]] = {"str": _text, "bytes": _bytes, "ndarray:float16": _array}
"""Encodings whose length varies."""
