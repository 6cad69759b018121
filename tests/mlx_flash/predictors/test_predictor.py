"""Predictors: one suite that every kind passes, and what is particular to each."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_flash.common import files
from mlx_flash.errors import DamagedError, PredictorError
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.low_rank import LowRank
from mlx_flash.predictors.predictor import Everything
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.predictors.resident_part import ResidentPart

ROWS, WIDTH, RANK = 96, 32, 8


def weights(seed=0, dtype=mx.float32):
    mx.random.seed(seed)
    return {
        "weight": mx.random.normal((ROWS, WIDTH)).astype(dtype),
        "bias": (mx.random.normal((ROWS,)) - 3).astype(dtype),
        "first": mx.random.normal((RANK, WIDTH)).astype(dtype),
        "second": mx.random.normal((ROWS, RANK)).astype(dtype),
        "scale": mx.random.uniform(0.5, 2, (ROWS,)).astype(dtype),
    }


def make(kind, dtype=mx.float32):
    w = weights(dtype=dtype)
    if kind == "everything":
        return Everything(ROWS)
    if kind.startswith("low-rank"):
        nonlinearity = "relu" if "relu" in kind else "none"
        bias = w["bias"] if "bias" in kind else None
        return LowRank(w["first"], w["second"], bias, 0.7, nonlinearity)
    if kind == "gate":
        return ResidentPart("gate", w["weight"], None, nn.relu, True)
    if kind == "up":
        return ResidentPart("up", w["weight"], w["bias"], nn.relu2, True)
    scale = w["scale"] if "scale" in kind else None
    estimate = (w["first"], w["second"], w["scale"]) if "estimate" in kind else None
    return ResidentPart("gate", w["weight"], None, nn.silu, False, 1.5, scale, estimate)


KINDS = [
    "everything",
    "low-rank",
    "low-rank bias",
    "low-rank relu bias",
    "gate",
    "up",
    "threshold",
    "threshold scale",
    "threshold scale estimate",
]


def expected(kind, x):
    """Which rows one token [width] needs, in numpy float64."""
    w = {name: np.array(value.astype(mx.float32), np.float64) for name, value in weights().items()}
    x = np.array(x.astype(mx.float32), np.float64)
    if kind == "everything":
        return np.ones(ROWS, bool)
    if kind.startswith("low-rank"):
        hidden = w["first"] @ x
        hidden = np.maximum(hidden, 0) if "relu" in kind else hidden
        score = w["second"] @ hidden + (w["bias"] if "bias" in kind else 0)
        return 1 / (1 + np.exp(-score)) >= 0.7
    gate = w["weight"] @ x
    if kind == "gate":
        return gate > 0
    if kind == "up":
        return gate + w["bias"] > 0
    score = np.abs(gate / (1 + np.exp(-gate))) * (w["scale"] if "scale" in kind else 1)
    if "estimate" in kind:
        score = score * np.sqrt((w["second"] @ (w["first"] @ x)) ** 2 + w["scale"])
    return score > 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind):
    """Sorted distinct rows, the union over tokens, values where the part is said to be known."""
    predictor = make(kind)
    mx.random.seed(1)
    x = mx.random.normal((2, 3, WIDTH))
    masks = np.array([expected(kind, token) for token in x.reshape(-1, WIDTH)])
    assert masks.all() == (kind == "everything")
    found = predictor(x)
    assert found.rows.dtype.kind == "i"
    assert found.rows.tolist() == np.flatnonzero(masks.any(axis=0)).tolist()
    single = predictor(x[:1, 1:2])
    assert single.rows.tolist() == np.flatnonzero(masks[1]).tolist()
    assert (found.values is None) == (predictor.provides is None)
    assert predictor.nbytes == 0 or predictor.nbytes % 4 == 0
    assert isinstance(predictor.kind, str)
    if found.values is not None:
        assert found.values.shape == (2, 3, ROWS)
        kept = np.array(found.values).reshape(-1, ROWS)
        dense = np.array(predictor.values(x)).reshape(-1, ROWS)
        assert (kept[masks] == dense[masks]).all()
        if not predictor.exact:
            assert (kept[~masks] == 0).all(), "a row that is not needed must not count"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_what_is_predicted(kind):
    """Of each token; and where the projection's output is at hand no weights are needed."""
    predictor = make(kind)
    mx.random.seed(1)
    x = mx.random.normal((2, 3, WIDTH))
    masks = np.array([expected(kind, token) for token in x.reshape(-1, WIDTH)])
    assert (np.array(predictor.mask(x)).reshape(-1, ROWS) == masks).all()
    if predictor.provides:
        values = predictor.values(x)
        predictor.weight = None
        assert (np.array(predictor.mask(x, values)).reshape(-1, ROWS) == masks).all()
        with pytest.raises(PredictorError, match=f"without the weights of {predictor.provides}"):
            predictor.mask(x)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nobody_needs_a_row(kind):
    x = mx.zeros((1, 1, WIDTH))
    bias = "bias" in kind or kind == "up"
    count = int(expected(kind, x[0, 0]).sum())
    assert count < ROWS / 2 if bias else count == 0
    assert make(kind)(x).rows.size == count


