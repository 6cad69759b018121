"""Asynchronous reads: what the kernel may do, where they are used, faults, dropping, closing."""

import errno
import functools
import os
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from support.disks import LAYOUTS, ROWS, assert_read, read_all, slots_for
from support.fake_kernel import FakeKernel, use
from support.platforms import FakeDarwin, use_platform
from support.row_files import make

from mlx_flash.common.platform import Linux
from mlx_flash.errors import DamagedError, ReadError
from mlx_flash.storage import direct_io, linux_aio, scatter_list
from mlx_flash.storage import reader as module
from mlx_flash.storage.reader import ReadStats, RowReader
from mlx_flash.storage.scatter_list import iovec

LAYOUT = LAYOUTS["scattered"]
SPREAD = np.arange(0, 40, 4)  # with gap_bytes=0 each row is a request
needs_aio = pytest.mark.skipif(
    bool(linux_aio.why_not()), reason=f"no aio here: {linux_aio.why_not()}"
)
KERNELS = {
    "plain": {},
    "takes few": {"takes": 2},
    "takes one": {"takes": 1, "gives": 1},
    "little room": {"room": 3},
    "tells of one at a time": {"gives": 1},
    "interrupted": {"interrupts": 5, "takes": 3},
}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """(reader on a fake kernel, the kernel, blocks of the layers), direct or said to be."""
    kernel = use(monkeypatch, FakeKernel())
    monkeypatch.setattr(
        direct_io, "open_direct", lambda path, **_: (os.open(path, os.O_RDONLY), True)
    )
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    with closing(RowReader(file, gap_bytes=0, engine="aio")) as reader:
        try:
            yield reader, kernel, layers
        finally:
            kernel.go.set()


def submit(reader: RowReader, out: list[np.ndarray]) -> list:
    slots = np.arange(SPREAD.size)
    return reader.submit(0, reader.prepare(SPREAD, slots, out))


# The module alone


def file_of(tmp_path, size: int) -> tuple[int, bytes]:
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY), content


def read_pieces(fd: int, content: bytes, count: int, **options) -> np.ndarray:
    """Reads of 1 to 3 pieces each from all over the file; what comes whole is compared."""
    rng = np.random.default_rng(1)
    pieces = rng.integers(1, 4, count)
    firsts = np.cumsum(pieces) - pieces
    lengths = rng.integers(1, 50, int(pieces.sum()))
    memory = np.zeros(int(lengths.sum()), np.uint8)
    vectors = np.zeros(lengths.size, linux_aio.IOVEC)
    vectors["address"] = memory.ctypes.data + np.cumsum(lengths) - lengths
    vectors["nbytes"] = lengths
    offsets = rng.integers(0, len(content) - 200, count)
    results = linux_aio.read(fd, offsets, vectors, firsts, **options)
    sizes = np.add.reduceat(lengths, firsts)
    begin = 0
    for size, offset, result in zip(sizes, offsets, results, strict=True):
        expected = content[offset : offset + size] if result == size else bytes(size)
        assert memory[begin : begin + size].tobytes() == expected
        begin += size
    return results == sizes


@needs_aio
@pytest.mark.parametrize("depth", [1, 3, 64, 1024])
def test_the_real_kernel(tmp_path, monkeypatch, depth):
    fd, content = file_of(tmp_path, 100_000)
    monkeypatch.setattr(linux_aio, "DEPTH", depth)
    assert read_pieces(fd, content, 200).all()
    os.close(fd)
    results = linux_aio.read(fd, np.zeros(3, int), np.zeros(3, linux_aio.IOVEC), np.arange(3))
    assert results.tolist() == [-errno.EBADF] * 3


@needs_aio
def test_the_end_of_a_file_is_a_short_read(tmp_path):
    fd, content = file_of(tmp_path, 1000)
    memory = np.zeros(300, np.uint8)
    vectors = np.array([(memory.ctypes.data + at, 100) for at in (0, 100, 200)], linux_aio.IOVEC)
    results = linux_aio.read(fd, np.array([0, 950, 1000]), vectors, np.arange(3))
    os.close(fd)
    assert results.tolist() == [100, 50, 0]
    assert memory[:150].tobytes() == content[:100] + content[950:]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("depth", [1, 7, 1024])
