"""Does a saved export compute what the model computes? Measured on real text, function by function.

Every function is run by the interpreter on the reloaded packages and held against MLX in float32,
twice: with the model's own weights, and with the weights as they are stored (rounded or
quantised), which leaves the error of the export alone. This is program parity: what Core ML's
compilers and devices make of the program is measured on macOS only, by Core ML's own prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coreml_export.errors import ParityError

from .dense_host import DenseRunner
from .distances import SPREAD, Distance, distance
from .paged_host import PagedHost

TOKENS = 64  # measured by each function, at least
GREEDY = 64  # tokens that a prompt is continued by


@dataclass(frozen=True)
class Gate:
    """Limits that a distance has to keep to.

    Args:
        kl: most nats of divergence.
        top1: least share of tokens with the same likeliest next token, or one that is tied with
            it (``distances``).
        psnr: least dB.
    """

    kl: float
    top1: float
    psnr: float = -np.inf

    def fails(self, found: Distance) -> list[str]:
        problems = []
        if not found.kl <= self.kl:
            problems.append(f"KL {found.kl:.3g} above {self.kl:g}")
        if not found.top1_apart >= self.top1:
            problems.append(f"top-1 {found.top1_apart:.2%} below {self.top1:.1%}")
        if not found.psnr >= self.psnr:
            problems.append(f"PSNR {found.psnr:.1f} dB below {self.psnr:g} dB")
        return problems


EXPORT = Gate(kl=1e-5, top1=0.999, psnr=65.0)
MODEL = {
    "none": Gate(kl=1e-5, top1=0.995),
    "int8": Gate(kl=1e-3, top1=0.98),
    "int4": Gate(kl=5e-2, top1=0.90),
    # Experimental, so held to what int4 is.
    "palette4": Gate(kl=5e-2, top1=0.90),
}
# Without sums in float32: neighbouring fp16 numbers near 20 are 0.016 apart, which costs 1e-5.
NARROW = Gate(kl=1e-4, top1=0.98, psnr=60.0)
PAGED = Gate(kl=1e-5, top1=1.0)
PREFILL_MAX = 0.01  # of the logits' scale


@dataclass
class Report:
    """What was measured and whether it passed.

    Args:
        quant: see ``Settings``; chooses the gates.
        fp32_residual: residuals, norms and logits are summed in float32; likewise.
        rows: (function, what it was compared with, distance, gate or None).
        facts: other findings by their name.
        failed: a line for each gate that was missed.
        rounding: root mean square error of a logit that arithmetic alone makes, as measured on
            programs; 0 before that.
    """

    quant: str
    fp32_residual: bool = True
    rows: list[tuple[str, str, Distance, Gate | None]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    rounding: float = 0.0

    def of_program(self, found: np.ndarray, reference: np.ndarray) -> Distance:
        """The distance of a program from another one, or from MLX, with the same weights.

        Where it is no more than rounding makes it is kept as ``rounding``: other tokens that are
        chosen within that are ties, here and in what is compared next.
        """
        apart, gate = distance(found, reference), self.export_gate
        if apart.kl <= gate.kl and apart.psnr >= gate.psnr:
            self.rounding = max(self.rounding, apart.rms)
        return distance(found, reference, self.rounding)

    @property
    def export_gate(self) -> Gate:
        """The gate for the error of the export alone."""
        return EXPORT if self.fp32_residual else NARROW

    @property
    def model_gate(self) -> Gate:
        """The gate for the distance from the model with its own weights."""
        return NARROW if self.quant == "none" and not self.fp32_residual else MODEL[self.quant]

    def add(self, what: str, against: str, found: Distance, gate: Gate | None) -> None:
        self.rows.append((what, against, found, gate))
        for problem in gate.fails(found) if gate else ():
            self.failed.append(f"{what} against {against}: {problem}")

    def check(self, name: str, value: Any, holds: bool, expected: str) -> None:
        self.facts[name] = value
        if not holds:
            self.failed.append(f"{name} is {value}; expected {expected}")

    @property
    def only_bits(self) -> bool:
        """Whether all that fails is that the quantised weights are too far from the model's."""
        coarse = self.quant != "none" and bool(self.failed)
        return coarse and all(" against MLX float32: " in line for line in self.failed)

    def raise_if_failed(self) -> None:
        """Raise ParityError with everything that failed."""
        if self.failed:
            listed = "".join(f"\n  {line}" for line in self.failed)
            if self.only_bits:
                raise ParityError(
                    f"in {self.quant} the weights are too far from the model's:{listed}\nTake more "
                    "bits (--quant int8, none), for some tensors by --quant-table, or, knowing "
                    "this, --no-verify"
                )
            raise ParityError(f"the export does not compute what the model computes:{listed}")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "program parity (numpy interpreter over the saved packages)",
            "quantisation": self.quant,
            "passed": not self.failed,
            "failed": self.failed,
            "rows": [
                {"function": what, "against": against, **found.to_json()}
                | ({"gate": {"kl": gate.kl, "top1": gate.top1}} if gate else {})
                for what, against, found, gate in self.rows
            ],
            "rounding": self.rounding,
            "facts": self.facts,
        }

    def markdown(self) -> str:
        """The report as a page."""
        lines = [
            "# Parity",
            "",
            "Program parity: a numpy interpreter ran the programs read back from the saved "
            "packages. It says nothing about a device; on macOS the same report also runs Core "
            "ML's own prediction.",
            "",
            "| function | against | tokens | max | PSNR dB | KL | top-1 | ties | gate |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for what, against, d, gate in self.rows:
            verdict = "" if gate is None else "failed" if gate.fails(d) else "passed"
            lines.append(
                f"| {what} | {against} | {d.tokens} | {d.max:.4g} | {d.psnr:.1f} | {d.kl:.2e} | "
                f"{d.top1:.2%} | {d.ties} | {verdict} |"
            )
        lines += [
            "",
            "Ties: tokens whose likeliest next token is another one, but as good: in the "
            "reference's logits the two lie nearer together than float16 can tell apart at their "
            f"size, or than {SPREAD:g} times the rounding that was measured. Gates count them as "
            "the same.",
        ]
        lines += ["", *(f"- {name}: {value}" for name, value in self.facts.items())]
        lines += ["", "Passed." if not self.failed else "Failed:"]
        lines += [f"- {line}" for line in self.failed]
        return "\n".join(lines) + "\n"


def dense(
    report: Report,
    runner: DenseRunner,
    tokens: list[int],
    reference: np.ndarray,
    stored: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Measure the dense functions; returns decode's logits, how far prefill's lie from them.

    Args:
        tokens: at least TOKENS, at most the context.
        reference: MLX's logits for them, float32, with the model's weights.
        stored: the same with the weights as stored.
    """
    count = max(TOKENS, len(tokens) // TOKENS * TOKENS)
    runner.reset()
    prompt = runner.prompt(tokens[:count])
    runner.reset()
    decoded = runner.decode(tokens[:TOKENS])
    gate = report.model_gate
    for name, found in (("prefill", prompt), ("decode", decoded)):
        n = len(found)
        program = report.of_program(found, stored[:n])
        report.add(name, "MLX float32, stored weights", program, report.export_gate)
        weights = distance(stored[:n], reference[:n]) if report.quant == "none" else None
        rounding = report.rounding + (weights.rms if weights else 0.0)
        report.add(name, "MLX float32", distance(found, reference[:n], rounding), gate)
    scale = float(np.abs(reference[:TOKENS]).max())
    largest = float(np.abs(prompt[:TOKENS] - decoded).max())
    apart = largest / scale
    report.check(
        "prefill against decode, max difference over the logits' scale",
        round(apart, 5),
        apart <= PREFILL_MAX,
        f"at most {PREFILL_MAX}",
    )
    return decoded, largest


def greedy(
    report: Report, runner: DenseRunner, prompt: list[int], apart: float, count: int = GREEDY
) -> list[int]:
    """Continue a prompt both ways: by prefill and decode, and by decode alone.

    Args:
        apart: largest distance between the two functions' logits; where the two best logits are
            nearer together than that, either may be taken.
    """
    both = runner.greedy(prompt, count)
    alone = runner.greedy(prompt, count, prefill=False)
    same = next((i for i in range(count) if both[i] != alone[i]), count)
    found, tied = f"{same} of {count}", False
    if same < count:
        runner.reset()
        logits = runner.decode([*prompt, *alone[:same]])[-1]
        gap = float(logits[alone[same]] - logits[both[same]])
        tied = gap <= apart
        found += f", parting where two logits lie {gap:.4g} apart"
    report.check(
        "greedy tokens the same, prefill and decode against decode alone",
        found,
        same == count or tied,
        f"{count} of {count}, or parting where two logits lie no further apart than the functions, "
        f"{apart:.4g}",
    )
    return both


def paged(
    report: Report,
    host: PagedHost,
    tokens: list[int],
    expected: np.ndarray,
    against: str,
    masks: list[Callable[[np.ndarray], np.ndarray]],
    exact: bool,
    float16: bool = True,
) -> None:
    """Measure the paged packages against logits, and the predictors against MLX's.

    Args:
        expected: logits for at least TOKENS tokens.
        against: what they are, for the report.
        masks: MLX's predictor of each layer, FFN inputs [n, d_model] -> bool [n, rows].
        exact: whether these miss nothing; else the logits have no gate.
        float16: the type of the rows; int8 has a wider gate.
    """
    count = min(TOKENS, len(tokens))
    found = host.decode(tokens[:count])
    gate = (PAGED if float16 else MODEL["int8"]) if exact else None
    report.add(f"paged ({host.mode})", against, report.of_program(found, expected[:count]), gate)
    agree = total = 0
    for layer, mask in enumerate(masks):
        ours = np.array(host.masks[layer])
        theirs = mask(np.array(host.ffn_inputs[layer]).astype(np.float32))
        agree += int((ours == theirs).sum())
        total += ours.size
    share = agree / total
    report.check(
        f"predictor masks that agree with MLX's ({host.mode})",
        f"{share:.4%}",
        share >= 0.999,
        "at least 99.9%",
    )
    counts = host.counts
    report.facts[f"paged ({host.mode})"] = (
        f"{counts.calls / count:.1f} calls a token, {counts.predicted / count:.0f} rows predicted, "
        f"{counts.read / count:.0f} read, {counts.evicted} evicted"
    )
