"""Row files: layout, writing, opening, damage, resuming. ``make`` serves the other tests too."""

import copy
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.row_files import content, flip, header_of, make, with_header

from mlx_flash.common.files import sha256_of
from mlx_flash.errors import DamagedError, FlashError, ReadError, RowFileError
from mlx_flash.storage import row_file
from mlx_flash.storage.row_file import PENDING, RowFile, file_bytes
from mlx_flash.storage.row_layout import ITEMSIZE, PAGE, Part, RowLayout
from mlx_flash.storage.row_writer import RowFileWriter

NAMES = ("gate", "up", "down")


# Layout


@pytest.mark.parametrize(
    ("parts", "dtype", "width", "step", "alignment", "stride", "scatters"),
    [
        (3, "BF16", 64, 128, 512, 512, False),
        (2, "BF16", 64, 128, 512, 512, False),
        (3, "F32", 64, 256, 512, 1024, False),
        (1, "BF16", 256, 512, 512, 512, True),
        (2, "BF16", 576, 1152, 512, 2560, False),
        (3, "BF16", 576, 1152, 512, 3584, False),
        (3, "F32", 576, 2560, 512, 7680, True),
        (3, "BF16", 1000, 2048, 512, 6144, True),
        (2, "BF16", 2048, 4096, 4096, 8192, True),
        (3, "BF16", 2048, 4096, 4096, 12288, True),
        (3, "F32", 2048, 8192, 4096, 24576, True),
        (3, "BF16", 2050, 4608, 512, 13824, True),
        (3, "BF16", 2560, 5120, 4096, 16384, True),
        (3, "BF16", 8192, 16384, 4096, 49152, True),
        (2, "F32", 8192, 32768, 4096, 65536, True),
    ],
)
def test_layout_follows_the_padding_rule(parts, dtype, width, step, alignment, stride, scatters):
    layout = RowLayout.plan(NAMES[:parts], dtype, width)
    assert [p.offset for p in layout.parts] == [i * step for i in range(parts)]
    assert (layout.alignment, layout.stride, layout.scatters) == (alignment, stride, scatters)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_layouts_of_all_widths_hold_together(parts, dtype):
    for width in [*range(1, 600), 768, 1536, 2047, 2304, 3584, 5120, 7168, 12288]:
        layout = RowLayout.plan(NAMES[:parts], dtype, width)
        ideal = parts * width * ITEMSIZE[dtype]
        assert layout.ideal_bytes == ideal
        assert layout.stride % layout.alignment == 0
        assert ideal <= layout.stride < ideal * 9 / 8 + 512
        whole_pages = -(-ideal // PAGE) * PAGE
        if layout.alignment == PAGE:
            assert layout.stride <= ideal * 9 / 8 + 512 * parts
        else:
            assert layout.alignment == 512
            assert whole_pages > ideal * 9 / 8 or layout.parts[-1].offset * parts > ideal
        end = 0
        for part, extent in zip(layout.parts, layout.extents, strict=True):
            assert part.offset >= end and extent >= part.nbytes == width * ITEMSIZE[dtype]
            if layout.scatters:
                assert part.offset % 512 == 0 and extent % 512 == 0
            else:
                assert extent == part.nbytes
            end = part.offset + extent
        assert end <= layout.stride
        assert RowLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_alignment_can_be_asked_for():
    assert RowLayout.plan(NAMES, "BF16", 64, 4096).stride == 4096
    assert RowLayout.plan(NAMES, "BF16", 2560, 512).stride == 15360
    for alignment in (0, 1, 256, 1000, -512, 4097):
        with pytest.raises(ValueError, match="alignment"):
            RowLayout.plan(NAMES, "BF16", 64, alignment)


def test_parts_off_sectors_do_not_scatter():
    assert RowLayout(
        (Part("a", "F32", (128,), 0), Part("b", "F32", (128,), 512)), 512, 1024
    ).scatters
    for offset in (516, 1024):
        parts = (Part("a", "F32", (128,), 0), Part("b", "F32", (128,), offset))
        assert not RowLayout(parts, 512, 2048).scatters
    assert not RowLayout((Part("a", "F32", (130,), 0),), 520, 520).scatters


# Writing and opening


LAYOUTS = {
    "small": RowLayout.plan(NAMES, "BF16", 64),
    "padded": RowLayout.plan(NAMES, "F32", 576),
    "pages": RowLayout.plan(NAMES[1:], "BF16", 2048),
    "large pages": RowLayout.plan(NAMES, "BF16", 2048, 16384),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_written_file_opens(tmp_path, layout):
    rows = [5, 1, 9]
    file, layers = make(tmp_path / "rows.safetensors", layout, rows)
    raw = (tmp_path / "rows.safetensors").read_bytes()
    assert file.layout == layout
    assert file.source == "a source"
    assert [layer.rows for layer in file.layers] == rows
    assert file.bytes == len(raw) == file_bytes(layout, rows, "a source")
    for i, layer in enumerate(file.layers):
        assert layer.offset % layout.alignment == 0
        assert file.layer_bytes(i) == layers[i].nbytes
        assert raw[layer.offset : layer.offset + layers[i].nbytes] == layers[i].tobytes()
        file.verify(i)


@pytest.mark.parametrize(
    ("name", "dtype", "columns"),
    [
        ("small", "U8", 512),
        ("padded", "U8", 7680),
        ("pages", "BF16", 4096),
        ("large pages", "U8", 16384),
    ],
)
def test_safetensors_reads_the_file(tmp_path, name, dtype, columns):
    path = tmp_path / "rows.safetensors"
    file, layers = make(path, LAYOUTS[name], [5, 2])
    with open(path, "rb") as f:
        data_start = 8 + int.from_bytes(f.read(8), "little")
    assert data_start % PAGE == 0
    assert file.layers[0].offset == data_start
    with safe_open(path, "numpy") as f:
        assert sorted(f.keys()) == ["layers.0.rows", "layers.1.rows"]
        meta = f.metadata()
        assert meta["format"] == "mlx_flash.rows" and meta["unit"] == "neuron"
        assert json.loads(meta["sha256"]) == file.hashes
        assert [p["name"] for p in json.loads(meta["layouts"])[0]["parts"]] == [
            p.name for p in LAYOUTS[name].parts
        ]
        for i, block in enumerate(layers):
            piece = f.get_slice(f"layers.{i}.rows")
            assert piece.get_dtype() == dtype
            assert piece.get_shape() == [len(block), columns]
            if dtype == "U8":
                np.testing.assert_array_equal(f.get_tensor(f"layers.{i}.rows"), block)


def test_unpadded_rows_of_another_type_keep_it(tmp_path):
    for dtype, width in [("F32", 1024), ("F16", 2048)]:
        path = tmp_path / f"{dtype}.safetensors"
        _, layers = make(path, RowLayout.plan(NAMES, dtype, width), [3])
        with safe_open(path, "numpy") as f:
            tensor = f.get_tensor("layers.0.rows")
        assert tensor.dtype == {"F32": np.float32, "F16": np.float16}[dtype]
        assert tensor.tobytes() == layers[0].tobytes()


def test_hashes_and_fingerprint(tmp_path):
    file, layers = make(tmp_path / "a", LAYOUTS["small"], [5, 2])
    again, _ = make(tmp_path / "b", LAYOUTS["small"], [5, 2])
    other, _ = make(tmp_path / "c", LAYOUTS["small"], [5, 2], seed=1)
    for digest, block in zip(file.hashes, layers, strict=True):
        (tmp_path / "layer").write_bytes(block.tobytes())
        assert digest == sha256_of(tmp_path / "layer")
    assert file.fingerprint == again.fingerprint != other.fingerprint
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


def test_verify_names_the_damaged_layer(tmp_path):
    path = tmp_path / "rows.safetensors"
    file, _ = make(path, LAYOUTS["small"], [5, 2, 4])
    flip(path, file.layers[2].offset - 1)
    seen = []
    file.verify(0, seen.append)
    assert sum(seen) == file.layer_bytes(0)
    file.verify(2)
    with pytest.raises(DamagedError, match=r"layer 1 of .*rows\.safetensors is damaged"):
        file.verify(1)


def test_verify_of_a_failing_disk(tmp_path, monkeypatch):
    file, _ = make(tmp_path / "rows.safetensors", LAYOUTS["small"], [5, 2])

    def fail(*_args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(row_file, "hash_file_range", fail)
    with pytest.raises(ReadError, match=r"rows.safetensors, layer 1: Input/output") as info:
        file.verify(1)
    assert info.value.errno == errno.EIO


def test_foreign_files_are_refused(tmp_path):
    ordinary = tmp_path / "ordinary.safetensors"
    save_file({"layers.0.rows": np.zeros((4, 512), np.uint8)}, ordinary)
    mlx = tmp_path / "mlx.safetensors"
    save_file({"weight": np.zeros((4, 4), np.float32)}, mlx, {"format": "mlx"})
    for path, expected in [(ordinary, "format None"), (mlx, "format 'mlx'")]:
        with pytest.raises(RowFileError, match=f"not a row file.*{expected}.*'mlx_flash.rows'"):
            RowFile(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"abc",
        b"\0" * 8,
        b"\0" * 5000,
        b"This is a text file, and no short one.\n" * 100,
        (1 << 62).to_bytes(8, "little") + b"{}",
        ((1 << 26) + 1).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (3).to_bytes(8, "little") + b"\xff\xfe\xfd",
        (4).to_bytes(8, "little") + b'{"a"',
        (200000).to_bytes(8, "little") + b"[" * 200000,
        (10000).to_bytes(8, "little") + b'{"a":' + b"1" * 9994 + b"}",
    ],
    ids=range(14),
)
def test_files_without_a_header_are_refused(tmp_path, raw):
    path = tmp_path / "rows.safetensors"
    path.write_bytes(raw)
    with pytest.raises(RowFileError, match=r"rows.safetensors is not a safetensors file"):
        RowFile(path)


def test_random_bytes_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "rows.safetensors"
    for _ in range(50):
        path.write_bytes(rng.bytes(int(rng.integers(1, 5000))))
        with pytest.raises(RowFileError):
            RowFile(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(RowFileError, match="does not exist"):
        RowFile(tmp_path / "nothing")
    with pytest.raises(RowFileError, match="cannot be read"):
        RowFile(tmp_path)


def test_a_later_version_is_refused(tmp_path):
    path = tmp_path / "rows.safetensors"
    make(path, LAYOUTS["small"], [5, 2])
    header, _ = header_of(path)
    for version in ("3", "1", 2, None):
        header["__metadata__"]["format_version"] = version
        with pytest.raises(RowFileError, match=f"version {version}.*update"):
            RowFile(with_header(path, header, tmp_path / "later"))


def test_truncated_files_are_refused(tmp_path):
    path, cut = tmp_path / "rows.safetensors", tmp_path / "cut"
    file, _ = make(path, LAYOUTS["small"], [5, 2])
    raw = path.read_bytes()
    start = file.layers[0].offset
    for length in [0, 1, 7, 8, 9, 100, 4000, start - 1, start, start + 1, len(raw) - 1]:
        cut.write_bytes(raw[:length])
        expected, said = RowFileError, "is not a safetensors file"
        if length >= start:
            expected, said = DamagedError, "is truncated"
        with pytest.raises(expected, match=said) as info:
            RowFile(cut)
        if length >= start:
            assert f"{length} bytes found, {len(raw)} expected" in str(info.value)
    cut.write_bytes(raw + b"x")
    with pytest.raises(DamagedError, match="too long"):
        RowFile(cut)


def test_an_unfinished_file_is_refused(tmp_path):
    path = tmp_path / "rows.safetensors"
    layers = content(LAYOUTS["small"], [5, 2])
    writer = RowFileWriter(path, LAYOUTS["small"], [5, 2], "a source")
    for i in range(2):
        with pytest.raises(RowFileError, match=f"unfinished: layer {i} is not written"):
            RowFile(path)
        writer.write(i, [layers[i]])
    writer.close()
    RowFile(path)


def contradictions(header: dict) -> Iterator[tuple[str, dict]]:
    """Headers that contradict themselves, each by one field."""

    def change(what: str, *keys: object, to: object) -> tuple[str, dict]:
        changed = copy.deepcopy(header)
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return what, changed

    meta = header["__metadata__"]
    layout, hashes = json.loads(meta["layouts"])[0], json.loads(meta["sha256"])
    entry = header["layers.0.rows"]
    for key in meta:
        yield f"{key} number", change("", "__metadata__", key, to=7)[1]
        changed = copy.deepcopy(header)
        del changed["__metadata__"][key]
        yield f"no {key}", changed
    for value in ([], "x", 3, None):
        yield change(f"metadata {value!r}", "__metadata__", to=value)
    yield change("unit", "__metadata__", "unit", to="atom")
    for value in ([0], [0, 0, 0], [0, 1], [0, -1], [0, "0"], [0, None], {}, 0):
        yield change(f"layout of {value}", "__metadata__", "layout_of", to=json.dumps(value))
    for value in ("", "{}", "[]", "null", "3", "{", "[" * 100_000):
        yield change(f"layouts {value:.9}", "__metadata__", "layouts", to=value)
        yield change(f"sha256 {value:.9}", "__metadata__", "sha256", to=value)
    for value in (
        hashes[:1],
        [*hashes, hashes[0]],
        [*hashes, "x"],
        [7, 7],
        ["a", "b"],
        [hashes[0], None],
    ):
        yield change(f"{len(value)} hashes", "__metadata__", "sha256", to=json.dumps(value))
    odd = [None, -1, 0, 1.5, "x", [], {}, True, float("inf"), float("nan"), 10**30]
    for key in ("alignment", "stride"):
        for value in [*odd, 513, layout["stride"] * 2, 2**40]:
            changed = json.dumps([{**layout, key: value}])
            yield change(f"{key} {value}", "__metadata__", "layouts", to=changed)
    for key in layout["parts"][1]:
        values = {
            "name": ["gate", 5, None, []],
            "dtype": ["F8", 5, None, [], "I64"],
            "shape": [*odd, [1000], [-1], [0], [128, 0], [1.5], [None], [True], ["x"], [10**30]],
        }
        for value in values.get(key, [-1, 1.5, "x", None, [], True, 10**30, 127, 511]):
            parts = copy.deepcopy(layout["parts"])
            parts[1][key] = value
            changed = json.dumps([{**layout, "parts": parts}])
            yield change(f"part {key} {value}", "__metadata__", "layouts", to=changed)
    for parts in ([], {}, None, [{}], [[]], ["x"], [{**layout["parts"][0], "more": 1}]):
        changed = json.dumps([{**layout, "parts": parts}])
        yield change(f"parts {parts}", "__metadata__", "layouts", to=changed)
    for key, value in entry.items():
        for other in [*odd, [], [1], [[], []], [-1, 5], [0, 0], [5, 0], [True, True], ["a", "b"]]:
            yield change(f"{key} {other}", "layers.0.rows", key, to=other)
        if isinstance(value, list):
            for i in range(2):
                for other in [*odd, value[i] + 1, value[i] + 512, value[i] * 2 + 1024]:
                    if other != value[i]:
                        yield change(f"{key}[{i}] {other}", "layers.0.rows", key, i, to=other)
    for other in ([], None, 5, "x", {}):
        yield change(f"entry {other}", "layers.0.rows", to=other)
    for count in (0, -5):
        odd_entry = {**entry, "shape": [count, 512], "data_offsets": [0, 512 * count]}
        changed = {"__metadata__": {**meta, "sha256": json.dumps(hashes[:1])}}
        yield f"{count} rows", {**changed, "layers.0.rows": odd_entry}
    parts = copy.deepcopy(layout["parts"])
    parts[-1]["shape"] = [(layout["stride"] - parts[-1]["offset"]) // 2 + 1]
    changed = json.dumps([{**layout, "parts": parts}])
    yield change("the last part is too wide", "__metadata__", "layouts", to=changed)
    yield change("another tensor", "weight", to=entry)
    yield change("layer 3 of 3", "layers.3.rows", to=entry)
    yield "no tensor", {"__metadata__": meta}
    yield "nothing", {"__metadata__": {**meta, "sha256": "[]"}}
    yield "one tensor less", {k: v for k, v in header.items() if k != "layers.1.rows"}


def test_contradictory_headers_are_refused(tmp_path):
    path = tmp_path / "rows.safetensors"
    make(path, LAYOUTS["small"], [5, 2])
    RowFile(with_header(path, header_of(path)[0], tmp_path / "same"))
    for what, header in contradictions(header_of(path)[0]):
        out = with_header(path, header, tmp_path / "odd")
        try:
            RowFile(out)
        except (RowFileError, DamagedError) as error:
            assert str(out) in str(error), what
        else:
            pytest.fail(f"opened with {what}")


def test_data_off_the_alignment_are_refused(tmp_path):
    path, out = tmp_path / "rows.safetensors", tmp_path / "moved"
    make(path, LAYOUTS["pages"], [3])
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    out.write_bytes((size + 512).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 512)
    with open(out, "ab") as f:
        f.write(raw[8 + size :])
    with pytest.raises(RowFileError, match="has a damaged row file header"):
        RowFile(out)


def test_flipped_header_bytes_never_surprise(tmp_path):
    path, out = tmp_path / "rows.safetensors", tmp_path / "flipped"
    file, _ = make(path, LAYOUTS["small"], [5, 2])
    raw = bytearray(path.read_bytes())
    text = len(raw[: file.layers[0].offset].rstrip())
    rng = np.random.default_rng(1)
    opened = 0
    for _ in range(600):
        changed = raw.copy()
        for at in rng.integers(0, text, int(rng.integers(1, 4))):
            changed[at] = int(rng.integers(32, 127))
        out.write_bytes(changed)
        try:
            found = RowFile(out)
        except (RowFileError, DamagedError):
            continue
        opened += 1  # a changed source, hash or part is no contradiction
        assert found.bytes == len(raw) and [x.rows for x in found.layers] == [5, 2]
    assert 0 < opened < 300


# Resuming


ROWS = [5, 2, 4]
LAYOUT = LAYOUTS["small"]


@pytest.fixture
def whole(tmp_path) -> bytes:
    make(tmp_path / "whole", LAYOUT, ROWS)
    return (tmp_path / "whole").read_bytes()


def write(path: Path, layers: range, layout: RowLayout = LAYOUT, source: str = "a source") -> None:
    data = content(layout, ROWS)
    writer = RowFileWriter(path, layout, ROWS, source)
    for i in layers:
        writer.write(i, [data[i]])
    writer.close()


def resume(path: Path, layout: RowLayout = LAYOUT, source: str = "a source") -> int:
    """Write what is still to be written; returns the layer at which that began."""
    data = content(layout, ROWS)
    writer = RowFileWriter(path, layout, ROWS, source)
    first = writer.next_layer()
    for i in range(first, len(ROWS)):
        assert writer.next_layer() == i
        writer.write(i, [data[i]])
    assert writer.next_layer() == len(ROWS)
    writer.close()
    writer.close()
    return first


@pytest.mark.parametrize("done", range(len(ROWS) + 1))
def test_resume_after_whole_layers(tmp_path, whole, done):
    path = tmp_path / "rows"
    write(path, range(done))
    assert resume(path) == done
    assert path.read_bytes() == whole


@pytest.mark.parametrize("done", range(len(ROWS)))
def test_resume_with_a_torn_layer(tmp_path, whole, done):
    path = tmp_path / "rows"
    write(path, range(done))
    writer = RowFileWriter(path, LAYOUT, ROWS, "a source")

    def blocks() -> Iterator[np.ndarray]:
        yield content(LAYOUT, ROWS)[done][:1]
        yield np.full((1, LAYOUT.stride), 7, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write(done, blocks())
    writer.close()
    assert resume(path) == done
    assert path.read_bytes() == whole


def test_resume_with_a_damaged_layer(tmp_path, whole):
    path = tmp_path / "rows"
    write(path, range(3))
    flip(path, len(whole) - LAYOUT.stride * (ROWS[2] + 1))
    assert resume(path) == 1
    assert path.read_bytes() == whole


def test_resume_with_a_torn_hash(tmp_path, whole):
    path = tmp_path / "rows"
    write(path, range(3))
    raw = path.read_bytes()
    digest = json.loads(header_of(path)[0]["__metadata__"]["sha256"])[1]
    at = raw.index(digest.encode())
    path.write_bytes(raw[: at + 30] + b"0" * 34 + raw[at + 64 :])
    assert resume(path) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 200, 500, 1000, PAGE - 1])
def test_resume_with_a_torn_header_begins_anew(tmp_path, whole, kept):
    path = tmp_path / "rows"
    for rest in (b"", b"\0" * (len(whole) - kept)):
        path.write_bytes(whole[:kept] + rest)
        assert resume(path) == 0
        assert path.read_bytes() == whole


def test_resume_of_something_else_begins_anew(tmp_path, whole):
    path = tmp_path / "rows"
    write(path, range(2), source="another one")
    assert resume(path) == 0
    assert path.read_bytes() == whole
    write(path, range(2), layout=LAYOUTS["padded"])
    assert resume(path) == 0
    assert path.read_bytes() == whole
    path.write_bytes(b"something else\n" * 1000)
    assert resume(path) == 0
    assert path.read_bytes() == whole
    writer = RowFileWriter(path, LAYOUT, [5, 2], "a source")
    assert writer.next_layer() == 0
    writer.close()


def test_resume_with_odd_hashes_begins_anew(tmp_path, whole):
    path, odd = tmp_path / "rows", tmp_path / "odd"
    path.write_bytes(whole)
    for hashes in ("[]", "{}", "7", "null", '["a"]', "[1,2,3]", json.dumps([PENDING] * 7)):
        header, _ = header_of(path)
        header["__metadata__"]["sha256"] = hashes
        with_header(path, header, odd)
        assert resume(odd) == 0
        assert odd.read_bytes() == whole


def test_resume_cuts_what_is_too_long(tmp_path, whole):
    path = tmp_path / "rows"
    path.write_bytes(whole + b"more")
    assert resume(path) == len(ROWS)
    assert path.read_bytes() == whole


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [0, 400, 450, 500, 550, 600, 3000])
def test_killed_in_any_write_resumes(tmp_path, whole, monkeypatch, torn):
    """Each write in turn ends after some bytes; the layers before it are not written again."""
    path = tmp_path / "rows"
    real = os.pwrite
    for last in range(100):
        path.unlink(missing_ok=True)
        left = last

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            nonlocal left
            if left == 0:
                real(fd, data[:torn], offset)
                raise Killed
            left -= 1
            return real(fd, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            try:
                resume(path)
                break
            except Killed:
                pass
        assert (last - 1) // 2 <= resume(path) <= last // 2
        assert path.read_bytes() == whole
    assert last == 2 * len(ROWS) + 1


@pytest.mark.durability
def test_a_hash_is_recorded_after_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    calls = []
    pwrite, fsync = os.pwrite, os.fsync

    def record_write(fd: int, data: memoryview, offset: int) -> int:
        calls.append("data" if offset else "header")
        return pwrite(fd, data, offset)

    def record_sync(fd: int) -> None:
        calls.append("sync")
        fsync(fd)

    monkeypatch.setattr(os, "pwrite", record_write)
    monkeypatch.setattr(os, "fsync", record_sync)
    write(tmp_path / "rows", range(3))
    assert calls == ["header", "sync", *["data", "sync", "header", "sync"] * 3]


def test_short_writes_are_continued(tmp_path, whole, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:777], at))
    write(tmp_path / "rows", range(3))
    assert (tmp_path / "rows").read_bytes() == whole


def test_blocks_of_any_cut_give_the_same_file(tmp_path, whole):
    path = tmp_path / "rows"
    data = content(LAYOUT, ROWS)
    writer = RowFileWriter(path, LAYOUT, ROWS, "a source")
    wide = np.zeros((5, 2 * LAYOUT.stride), np.uint8)
    wide[:, ::2] = data[0]
    writer.write(0, [wide[:, ::2]])  # not contiguous
    writer.write(1, [data[1][:0], data[1][:1], data[1][1:], data[1][:0]])
    writer.write(2, (row[None] for row in data[2].view(np.uint16)))
    writer.close()
    assert path.read_bytes() == whole


def test_a_layer_of_the_wrong_size_is_refused(tmp_path, whole):
    path = tmp_path / "rows"
    data = content(LAYOUT, ROWS)
    write(path, range(3))
    writer = RowFileWriter(path, LAYOUT, ROWS, "a source")
    with pytest.raises(ValueError, match="layer 1 got rows up to"):
        writer.write(1, [data[1][:1]])
    with pytest.raises(ValueError, match="layer 1 got more than its 2 rows"):
        writer.write(1, [data[1], data[1]])
    writer.close()
    assert path.read_bytes() == whole
    for rows in ([], [3, 0], [-1]):
        with pytest.raises(ValueError, match="at least one row"):
            RowFileWriter(tmp_path / "none", LAYOUT, rows, "a source")
    assert not (tmp_path / "none").exists()


def test_errors_are_flash_errors_of_their_class():
    assert issubclass(RowFileError, FlashError) and RowFileError.exit_code == 2
    assert issubclass(DamagedError, FlashError) and DamagedError.exit_code == 1
