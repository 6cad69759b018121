"""The models that ``compare_checkouts`` converts and runs with both checkouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.from_tests import TESTS, from_tests
from demos.smollm2 import smollm2_gguf

# Keywords of ``mlx_flash.load``: they choose how rows are paged without a budget, so that tiny
# models are paged, too.
STREAMED = {"kept_share": 0.25}
CACHED = (
    {"predictor": "gate", "cache_share": 0.3},
    {"predictor": "gate", "cache_share": 0.2, "policy": "lru"},
    {"predictor": "gate", "cache_share": 0.5, "policy": "window"},
)
UNGATED = ({"predictor": "up", "cache_share": 0.3}, STREAMED)
EXPERTS = (
    {"cache_share": 0.5},
    {"cache_share": 0.75, "lookahead": True},
    {"cache_share": 0.5, "policy": "window"},
)
# Wide enough for groups of 64 weights.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
Q4 = ("-q", "--q-bits", "4", "--q-group-size", "64")


@dataclass(frozen=True)
class Case:
    """A model, how it is converted, and in which ways it is run.

    Args:
        name: in the table, and of the folder that its files lie in.
        source: makes the checkpoint in a folder, or names one that exists.
        convert: flags of ``mlx_flash convert``.
        loads: keywords of ``mlx_flash.load``, one run each.
        calibrate: flags of ``mlx_flash calibrate``; None for no such run.
        calibrated_loads: keywords of ``mlx_flash.load``, run after calibrating.
        reorder: flags of ``mlx_flash reorder``; None for no such run.
        export: flags of ``python -m coreml_export``; None for no such run.
        quick: whether ``--quick`` has it.
    """

    name: str
    source: Callable[[Path], Path]
    convert: tuple[str, ...] = ()
    loads: tuple[dict[str, Any], ...] = (STREAMED,)
    calibrate: tuple[str, ...] | None = None
    calibrated_loads: tuple[dict[str, Any], ...] = ()
    reorder: tuple[str, ...] | None = None
    export: tuple[str, ...] | None = None
    quick: bool = True


def _fixture(name: str) -> Callable[[Path], Path]:
    return lambda _: TESTS / "fixtures" / name


def _tiny(family: str, dtype: str = "float32", **overrides: Any) -> Callable[[Path], Path]:
    return lambda folder: from_tests("tiny").make_checkpoint(folder, family, dtype, **overrides)


def _mixture(family: str, dtype: str = "float32") -> Callable[[Path], Path]:
    return lambda folder: from_tests("tiny_mixtures").make_mixture(folder, family, dtype)


def _smollm2(_: Path) -> Path:
    return smollm2_gguf()


LOW_RANK = ("--tokens", "1024", "--rank", "32")
TRAINED = (
    {"predictor": "low-rank", "cache_share": 0.3},
    {"predictor": "low-rank", "cache_share": 0.5, "policy": "window"},
    {"predictor": "low-rank", "cache_share": 0.3, "lookahead": False},
)
REORDER = ("--tokens", "1024")
EXPORT = ("--profile", "dense,paged", "--context", "128", "--rounding", "nearest", "--no-verify")

CASES = (
    Case(
        "llama-relu-austen",
        _fixture("llama-relu-austen"),
        loads=(STREAMED, *CACHED),
        calibrate=LOW_RANK,
        calibrated_loads=TRAINED,
        reorder=REORDER,
        export=(*EXPORT, "--quant", "int8"),
    ),
    Case(
        "opt-austen",
        _fixture("opt-austen"),
        loads=(STREAMED, *UNGATED),
        calibrate=LOW_RANK,
        calibrated_loads=TRAINED,
        reorder=REORDER,
        export=(*EXPORT, "--quant", "int4"),
    ),
    Case(
        "llama",
        _tiny("llama", "bfloat16"),
        calibrate=("--kind", "threshold", "--tokens", "1024"),
        calibrated_loads=({"predictor": "threshold", "cache_share": 0.6},),
    ),
    Case("falcon-relu", _tiny("falcon", activation="relu"), loads=UNGATED),
    Case("nemotron-relu2", _tiny("nemotron", "float16"), loads=UNGATED),
    Case("bamboo", _tiny("bamboo"), loads=CACHED),
    Case("mixtral", _mixture("mixtral"), loads=EXPERTS, calibrate=("--tokens", "1024")),
    Case("gpt_oss-mxfp4", _mixture("gpt_oss", "bfloat16"), loads=EXPERTS),
    Case(
        "llama-relu-q4",
        _tiny("llama", "bfloat16", hidden_act="relu", **WIDE),
        convert=Q4,
        loads=(STREAMED, *CACHED),
    ),
    Case("qwen3-q4-layer-rows", _tiny("qwen3", "bfloat16", **WIDE), convert=Q4),
    Case("smollm2", _smollm2, ("--dtype", "float32"), quick=False),
    Case("smollm2-float32", _smollm2, ("--dequantize", "--dtype", "float32"), quick=False),
    Case(
        "smollm2-relu",
        _smollm2,
        ("--adapter", "relu-smollm2", "--dtype", "float32"),
        loads=({"predictor": "gate", "cache_share": 0.3},),
        quick=False,
    ),
)
