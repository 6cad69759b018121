"""A budget's context is for all prompt caches that are alive, not for one call alone."""

import copy
import gc

import mlx.core as mx
import pytest
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from support.tiny import make_checkpoint

from mlx_flash import load
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError

CONTEXT = 100


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retained")
    return convert(make_checkpoint(folder / "hf", "llama", layers=2), folder / "m")


@pytest.fixture(params=["plain", "rotating:64"])
def model(request, path):
    ram = current_platform().machine_bytes() // 2
    model, _ = load(path, ram=ram, context=CONTEXT, kv=request.param)
    yield model
    model.flash.close()


def fill(model, cache, tokens):
    model(mx.zeros((1, tokens), mx.int32), cache=cache)


def test_caches_that_are_held(model):
    first, second = make_prompt_cache(model), make_prompt_cache(model)
    fill(model, first, 60)
    with pytest.raises(BudgetError, match="50 tokens and 60 in prompt caches that are still held"):
        fill(model, second, 50)
    fill(model, second, 30)
    fill(model, first, 1)  # its own tokens are not counted twice
    with pytest.raises(BudgetError, match="41 tokens and 61 in prompt caches"):
        fill(model, second, 11)
    if trim_prompt_cache(first, 21):
        fill(model, second, 10)
    del first
    gc.collect()
    fill(model, second, 10)


def test_copies_and_batches(model):
    cache = make_prompt_cache(model)
    model(mx.zeros((2, 20), mx.int32), cache=cache)
    kept = copy.deepcopy(cache)
    model(mx.zeros((2, 1), mx.int32), cache=kept)
    with pytest.raises(BudgetError, match="20 tokens and 82 in prompt caches"):
        fill(model, make_prompt_cache(model), 20)


def test_one_generation_after_another(path):
    """What a generation leaves behind is nothing, finished or broken off."""
    ram = current_platform().machine_bytes() // 2
    model, tokenizer = load(path, ram=ram, context=CONTEXT)
    tokenizer.eos_token_ids = set()
    for n in (40, 5, 40):
        for i, _ in enumerate(stream_generate(model, tokenizer, [5] * 50, max_tokens=40)):
            if i == n:
                break
    model.flash.close()


def test_without_a_budget_nothing_is_counted(path):
    model, _ = load(path, context=CONTEXT)
    caches = [make_prompt_cache(model) for _ in range(3)]
    for cache in caches:
        fill(model, cache, 90)
    model.flash.close()


@pytest.mark.parametrize("tokens", [7, 24])
def test_speculative_decoding_ends_within_the_context(path, tokens):
    """A draft is checked all at once; the last one does not reach beyond what was planned."""
    ram = current_platform().machine_bytes() // 2
    model, tokenizer = load(path, ram=ram, context=10 + tokens)
    tokenizer.eos_token_ids = set()
    draft, _ = load(path, use_flash=False)
    steps = stream_generate(
        model, tokenizer, [5] * 10, max_tokens=tokens, draft_model=draft, num_draft_tokens=4
    )
    assert len([step.token for step in steps]) >= tokens
    model.flash.close()


def test_a_cache_is_watched_once(model):
    """However many tokens it is filled with."""
    import weakref

    before = len(weakref.finalize._registry)
    cache = make_prompt_cache(model)
    for _ in range(20):
        fill(model, cache, 1)
    assert len(weakref.finalize._registry) <= before + 1
