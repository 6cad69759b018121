"""Every entry of the table of mixtures, held against the model it describes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model, load_tokenizer
from support import tiny, tiny_mixtures

from mlx_flash.errors import ModelError
from mlx_flash.models import families, mixtures
from mlx_flash.models.families import FAMILIES
from mlx_flash.models.mixtures import MIXTURES, Mixture

METAL = ("muse_spark",)  # families whose forward runs on Metal only
PROMPT = [5, 6, 7, 8, 9, 10]


def load(path, model_type, **overrides):
    tiny_mixtures.make_mixture(path, model_type, **overrides)
    return load_model(path)


class Recorder:
    """What a model's switch modules are asked for, and what its routers see, by decoder layer."""

    def __init__(self, monkeypatch, model, mixture):
        self.chosen, self.hidden = {}, {}
        for index, _, switch in mixtures.modules(model, mixture):
            self._record(monkeypatch, switch, self.chosen, index, 1)
            if mixture.router:
                router = mixture.router
                path = router.module.rpartition(".")[0] if router.scale else router.module
                owner = mixtures._get(model.layers[index], path)
                self._record(monkeypatch, owner, self.hidden, index, 0)

    @staticmethod
    def _record(monkeypatch, module, calls, index, argument):
        function, calls[index] = type(module).__call__, []

        def call(called, *args):
            if called is module:
                value = args[argument]
                calls[index].append(np.array(value.reshape(-1, value.shape[-1])))
            return function(called, *args)

        monkeypatch.setattr(type(module), "__call__", call)


def test_tiny_has_every_mixture():
    assert set(tiny_mixtures.TINY_MIXTURES) == set(MIXTURES)


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_mixture(model_type, tmp_path, monkeypatch):
    model, config = load(tmp_path, model_type)
    mixture = mixtures.find_mixture(config)
    assert mixture is MIXTURES[model_type]
    found = mixtures.modules(model, mixture)
    mixtures.check_counts(config, mixture, mixtures.counts_of(found, mixture))
    named = dict(model.named_modules())
    switches = {p for p, m in named.items() if isinstance(m, SwitchGLU | SwitchMLP)}
    assert {path for _, path, _ in found} == switches
    for index, path, module in found:
        assert named[path] is module
        assert f".{index}.{mixture.module}" in path
    if model_type in METAL:
        return
    load_tokenizer(tmp_path)
    recorder = Recorder(monkeypatch, model, mixture)
    tokens = [t for t, _ in generate_step(mx.array(PROMPT), model, max_tokens=8)]
    assert len(tokens) == 8
    assert all(0 <= t < tiny.VOCAB for t in tokens)
    assert len(set(tokens)) > 1
    chosen = {index: np.concatenate(calls) for index, calls in recorder.chosen.items()}
    check_chosen(chosen, config, mixture)
    monkeypatch.undo()
    for index, calls in recorder.hidden.items():
        hidden = np.concatenate(calls)
        check_guess(model.layers[index], mixture, hidden, chosen[index], config)


def check_chosen(chosen, config, mixture):
    """Every module runs, with as many experts as the config says, and not always the same."""
    experts, top_k = mixtures.expert_counts(config, mixture)
    assert experts == tiny_mixtures.EXPERTS
    assert top_k == (1 if config["model_type"] == "llama4" else 2)
    for indices in chosen.values():
        assert indices.shape[1] == top_k
        assert indices.min() >= 0
        assert indices.max() < experts
    assert max(len(np.unique(indices)) for indices in chosen.values()) >= 3


def check_guess(layer, mixture, hidden, chosen, config):
    """The largest scores are the experts chosen: all of them, if no groups are chosen first."""
    scores = np.array(mixtures.router_of(layer, mixture)(mx.array(hidden)))
    guess = np.argsort(-scores, axis=-1)[:, : chosen.shape[1]]
    guess = np.where(guess >= tiny_mixtures.EXPERTS, 0, guess)  # of LongCat, not experts
    hits = np.mean([len(set(g) & set(c)) / len(set(c)) for g, c in zip(guess, chosen, strict=True)])
    nested = config | (config.get("text_config") or {})
    assert hits >= (0.5 if (nested.get("n_group") or 1) > 1 else 0.99)


