"""A model to the directory that an app needs: packages, rows, tokenizer, manifest, report.

Everything is written into ``OUT.partial``, which becomes OUT by one rename after the report has
passed. Packages are made one after the other, so memory holds the tensors of one.

Knows: what goes where, in which order. Does not know: MIL, how parity is measured.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coreml_export.program.coremltools_compat import fresh_names
from coreml_export.program.weights import Known, Weights
from coreml_export.quantization.recipes import Recipe, recipe, scheme_of
from coreml_export.source.decoder_spec import (
    MULTIPLE,
    Decoder,
    check_context,
    embedding_pieces,
    tensors,
)
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source, chat_template
from mlx_flash.storage.row_layout import PAGE
from mlx_flash.storage.row_writer import RowFileWriter

from .bundle import manifest, mlpackage, readme
from .errors import ExportError
from .program import dense, paged, predictors
from .quantization import calibrate
from .source import tokenizer

PROFILES = ("dense", "paged")
PART_BYTES = 1_000_000_000  # what no package's weights go above
SLACK = 64 << 20
TARGETS = ("iOS18", "iOS26")
UNITS = ("cpuAndGPU", "cpuAndNeuralEngine", "all")
DEFAULT_CONTEXT = 512
Progress = Callable[[int, str], Any]


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Args:
        profiles: some of PROFILES.
        quant: a key of ``recipes.QUANT``.
        table: file of a mixed recipe, or None.
        context: tokens that the states hold; 0 for what the model has, at most 512.
        target: least system.
        units: what the app will run the dense packages on.
        cache_rows: rows of a layer that the state of rows holds; None takes a quarter of them.
        predictor: see ``predictor.choose``.
        precision: "mixed" sums residuals, norms and logits in float32, "fp16" nothing, for the
            Neural Engine; None takes what ``units`` allow.
        rows: type of the paged profile's rows, "fp16" or, for iOS 26, "int8".
        part_bytes: bytes of weights that a package of the decoder stays below.
        recipe: what ``quant`` and ``table`` come to; None works it out.
        rounding: of int8 and int4: "calibrated" (see ``calibration``) or "nearest".
        codes: what calibration has found; ``export`` works it out.
    """

    profiles: tuple[str, ...] = ("dense",)
    quant: str = "none"
    table: Path | None = None
    context: int = 0
    target: str = "iOS18"
    units: str = "cpuAndGPU"
    cache_rows: int | None = None
    predictor: str = "auto"
    precision: str | None = None
    rows: str = "fp16"
    part_bytes: int = PART_BYTES
    recipe: Recipe | None = None
    rounding: str = "calibrated"
    codes: Known | None = None

    def __post_init__(self) -> None:
        if strange := [p for p in self.profiles if p not in PROFILES] or not self.profiles:
            raise ExportError(f"profiles {strange}; expected some of {', '.join(PROFILES)}")
        if self.target not in TARGETS:
            raise ExportError(
                f"target {self.target!r}; expected one of {', '.join(TARGETS)} (states and "
                "blocks of int4 need iOS 18)"
            )
        if self.units not in UNITS:
            raise ExportError(f"units {self.units!r}; expected one of {', '.join(UNITS)}")
        if self.precision is None:
            chosen = "mixed" if self.units == "cpuAndGPU" else "fp16"
            object.__setattr__(self, "precision", chosen)
        if self.precision not in ("mixed", "fp16"):
            raise ExportError(f"precision {self.precision!r}; expected mixed or fp16")
        if self.rounding not in ("calibrated", "nearest"):
            raise ExportError(f"rounding {self.rounding!r}; expected calibrated or nearest")
        if self.rows not in ("fp16", "int8"):
            raise ExportError(f"rows of {self.rows!r}; expected fp16 or int8")
        if self.rows == "int8" and self.target != "iOS26":
            raise ExportError(
                f"rows of int8 for {self.target}: before iOS 26 Core ML widens int8 inputs to "
                "int32; take --target iOS26, or rows of fp16"
            )
        if self.recipe is None:
            object.__setattr__(self, "recipe", recipe(self.quant, self.table))
        if self.units != "cpuAndGPU" and any(s == "int4" for _, s in self.recipe):
            raise ExportError(
                f"int4 in blocks of 32 for {self.units}: the Neural Engine refuses it; take "
                "--quant int8 (or palette4, experimental), or --units cpuAndGPU"
            )

    @property
    def calibrated(self) -> bool:
        """Whether codes are found on text."""
        few = any(scheme in ("int4", "int8") for _, scheme in self.recipe)
        return few and self.rounding == "calibrated"

    @property
    def wide(self) -> bool:
        """Whether sums are float32."""
        return self.precision == "mixed"


