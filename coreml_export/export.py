"""A model to the directory that an app needs: packages, rows, tokenizer, manifest, report.

Everything is written into ``OUT.partial``, which becomes OUT by one rename after the report has
passed. Packages are made one after the other, so memory holds the tensors of one.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coreml_export.program.coremltools_compat import fresh_names
from coreml_export.program.weights import Weights
from coreml_export.quantization.stored_weights import RoundedWeights, StoredWeights
from coreml_export.source.decoder_spec import MULTIPLE, Decoder, check_context
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source, chat_template
from mlx_flash.common.files import beside, written
from mlx_flash.common.work_directory import WorkDirectory
from mlx_flash.errors import FlashError
from mlx_flash.models.positions import positions_of

from .bundle import manifest, mlpackage, readme, sizes
from .bundle.rows import write_embedding, write_rows
from .errors import ExportError
from .program import dense, paged, predictors
from .quantization import calibrate
from .settings import Settings
from .source import tokenizer

DEFAULT_CONTEXT = 512
Progress = Callable[[int, str], Any]
Verify = Callable[[Path, dict[str, Any], Source, Decoder, Settings, StoredWeights], Any]


def export(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    verify: Verify | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export a model.

    Args:
        model: model directory, Hugging Face directory, or GGUF file.
        out: directory to make.
        settings: what is asked for; None for all defaults.
        verify: called with the finished directory, its manifest, the model, and the weights as
            they are stored, before the directory gets its name; raises to refuse it.
        progress: called with a number of bytes and "total" once, then with what is being read.

    Raises:
        FlashError: it cannot be done; says why and what can be done instead.
    """
    out, settings = Path(out), settings or Settings.of()
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists; choose another -o, or remove it first")
    source = Source(model)
    decoder = describe(source)
    if settings.context is None:
        settings = replace(settings, context=_default_context(source, decoder))
    check_context(decoder, settings.context)
    _check_positions(source, settings.context)
    partial = beside(out, ".partial")
    choices = None
    if "paged" in settings.profiles:
        choices = predictors.choose(source, decoder, settings.predictor)
    sizes.check_disk(out, source, decoder, settings)
    work = WorkDirectory(partial, manifest.MARKER, "export", ExportError)
    with work.claim("coreml_export"):
        work.empty()  # an export that was cut off is begun anew
        try:
            _Job(source, decoder, settings, partial, progress).run(choices, verify)
            (partial / manifest.MARKER).unlink()
            partial.rename(out)
        except OSError as error:
            if isinstance(error, FlashError):  # the model could not be read
                raise
            raise ExportError(
                f"writing {written(error) or partial} failed: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _default_context(source: Source, decoder: Decoder) -> int:
    limits = [n for n in (decoder.limit, positions_of(source.config)) if n]
    return min([DEFAULT_CONTEXT, *limits]) // MULTIPLE * MULTIPLE


def _check_positions(source: Source, context: int) -> None:
    """Raise ExportError for a context beyond what the model was made for."""
    limit = positions_of(source.config)
    if limit and context > limit:
        raise ExportError(
            f"a context of {context} tokens, but {source.path} was made for {limit} positions; "
            "choose a --context up to that"
        )


class _Job:
    """One export into an empty directory."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        settings: Settings,
        out: Path,
        progress: Progress | None,
    ) -> None:
        self.source, self.decoder, self.settings, self.out = source, decoder, settings, out
        self._progress = progress
        self.stored: StoredWeights = RoundedWeights(source, decoder, settings.recipe)

    def run(self, choices: list[predictors.Choice] | None, verify: Verify | None) -> None:
        """Write everything; the manifest and the report come last.

        Args:
            choices: a predictor for each layer, where the paged profile is wanted.
            verify: see ``export``.
        """
        if self._progress:
            passes = len(self.settings.profiles) + self.settings.calibrated
            self._progress(4 * self.source.parameters * passes, "total")
        tokenizer.write(self.source, self.out / "tokenizer")
        content = self._about()
        if self.settings.calibrated:
            self._calibrate(choices or [])
        if "dense" in self.settings.profiles:
            content["dense"] = self._dense()
        if choices is not None:
            content["paged"] = self._paged(choices)
            content["embedding"] = write_embedding(
                self.out / "embedding.bin", self.decoder, self.stored, self.settings.fp32_residual
            )
        manifest.write(self.out, content, calibrate.CODES)
        content = manifest.read(self.out)
        (self.out / "README.md").write_text(readme.text(content), encoding="utf-8")
        if verify:
            verify(self.out, content, self.source, self.decoder, self.settings, self.stored)
            content = {k: v for k, v in content.items() if k != "files"}
            manifest.write(self.out, content, calibrate.CODES)
        shutil.rmtree(self.out / calibrate.CODES, ignore_errors=True)

    def _reading(self, what: str) -> Callable[[int], Any] | None:
        """Tells the caller how many bytes of tensors were read for something."""
        progress = self._progress
        return (lambda nbytes: progress(nbytes, what)) if progress else None

    def _about(self) -> dict[str, Any]:
        """What the manifest says of the model and of what was asked for."""
        decoder, settings, config = self.decoder, self.settings, self.source.config
        eos = tokenizer.ends(self.out / "tokenizer", config)
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
                "parameters": self.source.parameters,
            },
            "context": settings.context,
            "quantisation": settings.quant,
            "rounding": settings.rounding,
            "precision": settings.precision,
            "recipe": [list(row) for row in settings.recipe],
            "target": settings.target,
            "units": settings.units,
            "eos": eos,
            "bos": config.get("bos_token_id"),
            "chat_template": chat_template(self.out / "tokenizer"),
            "lengths": dense.LENGTHS,
        }

    def _calibrate(self, choices: list[predictors.Choice]) -> None:
        self.stored = calibrate.calibrate(
            self.source,
            self.decoder,
            self.settings.recipe,
            self.settings.fp32_residual,
            self.out,
            self.stored,
            self._reading("calibration"),
            ffn_norm_has_other_readers=predictors.trained(choice.kind for choice in choices),
        )

    def _dense(self) -> dict[str, Any]:
        plan = sizes.dense_plan(self.source, self.decoder, self.settings)
        packages = {}
        for part in plan.parts:
            weights = Weights(self.stored, self._reading(part.name))

            def build(part: dense.Part = part, weights: Weights = weights) -> dict[str, Any]:
                context, residual = self.settings.context, self.settings.fp32_residual
                return dense.functions(self.decoder, weights, part, context, residual)

            entry = self._package(part.name, build)
            del weights, build
            packages[part.name] = {
                "file": entry["file"],
                "layers": list(part.layers),
                "functions": entry["functions"],
            }
        chains = {name: [list(call) for call in calls] for name, calls in plan.chains.items()}
        return {"packages": packages, "chains": chains}

    def _paged(self, choices: list[predictors.Choice]) -> dict[str, Any]:
        decoder, settings = self.decoder, self.settings
        capacity = settings.cache_rows or decoder.d_ffn // 4
        capacity = max(2 * MULTIPLE, -(-capacity // MULTIPLE) * MULTIPLE)
        int8 = settings.rows == "int8"
        weights = Weights(self.stored, self._reading("paged"))
        guessing = Weights(self.stored, self._reading("predictor"))
        packages = {
            "paged": self._package(
                "paged",
                lambda: paged.functions(
                    decoder,
                    weights,
                    settings.context,
                    capacity,
                    int8,
                    settings.target,
                    settings.fp32_residual,
                ),
            ),
            "predictor": self._package(
                "predictor", lambda: predictors.functions(decoder, guessing, choices)
            ),
        }
        kinds = [choice.kind for choice in choices]
        path = self.out / "rows.safetensors"
        return {
            "layers": len(decoder.layers),
            "buckets": paged.buckets(decoder.d_ffn),
            "new_rows": list(paged.NEW_ROWS),
            "cache_rows": capacity,
            "predictors": kinds,
            "exact": not predictors.trained(kinds),
            "thresholds": [choice.threshold for choice in choices],
            "rows": write_rows(path, decoder, self.stored, int8, self._reading("rows")),
            "packages": packages,
        }

    def _package(self, part: str, functions: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make one package; returns the manifest's entry of it."""
        path = self.out / f"{part}.mlpackage"
        about = {
            "flash.format_version": str(manifest.FORMAT_VERSION),
            "flash.part": part,
            "flash.model_type": self.decoder.model_type,
            "flash.context": str(self.settings.context),
            "flash.quantisation": self.settings.quant,
        }
        with fresh_names():
            program = dense.program(functions())
            mlpackage.build(program, path, about, self.settings.target)
        del program
        gc.collect()  # programs are full of cycles, and hold a package's weights
        return {"file": path.name, "functions": manifest.functions(path)}