@pytest.mark.parametrize(
    ("model_type", "bits", "group_size", "mode"),
    [
        ("mixtral", 4, 64, "affine"),
        ("mixtral", 8, 32, "affine"),
        ("qwen3_moe", 4, 32, "affine"),
        ("qwen3_moe", 8, 64, "affine"),
        ("gpt_oss", 4, 32, "mxfp4"),
        ("gpt_oss", 4, 64, "affine"),
        ("gpt_oss", 8, 32, "affine"),
        ("deepseek_v3", 4, 64, "affine"),
        ("deepseek_v3", 8, 32, "affine"),
        ("nemotron_h", 4, 32, "affine"),
        ("nemotron_h", 8, 64, "affine"),
        ("qwen2_moe", 8, 32, "mxfp8"),
    ],
)
def test_quantised(model_type, bits, group_size, mode, tmp_path):
    plain = {} if mode != "affine" or model_type != "gpt_oss" else {"quantization_config": None}
    tiny_mixtures.make_mixture(tmp_path / "in", model_type, **plain)
    path = tiny_mixtures.quantised(tmp_path / "in", tmp_path / "out", bits, group_size, mode)
    model, config = load_model(path)
    load_tokenizer(path)
    mixture = mixtures.find_mixture(config)
    found = mixtures.modules(model, mixture)
    mixtures.check_counts(config, mixture, mixtures.counts_of(found, mixture))
    for _, _, module in found:
        for name in mixture.projections:
            linear = module[name]
            assert (linear.bits, linear.group_size, linear.mode) == (bits, group_size, mode)
    assert len(list(generate_step(mx.array(PROMPT), model, max_tokens=3))) == 3


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("deepseek_v41_text", None, "deepseek_v41"),
        ("gemma4_unified", None, "gemma4"),
        ("joyai_llm_flash", None, "deepseek_v3"),
        ("kimi_k2", "DeepseekV3ForCausalLM", "deepseek_v3"),
        ("llava", None, "mistral3"),
        ("minimax_m2", None, "minimax"),
        ("phi-msft", None, "phixtral"),
        ("bailing_hybrid", "BailingMoeV2_5ForCausalLM", "bailing_hybrid"),
        ("bailing_hybrid", "BailingMoeV3ForCausalLM", "bailing_moe_v3"),
    ],
)
def test_entry_is_that_of_what_mlx_lm_runs(model_type, architecture, expected):
    config = tiny_mixtures.config(expected) | {"model_type": model_type}
    if architecture:
        config["architectures"] = [architecture]
    assert mixtures.find_mixture(config) is MIXTURES[expected]


