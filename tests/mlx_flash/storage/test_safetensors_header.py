"""Headers of safetensors files: read with bounds, checked, written aligned."""

import json

import pytest

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
    content = {"__metadata__": {"format": "mlx"}, "a": ENTRY, "b": ENTRY | {"shape": [6]}}
    path = write(tmp_path / "f", content, alignment=alignment)
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
