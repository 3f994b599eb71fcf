"""What was written elsewhere, read with care: JSON of a known form, tables and arrays.

Nothing here evaluates or unpickles what it reads, believes a length before the bytes are there, or raises anything but an
error that names the file, what was seen in it and the remedy.
"""

from __future__ import annotations

import csv
import functools
import io
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from emoscale.config import DataError
from emoscale.files import parse_json

T = TypeVar("T")
DEFLATE = 1100
"""Times that a compressed array can be larger than its bytes: deflate reaches 1,032."""
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys of a model's configuration that choose its attention."""
SHOWN = 120
"""Letters of a foreign value that an error shows."""


def check(value: Any, form: type[T], where: str | Path, remedy: str) -> T:
    """Give a value that was read from JSON, if it is of a form.

    Raises:
        DataError: names the first key that is missing or holds something else.
    """
    try:
        return _adapter(form).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, seen = ".".join(map(str, first["loc"])), repr(first["input"])
        shown = "" if first["type"] == "missing" else f" ({seen[:SHOWN]}{'…' if len(seen) > SHOWN else ''} was found)"
        raise DataError(f"{where}: {place or 'the whole'}: {first['msg']}{shown}; {remedy}") from error


def read_json(path: Path, form: type[T], remedy: str) -> T:
    """Read a JSON file of a form.

    Raises:
        DataError: it is missing, no JSON or of another form.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; {remedy}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {remedy}") from error
    return check(value, form, path, remedy)


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form, config=None if is_typeddict(form) else ConfigDict(strict=True))


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Give (number from 1, value) of each line of JSON that is not blank.

    Raises:
        DataError: a line is no JSON.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: no JSON ({getattr(error, 'msg', error)})") from error


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Give the columns and the rows of a CSV file; a cell that a short row lacks is empty, and what a long one has more is left out.

    Raises:
        DataError: it is no UTF-8 text or no table.
    """
    try:
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), restval="")
        columns = list(reader.fieldnames or ())
        rows = [{key: value for key, value in row.items() if isinstance(key, str)} for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from error
    return columns, rows


def read_cells(path: Path) -> list[list[str]]:
    """Give the lines of a CSV file that are not blank, cell by cell.

    Raises:
        DataError: it is no UTF-8 text or no table.
    """
    try:
        return [row for row in csv.reader(io.StringIO(_text(path), newline="")) if row]
    except csv.Error as error:
        raise DataError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as text ({error}); save it in UTF-8") from error


def refuse_kernels(config: Mapping[str, Any], where: str | Path) -> None:
    """Raise DataError where the configuration of a model would have `transformers` fetch and run code for its attention (`owner/repository`)."""
    for name, value in config.items():
        if name in ATTENTION and "/" in str(value or ""):  # also within the dictionary that names one for each part of a model
            raise DataError(f"{where}: {name} is {value!r}, code that would be fetched and run; remove this key")
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Mapping):  # a model of a model
                refuse_kernels(part, where)


def read_arrays(path: str | Path, names: Collection[str] = ()) -> np.ndarray | dict[str, np.ndarray]:
    """Give the array of a .npy file, or those of a .npz file by their names (those named alone, where any are); what would have to be unpickled is refused.

    Raises:
        ValueError: it is neither, or says that it holds more than it can.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                file.seek(0)
                return _array(file, Path(path).stat().st_size)
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                return {name: _member(archive, item) for item in archive.infolist() if (name := item.filename.removesuffix(".npy")) in names or not names}
    except OSError:
        raise
    except Exception as error:  # zip, deflate and NumPy's reader of headers raise a dozen kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _member(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(item) as file:
        return _array(file, min(item.file_size, DEFLATE * item.compress_size))


def _array(file: Any, available: int) -> np.ndarray:
    """Read an array whose values take no more bytes than there are."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array of format {version}")
    shape, columns_first, kind = read(file)
    if kind.hasobject or kind.names is not None or kind.itemsize == 0:
        raise ValueError(f"values of type {kind}, numbers were expected")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    wanted = kind.itemsize
    for size in shape:
        wanted *= size
    if wanted > available:
        raise ValueError(f"shape {shape} would take {wanted} bytes, there are {available}")
    data = file.read(wanted)
    if len(data) < wanted:
        raise ValueError(f"{len(data)} of {wanted} bytes are there")
    values = np.frombuffer(data, kind)
    return values.reshape(shape[::-1]).T if columns_first else values.reshape(shape)