def test_all_that_a_kernel_may_do(tmp_path, monkeypatch, name, depth):
    kernel = use(monkeypatch, FakeKernel(**KERNELS[name]))
    monkeypatch.setattr(linux_aio, "DEPTH", depth)
    fd, content = file_of(tmp_path, 20_000)
    assert read_pieces(fd, content, 30).all()
    os.close(fd)
    assert kernel.most <= min(depth, 30)
    if name == "plain":
        assert kernel.most == min(depth, 30)
    assert not any(kernel.under_way.values())


def test_all_of_a_batch_is_one_call_each_way(tmp_path, monkeypatch):
    kernel = use(monkeypatch, FakeKernel())
    fd, content = file_of(tmp_path, 20_000)
    for _ in range(2):
        read_pieces(fd, content, 30)
    os.close(fd)
    once = [("submit", 30), ("getevents", 30)]
    assert kernel.calls == [("setup", linux_aio.DEPTH), *once, *once]


def test_requests_that_fail_leave_the_others_be(tmp_path, monkeypatch):
    use(monkeypatch, FakeKernel(refuses={0: errno.EFAULT, 5: errno.EAGAIN}, fails={7: errno.EIO}))
    fd, content = file_of(tmp_path, 20_000)
    whole = read_pieces(fd, content, 10)
    os.close(fd)
    # EAGAIN of one that is alone would be asked for ever.
    assert np.flatnonzero(~whole).tolist() == [0, 5, 7]


def test_what_is_stopped_is_not_begun(tmp_path, monkeypatch):
    kernel = use(monkeypatch, FakeKernel())
    monkeypatch.setattr(linux_aio, "DEPTH", 4)
    fd, content = file_of(tmp_path, 20_000)
    answers = iter([False, True])
    whole = read_pieces(fd, content, 10, stop=lambda: next(answers))
    assert whole.tolist() == [True] * 4 + [False] * 6
    calls = len(kernel.calls)
    assert not read_pieces(fd, content, 10, stop=lambda: True).any()
    assert len(kernel.calls) == calls
    os.close(fd)


def test_nothing_is_under_way_after_an_error(tmp_path, monkeypatch):
    kernel = use(monkeypatch, FakeKernel())
    fd, content = file_of(tmp_path, 20_000)

    def fail(*_args) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "getevents", fail)
        with pytest.raises(OSError, match="Invalid"):
            read_pieces(fd, content, 10)
    assert kernel.under_way == {} and linux_aio._idle == []
    assert read_pieces(fd, content, 10).all()
    os.close(fd)


@needs_aio
def test_a_child_does_not_inherit_contexts():
    assert linux_aio.why_not() == "" and linux_aio._idle
    child = os.fork()
    if not child:
        os._exit(len(linux_aio._idle))
    assert os.waitpid(child, 0)[1] == 0
    assert linux_aio._idle


@pytest.mark.parametrize(
    "system, machine, known",
    [
        (Linux(), "x86_64", True),
        (Linux(), "aarch64", True),
        (Linux(), "riscv64", False),
        (FakeDarwin(), "arm64", False),
        (FakeDarwin(), "x86_64", False),
    ],
)
def test_systems(monkeypatch, system, machine, known):
    monkeypatch.setattr(type(system), "architecture", machine)
    use_platform(monkeypatch, system)
    kernel = linux_aio.Kernel()
    assert (not kernel.missing) is known
    if not known:
        monkeypatch.setattr(linux_aio, "kernel", kernel)
        monkeypatch.setattr(linux_aio, "_idle", [])
        assert linux_aio.why_not() == f"not known for {system.name} on {machine}"


# The reader


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("scattered")])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("gap_bytes", [0, 1 << 20])
def test_bytes_go_where_those_of_threads_go(tmp_path, name, wanted, gap_bytes):
    layout = LAYOUTS[name]
    file, _ = make(tmp_path / "rows", layout, ROWS)
    whole = slots_for(layout, 40)
    out = [array if i in wanted else None for i, array in enumerate(whole)]
    if not set(wanted) & set(range(len(whole))):
        pytest.skip("fewer parts")
    rng = np.random.default_rng(0)
    with closing(RowReader(file, direct=False, gap_bytes=gap_bytes)) as reader:
        for count in (1, 3, 15, 40):
            rows = np.sort(rng.choice(40, count, replace=False))
            read = reader.prepare(rows, rng.permutation(40)[:count], out)
            read.scattered += read.staged[::2]  # some left out, as long runs are
            found, firsts = scatter_list.vectors(
                scatter_list.as_array(read.scattered),
                read.rows,
                read.slots,
                read.pieces,
                layout.stride,
                reader._sink,
            )
            expected = [iovec(read, request, reader._sink) for request in read.scattered]
            assert firsts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
            assert found.tolist() == [
                (np.frombuffer(b, np.uint8).ctypes.data, len(b)) for bs in expected for b in bs
            ]


