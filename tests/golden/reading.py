"""Golden files, and the ways to compute their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

FOLDER = Path(__file__).parent
# Name -> file, of make_golden.py and of make_reference.py.
OWN = {file.stem: file for file in sorted(FOLDER.glob("*.safetensors"))}
REFERENCE = {file.stem: file for file in sorted(FOLDER.glob("transformers/*.safetensors"))}
TOLERANCE = 1e-4


class Golden:
    """One file: a checkpoint, token sequences, their logits.

    Attributes:
        config: what config.json says.
        tokens: lists of token numbers.
        logits: [length, vocabulary] of each, float32.
        weights: float32, whatever the file has them in, under Hugging Face's names.
    """

    def __init__(self, file: Path) -> None:
        tensors, metadata = mx.load(str(file), return_metadata=True)
        self.config: dict[str, Any] = json.loads(metadata["config"])
        self.tokens = [tensors.pop(f"tokens.{i}").tolist() for i in range(2)]
        self.logits = [tensors.pop(f"logits.{i}") for i in range(2)]
        self.weights = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}

    def write(self, path: Path, **overrides: Any) -> Path:
        """Make a checkpoint directory, some keys of its config others; returns it.

        Its tokenizer knows a word for each token number.
        """
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config | overrides))
        mx.save_safetensors(str(path / "model.safetensors"), self.weights, {"format": "pt"})
        words = {f"word{n}": n for n in range(self.config["vocab_size"])}
        Tokenizer(WordLevel(words, unk_token="word0")).save(str(path / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "word2"}
        (path / "tokenizer_config.json").write_text(json.dumps(about))
        return path


def difference(found: mx.array, expected: mx.array) -> float:
    return mx.abs(found - expected).max().item()


def whole(model: nn.Module, tokens: list[int]) -> mx.array:
    return model(mx.array([tokens]), cache=make_prompt_cache(model))[0]


def one_by_one(model: nn.Module, tokens: list[int]) -> mx.array:
    cache = make_prompt_cache(model)
    return mx.concatenate([model(mx.array([[t]]), cache=cache)[0] for t in tokens])


def in_chunks(model: nn.Module, tokens: list[int], size: int = 5) -> mx.array:
    cache = make_prompt_cache(model)
    chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return mx.concatenate([model(mx.array([chunk]), cache=cache)[0] for chunk in chunks])
