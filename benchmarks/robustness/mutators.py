"""Changes to a file: bytes, JSON, the JSON in a safetensors header. One seed, one change."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

HEAD = 2000  # bytes at a file's begin that are changed as often as all the rest
DEEP = "DEEP"  # stands for text that is nested deeply, which json.dumps would not write
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 4096, 65537, 300_000, 10**9, 2**31 - 1, 2**31,
    2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 0.5, -0.0, 1e-300, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "a", "0", "64", "F32", "BF16", "F8_E4M3",
    "U8", "none", "../x", "/etc/passwd", "model.safetensors", "config.json", "\0", "\ud800",
    "é" * 300, "x" * 100_000, [], [0], [[]], [None], [1, 2], [-1, 8], ["a"], [10**9] * 4,
    [[1]] * 2000, {}, {"a": 1}, {"": None}, {"__float__": "NaN"}, {"a": {"b": {"c": []}}}, DEEP,
)  # fmt: skip


def change_bytes(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: flipped, overwritten, cut, added, moved."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = len(data) if rng.random() < 0.5 else min(len(data), HEAD)
        at, length = rng.randrange(max(1, end)), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 2:
            filler = rng.choice((b"\0", b"\xff", b"9", b"[", b'"', b"\x7f"))
            data[at : at + length] = filler * len(data[at : at + length])
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data += rng.randbytes(length)
        elif kind == 5:
            del data[at : at + length]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        else:
            there = rng.randrange(max(1, end))
            data[at : at + length] = data[there : there + length]
    return bytes(data)


def change_json(text: str, rng: random.Random) -> str:
    """One to three changes of a document: values, keys, what is there twice or not at all."""
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _changed(document, rng)
    return json.dumps(document).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)


def _changed(document: Any, rng: random.Random) -> Any:
    places = [((), document)]
    for path, value in places:  # grows while it is gone through
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            places += [((*path, key), one) for key, one in inner]
        if len(places) > 3000:
            break
    path, value = rng.choice(places)
    new = rng.choice(VALUES)
    if not path:
        return new if rng.random() < 0.3 else document
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    kind = rng.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(VALUES))[:1000]] = holder.pop(last)
    elif kind == 2:
        holder[last] = [value]
    elif kind == 3 and isinstance(value, int) and not isinstance(value, bool):
        holder[last] = value + rng.choice(
            (-2, -1, 1, 2, 8, value, -value, value * 1000, value // 2)
        )
    elif kind == 4:
        _, other = rng.choice(places[1:])
        holder[last] = copy.deepcopy(other)
    else:
        holder[last] = new
    return document


def change_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header; its data stay, and so does what metadata hold."""
    size = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + size].decode()
    if rng.random() < 0.3 and "__metadata__" in (header := json.loads(text)):
        held = [k for k, v in header["__metadata__"].items() if v[:1] in "[{"]
        if held:
            key = rng.choice(held)
            header["__metadata__"][key] = change_json(header["__metadata__"][key], rng)
            text = json.dumps(header)
    else:
        text = change_json(text, rng)
    new = text.encode("utf-8", "surrogatepass")
    length = rng.choice((len(new),) * 9 + (len(new) + rng.choice((-1, 1, 8, 10**9, 2**62)),))
    return max(0, length).to_bytes(8, "little") + new + raw[8 + size :]


def mutate(file: Path, rng: random.Random) -> None:
    """Change one file; what links to it elsewhere stays as it was."""
    raw = file.read_bytes()
    structured = rng.random() < 0.6
    if structured and file.suffix == ".json":
        new = change_json(raw.decode(), rng).encode("utf-8", "surrogatepass")
    elif structured and file.suffix == ".safetensors":
        new = change_header(raw, rng)
    else:
        new = change_bytes(raw, rng)
    file.unlink()
    file.write_bytes(new)
