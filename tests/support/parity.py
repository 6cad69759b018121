"""Greedy tokens and logits of a paged model and of mlx-lm's dense one."""

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

TOKENS = 128
PROMPT = [5, 17, 42, 7, 3, 99, 23]


def greedy(model, tokens=TOKENS, prompt=PROMPT):
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    return [token for token, _ in steps]


def logits(model, prompt=PROMPT):
    """Of a prompt chunk and of a step behind it."""
    cache = make_prompt_cache(model)
    chunk = model(mx.array([prompt]), cache=cache)
    step = model(mx.array([[11]]), cache=cache)
    return mx.concatenate([chunk, step], axis=1)
