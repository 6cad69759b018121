"""coremltools, imported once and quietly: builder, types, target.

Off macOS its import prints a line for each part of Core ML that is not there; nothing here needs
those parts, so they are kept off the user's terminal.

Knows: coremltools. Does not know: models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_noisy = logging.getLogger("coremltools")
_level = _noisy.level
_noisy.setLevel(logging.CRITICAL)
try:
    import coremltools as ct
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_int import np_int4_dtype, np_uint4_dtype
finally:
    _noisy.setLevel(_level)

__all__ = [
    "TARGETS",
    "ct",
    "fresh_names",
    "mb",
    "mil",
    "milproto",
    "np_int4_dtype",
    "np_uint4_dtype",
    "types",
]


@contextmanager
def fresh_names() -> Iterator[None]:
    """Names of operations begin at 0: else they would depend on what was built before."""
    before = dict(mb.name_count)
    mb.name_count.clear()
    try:
        yield
    finally:
        mb.name_count.clear()
        mb.name_count.update(before)


TARGETS = {"iOS18": ct.target.iOS18, "iOS26": ct.target.iOS26}
