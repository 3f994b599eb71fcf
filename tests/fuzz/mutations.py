"""What is done to a valid input: bytes changed blindly, and values changed where the format is known."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 255, 256, 65_535, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 64, -(1 << 63), 10**30, 10**400,
    0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "a\r\nb", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "e\u0301", "\u202eevil", "\ufeff", "\u2028", "ＭＡＳＫ", "İı",
    "[MASK]", "[SEP]", "</s>", "null", "true", "NaN", "1e999", "0x10", "1_000", "-", "---", "<<", "!!python/object/apply:os.system ['id']", "*a", "&a", "${oc.env:HOME}",
    "${a}", "${", "\\${x}", "{}", "[]", "%s%n", "{0}", "../../../../etc/passwd", "/etc/passwd", "..", ".", "/", "a/../../b", "~", "C:\\x", "file:///etc/passwd",
    "s3://user:secret@bucket/x", "pkl", "ndarray:float16", "ndarray:object", "\x1b[31mred\x1b[0m", "x" * 10_000, "9" * 5_000, "é" * 300,
)  # fmt: skip
LONE = "\ud800"
"""Half of a surrogate pair: JSON can say it, UTF-8 cannot."""


def deep(random: Random) -> Any:
    """Give lists within lists: a few, or more than a recursive reader stands."""
    value: Any = random.choice([[], {}, 1, "x"])
    for _ in range(random.choice((3, 50))):
        value = [value] if random.random() < 0.7 else {"a": value}
    return value


def odd(random: Random) -> Any:
    """Give a value that nobody expects."""
    return random.choice([
        lambda: random.choice(NUMBERS), lambda: random.choice(TEXTS), lambda: LONE, lambda: None, lambda: random.random() < 0.5, lambda: [], dict,
        lambda: [random.choice(NUMBERS) for _ in range(random.randrange(1, 6))], lambda: {random.choice(TEXTS): random.choice(NUMBERS)}, lambda: deep(random),
        lambda: [random.choice(TEXTS)],
    ])()  # fmt: skip


def change_bytes(data: bytes, random: Random, other: bytes = b"") -> bytes:
    """Change some bytes: flips, cuts, insertions, swaps, large numbers, a splice with another file."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        random.choice(BLIND)(changed, random, other)
    return bytes(changed)


def _place(data: bytearray, random: Random) -> int:
    """Choose a place, often near the start, where headers are."""
    end = len(data) if random.random() < 0.5 else min(len(data), 64)
    return random.randrange(end) if end else 0


def _flip(data: bytearray, random: Random, _: bytes) -> None:
    if data:
        data[_place(data, random)] ^= 1 << random.randrange(8)


def _overwrite(data: bytearray, random: Random, _: bytes) -> None:
    if data:
        data[_place(data, random)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x7B, random.randrange(256)))


def _number(data: bytearray, random: Random, _: bytes) -> None:
    form, size = random.choice((("<I", 4), ("<Q", 8), (">I", 4), (">Q", 8), ("<H", 2)))
    value = random.choice((0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, 1 << 60, (1 << 64) - 1)) % (1 << 8 * size)
    at = _place(data, random)
    at -= at % 4 if random.random() < 0.5 else 0
    data[at : at + size] = struct.pack(form, value)


def _cut(data: bytearray, random: Random, _: bytes) -> None:
    del data[_place(data, random) :]


def _remove(data: bytearray, random: Random, _: bytes) -> None:
    at = _place(data, random)
    del data[at : at + random.choice((1, 4, 64, 1024))]


def _insert(data: bytearray, random: Random, _: bytes) -> None:
    at = _place(data, random)
    data[at:at] = random.choice(
        (b"\0" * 16, random.randbytes(random.randrange(1, 64)), random.choice(TEXTS).encode("utf-8", "replace"), b"[" * 3000, b"\xff\xfe", b'"')
    )


def _repeat(data: bytearray, random: Random, _: bytes) -> None:
    at = _place(data, random)
    data[at:at] = data[at : at + random.choice((1, 8, 200))] * random.choice((1, 3, 50))


def _splice(data: bytearray, random: Random, other: bytes) -> None:
    if other:
        at = _place(data, random)
        data[at:] = other[random.randrange(len(other)) :]


BLIND: tuple[Callable[[bytearray, Random, bytes], None], ...] = (
    _flip,
    _flip,
    _overwrite,
    _overwrite,
    _number,
    _number,
    _cut,
    _remove,
    _insert,
    _repeat,
    _splice,
)


def change_text(text: str, random: Random) -> bytes:
    """Change a text file: lines dealt anew, digits made large, words replaced; or its bytes."""
    if random.random() < 0.4:
        return change_bytes(text.encode("utf-8", "surrogatepass"), random)
    for _ in range(random.choice((1, 1, 2, 5))):
        text = random.choice((_lines, _digits, _words))(text, random)
    return text.encode(random.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "cp1252")), "replace")


def _lines(text: str, random: Random) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[random.randrange(len(lines))])
        case 2:
            random.shuffle(lines)
        case _:
            lines[at] = random.choice(TEXTS)
    return "\n".join(lines)


def _digits(text: str, random: Random) -> str:
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not found:
        return text
    chosen = random.choice(found)
    return text[: chosen.start()] + str(random.choice(NUMBERS)) + text[chosen.end() :]


def _words(text: str, random: Random) -> str:
    found = list(re.finditer(r"[^\s,;:]+", text))
    if not found:
        return text
    chosen = random.choice(found)
    return text[: chosen.start()] + random.choice(TEXTS) + text[chosen.end() :]


def change_value(value: Any, random: Random) -> Any:
    """Change one to four places of a JSON value: of another type, gone, doubled, moved, renamed, or out of range."""
    value = {"": copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        spots = list(_spots(value))
        if not spots:
            break
        holder, key = random.choice(spots)
        _change(holder, key, random, spots)
    return value.get("")


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _spots(value[key])


def _change(holder: Any, key: Any, random: Random, spots: list[tuple[Any, Any]]) -> None:
    match random.randrange(7):
        case 0 if len(holder):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(TEXTS)] = holder.pop(key)
        case 2:
            other, place = random.choice(spots)
            try:
                holder[key] = copy.deepcopy(other[place])
            except (KeyError, IndexError):  # that place has gone meanwhile
                holder[key] = None
        case 3 if isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * random.choice((1, 40))
        case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice(NUMBERS)
        case 5 if isinstance(holder[key], str):
            holder[key] = random.choice(TEXTS)
        case _:
            holder[key] = odd(random)


def change_json(value: Any, random: Random) -> bytes:
    """Give a changed value as JSON; one in four times the bytes of the JSON are changed instead."""
    if random.random() < 0.25:
        return change_bytes(json.dumps(value).encode(), random)
    return json.dumps(change_value(value, random)).encode()


def change_lines(rows: list[Any], random: Random) -> bytes:
    """Give JSON lines of which some are changed."""
    if random.random() < 0.2:
        return change_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(), random)
    changed = change_value(rows, random)
    return "".join(json.dumps(row) + "\n" for row in changed if row is not None).encode() if isinstance(changed, list) else json.dumps(changed).encode()
