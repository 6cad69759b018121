"""What a calibration is asked for, and whether it can be had from the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_flash.errors import CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.predictors import registry
from mlx_flash.predictors.registry import NONLINEARITIES, Training


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for; see ``calibrate.calibrate``.

    ``kind`` and ``tokens`` are None until ``check_settings`` has put their defaults in.
    """

    kind: str | None = None
    rank: int | str = "auto"
    target_recall: float = 0.95
    sparsity: float = 0.5
    nonlinearity: str = "none"
    tokens: int | None = None
    seed: int = 0
    max_loss: float = 0.01

    @property
    def training(self) -> Training:
        """How predictors of the kind are learned."""
        return registry.trained()[self.kind or ""]

    @property
    def target(self) -> float:
        """What a layer's predictor is fitted for at first."""
        return getattr(self, self.training.target)


def check_settings(directory: ModelDirectory, given: Settings) -> Settings:
    """The settings with their defaults.

    Raises:
        CalibrationError: one is out of range, or the model has no such predictors.
    """
    if directory.unit != "neuron":
        raise CalibrationError(
            f"{directory.path} has no neurons to predict: its quantised FFNs are read whole; "
            "convert the float checkpoint"
        )
    ffn = directory.ffn
    kind = given.kind or ("low-rank" if families.has_zeros(ffn) else "threshold")
    if kind not in registry.fitted():
        raise CalibrationError(f"kind {kind!r}; expected {' or '.join(registry.fitted())}")
    training = registry.trained()[kind]
    if reason := registry.load(training.fitter).refusal(ffn):
        raise CalibrationError(reason)
    _check_ranges(given, directory.d_model)
    tokens = training.tokens if given.tokens is None else given.tokens
    return replace(given, kind=kind, tokens=tokens)


def _check_ranges(given: Settings, d_model: int) -> None:
    rank = given.rank
    if rank != "auto" and (not isinstance(rank, int) or not 1 <= rank <= d_model):
        raise CalibrationError(f"rank {rank!r}; expected auto or 1 to {d_model}, the model's width")
    if not 0 < given.target_recall < 1:
        raise CalibrationError(
            f"a recall of {given.target_recall}; expected one between 0 and 1, such as 0.95"
        )
    if not 0 < given.sparsity < 1:
        raise CalibrationError(
            f"a sparsity of {given.sparsity}; expected one between 0 and 1, such as 0.5"
        )
    if given.nonlinearity not in NONLINEARITIES:
        known = " or ".join(NONLINEARITIES)
        raise CalibrationError(f"nonlinearity {given.nonlinearity!r}; expected {known}")
    if not 0 <= given.max_loss < float("inf"):
        raise CalibrationError(f"a loss of {given.max_loss}; expected one from 0 on, such as 0.01")
    if given.seed < 0:
        raise CalibrationError(f"seed {given.seed}; expected one from 0 on")
