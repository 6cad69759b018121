"""Streaming whole layers: order, data, buffers in use, faults, counters."""

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from support.fake_kernel import FakeKernel, use
from support.row_files import make

from mlx_flash.errors import DamagedError, ReadError
from mlx_flash.paging import layer_stream as module
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

NAMES = ("gate", "up", "down")
LAYOUTS = {
    "staged": RowLayout.plan(NAMES, "BF16", 64),
    "scattered": RowLayout.plan(NAMES[1:], "F32", 1024),
    "padded": RowLayout.plan(NAMES, "F32", 1026),
}
ROWS = [7, 4, 9, 4, 6]
ZERO = mx.zeros(1)


@pytest.fixture(params=LAYOUTS)
def layout(request) -> RowLayout:
    return LAYOUTS[request.param]


@pytest.fixture
def opened(tmp_path, layout, monkeypatch) -> Iterator[tuple[RowReader, list[np.ndarray]]]:
    """(reader, each layer's bytes)."""
    file, layers = make(tmp_path / "rows", layout, ROWS)
    request_bytes = 1 << 20 if layout is LAYOUTS["padded"] else 3 * layout.stride
    use(monkeypatch, FakeKernel())
    with closing(RowReader(file, threads=4, request_bytes=request_bytes)) as reader:
        yield reader, layers


def assert_layer(memory: SlotMemory, layout: RowLayout, block: np.ndarray) -> None:
    """Memory holds a layer, the padding of parts included."""
    assert memory.capacity == len(block)
    for part, extent in zip(layout.parts, layout.extents, strict=True):
        expected = block[:, part.offset : part.offset + extent]
        array = memory.arrays[part.name]
        assert array.shape[0] == len(block)
        np.testing.assert_array_equal(np.array(array.view(mx.uint8)), expected)


class Promises:
    """Lazy copies of what layers held, kept to be looked at later."""

    def __init__(self, layout: RowLayout, layers: list[np.ndarray]) -> None:
        self.layout, self.layers = layout, layers
        self._kept: list[tuple[int, mx.array]] = []

    def build(self, layer: int, memory: SlotMemory) -> mx.array:
        """All parts side by side, xor a number of its own, not evaluated yet."""
        parts = [memory.arrays[p.name].view(mx.uint8) for p in self.layout.parts]
        copied = mx.concatenate(parts, axis=1) ^ mx.array(len(self._kept) % 256, mx.uint8)
        self._kept.append((layer, copied))
        return copied

    def check(self) -> None:
        for i, (layer, copied) in enumerate(self._kept):
            pieces = [
                self.layers[layer][:, p.offset : p.offset + extent]
                for p, extent in zip(self.layout.parts, self.layout.extents, strict=True)
            ]
            expected = np.concatenate(pieces, axis=1) ^ np.uint8(i % 256)
            np.testing.assert_array_equal(np.array(copied), expected, f"layer {layer}, pass {i}")


def forward(stream: LayerStream, promises: Promises, layers: list[int]) -> None:
    for layer in layers:
        stream.done(promises.build(layer, stream.acquire(layer, ZERO)))


def submitted(monkeypatch, reader: RowReader) -> list[int]:
    """The layers that are asked of the reader from now on."""
    asked: list[int] = []
    real = reader.submit

    def submit(layer: int, read) -> list:
        asked.append(layer)
        return real(layer, read)

    monkeypatch.setattr(reader, "submit", submit)
    return asked


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_cycle_over_many_rounds(opened, layout, monkeypatch, count, buffers):
    reader, layers = opened
    chosen = list(range(count))
    asked = submitted(monkeypatch, reader)
    stream = LayerStream(reader, chosen, buffers)
    assert len(stream.buffers) == min(buffers, count)
    assert not asked, "nothing is read before it is asked for"
    promises = Promises(layout, layers)
    for _ in range(6):
        for layer in chosen:
            memory = stream.acquire(layer, ZERO)
            assert_layer(memory, layout, layers[layer])
            stream.done(promises.build(layer, memory))
    promises.check()
    assert stream.counters.misses == 6 * sum(ROWS[:count])
    ahead = min(buffers, count)
    assert asked == (chosen * 8)[: 6 * count + ahead], "one layer after the other, none twice"
    stream.close()


