"""KV policies: what caches take and hold, which models they are for, and the tokens they give."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from support.tiny import make_checkpoint

from mlx_flash import load
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, CacheError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import FAMILIES
from mlx_flash.models.registry import DECODERS, make_model
from mlx_flash.runtime import kv_policy
from mlx_flash.runtime.kv_policy import KVKind, PlainKV, RotatingKV, check_kv, make_kv_policy
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A llama with heads of 32 numbers."""
    path = tmp_path_factory.mktemp("model")
    source = make_checkpoint(path / "hf", "llama", "float32", hidden_size=128, head_dim=32)
    return ModelDirectory(convert(source, path / "flash"))


def ram():
    return current_platform().machine_bytes() // 2


def run(model, cache, tokens, chunk=75):
    """Logits of tokens, put in so many at a time."""
    found = []
    for at in range(0, len(tokens), chunk):
        found.append(model(mx.array([tokens[at : at + chunk]]), cache=cache))
        mx.eval(found[-1], [c.state for c in cache])
    return mx.concatenate(found, axis=1)


def nbytes(cache):
    return sum(a.nbytes for c in cache for _, a in tree_flatten(c.state) if hasattr(a, "nbytes"))


TEXT = [(7 * i) % 250 + 3 for i in range(300)]


def families():
    """All of them; make test has every sixth, and those of this package."""
    for number, family in enumerate(sorted(FAMILIES)):
        later = number % 6 and family not in DECODERS
        yield pytest.param(family, marks=[pytest.mark.whole] if later else [])


@pytest.mark.parametrize("family", families())
def test_every_family(tmp_path, family):
    """Bytes cover the real cache; a rotating one that drops nothing changes nothing."""
    source = make_checkpoint(tmp_path / "hf", family, "float32")
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    model = load_model(directory, PagingOptions(kept_share=1.0))
    cache = make_prompt_cache(model)
    expected = run(model, cache, TEXT)
    real = nbytes(cache)
    assert real <= PlainKV(directory).bytes(300) <= 8 * real + 2**20
    if any(type(c) is not KVCache for c in cache):
        for spec in ("rotating:400", "quantized:8"):
            with pytest.raises(ModelError, match=f"{spec}.*have .*Cache.*; use 'plain'"):
                load_model(directory, PagingOptions(kv=spec))
        return
    model = load_model(directory, PagingOptions(kept_share=1.0, kv="rotating:400"))
    cache = make_prompt_cache(model)
    assert mx.allclose(run(model, cache, TEXT), expected, atol=1e-4), family
    assert {type(c) for c in cache} == {RotatingKVCache}
    assert nbytes(cache) <= RotatingKV(directory, 400).bytes(300)


@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "persimmon", "gpt_neox"])
def test_quantised_caches(tmp_path, family):
    sizes = {"hidden_size": 128, "head_dim": 32} if family == "llama" else {"hidden_size": 128}
    if family == "opt":
        sizes["word_embed_proj_dim"] = 128
    if family == "gpt_neox":
        sizes["intermediate_size"] = 512
    source = make_checkpoint(tmp_path / "hf", family, "float32", **sizes)
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    plain = load_model(directory, PagingOptions(kept_share=0.5))
    cache = make_prompt_cache(plain)
    expected, before = run(plain, cache, TEXT), nbytes(cache)
    losses = []
    for bits in (8, 4):
        options = PagingOptions(kept_share=0.5, kv=f"quantized:{bits}")
        model = load_model(directory, options)
        cache = make_prompt_cache(model)
        losses.append(mx.abs(run(model, cache, TEXT) - expected).max().item())
        assert {type(c) for c in cache} == {QuantizedKVCache}
        needed = make_kv_policy(options.kv, directory).bytes(300)
        assert nbytes(cache) < before * (bits + 2.1) / 32, "2 floats of 32 bits to 32 numbers"
        assert nbytes(cache) <= needed < PlainKV(directory).bytes(300)
    assert losses[0] < losses[1]
    assert losses[0] < 0.05 * mx.abs(expected).max().item()


