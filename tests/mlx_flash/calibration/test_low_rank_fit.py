"""Fitting low-rank predictors on arrays."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_flash.calibration.neurons import low_rank_fit
from mlx_flash.errors import CalibrationError

TOKENS, WIDTH, ROWS = 1536, 32, 96


def correlated(seed=0):
    """Inputs of a low-dimensional kind, and the projection and bias of sparse rows."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((8, WIDTH)) * np.geomspace(3, 0.3, 8)[:, None]
    x = random.standard_normal((TOKENS, 8)) @ mixing + 0.05 * random.standard_normal(
        (TOKENS, WIDTH)
    )
    weight = random.standard_normal((ROWS, WIDTH)) / WIDTH**0.5
    spread = np.std(x @ weight.T, axis=0)
    bias = -spread * random.uniform(0.8, 2.2, ROWS)
    return x.astype(np.float32) + 0.3, weight.astype(np.float32), bias.astype(np.float32)


def batches_of(x, active):
    return lambda index: (x[index], active[index])


def scores_of(found, x):
    return (x @ found.first.T) @ found.second.T + found.bias


def covered(found, x, active, target=0.95):
    """Predicted over active, at the recall asked for."""
    scores = scores_of(found, x)
    return (scores >= low_rank_fit.cutoff(scores[active], target)).sum() / active.sum()


def closed_form(x, weight, bias, largest=WIDTH, **other):
    active = x @ weight.T + bias > other.get("offset", 0.0)
    found = low_rank_fit.moments(batches_of(x, active), len(x))
    return low_rank_fit.ClosedForm(
        [weight], [bias], other.get("offset", 0.0), found, largest
    ), active


def test_moments_are_those_of_numpy():
    x, weight, bias = correlated()
    active = x @ weight.T + bias > 0
    found = low_rank_fit.moments(batches_of(x, active), len(x))
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-4)
    expected = np.cov(x.T, bias=True)
    np.testing.assert_allclose(found.covariance, expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found.rate, active.mean(axis=0))


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_closed_form_of_full_rank_knows_every_row(offset):
    x, weight, bias = correlated()
    closed, active = closed_form(x, weight, bias + offset, offset=offset)
    found = closed.cut(WIDTH)
    # The class balance shifts all scores alike; rows are ordered by their distance from the border.
    scores = scores_of(found, x) - closed._shift
    assert (((scores > 0) == active).mean()) > 0.9999


def test_a_higher_rank_is_better_and_eight_are_enough():
    x, weight, bias = correlated()
    closed, active = closed_form(x, weight, bias)
    ratios = [covered(closed.cut(rank), x, active) for rank in (2, 4, 8)]
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 1.2
    normal = np.random.default_rng(1).standard_normal
    shapes = [a.shape for a in vars(closed.cut(8)).values()]
    random = low_rank_fit.Matrices(*(normal(shape).astype(np.float32) for shape in shapes))
    assert covered(random, x, active) > 3


def test_closed_form_beats_plain_singular_values():
    """The inputs' covariance matters: cutting the projection alone keeps the wrong directions."""
    x, weight, bias = correlated()
    closed, active = closed_form(x, weight, bias)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    plain = low_rank_fit.Matrices(v[:8], u[:, :8] * s[:8], bias)
    assert covered(closed.cut(8), x, active) < 0.7 * covered(plain, x, active)


def test_relu_between_begins_as_the_linear_predictor_of_half_the_rank():
    x, weight, bias = correlated()
    closed, _ = closed_form(x, weight, bias)
    linear, pairs = closed.cut(4), closed.cut(8, "relu")
    hidden = np.maximum(x @ pairs.first.T, 0)
    np.testing.assert_allclose(
        hidden @ pairs.second.T + pairs.bias, scores_of(linear, x), atol=1e-2
    )
    assert closed.cut(7, "relu").first.shape == (7, WIDTH)