@needs_aio
def test_the_engine(tmp_path):
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    for engine, expected in [(None, "aio"), ("aio", "aio"), ("threads", "threads")]:
        with closing(RowReader(file, engine=engine)) as reader:
            if not reader.direct:
                pytest.skip("no direct I/O here")
            assert reader.engine == expected
            assert_read(LAYOUT, layers[0], np.arange(40), np.arange(40), read_all(reader))


def test_engines_that_are_not_to_be_had(tmp_path, monkeypatch):
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    with pytest.raises(ValueError, match=r"engine must be .*got 'uring'"):
        RowReader(file, engine="uring")
    with pytest.raises(
        ValueError, match=f"reads of {file.path}: aio: it is not read past the page"
    ):
        RowReader(file, direct=False, engine="aio")
    with closing(RowReader(file, direct=False)) as reader:
        assert reader.engine == "threads"
    monkeypatch.setattr(
        direct_io, "open_direct", lambda path, **_: (os.open(path, os.O_RDONLY), True)
    )
    kernel = use(monkeypatch, FakeKernel(no_contexts=errno.EPERM))
    with pytest.raises(ValueError, match=f"reads of {file.path}: aio: Operation not permitted"):
        RowReader(file, engine="aio")
    with closing(RowReader(file)) as reader:
        assert reader.engine == "threads"
        assert_read(LAYOUT, layers[0], np.arange(40), np.arange(40), read_all(reader))
    assert {name for name, _ in kernel.calls} == {"setup"}


def test_a_system_that_runs_out_of_contexts_reads_on(opened, monkeypatch):
    reader, _, layers = opened
    use(monkeypatch, FakeKernel(no_contexts=errno.EAGAIN))
    out = slots_for(LAYOUT, SPREAD.size)
    reader.wait(submit(reader, out))
    assert_read(LAYOUT, layers[0], SPREAD, np.arange(SPREAD.size), out)
    nbytes = SPREAD.size * LAYOUT.stride
    assert (reader.stats().requests, reader.stats().bytes_read) == (SPREAD.size, nbytes)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EAGAIN])
@pytest.mark.parametrize("when", ["refuses", "fails"])
def test_what_fails_once_is_read_again(opened, monkeypatch, code, when):
    reader, kernel, layers = opened
    setattr(kernel, when, {3: code, 9: code})
    out = slots_for(LAYOUT, SPREAD.size)
    reader.wait(submit(reader, out))
    assert_read(LAYOUT, layers[0], SPREAD, np.arange(SPREAD.size), out)
    assert reader.stats().requests == SPREAD.size


