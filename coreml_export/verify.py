"""Reads an export back, runs it on real text and writes its report.

Knows: which runs make a report. Does not know: gates (``parity``), how packages are run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import export, parity, predictor, tokenizer
from .description import Decoder
from .device import DevicePackage
from .host import PagedHost
from .interpreter import Package
from .parity import Report
from .runner import DenseRunner
from .source import Source
from .weights import stored as stored_tensors

MOST = 128  # tokens that prefill is measured on


def verify(
    out: Path,
    content: dict[str, Any],
    source: Source,
    decoder: Decoder,
    settings: export.Settings,
    coreml: bool = False,
) -> Report:
    """Measure a finished directory; writes parity.json, parity.md and golden.npz into it.

    Args:
        content: the manifest.
        coreml: run Core ML's own prediction, too (macOS).

    Raises:
        ParityError: a gate is missed.
    """
    report = measure(out, content, source, decoder, settings, coreml)
    export.write_report(out, report.to_json(), report.markdown())
    report.raise_if_failed()
    return report


def measure(
    out: Path,
    content: dict[str, Any],
    source: Source,
    decoder: Decoder,
    settings: export.Settings,
    coreml: bool = False,
) -> Report:
    """The report, whatever it says."""
    report = Report(settings.quant, settings.wide)
    context = content["context"]
    tokens = tokenizer.sample(out / "tokenizer", min(MOST, context))
    tokens = [t % decoder.vocab for t in tokens]
    kept = stored_tensors(source, decoder, settings.recipe, settings.wide)
    reference = logits(source.reference(), tokens)
    stored = logits(source.reference(kept), tokens)
    decoded = None
    if "dense" in content:
        runner = dense_runner(out, content)
        decoded = parity.dense(report, runner, tokens, reference, stored)
        if context >= 2 * parity.TOKENS:
            parity.greedy(report, runner, tokens[: parity.TOKENS], parity.GREEDY)
        _golden(out, tokens, decoded, reference)
        if coreml:
            _on_device(report, out, content, tokens, reference, decoded)
        del runner
    if "paged" in content:
        choices = predictor.choose(source, decoder, settings.predictor)
        masks = predictor.mlx_masks(source, decoder, choices, kept)
        against = decoded if decoded is not None else stored[: parity.TOKENS]
        name = "dense package" if decoded is not None else "MLX float32, stored weights"
        for mode in ("rows", "cache"):
            host = PagedHost(out, content, mode)
            exact = content["paged"]["exact"]
            float16 = content["paged"]["rows"]["dtype"] == "float16"
            parity.paged(report, host, tokens, against, name, masks, exact, float16)
    return report


def dense_runner(out: Path, content: dict[str, Any], kind: Any = Package) -> DenseRunner:
    """A runner over an export's dense packages."""
    dense = content["dense"]
    packages = {name: kind(out / p["file"]) for name, p in dense["packages"].items()}
    return DenseRunner(packages, dense["chains"], content["lengths"], content["context"])


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """MLX's logits [tokens, vocabulary] in float32."""
    found = model(mx.array(np.array(tokens, np.int32)[None]))[0].astype(mx.float32)
    mx.eval(found)
    return np.array(found)


def _golden(out: Path, tokens: list[int], decoded: np.ndarray, reference: np.ndarray) -> None:
    """Tokens and logits that an app can compare its own with."""
    count = min(16, len(decoded))
    np.savez(
        out / "golden.npz",
        tokens=np.array(tokens[:count], np.int32),
        decode_logits=decoded[:count].astype(np.float16),
        mlx_logits=reference[:count],
        next_tokens=decoded.argmax(-1).astype(np.int32),
    )


def _on_device(
    report: Report,
    out: Path,
    content: dict[str, Any],
    tokens: list[int],
    reference: np.ndarray,
    decoded: np.ndarray,
) -> None:
    runner = dense_runner(out, content, DevicePackage)
    found = runner.decode(tokens[: parity.TOKENS])
    count = len(found)
    gate = report.model_gate
    distance = parity.distance
    report.add("decode, Core ML", "MLX float32", distance(found, reference[:count]), gate)
    report.add("decode, Core ML", "interpreter", distance(found, decoded[:count]), None)
