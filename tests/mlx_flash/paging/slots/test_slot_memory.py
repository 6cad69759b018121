"""Slot memory: what numpy writes is what MLX reads, whatever the layout."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import CacheError
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.paging.slots.slot_memory import SlotMemory, aligned_bytes
from mlx_flash.storage.row_layout import PAGE, Part, RowLayout


@pytest.mark.parametrize("nbytes", [1, 2, 511, 4096, 100_001])
@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint16, mx.uint32])
def test_aligned_memory_is_shared(nbytes, dtype):
    array, view = aligned_bytes(nbytes, dtype)
    assert view.dtype == np.uint8 and view.ctypes.data % PAGE == 0
    assert nbytes <= view.size == array.nbytes < nbytes + dtype.size
    assert not view.any()
    view[:] = np.arange(view.size) % 251
    expected = (np.arange(view.size) % 251).astype(np.uint8)
    assert array.view(mx.uint8).tolist() == expected.tolist()
    total = expected.view({1: "u1", 2: "u2", 4: "u4"}[dtype.size]).sum(dtype=np.uint64)
    assert array.astype(mx.uint64).sum().item() == total


def test_memory_too_large_for_mlx_is_refused(monkeypatch):
    with pytest.raises(CacheError, match="more than one MLX array holds"):
        aligned_bytes(2**31)
    sizes = []

    def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        sizes.append((shape, dtype))
        raise MemoryError

    monkeypatch.setattr(mx, "zeros", zeros)
    layout = RowLayout.plan(["up"], "BF16", 2048)
    with pytest.raises(MemoryError):
        SlotMemory(layout, 2**31 // 4096 + 1)  # more than 2 GiB of 2 byte numbers are fine
    ((shape, dtype),) = sizes
    assert shape[0] < 2**31 and dtype == mx.uint64


MEMORIES = {
    "staged": RowLayout.plan(["gate", "up", "down"], "BF16", 64),
    "pages": RowLayout.plan(["gate", "up", "down"], "F32", 1024),
    "padded": RowLayout.plan(["gate", "up", "down"], "F32", 1026),
    "unlike": RowLayout((Part("gate", "F32", (8,), 0), Part("up", "BF16", (50,), 32)), 512, 512),
}


def numpy_of(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("layout", MEMORIES.values(), ids=MEMORIES)
def test_what_is_written_through_views_is_what_mlx_sees(layout):
    memory = SlotMemory(layout, 7)
    assert memory.nbytes >= 7 * sum(layout.extents)
    assert memory.views[0].ctypes.data % PAGE == 0
    rng = np.random.default_rng(0)
    for _ in range(3):
        for part, extent, view in zip(layout.parts, layout.extents, memory.views, strict=True):
            array = memory.arrays[part.name]
            size = DTYPES[part.dtype].size
            assert array.dtype == DTYPES[part.dtype]
            assert array.shape == (7, extent // size) and view.shape == (7, extent)
            assert view.flags.carray
            values = rng.integers(-8, 8, array.shape).astype(np.float32)
            bits = values.view(np.uint16)[:, 1::2] if size == 2 else values
            view[:] = np.ascontiguousarray(bits).view(np.uint8)
        for part, view in zip(layout.parts, memory.views, strict=True):
            array = memory.arrays[part.name]
            found = numpy_of(array)
            raw = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
            assert np.array(array.view(raw)).tobytes() == view.tobytes()
            x = rng.integers(-2, 3, (2, array.shape[1])).astype(np.float32)
            product = mx.array(x).astype(array.dtype) @ array[:5].T
            np.testing.assert_allclose(numpy_of(product), x @ found[:5].T, rtol=1e-2, atol=4)


@pytest.mark.parametrize("layout", [v for k, v in MEMORIES.items() if k != "unlike"])
def test_joined_parts(layout):
    memory = SlotMemory(layout, 3)
    both = memory.joined("gate", "up")
    for i, view in enumerate(memory.views):
        view[:] = i + 1
    assert both.shape == (6, memory.arrays["gate"].shape[1])
    raw = {2: mx.uint16, 4: mx.uint32}[both.dtype.size]
    found = np.array(both.view(raw)).view(np.uint8)
    assert (found[:3] == 1).all() and (found[3:] == 2).all()
    assert memory.joined("gate", "up") is both
    for first, second in [("gate", "down"), ("up", "gate"), ("gate", "gate")]:
        with pytest.raises(CacheError, match="behind each other"):
            memory.joined(first, second)


def test_parts_unlike_are_not_joined():
    for second in (Part("up", "BF16", (16,), 32), Part("up", "F32", (9,), 32)):
        memory = SlotMemory(RowLayout((Part("gate", "F32", (8,), 0), second), 512, 512), 3)
        with pytest.raises(CacheError, match="behind each other"):
            memory.joined("gate", "up")


@pytest.mark.parametrize("layout", MEMORIES.values(), ids=MEMORIES)
def test_shared_memory(layout):
    large = SlotMemory(layout, 9)
    same, small = SlotMemory(layout, 9, share=large), SlotMemory(layout, 4, share=large)
    assert small.nbytes == same.nbytes == 0 < large.nbytes
    assert small.views[0].ctypes.data == large.views[0].ctypes.data
    for memory in (small, same, large):
        for i, (part, view) in enumerate(zip(layout.parts, memory.views, strict=True)):
            view[:] = i + memory.capacity
            found = np.array(memory.arrays[part.name].view(mx.uint8))
            assert (found == i + memory.capacity).all()
            assert found.shape == view.shape == (memory.capacity, layout.extents[i])
    assert (same.views[0] == large.views[0]).all()
    with pytest.raises(CacheError, match="cannot be shared"):
        SlotMemory(layout, 10, share=large)
