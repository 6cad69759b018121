"""Reading rows: plans, data, faults of disks and file systems, counters, closing."""

import errno
import fcntl
import functools
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.disks import (
    LAYOUTS,
    NAMES,
    ROWS,
    StrictDisk,
    assert_read,
    read_all,
    slots_for,
)
from support.fake_kernel import FakeKernel, use
from support.platforms import FakeDarwin, use_platform
from support.row_files import make

from mlx_flash.errors import DamagedError, ReadError
from mlx_flash.storage import direct_io, linux_aio
from mlx_flash.storage import reader as module
from mlx_flash.storage.direct_io import open_direct
from mlx_flash.storage.read_requests import SCATTER_ROWS, Request, plan, plan_scattered
from mlx_flash.storage.reader import ReadStats, RowReader
from mlx_flash.storage.row_layout import PAGE, RowLayout

ENGINES = ["threads"] if linux_aio.why_not() else ["threads", "aio"]
CASES = [
    pytest.param((layout, engine), id=name if engine == "threads" else f"{name}, {engine}")
    for name, layout in LAYOUTS.items()
    for engine in ENGINES
    if layout.scatters or engine == "threads"
]


def choose(monkeypatch, engine: str) -> None:
    """What readers to come use where they have direct I/O."""
    if engine == "threads":
        monkeypatch.setattr(linux_aio, "why_not", lambda: "not in this test")


@pytest.fixture(params=CASES)
def layout(request, monkeypatch) -> RowLayout:
    layout, engine = request.param
    choose(monkeypatch, engine)
    return layout


@pytest.fixture
def simulated(monkeypatch) -> FakeKernel:
    """For tests with an ``os.preadv`` of their own: asynchronous reads go through it as well."""
    return use(monkeypatch, FakeKernel())


@pytest.fixture
def real_preadv() -> Callable[..., int]:
    return os.preadv


# Plans


def assert_plan(rows: list[int], max_rows: int, gap: int, requests: list[Request]) -> None:
    assert [r for q in requests for r in rows[q.first : q.last]] == rows
    for q in requests:
        wanted = rows[q.first : q.last]
        assert q.start == wanted[0] and q.stop == wanted[-1] + 1
        assert q.stop - q.start <= max_rows
        assert all(b - a <= gap + 1 for a, b in itertools.pairwise(wanted))
    for q, after in itertools.pairwise(requests):
        assert after.first == q.last
        far = after.start - q.stop > gap
        full = after.start + 1 - q.start > max_rows
        assert far or full, "two requests that could have been one"


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_plans_of_all_small_sets(dtype):
    for bits in range(1 << 7):
        rows = [i for i in range(7) if bits >> i & 1]
        for max_rows in range(1, 9):
            for gap in range(4):
                requests = plan(np.array(rows, dtype), max_rows=max_rows, gap=gap)
                assert_plan(rows, max_rows, gap, requests)


def test_plans_of_random_sets():
    rng = np.random.default_rng(0)
    for _ in range(500):
        total = int(rng.integers(1, 3000))
        share = rng.random() ** 3
        rows = np.flatnonzero(rng.random(total) < share).astype(rng.choice(["i4", "u4", "i8"]))
        max_rows, gap = int(rng.integers(1, 300)), int(rng.integers(0, 20))
        assert_plan(rows.tolist(), max_rows, gap, plan(rows, max_rows=max_rows, gap=gap))


def test_plans_in_words():
    rows = np.array([0, 1, 2, 5, 6, 20])
    assert plan(rows, max_rows=100) == [
        Request(0, 3, 0, 3),
        Request(5, 7, 3, 5),
        Request(20, 21, 5, 6),
    ]
    assert plan(rows, max_rows=100, gap=2) == [Request(0, 7, 0, 5), Request(20, 21, 5, 6)]
    assert plan(rows, max_rows=2) == [
        Request(0, 2, 0, 2),
        Request(2, 3, 2, 3),
        Request(5, 7, 3, 5),
        Request(20, 21, 5, 6),
    ]


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint8])
def test_plan_refuses_bad_input(dtype):
    for rows in ([3, 3], [5, 2], [1, 2, 9, 8], [7, 7, 7]):
        with pytest.raises(ValueError, match="sorted"):
            plan(np.array(rows, dtype), max_rows=10)
    for rows in ([], [1, 2]):
        for max_rows, gap in [(0, 0), (-1, 0), (5, -1)]:
            with pytest.raises(ValueError, match="max_rows"):
                plan(np.array(rows, dtype), max_rows=max_rows, gap=gap)


