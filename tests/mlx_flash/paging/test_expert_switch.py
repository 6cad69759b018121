"""Mixtures of experts, paged: mlx-lm's dense model of the same checkpoint says what is right.

Every family of the table that runs on the CPU, in float32, bfloat16, 4 and 8 bits, and 4 bits with
bfloat16 scales: logits of a prompt and of a step behind it are the dense model's to the bit, with
slots for a quarter, half and all of the experts. 96 greedy tokens are the same in float32 and 4
bits with slots for a quarter; make test has one of the two, by turns. The other types share all of
that but the kernels: in make test the families of ``WANTED``, one of each kind of switch module,
have 8 tokens with slots for a quarter. With ``--whole`` every family has 128 tokens in every type
with every number of slots.

Models have as many layers as it takes to have two with experts. MLX multiplies by chosen matrices
on the CPU in float32 only, unless they are quantised: for bfloat16 the tests put an equivalent
product in the place of ``mx.gather_mm``, for both models.

Then prompts that want more experts than there are slots.
"""

import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import tiny_mixtures
from support.checkpoints import MIXTURE_KINDS, dense_of, mixture_checkpoint
from support.parity import LONG, PROMPT, assert_slots_hold_their_rows, greedy, is_greedy, logits
from support.tiny_mixtures import EXPERTS, TINY_MIXTURES

from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.mixtures import MIXTURES, find_mixture, modules
from mlx_flash.models.registry import make_model
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

METAL = ("muse_spark",)  # families whose forward runs on Metal only
PAGED = sorted(set(MIXTURES) - set(METAL))
WANTED = ("deepseek_v3", "gpt_oss", "mixtral", "nemotron_h")
MAIN = ("float32", "4 bit")
SHARES = (0.25, 0.5, 1.0)
# Families in which two layers have experts, and those whose config is for four layers or none.
TWO = ("deepseek_v41", "gemma4", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid")
TWO += ("hunyuan", "longcat_flash", "longcat_flash_ngram", "mellum", "minimax", "mixtral", "olmoe")
TWO += ("phimoe", "phixtral", "qwen2_moe", "qwen3_vl_moe")
AS_IT_IS = ("jamba", "kimi_linear", "llama4", "minimax_m3_vl", "nemotron_h", "qwen3_5_moe")
AS_IT_IS += ("qwen3_next",)


def few_layers(model_type):
    """Keys of a config with as few layers as it takes to have two with experts."""
    if model_type in AS_IT_IS:
        return {}
    layers = 2 if model_type in TWO else 3

    def shortened(config):
        new = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == 4}
        new |= {k: layers for k in ("num_hidden_layers", "num_layers") if k in config}
        if "text_config" in config:
            new["text_config"] = config["text_config"] | shortened(config["text_config"])
        return new

    return shortened(TINY_MIXTURES[model_type])


def gather_mm(a, b, lhs_indices=None, rhs_indices=None, *, sorted_indices=False, **_):
    """What mx.gather_mm computes for the switch layers, of any type."""
    assert lhs_indices is None
    return a @ b[rhs_indices]


# Every family


def cases():
    """Every family in every type; make test has the main types by turns, and all of some."""
    for (number, family), kind in itertools.product(enumerate(PAGED), MIXTURE_KINDS):
        later = family not in WANTED and kind != MAIN[number % 2]
        yield pytest.param(family, kind, marks=[pytest.mark.whole] if later else [])


@pytest.mark.deeper
@pytest.mark.parametrize(("family", "kind"), cases())
def test_same_as_dense(tmp_path, reads, monkeypatch, request, family, kind):
    whole = request.config.getoption("--whole")
    if kind == "bfloat16":
        monkeypatch.setattr(mx, "gather_mm", gather_mm)
        monkeypatch.setattr(
            "mlx_flash.runtime.pagers.back_end.check_back_end", lambda directory: None
        )
    source = mixture_checkpoint(tmp_path, family, kind, **few_layers(family))
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    assert directory.unit == "expert"
    dense = dense_of(source)
    count = 128 if whole else 96 if kind in MAIN else 8
    tokens, expected = greedy(dense, count) if whole else [], logits(dense)
    shares = SHARES if kind in MAIN or whole else (0.25,)
    for share in shares:
        model = load_model(directory, PagingOptions(cache_share=share))
        slots = {layer: round(share * EXPERTS) for layer in range(len(directory.rows.layers))}
        assert model.flash.plan.slots == (slots if share < 1 else {})
        assert mx.array_equal(logits(model), expected), f"logits at share {share}"
        if whole or share == 0.25:
            found = greedy(model, count)
            assert len(found) == count and len(set(found)) > 1
            assert found == tokens if whole else is_greedy(dense, found), f"tokens at share {share}"
        model.flash.close()


