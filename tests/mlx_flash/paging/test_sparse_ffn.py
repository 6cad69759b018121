"""Rows that fire, and only those, against the dense model."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import make_checkpoint
from support.trained import FIXTURES, RELU, TEXT, TRAINED, greedy, logits, whole_rank

from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, CacheError, PredictorError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging import row_stream
from mlx_flash.paging.policies import POLICIES
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor import Prediction
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.options import PagingOptions

SHARE = 0.15


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(name, dtype) -> model directory, converted once."""

    @cache
    def get(name: str, dtype: str) -> Path:
        return convert(FIXTURES / name, tmp_path_factory.mktemp("trained") / name, dtype=dtype)

    return get


@pytest.fixture(scope="module")
def dense_tokens(trained):
    """(name, dtype) -> 128 tokens of the dense model, decoded once."""

    @cache
    def get(name: str, dtype: str) -> list[int]:
        dense, tokenizer = load(trained(name, dtype), use_flash=False)
        return greedy(dense, tokenizer.encode(TEXT))

    return get


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory):
    """A tiny SwiGLU model."""
    path = tmp_path_factory.mktemp("swiglu")
    return convert(make_checkpoint(path / "hf", "llama", "float32"), path / "flash")


def difference(found, expected):
    return mx.abs(found - expected).max().item()


def exact_cases():
    """Models, types and policies; make test has each model in each type, and each policy once."""
    for n, (name, dtype) in enumerate(itertools.product(TRAINED, ("float32", "bfloat16"))):
        for turn, policy in enumerate(POLICIES):
            later = n % len(POLICIES) != turn
            yield pytest.param(name, dtype, policy, marks=[pytest.mark.whole] if later else [])


@pytest.mark.parametrize(("name", "dtype", "policy"), exact_cases())
def test_exact_predictors_give_the_dense_tokens(trained, dense_tokens, name, dtype, policy):
    """128 of 128 with room for 15 % of the rows."""
    path = trained(name, dtype)
    dense, tokenizer = load(path, use_flash=False)
    prompt, expected = tokenizer.encode(TEXT), dense_tokens(name, dtype)
    model = load_model(ModelDirectory(path), PagingOptions(cache_share=SHARE, policy=policy))
    flash = model.flash
    assert flash.selection.exact
    assert flash.selection.kind == ("up" if name.startswith("opt") else "gate")
    assert greedy(model, prompt) == expected
    # One token at a time even the sums are the dense ones: the same rows in the same order. (In
    # float32 BLAS computes x @ up.T in blocks that depend on the number of rows.)
    tokens = [prompt[0], *expected[:40]]
    steps = [1] * len(tokens)
    worst = difference(logits(model, tokens, *steps), logits(dense, tokens, *steps))
    assert worst == 0 or (dtype == "float32" and flash.selection.kind != "up" and worst < 1e-4)
    rows = flash.directory.rows.layers[0].rows
    assert set(flash.plan.slots.values()) == {round(SHARE * rows)}
    stats = flash.stats()
    assert stats.hits > 0 and stats.misses > 0
    assert stats.predicted / stats.layer_calls < 0.25 * rows, "learned weights are sparse"


@pytest.mark.parametrize("family", RELU)
def test_every_relu_family(tmp_path, family):
    """Random weights: half of the rows fire, more than there are slots."""
    source = make_checkpoint(tmp_path / "hf", family, "float32", **RELU[family])
    path = convert(source, tmp_path / "flash")
    directory = ModelDirectory(path)
    dense = load_model(directory, PagingOptions(use_flash=False))
    tokens = np.random.default_rng(0).integers(3, 300, 90).tolist()
    expected = logits(dense, tokens, 70, *[1] * 20)
    scale = mx.abs(expected).max().item()
    for share in (0.1, 0.8):
        model = load_model(directory, PagingOptions(cache_share=share))
        assert model.flash.selection.exact
        found = logits(model, tokens, 70, *[1] * 20)
        assert difference(found, expected) < 2e-5 * scale, f"share {share}"
        assert (model.flash.stats().hits > 0) == (share > 0)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    "share", [0.15, *(pytest.param(n, marks=pytest.mark.whole) for n in (0.02, 0.6))]
)
def test_several_tokens_at_once(trained, name, share):
    """Prompts, drafts and batches: the union of rows, or all of them streamed."""
    directory = ModelDirectory(trained(name, "float32"))
    dense = load_model(directory, PagingOptions(use_flash=False))
    model = load_model(directory, PagingOptions(cache_share=share))
    tokens = np.random.default_rng(1).integers(3, 1000, 100).tolist()
    for sizes in ([100], [63, 1, 5, 5, 2, 24], [5] * 20):
        worst = difference(logits(model, tokens, *sizes), logits(dense, tokens, *sizes))
        assert worst < 1e-4, f"pieces of {sizes}"
    batch = mx.array(tokens[:48]).reshape(4, 12)
    found, expected = [], []
    for m, out in ((model, found), (dense, expected)):
        cache = make_prompt_cache(m)
        out += [
            m(batch[:, :8], cache=cache),
            *(m(batch[:, i : i + 1], cache=cache) for i in range(8, 12)),
        ]
    assert difference(mx.concatenate(found, axis=1), mx.concatenate(expected, axis=1)) < 1e-4


