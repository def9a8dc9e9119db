"""ppo.whiten: mean 0 and variance 1 over the mask."""

import math

import numpy as np
import pytest
import torch

import ppo

NAN = math.nan
double = lambda rows: torch.tensor(rows, dtype=torch.float64)
mask_of = lambda rows: torch.tensor(rows, dtype=torch.bool)


def test_whitened_numbers_equal_numpys_over_the_mask_alone():  # pitfalls 12, 14
    x, mask = torch.randn(3, 6).double(), torch.rand(3, 6) < 0.6
    inside = x[mask].numpy()
    result = ppo.whiten(x, mask)
    np.testing.assert_allclose(result[mask], (inside - np.mean(inside)) / np.sqrt(np.var(inside) + 1e-8))
    assert (result[~mask] == 0).all()


def test_whitening_by_hand_divides_by_the_populations_variance():  # pitfall 14
    result = ppo.whiten(double([[1.0, 3.0, 100.0]]), mask_of([[1, 1, 0]]))  # mean 2, variance 1 (of n - 1: 2)
    assert result[0].tolist() == pytest.approx([-1, 1, 0])


def test_padding_has_no_influence_on_whitening_whatever_stands_there():  # pitfalls 11, 12
    result = ppo.whiten(double([[1.0, 3.0, NAN], [math.inf, 5.0, -9.0]]), mask_of([[1, 1, 0], [0, 1, 0]]))
    np.testing.assert_allclose(result, ppo.whiten(double([[1, 3, 0], [0, 5, 0]]), mask_of([[1, 1, 0], [0, 1, 0]])))
    assert result[1, 1].item() == pytest.approx(math.sqrt(1.5))  # mean 3, variance 8/3


def test_whitening_shares_of_a_batch_with_common_totals_equals_whitening_the_batch():
    x = torch.randn(10).double()
    shares, mask = (x[:3], x[3:]), torch.ones(10, dtype=torch.bool)
    totals = [(10, x.sum()), (((x - x.mean()) ** 2).sum(),)]
    for share in shares:
        answers = iter(totals)
        result = ppo.whiten(share, mask[: len(share)], lambda *numbers: next(answers))
        torch.testing.assert_close(result, ppo.whiten(x, mask)[:3] if share is shares[0] else ppo.whiten(x, mask)[3:])


def test_whitening_equal_numbers_or_none_is_zero_and_finite():
    assert ppo.whiten(double([[2.0, 2.0]]), mask_of([[1, 1]])).tolist() == [[0, 0]]
    assert ppo.whiten(double([[2.0, NAN]]), mask_of([[0, 0]])).tolist() == [[0, 0]]
