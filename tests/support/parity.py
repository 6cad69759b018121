"""Greedy tokens and logits of a paged model and of mlx-lm's dense one."""

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

TOKENS = 128
PROMPT = [5, 17, 42, 7, 3, 99, 23]
LONG = [(7 * i) % 250 + 3 for i in range(80)]


def greedy(model, tokens=TOKENS, prompt=PROMPT):
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    return [token for token, _ in steps]


def is_greedy(dense, tokens, prompt=PROMPT):
    """Whether tokens are the dense model's own greedy ones.

    One pass over them costs a fiftieth of as many steps. It sums in another order, so that where it
    chooses otherwise the steps decide.
    """
    logits = dense(mx.array([prompt + tokens[:-1]]), cache=make_prompt_cache(dense))
    chosen = mx.argmax(logits[0, len(prompt) - 1 :], axis=-1).tolist()
    return chosen == tokens or tokens == greedy(dense, len(tokens), prompt)


def logits(model, prompt=PROMPT):
    """Of a prompt chunk and of a step behind it."""
    cache = make_prompt_cache(model)
    chunk = model(mx.array([prompt]), cache=cache)
    step = model(mx.array([[11]]), cache=cache)
    return mx.concatenate([chunk, step], axis=1)


def assert_slots_hold_their_rows(model):
    """Every cached row is, byte for byte, the row file's."""
    path = model.flash.directory.rows.path
    count = 0
    for layer, cache in model.flash.caches.items():
        for reads in cache.reads.early.values():
            model.flash.reader.wait(reads)
        extent = model.flash.directory.rows.layers[layer]
        rows = np.fromfile(path, np.uint8, extent.nbytes, offset=extent.offset)
        rows = rows.reshape(extent.rows, extent.layout.stride)
        for slot, row in enumerate(cache.slots.rows()):
            for part, view in zip(extent.layout.parts, cache.slots.memory.views, strict=True):
                expected = rows[row, part.offset : part.offset + part.nbytes]
                assert np.array_equal(view[slot, : part.nbytes], expected), (layer, row, part.name)
            count += 1
    return count