@pytest.mark.parametrize(("kind", "exact"), [("gate", True), ("up", True), ("threshold", False)])
def test_exact_or_not(kind, exact):
    assert make(kind).exact is exact
    assert make(kind).kind == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": mx.zeros((ROWS, RANK + 1))}, r"expected \[rank, d_model\] and \[rows, rank\]"),
        ({"bias": mx.zeros((ROWS + 1,))}, "a bias of"),
        ({"threshold": 1.0}, "between 0 and 1: 1.0"),
        ({"nonlinearity": "gelu"}, "expected one of none, relu"),
    ],
)
def test_low_rank_refuses(change, message):
    given = {"first": mx.zeros((RANK, WIDTH)), "second": mx.zeros((ROWS, RANK))} | change
    with pytest.raises(PredictorError, match=message):
        LowRank(**given)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_threshold_refuses(threshold):
    with pytest.raises(PredictorError, match="not negative"):
        ResidentPart("gate", mx.zeros((ROWS, WIDTH)), None, nn.silu, False, threshold)


def low_rank_file(rows=(ROWS, ROWS)):
    w = weights()
    layers = [
        LayerPredictor(
            "low-rank", 0.4, "relu", {k: w[k] for k in ("first", "second", "bias")}, {"4": 20.0}
        )
        for _ in rows[:-1]
    ]
    return Predictors("low-rank", "f" * 64, [*layers, LayerPredictor("none")], {"recall": 0.97})


