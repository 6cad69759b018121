"""Arithmetic of thresholds, on arrays."""

import numpy as np
import pytest

from mlx_flash.calibration.neurons.threshold_fitter import low_rank_copy, quantile


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999])
def test_quantile_leaves_out_the_share_asked_for(sparsity):
    scores = np.random.default_rng(0).random((40, 50))
    left_out = (scores <= quantile(scores, sparsity)).mean()
    assert sparsity <= left_out <= sparsity + 1 / scores.size


def test_low_rank_copy_is_the_best_of_its_rank():
    """As good as the truncated SVD on whitened inputs, and honest about what it leaves open."""
    random = np.random.default_rng(0)
    mix = random.standard_normal((24, 24)).astype(np.float32)
    x = random.standard_normal((4000, 24)).astype(np.float32) @ mix
    weight = random.standard_normal((60, 24)).astype(np.float32)
    moment = (x.T @ x / len(x)).astype(np.float64)
    ones = np.ones(60, np.float32)
    true = x @ weight.T
    errors = []
    for rank in (4, 12, 24):
        first, second, floor = low_rank_copy(weight, moment, ones, rank)
        assert (first.shape, second.shape) == ((rank, 24), (60, rank))
        wrong = np.square(true - x @ first.T @ second.T)
        np.testing.assert_allclose(floor, wrong.mean(axis=0), rtol=0.02, atol=1e-2)
        errors.append(wrong.mean())
    _, singular, _ = np.linalg.svd(true, full_matrices=False)
    best = [np.square(singular[rank:]).sum() / true.size for rank in (4, 12)]
    assert errors[:2] == pytest.approx(best, rel=0.02)
    assert errors[2] < 1e-3 * errors[0]


def test_low_rank_copy_takes_care():
    """A row that counts more is copied better."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((60, 24)).astype(np.float32)
    care = np.ones(60, np.float32)
    even = low_rank_copy(weight, np.eye(24), care, 6)[2]
    care[:5] = 10
    assert low_rank_copy(weight, np.eye(24), care, 6)[2][:5].sum() < 0.3 * even[:5].sum()