def test_plan_refuses_other_arrays():
    with pytest.raises(ValueError, match="not negative"):
        plan(np.array([-1, 2]), max_rows=5)
    for rows in (np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([True, False])):
        with pytest.raises(ValueError, match="int array"):
            plan(rows, max_rows=5)


# Reading


@pytest.mark.parametrize("direct", [True, False])
def test_random_rows_into_random_slots(tmp_path, layout, direct):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    rng = np.random.default_rng(0)
    with closing(RowReader(file, threads=4, direct=direct)) as reader:
        for step in range(30):
            layer = step % 2
            count = int(rng.integers(0, ROWS[layer] + 1))
            rows = np.sort(rng.choice(ROWS[layer], count, replace=False))
            slots = rng.permutation(50)[:count]
            if step % 3 == 0:
                rows, slots = rows.astype(np.uint32), slots.astype(np.int32)
            out = slots_for(layout, 50)
            reader.read(layer, rows, slots, out)
            assert_read(layout, layers[layer], rows, slots, out)


@pytest.mark.parametrize("engine", ["aio", "threads"])
def test_what_is_joined_by_itself(tmp_path, engine):
    """Scattered rows across a gap: by threads, not by asynchronous reads."""
    if engine == "aio" and linux_aio.why_not():
        pytest.skip(linux_aio.why_not())
    layout = RowLayout.plan(("up", "down"), "BF16", 2048)
    file, layers = make(tmp_path / "rows", layout, ROWS)
    rows, slots, out = np.array([0, 2, 3, 9]), np.arange(4), slots_for(layout, 4)
    with closing(RowReader(file, direct=engine == "aio", engine=engine)) as reader:
        reader.read(0, rows, slots, out)
        assert reader.stats().requests == (3 if engine == "aio" else 2)
    assert_read(layout, layers[0], rows, slots, out)


