"""coremltools, imported once and quietly: builder, types, targets, and programs to specs.

Off macOS its import prints a line for each part of Core ML that is not there; nothing here needs
those parts, so they are kept off the user's terminal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_noisy = logging.getLogger("coremltools")
_level = _noisy.level
_noisy.setLevel(logging.CRITICAL)
try:
    import coremltools as ct
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.converter import ConverterRegistry, mil_convert_to_proto
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_int import np_int4_dtype, np_uint4_dtype
    from coremltools.proto import MIL_pb2
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
    "to_spec",
    "types",
]

TARGETS = {"iOS18": ct.target.iOS18, "iOS26": ct.target.iOS26}
SOURCE = "milinternal"  # what coremltools calls programs that come from its own builder


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


def to_spec(program: Any, weights: Path, target: str) -> Any:
    """A MIL program as the spec of a model; nothing is optimised away or cast on the way.

    The spec is the one that ``ct.convert`` makes. That would put large constants into the system's
    temporary directory, which may be too small for them, and copy them into its package.

    Args:
        program: of one or more functions.
        weights: an empty directory, into which large constants are written.
        target: a key of TARGETS.
    """
    spec, _ = mil_convert_to_proto(
        program,
        SOURCE,
        "mlprogram",
        ConverterRegistry,
        main_pipeline=ct.PassPipeline.EMPTY,
        weights_dir=str(weights),
        specification_version=TARGETS[target].value,
    )
    described = spec.description.metadata.userDefined
    described["com.github.apple.coremltools.source"] = SOURCE
    described["com.github.apple.coremltools.version"] = ct.__version__
    facts = {"coremltools-version": ct.__version__, f"coremltools-component-{SOURCE}": ""}
    _set_build_info(spec, facts)
    return spec


def _set_build_info(spec: Any, facts: dict[str, str]) -> None:
    info = spec.mlProgram.attributes["buildInfo"]
    text = MIL_pb2.ValueType()
    text.tensorType.dataType = MIL_pb2.DataType.STRING
    info.type.dictionaryType.keyType.CopyFrom(text)
    info.type.dictionaryType.valueType.CopyFrom(text)
    for fact in facts.items():
        pair = info.immediateValue.dictionary.values.add()
        for place, value in zip((pair.key, pair.value), fact, strict=True):
            place.type.CopyFrom(text)
            place.immediateValue.tensor.strings.values.append(value)
