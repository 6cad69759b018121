"""What a calibration is asked for, and whether it makes sense for the model.

Knows: ranges, what each kind of predictor needs of an activation. Does not know: texts, how
anything is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_flash.errors import CalibrationError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.predictors.registry import NONLINEARITIES

TOKENS = {"low-rank": 16384, "threshold": 4096}  # to train on


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for; see ``calibrate.calibrate``."""

    kind: str
    rank: int | str
    target_recall: float
    sparsity: float
    nonlinearity: str
    tokens: int
    seed: int
    max_loss: float


def check_settings(
    directory: ModelDirectory,
    kind: str | None,
    rank: int | str,
    target_recall: float,
    sparsity: float,
    nonlinearity: str,
    tokens: int | None,
    seed: int,
    max_loss: float,
) -> Settings:
    """The settings, complete; raises CalibrationError where they make no sense for the model."""
    if directory.unit != "neuron":
        raise CalibrationError(
            f"{directory.path} has no neurons to predict: its quantised FFNs are read whole; "
            "convert the float checkpoint"
        )
    ffn = directory.ffn
    kind = kind or ("low-rank" if families.has_zeros(ffn) else "threshold")
    if kind not in TOKENS:
        raise CalibrationError(f"kind {kind!r}; expected {' or '.join(TOKENS)}")
    if kind == "low-rank" and not families.has_zeros(ffn):
        raise CalibrationError(
            f"the activation of this model, {ffn.activation}, has no zeros to predict: every row "
            "counts for every token; --kind threshold would leave the small ones out, at a loss"
        )
    if kind == "threshold":
        try:
            families.gate_function(ffn)
        except ModelError as error:
            raise CalibrationError(f"no threshold can be set for this model: {error}") from error
    d_model = directory.d_model
    if rank != "auto" and (not isinstance(rank, int) or not 1 <= rank <= d_model):
        raise CalibrationError(f"rank {rank!r}; expected auto or 1 to {d_model}, the model's width")
    if not 0 < target_recall < 1:
        raise CalibrationError(
            f"a recall of {target_recall}; expected one between 0 and 1, such as 0.95"
        )
    if not 0 < sparsity < 1:
        raise CalibrationError(
            f"a sparsity of {sparsity}; expected one between 0 and 1, such as 0.5"
        )
    if nonlinearity not in NONLINEARITIES:
        known = " or ".join(NONLINEARITIES)
        raise CalibrationError(f"nonlinearity {nonlinearity!r}; expected {known}")
    if not 0 <= max_loss < float("inf"):
        raise CalibrationError(f"a loss of {max_loss}; expected one from 0 on, such as 0.01")
    if seed < 0:
        raise CalibrationError(f"seed {seed}; expected one from 0 on")
    tokens = TOKENS[kind] if tokens is None else tokens
    return Settings(kind, rank, target_recall, sparsity, nonlinearity, tokens, seed, max_loss)