@pytest.mark.parametrize("request_bytes", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("gap_bytes", [0, 20_000, 1 << 20])
def test_requests_of_any_length(tmp_path, layout, request_bytes, gap_bytes):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    options = {"threads": 4, "request_bytes": request_bytes, "gap_bytes": gap_bytes}
    rows = np.array([0, 1, 2, 4, 7, 8, 15, 22, 30, 39])
    slots = np.array([11, 10, 3, 4, 5, 0, 1, 2, 9, 8])
    with closing(RowReader(file, **options)) as reader:
        out = slots_for(layout, 12)
        reader.read(0, rows, slots, out)
        assert_read(layout, layers[0], rows, slots, out)
        most, gap = reader.max_rows(layout), gap_bytes // layout.stride
        requests = plan(rows, max_rows=most, gap=gap)
        if layout.scatters and request_bytes > 1:  # long ones of which little is wanted are split
            few, long = plan_scattered(rows, max_rows=most, gap=gap)
            requests = few + long
        stats = reader.stats()
        cut_up = layout.scatters and request_bytes == 1
        pieces = layout.stride // reader.grain if cut_up else 1
        assert stats.requests == pieces * len(requests)
        assert stats.bytes_read == sum(q.stop - q.start for q in requests) * layout.stride


def test_gaps_are_joined_where_that_is_cheaper(tmp_path, layout):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    rows, slots = np.array([3, 5]), np.array([1, 0])
    for gap_bytes, expected in [(layout.stride - 1, 2), (layout.stride, 1)]:
        with closing(RowReader(file, gap_bytes=gap_bytes)) as reader:
            out = slots_for(layout, 3)
            reader.read(0, rows, slots, out)
            assert_read(layout, layers[0], rows, slots, out)
            assert reader.stats().requests == expected
            assert reader.stats().bytes_read == (4 - expected) * min(expected, 1) * layout.stride


def test_a_prepared_read_serves_again_and_for_other_layers(tmp_path, layout):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    rows, slots = np.arange(20), np.arange(20)[::-1].copy()
    with closing(RowReader(file)) as reader:
        out = slots_for(layout, 20)
        prepared = reader.prepare(rows, slots, out)
        for layer in (0, 1, 0, 1):
            for array in out:
                array[:] = 0xAA
            reader.wait(reader.submit(layer, prepared))
            assert_read(layout, layers[layer], rows, slots, out)


@pytest.mark.parametrize("direct", [True, False])
def test_many_callers_and_threads(tmp_path, layout, direct):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    failures = []
    with closing(RowReader(file, request_bytes=2 * layout.stride, direct=direct)) as reader:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(8):
                    layer = int(rng.integers(2))
                    rows = np.flatnonzero(rng.random(ROWS[layer]) < 0.7)
                    slots = rng.permutation(40)[: rows.size]
                    out = slots_for(layout, 40)
                    reader.read(layer, rows, slots, out)
                    assert_read(layout, layers[layer], rows, slots, out)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_no_rows(tmp_path, layout):
    file, _ = make(tmp_path / "rows", layout, ROWS)
    with closing(RowReader(file)) as reader:
        reader.read(0, np.array([], np.int64), np.array([], np.int64), slots_for(layout, 2))
        assert reader.stats().requests == 0


def test_requests_that_make_no_sense(tmp_path, layout):
    file, _ = make(tmp_path / "rows", layout, ROWS)
    two = np.array([1, 2])
    with closing(RowReader(file)) as reader:
        out = slots_for(layout, 4)
        for slots in ([0], [0, 1, 2], [0, 4], [-1, 0], [[0, 1]]):
            with pytest.raises(ValueError, match="slots for 2 rows"):
                reader.read(0, two, np.array(slots), out)
        with pytest.raises(ValueError, match="row 40 of layer 0, it has 40"):
            reader.read(0, np.array([3, 40]), np.array([0, 1]), out)
        with pytest.raises(ValueError, match="row 23 of layer 1, it has 23"):
            reader.read(1, np.array([23]), np.array([0]), out)
        with pytest.raises(ValueError, match="sorted"):
            reader.read(0, np.array([3, 2]), np.array([0, 1]), out)
        frozen = slots_for(layout, 4)
        frozen[0].flags.writeable = False
        narrow = [out[0][:, :-1], *out[1:]]
        typed = [out[0].view(np.int8), *out[1:]]
        gaps = [slots_for(layout, 8)[0][::2], *out[1:]]
        for memory in (frozen, narrow, typed, gaps):
            with pytest.raises(ValueError, match=f"memory for part {layout.parts[0].name}"):
                reader.read(0, two, np.array([0, 1]), memory)
        with pytest.raises(ValueError):
            reader.read(0, two, np.array([0, 1]), out[:-1])
        assert reader.stats().requests == 0
        assert all((array == 0xAA).all() for array in out)


def test_overhead_counts_what_the_reader_holds(tmp_path, monkeypatch):
    held = []
    real = mmap.mmap

    def mapped(fd: int, length: int, **options) -> mmap.mmap:
        held.append(length)
        return real(fd, length, **options)

    for name, threads in [("staged", 32), ("staged", 2), ("scattered, row padded", 32)]:
        file, _ = make(tmp_path / "rows", LAYOUTS[name], ROWS)
        held.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module.mmap, "mmap", mapped)
            reader = RowReader(file, threads=threads, request_bytes=10_000, direct=False)
        assert reader.overhead_bytes == sum(-(-n // PAGE) * PAGE for n in held)
        reader.close()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 40])
def test_few_rows_scatter_and_long_runs_are_staged(
    tmp_path, layout, simulated, monkeypatch, real_preadv, count
):
    """One buffer takes a staged request; a scattered one has many, straight in the slots."""
    file, layers = make(tmp_path / "rows", layout, ROWS)
    out = slots_for(layout, 40)
    rows, slots = np.arange(count), np.arange(count)[::-1].copy()
    seen = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        seen.append([np.frombuffer(b, np.uint8) for b in buffers])
        return real_preadv(fd, buffers, offset)

    with closing(RowReader(file)) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        reader.read(0, rows, slots, out)
    (buffers,) = seen
    inside = [b for b in buffers if any(np.shares_memory(b, array) for array in out)]
    if layout.scatters and count <= SCATTER_ROWS:
        assert len(inside) == count * len(layout.parts)
        assert len(buffers) <= 2 * len(inside) <= 1024  # what the least of systems takes
    else:
        assert len(buffers) == 1 and not inside
    assert_read(layout, layers[0], rows, slots, out)


