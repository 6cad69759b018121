"""Budgets on real directories, contexts, what loading refuses."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import batch_generate, stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from support.platforms import fix_memory
from support.tiny import make_checkpoint

from mlx_flash import load
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime import cache_limit as limits
from mlx_flash.runtime.kv_policy import PlainKV
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.memory_plan import least_budget, plan_for
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

WIDE = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Sixteen layers of 3 MB, so that budgets have something to choose from."""
    path = tmp_path_factory.mktemp("model")
    source = make_checkpoint(path / "hf", "llama", "bfloat16", layers=16, **WIDE)
    return ModelDirectory(convert(str(source), path / "flash"))


def needs(directory, context=64):
    gc.collect()
    return memory_requirements(directory, RowReader(directory.rows), PagingOptions(context=context))


def test_budgets_change_what_is_kept_not_the_tokens(directory):
    load_tokenizer(directory)  # what it imports is a part of the process from now on
    texts, kept = set(), []
    for share in (0.1, 0.6, 1.5):
        need = needs(directory)
        least = least_budget(need, PagingOptions())
        ram = int(least + share * (need.dense - least))
        model, tokenizer = load(directory.path, ram=ram, context=64)
        steps = stream_generate(model, tokenizer, [5, 6, 7], max_tokens=24)
        texts.add(tuple(step.token for step in steps))
        kept.append(len(model.flash.plan.kept))
        assert model.flash.plan.total <= ram
        model.flash.close()
        del model, steps
        mx.clear_cache()
    assert len(texts) == 1
    assert kept == sorted(set(kept))
    assert kept[-1] == 16


def test_refuses_to_outgrow_the_context(directory):
    model = load_model(
        directory, PagingOptions(ram=current_platform().machine_bytes() // 2, context=300)
    )
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 200), mx.int32), cache)
    with pytest.raises(BudgetError, match=r"301 tokens are more than the context of 300"):
        model(mx.zeros((1, 101), mx.int32), cache)
    with pytest.raises(BudgetError, match=r"304 tokens"):
        batch_generate(model, load_tokenizer(directory), [[5] * 39] * 8, max_tokens=10)
    free = load_model(directory, PagingOptions(kept_share=0.5))
    free(mx.zeros((1, 600), mx.int32), cache=make_prompt_cache(free))


@pytest.mark.whole
def test_workspace_covers_what_mlx_takes(directory):
    """Peak memory of a prompt chunk, as MLX counts it, against the plan's figure."""
    model = load_model(directory, PagingOptions(kept_share=1.0, context=512))
    need = needs(directory, 512)
    limit = mx.set_cache_limit(0)
    try:
        for step in (16, 256):
            model.flash.plan = model.flash.plan.replace(step=step)
            cache = make_prompt_cache(model)
            model(mx.zeros((1, 256), mx.int32), cache=cache)
            mx.eval([c.state for c in cache])
            gc.collect()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            model(mx.zeros((1, 256), mx.int32), cache=cache)
            mx.eval([c.state for c in cache])
            grown = PlainKV(directory).bytes(512)
            assert mx.get_peak_memory() - before <= need.workspace(step) + grown
    finally:
        mx.set_cache_limit(limit)


def test_dense_within_a_budget(directory):
    with pytest.raises(BudgetError, match="the dense model needs"):
        load(directory.path, ram=needs(directory).dense - 20 * 10**6, use_flash=False, context=64)


def test_a_dense_model_keeps_to_its_context(directory):
    ram = current_platform().machine_bytes() // 2
    options = PagingOptions(ram=ram, use_flash=False, context=64)
    model = load_model(directory, options)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 60), mx.int32), cache=cache)
    with pytest.raises(BudgetError, match="65 tokens are more than the context of 64"):
        model(mx.zeros((1, 5), mx.int32), cache=cache)
    free = load_model(directory, PagingOptions(use_flash=False, context=64))
    free(mx.zeros((1, 300), mx.int32), cache=make_prompt_cache(free))


