"""Reads an export back, runs it on real text and writes its report.

Knows: which runs make a report. Does not know: gates (``parity``), how packages are run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from coreml_export import export
from coreml_export.errors import ExportError
from coreml_export.program import predictors
from coreml_export.program.weights import Known, safe_name
from coreml_export.program.weights import stored as stored_tensors
from coreml_export.quantization.calibrate import few_bits
from coreml_export.quantization.channel_scaling import folds
from coreml_export.quantization.recipes import Recipe, scheme_of
from coreml_export.source import tokenizer
from coreml_export.source.decoder_spec import Decoder, Tensor
from coreml_export.source.weights_source import Source

from . import gates
from .coreml_device import DevicePackage
from .dense_host import DenseRunner
from .gates import Report
from .interpreter import Package
from .paged_host import PagedHost

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
    write_report(out, report.to_json(), report.markdown())
    report.raise_if_failed()
    return report


def write_report(out: Path, report: dict[str, Any], page: str) -> None:
    """Put parity.json and parity.md there."""
    text = json.dumps(report, indent=1, sort_keys=True)
    (out / "parity.json").write_text(text + "\n", encoding="utf-8")
    (out / "parity.md").write_text(page, encoding="utf-8")


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
    kept = stored_tensors(source, decoder, settings.recipe, settings.wide, settings.codes)
    reference = logits(source.reference(), tokens)
    stored = logits(source.reference(kept), tokens)
    decoded = None
    if "dense" in content:
        runner = dense_runner(out, content)
        decoded, apart = gates.dense(report, runner, tokens, reference, stored)
        if context >= 2 * gates.TOKENS:
            gates.greedy(report, runner, tokens[: gates.TOKENS], apart)
        _golden(out, tokens, decoded, reference)
        if coreml:
            _on_device(report, out, content, tokens, reference, decoded)
        del runner
    if "paged" in content:
        choices = predictors.choose(source, decoder, settings.predictor)
        masks = predictors.mlx_masks(source, decoder, choices, kept)
        against = decoded if decoded is not None else stored[: gates.TOKENS]
        name = "dense package" if decoded is not None else "MLX float32, stored weights"
        for mode in ("rows", "cache"):
            host = PagedHost(out, content, mode)
            exact = content["paged"]["exact"]
            float16 = content["paged"]["rows"]["dtype"] == "float16"
            gates.paged(report, host, tokens, against, name, masks, exact, float16)
    return report


class _InPackages:
    """What an export's programs hold otherwise than the model.

    Matrices in few bits, decompressed, and the weights of norms that may be scaled.
    """

    def __init__(
        self, out: Path, content: dict[str, Any], chosen: Recipe, scaled: set[str]
    ) -> None:
        entries = [
            e for p in ("dense", "paged") for e in content.get(p, {}).get("packages", {}).values()
        ]
        packages = [Package(out / entry["file"]) for entry in entries]
        self._functions = [p.function(name) for p in packages for name in p.functions]
        self._recipe, self._scaled = chosen, scaled

    def packed(self, tensor: Tensor) -> _Floats | None:
        """What a tensor stands for; None where it is the model's, or in no package."""
        name = safe_name(tensor.key)
        for function in self._functions:
            found = function.constant(name)
            if found is None:
                continue
            few = scheme_of(tensor.name, found.shape, self._recipe) != "fp16"
            if few or tensor.name in self._scaled:
                return _Floats(found)
        return None


@dataclass(frozen=True)
class _Floats:
    array: np.ndarray

    def floats(self) -> np.ndarray:
        return self.array.astype(np.float32)


def in_packages(
    out: Path, content: dict[str, Any], chosen: Recipe, source: Source, decoder: Decoder
) -> Known:
    """The weights of an export as its own packages hold them.

    Where codes were found on text, they would not come out the same on another machine.

    Raises:
        ExportError: it has the paged profile alone, whose rows are no constants.
    """
    if "dense" not in content:
        raise ExportError(
            f"{out} holds the paged profile alone, rounded by what layers' inputs were on text; "
            "such an export is checked where it is made: export dense,paged, or --rounding nearest"
        )
    trained = not content.get("paged", {}).get("exact", True)
    found = folds(decoder, few_bits(source, decoder, chosen), trained)
    return _InPackages(out, content, chosen, {fold.giver for fold in found if fold.norm})


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
    found = runner.decode(tokens[: gates.TOKENS])
    count = len(found)
    gate = report.model_gate
    distance = gates.distance
    report.add("decode, Core ML", "MLX float32", distance(found, reference[:count]), gate)
    report.add("decode, Core ML", "interpreter", distance(found, decoded[:count]), None)
