"""Predictors that ship with a checkpoint, as TurboSparse's do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import make_checkpoint

from mlx_flash.calibration import probes
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.turbosparse import fold, predictor_tensors
from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.low_rank import LowRank
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

WIDTH, RANK = 64, 12


def tensors_of(layers, rows=160, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for i in layers:
        prefix = f"model.layers.{i}."
        made[prefix + "mlp.predictor.fc1.weight"] = rng.standard_normal((RANK, WIDTH))
        made[prefix + "mlp.predictor.fc2.weight"] = rng.standard_normal((rows, RANK))
        norm = rng.uniform(0.2, 2, WIDTH) * rng.choice([-1, 1], WIDTH)
        made[prefix + "post_attention_layernorm.weight"] = norm
    return {name: mx.array(value.astype(np.float32)) for name, value in made.items()}


def test_folding_says_what_the_checkpoint_says():
    """The formula of TurboSparse on the residual, ours on the normed hidden state."""
    tensors = tensors_of([0])
    layer = fold(tensors, 1, mx.float32)[0]
    predictor = LowRank(
        layer.tensors["first"], layer.tensors["second"], None, layer.threshold, layer.nonlinearity
    )
    fc1, fc2, norm = (np.array(value, np.float64) for value in tensors.values())
    rng = np.random.default_rng(1)
    for _ in range(20):
        residual = rng.standard_normal(WIDTH) * 7
        logits = fc2 @ np.maximum(fc1 @ residual, 0)
        x = norm * residual / np.sqrt(np.mean(residual**2) + 1e-6)
        found = predictor(mx.array(x.astype(np.float32))[None, None]).rows
        assert found.tolist() == np.flatnonzero(logits > 0).tolist()
        assert 20 < found.size < 140


def test_which_tensors():
    tensors = tensors_of([0, 2])
    others = {
        "model.layers.1.mlp.up_proj.weight": mx.zeros((2, 2)),
        "model.layers.1.post_attention_layernorm.weight": mx.ones((WIDTH,)),
        "model.norm.weight": mx.ones((WIDTH,)),
    }
    assert predictor_tensors(tensors | others).keys() == tensors.keys()
    assert predictor_tensors(others) == {}
    assert [layer.kind for layer in fold(tensors, 3, mx.float16)] == [
        "low-rank",
        "none",
        "low-rank",
    ]
    assert fold(tensors, 1, mx.float16)[0].tensors["first"].dtype == mx.float16


def test_what_cannot_be_folded():
    tensors = tensors_of([0])
    half = {name: t for name, t in tensors.items() if "fc2" not in name}
    with pytest.raises(ModelError, match=r"layer 0 lacks .*fc2"):
        fold(half, 1, mx.float32)
    name = "model.layers.0.post_attention_layernorm.weight"
    with pytest.raises(ModelError, match="weights of 0"):
        fold(tensors | {name: mx.zeros((WIDTH,))}, 1, mx.float32)


def make_shipping_checkpoint(path):
    """(a checkpoint that ships predictors, their tensors by the checkpoint's names)"""
    source = make_checkpoint(path, "bamboo", "float32")
    weights = mx.load(str(source / "model.safetensors"))
    extra = {k: v for k, v in tensors_of(range(4)).items() if "fc1" in k or "fc2" in k}
    mx.save_safetensors(str(source / "model.safetensors"), {**weights, **extra})
    return source, extra


def test_the_running_model_reads_what_the_checkpoint_predicts(tmp_path):
    """The checkpoint's formula, put to the residual stream of the paged model itself."""
    source, tensors = make_shipping_checkpoint(tmp_path / "hf")
    path = convert(source, tmp_path / "flash")
    model = load_model(ModelDirectory(path), PagingOptions(cache_share=0.3))
    residuals, named = [], []
    mlps = dict(model.named_modules())

    def sees_residual(x):
        residuals.append(np.array(x, np.float64).reshape(-1, WIDTH))
        return x

    def sees_input(mlp):
        def watcher(x):
            named.append(mlp.wanted(x))
            return x

        return watcher

    paths = [path for path, _ in model.flash.ffns]
    norms = [path.replace(".mlp", ".post_attention_layernorm") for path in paths]
    probes.tap(model, dict.fromkeys(norms, sees_residual))
    probes.tap(model, {path: sees_input(mlps[path]) for path in paths})
    before = model.flash.stats().predicted
    cache = make_prompt_cache(model)
    for token in (5, 17, 42, 200, 7, 99):
        model(mx.array([[token]]), cache=cache)
    read = 0
    for call, (residual, rows) in enumerate(zip(residuals, named, strict=True)):
        prefix = f"model.layers.{call % 4}.mlp.predictor."
        fc1, fc2 = (np.array(tensors[f"{prefix}{n}.weight"], np.float64) for n in ("fc1", "fc2"))
        logits = fc2 @ np.maximum(fc1 @ residual[0], 0)
        clear = np.abs(logits) > 1e-4 * np.abs(logits).max()
        assert clear.sum() >= logits.size - 1
        found = np.isin(np.arange(logits.size), rows[0])
        assert (found == (logits > 0))[clear].all()
        assert 20 < rows[0].size < 140
        read += rows[0].size
    assert len(residuals) == 6 * 4
    assert model.flash.stats().predicted - before == read


def test_conversion_takes_them_along(tmp_path):
    source, _ = make_shipping_checkpoint(tmp_path / "hf")
    path = convert(source, tmp_path / "flash")
    directory = ModelDirectory(path)
    assert list(directory.verify()) == []
    predictor_file.verify(path / predictor_file.NAME)
    model = load_model(directory, PagingOptions(cache_share=0.3))
    assert model.flash.selection.kind == "low-rank"
    logits = model(mx.array([[5, 17, 42]]))
    assert mx.isfinite(logits).all().item() and model.flash.stats().predicted > 0
    again = convert(source, tmp_path / "again")
    one, two = (p / predictor_file.NAME for p in (path, again))
    assert one.read_bytes() == two.read_bytes()
    assert convert(source, path, force=True) == path
