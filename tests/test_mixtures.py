"""Every entry of the table of mixtures, held against the model it describes."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import tiny_mixtures
from mlx_lm.generate import generate_step
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model, load_tokenizer

from mlx_flash import mixtures
from mlx_flash.errors import ModelError
from mlx_flash.mixtures import MIXTURES, Mixture

PROMPT = [5, 6, 7, 8, 9, 10]


def load(path, model_type, **overrides):
    tiny_mixtures.make_mixture(path, model_type, **overrides)
    return load_model(path)


class Recorder:
    """The calls of a model's switch modules, by path; and what goes into the routers' modules."""

    def __init__(self, monkeypatch, model):
        self.calls = {}
        self.paths = {id(m): p for p, m in model.named_modules()}
        for kind in (SwitchGLU, SwitchMLP):
            monkeypatch.setattr(kind, "__call__", self._recorded(kind.__call__))

    def _recorded(self, function):
        def call(module, x, indices):
            chosen = np.array(indices).reshape(-1, indices.shape[-1])
            self.calls.setdefault(self.paths[id(module)], []).append(chosen)
            return function(module, x, indices)

        return call


def test_tiny_has_every_mixture():
    assert set(tiny_mixtures.TINY_MIXTURES) == set(MIXTURES)


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_mixture(model_type, tmp_path, monkeypatch):
    model, config = load(tmp_path, model_type)
    mixture = mixtures.find_mixture(config)
    assert mixture is MIXTURES[model_type]
    found = mixtures.modules(model, mixture)
    mixtures.check_counts(config, mixture, found)
    named = dict(model.named_modules())
    switches = {p for p, m in named.items() if isinstance(m, SwitchGLU | SwitchMLP)}
    assert {path for _, path, _ in found} == switches
    for index, path, module in found:
        assert named[path] is module
        assert f".{index}.{mixture.module}" in path
    recorder = Recorder(monkeypatch, model)
    tokens = [t for t, _ in generate_step(mx.array(PROMPT), model, max_tokens=8)]
    assert len(tokens) == 8
    assert all(0 <= t < tiny.VOCAB for t in tokens)
    assert len(set(tokens)) > 1
    check_calls(recorder, config, mixture, found)


def check_calls(recorder, config, mixture, found):
    """Every module runs, with as many experts as the config says, and not always the same."""
    experts, top_k = mixtures.expert_counts(config, mixture)
    assert (experts, top_k) == (tiny_mixtures.EXPERTS, 2)
    assert set(recorder.calls) == {path for _, path, _ in found}
    used = []
    for chosen in recorder.calls.values():
        chosen = np.concatenate(chosen)
        assert chosen.shape[1] == top_k
        assert chosen.min() >= 0 and chosen.max() < experts
        used.append(len(np.unique(chosen)))
    assert max(used) >= 3


@pytest.mark.parametrize(
    ("model_type", "bits", "group_size", "mode"),
    [
        ("mixtral", 4, 64, "affine"),
        ("mixtral", 8, 32, "affine"),
        ("qwen3_moe", 4, 32, "affine"),
        ("gpt_oss", 4, 32, "mxfp4"),
        ("gpt_oss", 8, 64, "affine"),
        ("deepseek_v3", 4, 64, "affine"),
        ("nemotron_h", 8, 64, "affine"),
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
    mixtures.check_counts(config, mixture, found)
    for _, _, module in found:
        for name in mixture.projections:
            linear = module[name]
            assert (linear.bits, linear.group_size, linear.mode) == (bits, group_size, mode)
    assert len(list(generate_step(mx.array(PROMPT), model, max_tokens=3))) == 3


def test_unknown_family_has_no_entry():
    assert mixtures.find_mixture({"model_type": "qwen9"}) is None
    assert mixtures.find_mixture({}) is None
    assert mixtures.find_mixture(tiny.config("llama")) is None


@pytest.mark.parametrize("model_type", [m for m, mix in MIXTURES.items() if mix.dense])
def test_dense_member_has_no_entry(model_type):
    key, largest = MIXTURES[model_type].dense
    config = tiny_mixtures.config(model_type)
    assert mixtures.find_mixture(config) is MIXTURES[model_type]
    assert mixtures.find_mixture(config | {key: largest}) is None
    assert mixtures.find_mixture({k: v for k, v in config.items() if k != key}) is None


def test_wrong_counts_are_errors(tmp_path):
    model, config = load(tmp_path, "qwen3_moe")
    mixture = mixtures.find_mixture(config)
    found = mixtures.modules(model, mixture)
    with pytest.raises(ModelError, match=r"says 9 experts, but model\.layers\.0\..* has 8, .*3\."):
        mixtures.check_counts(config | {"num_experts": 9}, mixture, found)


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
