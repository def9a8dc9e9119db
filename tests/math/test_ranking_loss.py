"""reward.ranking_loss: equation 1 of the paper, by hand."""

import math

import pytest
import torch

import reward
from conftest import brute_ranking_loss


@pytest.mark.parametrize("ranks", [[1, 2], [2, 1], [1, 2, 3, 4], [3, 1, 4, 2], [1, 2, 2], [2, 2, 1, 3, 1], [1, 1, 1, 2]])
def test_ranking_loss_is_the_mean_over_pairs_that_are_not_tied(ranks):  # pitfall 28
    rewards = torch.randn(len(ranks), generator=torch.Generator().manual_seed(len(ranks))).double()
    loss, pairs, right = reward.ranking_loss(rewards, torch.tensor(ranks))
    assert loss.item() == pytest.approx(brute_ranking_loss(rewards.tolist(), ranks))
    better = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    assert pairs == len(better) and right == sum(bool(rewards[i] > rewards[j]) for i, j in better)


def test_four_equal_rewards_cost_log_two_whatever_k():  # pitfall 28
    for k in (2, 4, 9):
        loss, pairs, right = reward.ranking_loss(torch.zeros(k), torch.arange(1, k + 1))
        assert loss.item() == pytest.approx(math.log(2)) and pairs == k * (k - 1) // 2 and right == 0


def test_all_tied_is_loss_zero_and_no_pair_with_a_gradient_of_zero():  # pitfall 39
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss, pairs, right = reward.ranking_loss(rewards, torch.tensor([2, 2, 2]))
    loss.backward()
    assert (loss.item(), pairs, right) == (0, 0, 0) and rewards.grad.tolist() == [0, 0, 0]


def test_a_margin_of_minus_200_has_a_finite_loss_and_gradient():  # pitfall 27
    rewards = torch.tensor([-100.0, 100.0], requires_grad=True)
    loss, _, _ = reward.ranking_loss(rewards, torch.tensor([1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(200) and rewards.grad.tolist() == pytest.approx([-1, 1])


def test_the_gradient_of_a_pair_is_how_unlikely_its_order_was():
    rewards = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
    reward.ranking_loss(rewards, torch.tensor([1, 2]))[0].backward()
    wrong = 1 / (1 + math.exp(0.3 - 1.0))
    assert rewards.grad.tolist() == pytest.approx([-wrong, wrong])
    assert torch.autograd.gradcheck(lambda r: reward.ranking_loss(r, torch.tensor([2, 1, 3, 1]))[0],
                                    torch.randn(4).double().requires_grad_())