def test_heads_that_no_group_divides(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    with pytest.raises(ModelError, match="of a multiple of 32 numbers, this model's have 16"):
        load_model(directory, PagingOptions(kv="quantized:8"))


def test_attention_that_takes_arrays_only(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "phi", "float32", hidden_size=128)
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    message = r"'quantized:8' does not work with models of type phi \(.*'tuple'.*; use 'plain'"
    with pytest.raises(ModelError, match=message):
        load_model(directory, PagingOptions(kv="quantized:8"))


def test_a_bounded_cache_runs_past_the_context(wide):
    """In text; what it holds, and a chunk more while one goes in, stays within."""
    options = PagingOptions(ram=ram(), context=100, kv="rotating:32")
    model = load_model(wide, options)
    model.flash.plan = model.flash.plan.replace(step=16)
    cache = make_prompt_cache(model)
    model(mx.array([TEXT[:250]]), cache=cache)
    for token in TEXT[:5]:
        model(mx.array([[token]]), cache=cache)
    assert cache[0].offset == 255
    assert max(c.keys.shape[2] for c in cache) <= 32 + 15
    with pytest.raises(BudgetError, match="120 tokens"):
        model(mx.array([TEXT[:30]] * 4), cache=make_prompt_cache(model))
    model.flash.close()


def test_a_bounded_cache_of_the_users_own(wide):
    """mlx-lm's, under the plain policy: its offset is no measure of what it holds."""
    model = load_model(wide, PagingOptions(ram=ram(), context=64))
    model.flash.plan = model.flash.plan.replace(step=16)
    own = [RotatingKVCache(max_size=40, keep=4) for _ in model.layers]
    for at in range(0, 200, 10):
        model(mx.array([TEXT[at : at + 10]]), cache=own)
    too_large = [RotatingKVCache(max_size=60, keep=4) for _ in model.layers]
    with pytest.raises(BudgetError, match="75 tokens are more than the context of 64"):
        model(mx.array([TEXT[:90]]), cache=too_large)
    del own, too_large  # what they hold would count
    plain = make_prompt_cache(model)
    model(mx.array([TEXT[:60]]), cache=plain)
    with pytest.raises(BudgetError, match="65 tokens are more than the context of 64"):
        model(mx.array([TEXT[:5]]), cache=plain)
    model.flash.close()


def test_the_plan_has_the_policys_bytes(wide):
    totals = []
    for spec in ("plain", "quantized:4", "rotating:64"):
        model = load_model(wide, PagingOptions(ram=ram(), context=20_000, kv=spec))
        plan = model.flash.plan
        totals.append(plan.bytes_of("kv_cache"))
        assert totals[-1] == make_kv_policy(spec, wide).bytes(20_000)
        model.flash.close()
    assert totals[0] > 4 * totals[1] > 4 * totals[2]


def test_users_load_with_a_policy(wide):
    texts = []
    for spec in ("plain", "rotating:200", "quantized:8"):
        model, tokenizer = load(wide.path, kv=spec, kept_share=0.5)
        steps = stream_generate(model, tokenizer, TEXT[:40], max_tokens=24)
        texts.append([step.token for step in steps])
        assert len(texts[-1]) == 24
    assert texts[0] == texts[1]
    model, tokenizer = load(wide.path, kv="rotating:200", kept_share=0.5)
    assert len(batch_generate(model, tokenizer, [TEXT[:9], TEXT[:5]], max_tokens=4).texts) == 2


def test_a_state_counts_no_tokens(tmp_path):
    """Of a family with a state only what one call brings is held against the context."""
    source = make_checkpoint(tmp_path / "hf", "granitemoehybrid", "float32")
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    policy = PlainKV(directory)
    assert policy.held(None, 7) == policy.held([], 7) == 7
    cache = make_prompt_cache(make_model(directory.config))
    assert policy.held([c for c in cache if not hasattr(c, "offset")], 5) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tova", "KV policy 'tova'; expected one of plain, rotating, quantized"),
        ("plain:3", "plain takes no number; leave '3' out"),
        ("rotating", "expected rotating:SIZE, a number of tokens above 4"),
        ("rotating:4", "expected rotating:SIZE"),
        ("rotating:-9", "expected rotating:SIZE"),
        ("quantized:5", "expected quantized:BITS, one of 2, 3, 4, 6, 8"),
        ("quantized:x", "expected quantized:BITS"),
    ],
)
def test_specs_that_are_refused(spec, message):
    for check in (check_kv, lambda kv: PagingOptions(kv=kv)):
        with pytest.raises(CacheError, match=message):
            check(spec)


def test_another_policy_is_a_class_and_an_entry(wide, monkeypatch):
    """As CONTRIBUTING says: every second token is forgotten."""

    class Forgetful(KVCache):
        def update_and_fetch(self, keys, values):
            keys, values = super().update_and_fetch(keys, values)
            return keys[:, :, -8:], values[:, :, -8:]

    class ForgetfulKV(kv_policy.OverPlainKV):
        def __init__(self, directory):
            super().__init__(directory, "forgetful")

        def other(self):
            return Forgetful()

    monkeypatch.setitem(kv_policy.KV_POLICIES, "forgetful", KVKind(ForgetfulKV))
    model = load_model(wide, PagingOptions(kv="forgetful", kept_share=0.5))
    cache = make_prompt_cache(model)
    for token in TEXT[:20]:
        model(mx.array([[token]]), cache=cache)
    assert {type(c) for c in cache} == {Forgetful}
    assert json.loads(json.dumps(PagingOptions(kv="forgetful").to_json()))["kv"] == "forgetful"