def test_every_family_has_two_layers_of_experts():
    """What few_layers leaves is more than one layer, else layers could not be mixed up."""
    for family in PAGED:
        config = tiny_mixtures.config(family, **few_layers(family))
        assert len(modules(make_model(config), find_mixture(config))) >= 2, family


# More experts than slots


@pytest.mark.parametrize("share", [0.01, 0.25, 0.75])
def test_long_prompt_reads_every_expert_once(made, reads, share):
    """More experts than slots: they pass in rounds, each read once a layer, then some are kept."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share))
    layers = directory.rows.layers
    cache = make_prompt_cache(model)
    found = model(mx.array([LONG]), cache=cache)
    mx.eval(found)
    stats = model.flash.stats()
    asked = EXPERTS * len(layers)
    assert stats.predicted == stats.misses == asked, "a prompt that does not want all experts"
    assert stats.hits == 0
    assert stats.bytes_read == sum(directory.rows.layer_bytes(i) for i in range(len(layers)))
    assert mx.array_equal(found, dense(mx.array([LONG]), cache=make_prompt_cache(dense)))
    slots = model.flash.plan.slots[0]
    assert assert_slots_hold_their_rows(model) == slots * len(layers)

    model(mx.array([LONG]), cache=make_prompt_cache(model))
    again = model.flash.stats() - stats
    assert (again.hits, again.misses) == (slots * len(layers), asked - slots * len(layers))
    assert again.bytes_read == again.misses * layers[0].layout.stride
    assert greedy(model, 32, prompt=LONG) == greedy(dense, 32, prompt=LONG)
    model.flash.close()


def test_fewer_slots_than_experts_of_a_token(made, reads):
    """One slot, two experts a token."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.01))
    assert set(model.flash.plan.slots.values()) == {1}
    assert greedy(model) == greedy(dense)
    stats = model.flash.stats()
    assert stats.hits > 0
    assert stats.hits + stats.misses == stats.predicted
    assert assert_slots_hold_their_rows(model) == len(directory.rows.layers)
    model.flash.close()


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_batch(made, reads, share):
    """Three sequences at once, a prompt and then steps."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share))
    prompts = mx.array([PROMPT, PROMPT[::-1], [t + 1 for t in PROMPT]])
    caches = make_prompt_cache(model), make_prompt_cache(dense)
    x = prompts
    for _ in range(4):
        found, expected = model(x, cache=caches[0]), dense(x, cache=caches[1])
        assert mx.array_equal(found, expected)
        x = mx.argmax(expected[:, -1:], axis=-1)
    model.flash.close()


def test_one_generation_after_the_other(made, reads):
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.25))
    for prompt in (PROMPT, LONG, PROMPT[:1], PROMPT):
        assert greedy(model, 40, prompt=prompt) == greedy(dense, 40, prompt=prompt)
    assert_slots_hold_their_rows(model)
    model.flash.close()


@pytest.mark.parametrize(
    ("policy", "lookahead"),
    [("window", False), ("lru", False), ("lru", True), ("lfu", False), ("lfu", True)],
)
def test_hits_and_misses_are_what_was_asked_for(made, reads, policy, lookahead):
    directory, dense = made
    model = load_model(
        directory, PagingOptions(cache_share=0.5, policy=policy, lookahead=lookahead)
    )
    assert greedy(model, 40) == greedy(dense, 40)
    stats = model.flash.stats()
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.hits + stats.misses == stats.predicted
    assert stats.layer_calls == stats.forwards * len(directory.rows.layers)
    stride = directory.rows.layout.stride
    if not stats.foretold:
        assert stats.bytes_read == stats.misses * stride
    assert_slots_hold_their_rows(model)
    model.flash.close()