@pytest.mark.parametrize("kind", ["staged", "scattered"])
def test_so_many_requests_are_under_way_at_a_time(tmp_path, monkeypatch, real_preadv, kind):
    layout = LAYOUTS[kind]
    file, layers = make(tmp_path / "rows", layout, ROWS)
    expected = 12 if kind == "scattered" else module.STAGING_BUFFERS
    together = threading.Barrier(expected, timeout=20)  # that long only where it fails

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        together.wait()
        return real_preadv(fd, buffers, offset)

    rows, slots = np.arange(0, 3 * expected, 3), np.arange(expected)
    with closing(RowReader(file, threads=12, gap_bytes=0, engine="threads")) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        out = slots_for(layout, expected)
        reader.read(0, rows, slots, out)
    assert_read(layout, layers[0], rows, slots, out)


def test_every_direct_read_is_of_whole_sectors(tmp_path, layout, simulated, monkeypatch):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    sector = PAGE if layout is LAYOUTS["scattered"] else 512
    disk = StrictDisk(monkeypatch, sector)
    rng = np.random.default_rng(0)
    with closing(RowReader(file, threads=3, request_bytes=3 * layout.stride)) as reader:
        assert reader.direct
        for _ in range(20):
            rows = np.flatnonzero(rng.random(40) < 0.5)
            slots = rng.permutation(50)[: rows.size]
            out = slots_for(layout, 50)
            reader.read(0, rows, slots, out)
            assert_read(layout, layers[0], rows, slots, out)
    assert not disk.refused
    assert disk.used and set(disk.used) == disk.direct


@pytest.mark.parametrize("most", [37, 511, 512, 1000, 4096, 5000, 12288])
def test_short_reads_are_continued(tmp_path, layout, simulated, monkeypatch, most):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    disk = StrictDisk(monkeypatch, most=most)
    rows, slots = np.array([0, 1, 3, 6, 7, 8]), np.array([2, 0, 1, 7, 6, 5])
    with closing(RowReader(file, threads=2)) as reader:
        out = slots_for(layout, 9)
        reader.read(0, rows, slots, out)
    # What a short read spoils behind itself is read again, so nothing of it is left.
    assert_read(layout, layers[0], rows, slots, out)
    assert not disk.refused