def test_what_fails_for_good_is_named(opened, monkeypatch):
    reader, kernel, _ = opened
    kernel.fails = {3: errno.EIO}

    def fail(_fd: int, _buffers: list[memoryview], _offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    real = os.preadv
    out = slots_for(LAYOUT, SPREAD.size)
    kernel.go.clear()
    futures = submit(reader, out)
    kernel.begun.wait()
    bad = reader.file.layers[0].offset + 12 * LAYOUT.stride
    monkeypatch.setattr(os, "preadv", lambda f, b, at: (fail if at == bad else real)(f, b, at))
    kernel.go.set()
    with pytest.raises(ReadError, match=f"{reader.file.path}, layer 0, row 12, offset {bad}, "):
        reader.wait(futures)
    assert not any(kernel.under_way.values())
    assert reader.stats().requests == SPREAD.size


def test_a_file_cut_while_requests_are_under_way(opened):
    reader, kernel, layers = opened
    kernel.go.clear()
    out = slots_for(LAYOUT, SPREAD.size)
    futures = submit(reader, out)
    kernel.begun.wait()
    end = reader.file.layers[0].offset + 36 * LAYOUT.stride + 700
    os.truncate(reader.file.path, end)
    kernel.go.set()
    with pytest.raises(DamagedError, match=f"ended at byte {end} inside layer 0, row 36; it was"):
        reader.wait(futures)
    assert_read(LAYOUT, layers[0], SPREAD[:9], np.arange(9), [array[:9] for array in out])


@pytest.mark.parametrize("how", ["drop", "interrupt"])
def test_what_is_under_way_is_over_when_dropped(opened, monkeypatch, how):
    """Dropping, or Ctrl-C in ``wait``, waits for what the kernel was given."""
    reader, kernel, layers = opened
    kernel.go.clear()
    out = slots_for(LAYOUT, SPREAD.size)
    futures = submit(reader, out)
    kernel.begun.wait()
    assert all((array == 0xAA).all() for array in out)
    real = module.wait

    def wait(fs: list, **options) -> None:
        if options:
            raise KeyboardInterrupt
        kernel.go.set()
        real(fs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "wait", wait)
        if how == "drop":
            reader.drop(futures)
        else:
            with pytest.raises(KeyboardInterrupt):
                reader.wait(futures)
    assert not any(kernel.under_way.values())
    assert_read(LAYOUT, layers[0], SPREAD, np.arange(SPREAD.size), out)


def test_closing_with_requests_under_way(opened, monkeypatch):
    """What has begun is finished, what has not fails, and who waits for it is told."""
    reader, kernel, layers = opened
    monkeypatch.setattr(linux_aio, "DEPTH", 4)
    kernel.go.clear()
    shutdown = reader._pool.shutdown

    def go_on(**options: bool) -> None:
        kernel.go.set()
        shutdown(**options)

    monkeypatch.setattr(reader._pool, "shutdown", go_on)
    out = slots_for(LAYOUT, SPREAD.size)
    futures = submit(reader, out)
    kernel.begun.wait()
    reader.close()
    assert not any(kernel.under_way.values())
    assert all(future.done() for future in futures)
    assert_read(LAYOUT, layers[0], SPREAD[:4], np.arange(4), out)
    assert reader.stats().requests == 4
    with pytest.raises(ValueError, match="is closed"):
        reader.wait(futures)
    reader.drop(futures)  # does not wait for ever


def test_closing_while_another_thread_reads(opened, monkeypatch):
    reader, kernel, layers = opened
    kernel.go.clear()
    wait_for = reader._lock.wait_for

    def go_on(over: Callable[[], bool]) -> None:
        kernel.go.set()
        wait_for(over)

    monkeypatch.setattr(reader._lock, "wait_for", go_on)
    out, slots = slots_for(LAYOUT, SPREAD.size), np.arange(SPREAD.size)
    thread = threading.Thread(target=reader.read, args=(0, SPREAD, slots, out))
    thread.start()
    kernel.begun.wait()
    reader.close()
    assert kernel.go.is_set() and not any(kernel.under_way.values())
    assert_read(LAYOUT, layers[0], SPREAD, slots, out)
    thread.join()
    with pytest.raises(ValueError, match="is closed"):
        reader.read(0, SPREAD, slots, out)


def test_a_read_that_is_interrupted_is_over(opened, monkeypatch):
    """The runs that are staged as well."""
    reader, kernel, layers = opened

    def interrupt(*_args) -> int:
        raise KeyboardInterrupt

    rows = np.append(np.arange(20), np.arange(22, 40, 2))
    out, slots = slots_for(LAYOUT, rows.size), np.arange(rows.size)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "getevents", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.read(0, rows, slots, out)
    assert kernel.under_way == {} and not reader._under_way
    assert reader.read(0, rows, slots, out) is None
    assert_read(LAYOUT, layers[0], rows, slots, out)


def test_read_seconds_end_with_the_last_request_not_with_waiting(opened, monkeypatch):
    reader, kernel, _ = opened
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    kernel.go.clear()
    futures = submit(reader, slots_for(LAYOUT, SPREAD.size))
    kernel.begun.wait()
    now = 2.0
    assert reader.stats().read_seconds == 2.0
    kernel.go.set()
    for future in futures:
        future.exception()  # until it is over, without the reader
    now = 9.0
    reader.wait(futures)
    nbytes = SPREAD.size * LAYOUT.stride
    assert reader.stats() == ReadStats(SPREAD.size, nbytes, 2.0, True)


@needs_aio
@pytest.mark.parametrize("depth", [2, 1024])
def test_threads_that_share_a_reader(tmp_path, monkeypatch, depth):
    monkeypatch.setattr(linux_aio, "DEPTH", depth)
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    failures = []
    with closing(RowReader(file, gap_bytes=0)) as reader:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(20):
                    rows, slots = np.flatnonzero(rng.random(40) < 0.5), rng.permutation(40)
                    out = slots_for(LAYOUT, 40)
                    reader.read(0, rows, slots[: rows.size], out)
                    assert_read(LAYOUT, layers[0], rows, slots[: rows.size], out)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=functools.partial(work, seed)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
