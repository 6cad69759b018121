"""What decides the outcome of a training, apart from the text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from . import text

FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Settings of one training; they are kept beside it, and a resumed one must have the same.

    Args:
        zeros: share aimed at, mean over layers; the training begins at ``first_zeros`` and is there
            after ``grown`` of the steps.
        begin_from: another training in the same directory, whose outcome takes the place of the
            regression.
        bypass_rate: learning rate of the bypass over that of the rest.
        hidden: weight of the residual stream's error beside the KL.
        penalty: the largest weight that the penalty on activations may get (relu, drelu), for the
            log of each layer's mean.
    """

    activation: str = "fatrelu"
    tokens: int = 220_000
    batch: int = 2
    rate: float = 1.5e-3
    warmup: int = 20
    last_rate: float = 0.03
    ffn_rank: int = 20
    attention_rank: int = 12
    bypass: bool = True
    bypass_rate: float = 0.15
    hidden: float = 3.0
    penalty: float = 0.03
    kl_share: float = 0.5
    zeros: float = 0.745
    first_zeros: float = 0.72
    grown: float = 0.3
    prose_share: float = 0.5
    regression_windows: int = 48
    seed: int = 0
    begin_from: str = ""

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * text.WINDOW)


def save(path: Path, settings: Settings) -> None:
    """Write settings.json into the directory of a training."""
    (path / FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def saved(path: Path) -> Settings:
    """The settings in the directory of a training; ends the program where there are none."""
    if not (path / FILE).exists():
        raise SystemExit(f"{path} holds no training; expected {FILE}: train it first")
    return Settings(**json.loads((path / FILE).read_text()))
