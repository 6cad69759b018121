"""Memory on huge pages, where Linux has them: reads into it are fewer, longer pieces for the disk.

A direct read gives the disk the pages that it is to fill, and ordinary ones lie all over memory:
1.4 MiB make 360 pieces, on huge pages one or two. On the disk measured (virtual, two cores)
decoding's reads of experts came at 3.0 to 3.6 GB/s into huge pages and at 2.0 to 2.1 into ordinary
ones; with both cores busy at 2.2 to 3.4 and 0.8 to 1.0.

Knows: addresses, what the kernel is asked. Does not know: who reads what.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np

from mlx_flash.common.platform import current_platform

HUGE_PAGE = 2 << 20


def ask_for(memory: np.ndarray) -> bool:
    """Let memory of zeros be on huge pages as soon as it is written to; tells whether it will.

    The pages that it has are given back: what is in it is zeros after that, whatever it was. Only
    whole huge pages inside of it change, so that nothing beside it is touched.

    Args:
        memory: bytes without gaps, private to this process (as allocators give them).
    """
    begin = -(-memory.ctypes.data // HUGE_PAGE) * HUGE_PAGE
    end = (memory.ctypes.data + memory.nbytes) // HUGE_PAGE * HUGE_PAGE
    if not current_platform().huge_pages or end <= begin:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Without the first the second would do no harm, but have no use.
    advice = mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED
    return all(madvise(begin, end - begin, a) == 0 for a in advice)


def buffers(count: int, nbytes: int) -> list[np.ndarray]:
    """Buffers on huge pages where the system has them; memory is taken as it is touched."""
    memory = mmap.mmap(-1, count * nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if current_platform().huge_pages:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    skip = -whole.ctypes.data % HUGE_PAGE
    return [whole[skip + i * nbytes : skip + (i + 1) * nbytes] for i in range(count)]