def test_short_reads_through_the_page_cache(tmp_path, layout, monkeypatch, real_preadv):
    file, layers = make(tmp_path / "rows", layout, ROWS)

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_preadv(fd, [buffers[0][: 1 + offset % 700]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with closing(RowReader(file, threads=2, direct=False)) as reader:
        out = read_all(reader)
    assert_read(layout, layers[0], np.arange(40), np.arange(40), out)


def test_memory_off_a_sector_is_refused(tmp_path, monkeypatch):
    layout = LAYOUTS["scattered"]
    file, layers = make(tmp_path / "rows", layout, ROWS)
    odd = []
    for extent in layout.extents:
        raw = np.full(2 * extent + 2 * PAGE, 0xAA, np.uint8)
        skip = -raw.ctypes.data % PAGE + 8
        odd.append(raw[skip : skip + 2 * extent].reshape(2, extent))
    rows, slots = np.array([1, 2]), np.array([0, 1])
    with closing(RowReader(file, direct=False)) as reader:
        reader.read(0, rows, slots, odd)
    assert_read(layout, layers[0], rows, slots, odd)
    StrictDisk(monkeypatch)
    with closing(RowReader(file)) as reader, pytest.raises(ValueError, match="start on a sector"):
        reader.read(0, rows, slots, odd)


def refuse_flag(monkeypatch, code: int) -> None:
    real = os.open

    def refuse(path, flags: int, *args) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)


needs_o_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")


def assert_buffered(file, layers) -> None:
    with closing(RowReader(file)) as reader:
        assert reader.direct is False and reader.stats().direct is False
        out = read_all(reader)
    assert_read(file.layout, layers[0], np.arange(40), np.arange(40), out)


@needs_o_direct
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_at_open(tmp_path, layout, monkeypatch, code):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    refuse_flag(monkeypatch, code)
    assert_buffered(file, layers)


def open_files() -> set[str]:
    return {entry.name for entry in Path("/dev/fd").iterdir()}


@needs_o_direct
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_the_first_direct_read(tmp_path, layout, monkeypatch, code):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    real, taken = os.open, set()

    def take(path, flags: int, *args) -> int:
        fd = real(path, flags & ~os.O_DIRECT, *args)
        (taken.add if flags & os.O_DIRECT else taken.discard)(fd)
        return fd

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in taken:
            raise OSError(code, os.strerror(code))
        return read(fd, buffers, offset)

    read = os.preadv
    monkeypatch.setattr(os, "open", take)
    monkeypatch.setattr(os, "preadv", refuse)
    before = open_files()
    assert_buffered(file, layers)
    assert open_files() == before


@needs_o_direct
def test_a_disk_whose_sectors_are_longer_than_the_alignment(tmp_path, monkeypatch):
    """A 4K sector disk takes whole pages and refuses the 512 that a narrow row comes with."""
    real_open, direct = os.open, set()

    def remember(path, flags: int, *args) -> int:
        fd = real_open(path, flags & ~os.O_DIRECT, *args)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    fits = {name: name == "scattered" for name in LAYOUTS}
    fits["staged, whole pages"] = True
    layouts = {**LAYOUTS, "staged, whole pages": RowLayout.plan(NAMES, "BF16", 64, PAGE)}
    for name, layout in layouts.items():
        with monkeypatch.context() as patch:
            disk = StrictDisk(patch, sector=PAGE)
            disk.direct = direct
            patch.setattr(direct_io, "open_direct", open_direct)
            file, layers = make(tmp_path / "rows", layout, ROWS)
            patch.setattr(os, "open", remember)
            with closing(RowReader(file)) as reader:
                assert reader.direct == fits[name], name
                assert disk.refused == (not fits[name])
                out = read_all(reader)
            assert_read(layout, layers[0], np.arange(40), np.arange(40), out)


@needs_o_direct
@pytest.mark.parametrize("at", ["open", "read"])
def test_other_errors_of_opening_are_told(tmp_path, monkeypatch, at):
    file, _ = make(tmp_path / "rows", LAYOUTS["staged"], ROWS)

    def fail(*_args) -> int:
        raise OSError(errno.EIO, "Input/output error")

    before = open_files()
    with monkeypatch.context() as patch:
        if at == "open":
            refuse_flag(patch, errno.EIO)
        else:
            patch.setattr(direct_io, "_direct_read_works", fail)
        with pytest.raises(ReadError, match=f"opening {file.path}: Input/output") as info:
            RowReader(file)
    assert info.value.errno == errno.EIO
    assert open_files() == before
    file.path.unlink()
    for direct in (True, False):
        with pytest.raises(ReadError, match="No such file") as info:
            RowReader(file, direct=direct)
        assert info.value.errno == errno.ENOENT


@pytest.mark.parametrize("agrees", [True, False])
def test_macos_sets_no_cache(tmp_path, monkeypatch, agrees):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    opened, calls = [], []
    real = os.open

    def remember(path, flags: int) -> int:
        opened.append(flags)
        return real(path, flags)

    def control(fd: int, command: int, argument: int) -> int:
        calls.append((fd, command, argument))
        if not agrees:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return 0

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(fcntl, "fcntl", control)
    use_platform(monkeypatch, FakeDarwin())
    fd, direct = open_direct(path)
    os.close(fd)
    assert direct is agrees
    assert opened == [os.O_RDONLY]
    assert calls == [(fd, getattr(fcntl, "F_NOCACHE", 48), 1)]


@needs_o_direct
def test_linux_sets_o_direct(tmp_path, monkeypatch):
    file, _ = make(tmp_path / "rows", LAYOUTS["staged"], ROWS)
    flags = []
    real = os.open

    def remember(path, flag: int, *args) -> int:
        flags.append(flag)
        return real(path, flag & ~os.O_DIRECT, *args)

    monkeypatch.setattr(os, "open", remember)
    fd, direct = open_direct(file.path, 512)
    os.close(fd)
    assert direct is True
    assert flags == [os.O_RDONLY | os.O_DIRECT]


# Faults


def test_an_interrupted_read_is_tried_again(tmp_path, layout, simulated, monkeypatch, real_preadv):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    interrupted = []

    def interrupt(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(interrupted) < 3:
            interrupted.append(offset)
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return real_preadv(fd, buffers, offset)

    with closing(RowReader(file)) as reader:
        monkeypatch.setattr(os, "preadv", interrupt)
        out = read_all(reader)
    assert len(interrupted) == 3
    assert_read(layout, layers[0], np.arange(40), np.arange(40), out)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.ENXIO])