def test_layers_in_any_order_of_the_file(opened, layout):
    reader, layers = opened
    stream = LayerStream(reader, [4, 0, 2])
    promises = Promises(layout, layers)
    for _ in range(3):
        forward(stream, promises, [4, 0, 2])
    promises.check()
    stream.close()


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_buffer_is_filled_while_something_waits_for_it(opened, layout, monkeypatch, buffers):
    """Nothing but the stream evaluates results here; each keeps the value of its own layer."""
    reader, layers = opened
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    rng = np.random.default_rng(buffers)
    stream = LayerStream(reader, range(5), buffers)
    promises = Promises(layout, layers)
    for _ in range(40):
        begin, stop = sorted(rng.integers(0, 6, 2).tolist())
        forward(stream, promises, list(range(begin, stop)))
        if rng.random() < 0.2:
            stream.close()
    stream.close()
    promises.check()


def test_reading_goes_on_behind_the_last_layer(opened, layout, monkeypatch):
    """Its result is waited for at once, and its buffer filled while the head computes.

    Of the others ``done`` waits for nothing: their buffer is filled when the next is asked for.
    """
    reader, layers = opened
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    asked = submitted(monkeypatch, reader)
    stream = LayerStream(reader, [0, 1, 2], 2)
    promises = Promises(layout, layers)
    for count, layer in enumerate([0, 1, 2] * 3):
        result = promises.build(layer, stream.acquire(layer, ZERO))
        begun = len(asked)
        assert begun == 2 + count, "a buffer stands empty"
        stream.done(result)
        assert len(asked) == begun + (layer == 2)
    promises.check()
    stream.close()