def test_a_long_prompt_is_streamed_in_pieces(trained, monkeypatch):
    directory = ModelDirectory(trained("llama-relu-austen", "float32"))
    tokens = np.random.default_rng(2).integers(3, 1000, 100).tolist()
    expected = logits(load_model(directory, PagingOptions(use_flash=False)), tokens, 100)
    monkeypatch.setattr(row_stream, "CHUNK_BYTES", 50 * directory.rows.layout.stride)
    model = load_model(directory, PagingOptions(cache_share=SHARE))
    before = model.flash.stats()
    assert difference(logits(model, tokens, 100), expected) < 1e-4
    spent = model.flash.stats() - before
    rows = sum(layer.rows for layer in directory.rows.layers)
    assert (spent.misses, spent.predicted) == (rows, 0)
    # The gate is in memory: two thirds of every row are read, plus what joins them.
    assert spent.bytes_read <= rows * directory.rows.layout.stride


@pytest.mark.parametrize("length", [24, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-relu-austen", "opt-austen"])
def test_a_prompt_in_one_piece_is_the_dense_one_to_the_bit(
    trained, monkeypatch, name, dtype, length
):
    """Layers that fit a buffer are not cut, whatever share of their rows a prompt wants."""
    monkeypatch.setattr(row_stream, "LEAST_BYTES", 16 << 20)
    directory = ModelDirectory(trained(name, dtype))
    tokens = np.random.default_rng(2).integers(3, 1000, length).tolist()
    model = load_model(directory, PagingOptions(cache_share=SHARE))
    assert model.flash.rows.capacity(0) == directory.rows.layers[0].rows
    expected = logits(load_model(directory, PagingOptions(use_flash=False)), tokens, length)
    assert difference(logits(model, tokens, length), expected) == 0


def test_no_row_fires(trained, monkeypatch):
    directory = ModelDirectory(trained("opt-austen", "float32"))
    model = load_model(directory, PagingOptions(cache_share=SHARE))
    paged = model.layers[1].mlp
    nothing = Prediction(np.zeros(0, np.int64))
    monkeypatch.setattr(type(paged.predictor), "__call__", lambda self, x: nothing)
    x = mx.random.normal((1, 1, model.args.hidden_size))
    found = paged(x)
    bias = mx.broadcast_to(paged.mlp.fc2.bias, found.shape)
    assert difference(found, bias) == 0


@pytest.mark.parametrize("name", [pytest.param(TRAINED[0], marks=pytest.mark.whole), TRAINED[1]])
def test_low_rank_predictors_that_are_right(trained, tmp_path, name):
    """Gate, up and down paged, nothing resident; a layer without a predictor is read whole."""
    directory = ModelDirectory(convert(FIXTURES / name, tmp_path / "m", dtype="float32"))
    predictors = whole_rank(directory)
    predictors.layers[2] = LayerPredictor("none")
    predictor_file.write(directory.path / predictor_file.NAME, predictors)
    dense, tokenizer = load(directory.path, use_flash=False)
    prompt = tokenizer.encode(TEXT)
    for chosen in ("low-rank", "auto"):
        model = load_model(directory, PagingOptions(cache_share=SHARE, predictor=chosen))
        assert model.flash.selection.kind == "low-rank" and not model.flash.selection.exact
        assert greedy(model, prompt) == greedy(dense, prompt)


def test_what_is_not_predicted_is_left_out(trained, tmp_path):
    """A predictor that names nothing leaves the bias alone: no row is used behind its back."""
    directory = ModelDirectory(convert(FIXTURES / "opt-austen", tmp_path / "m", dtype="float32"))
    predictors = whole_rank(directory)
    width = directory.rows.layout.parts[0].width
    for layer in predictors.layers:
        layer.tensors["bias"] = mx.full(layer.tensors["bias"].shape, -1e9)
    predictor_file.write(directory.path / predictor_file.NAME, predictors)
    model = load_model(directory, PagingOptions(cache_share=SHARE))
    x = mx.random.normal((1, 1, width))
    paged = model.layers[0].mlp
    assert difference(paged(x)[0, 0], paged.mlp.fc2.bias) == 0
    assert model.flash.stats().bytes_read == 0


def thresholds(directory, value):
    layers = [LayerPredictor("threshold", value) for _ in directory.rows.layers]
    return Predictors("threshold", directory.rows.fingerprint, layers, {})


@pytest.mark.whole
def test_threshold_is_the_same_whatever_is_cached(swiglu):
    directory = ModelDirectory(swiglu)
    path = directory.path / predictor_file.NAME
    tokens = list(range(20, 60))
    dense = logits(load_model(directory, PagingOptions(use_flash=False)), tokens, *[1] * 40)
    losses = []
    try:
        for value in (1e-6, 0.1, 0.3):
            predictor_file.write(path, thresholds(directory, value))
            found = [
                logits(
                    load_model(directory, PagingOptions(cache_share=share, policy=policy)),
                    tokens,
                    *[1] * 40,
                )
                for share, policy in ((0.05, "window"), (0.3, "lfu"), (0.9, "lru"))
            ]
            assert max(difference(f, found[0]) for f in found) < 1e-4
            losses.append(difference(found[0], dense))
    finally:
        path.unlink()
    assert losses[0] < 1e-4 < losses[1] < losses[2]


# Odd places for a gate: fused, behind a norm, computed after up, none at all, other activations.
@pytest.mark.parametrize(
    "family", ["phi3", "openelm", "lille-130m", "qwen", "gpt2", "gemma2", "falcon_h1", "starcoder2"]
)
def test_threshold_in_odd_families(tmp_path, family):
    """A threshold of next to nothing drops nothing."""
    path = convert(make_checkpoint(tmp_path / "hf", family, "float32"), tmp_path / "flash")
    directory = ModelDirectory(path)
    predictor_file.write(path / predictor_file.NAME, thresholds(directory, 1e-9))
    tokens = list(range(20, 40))
    expected = logits(load_model(directory, PagingOptions(use_flash=False)), tokens, 10, *[1] * 10)
    model = load_model(directory, PagingOptions(cache_share=0.4))
    assert model.flash.selection.kind == "threshold"
    found = logits(model, tokens, 10, *[1] * 10)
    assert difference(found, expected) < 2e-5 * mx.abs(expected).max().item()
    assert model.flash.stats().predicted > 0


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("gate", r"silu, has no zeros.*calibrate --kind threshold"),
        ("up", r"silu, has no zeros"),
        ("low-rank", r"has no low-rank predictors; train them with: mlx_flash calibrate --model"),
        ("threshold", r"calibrate --model .* --kind threshold --sparsity 0.5"),
        ("oracle", r"'oracle'; expected one of auto, none, gate, up, low-rank, threshold"),
    ],
)
def test_predictors_that_cannot_be(swiglu, predictor, message):
    with pytest.raises(PredictorError, match=message):
        load_model(ModelDirectory(swiglu), PagingOptions(predictor=predictor))


