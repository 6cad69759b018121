"""No token and no position is looked up beyond its table, in any family."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import tiny, tiny_mixtures

from mlx_flash.errors import ModelError
from mlx_flash.models.bounded_embedding import bound_embeddings
from mlx_flash.models.registry import make_model

METAL = ("muse_spark",)  # families whose forward runs on Metal only
TABLES = {"gpt2": 512, "gpt_bigcode": 512, "opt": 512}  # family -> learned positions


def model_of(config):
    model = make_model(config)
    bound_embeddings(model)
    return model


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(tiny.config(name), id=name) for name in tiny.TINY),
        *(pytest.param(tiny_mixtures.config(n), id=n) for n in tiny_mixtures.TINY_MIXTURES),
    ],
)
def test_tokens_of_every_family(config):
    """Nothing is computed but the numbers themselves."""
    model = model_of(config)
    rows = (config.get("text_config") or config).get("vocab_size", tiny.VOCAB)
    cache = make_prompt_cache(model)
    if config["model_type"] not in METAL:
        model(mx.array([[0, rows - 1]]), cache=cache)
    for token in (rows, rows + 5000):
        with pytest.raises(ModelError, match=f"token {token} is outside .* has {rows} tokens"):
            model(mx.array([[3, token]]), cache=cache)


@pytest.mark.parametrize("name", TABLES)
def test_learned_positions(name):
    """The last position is there; the one behind it is an error, in a prompt or a step."""
    model = model_of(tiny.config(name, layers=2))
    limit = TABLES[name]
    with pytest.raises(ModelError, match=f"513 tokens are more than the {limit}"):
        model(mx.zeros((1, limit + 1), mx.int32))
    cache = make_prompt_cache(model)
    model(mx.zeros((1, limit), mx.int32), cache=cache)
    with pytest.raises(ModelError, match=f"513 tokens are more than the {limit}"):
        model(mx.array([[1]]), cache=cache)


def test_quantised_embeddings_and_batches():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(40, 64)

    model = Tied()
    nn.quantize(model)
    expected = model.embed_tokens(mx.array([3, 39]))
    bound_embeddings(model)
    assert mx.array_equal(model.embed_tokens(mx.array([3, 39])), expected)
    assert model.embed_tokens.as_linear(mx.zeros((1, 64))).shape == (1, 40)
    for tokens in ([[1, 2], [3, 40]], [[-41]]):
        with pytest.raises(ModelError, match="outside the model's embedding, which has 40"):
            model.embed_tokens(mx.array(tokens))