def test_what_the_input_is_computed_from_is_set_going(opened, monkeypatch):
    reader, _ = opened
    going = []
    monkeypatch.setattr(mx, "async_eval", going.append)
    stream = LayerStream(reader, [0, 1])
    before = mx.zeros(3)
    stream.acquire(0, before)
    assert [x is before for x in going] == [True]
    result = mx.zeros(4)
    stream.done(result)
    assert going[-1] is result
    stream.close()


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_restart_out_of_turn(opened, layout, buffers):
    reader, layers = opened
    stream = LayerStream(reader, range(5), buffers)
    promises = Promises(layout, layers)
    forward(stream, promises, [0, 1, 2])
    forward(stream, promises, [0, 1])  # broken off, begun again
    forward(stream, promises, [4, 0, 1])  # one that skips
    forward(stream, promises, [1, 1, 1, 2])
    stream.acquire(3, ZERO)  # broken off before anything was computed
    forward(stream, promises, [0, 1, 2, 3, 4, 0])
    promises.check()
    assert stream.counters.misses == sum(
        ROWS[i] for i in [0, 1, 2, 0, 1, 4, 0, 1, 1, 1, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    )
    stream.close()


def fail_in(monkeypatch, reader: RowReader, layer: int) -> None:
    """Reads of a layer fail."""
    where = reader.file.layers[layer]
    stop = where.offset + where.rows * reader.file.layout.stride
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if where.offset <= offset < stop:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_failing_disk_surfaces_where_the_layer_is_asked_for(
    opened, layout, monkeypatch, buffers, bad
):
    reader, layers = opened
    stream = LayerStream(reader, range(5), buffers)
    promises = Promises(layout, layers)
    for broken_at_once in (True, False):
        if not broken_at_once:
            forward(stream, promises, [0, 1, 2, 3, 4])
            stream.close()
        acquired = stream.counters.misses
        with monkeypatch.context() as patch:
            fail_in(patch, reader, bad)
            for _ in range(2):
                forward(stream, promises, list(range(bad)))
                with pytest.raises(ReadError, match=f"layer {bad}, row 0, .*Input/output error"):
                    stream.acquire(bad, ZERO)
                with pytest.raises(ValueError, match="no layer is held"):
                    stream.done(ZERO)
        assert stream.counters.misses == acquired + 2 * sum(ROWS[:bad])
        forward(stream, promises, list(range(bad, 5)))
        forward(stream, promises, [0, 1, 2, 3, 4, 0, 1])
    promises.check()
    stream.close()


def test_a_file_cut_while_it_streams(opened, layout):
    reader, layers = opened
    stream = LayerStream(reader, range(5))
    promises = Promises(layout, layers)
    forward(stream, promises, [0])
    stream.close()
    os.truncate(reader.file.path, reader.file.layers[3].offset)
    forward(stream, promises, [0, 1, 2])
    with pytest.raises(DamagedError, match="layer 3"):
        stream.acquire(3, ZERO)
    forward(stream, promises, [0, 1])
    promises.check()
    stream.close()


def test_a_failing_evaluation_leaves_a_usable_stream(opened, layout, monkeypatch):
    reader, layers = opened

    def broken(*_arrays) -> None:
        raise RuntimeError("out of memory")

    for at in range(5):
        stream = LayerStream(reader, range(5), 2)
        promises = Promises(layout, layers)
        forward(stream, promises, list(range(at)))
        result = promises.build(at, stream.acquire(at, ZERO))
        with monkeypatch.context() as patch:
            patch.setattr(mx, "eval", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                stream.done(result)
                stream.acquire((at + 1) % 5, ZERO)
        mx.eval(result)
        with monkeypatch.context() as patch:
            asked = submitted(patch, reader)
            forward(stream, promises, [(at + 1 + i) % 5 for i in range(5)])
        assert len(asked) >= 6, "a buffer was lost"
        promises.check()
        stream.close()


def test_a_closed_stream_can_be_used_again(opened, layout, monkeypatch):
    reader, layers = opened
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    stream = LayerStream(reader, range(3))
    stream.close()
    promises = Promises(layout, layers)
    for last in range(3):
        forward(stream, promises, list(range(last + 1)))
        stream.close()
        stream.close()
        for memory in itertools.chain(*(sizes.values() for sizes in stream.buffers)):
            for view in memory.views:
                view[:] = 0xEE
    forward(stream, promises, [0, 1, 2])
    promises.check()


def test_a_closed_reader_says_so(opened, layout):
    reader, _ = opened
    fresh, stream = LayerStream(reader, range(3)), LayerStream(reader, range(3))
    stream.acquire(0, ZERO)
    stream.done(ZERO)
    reader.close()
    for user in (fresh, stream, stream):
        with pytest.raises(ValueError, match="is closed"):
            user.acquire(1, ZERO)
    stream.close()


def test_drain_drops_what_has_not_begun(tmp_path, monkeypatch):
    """A restart or close does not read whole layers that nobody wants any more."""
    layout = LAYOUTS["staged"]
    file, layers = make(tmp_path / "rows", layout, ROWS)
    with closing(RowReader(file, threads=1, request_bytes=1)) as reader:
        stream = LayerStream(reader, range(5), 3)
        promises = Promises(layout, layers)
        real, held = reader.submit, []

        class Never:
            """A request that has not begun."""

            def cancel(self) -> bool:
                held.remove(self)
                return True

        def submit(layer: int, read) -> list:
            if layer in (1, 2):
                held.extend([Never(), Never()])
                return held[-2:]
            return real(layer, read)

        monkeypatch.setattr(reader, "submit", submit)
        forward(stream, promises, [0])
        assert len(held) == 4
        stream.close()
        assert not held
        promises.check()


def test_layers_with_different_rows_share_a_buffer(opened, layout):
    reader, _ = opened
    stream = LayerStream(reader, range(5), 2)
    for sizes in stream.buffers:
        assert sorted(rows for rows, _ in sizes) == [4, 6, 7, 9]
        assert sum(memory.nbytes for memory in sizes.values()) == sizes[9, layout].nbytes
        assert len({memory.views[0].ctypes.data for memory in sizes.values()}) == 1


def test_wait_seconds_and_rows(opened, layout, monkeypatch):
    """Each wait takes one second by this clock, whatever else goes on."""
    reader, layers = opened
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    stream = LayerStream(reader, [1, 2])
    assert (stream.counters.wait_seconds, stream.counters.misses) == (0.0, 0)
    promises = Promises(layout, layers)
    for i in range(1, 4):
        forward(stream, promises, [1, 2])
        assert stream.counters.wait_seconds == 2.0 * i
        assert stream.counters.misses == (ROWS[1] + ROWS[2]) * i
    stream.close()


def test_wrong_use(opened):
    reader, _ = opened
    for layers, buffers in [([], 2), ([0, 1, 0], 2), ([0, 1], 0)]:
        with pytest.raises(ValueError, match="no stream of layers"):
            LayerStream(reader, layers, buffers)
    stream = LayerStream(reader, [0, 2])
    with pytest.raises(ValueError, match="no layer is held"):
        stream.done(ZERO)
    with pytest.raises(ValueError, match=r"layer 1 is not streamed, only \[0, 2\]"):
        stream.acquire(1, ZERO)
    stream.acquire(0, ZERO)
    stream.done(ZERO)
    with pytest.raises(ValueError, match="layer 1 is not streamed"):
        stream.acquire(1, ZERO)
    stream.acquire(2, ZERO)
    stream.close()
