"""JSON out of files that anybody may have written: bounded in size, depth and number of values.

``json.loads`` takes thirty times a text's size where the text is made of empty lists, and fails in
a way of its own on deep nesting. Everything here raises ValueError, with what was found and what
was expected; callers say which file it was.

The accessors (``whole``, ``text``, ...) take a value that is there and check its type: JSON's true
is no number, and 1.0 is no whole one.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_VALUES = 4_000_000  # of a file; an empty list takes 90 bytes, a key with a list in it 200
MAX_DEPTH = 100
SHOWN = 80  # characters of a wrong value in a message


def parse_json(
    text: str | bytes,
    *,
    unique: bool = False,
    finite: bool = False,
    max_depth: int = MAX_DEPTH,
    object_hook: Any = None,
) -> Any:
    """JSON out of memory.

    Args:
        unique: refuse objects that have a key twice, of which ``json`` takes the last.
        finite: refuse NaN and the infinities, which are no JSON, but which Python writes and reads.
        max_depth: how deep lists and objects may be nested.
        object_hook: as ``json.loads`` takes it; not with ``unique``.

    Raises:
        ValueError: it is no JSON, or more than the limits allow.
    """
    opened = check_values(text)
    hooks: dict[str, Any] = {"object_hook": object_hook} if object_hook else {}
    if unique:
        hooks["object_pairs_hook"] = _without_doubles
    if finite:
        hooks["parse_constant"] = _refuse_constant
    try:
        found = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if opened > max_depth and _deeper(found, max_depth):
        raise ValueError(f"JSON nested more than {max_depth} deep")
    return found


def check_values(text: str | bytes) -> int:
    """How many lists and objects a JSON text opens, at most; nothing is parsed.

    Raises ValueError where it may hold more than ``MAX_VALUES`` values.
    """
    marks = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    lists, objects, commas = (text.count(mark) for mark in marks)
    if lists + objects + commas > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    return lists + objects


def read_json(path: Path, max_bytes: int = MAX_BYTES, **limits: Any) -> Any:
    """A JSON file; see ``parse_json`` for the limits and errors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, longer than ``max_bytes``, not UTF-8, or no JSON.
    """
    return parse_json(read_text(path, max_bytes), **limits)


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """A text file in UTF-8, of which at most ``max_bytes`` are read.

    Raises OSError, and ValueError for what is no plain file, too long, or no UTF-8.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")  # a pipe would wait for ever
    if found.st_size > max_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, expected at most {max_bytes:,}")
    with open(path, "rb") as f:
        return f.read(max_bytes).decode("utf-8")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{show(double)} stands twice in one object")
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _deeper(value: Any, limit: int) -> bool:
    """Whether containers are nested more than ``limit`` deep; level by level, not by recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def show(value: Any) -> str:
    """A value for a message, cut short."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 128 bits"
    return f"{value!r:.{SHOWN}}"


def whole(value: Any, what: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """``value``; ValueError unless it is a whole number within the bounds."""
    if type(value) is not int or not least <= value <= most:
        bounds = f"from {least} on" if most == 2**63 - 1 else f"from {least} to {most}"
        raise ValueError(f"{what} is {show(value)}, expected a whole number {bounds}")
    return value


def number(value: Any, what: str) -> float:
    """``value`` as a float; ValueError unless it is a finite number."""
    if type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value):
        return float(value)
    raise ValueError(f"{what} is {show(value)}, expected a number")


def text(value: Any, what: str) -> str:
    """``value``; ValueError unless it is text."""
    return _of(str, value, what, "text")


def truth(value: Any, what: str) -> bool:
    """``value``; ValueError unless it is true or false."""
    return _of(bool, value, what, "true or false")


def items(value: Any, what: str) -> list[Any]:
    """``value``; ValueError unless it is a list."""
    return _of(list, value, what, "a list")


def fields(value: Any, what: str) -> dict[str, Any]:
    """``value``; ValueError unless it is an object."""
    return _of(dict, value, what, "an object")


def entry(value: dict[str, Any], key: str, what: str = "it") -> Any:
    """What an object has under a key; ValueError where it has nothing."""
    if key not in value:
        raise ValueError(f"{what} lacks {key!r}")
    return value[key]


def _of(kind: type, value: Any, what: str, expected: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what} is {show(value)}, expected {expected}")
    return value


def plain_name(value: Any, what: str) -> str:
    """``value``; ValueError unless it is the name of a file in the directory that it came with.

    A name out of a file is joined to a directory, so it has no way to lead out of that: no slash,
    no "..", no device's control characters.
    """
    name = text(value, what)
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"{what} is {show(name)}, expected the plain name of a file")
    if len(name.encode("utf-8", "replace")) > 255:
        raise ValueError(f"{what} has {len(name)} characters, expected the name of a file")
    return name