def test_file_round_trip(tmp_path):
    path = tmp_path / predictor_file.NAME
    predictor_file.write(path, low_rank_file())
    found = predictor_file.read(path, "f" * 64, [ROWS, ROWS], WIDTH)
    assert found.kind == "low-rank" and found.measured == {"recall": 0.97}
    first, second = found.layers
    assert (first.kind, first.threshold, first.nonlinearity, first.rank) == (
        "low-rank",
        0.4,
        "relu",
        RANK,
    )
    assert first.demand == {"4": 20.0} and second.kind == "none" and not second.tensors
    assert mx.array_equal(first.tensors["second"], weights()["second"])
    assert found.nbytes == 4 * (RANK * WIDTH + ROWS * RANK + ROWS)
    predictor_file.verify(path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


def test_thresholds_with_an_estimate(tmp_path):
    path, w = tmp_path / predictor_file.NAME, weights()
    tensors = {"scale": w["scale"], "first": w["first"], "second": w["second"], "floor": w["scale"]}
    layer = LayerPredictor("threshold", 0.25, tensors=tensors)
    predictor_file.write(path, Predictors("threshold", "a", [layer]))
    found = predictor_file.read(path, "a", [ROWS], WIDTH).layers[0]
    assert found.rank == RANK and mx.array_equal(found.tensors["second"], w["second"])
    del tensors["floor"]
    predictor_file.write(path, Predictors("threshold", "a", [layer]))
    with pytest.raises(DamagedError, match="layer 0: no floor"):
        predictor_file.read(path, "a", [ROWS], WIDTH)


def test_thresholds_need_no_tensors(tmp_path):
    path = tmp_path / predictor_file.NAME
    layers = [LayerPredictor("threshold", 0.25), LayerPredictor("threshold", 0.5)]
    predictor_file.write(path, Predictors("threshold", "a", layers))
    found = predictor_file.read(path, "a", [ROWS, ROWS], WIDTH)
    assert [layer.threshold for layer in found.layers] == [0.25, 0.5]
    predictor_file.verify(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("e" * 64, [ROWS, ROWS], WIDTH), "fitted to another model"),
        (("f" * 64, [ROWS] * 3, WIDTH), "for 2 layers, the model has 3"),
        (("f" * 64, [ROWS + 1, ROWS], WIDTH), r"second has shape \(96, 8\), the model needs"),
        (("f" * 64, [ROWS, ROWS], WIDTH + 1), r"first has shape \(8, 32\), the model needs"),
    ],
)
def test_file_of_another_model(tmp_path, given, message):
    path = tmp_path / predictor_file.NAME
    predictor_file.write(path, low_rank_file())
    with pytest.raises(PredictorError, match=message):
        predictor_file.read(path, *given)


def test_layers_are_of_the_kind_of_the_file(tmp_path):
    path, w = tmp_path / predictor_file.NAME, weights()
    pair = {name: w[name] for name in ("first", "second")}
    low_rank, whole = LayerPredictor("low-rank", tensors=pair), LayerPredictor("none")
    for kind, layer in (("low-rank", LayerPredictor("threshold")), ("threshold", whole)):
        predictor_file.write(path, Predictors(kind, "a", [layer]))
        with pytest.raises(PredictorError, match=f"layer 0: unknown kind '{layer.kind}'"):
            predictor_file.read(path, "a", [ROWS], WIDTH)
    predictor_file.write(path, Predictors("of tomorrow", "a", [low_rank]))
    with pytest.raises(PredictorError, match=r"'of tomorrow'.*knows low-rank or threshold"):
        predictor_file.read(path, "a", [ROWS], WIDTH)


def test_tensors_of_a_layer_agree_on_the_rank(tmp_path):
    path, w = tmp_path / predictor_file.NAME, weights()
    layer = LayerPredictor("low-rank", tensors={"first": w["first"], "second": w["second"][:, :4]})
    predictor_file.write(path, Predictors("low-rank", "a", [layer]))
    with pytest.raises(PredictorError, match=r"second has shape \(96, 4\).*\(96, 8\)"):
        predictor_file.read(path, "a", [ROWS], WIDTH)


def test_damaged_file(tmp_path):
    path = tmp_path / predictor_file.NAME
    with pytest.raises(PredictorError, match="there is no"):
        predictor_file.read(path, "f" * 64, [ROWS, ROWS], WIDTH)
    predictor_file.write(path, low_rank_file())
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-100])
    with pytest.raises(DamagedError):
        predictor_file.read(path, "f" * 64, [ROWS, ROWS], WIDTH)
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DamagedError, match="sha256"):
        predictor_file.verify(path)
    path.write_text("nothing of the kind")
    with pytest.raises(DamagedError, match="not a safetensors file"):
        predictor_file.read(path, "f" * 64, [ROWS, ROWS], WIDTH)
    mx.save_safetensors(str(path), {"a": mx.zeros((3,))})
    with pytest.raises(PredictorError, match="does not hold predictors"):
        predictor_file.read(path, "f" * 64, [ROWS, ROWS], WIDTH)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / predictor_file.NAME
    predictor_file.write(path, low_rank_file())
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        predictor_file.write(path, Predictors("threshold", "a", [LayerPredictor("threshold")]))
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
