"""Engines are chosen by what they can do; a third one needs no change of the reader."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
from support.disks import LAYOUTS, ROWS, assert_read, slots_for
from support.row_files import make

from mlx_flash.errors import ReadError
from mlx_flash.storage import engines
from mlx_flash.storage.engines import (
    NOT_BEGUN,
    Capabilities,
    EngineUnavailable,
    ThreadEngine,
)
from mlx_flash.storage.reader import RowReader

LAYOUT = LAYOUTS["scattered"]
SPREAD = np.arange(0, 40, 3)


class Ring:
    """A made-up engine of many requests at a time, in the manner of io_uring.

    It gives back short reads, errors and requests that it did not begin, in turn.
    """

    name = "ring"
    capabilities = Capabilities(max_in_flight=3, joins_gaps=False, alignment=512)
    trouble = False

    def __init__(self, file):
        self.file, self.calls, self.threads = file, [], set()
        made.append(self)

    def read(self, job, requests, begun, stop):
        self.threads.add(threading.current_thread().name)
        self.calls.append(list(requests))
        short = []
        for i, request in enumerate(self.calls[-1]):
            offset, nbytes = job.extent(request)
            if self.trouble and i % 4 == 1:
                short.append((request, NOT_BEGUN))
                continue
            begun.requests, begun.nbytes = begun.requests + 1, begun.nbytes + nbytes
            if self.trouble and i % 4 == 2:
                short.append((request, -errno.EAGAIN))
                continue
            got = os.preadv(self.file.fd, job.buffers(request), offset)
            if self.trouble and i % 4 == 3:
                got -= 512
            if got != nbytes:
                short.append((request, got))
        return short


class OneByOne(Ring):
    """A made-up engine of one request at a time, which many threads call."""

    name = "one by one"
    capabilities = Capabilities(max_in_flight=1, joins_gaps=True)

    def read(self, job, requests, begun, stop):
        for request in requests:
            super().read(job, [request], begun, stop)
        return ()


made: list[Ring] = []


@pytest.fixture
def added(monkeypatch):
    """Adds engines to those that can be asked for, which are a copy: their order tells first."""
    made.clear()
    monkeypatch.setattr(engines, "ENGINES", dict(engines.ENGINES))
    return lambda kind: engines.ENGINES.update({kind.name: kind})


@pytest.mark.parametrize("trouble", [False, True])
@pytest.mark.parametrize("kind", [Ring, OneByOne])
@pytest.mark.parametrize("how", ["read", "submit"])
def test_a_third_engine(tmp_path, monkeypatch, added, kind, trouble, how):
    added(kind)
    monkeypatch.setattr(Ring, "trouble", trouble and kind is Ring)
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    with closing(RowReader(file, engine=kind.name, gap_bytes=0)) as reader:
        assert reader.engine == kind.name
        out, slots = slots_for(LAYOUT, 40), np.arange(SPREAD.size)
        if how == "read":
            reader.read(1, SPREAD[SPREAD < 23], slots[SPREAD < 23], out)
            assert_read(LAYOUT, layers[1], SPREAD[SPREAD < 23], slots[SPREAD < 23], out)
        out = slots_for(LAYOUT, 40)
        reader.wait(reader.submit(0, reader.prepare(SPREAD, slots, out)))
        assert_read(LAYOUT, layers[0], SPREAD, slots, out)
        count = SPREAD.size + (how == "read") * int((SPREAD < 23).sum())
        assert (reader.stats().requests, reader.stats().bytes_read) == (
            count,
            count * LAYOUT.stride,
        )
        assert reader.engine == kind.name
    (engine,) = made
    if kind is Ring:
        assert len(engine.calls) == 1 + (how == "read")  # one call for a whole read
        assert ("MainThread" in engine.threads) == (how == "read")
    else:
        assert len(engine.calls) == count
        assert all(name.startswith("mlx_flash-read") for name in engine.threads)


def test_it_is_planned_for_by_what_it_can_do(tmp_path, added):
    file, _ = make(tmp_path / "rows", LAYOUT, ROWS)
    rows = np.array([0, 2, 4, 20])
    found = {}
    for joins in (False, True):

        class Kind(Ring):
            name = f"joins {joins}"
            capabilities = Capabilities(8, joins_gaps=joins)

        added(Kind)
        with closing(RowReader(file, engine=Kind.name)) as reader:
            assert LAYOUT.stride < reader.gap_bytes
            read = reader.prepare(rows, np.arange(4), slots_for(LAYOUT, 40))
            found[joins] = [(r.start, r.stop) for r in read.scattered]
    assert found[False] == [(0, 1), (2, 3), (4, 5), (20, 21)]
    assert found[True] == [(0, 5), (20, 21)]


def test_an_engine_that_gives_up_is_let_go(tmp_path, added):
    """As where the system has no room for it any more: threads read from then on."""

    class Full(Ring):
        name = "full"

        def read(self, job, requests, begun, stop):
            return [(request, NOT_BEGUN) for request in requests]

    added(Full)
    file, layers = make(tmp_path / "rows", LAYOUT, ROWS)
    with closing(RowReader(file, engine="full", gap_bytes=0)) as reader:
        out, slots = slots_for(LAYOUT, 40), np.arange(SPREAD.size)
        reader.read(0, SPREAD, slots, out)
        assert_read(LAYOUT, layers[0], SPREAD, slots, out)
        assert reader.engine == "threads"
        assert reader.stats().requests == SPREAD.size


def test_the_first_that_can_read_is_taken(tmp_path, monkeypatch, added):
    class Never(Ring):
        name = "never"

        def __init__(self, file):
            raise EngineUnavailable("not on this machine")

    class Coarse(Ring):
        name = "coarse"
        capabilities = Capabilities(8, alignment=1 << 20)

    file, _ = make(tmp_path / "rows", LAYOUT, ROWS)
    engines.ENGINES.clear()
    for kind in (Never, Coarse, Ring, ThreadEngine):
        added(kind)
    with closing(RowReader(file)) as reader:
        assert reader.engine == "ring"
    with pytest.raises(ValueError, match=f"reads of {file.path}: never: not on this machine"):
        RowReader(file, engine="never")
    with pytest.raises(ValueError, match=r"coarse: rows begin on multiples of 4096 bytes, not of"):
        RowReader(file, engine="coarse")
    with pytest.raises(ValueError, match=r'one of "never", "coarse", "ring", "threads" or None'):
        RowReader(file, engine="other")


def test_memory_must_suit_it(tmp_path, added):
    added(Ring)
    file, _ = make(tmp_path / "rows", LAYOUT, ROWS)
    out = [array.reshape(-1)[8:].view(np.uint8) for array in slots_for(LAYOUT, 40)]
    odd = [a[: 39 * e].reshape(39, e) for a, e in zip(out, LAYOUT.extents, strict=True)]
    with (
        closing(RowReader(file, engine="ring", direct=False)) as reader,
        pytest.raises(ValueError, match="does not start on a sector"),
    ):
        reader.prepare(SPREAD[:5], np.arange(5), odd)


def test_what_fails_for_good_is_named(tmp_path, monkeypatch, added):
    added(Ring)
    monkeypatch.setattr(Ring, "trouble", True)
    file, _ = make(tmp_path / "rows", LAYOUT, ROWS)
    real = os.preadv
    bad = file.layers[0].offset + 3 * LAYOUT.stride  # left out by the engine

    def preadv(fd, buffers, offset):
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(RowReader(file, engine="ring", gap_bytes=0)) as reader:
        slots = np.arange(SPREAD.size)
        with pytest.raises(ReadError, match=f"layer 0, row 3, offset {bad}, "):
            reader.read(0, SPREAD, slots, slots_for(LAYOUT, 40))


@pytest.mark.parametrize("package", ["storage", "common"])
def test_no_mlx_is_imported(package):
    """Bytes of rows are read without MLX: in programs of other frameworks, and quickly."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"import mlx_flash.{package} as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'mlx', 'mlx_lm'}))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