def test_table_is_all_of_mlx_lm():
    """Every module of mlx-lm that makes experts, or imports one that does, has an entry."""
    files = {f.stem: f.read_text() for f in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    found = {n for n, text in files.items() if re.search(r"= Switch(GLU|MLP)\(", text)}
    size = 0
    while size < len(found):
        size, names = len(found), "|".join(found)
        pattern = rf"^from \.({names}) import|^from \. import .*\b({names})\b"
        found |= {n for n, text in files.items() if re.search(pattern, text, re.MULTILINE)}
    dense = {"qwen3_5", "prism_hadamard_qwen35"}  # experts are qwen3_5_moe's
    assert found - dense == set(MIXTURES)


def test_gpt_oss_as_published_is_mxfp4(tmp_path):
    model, config = load(tmp_path, "gpt_oss")
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    for _, _, module in mixtures.modules(model, MIXTURES["gpt_oss"]):
        assert module.up_proj.weight.dtype == mx.uint32
        assert module.up_proj.scales.dtype == mx.uint8
        assert module.up_proj.get("biases") is None
        assert module.up_proj.bias.shape == (tiny_mixtures.EXPERTS, 64)
    assert isinstance(model.layers[0].mlp.router, nn.Linear)  # everything else is not quantised


def test_projections_may_differ_in_bits(tmp_path):
    """mlx-lm's own choice for Granite: 8 bits for down, whatever the rest has."""
    tiny_mixtures.make_mixture(tmp_path / "in", "granitemoe")
    path = tiny_mixtures.quantised(tmp_path / "in", tmp_path / "out", 4, 64)
    model, config = load_model(path)
    found = mixtures.modules(model, mixtures.find_mixture(config))
    mixture = MIXTURES["granitemoe"]
    mixtures.check_counts(config, mixture, mixtures.counts_of(found, mixture))
    assert {(m.up_proj.bits, m.down_proj.bits) for _, _, m in found} == {(4, 8)}


def test_unknown_family_has_no_entry():
    assert mixtures.find_mixture({"model_type": "qwen9"}) is None
    assert mixtures.find_mixture({}) is None
    assert mixtures.find_mixture(tiny.config("llama")) is None


@pytest.mark.parametrize("model_type", [m for m, mix in MIXTURES.items() if mix.dense])
def test_dense_member_has_no_entry(model_type):
    key, largest = MIXTURES[model_type].dense
    config = tiny_mixtures.config(model_type)
    inner = config.get("text_config", config)
    assert mixtures.find_mixture(config) is MIXTURES[model_type]
    inner = inner | {key: largest}
    dense = config | {"text_config": inner} if "text_config" in config else inner
    assert mixtures.find_mixture(dense) is None
    del inner[key]
    dense = config | {"text_config": inner} if "text_config" in config else inner
    assert mixtures.find_mixture(dense) is None


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_dense_families_have_no_entry(model_type):
    assert mixtures.find_mixture(tiny.config(model_type)) is None


def test_unknown_family_error_lists_mixtures():
    with pytest.raises(ModelError, match=r"'qwen9'.*llama.* of mixtures of .*kimi_k2.*mixtral"):
        families.find({"model_type": "qwen9"})


def test_wrong_counts_are_errors(tmp_path):
    model, config = load(tmp_path, "qwen3_moe")
    mixture = mixtures.find_mixture(config)
    found = mixtures.modules(model, mixture)
    with pytest.raises(ModelError, match=r"says 9 experts, but model\.layers\.0\..* has 8, .*3\."):
        mixtures.check_counts(
            config | {"num_experts": 9}, mixture, mixtures.counts_of(found, mixture)
        )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"num_experts": None}, "lacks its number of experts: num_experts"),
        ({"num_experts": "8"}, "num_experts .* is '8'; expected a number, 1 or more"),
        ({"num_experts": True}, "num_experts .* is True"),
        ({"num_experts": 0}, "num_experts .* is 0"),
        ({"num_experts_per_tok": None}, "lacks its number of experts per token: num_exp"),
        ({"num_experts_per_tok": 9}, "takes 9 experts per token, of 8"),
    ],
)
def test_counts_that_are_none(override, expected):
    config = tiny_mixtures.config("qwen3_moe") | override
    with pytest.raises(ModelError, match=expected):
        mixtures.expert_counts(config, MIXTURES["qwen3_moe"])


def test_experts_elsewhere_are_errors(tmp_path):
    model, config = load(tmp_path, "qwen3_moe")
    mixture = mixtures.find_mixture(config)
    with pytest.raises(ModelError, match=r"mlp of layer 0 is a Qwen3MoeSparse.*; expected a Swi"):
        mixtures.modules(model, replace(mixture, module="mlp"))
    with pytest.raises(ModelError, match=r"is a SwitchGLU; expected a SwitchMLP"):
        mixtures.modules(model, replace(mixture, gated=False))
    with pytest.raises(ModelError, match=r"where the table has none, at model\.layers\.0\.mlp\.sw"):
        mixtures.modules(model, Mixture("ffn.experts"))
    model.layers[0].more = SwitchGLU(64, 64, 2)
    with pytest.raises(ModelError, match=r"at model\.layers\.0\.more; expected them at mlp\.sw"):
        mixtures.modules(model, mixture)
    del model.layers[0].more
    model.layers[2].mlp.switch_mlp.up_proj = nn.Identity()
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.switch_mlp\.up_proj is a Identity"):
        mixtures.modules(model, mixture)
    model.layers[2].mlp.switch_mlp.up_proj = SwitchGLU(64, 64, 2).up_proj
    with pytest.raises(ModelError, match=r"different numbers .*: gate_proj of 8, up_proj of 2, d"):
        mixtures.modules(model, mixture)
    for layer in model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ModelError, match=r"no decoder layer has experts .* Qwen3MoeDecoderLayer"):
        mixtures.modules(model, mixture)
