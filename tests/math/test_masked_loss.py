"""sft.masked_loss on readers.make_batch: which tokens count, and which position predicts them."""

import math

import pytest
import torch

import sft
from conftest import Bigram, random_gpt
from data import readers

END = 8


def loss_of(model, pairs):
    batch = readers.make_batch(pairs, END)
    return sft.masked_loss(model(batch.tokens, batch.positions), batch.mask)


def test_the_loss_counts_response_and_end_each_predicted_from_the_token_before():  # pitfalls 3, 6
    table = torch.log_softmax(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)), -1)
    loss = loss_of(Bigram(table), [([1, 2], [3, END]), ([4], [5, 6, END])])
    by_hand = -(table[2, 3] + table[3, END] + table[4, 5] + table[5, 6] + table[6, END])
    assert loss.item() == pytest.approx(by_hand.item())


def test_the_prompts_tokens_get_no_gradient_from_being_predicted():
    model = Bigram(torch.zeros(9, 9))
    loss_of(model, [([1, 2], [3, END])]).backward()
    assert set(model.table.grad.abs().sum(1).nonzero().flatten().tolist()) == {2, 3}  # what follows 2 and 3, not 1


def test_padding_changes_neither_the_loss_nor_its_gradient():  # pitfall 10
    model, pairs = random_gpt(dtype=torch.float64), [([1, 2], [3, END]), ([4], [5, 6, 7, 0, 1, END])]
    grads = []
    for groups in ([pairs], [pairs[:1], pairs[1:]]):
        model.zero_grad()
        total = sum(loss_of(model, group) for group in groups)
        total.backward()
        grads.append((total.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_batch_in_which_nothing_is_a_target_has_loss_zero():  # pitfall 39
    logprobs = torch.full((1, 3), -2.0, requires_grad=True)
    loss = sft.masked_loss(logprobs, torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.tolist() == [[0, 0, 0]]


def test_what_lies_outside_the_mask_is_not_read():
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -math.inf, math.nan]])
    assert sft.masked_loss(logprobs, torch.tensor([[True, True, False], [True, False, False]])).item() == 7
