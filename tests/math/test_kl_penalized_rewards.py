"""ppo.kl_penalized_rewards: the score at the last token, a KL penalty at every token."""

import math

import pytest
import torch

import ppo

NAN = math.nan
double = lambda rows: torch.tensor(rows, dtype=torch.float64)
mask_of = lambda rows: torch.tensor(rows, dtype=torch.bool)


def test_the_score_comes_at_the_last_response_token_and_nothing_behind_it():  # pitfalls 7, 8
    scores, zeros = double([5.0, 7.0, 9.0]), torch.zeros(3, 4, dtype=torch.float64)
    mask = mask_of([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rewards = ppo.kl_penalized_rewards(scores, zeros, zeros, mask, beta=0.1)
    assert rewards.tolist() == [[0, 0, 0, 5], [0, 7, 0, 0], [9, 0, 0, 0]]


def test_the_kl_penalty_charges_likelier_tokens_and_credits_less_likely_ones():  # pitfalls 15, 16
    logprobs, ref = double([0.5, 0.1]).log()[None], double([0.25, 0.4]).log()[None]
    rewards = ppo.kl_penalized_rewards(double([0.0]), logprobs, ref, mask_of([[1, 1]]), beta=0.3)
    assert rewards[0].tolist() == pytest.approx([-0.3 * math.log(2), 0.3 * math.log(4)])


def test_penalties_add_up_to_beta_times_the_log_ratio_of_the_whole_response():  # pitfalls 16, 18
    logprobs, ref = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    mask = mask_of([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rewards = ppo.kl_penalized_rewards(double([2.0, 3.0]), logprobs, ref, mask, beta=0.1)
    ratio = [(logprobs - ref)[0, :3].sum(), (logprobs - ref)[1].sum()]
    torch.testing.assert_close(rewards.sum(1), torch.stack([2 - 0.1 * ratio[0], 3 - 0.1 * ratio[1]]))


def test_what_stands_in_padding_never_gets_into_rewards():  # pitfalls 10, 11
    logprobs = double([[-1.0, NAN, math.inf]])
    rewards = ppo.kl_penalized_rewards(double([1.0]), logprobs, torch.zeros(1, 3).double(), mask_of([[1, 0, 0]]), beta=0.1)
    assert rewards.tolist() == [[1.1, 0, 0]]