def test_a_failing_disk_is_named(tmp_path, layout, simulated, monkeypatch, real_preadv, code):
    """The second row of a request cannot be read, after its first came as a short read."""
    file, layers = make(tmp_path / "rows", layout, ROWS)
    bad = file.layers[1].offset + 6 * layout.stride

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= bad:
            raise OSError(code, os.strerror(code))
        pieces, room = [], bad - offset
        for buffer in buffers:
            pieces.append(buffer[:room])
            room -= len(pieces[-1])
        return real_preadv(fd, [p for p in pieces if len(p)], offset)

    with closing(RowReader(file)) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(ReadError) as info:
                reader.read(1, np.array([5, 6]), np.array([0, 1]), slots_for(layout, 2))
        assert info.value.errno == code
        for fact in (str(file.path), "layer 1,", "row 6,", f"offset {bad},", os.strerror(code)):
            assert fact in str(info.value)
        out = read_all(reader, 1)
    assert_read(layout, layers[1], np.arange(23), np.arange(23), out)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cut", [0, 100, 512, -100])
def test_a_file_cut_while_in_use(tmp_path, layout, direct, cut):
    file, layers = make(tmp_path / "rows", layout, ROWS)
    end = file.layers[1].offset + 6 * layout.stride + cut
    row = 6 + cut // layout.stride
    with closing(RowReader(file, direct=direct)) as reader:
        os.truncate(file.path, end)
        out = slots_for(layout, 23)
        with pytest.raises(DamagedError, match=f"ended at byte {end} .*layer 1, row {row}; it was"):
            reader.read(1, np.arange(23), np.arange(23), out)
        reader.read(0, np.arange(3), np.arange(3), out[:])
    np.testing.assert_array_equal(
        out[0][:3], layers[0][:3, layout.parts[0].offset :][:, : layout.extents[0]]
    )


