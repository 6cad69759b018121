"""Models as transformers 5 saves them, against the golden files of make_reference.py."""

from __future__ import annotations

import pytest
from golden.reading import REFERENCE, TOLERANCE, Golden, difference, in_chunks, one_by_one, whole

from mlx_flash.conversion.convert import convert
from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.registry import get_classes
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

# Positions of their longer texts are not those of the same text's beginning.
OUTGROWN = {"llama-longrope", "phi3-quirks"}
WINDOW = 8


def test_families():
    types = {name.partition("-")[0] for name in REFERENCE}
    assert len(types) >= 50
    assert {f"{model_type}-quirks" for model_type in types} <= REFERENCE.keys()
    assert all(len(Golden(file).tokens[0]) > 3 * WINDOW for file in REFERENCE.values())


@pytest.mark.parametrize("name", REFERENCE)
def test_logits(tmp_path, name):
    """In memory: both texts in one pass, the longer one in parts. Paged: the shorter one.

    What has windows is decoded one by one, too.
    """
    golden = Golden(REFERENCE[name])
    directory = ModelDirectory(convert(golden.write(tmp_path / "hf"), tmp_path / "flash"))
    (long, short), (long_logits, short_logits) = golden.tokens, golden.logits
    dense = load_model(directory, PagingOptions(use_flash=False))
    assert difference(whole(dense, long), long_logits) <= TOLERANCE
    assert difference(whole(dense, short), short_logits) <= TOLERANCE
    if golden.config.get("sliding_window") == WINDOW:
        assert difference(one_by_one(dense, short), short_logits) <= TOLERANCE
    if name in OUTGROWN:
        with pytest.raises(ModelError, match="outgrows 16 tokens"):
            in_chunks(dense, long)
        told = load_model(directory, PagingOptions(use_flash=False, context=len(long)))
        assert difference(in_chunks(told, long), long_logits) <= TOLERANCE
    else:
        assert difference(in_chunks(dense, long), long_logits) <= TOLERANCE

    part = {"cache_share": 0.3} if directory.unit == "expert" else {"kept_share": 0.0}
    paged = load_model(directory, PagingOptions(**part))
    assert difference(whole(paged, short), short_logits) <= TOLERANCE
    assert paged.flash.stats().misses > 0
    paged.flash.close()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("apertus", "attention_bias", True),
        ("cohere", "tie_word_embeddings", False),
        ("cohere2", "tie_word_embeddings", False),
        ("cohere2", "head_dim", 12),
        ("deepseek_v2", "tie_word_embeddings", True),
        ("deepseek_v3", "rope_interleave", False),
        ("dots1", "attention_bias", True),
        ("ernie4_5_moe", "use_bias", True),
        ("gemma", "attention_bias", True),
        ("gemma", "tie_word_embeddings", False),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "final_logit_softcapping", 3.0),
        ("glm4_moe", "tie_word_embeddings", True),
        ("gpt2", "n_inner", 48),
        ("gpt2", "scale_attn_weights", False),
        ("gpt_bigcode", "multi_query", False),
        ("gpt_neox", "attention_bias", False),
        ("gpt_oss", "attention_bias", False),
        ("gpt_oss", "swiglu_limit", 1.5),
        ("gptj", "tie_word_embeddings", True),
        ("helium", "tie_word_embeddings", True),
        ("lfm2", "tie_word_embeddings", False),
        ("ministral3", "sliding_window", 8),
        ("mixtral", "head_dim", 12),
        ("olmoe", "clip_qkv", 0.8),
        ("phi", "qk_layernorm", True),
        ("phimoe", "attention_bias", False),
        ("qwen2_moe", "decoder_sparse_step", 2),
        ("qwen2_moe", "norm_topk_prob", True),
        ("qwen3", "attention_bias", True),
        ("stablelm", "tie_word_embeddings", True),
        ("starcoder2", "use_bias", False),
    ],
)
def test_refused(tmp_path, name, key, value):
    """What changes the result and is not computed; the error says what."""
    source = Golden(REFERENCE[name]).write(tmp_path / "hf", **{key: value})
    with pytest.raises(ModelError, match=f"{key} of this {name} model is {value}"):
        convert(source, tmp_path / "flash")


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_dynamic_positions(tmp_path, activation):
    """Nothing is scaled up to the limit; beyond it only a text in one pass has what it should."""
    golden = Golden(REFERENCE["llama-dynamic"])
    plain = golden.config | {"hidden_act": activation}
    theta = plain["rope_parameters"]["rope_theta"]

    def model(**settings):
        config = plain | {"rope_parameters": {"rope_theta": theta} | settings}
        model_class, args_class = get_classes(config)
        made = model_class(args_class.from_dict(config))
        made.load_weights(list(golden.weights.items()))
        return made

    unscaled, scaled = model(rope_type="default"), model(rope_type="dynamic", factor=4.0)
    tokens = (golden.tokens[0] * 2)[:40]
    assert difference(one_by_one(scaled, tokens[:32]), whole(unscaled, tokens[:32])) <= TOLERANCE
    # By the formula of dynamic NTK: the base of a text of 40 tokens, where 32 are the limit.
    grown = model(rope_type="default", rope_theta=theta * (4 * 40 / 32 - 3) ** (8 / 6))
    assert difference(whole(scaled, tokens), whole(grown, tokens)) <= TOLERANCE
    with pytest.raises(ModelError, match="outgrows 32 tokens"):
        one_by_one(scaled, tokens)