def test_drelu_needs_both_projections():
    x, gate, bias = correlated()
    bias *= 0.3
    up = np.random.default_rng(5).standard_normal(gate.shape).astype(np.float32) / WIDTH**0.5
    active = (x @ gate.T + bias > 0) & (x @ up.T > 0)
    found = low_rank_fit.moments(batches_of(x, active), len(x))
    both = low_rank_fit.ClosedForm([gate, up], [bias, None], 0.0, found, WIDTH).cut(WIDTH)
    one = low_rank_fit.ClosedForm([gate], [bias], 0.0, found, WIDTH).cut(WIDTH)
    assert covered(both, x, active) < 0.9 * covered(one, x, active)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_those_of_mlx(relu):
    random = np.random.default_rng(0)
    shapes = [(5, 7), (11, 5), (11,)]
    values = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    x = random.standard_normal((13, 7)).astype(np.float32)
    y = (random.random((13, 11)) < 0.3).astype(np.float32)

    def balanced(first, second, bias):
        hidden = mx.array(x) @ first.T
        hidden = nn.relu(hidden) if relu else hidden
        scores = hidden @ second.T + bias
        weights = mx.array(y) * (1 - 0.2) + 0.2
        return nn.losses.binary_cross_entropy(scores, mx.array(y), weights, reduction="mean")

    arrays = [mx.array(v) for v in values]
    expected_loss, expected = mx.value_and_grad(balanced, argnums=(0, 1, 2))(*arrays)
    for xp, given in ((np, values), (mx, arrays)):
        loss, grads = low_rank_fit.gradients(xp, given, xp.array(x), xp.array(y), 0.2, relu)
        assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-5)
        for grad, other in zip(grads, expected, strict=True):
            np.testing.assert_allclose(np.array(grad), np.array(other), atol=1e-6)


def test_training_helps_where_inputs_are_not_normal(monkeypatch):
    x, weight, bias = correlated()
    kinds = np.random.default_rng(3).standard_normal((24, WIDTH)).astype(np.float32)
    x = kinds[np.arange(TOKENS) % 24] + 0.3 * x
    closed, active = closed_form(x, weight, bias)
    start = closed.cut(6)
    trained = {}
    for xp in (np, mx):
        monkeypatch.setattr(low_rank_fit, "backend", lambda xp=xp: xp)
        trained[xp] = low_rank_fit.train(start, batches_of(x, active), TOKENS, seed=[0], epochs=6)
        assert covered(trained[xp], x, active) < 0.9 * covered(start, x, active)
    np.testing.assert_allclose(trained[np].second, trained[mx].second, atol=0.05)
    again = low_rank_fit.train(start, batches_of(x, active), TOKENS, seed=[0], epochs=6)
    assert (again.first == trained[mx].first).all()
    other = low_rank_fit.train(start, batches_of(x, active), TOKENS, seed=[1], epochs=6)
    assert (other.first != trained[mx].first).any()


def test_training_stops_at_what_is_no_number():
    x, weight, bias = correlated()
    closed, active = closed_form(x, weight, bias)
    x = x.copy()
    x[700, 3] = np.nan
    with pytest.raises(CalibrationError, match=r"the loss is nan at step \d+ of 12"):
        low_rank_fit.train(closed.cut(4), batches_of(x, active), TOKENS, seed=[0])


@pytest.mark.parametrize("target", [0.01, 0.5, 0.9, 0.95, 0.999])
def test_cutoffs_reach_their_target_and_no_more(target):
    random = np.random.default_rng(0)
    scores = random.standard_normal(999).astype(np.float32)
    weights = random.random(999)
    cut = low_rank_fit.cutoff(scores, target)
    assert (scores >= cut).mean() >= target
    assert (scores > cut).mean() < target + 1e-9
    cut = low_rank_fit.weighted_cutoff(scores, weights, target)
    share = weights[scores >= cut].sum() / weights.sum()
    assert target <= share < target + 0.01


def test_a_cutoff_survives_the_sigmoid():
    for cut in (-60.0, -3.25, 0.0, 7.5, 19.0, 400.0):
        tau = low_rank_fit.sigmoid(cut)
        assert 0 < tau < 1
        back = np.float32(math.log(tau / (1 - tau)))
        assert back == np.float32(min(cut, low_rank_fit.MAX_LOGIT))
