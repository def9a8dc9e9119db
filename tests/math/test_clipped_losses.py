"""ppo.policy_loss and ppo.value_loss: what the clip stops, and what the mask keeps out."""

import math

import pytest
import torch

import ppo

NAN = math.nan
double = lambda rows: torch.tensor(rows, dtype=torch.float64)
mask_of = lambda rows: torch.tensor(rows, dtype=torch.bool)


def gradient(loss, of):
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("advantage, ratio, moves", [
    (2.0, 1.5, False),  # good, and likelier by more than the clip already: enough
    (2.0, 0.5, True),  # good, but less likely than it was
    (-2.0, 1.5, True),  # bad, but likelier than it was
    (-2.0, 0.5, False),  # bad, and less likely by more than the clip already: enough
    (2.0, 1.1, True), (-2.0, 0.9, True),  # within the clip
])
def test_policy_gradient_in_each_quadrant_of_the_clip(advantage, ratio, moves):  # pitfall 24
    logprobs = double([[math.log(0.3 * ratio), -1.0]]).requires_grad_()
    old = double([[math.log(0.3), -1.0]])
    loss, diagnostics = ppo.policy_loss(logprobs, old, double([[advantage, 0.0]]), mask_of([[1, 1]]), clip=0.2)
    assert gradient(loss, logprobs)[0].tolist() == pytest.approx([-advantage * ratio / 2 if moves else 0, 0])
    surrogate = min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.2))
    assert loss.item() == pytest.approx(-surrogate / 2)
    assert diagnostics["clipped"].item() == (not moves) and diagnostics["ratio"].item() == pytest.approx(ratio + 1)


@pytest.mark.parametrize("value, target, moves", [
    (1.0, 2.0, False),  # has moved towards the return by more than the clip: enough
    (1.0, -2.0, True),  # has moved away from it
    (-1.0, 2.0, True),
    (-1.0, -2.0, False),
    (0.1, 2.0, True), (0.1, -2.0, True),  # within the clip
])
def test_value_gradient_in_each_quadrant_of_the_clip(value, target, moves):  # pitfall 26
    values = double([[value]]).requires_grad_()
    loss = ppo.value_loss(values, double([[0.0]]), double([[target]]), mask_of([[1]]), clip=0.2)
    assert gradient(loss, values).item() == pytest.approx(value - target if moves else 0)
    clamped = min(max(value, -0.2), 0.2)
    assert loss.item() == pytest.approx(0.5 * max((value - target) ** 2, (clamped - target) ** 2))


def test_gradients_of_both_losses_equal_finite_differences():
    torch.manual_seed(0)
    x, old, y = (torch.randn(3, 5).double() * 0.3 for _ in range(3))
    mask = torch.rand(3, 5) < 0.7
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, y, mask, 0.2)[0], x.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, y, mask, 0.2), x)


def losses(x, mask, **count):
    zeros = torch.zeros_like(x)
    return (ppo.policy_loss(x, zeros, zeros + 1, mask, 0.2, **count)[0], ppo.value_loss(x, zeros, zeros + 1, mask, 0.2, **count))


@pytest.mark.parametrize("poison", [NAN, math.inf, -1e30])
def test_poison_under_a_mask_stays_out_of_losses_and_gradients(poison):  # pitfall 11
    x = double([[0.1, poison], [0.2, -0.1]]).requires_grad_()
    clean = double([[0.1], [0.2], [-0.1]]).requires_grad_()
    for dirty, alone in zip(losses(x, mask_of([[1, 0], [1, 1]])), losses(clean, mask_of([[1], [1], [1]]))):
        assert dirty.item() == pytest.approx(alone.item())
        slope = gradient(dirty, x)
        assert slope[0, 1] == 0
        torch.testing.assert_close(slope[mask_of([[1, 0], [1, 1]])], gradient(alone, clean).flatten())
    poisoned = double([[poison, 1.0]])
    for loss in (ppo.policy_loss(double([[0.0, 0]]), poisoned, poisoned, mask_of([[0, 1]]), 0.2)[0],
                 ppo.value_loss(double([[0.0, 0]]), poisoned, poisoned, mask_of([[0, 1]]), 0.2)):
        assert math.isfinite(loss)


def test_a_batch_without_a_token_has_loss_zero():  # pitfall 39
    for loss in losses(double([[1.0, NAN]]), mask_of([[0, 0]])):
        assert loss.item() == 0


def test_losses_are_means_over_tokens_and_shares_add_up_to_the_whole():  # pitfall 34
    x, mask = torch.randn(4, 6).double() * 0.1, torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
    whole = losses(x, mask)
    shares = zip(*(losses(x[i : i + 1], mask[i : i + 1], count=12.0) for i in range(4)))
    for loss, parts in zip(whole, shares):
        assert sum(parts).item() == pytest.approx(loss.item())
    single = [ppo.policy_loss(x[i, t].view(1, 1), double([[0]]), double([[1]]), mask_of([[1]]), 0.2)[0]
              for i, t in mask.nonzero().tolist()]
    assert whole[0].item() == pytest.approx(sum(single).item() / 12)
