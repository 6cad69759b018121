"""Keys of a header as settings: what is read, what is implied, what is refused by name."""

import pytest
from fixtures.gguf_files import ARCHS, converted, golden, metadata, vocabulary, write

from mlx_flash.conversion.gguf.checkpoint import GGUFCheckpoint
from mlx_flash.errors import ModelError


@pytest.fixture
def opened(tmp_path):
    """``opened(case, **changes)``: a case with other keys; None leaves one out."""

    def make(name, changes, without=()):
        case = golden(name)
        arch = ARCHS[case.config["model_type"]]
        keys = metadata(case.config) | changes
        meta = {f"{arch}.{key}": value for key, value in keys.items() if value is not None}
        tensors = converted(case.config, case.weights)
        tensors = {key: value for key, value in tensors.items() if key not in without}
        path = write(tmp_path / "x.gguf", arch, meta | vocabulary(64), tensors)
        return GGUFCheckpoint(path).config

    return make


REFUSED = {
    "an unknown key": ("qwen3", {"new.thing": 3}, r"cannot honour: qwen3\.new\.thing = 3"),
    "a window": ("olmo2", {"attention.sliding_window": 8}, "olmo2.attention.sliding_window = 8"),
    "a scale": ("qwen2", {"logit_scale": 0.5}, "qwen2.logit_scale = 0.5"),
    "gating": ("qwen3moe", {"expert_gating_func": 2}, "qwen3moe.expert_gating_func = 2"),
    "norming": ("qwen2moe", {"expert_weights_norm": True}, "qwen2moe.expert_weights_norm = True"),
    "heads": (
        "qwen2",
        {"attention.key_length": 16, "attention.value_length": 16},
        "size 16 in",
    ),
    "values": ("qwen3", {"attention.value_length": 8}, "values of size 8"),
    "part of a head": ("qwen3", {"rope.dimension_count": 6}, "rope over 6"),
    "pattern": (
        "gemma3",
        {"attention.sliding_window_pattern": [True, False, False, True, True, False]},
        "expected every n-th layer",
    ),
    "extrapolation": ("qwen2", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(opened, name):
    case, changes, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        opened(case, changes)


NEUTRAL = {
    "qwen3moe": {"expert_weights_norm": True, "expert_gating_func": 1, "expert_weights_scale": 1.0},
    "qwen2": {"rope.scaling.attn_factor": 1.0, "attention.sliding_window": 0},
    "mixtral": {"expert_weights_norm": True, "rope.scaling.finetuned": False},
    "llama": {"tensor_data_layout": "Meta AI original pth", "attention.causal": True},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_that_change_nothing(opened, name):
    assert opened(name, NEUTRAL[name]) == opened(name, {})


def test_patterns_of_windows(opened):
    flags = [True] * 5 + [False]
    assert opened("gemma3", {})["sliding_window_pattern"] == 6
    assert opened("gemma3", {"attention.sliding_window_pattern": flags}) == opened("gemma3", {})
    assert opened("gemma3", {"attention.sliding_window": 0})["sliding_window_pattern"] == 1
    config = opened("gpt-oss", {"attention.sliding_window_pattern": [True, False]})
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config == opened("gpt-oss", {})


def test_factors_of_attention(opened):
    usual = opened("phi3-longrope", {})["rope_scaling"]
    assert "attention_factor" not in usual and usual["long_factor"] == [1.0, 1.5, 2.5, 4.0]
    other = opened("phi3-longrope", {"rope.scaling.attn_factor": 1.5})["rope_scaling"]
    assert other == usual | {"attention_factor": 1.5}
    yarn = opened("qwen2", {"rope.scaling.yarn_attn_factor": 1.5})["rope_scaling"]
    assert yarn["attention_factor"] == 1.5


def test_longrope_needs_both_lists(opened):
    with pytest.raises(ModelError, match="expected both rope_factors_long"):
        opened("phi3-longrope", {}, without=["rope_factors_short.weight"])


def test_biases_and_layers_are_told_by_tensors(opened):
    config = opened("llama", {})
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert "attention_bias" not in opened("llama-linear", {})
    stablelm = opened("stablelm", {"use_parallel_residual": True})
    assert (stablelm["use_parallel_residual"], stablelm["use_qkv_bias"]) == (False, True)
    twelve = opened("stablelm-12b", {})
    assert (twelve["use_parallel_residual"], twelve["qk_layernorm"]) == (True, True)


def test_the_largest_gemmas_scale_queries_by_their_width(opened):
    with pytest.raises(ModelError, match="46 layers; missing"):
        opened("gemma2", {"block_count": 46})
    assert opened("gemma2", {})["query_pre_attn_scalar"] == 16


def test_lengths_of_experts_that_old_files_leave_out(opened):
    left_out = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}
    with pytest.raises(ModelError, match=r"contradict the metadata .*ffn_gate_exps"):
        opened("qwen2moe", left_out)
    with pytest.raises(ModelError, match=r"expected \(3, 8, 32\)"):
        opened("qwen2moe", left_out | {"feed_forward_length": 16})
