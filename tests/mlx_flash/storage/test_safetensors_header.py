"""Headers of safetensors files: read with bounds, checked, written aligned."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_flash.errors import DamagedError
from mlx_flash.storage import safetensors_header
from mlx_flash.storage.safetensors_header import (
    data_end,
    header,
    header_bytes,
    read_entries,
    read_header,
)

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, content, data=b"\0" * 24, alignment=8):
    path.write_bytes(header_bytes(content, alignment) + data)
    return path


@pytest.mark.parametrize("alignment", [8, 512, 4096])
def test_round_trip(tmp_path, alignment):
    behind = {"shape": [6], "data_offsets": [24, 48]}
    content = {"__metadata__": {"format": "mlx"}, "a": ENTRY, "b": ENTRY | behind}
    path = write(tmp_path / "f", content, bytes(48), alignment)
    found, start = read_header(path)
    assert found == content and start % alignment == 0
    entries, start = read_entries(path)
    assert entries == {"a": content["a"], "b": content["b"]}
    assert data_end(entries, start) == path.stat().st_size
    assert header(path) == (entries, start)


def test_no_tensors(tmp_path):
    entries, start = header(write(tmp_path / "f", {}, b""))
    assert entries == {} and data_end(entries, start) == start


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x10",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_other_files(tmp_path, raw):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(ValueError):
        read_header(tmp_path / "f")
    with pytest.raises(DamagedError, match="not a safetensors file or damaged"):
        header(tmp_path / "f")


def test_no_more_than_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", 50)
    path = write(tmp_path / "f", {"a": ENTRY})
    with pytest.raises(ValueError, match="cut off or too long"):
        read_header(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, -3]},
        {"shape": [2, 3.0]},
        {"shape": "23"},
        {"dtype": 7},
        {"data_offsets": [24, 0]},
        {"data_offsets": [-8, 16]},
        {"data_offsets": [0]},
        {"data_offsets": [0, True]},
        {"data_offsets": None},
    ],
)
def test_entries_that_are_not_sound(tmp_path, change):
    path = write(tmp_path / "f", {"a": ENTRY | change})
    with pytest.raises(ValueError, match="its header says of tensor 'a'"):
        read_entries(path)
    with pytest.raises(DamagedError, match="tensor 'a'"):
        header(path)


@pytest.mark.parametrize("entry", [[], "x", None, 3, {}])
def test_entries_that_are_none(tmp_path, entry):
    with pytest.raises(ValueError, match="its header says of tensor"):
        read_entries(write(tmp_path / "f", {"a": entry}))


def test_a_file_cut_off(tmp_path):
    path = write(tmp_path / "f", {"a": ENTRY}, b"\0" * 23)
    assert json.dumps(read_entries(path)[0]["a"]) == json.dumps(ENTRY)
    with pytest.raises(DamagedError, match=f"it has {path.stat().st_size} bytes, its header says"):
        header(path)


HALF = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
REST = {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": HALF, "b": HALF}, "'b' at byte 0 overlaps the one before it, expected at 12"),
        ({"a": HALF, "b": REST | {"data_offsets": [8, 20]}}, "overlaps"),
        ({"a": HALF, "b": REST | {"data_offsets": [16, 28]}}, "leaves a hole before it"),
        ({"a": REST}, "leaves a hole"),
        ({"a": HALF, "b": REST | {"shape": [2]}}, "12 bytes, which F32 of shape"),
        ({"a": HALF, "b": REST | {"dtype": "F16"}}, "12 bytes, which F16 of shape"),
        ({"a": HALF, "b": REST | {"shape": [2**62, 2**62]}}, "12 bytes"),
        ({"a": HALF, "b": REST | {"shape": [1] * 1000}}, "its header says of tensor 'b'"),
        ({"a": HALF, "b": REST | {"dtype": "F31"}}, "of type 'F31', which is not known"),
    ],
)
def test_tensors_that_are_not_one_behind_the_other(tmp_path, entries, words):
    with pytest.raises(ValueError, match=words):
        read_entries(write(tmp_path / "f", entries))


def test_a_name_that_is_there_twice(tmp_path):
    text = b'{"a":%b,"a":%b}' % (json.dumps(HALF).encode(), json.dumps(REST).encode())
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(ValueError, match="'a' stands twice"):
        read_entries(tmp_path / "f")


@pytest.mark.parametrize("change", ["a byte more", "a header one shorter"])
def test_data_that_are_not_where_the_header_says(tmp_path, change):
    path = write(tmp_path / "f", {"a": ENTRY})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if change == "a byte more":
        path.write_bytes(raw + b"x")
    else:
        path.write_bytes((size - 1).to_bytes(8, "little") + raw[8:])
    with pytest.raises(DamagedError, match="bytes, its header says"):
        header(path)


def test_what_the_library_writes_is_sound(tmp_path):
    arrays = {
        "b": np.zeros((2, 3), np.float16),
        "a": np.zeros((0, 5), np.float32),
        "c": np.zeros((), np.int8),
        "d": np.zeros((3,), np.bool_),
    }
    save_file(arrays, tmp_path / "f")
    entries, start = header(tmp_path / "f")
    assert entries.keys() == arrays.keys()
    assert data_end(entries, start) == (tmp_path / "f").stat().st_size
