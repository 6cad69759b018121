"""Rows of experts: longer than a request, of several layouts in one file, read behind others."""

import errno
import itertools
import json
import os
import threading
from contextlib import closing

import numpy as np
import pytest
from support.disks import StrictDisk, assert_read, slots_for
from support.expert_rows import EXPERT, LAYOUTS, LONGER, ROWS, ask, gated_reader, make
from support.row_files import flip, header_of, with_header

from mlx_flash.errors import DamagedError, ReadError, RowFileError
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile, file_bytes
from mlx_flash.storage.row_layout import MAX_PADDING, PAGE, SECTOR, RowLayout
from mlx_flash.storage.row_writer import RowFileWriter

NEURON = RowLayout.of(
    [("gate", "U32", (8,)), ("gate.scales", "F32", (1,)), ("gate.biases", "F32", (1,))],
    SECTOR,
    pad=False,
)

# Layouts


def test_layouts_used_here():
    assert EXPERT.scatters and LONGER.scatters and not NEURON.scatters
    assert EXPERT.stride != LONGER.stride


@pytest.mark.parametrize("seed", range(30))
def test_layouts_of_any_parts(seed):
    """Parts stand in order without overlap; padding stays below an eighth, or is of a sector."""
    rng = np.random.default_rng(seed)
    parts = [
        (
            f"part {i}",
            str(rng.choice(["F32", "BF16", "F16", "U8", "U32"])),
            tuple(rng.integers(1, 60, int(rng.integers(1, 4))).tolist()),
        )
        for i in range(int(rng.integers(1, 10)))
    ]
    for pad, alignment in itertools.product((True, False), (None, SECTOR, PAGE, 4 * PAGE)):
        layout = RowLayout.of(parts, alignment, pad)
        assert [(p.name, p.dtype, p.shape) for p in layout.parts] == parts
        for part, after in itertools.pairwise(layout.parts):
            assert part.offset + part.nbytes <= after.offset
            assert pad or part.offset + part.nbytes == after.offset
        last = layout.parts[-1]
        end = last.offset + last.nbytes
        assert layout.parts[0].offset == 0
        assert end <= layout.stride < end + layout.alignment + SECTOR
        assert layout.stride % layout.alignment == 0
        assert layout.alignment == alignment or alignment is None
        assert layout.ideal_bytes == sum(part.nbytes for part in layout.parts)
        if all(part.offset % SECTOR == 0 for part in layout.parts):
            assert last.offset <= (1 + MAX_PADDING) * layout.ideal_bytes
        if alignment is None and layout.alignment == PAGE:
            assert layout.stride <= (1 + MAX_PADDING) * layout.ideal_bytes
        again = RowLayout.from_json(json.loads(json.dumps(layout.to_json())))
        assert again == layout
        assert hash(again) == hash(layout)


def test_padding_only_where_it_is_cheap():
    large, small = ("a", "U32", (1000,)), ("b", "BF16", (3,))
    assert [p.offset for p in RowLayout.of([large, small]).parts] == [0, 4000]
    assert [p.offset for p in RowLayout.of([("a", "U32", (5000,)), small]).parts] == [0, 20480]
    parts = RowLayout.of([("a", "U32", (5000,)), small], pad=False).parts
    assert [p.offset for p in parts] == [0, 20000]


@pytest.mark.parametrize("alignment", [0, 1, 256, 513, 3 * 512, -512])
def test_alignments_that_are_none(alignment):
    with pytest.raises(ValueError, match="power of two, at least 512"):
        RowLayout.of([("a", "F32", (8,))], alignment)


# Files of several layouts


def test_several_layouts_in_a_file(tmp_path):
    file, layers = make(tmp_path / "rows")
    assert file.unit == "expert"
    assert [layer.layout for layer in file.layers] == LAYOUTS
    assert file.layouts == [EXPERT, LONGER]
    assert file.bytes == file_bytes(LAYOUTS, ROWS, "a source", "expert")
    assert file.bytes == file.path.stat().st_size
    data = file.path.read_bytes()
    for layer, block in zip(file.layers, layers, strict=True):
        assert data[layer.offset : layer.offset + layer.nbytes] == block.tobytes()
        assert layer.offset % layer.layout.alignment == 0
    for i in range(3):
        file.verify(i)
    flip(file.path, file.layers[1].offset + 99)
    with pytest.raises(DamagedError, match="layer 1"):
        file.verify(1)
    file.verify(2)


@pytest.mark.parametrize(
    "value",
    [[0, 1], [0, 1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 2], [0, 1, -1], [0, True, 0], [0, "1", 0]],
    ids=str,
)
def test_damaged_layout_of(tmp_path, value):
    """Which layout a layer has is held against its tensor."""
    file, _ = make(tmp_path / "rows")
    header, _ = header_of(file.path)
    assert json.loads(header["__metadata__"]["layout_of"]) == [0, 1, 0]
    header["__metadata__"]["layout_of"] = json.dumps(value)
    out = with_header(file.path, header, tmp_path / "odd")
    with pytest.raises(RowFileError, match="has a damaged row file header") as caught:
        RowFile(out)
    assert str(out) in str(caught.value)


