"""Reads an export back, runs it on real text and writes its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from coreml_export.errors import ExportError
from coreml_export.program import predictors
from coreml_export.program.weights import safe_name
from coreml_export.quantization.calibrate import quantized_matrices
from coreml_export.quantization.channel_scaling import folds
from coreml_export.quantization.formats import QuantizedRows
from coreml_export.quantization.recipes import Recipe, scheme_of
from coreml_export.quantization.stored_weights import RoundedWeights, StoredWeights, dequantised
from coreml_export.settings import Settings
from coreml_export.source import tokenizer
from coreml_export.source.decoder_spec import Decoder, Tensor
from coreml_export.source.weights_source import Source

from . import gates
from .coreml_device import DevicePackage
from .dense_host import DenseRunner
from .gates import Report
from .interpreter import Package
from .paged_host import PagedHost

MOST = 128  # tokens that prefill is measured on, at most


def verify(
    out: Path,
    content: dict[str, Any],
    source: Source,
    decoder: Decoder,
    settings: Settings,
    stored: StoredWeights,
    coreml: bool = False,
) -> Report:
    """Measure a finished directory; writes parity.json, parity.md and golden.npz into it.

    Args:
        content: the manifest.
        stored: the model's tensors as the export stores them.
        coreml: run Core ML's own prediction, too (macOS).

    Raises:
        ParityError: a gate is missed.
    """
    report = measure(out, content, source, decoder, settings, stored, coreml)
    write_report(out, report.to_json(), report.markdown())
    report.raise_if_failed()
    return report


def write_report(out: Path, report: dict[str, Any], page: str) -> None:
    """Write parity.json and parity.md into an export."""
    text = json.dumps(report, indent=1, sort_keys=True)
    (out / "parity.json").write_text(text + "\n", encoding="utf-8")
    (out / "parity.md").write_text(page, encoding="utf-8")


def measure(
    out: Path,
    content: dict[str, Any],
    source: Source,
    decoder: Decoder,
    settings: Settings,
    stored: StoredWeights,
    coreml: bool = False,
) -> Report:
    """The report of an export, whether it passes or not; arguments as for ``verify``."""
    report = Report(settings.quant, settings.fp32_residual)
    context = content["context"]
    tokens = tokenizer.sample(out / "tokenizer", min(MOST, context))
    tokens = [t % decoder.vocab for t in tokens]
    kept = dequantised(source, decoder, stored, settings.fp32_residual)
    reference = logits(source.reference(), tokens)
    expected = logits(source.reference(kept), tokens)
    decoded = None
    if "dense" in content:
        runner = dense_runner(out, content)
        decoded, apart = gates.dense(report, runner, tokens, reference, expected)
        if context >= 2 * gates.TOKENS:
            gates.greedy(report, runner, tokens[: gates.TOKENS], apart)
        _golden(out, tokens, decoded, reference)
        if coreml:
            _on_device(report, out, content, tokens, reference, decoded)
        del runner
    if "paged" in content:
        wanted = predictors.wanted_by(content["paged"]["predictors"])
        choices = predictors.choose(source, decoder, wanted)
        masks = predictors.mlx_masks(source, decoder, choices, kept)
        against = decoded if decoded is not None else expected[: gates.TOKENS]
        name = "dense package" if decoded is not None else "MLX float32, stored weights"
        for mode in ("rows", "cache"):
            host = PagedHost(out, content, mode)
            exact = content["paged"]["exact"]
            float16 = content["paged"]["rows"]["dtype"] == "float16"
            gates.paged(report, host, tokens, against, name, masks, exact, float16)
    return report


class PackageWeights:
    """Tensors as the packages of a finished export hold them; all others are the model's, rounded.

    That is every matrix in few bits, decompressed, and the weights of norms that were scaled.

    Args:
        out: the export.
        content: its manifest.
        recipe: which tensor is stored in how many bits.
        scaled: names of norms' weights that may be scaled.
        others: where all other tensors come from.
    """

    def __init__(
        self,
        out: Path,
        content: dict[str, Any],
        recipe: Recipe,
        scaled: set[str],
        others: StoredWeights,
    ) -> None:
        entries = [
            e for p in ("dense", "paged") for e in content.get(p, {}).get("packages", {}).values()
        ]
        packages = [Package(out / entry["file"]) for entry in entries]
        self._functions = [p.function(name) for p in packages for name in p.functions]
        self._recipe, self._scaled, self._others = recipe, scaled, others

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """See ``StoredWeights``."""
        name = safe_name(tensor.key)
        for function in self._functions:
            found = function.constant(name)
            if found is None:
                continue
            quantised = scheme_of(tensor.name, found.shape, self._recipe) != "fp16"
            if quantised or tensor.name in self._scaled:
                return QuantizedRows("fp16", found.astype(np.float16))
        return self._others.packed(tensor)


def stored_by(
    out: Path, content: dict[str, Any], source: Source, decoder: Decoder, settings: Settings
) -> StoredWeights:
    """The model's tensors as a finished export stores them.

    Where codes were found on text they are taken from its packages: on another machine they would
    not come out the same.

    Raises:
        ExportError: it was calibrated and has the paged profile alone, whose rows are no constants
            of a program.
    """
    rounded = RoundedWeights(source, decoder, settings.recipe)
    if not settings.calibrated:
        return rounded
    if "dense" not in content:
        raise ExportError(
            f"{out} holds the paged profile alone, rounded by what layers' inputs were on text; "
            "such an export is checked where it is made: export dense,paged, or --rounding nearest"
        )
    trained = predictors.trained(content.get("paged", {}).get("predictors", ()))
    matrices = quantized_matrices(source, decoder, settings.recipe)
    scaled = {f.giver for f in folds(decoder, matrices, trained) if f.norm}
    return PackageWeights(out, content, settings.recipe, scaled, rounded)


def dense_runner(out: Path, content: dict[str, Any], kind: Any = Package) -> DenseRunner:
    """A runner over an export's dense packages.

    Args:
        kind: what runs a package: the interpreter's ``Package`` or ``DevicePackage``.
    """
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
