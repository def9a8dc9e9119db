"""ppo.gae: advantages and returns, from the last token back."""

import math

import pytest
import torch

import ppo

NAN = math.nan
double = lambda rows: torch.tensor(rows, dtype=torch.float64)
mask_of = lambda rows: torch.tensor(rows, dtype=torch.bool)


def test_gae_equals_the_explicit_double_sum():  # pitfall 25
    rewards, values = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    lengths, gamma, lam = [6, 4, 1], 0.9, 0.8
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        r, v = rewards[row].tolist(), values[row, :n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert advantages[row, t].item() == pytest.approx(expected)
            assert returns[row, t].item() == pytest.approx(expected + v[t])


def test_gae_with_lambda_1_is_the_reward_to_go_and_with_lambda_0_the_one_step_error():
    rewards, values, mask = double([[0.0, -1.0, 4.0]]), double([[1.0, 2.0, 0.5]]), mask_of([[1, 1, 1]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[3, 3, 4]] and advantages.tolist() == [[2, 1, 3.5]]
    advantages, _ = ppo.gae(rewards, values, mask, gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[0 + 2 - 1, -1 + 0.5 - 2, 4 - 0.5]]


def test_values_and_rewards_behind_the_end_do_not_matter():  # pitfalls 8, 9, 10, 11
    mask = mask_of([[1, 1, 0, 0]])
    clean = ppo.gae(double([[1.0, 2, 0, 0]]), double([[3.0, 4, 0, 0]]), mask, 1.0, 0.95)
    for poison in (1e9, NAN, math.inf):
        dirty = ppo.gae(double([[1.0, 2, poison, poison]]), double([[3.0, 4, poison, poison]]), mask, 1.0, 0.95)
        for a, b in zip(clean, dirty):
            assert torch.equal(a, b)
    short = ppo.gae(double([[1.0, 2]]), double([[3.0, 4]]), mask_of([[1, 1]]), 1.0, 0.95)
    for a, b in zip(clean, short):  # more padding, the same numbers
        assert torch.equal(a[:, :2], b) and (a[:, 2:] == 0).all()
