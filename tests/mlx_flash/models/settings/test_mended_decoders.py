"""What decoders over mlx-lm's own compute otherwise than it does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from support import tiny, tiny_mixtures

from mlx_flash.models.registry import make_model


def test_jamba_weighs_experts_by_the_scores_of_all():
    model = make_model(tiny_mixtures.config("jamba"))
    block = next(layer.feed_forward for layer in model.layers if "router" in layer.feed_forward)
    x = mx.random.normal((1, 3, 64), key=mx.random.key(0))
    scores = np.array(mx.softmax(block.router(x), axis=-1))
    everything = mx.broadcast_to(mx.arange(8), (1, 3, 8))
    outputs = np.array(block.switch_mlp(x, everything))
    best = np.argsort(-scores, axis=-1)[..., :2]
    expected = sum(
        np.take_along_axis(scores, best[..., [k]], -1)
        * np.take_along_axis(outputs, best[..., [k], None], -2)[..., 0, :]
        for k in range(2)
    )
    np.testing.assert_allclose(np.array(block(x)), expected, rtol=1e-4, atol=1e-6)


def test_falcon_h1_puts_the_multipliers_of_keys_and_values_into_the_weights_once():
    config = tiny.config("falcon_h1", key_multiplier=0.5, attention_in_multiplier=3.0)
    model = make_model(config)
    published = {
        name: w.swapaxes(1, 2) if "conv1d.weight" in name else w
        for name, w in tree_flatten(model.parameters())
    }
    # mlx-lm multiplies in place.
    found = model.sanitize({name: mx.array(w) for name, w in published.items()})
    for name, factor in {"q": 3.0, "k": 1.5, "v": 3.0}.items():
        weight = f"model.layers.0.self_attn.{name}_proj.weight"
        assert mx.allclose(found[weight], factor * published[weight])
    again = model.sanitize({name: mx.array(w) for name, w in found.items()})
    assert all(mx.array_equal(again[name], weight) for name, weight in found.items())