def export(
    model: str | Path,
    out: str | Path,
    settings: Settings = Settings(),
    verify: Callable[[Path, dict[str, Any], Source, Decoder, Settings], Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export a model.

    Args:
        model: model directory, Hugging Face directory, or GGUF file.
        out: directory to make.
        verify: called with the finished directory before it gets its name; raises to refuse it.
        progress: called with a number of bytes and "total" once, then with what is being read.

    Raises:
        FlashError: it cannot be done; says why and what can be done instead.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists; choose another -o, or remove it first")
    source = Source(model)
    decoder = describe(source)
    if not settings.context:
        settings = replace(settings, context=_default_context(source, decoder))
    check_context(decoder, settings.context)
    partial = out.with_name(out.name + ".partial")
    choices = None
    if "paged" in settings.profiles:
        choices = predictors.choose(source, decoder, settings.predictor)
    _check_disk(out, _estimate(source, decoder, settings))
    _make(partial)
    try:
        tokenizer.write(source, partial / "tokenizer")
        reads = _Progress(progress, source, settings)
        content = _describe(source, decoder, settings, partial)
        if settings.calibrated:
            told = reads.of("calibration")
            trained = any(choice.kind not in ("exact", "none") for choice in choices or [])
            codes = calibrate.calibrate(
                source, decoder, settings.recipe, settings.wide, partial, told, trained
            )
            settings = replace(settings, codes=codes)
        if "dense" in settings.profiles:
            content["dense"] = _dense(source, decoder, settings, partial, reads)
        if choices is not None:
            content["paged"] = _paged(source, decoder, settings, partial, choices, reads)
            content["embedding"] = _embedding(source, decoder, settings, partial)
        manifest.write(partial, content, calibrate.CODES)
        content = manifest.read(partial)
        (partial / "README.md").write_text(readme.text(content), encoding="utf-8")
        if verify:
            verify(partial, content, source, decoder, settings)
            content = {k: v for k, v in content.items() if k != "files"}
            manifest.write(partial, content, calibrate.CODES)
        shutil.rmtree(partial / calibrate.CODES, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise ExportError(
            f"writing {error.filename or partial} failed: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _default_context(source: Source, decoder: Decoder) -> int:
    own = source.config.get("max_position_embeddings")
    limits = [n for n in (decoder.limit, own) if isinstance(n, int) and n > 0]
    return min([DEFAULT_CONTEXT, *limits]) // MULTIPLE * MULTIPLE


def _make(partial: Path) -> None:
    if partial.exists():
        raise ExportError(
            f"{partial} is in the way: another export is writing it, or one was cut off; remove it"
        )
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"cannot write {partial}: {error.strerror}") from error


class _Progress:
    """Tells the caller what is read, with a total that counts every profile."""

    def __init__(self, progress: Progress | None, source: Source, settings: Settings) -> None:
        self._progress = progress
        if progress:
            passes = len(settings.profiles) + settings.calibrated
            progress(4 * source.parameters * passes, "total")

    def of(self, what: str) -> Callable[[int], Any] | None:
        if self._progress is None:
            return None
        return lambda nbytes: self._progress(nbytes, what)


def _describe(source: Source, decoder: Decoder, settings: Settings, out: Path) -> dict[str, Any]:
    config = source.config
    eos = config.get("eos_token_id")
    return {
        "architecture": {
            "model_type": decoder.model_type,
            "layers": len(decoder.layers),
            "d_model": decoder.d_model,
            "d_ffn": decoder.d_ffn,
            "heads": decoder.heads,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "vocabulary": decoder.vocab,
            "activation": decoder.layers[0].ffn.activation,
            "parameters": source.parameters,
        },
        "context": settings.context,
        "quantisation": settings.quant,
        "rounding": settings.rounding,
        "precision": settings.precision,
        "recipe": [list(row) for row in settings.recipe],
        "target": settings.target,
        "units": settings.units,
        "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
        "bos": config.get("bos_token_id"),
        "chat_template": chat_template(out / "tokenizer"),
        "lengths": dense.LENGTHS,
    }


def metadata(decoder: Decoder, settings: Settings, part: str) -> dict[str, str]:
    """What a package says of itself."""
    return {
        "flash.format_version": str(manifest.FORMAT_VERSION),
        "flash.part": part,
        "flash.model_type": decoder.model_type,
        "flash.context": str(settings.context),
        "flash.quantisation": settings.quant,
    }


def _bytes(source: Source, settings: Settings, value: Any) -> int:
    """Bytes that a part of a description takes in a package, each tensor once."""
    found = {}
    for tensor, _ in tensors(value):
        shape = source.shapes[tensor.name]
        if tensor.rows is not None:
            shape = (len(tensor.rows), *shape[1:])
        scheme = scheme_of(tensor.name, shape, settings.recipe)
        bits = {"fp16": 16, "int8": 8 + 16 / shape[-1], "int4": 4.5, "palette4": 4.1}[scheme]
        found[tensor.key] = int(np.prod(shape) * bits / 8)
    return sum(found.values())


def _dense_plan(source: Source, decoder: Decoder, settings: Settings) -> dense.Plan:
    layers = [_bytes(source, settings, layer) for layer in decoder.layers]
    tied = decoder.head.weight.name == decoder.embedding.name
    embedding = _bytes(source, settings, [decoder.embedding])
    head = 0 if tied else _bytes(source, settings, decoder.head)
    limit = settings.part_bytes - settings.part_bytes // 50  # tables, headers
    for number, nbytes in [*enumerate(layers), ("embedding", embedding), ("head", head)]:
        if nbytes > limit:
            raise ExportError(
                f"part {number} alone takes {nbytes / 1e9:.2f} GB, and no package may go above "
                f"{settings.part_bytes / 1e9:g} GB; export with fewer bits"
            )
    return dense.plan(decoder, layers, (embedding, head), limit)


def _dense(
    source: Source, decoder: Decoder, settings: Settings, out: Path, reads: _Progress
) -> dict[str, Any]:
    plan = _dense_plan(source, decoder, settings)
    packages = {}
    for part in plan.parts:
        weights = Weights(source, settings.recipe, reads.of(part.name), settings.codes)
        path = out / f"{part.name}.mlpackage"

        def build(part: dense.Part = part, weights: Weights = weights) -> dict[str, Any]:
            return dense.functions(decoder, weights, part, settings.context, settings.wide)

        _package(build, path, metadata(decoder, settings, part.name), settings.target)
        del weights, build
        packages[part.name] = {
            "file": path.name,
            "layers": list(part.layers),
            "functions": manifest.functions(path),
        }
    chains = {name: [list(call) for call in calls] for name, calls in plan.chains.items()}
    return {"packages": packages, "chains": chains}


def _package(
    functions: Callable[[], dict[str, Any]], path: Path, about: dict[str, str], target: str
) -> None:
    with fresh_names():
        program = dense.program(functions())
        mlpackage.build(program, path, about, target)
    del program
    gc.collect()  # programs are full of cycles, and hold a package's weights


def _paged(
    source: Source,
    decoder: Decoder,
    settings: Settings,
    out: Path,
    choices: list[predictors.Choice],
    reads: _Progress,
) -> dict[str, Any]:
    capacity = settings.cache_rows or decoder.d_ffn // 4
    capacity = max(2 * MULTIPLE, -(-capacity // MULTIPLE) * MULTIPLE)
    path, guess = out / "paged.mlpackage", out / "predictor.mlpackage"
    weights = Weights(source, settings.recipe, reads.of("paged"), settings.codes)
    _package(
        lambda: paged.functions(
            decoder,
            weights,
            settings.context,
            capacity,
            settings.rows == "int8",
            settings.target,
            settings.wide,
        ),
        path,
        metadata(decoder, settings, "paged"),
        settings.target,
    )
    guessing = Weights(source, settings.recipe, reads.of("predictor"), settings.codes)
    _package(
        lambda: predictors.functions(decoder, guessing, choices),
        guess,
        metadata(decoder, settings, "predictor"),
        settings.target,
    )
    return {
        "layers": len(decoder.layers),
        "buckets": paged.buckets(decoder.d_ffn),
        "new_rows": list(paged.NEW_ROWS),
        "cache_rows": capacity,
        "predictors": [choice.kind for choice in choices],
        "exact": all(choice.kind in ("exact", "none") for choice in choices),
        "thresholds": [choice.threshold for choice in choices],
        "rows": _rows(source, decoder, settings, out, reads),
        "packages": {
            "paged": {"file": path.name, "functions": manifest.functions(path)},
            "predictor": {"file": guess.name, "functions": manifest.functions(guess)},
        },
    }


def _rows(
    source: Source, decoder: Decoder, settings: Settings, out: Path, reads: _Progress
) -> dict[str, Any]:
    shape, int8 = paged.row_shape(decoder), settings.rows == "int8"
    layout = paged.row_layout(decoder, int8)
    counts = [decoder.d_ffn] * len(decoder.layers)
    path = out / "rows.safetensors"
    writer = RowFileWriter(path, layout, counts, "coreml_export")
    try:
        for layer in range(len(counts)):
            weights = Weights(source, settings.recipe, reads.of("rows"), settings.codes)
            rows = paged.rows_of_layer(weights, decoder, layer)
            pieces = paged.as_int8(shape, rows) if int8 else [rows]
            block = np.zeros((len(rows), layout.stride), np.uint8)
            layout.pack([np.ascontiguousarray(p).view(np.uint8) for p in pieces], block)
            writer.write(layer, [block])
    finally:
        writer.close()
    start = path.stat().st_size - sum(counts) * layout.stride
    return {
        "file": path.name,
        "dtype": "int8" if int8 else "float16",
        "extra": shape.extra if int8 else 0,
        "parts": list(shape.parts),
        "biases": list(shape.biases),
        "width": shape.codes if int8 else shape.width,
        "state_width": shape.width,
        "stride": layout.stride,
        "rows": decoder.d_ffn,
        "data_starts_on": PAGE,
        "offsets": [start + i * decoder.d_ffn * layout.stride for i in range(len(counts))],
    }


def _embedding(source: Source, decoder: Decoder, settings: Settings, out: Path) -> dict[str, Any]:
    """What the dense package's embedding stands for: a tied head is packed slice by slice."""
    weights = Weights(source, settings.recipe, codes=settings.codes)
    pieces = embedding_pieces(decoder, settings.wide)
    floats = [weights.packed(piece).floats().astype(np.float16) for piece in pieces]
    table = np.concatenate(floats, axis=1)
    table.tofile(out / "embedding.bin")
    return {"file": "embedding.bin", "dtype": "float16", "shape": list(table.shape)}


def _estimate(source: Source, decoder: Decoder, settings: Settings) -> int:
    """Bytes of disk that an export takes at its largest."""
    total = 0
    if "dense" in settings.profiles:
        total += _bytes(source, settings, decoder)
    if "paged" in settings.profiles:
        stride = paged.row_layout(decoder, settings.rows == "int8").stride
        total += _bytes(source, settings, decoder) + stride * decoder.d_ffn * len(decoder.layers)
        total += 2 * decoder.vocab * decoder.d_embedding
    total += source.parameters * settings.calibrated  # codes found, until the end
    return total + total // 10 + SLACK


def _check_disk(out: Path, needed: int) -> None:
    above = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise ExportError(
            f"not enough disk for {out}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "make room, or export with fewer bits or profiles"
        )
