"""For any row layout and any rows: layouts survive JSON, requests bring the right bytes."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.storage import scatter_list
from mlx_flash.storage.read_requests import Request, cut, plan, plan_scattered
from mlx_flash.storage.row_layout import ITEMSIZE, MAX_PADDING, PAGE, SECTOR, RowLayout
from mlx_flash.storage.scatter_list import iovec, prepare, where

PARTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(ITEMSIZE)),
        st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=5,
).map(lambda parts: [(f"part{i}", *part) for i, part in enumerate(parts)])
ALIGNMENTS = st.sampled_from([None, SECTOR, 1024, PAGE, 4 * PAGE])
LAYOUTS = st.builds(RowLayout.of, PARTS, ALIGNMENTS, st.booleans())
ROWS = st.sets(st.integers(0, 200), min_size=1, max_size=60).map(lambda s: np.array(sorted(s)))


@given(LAYOUTS)
def test_layouts_survive_json(layout):
    assert RowLayout.from_json(layout.to_json()) == layout


@given(PARTS, ALIGNMENTS, st.booleans(), st.data())
def test_layouts_hold_their_parts(parts, alignment, pad, data):
    layout = RowLayout.of(parts, alignment, pad)
    at = 0
    for part, (name, dtype, shape) in zip(layout.parts, parts, strict=True):
        assert (part.name, part.dtype, part.shape) == (name, dtype, shape)
        assert part.offset >= at
        at = part.offset + part.nbytes
    assert at <= layout.stride and layout.stride % layout.alignment == 0
    if layout.parts[-1].offset + layout.parts[-1].nbytes != layout.ideal_bytes:
        assert pad and at <= layout.ideal_bytes * (1 + MAX_PADDING) + SECTOR
    count = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    blocks = [rng.integers(0, 256, (count, part.nbytes), np.uint8) for part in layout.parts]
    packed = np.full((count, layout.stride), 0xAA, np.uint8)
    layout.pack(blocks, packed)
    rest = np.ones(layout.stride, bool)
    for part, block in zip(layout.parts, blocks, strict=True):
        place = slice(part.offset, part.offset + part.nbytes)
        np.testing.assert_array_equal(packed[:, place], block)
        rest[place] = False
    assert (packed[:, rest] == 0xAA).all()


@given(ROWS, st.integers(1, 80), st.integers(0, 12), st.none() | st.integers(0, 12))
def test_requests_cover_each_row_once(rows, max_rows, gap, few_gap):
    few, long = plan_scattered(rows, max_rows=max_rows, gap=gap, few_gap=few_gap)
    for requests in (plan(rows, max_rows=max_rows, gap=gap), sorted(few + long)):
        covered = [i for q in requests for i in range(q.first, q.last)]
        assert covered == list(range(rows.size))
        for q in requests:
            assert q.start == rows[q.first] and q.stop == rows[q.last - 1] + 1
            assert q.stop - q.start <= max_rows
        for q, after in itertools.pairwise(requests):
            assert q.stop <= after.start


def filled(layout: RowLayout, seed: int) -> np.ndarray:
    """A layer of 201 rows of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (201, layout.stride), np.uint8)


def slots_for(layout: RowLayout, count: int, wanted: list[bool]) -> list[np.ndarray | None]:
    return [
        np.full((count, extent), 0xAA, np.uint8) if take else None
        for extent, take in zip(layout.extents, wanted, strict=True)
    ]


@st.composite
def reads(draw):
    """(layout, prepared read, slots' memory, content): of any rows, slots and parts."""
    layout = draw(LAYOUTS.filter(lambda layout: layout.scatters))
    rows = draw(ROWS)
    wanted = draw(
        st.lists(st.booleans(), min_size=len(layout.parts), max_size=len(layout.parts)).filter(any)
    )
    capacity = rows.size + draw(st.integers(0, 5))
    slots = np.array(draw(st.permutations(range(capacity)))[: rows.size])
    out = slots_for(layout, capacity, wanted)
    read = prepare(layout, rows, slots, out)
    return read, filled(layout, draw(st.integers(0, 5)))


def carry_out(block: np.ndarray, base: int, offset: int, memory: list[memoryview]) -> None:
    """What preadv does with a file in which the layer begins at byte ``base``."""
    raw, at = block.reshape(-1), offset - base
    for buffer in memory:
        array = np.frombuffer(buffer, np.uint8)
        array[:] = raw[at : at + array.size]
        at += array.size


def assert_in_slots(read, block):
    for part, extent, array in zip(read.layout.parts, read.layout.extents, read.out, strict=True):
        if array is None:
            continue
        expected = block[read.rows, part.offset : part.offset + extent]
        np.testing.assert_array_equal(array[read.slots], expected)
        untouched = np.setdiff1d(np.arange(len(array)), read.slots)
        assert (array[untouched] == 0xAA).all()


@given(reads(), st.integers(1, 80), st.integers(0, 12))
def test_buffers_bring_the_bytes(case, max_rows, gap):
    read, block = case
    sink = memoryview(bytearray(read.layout.stride))
    for request in plan(read.rows, max_rows=max_rows, gap=gap):
        offset, nbytes = where(4096, read, request)
        buffers = iovec(read, request, sink)
        assert sum(map(len, buffers)) == nbytes
        carry_out(block, 4096, offset, buffers)
    assert_in_slots(read, block)


@given(reads(), st.integers(1, 80), st.integers(0, 12))
def test_arrays_bring_the_bytes(case, max_rows, gap):
    """The memory of all requests at once is that of one after the other."""
    read, block = case
    sink = memoryview(bytearray(read.layout.stride))
    requests = plan(read.rows, max_rows=max_rows, gap=gap)
    found, firsts = scatter_list.vectors(
        scatter_list.as_array(requests),
        read.rows,
        read.slots,
        read.pieces,
        read.layout.stride,
        sink,
    )
    for request, own in zip(requests, np.split(found, firsts[1:]), strict=True):
        memory = [
            memoryview((ctypes.c_char * int(v["nbytes"])).from_address(int(v["address"]))).cast("B")
            for v in own
        ]
        carry_out(block, 0, where(0, read, request)[0], memory)
    assert_in_slots(read, block)


@given(reads(), st.integers(1, 20_000), st.sampled_from([SECTOR, 4096]))
def test_rows_in_pieces_bring_the_bytes(case, nbytes, grain):
    read, block = case
    sink = memoryview(bytearray(max(1, min(read.layout.stride, nbytes))))
    for request in plan(read.rows, max_rows=1):
        pieces: list[Request] = cut(request, read.first, read.last, nbytes, grain)
        assert pieces[0].begin == read.first and pieces[-1].end == read.last
        for piece, after in itertools.pairwise(pieces):
            assert piece.end == after.begin and piece.end % grain == read.first % grain
        for piece in pieces:
            offset, size = where(0, read, piece)
            assert size == piece.end - piece.begin <= max(grain, nbytes)
            carry_out(block, 0, offset, iovec(read, piece, sink))
    assert_in_slots(read, block)