@pytest.mark.whole
def test_a_dense_model_takes_prompts_in_chunks_that_its_budget_has_room_for(directory, monkeypatch):
    fix_memory(monkeypatch, 100_000_000)
    need = needs(directory, 500)
    options = PagingOptions(ram=need.dense + 10**6, use_flash=False, context=500)
    plan = plan_for(need, options, current_platform().machine_bytes())
    assert plan.total <= options.ram and 128 <= plan.step < 400
    model = load_model(directory, options)
    seen = []
    inner = model.model.layers[0]

    class Watched(nn.Module):
        def __call__(self, x, *args, **kwargs):
            seen.append(x.shape[1])
            return inner(x, *args, **kwargs)

        use_sliding = False

    whole = load_model(directory, PagingOptions(use_flash=False))
    prompt = mx.arange(400)[None] % 250
    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    model.model.layers[0] = Watched()
    found, expected = model(prompt, cache=cache), whole(prompt, cache=other)
    assert sum(seen) == 400 and len(seen) > 1
    assert mx.argmax(found[0, -1]) == mx.argmax(expected[0, -1])
    assert mx.allclose(found, expected, atol=0.2)


def cache_limit():
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


def test_closing_gives_mlx_its_cache_back(directory, monkeypatch):
    monkeypatch.setattr(limits, "_limit", limits._Limit())  # other tests' models do not count
    before = mx.set_cache_limit(100 << 20)
    options = PagingOptions(ram=current_platform().machine_bytes() // 2, context=64)
    try:
        one, two = load_model(directory, options), load_model(directory, options)
        assert cache_limit() == limits.MLX_CACHE
        one.flash.close()
        one.flash.close()
        assert cache_limit() == limits.MLX_CACHE, "the other one needs it still"
        two.flash.close()
        assert cache_limit() == 100 << 20
        load_model(directory, options.replace(use_flash=False))
        gc.collect()
        assert cache_limit() == 100 << 20, "a dense model gives it back when it is collected"
        third = load_model(directory, options)
        mx.set_cache_limit(50 << 20)
        third.flash.close()
        assert cache_limit() == 50 << 20, "what somebody set meanwhile stays"
        monkeypatch.setattr("mlx_flash.runtime.paged_model.PagedModel.start", 1 / 2)
        with pytest.raises(FlashError):
            load_model(directory, options)
        assert cache_limit() == 50 << 20
    finally:
        mx.set_cache_limit(before)


def test_a_share_of_a_cache_that_there_is_not(directory):
    """Nothing is predicted of SwiGLU, so there are no slots to share out."""
    with pytest.raises(BudgetError, match=r"predictor 'auto'; give kept_share instead"):
        load(directory.path, cache_share=0.2)
    with pytest.raises(BudgetError, match="predictor 'none'; give kept_share instead"):
        load(directory.path, cache_share=0.2, predictor="none")


@pytest.mark.parametrize("ram", ["plenty", "1KB", current_platform().machine_bytes() + 1])
def test_bad_budgets(directory, ram):
    with pytest.raises(BudgetError):
        load(directory.path, ram=ram)


def test_bad_shares_and_contexts(directory):
    with pytest.raises(BudgetError, match="from 0 to 1"):
        load(directory.path, kept_share=1.5)
    with pytest.raises(BudgetError, match="at least one token"):
        load(directory.path, context=0)


def test_layer_count_of_the_config_against_the_file(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    out = convert(str(source), tmp_path / "flash")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="3 layers"):
        load(out)


def test_resident_weight_missing(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    out = convert(str(source), tmp_path / "flash")
    weights = mx.load(str(out / "model.safetensors"))
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(out / "model.safetensors"), weights)
    with pytest.raises(FlashError):
        load(out)


def test_errors_derive_from_one_base(tmp_path):
    with pytest.raises(FlashError, match="no such model directory"):
        load(tmp_path / "nowhere")


def test_threads_take_turns(directory):
    """Two threads at once on one paged model give what each gives alone."""
    model = load_model(directory, PagingOptions(kept_share=0.3))

    def run(prompt):
        stream = mx.new_stream(mx.default_device())
        return [t for t, _ in generate_step(mx.array(prompt), model, stream, max_tokens=12)]

    prompts = [[5, 6, 7], [90, 8, 33, 2]]
    alone = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, prompts)) == alone


def test_refused_loads_let_go_of_the_file(directory):
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(BudgetError):
            load(directory.path, ram="1MB")
    gc.collect()
    assert len(list(Path("/dev/fd").iterdir())) <= before


def test_config_that_was_changed(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    out = convert(str(source), tmp_path / "flash")
    config = json.loads((out / "config.json").read_text())
    del config["hidden_size"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashError, match="hidden_size"):
        load(out)
