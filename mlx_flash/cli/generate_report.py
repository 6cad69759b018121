"""What is written and shown of a run of ``mlx_flash generate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.common.sizes import show

UNITS = {"neuron": "rows", "expert": "experts", "layer": "FFNs"}


@dataclass
class Run:
    """What has been generated, when, and what was read for it.

    Args:
        prompt_tokens: of the prompt.
        ram: the budget in bytes, or None.
    """

    prompt_tokens: int
    ram: int | None
    tokens: list[int] = field(default_factory=list, init=False)
    text: str = field(default="", init=False)
    finish_reason: str | None = field(default=None, init=False)
    flash: Any = field(default=None, init=False)
    _began: float = field(default=0.0, init=False)
    _first: float | None = field(default=None, init=False)
    _ended: float = field(default=0.0, init=False)
    _before: Any = field(default=None, init=False)

    def begin(self, flash: Any, now: float) -> None:
        """The prompt is about to be read.

        Args:
            flash: what pages the model; None for a dense one.
            now: seconds, as of all other times.
        """
        self.flash, self._began = flash, now
        self._before = flash.stats() if flash else None

    def token(self, token: int, text: str, now: float) -> None:
        """A token has come; figures count from the first one on."""
        if self._first is None:
            self._first = now
            self._before = self.flash.stats() if self.flash else None
        self.tokens.append(token)
        self.text += text

    def end(self, finish_reason: str | None, now: float) -> None:
        """Nothing more comes; None for a run that was broken off."""
        self.finish_reason, self._ended = finish_reason, now

    def figures(self) -> dict[str, Any]:
        """What ``--stats`` writes; seconds, bytes."""
        from mlx_flash.common.platform import current_platform

        first = self._ended if self._first is None else self._first
        seconds = self._ended - first
        return {
            "tokens": self.tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": first - self._began,
            "generation_tokens": len(self.tokens),
            "generation_seconds": seconds,
            "peak_footprint_bytes": current_platform().peak_process_bytes(),
            "budget_bytes": self.ram,
            "flash": _flash_figures(self.flash, self._before, seconds) if self.flash else None,
        }


def _flash_figures(flash: Any, before: Any, seconds: float) -> dict[str, Any]:
    spent = flash.stats() - before
    steps = max(spent.forwards, 1)
    return {
        "bytes_read": spent.bytes_read,
        "requests": spent.requests,
        "read_seconds": spent.read_seconds,
        "wait_seconds": spent.wait_seconds,
        "compute_seconds": max(seconds - spent.wait_seconds, 0.0),
        "hits": spent.hits,
        "misses": spent.misses,
        "forwards": spent.forwards,
        "predictor": flash.selection.kind if flash.selection else "none",
        "exact": flash.selection.exact if flash.selection else True,
        "measured": flash.selection.measured if flash.selection else {},
        "predicted": spent.predicted,
        "layer_calls": spent.layer_calls,
        "predict_seconds": spent.predict_seconds,
        "manage_seconds": spent.manage_seconds,
        "unit": flash.directory.unit,
        "lookahead": flash.lookahead and bool(flash.caches),
        "foretold": spent.foretold,
        "useful": spent.useful,
        "cached_rows": sum(flash.plan.slots.values()),
        "bytes_per_token": spent.bytes_read / steps,
        "direct": spent.direct,
        "kept_layers": len(flash.plan.kept),
        "streamed_layers": len(flash.plan.streamed),
        "rows": [layer.rows for layer in flash.directory.rows.layers],
        "planned_bytes": flash.plan.to_json(),
    }


def summary(result: dict[str, Any]) -> Iterator[str]:
    """The closing lines, mlx-lm's own and what was read."""
    seconds = max(result["generation_seconds"], 1e-9)
    prompt_tps = result["prompt_tokens"] / max(result["prompt_seconds"], 1e-9)
    yield f"Prompt: {result['prompt_tokens']} tokens, {prompt_tps:.3f} tokens-per-sec"
    tps = result["generation_tokens"] / seconds
    yield f"Generation: {result['generation_tokens']} tokens, {tps:.3f} tokens-per-sec"
    budget = result["budget_bytes"]
    limit = f" of {show(budget)}" if budget else ""
    yield f"Peak memory: {result['peak_footprint_bytes'] / 1e9:.3f} GB{limit}, whole process"
    flash = result["flash"]
    if not flash or not flash["forwards"]:  # a single token is the prompt's doing
        return
    rows = flash["hits"] + flash["misses"]
    layers = len(flash["rows"])
    how = "" if flash["direct"] else " through the page cache (no direct I/O here)"
    yield (
        f"Flash: {show(flash['bytes_per_token'])} read per token{how}, "
        f"hit rate {100 * flash['hits'] / max(rows, 1):.1f} %, "
        f"{UNITS[flash['unit']]} of {flash['kept_layers']} of {layers} layers kept"
    )
    if flash["unit"] == "expert" and flash["cached_rows"]:
        yield _experts_line(flash)
    elif flash["cached_rows"]:
        yield _predictor_line(flash)
    yield (
        f"Time: reading {100 * flash['read_seconds'] / seconds:.0f} %, "
        f"computing {100 * flash['compute_seconds'] / seconds:.0f} %, "
        f"waiting {100 * flash['wait_seconds'] / seconds:.0f} % (reading runs beside computing)"
    )


def _experts_line(flash: dict[str, Any]) -> str:
    """How many experts a layer was asked for, and what was foretold."""
    asked = flash["predicted"] / max(flash["layer_calls"], 1)
    most = flash["rows"][0]
    line = (
        f"Experts: {asked:.1f} of {most} asked for per layer and step, "
        f"{100 * flash['cached_rows'] / sum(flash['rows']):.1f} % in slots; exact"
    )
    return line + _ahead(flash)


def _ahead(flash: dict[str, Any]) -> str:
    """What was read ahead, where anything was."""
    if not flash["foretold"]:
        return ""
    share = 100 * flash["useful"] / flash["foretold"]
    return f"; {flash['foretold']} read ahead, {share:.0f} % of them needed"


def _predictor_line(flash: dict[str, Any]) -> str:
    """Which rows were taken to fire, and what that costs in quality."""
    calls = sum(flash["rows"]) / len(flash["rows"]) * max(flash["layer_calls"], 1)
    line = (
        f"Predictor: {flash['predictor']}, {100 * flash['predicted'] / calls:.1f} % of the rows "
        f"asked for, {100 * flash['cached_rows'] / sum(flash['rows']):.1f} % cached"
        f"{_ahead(flash)}; "
    )
    if flash["exact"]:
        return line + "exact"
    measured = flash["measured"]
    if not {"perplexity_dense", "perplexity_predicted"} <= measured.keys():
        return line + "lossy, the loss was not measured"
    dense, predicted = measured["perplexity_dense"], measured["perplexity_predicted"]
    return line + (
        f"lossy, perplexity {predicted:.2f} against {dense:.2f} "
        f"({100 * (predicted / dense - 1):+.1f} %) when calibrated"
    )
