"""What is asked of an export, checked and with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ExportError
from .quantization.recipes import Recipe, recipe
from .source.decoder_spec import check_length

PROFILES = ("dense", "paged")
TARGETS = ("iOS18", "iOS26")
UNITS = ("cpuAndGPU", "cpuAndNeuralEngine", "all")
PRECISIONS = ("mixed", "fp16")
ROUNDINGS = ("calibrated", "nearest")
ROW_TYPES = ("fp16", "int8")
PART_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Settings:
    """What is asked of an export; ``Settings.of`` fills in what is left open.

    Args:
        profiles: some of PROFILES.
        quant: a key of ``recipes.QUANT``.
        recipe: which tensor is stored in how many bits.
        precision: "mixed" sums residuals, norms and logits in float32, "fp16" nothing.
        context: tokens that the states hold; None for what the model has, at most 512.
        target: least system, one of TARGETS.
        units: what the app will run the dense packages on, one of UNITS.
        cache_rows: rows of a layer that the state of rows holds; None takes a quarter of them.
        predictor: see ``predictors.choose``.
        rows: type of the paged profile's rows, "fp16" or, for iOS 26, "int8".
        part_bytes: bytes of weights that a package of the decoder stays below.
        rounding: of int8 and int4: "calibrated" (see ``calibrate``) or "nearest".

    Raises:
        ExportError: a value is unknown, or two contradict each other.
    """

    profiles: tuple[str, ...]
    quant: str
    recipe: Recipe
    precision: str
    context: int | None = None
    target: str = "iOS18"
    units: str = "cpuAndGPU"
    cache_rows: int | None = None
    predictor: str = "auto"
    rows: str = "fp16"
    part_bytes: int = PART_BYTES
    rounding: str = "calibrated"

    @classmethod
    def of(
        cls,
        profiles: tuple[str, ...] = ("dense",),
        quant: str = "none",
        table: Path | None = None,
        precision: str | None = None,
        **others: Any,
    ) -> Settings:
        """Settings of what a user names.

        Args:
            table: file of a mixed recipe, which goes before ``quant``.
            precision: None takes what the units allow; the Neural Engine needs fp16.
            others: more of the fields.
        """
        if precision is None:
            precision = "mixed" if others.get("units", cls.units) == "cpuAndGPU" else "fp16"
        return cls(profiles, quant, recipe(quant, table), precision, **others)

    def __post_init__(self) -> None:
        strange = [profile for profile in self.profiles if profile not in PROFILES]
        if strange or not self.profiles:
            named = ", ".join(strange) or "none"
            raise ExportError(f"profiles {named}; expected some of {', '.join(PROFILES)}")
        if self.target not in TARGETS:
            raise ExportError(
                f"target {self.target!r}; expected one of {', '.join(TARGETS)} (states and "
                "blocks of int4 need iOS 18)"
            )
        for name, value, known in (
            ("units", self.units, UNITS),
            ("precision", self.precision, PRECISIONS),
            ("rounding", self.rounding, ROUNDINGS),
            ("rows", self.rows, ROW_TYPES),
        ):
            if value not in known:
                raise ExportError(f"{name} {value!r}; expected one of {', '.join(known)}")
        if self.context is not None:
            check_length(self.context)
        if self.rows == "int8" and self.target != "iOS26":
            raise ExportError(
                f"rows of int8 for {self.target}: before iOS 26 Core ML widens int8 inputs to "
                "int32; take --target iOS26, or rows of fp16"
            )
        if self.units != "cpuAndGPU" and any(scheme == "int4" for _, scheme in self.recipe):
            raise ExportError(
                f"int4 in blocks of 32 for {self.units}: the Neural Engine refuses it; take "
                "--quant int8 (or palette4, experimental), or --units cpuAndGPU"
            )

    @property
    def calibrated(self) -> bool:
        """Whether codes are found on text."""
        rounded = any(scheme in ("int4", "int8") for _, scheme in self.recipe)
        return rounded and self.rounding == "calibrated"

    @property
    def fp32_residual(self) -> bool:
        """Whether residuals, norms and logits are summed in float32."""
        return self.precision == "mixed"