@pytest.mark.parametrize("kind", ["staged", "scattered"])
@pytest.mark.parametrize("bad", [0, 10])
@pytest.mark.parametrize("why", [ReadError, KeyboardInterrupt])
def test_a_failed_read_is_over_when_it_raises(tmp_path, monkeypatch, real_preadv, why, bad, kind):
    """No other request of it writes into the slots once the error, or Ctrl-C, is out."""
    layout = LAYOUTS[kind]
    file, layers = make(tmp_path / "rows", layout, ROWS)
    base = file.layers[0].offset
    other_runs, failed = threading.Event(), threading.Event()
    finished = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        row = (offset - base) // layout.stride
        if row == bad and why is ReadError:
            other_runs.wait()
            raise OSError(errno.EIO, "Input/output error")
        if row != bad:
            other_runs.set()
            failed.wait()
            time.sleep(0.05)  # time for a reader that does not wait to be found out
            finished.append(row)
        return real_preadv(fd, buffers, offset)

    def interrupt(*_args) -> None:
        other_runs.wait()
        failed.set()
        raise KeyboardInterrupt

    real_wait = module.wait
    with closing(RowReader(file, threads=2, gap_bytes=0, engine="threads")) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        out = slots_for(layout, 3)
        futures = reader.submit(0, reader.prepare(np.array([0, 10]), np.array([0, 1]), out))
        futures[[0, 10].index(bad)].add_done_callback(
            lambda _: failed.set() if why is ReadError else None
        )
        if why is KeyboardInterrupt:
            monkeypatch.setattr(Future, "result", interrupt)
            monkeypatch.setattr(
                module, "wait", lambda fs, **kw: interrupt() if kw else real_wait(fs)
            )
        with pytest.raises(why):
            reader.wait(futures)
        assert finished == [10 - bad]
    part = layout.parts[0]
    row = 10 - bad
    np.testing.assert_array_equal(out[0][row // 10], layers[0][row, : part.nbytes])


def pools_of(reader: RowReader) -> dict[str, ThreadPoolExecutor]:
    return {k: v for k, v in vars(reader).items() if isinstance(v, ThreadPoolExecutor)}


class SmallPool:
    """A pool that takes so many requests and no more."""

    def __init__(self, pool: ThreadPoolExecutor, keep: int) -> None:
        self._pool, self._left = pool, keep
        self.shutdown = pool.shutdown

    def submit(self, *args):
        if not self._left:
            raise RuntimeError("can't start new thread")
        self._left -= 1
        return self._pool.submit(*args)


@pytest.mark.parametrize("kind", ["staged", "scattered"])
def test_requests_that_cannot_be_queued(tmp_path, monkeypatch, real_preadv, kind):
    """When no more requests can be queued, those that are must be over as well."""
    layout = LAYOUTS[kind]
    file, _ = make(tmp_path / "rows", layout, ROWS)
    under_way = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        under_way.append(offset)
        time.sleep(0.05)  # time for a reader that does not wait to be found out
        got = real_preadv(fd, buffers, offset)
        under_way.remove(offset)
        return got

    with closing(RowReader(file, threads=3, gap_bytes=0, engine="threads")) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        for name, pool in pools_of(reader).items():
            monkeypatch.setattr(reader, name, SmallPool(pool, keep=2))
        with pytest.raises(RuntimeError, match="new thread"):
            reader.read(0, np.arange(0, 10, 2), np.arange(5), slots_for(layout, 5))
        assert not under_way


# Counters


def test_stats_count_requests_and_bytes(tmp_path, layout):
    file, _ = make(tmp_path / "rows", layout, ROWS)
    with closing(RowReader(file, gap_bytes=0)) as reader:
        assert reader.stats() == ReadStats(0, 0, 0.0, reader.direct)
        before = reader.stats()
        reader.read(0, np.array([0, 1, 5]), np.array([0, 1, 2]), slots_for(layout, 3))
        after = reader.stats()
        assert (after.requests, after.bytes_read) == (2, 3 * layout.stride)
        reader.read(1, np.array([0, 7]), np.array([0, 1]), slots_for(layout, 3))
        spent = reader.stats() - after
        assert (spent.requests, spent.bytes_read) == (2, 2 * layout.stride)
        assert spent.direct is reader.direct
        assert before.requests == 0
        assert reader.stats().read_seconds >= spent.read_seconds > 0


def test_read_seconds_are_the_union_of_requests(tmp_path, monkeypatch, real_preadv):
    layout = LAYOUTS["staged"]
    file, _ = make(tmp_path / "rows", layout, ROWS)
    now = 0.0
    base = file.layers[0].offset
    begun = {row: threading.Event() for row in (0, 9, 20)}
    go = {row: threading.Event() for row in (0, 9, 20)}

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        row = (offset - base) // layout.stride
        begun[row].set()
        go[row].wait()
        return real_preadv(fd, buffers, offset)

    with closing(RowReader(file, threads=2, gap_bytes=0, engine="threads")) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
        out = slots_for(layout, 3)

        def start(row: int) -> list:
            prepared = reader.prepare(np.array([row]), np.array([0]), out)
            futures = reader.submit(0, prepared)
            begun[row].wait()
            return futures

        try:
            first = start(0)
            now = 1.0
            second = start(9)
            now = 3.0
            assert reader.stats().read_seconds == 3.0
            go[9].set()
            reader.wait(second)
            now = 5.0
            assert reader.stats().read_seconds == 5.0
            go[0].set()
            reader.wait(first)
            now = 10.0
            assert reader.stats().read_seconds == 5.0
            third = start(20)
            now = 12.0
            assert reader.stats().read_seconds == 7.0
            go[20].set()
            reader.wait(third)
            assert reader.stats() == ReadStats(3, 3 * layout.stride, 7.0, reader.direct)
        finally:
            for event in go.values():
                event.set()


# Closing


def test_a_closed_reader_says_so(tmp_path, layout):
    file, _ = make(tmp_path / "rows", layout, ROWS)
    before = open_files()
    reader = RowReader(file)
    read_all(reader)
    prepared = reader.prepare(np.array([1]), np.array([0]), slots_for(layout, 1))
    assert open_files() != before
    reader.close()
    reader.close()
    assert open_files() == before
    for again in (lambda: read_all(reader), lambda: reader.submit(0, prepared)):
        with pytest.raises(ValueError, match=f"reader of {file.path} is closed"):
            again()
    assert reader.stats().requests > 0


@pytest.mark.parametrize("kind", ["staged", "scattered"])
def test_closing_with_reads_under_way(tmp_path, monkeypatch, real_preadv, kind):
    """What has begun is finished, what has not fails, and who waits for it is told."""
    layout = LAYOUTS[kind]
    file, layers = make(tmp_path / "rows", layout, ROWS)
    begun, go = threading.Event(), threading.Event()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        go.wait()
        return real_preadv(fd, buffers, offset)

    def go_on(shutdown: Callable[..., None], **options: bool) -> None:
        go.set()
        shutdown(**options)

    reader = RowReader(file, threads=1, gap_bytes=0, engine="threads")
    monkeypatch.setattr(os, "preadv", preadv)
    for pool in pools_of(reader).values():
        monkeypatch.setattr(pool, "shutdown", functools.partial(go_on, pool.shutdown))
    rows, slots = np.array([0, 5, 10]), np.array([0, 1, 2])
    out = slots_for(layout, 3)
    futures = reader.submit(0, reader.prepare(rows, slots, out))
    begun.wait()
    reader.close()
    assert all(future.done() for future in futures)
    assert_read(layout, layers[0], rows[:1], slots[:1], out)
    assert reader.stats().requests == 1
    with pytest.raises(ValueError, match="is closed"):
        reader.wait(futures)
    reader.drop(futures)  # does not wait for ever


def test_closing_while_another_thread_waits(tmp_path, monkeypatch, real_preadv):
    layout = LAYOUTS["staged"]
    file, _ = make(tmp_path / "rows", layout, ROWS)
    begun, go = threading.Event(), threading.Event()
    told = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        go.wait()
        return real_preadv(fd, buffers, offset)

    reader = RowReader(file, threads=1, gap_bytes=0, engine="threads")
    monkeypatch.setattr(os, "preadv", preadv)
    futures = reader.submit(
        0, reader.prepare(np.arange(0, 20, 2), np.arange(10), slots_for(layout, 10))
    )
    begun.wait()

    def work() -> None:
        try:
            reader.wait(futures)
        except ValueError as error:
            told.append(str(error))

    waiter, closer = threading.Thread(target=work), threading.Thread(target=reader.close)
    waiter.start()
    closer.start()
    while reader._open:  # until the closer has got that far
        time.sleep(0.001)
    go.set()
    closer.join()
    waiter.join()
    assert told == [f"the reader of {file.path} is closed; load the model again"]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("name", ["staged", "scattered, short", "scattered, row padded"])
@pytest.mark.parametrize("gap_bytes", [0, 1 << 20])
def test_parts_that_are_not_wanted(tmp_path, name, wanted, direct, gap_bytes):
    """The others are right; outer parts that are not wanted are not read where rows scatter."""
    layout = LAYOUTS[name]
    file, blocks = make(tmp_path / "rows", layout, ROWS)
    rows = np.array([1, 3, 4, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 39])
    slots = np.random.default_rng(0).permutation(40)[: rows.size]
    whole = slots_for(layout, 40)
    out = [array if i in wanted else None for i, array in enumerate(whole)]
    with closing(RowReader(file, direct=direct, gap_bytes=gap_bytes)) as reader:
        reader.read(0, rows, slots, out)
        read = reader.stats().bytes_read
    for i, (part, extent, array) in enumerate(
        zip(layout.parts, layout.extents, whole, strict=True)
    ):
        expected = blocks[0][rows, part.offset : part.offset + extent]
        if i in wanted:
            np.testing.assert_array_equal(array[slots], expected)
        untouched = np.setdiff1d(np.arange(40), slots) if i in wanted else np.arange(40)
        assert (array[untouched] == 0xAA).all()
    outer = wanted[0] > 0 or wanted[-1] < 2
    if gap_bytes == 0:
        full = rows.size * layout.stride
        assert (read < full) == (layout.scatters and outer)
    else:
        assert read <= 39 * layout.stride


def test_no_part_is_wanted(tmp_path):
    file, _ = make(tmp_path / "rows", LAYOUTS["staged"], ROWS)
    with closing(RowReader(file)) as reader, pytest.raises(ValueError, match="no part"):
        reader.read(0, np.arange(3), np.arange(3), [None] * 3)
