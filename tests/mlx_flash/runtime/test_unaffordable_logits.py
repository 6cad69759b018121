"""Logits of every token of a prompt, under budgets with and without room for them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from support.platforms import fix_memory
from support.tiny import make_checkpoint

from mlx_flash import load
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.memory_plan import least_budget
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.unaffordable_logits import UnaffordableLogits
from mlx_flash.storage.reader import RowReader

VOCABULARY, PROMPT = 20_000, 392


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logits")
    source = make_checkpoint(
        folder / "hf", "llama", layers=3, vocab_size=VOCABULARY, hidden_size=32, head_dim=8
    )
    return convert(source, folder / "m")


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    fix_memory(monkeypatch, process=100_000_000, machine=8_000_000_000)


@pytest.fixture
def least(path):
    directory, options = ModelDirectory(path), PagingOptions(context=420)
    reader = RowReader(directory.rows)
    found = least_budget(memory_requirements(directory, reader, options), options)
    reader.close()
    return found


def test_with_and_without_room(path, least):
    prompt = mx.array([[(7 * i) % 250 for i in range(PROMPT)]])
    plenty, tokenizer = load(path, ram=7_000_000_000, context=420)
    tight, _ = load(path, ram=least, context=420)
    assert tight.flash.plan.step < PROMPT
    expected = plenty(prompt, cache=make_prompt_cache(plenty))
    assert isinstance(expected, mx.array) and expected.shape == (1, PROMPT, VOCABULARY)
    found = tight(prompt, cache=make_prompt_cache(tight))
    assert isinstance(found, UnaffordableLogits) and found.shape == expected.shape
    assert mx.allclose(found[:, -1], expected[:, -1], atol=1e-4)
    assert mx.allclose(found[:, -1:, :5], expected[:, -1:, :5], atol=1e-4)
    uses = (
        np.array,
        list,
        lambda a: a[0],
        lambda a: a[:, 0],
        lambda a: a[:, -2:],
        lambda a: a.sum(),
    )
    for use in uses:
        with pytest.raises(BudgetError, match=r"logits of 392 tokens take 62\.\d MB"):
            use(found)
    del found
    short = tight(prompt[:, :20], cache=make_prompt_cache(tight))
    assert isinstance(short, mx.array) and short.shape == (1, 20, VOCABULARY)
    texts = []
    for model in (plenty, tight):
        tokenizer.eos_token_ids = set()
        steps = stream_generate(model, tokenizer, prompt[0].tolist(), max_tokens=4)
        texts.append([step.token for step in steps])
        model.flash.close()
    assert texts[0] == texts[1]
