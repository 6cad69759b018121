"""The trained fixtures: their text, their tokens and logits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.paging.row_weights import resident_part
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.storage.reader import RowReader

FIXTURES = Path(__file__).parents[1] / "fixtures"
TRAINED = ("opt-austen", "llama-relu-austen")
TEXT = "She had been some minutes in the room before she was perceived by her father, who"
TOKENS = 128
# Families whose activation has zeros, and what makes others so.
RELU = {
    "bamboo": {},
    "falcon": {"activation": "relu"},
    "llama": {"hidden_act": "relu", "mlp_bias": True},
    "minicpm": {"hidden_act": "relu"},
    "mistral": {"hidden_act": "relu2"},
    "nanochat": {},
    "nemotron": {},
    "opt": {},
    "persimmon": {},
    "phi": {"hidden_act": "relu"},
    "sparsellama": {},
}


def greedy(model, prompt, tokens=TOKENS):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens)]


def logits(model, tokens, *sizes):
    """Logits of a sequence, given to the model in pieces of these sizes."""
    cache, at, found = make_prompt_cache(model), 0, []
    for size in sizes:
        found.append(model(mx.array([tokens[at : at + size]]), cache=cache)[0])
        at += size
    return mx.concatenate(found).astype(mx.float32)


def whole_rank(directory, threshold=0.5, scale=1000.0):
    """Low-rank predictors that are right: the projection itself, at full rank."""
    layers = []
    reader = RowReader(directory.rows)
    width = directory.rows.layout.parts[0].width
    part = "gate" if "gate" in directory.ffn.parts else "up"
    weights = mx.load(str(directory.shards[0]))
    for i, layer in enumerate(directory.rows.layers):
        bias = next(
            (v for k, v in weights.items() if f"layers.{i}." in k and "fc1.bias" in k), None
        )
        tensors = {"first": mx.eye(width), "second": scale * resident_part(reader, i, part)}
        if bias is not None:
            tensors["bias"] = scale * bias
        layers.append(LayerPredictor("low-rank", threshold, "none", tensors, {"4": layer.rows / 5}))
    reader.close()
    return Predictors("low-rank", directory.rows.fingerprint, layers, {})