def test_the_wrong_exact_predictor(trained):
    with pytest.raises(PredictorError, match="has no gate, its exact predictor is 'up'"):
        load_model(
            ModelDirectory(trained("opt-austen", "float32")), PagingOptions(predictor="gate")
        )
    with pytest.raises(PredictorError, match="has a gate, its exact predictor is 'gate'"):
        load_model(
            ModelDirectory(trained("llama-relu-austen", "float32")), PagingOptions(predictor="up")
        )


def test_predictors_of_another_model(trained, tmp_path):
    directory = ModelDirectory(convert(FIXTURES / "opt-austen", tmp_path / "m", dtype="float32"))
    foreign = whole_rank(directory)
    foreign.rows_fingerprint = "0" * 64
    predictor_file.write(directory.path / predictor_file.NAME, foreign)
    for chosen in ("auto", "low-rank"):
        with pytest.raises(PredictorError, match="fitted to another model"):
            load_model(directory, PagingOptions(predictor=chosen))
    with pytest.raises(PredictorError, match="fitted to another model"):
        load_model(directory, PagingOptions(predictor="threshold"))
    assert (
        load_model(directory, PagingOptions(predictor="up", cache_share=0.2)).flash.selection.kind
        == "up"
    )
    assert load_model(directory, PagingOptions(predictor="none")).flash.selection is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"policy": "fifo"}, CacheError, "expected one of window, lru, lfu"),
        ({"policy": "window", "window": 0}, CacheError, "at least one token"),
        ({"cache_share": 0.0}, BudgetError, "above 0"),
        ({"cache_share": 1.5}, BudgetError, "at most 1"),
    ],
)
def test_bad_settings(trained, given, error, message):
    with pytest.raises(error, match=message):
        load(trained("opt-austen", "float32"), **given)


def test_everything_fits(trained):
    """With room for every row nothing is predicted."""
    model = load_model(ModelDirectory(trained("opt-austen", "float32")))
    assert model.flash.selection is None and not model.flash.plan.slots
    assert len(model.flash.plan.kept) == len(model.layers)
    model = load_model(
        ModelDirectory(trained("opt-austen", "float32")), PagingOptions(cache_share=1.0)
    )
    assert len(model.flash.plan.kept) == len(model.layers)
