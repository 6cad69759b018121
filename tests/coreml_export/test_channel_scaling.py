"""Scales between givers and takers of channels: the same model, no worse in few bits."""

import numpy as np
import pytest
from support.coreml_tools import FIXTURES, checkpoint

from coreml_export.quantization import calibrate, channel_scaling
from coreml_export.quantization.formats import pack
from coreml_export.quantization.recipes import recipe
from coreml_export.source import tokenizer
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source
from coreml_export.verification.verify import logits


def found_in(path, out, quant, ffn_norm_has_other_readers=False):
    source = Source(path)
    decoder = describe(source)
    tokenizer.write(source, out / "tokenizer")
    schemes = calibrate.quantized_matrices(source, decoder, recipe(quant))
    return (
        source,
        decoder,
        calibrate.scaling(source, decoder, schemes, out, ffn_norm_has_other_readers),
    )


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_scaled_model_computes_the_same(quant, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "TEXTS", 1)
    source, decoder, scales = found_in(FIXTURES / "llama-relu-austen", tmp_path, quant)
    layer = decoder.layers[0]
    linears = (layer.ffn.up, layer.attention.v)
    givers = [layer.attention_norm.weight, layer.ffn_norm.weight, *(x.weight for x in linears)]
    for giver in givers:
        assert np.ptp(scales.rows[giver.name]) > 0.1
    replaced = {name: scales.of(name, source.take(name)) for name in source.names}
    tokens = tokenizer.sample(tmp_path / "tokenizer", 64)
    expected = logits(source.reference(), tokens)
    off = np.abs(logits(source.reference(replaced), tokens) - expected).max()
    assert off < 1e-4 * np.abs(expected).max()


def test_biases_and_predictors_keep_what_they_see(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "TEXTS", 1)
    model = FIXTURES / "llama-relu-austen"
    (tmp_path / "a").mkdir()
    _, decoder, scales = found_in(model, tmp_path / "a", "int8", ffn_norm_has_other_readers=True)
    norms = [name for name, _ in scales.norms()]
    assert norms == [layer.attention_norm.weight.name for layer in decoder.layers]
    opt = Source(checkpoint(tmp_path / "opt", "opt"))
    assert channel_scaling.folds(describe(opt), opt.names, False) == []


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("shared", [(1, 1), (3, 32)])
def test_scales_leave_less_error_than_none(quant, shared):
    random = np.random.default_rng(0)
    array = random.normal(size=(64, 192)).astype(np.float32)
    array *= np.exp(random.normal(size=192)).astype(np.float32)
    given = random.normal(size=(512, 192)) * np.exp(1.5 * random.normal(size=192))
    repeats, size = shared
    s = channel_scaling.scales(array, np.square(given).mean(axis=0), quant, shared)
    assert (s.reshape(-1, repeats, size) == s.reshape(-1, repeats, size)[:, :1]).all()

    def off(factors):
        return np.square((pack(array * factors, quant).floats() / factors - array) @ given.T).sum()

    assert off(s) < 0.9 * off(np.ones_like(s))
    alike = channel_scaling.scales(np.ones((64, 192), np.float32), np.ones(192), quant, shared)
    assert (alike == 1).all()