def test_writing_goes_on_only_with_the_same_layouts(tmp_path):
    """A file begun with other layouts for its layers is begun anew."""
    _, layers = make(tmp_path / "whole")
    path = tmp_path / "rows"
    for layouts, expected in ((LAYOUTS, 1), ([EXPERT] * 3, 0)):
        path.unlink(missing_ok=True)
        writer = RowFileWriter(path, LAYOUTS, ROWS, "a source", "expert")
        writer.write(0, [layers[0]])
        writer.close()
        writer = RowFileWriter(path, layouts, ROWS, "a source", "expert")
        assert writer.next_layer() == expected
        writer.close()
    writer = RowFileWriter(path, LAYOUTS, ROWS, "a source", "layer")
    assert writer.next_layer() == 0, "rows of another unit"
    writer.close()


def test_layouts_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="2 layouts for 3 layers"):
        RowFileWriter(tmp_path / "rows", [EXPERT, LONGER], ROWS, "a source")
    page = RowLayout.of([("a", "F32", (4096,))], PAGE)
    with pytest.raises(ValueError, match="one alignment"):
        RowFileWriter(tmp_path / "rows", [EXPERT, page, EXPERT], ROWS, "a source")
    assert not (tmp_path / "rows").exists()


# Rows longer than a request


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("request_bytes", [512, 5000, 16384, 10**6])
def test_long_rows(tmp_path, direct, request_bytes):
    """Cut into about equal pieces, each straight into its slot; every byte is read once."""
    file, layers = make(tmp_path / "rows")
    rows, slots = np.array([0, 2, 3]), np.array([4, 0, 3])
    options = {"direct": direct, "request_bytes": request_bytes, "gap_bytes": 0, "threads": 4}
    with closing(RowReader(file, **options)) as reader:
        for layer, layout in enumerate(LAYOUTS):
            out = slots_for(layout, 5)
            before = reader.stats()
            reader.read(layer, rows, slots, out)
            assert_read(layout, layers[layer], rows, slots, out)
            stats = reader.stats() - before
            assert stats.bytes_read == 3 * layout.stride
            if layout.stride > request_bytes:
                most = max(1, request_bytes // reader.grain) * reader.grain
                assert stats.requests == 3 * -(-layout.stride // most)


def test_pieces_are_cut_on_sectors_and_of_a_requests_length(tmp_path, monkeypatch):
    """No request is longer than asked for; none begins inside a sector, in file or memory."""
    file, layers = make(tmp_path / "rows")
    disk = StrictDisk(monkeypatch)
    rows, slots = np.arange(4), np.array([3, 1, 0, 2])
    with closing(RowReader(file, request_bytes=6000, threads=4, engine="threads")) as reader:
        for layer, layout in enumerate(LAYOUTS):
            out = slots_for(layout, 4)
            prepared = reader.prepare(rows, slots, out, layer)
            assert not prepared.staged
            for request in prepared.scattered:
                assert request.end - request.begin <= 6000
                assert request.begin % SECTOR == 0
                assert request.stop == request.start + 1
            lengths = [request.end - request.begin for request in prepared.scattered]
            assert max(lengths) - min(lengths) <= len(lengths) // 4 * SECTOR
            reader.wait(reader.submit(layer, prepared))
            assert_read(layout, layers[layer], rows, slots, out)
    assert disk


@pytest.mark.parametrize("most", [37, 512, 1000, 4096])
def test_short_reads_of_pieces(tmp_path, monkeypatch, most):
    """A piece that comes in parts goes on where it stopped, inside a part of the row or not."""
    file, layers = make(tmp_path / "rows")
    StrictDisk(monkeypatch, most=most)
    rows, slots = np.array([1, 2]), np.array([0, 1])
    with closing(RowReader(file, request_bytes=9000, threads=4, engine="threads")) as reader:
        for layer, layout in enumerate(LAYOUTS):
            out = slots_for(layout, 2)
            reader.read(layer, rows, slots, out)
            assert_read(layout, layers[layer], rows, slots, out)


def test_parts_of_long_rows_that_are_not_wanted(tmp_path):
    """The first and the last part are not read; one in between goes nowhere."""
    file, layers = make(tmp_path / "rows")
    rows, slots = np.array([0, 2, 5]), np.array([2, 0, 1])
    with closing(RowReader(file, request_bytes=5000, threads=4)) as reader:
        count = len(EXPERT.parts)
        for wanted in ([0], [count - 1], [1, 5], range(2, 7), [0, count - 1]):
            out = slots_for(EXPERT, 3)
            given = [array if i in wanted else None for i, array in enumerate(out)]
            before = reader.stats()
            reader.read(0, rows, slots, given)
            for i in wanted:
                part, extent = EXPERT.parts[i], EXPERT.extents[i]
                expected = layers[0][rows, part.offset : part.offset + extent]
                assert np.array_equal(out[i][slots], expected)
            last = (
                EXPERT.stride
                if max(wanted) == count - 1
                else sum(EXPERT.extents[: max(wanted) + 1])
            )
            first = sum(EXPERT.extents[: min(wanted)])
            assert (reader.stats() - before).bytes_read == 3 * (last - first)


def test_a_failing_piece_is_named(tmp_path, monkeypatch):
    file, _ = make(tmp_path / "rows")
    bad, real = file.layers[1].offset + 2 * LONGER.stride + 20000, os.preadv

    def preadv(fd, buffers, offset):
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    with closing(RowReader(file, request_bytes=8192, threads=2, engine="threads")) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(ReadError, match="layer 1, row 2"):
            reader.read(1, np.arange(4), np.arange(4), slots_for(LONGER, 4))


def test_a_file_cut_inside_a_long_row(tmp_path):
    file, _ = make(tmp_path / "rows")
    with closing(RowReader(file, request_bytes=8192, threads=2)) as reader:
        os.truncate(file.path, file.bytes - 10000)
        with pytest.raises(DamagedError, match="layer 2, row 8; it was cut while in use"):
            reader.read(2, np.arange(9), np.arange(9), slots_for(EXPERT, 9))


def test_memory_for_long_rows(tmp_path):
    """Rows that go straight into slots take no staging buffers."""
    file, _ = make(tmp_path / "rows")
    with (
        closing(RowReader(file, request_bytes=4096)) as small,
        closing(RowReader(file, request_bytes=1 << 20)) as large,
    ):
        assert small.overhead_bytes < large.overhead_bytes


# Reads behind those that are needed


@pytest.fixture
def gated(tmp_path, monkeypatch):
    with gated_reader(tmp_path, monkeypatch) as found:
        yield found


def test_reads_behind_wait_for_needed_ones(gated):
    """None is begun while a needed one is under way; all are once that is over."""
    reader, gate, layers = gated
    needed, behind = slots_for(EXPERT, 1), slots_for(EXPERT, 4)
    first = ask(reader, 0, [1], [0], needed)
    gate.begun.wait()
    later = ask(reader, 2, [0, 3, 5, 8], [0, 1, 2, 3], behind, behind=True)
    other = slots_for(LONGER, 1)
    reader.wait(ask(reader, 1, [2], [0], other))  # needed ones go on beside it
    assert_read(LONGER, layers[1], np.array([2]), np.array([0]), other)
    assert not any(future.done() for future in later)
    assert max(gate.offsets) < reader.file.layers[2].offset
    gate.word.set()
    reader.wait(first)
    reader.wait(later)
    assert_read(EXPERT, layers[2], np.array([0, 3, 5, 8]), np.arange(4), behind)
    stats = reader.stats()
    assert stats.bytes_read == 5 * EXPERT.stride + LONGER.stride


def test_reads_behind_that_are_dropped(gated):
    """What has not begun is not read, what has is waited for; memory is then left alone."""
    reader, gate, _ = gated
    first = ask(reader, 0, [1], [0], slots_for(EXPERT, 1))
    gate.begun.wait()
    out = slots_for(EXPERT, 9)
    later = ask(reader, 2, range(9), range(9), out, behind=True)
    more = [f for row in range(9) for f in ask(reader, 2, [row], [row], out, behind=True)]
    waiting = [future for future in more if future.cancel()]
    assert len(waiting) >= 9 - 2, "more are under way than may be"
    gate.word.set()
    reader.wait(first)
    reader.drop([*later, *more])
    assert all(future.done() for future in [*later, *more])


def test_closing_with_reads_behind_that_wait(gated):
    """They fail, and say why; closing does not wait for what nobody will read."""
    reader, gate, _ = gated
    first = ask(reader, 0, [1], [0], slots_for(EXPERT, 1))
    gate.begun.wait()
    out = slots_for(EXPERT, 9)
    later = [f for row in range(9) for f in ask(reader, 2, [row], [row], out, behind=True)]
    closing_thread = threading.Thread(target=reader.close)
    closing_thread.start()
    for future in later:
        with pytest.raises(ValueError, match="is closed"):
            future.result()
    gate.word.set()
    closing_thread.join()
    reader.drop(first)
    assert all((array == 0xAA).all() for array in out)


def test_a_closed_reader_takes_no_reads_behind(tmp_path):
    file, _ = make(tmp_path / "rows")
    reader = RowReader(file)
    read = reader.prepare(np.array([1]), np.array([0]), slots_for(EXPERT, 1))
    reader.close()
    with pytest.raises(ValueError, match=f"reader of {file.path} is closed"):
        reader.submit(0, read, behind=True)


def test_a_read_behind_that_fails(gated, monkeypatch):
    reader, gate, _ = gated

    def fail(_fd, _buffers, _offset):
        raise OSError(errno.EIO, "Input/output error")

    gate.real = fail
    later = ask(reader, 2, [4], [0], slots_for(EXPERT, 1), behind=True)
    with pytest.raises(ReadError, match="layer 2, row 4"):
        reader.wait(later)
    assert reader._needed == reader._under_way == 0
