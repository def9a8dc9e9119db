"""The ideas of ppo.py by hand, and its real loop on eight letters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import ppo
import reward
from common import UserError
from conftest import Bigram, load_model, random_gpt, read_log, same, save, share_of_a, slow_logprobs, weights, write_lines
from data import readers
from model import GPT, ScalarModel, generate

END = 8
NAN = math.nan
double = lambda rows: torch.tensor(rows, dtype=torch.float64)
mask_of = lambda rows: torch.tensor(rows, dtype=torch.bool)


# ---------------------------------------------------------------- rewards

def test_the_score_comes_at_the_last_response_token_and_nothing_behind_it():  # pitfalls 7, 8
    scores, zeros = double([5.0, 7.0, 9.0]), torch.zeros(3, 4, dtype=torch.float64)
    mask = mask_of([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rewards = ppo.kl_penalized_rewards(scores, zeros, zeros, mask, beta=0.1)
    assert rewards.tolist() == [[0, 0, 0, 5], [0, 7, 0, 0], [9, 0, 0, 0]]


def test_a_token_likelier_than_under_the_reference_is_charged_and_a_less_likely_one_credited():  # pitfalls 15, 16
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


# ---------------------------------------------------------------- whitening

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


# ---------------------------------------------------------------- advantages

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


def test_gae_with_lambda_one_returns_the_reward_to_go_and_with_lambda_zero_the_one_step_error():
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


# ---------------------------------------------------------------- the losses

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


# ---------------------------------------------------------------- episodes

TABLE = torch.log_softmax(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)), -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_responses_are_the_bigram_tables_entries(temperature):  # pitfalls 3, 20
    e = ppo.make_episodes([[1, 2], [3]], [[4, 5, END], [6]], END, "cpu")
    logprobs = ppo.response_logprobs(Bigram(TABLE), e, temperature)
    table = (TABLE / temperature).log_softmax(-1)
    expected = torch.tensor([[table[2, 4], table[4, 5], table[5, END]], [table[3, 6], 0, 0]])
    torch.testing.assert_close(logprobs, expected)


def test_the_value_of_a_response_token_is_that_of_the_text_before_it():
    model = random_gpt(kind=ScalarModel)
    e = ppo.make_episodes([[1, 2], [3]], [[4, END], [5, 6, 7]], END, "cpu")
    at = lambda tokens: model(torch.tensor([tokens]))[0, -1].item()
    expected = [[at([1, 2]), at([1, 2, 4]), 0], [at([3]), at([3, 5]), at([3, 5, 6])]]
    np.testing.assert_allclose(ppo.response_values(model, e).detach(), expected, atol=1e-5)


def test_scores_are_read_at_the_end_of_text_of_each_row_and_a_cut_one_pays():  # pitfalls 5, 6, 30, 32
    model = random_gpt(kind=ScalarModel)
    prompts, responses = [[1, 2], [3], [3]], [[4, END], [5, 6, 7], [END]]
    scores, cut = ppo.reward_scores(model, ppo.make_episodes(prompts, responses, END, "cpu"), END, penalty=1.5)
    at = lambda tokens: model(torch.tensor([tokens]))[0, -1].item()
    assert scores.tolist() == pytest.approx([at([1, 2, 4, END]), at([3, 5, 6, 7, END]) - 1.5, at([3, END])], abs=1e-5)
    assert cut.tolist() == [False, True, False]


def test_ppo_and_the_reward_models_training_read_the_same_tokens(letters):  # pitfall 30
    model = random_gpt(kind=ScalarModel)
    episodes = [readers.episode("bcd", "ab", letters.tokenizer), readers.episode("h", "aaaaaa", letters.tokenizer)]
    trained = reward.last_scores(model, episodes, END, "cpu")
    e = ppo.make_episodes(*zip(*episodes), END, "cpu")
    torch.testing.assert_close(ppo.reward_scores(model, e, END, penalty=9.0)[0], trained)


def test_a_different_last_token_has_a_different_score():  # pitfall 6
    model = random_gpt(kind=ScalarModel)
    a, b = reward.last_scores(model, [([1], [2, END]), ([1], [2, 3])], END, "cpu")
    assert abs(a - b) > 1e-3


# ---------------------------------------------------------------- the real loop

@pytest.fixture
def batches(monkeypatch):
    """The minibatches of every iteration that ppo.main goes through."""
    seen, summarize = [], ppo.summarize
    monkeypatch.setattr(ppo, "summarize", lambda batch, *rest: seen.append(batch) or summarize(batch, *rest))
    return seen


@pytest.fixture
def updates(monkeypatch):
    """(model, gradients, learning rate) of every update, as the optimizer is about to see them."""
    seen, update = [], common.update

    def spy(optimizer, model, lr, *rest):
        seen.append((model, {name: p.grad.clone() for name, p in model.named_parameters()}, lr))
        return update(optimizer, model, lr, *rest)
    monkeypatch.setattr(common, "update", spy)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
def test_without_learning_every_ratio_is_one_and_nothing_is_clipped(letters, temperature, ptx_coef):  # pitfalls 1, 2, 20
    save(random_gpt(seed=5, dropout=0.5), letters.data / "sft.pt", letters.tokenizer)
    ppo.main(letters.ppo(lr=0.0, value_lr=0.0, temperature=temperature, ptx_coef=ptx_coef))
    for line in read_log(letters.out / "ppo"):
        assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["clip_fraction"] == 0
        assert line["kl"] == pytest.approx(0, abs=1e-4)
    assert same(weights(letters.out / "ppo/model.pt"), weights(letters.data / "sft.pt"))


def test_old_and_new_logprobs_are_of_the_same_precision(letters):  # pitfall 22
    ppo.main(letters.ppo(lr=0.0, value_lr=0.0, precision="bf16"))
    for line in read_log(letters.out / "ppo"):
        assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["kl"] == pytest.approx(0, abs=1e-4)


def test_the_first_minibatch_of_each_iteration_starts_from_ratio_one(letters, monkeypatch):
    losses, policy_loss = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda new, old, *rest: losses.append((new.detach(), old)) or policy_loss(
        new, old, *rest))
    ppo.main(letters.ppo(lr=1e-2, iterations=3))
    for i, (new, old) in enumerate(losses):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5 if i % 2 == 0 else 10)
    assert not torch.allclose(*losses[5], atol=1e-3)  # the second has a policy that has moved


def test_dropout_of_fine_tuning_is_gone_and_what_is_scored_twice_scores_the_same(letters):  # pitfalls 1, 2
    save(random_gpt(seed=5, dropout=0.5), letters.data / "sft.pt", letters.tokenizer)
    e = ppo.make_episodes([[1, 2]], [[3, 4, END]], END, "cpu")
    policy, reference, _, _ = ppo.load_models(letters.ppo(), letters.tokenizer)
    for model in (policy, reference):
        assert torch.equal(ppo.response_logprobs(model, e, 1.0)[0], ppo.response_logprobs(model, e, 1.0)[0])
    assert torch.equal(ppo.response_logprobs(policy, e, 1.0)[0], ppo.response_logprobs(reference, e, 1.0)[0])


def test_rollouts_hold_what_each_of_the_four_models_says(letters, batches):  # pitfalls 5, 17, 20, 30, 32
    ppo.main(letters.ppo(lr=1e-2, temperature=0.7, truncation_penalty=2.0, iterations=4))
    reference, reward_model = load_model(GPT, letters.data / "sft.pt"), load_model(ScalarModel, letters.data / "reward.pt")
    assert any((e.logprobs - e.ref_logprobs).abs().max() > 0.1 for e in batches[-1])  # the policy has moved
    for batch in (batches[0], batches[-1]):
        for e in batch:
            for i, (prompt, response) in enumerate(zip(e.prompts, e.responses)):
                n = len(response)
                expected = slow_logprobs(reference, prompt, response, temperature=0.7)
                np.testing.assert_allclose(e.ref_logprobs[i, :n], expected, atol=1e-4)
                end = [] if response[-1] == END else [END]
                score = reward_model(torch.tensor([prompt + response + end]))[0, -1].item() - 2.0 * len(end)
                assert e.scores[i].item() == pytest.approx(score, abs=1e-4)
    assert any(bool(e.cut.any()) for e in batches[0]) and not all(bool(e.cut.all()) for e in batches[0])


def test_rollouts_are_sampled_at_the_temperature_that_was_asked_for(letters, batches):  # pitfall 20
    ppo.main(letters.ppo(lr=0.0, temperature=1e-3))
    policy = load_model(GPT, letters.data / "sft.pt")
    for e in batches[0]:  # next to 0, the likeliest token every time
        assert e.responses == generate(policy, e.prompts, 6, torch.zeros(4, 6), temperature=0)


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not(letters, batches):  # pitfalls 12, 13, 25
    config = letters.ppo(gamma=0.9, lam=0.8, beta=0.2)
    ppo.main(config)
    for batch in batches:
        expected = []
        for e in batch:
            rewards = ppo.kl_penalized_rewards(e.scores, e.logprobs, e.ref_logprobs, e.mask, 0.2)
            advantages, returns = ppo.gae(rewards, e.values, e.mask, 0.9, 0.8)
            expected.append(advantages[e.mask])
            assert torch.equal(e.returns, returns)
        expected = torch.cat(expected)
        expected = (expected - expected.mean()) / expected.std(correction=0)
        torch.testing.assert_close(torch.cat([e.advantages[e.mask] for e in batch]), expected, rtol=1e-4, atol=1e-4)
        assert all((e.advantages[~e.mask] == 0).all() for e in batch)


def test_logged_numbers_are_means_over_the_batch_an_episode_or_a_token(letters, batches):  # pitfalls 18, 33
    ppo.main(letters.ppo(lr=1e-2))
    for line, batch in zip(read_log(letters.out / "ppo"), batches):
        rows = [(e, i, len(r)) for e in batch for i, r in enumerate(e.responses)]
        tokens = sum(n for _, _, n in rows)
        kl = sum((e.logprobs - e.ref_logprobs)[i, :n].sum().item() for e, i, n in rows)
        assert line["kl"] == pytest.approx(kl / 8, abs=1e-4) and line["length"] == pytest.approx(tokens / 8)
        assert line["reward"] == pytest.approx(sum(e.scores[i].item() for e, i, _ in rows) / 8, abs=1e-5)
        assert line["entropy"] == pytest.approx(-sum(e.logprobs[i, :n].sum().item() for e, i, n in rows) / tokens, abs=1e-5)
        assert line["truncated"] == sum(e.responses[i][-1] != END for e, i, _ in rows) / 8
        returns, values = (np.concatenate([x(e)[i, :n].numpy() for e, i, n in rows])
                           for x in (lambda e: e.returns, lambda e: e.values))
        explained = 1 - np.var(returns - values) / np.var(returns)
        assert line["explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_what_is_logged_of_updates_is_their_mean(letters, monkeypatch):
    losses, norms, update, policy_loss, value_loss = {"policy": [], "value": []}, [], common.update, ppo.policy_loss, ppo.value_loss

    def policy(*rest):
        loss, diagnostics = policy_loss(*rest)
        losses["policy"].append((loss.item(), diagnostics["ratio"].item(), diagnostics["clipped"].item(), int(rest[3].sum())))
        return loss, diagnostics

    def value(*rest):
        losses["value"].append(value_loss(*rest))
        return losses["value"][-1]

    def spy(optimizer, model, *rest):
        norm = update(optimizer, model, *rest)
        norms.extend([norm] if isinstance(model, GPT) else [])
        return norm
    monkeypatch.setattr(ppo, "policy_loss", policy)
    monkeypatch.setattr(ppo, "value_loss", value)
    monkeypatch.setattr(common, "update", spy)
    ppo.main(letters.ppo(lr=3e-2, clip=0.01))
    mean = lambda numbers: sum(numbers) / len(numbers)
    log = read_log(letters.out / "ppo")
    for i, line in enumerate(log):  # two minibatches each
        two = losses["policy"][2 * i : 2 * i + 2]
        tokens = sum(n for *_, n in two)
        assert line["policy_loss"] == pytest.approx(mean([loss for loss, *_ in two]))
        assert line["ratio"] == pytest.approx(sum(ratio for _, ratio, _, _ in two) / tokens)
        assert line["clip_fraction"] == pytest.approx(sum(clipped for _, _, clipped, _ in two) / tokens)
        assert line["value_loss"] == pytest.approx(mean([x.item() for x in losses["value"][2 * i : 2 * i + 2]]))
        assert line["grad_norm"] == pytest.approx(mean(norms[2 * i : 2 * i + 2]))
    assert any(line["clip_fraction"] > 0 for line in log)


def test_the_logged_pretraining_loss_is_the_mean_over_an_iterations_updates(letters):
    ppo.main(letters.ppo(lr=0.0, iterations=1))
    model = load_model(GPT, letters.data / "sft.pt")
    text = readers.PretrainingText(letters.data / "pretrain.train.bin", letters.tokenizer, model.config.context)
    expected = []
    for update in range(2):
        terms = [-p for context, targets in text.pairs(text.draw(4, 0, "ppo", update)) for p in slow_logprobs(model, context, targets)]
        expected.append(sum(terms) / len(terms))
    assert read_log(letters.out / "ppo")[0]["ptx_loss"] == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_no_two_iterations_sample_with_the_same_numbers(letters, batches):  # pitfall 38
    write_lines(letters.data / "prompts.train.jsonl", [{"prompt": "bcd", "user": "u"}] * 8)
    ppo.main(letters.ppo(lr=0.0))
    responses = [[r for e in batch for r in e.responses] for batch in batches]
    assert responses[0] != responses[1] != responses[2] != responses[0]
    assert len({tuple(r) for r in responses[0]}) > 3  # nor two episodes of one


def test_another_seed_is_another_run_and_the_same_seed_the_same(letters):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ppo.main(letters.ppo(out=str(letters.out / name), seed=seed))
        runs[name] = weights(letters.out / name / "model.pt")
    assert same(runs["a"], runs["b"]) and not same(runs["a"], runs["c"])


def test_every_prompt_comes_once_before_any_comes_again(letters, batches):
    words = [a + b for a in "bcdef" for b in "bcdefgh"][:24]
    write_lines(letters.data / "prompts.train.jsonl", [{"prompt": word, "user": "u"} for word in words])
    ppo.main(letters.ppo(iterations=6))
    said = [letters.tokenizer.decode(p) for batch in batches for e in batch for p in e.prompts]
    assert sorted(said[:24]) == sorted(said[24:]) == sorted(words) and said[:24] != said[24:]


def test_the_gradient_is_that_of_ppo_plus_the_coefficient_times_that_of_pretraining(letters, updates):  # pitfalls 34, 35
    common_to_both = dict(iterations=1, minibatch_size=8, ptx_rows=1.5, temperature=0.7)  # which is of the rollouts alone
    ppo.main(letters.ppo(**common_to_both, ptx_coef=0.0, out=str(letters.out / "plain")))
    ppo.main(letters.ppo(**common_to_both, ptx_coef=0.7))
    plain, mixed = [gradients for model, gradients, _ in updates if isinstance(model, GPT)]
    model = load_model(GPT, letters.data / "sft.pt")
    text = readers.PretrainingText(letters.data / "pretrain.train.bin", letters.tokenizer, model.config.context)
    rows = [text.tokens[slice(*text.rows[i])].tolist() for i in text.draw(12, 0, "ppo", 0)]
    summed = sum(F.cross_entropy(model(torch.tensor([row[:-1]]))[0], torch.tensor(row[1:]), reduction="sum") for row in rows)
    (summed / sum(len(row) - 1 for row in rows)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mixed[name], plain[name] + 0.7 * p.grad, rtol=1e-3, atol=1e-6)
    norm = sum((g**2).sum() for g in mixed.values()).sqrt().item()  # clipped when complete
    log = read_log(letters.out / "ppo")[0]
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert log["ptx_loss"] == pytest.approx(summed.item() / sum(len(row) - 1 for row in rows), rel=1e-5)


def test_pretraining_rows_differ_from_update_to_update(letters, monkeypatch):
    drawn, draw = [], readers.PretrainingText.draw
    monkeypatch.setattr(readers.PretrainingText, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    ppo.main(letters.ppo(iterations=2))
    assert [len(rows) for rows in drawn] == [4] * 4 and len({tuple(rows) for rows in drawn}) == 4


def test_plain_ppo_needs_no_pretraining_text(letters):
    (letters.data / "pretrain.train.bin").unlink()
    ppo.main(letters.ppo(ptx_coef=0.0))
    with pytest.raises(UserError, match="pretrain.train.bin is missing"):
        ppo.main(letters.ppo(ptx_coef=0.5))


def test_what_is_saved_is_the_average_of_the_weights_after_each_update(letters, monkeypatch):
    after, update = [], common.update

    def spy(optimizer, model, *rest):
        norm = update(optimizer, model, *rest)
        if isinstance(model, GPT):
            after.append({name: p.detach().double() for name, p in model.state_dict().items()})
        return norm
    monkeypatch.setattr(common, "update", spy)
    ppo.main(letters.ppo(lr=1e-2, ema=0.9))
    assert len(after) == 3 * 2
    expected = {name: p.double() for name, p in weights(letters.data / "sft.pt").items()}
    for step in after:
        expected = {name: 0.9 * expected[name] + 0.1 * step[name] for name in expected}
    saved = weights(letters.out / "ppo/model.pt")
    for name in expected:
        torch.testing.assert_close(saved[name].double(), expected[name], rtol=0, atol=1e-6)
    assert (saved["tokens.weight"] - after[-1]["tokens.weight"]).abs().max() > 1e-3


def test_policy_and_value_are_each_clipped_by_their_own_setting(letters, monkeypatch):
    seen = set()
    for name in ("policy_loss", "value_loss"):
        def spy(new, old, target, mask, clip, count, name=name, loss=getattr(ppo, name)):
            seen.add((name, clip))
            return loss(new, old, target, mask, clip, count)
        monkeypatch.setattr(ppo, name, spy)
    ppo.main(letters.ppo(clip=0.1, value_clip=0.3))
    assert seen == {("policy_loss", 0.1), ("value_loss", 0.3)}


def test_learning_rates_warm_up_over_ten_iterations_and_stay(letters, updates):
    ppo.main(letters.ppo(iterations=12, lr=1.0e-3, value_lr=2.0e-3, minibatch_size=4))
    policy = [lr for model, _, lr in updates if isinstance(model, GPT)]
    value = [lr for model, _, lr in updates if isinstance(model, ScalarModel)]
    assert policy == pytest.approx([1e-3 * min(1, 0.1 + 0.09 * i) for i in range(12) for _ in range(2)])  # two minibatches
    assert value == pytest.approx([2 * lr for lr in policy])


def test_reference_and_reward_model_never_change_and_the_value_function_starts_at_the_reward_model(letters):
    models = ppo.load_models(letters.ppo(), letters.tokenizer)
    policy, reference, reward_model, value = models
    assert [any(p.requires_grad for p in m.parameters()) for m in models] == [True, False, False, True]
    assert same(policy.state_dict(), reference.state_dict()) and same(reward_model.state_dict(), value.state_dict())
    assert len({p.data_ptr() for m in models for p in m.parameters()}) == sum(len(list(m.parameters())) for m in models)


def test_the_value_function_learns_to_foresee_the_return(letters, batches):  # pitfall 25
    ppo.main(letters.ppo(iterations=30, batch_size=32, minibatch_size=8, max_new_tokens=2, truncation_penalty=5.0,
                         lr=0.0, value_lr=2e-2, value_clip=10.0, ptx_coef=0.0))
    log = read_log(letters.out / "ppo")  # nearly every response of 2 tokens is cut, so a return of -5 is no surprise
    assert log[-1]["value_loss"] < 0.5 * log[0]["value_loss"]
    values, returns = (torch.cat([x(e)[e.mask] for e in batches[-1]]) for x in (lambda e: e.values, lambda e: e.returns))
    assert returns.mean() < -3 and abs(values.mean() - returns.mean()) < 1


def test_the_reward_model_made_by_hand_prefers_a():
    model = share_of_a()
    at = lambda word: model(torch.tensor([["abcdefgh".index(c) for c in word] + [END]]))[0, -1].item()
    assert at("aaaa") > at("aaab") > at("aabb") > at("abbb") > at("bbbb") and at("aabb") == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_ppo_raises_a_reward_that_a_student_can_see_through(letters, seed):
    ppo.main(letters.ppo(seed=seed, iterations=25, batch_size=32, minibatch_size=8, lr=5e-3, value_lr=1e-3, beta=0.02,
                         ptx_coef=0.0, truncation_penalty=0.0, ema=0.9))
    log = read_log(letters.out / "ppo")
    assert log[-1]["reward"] > log[0]["reward"] + 1.0 and log[-1]["kl"] > 0.5
    policy = load_model(GPT, letters.out / "ppo/model.pt")
    said = generate(policy, [[1, 2]] * 50, 6, torch.rand(50, 6, generator=torch.Generator().manual_seed(0)))
    assert sum(r.count(0) for r in said) > 0.6 * sum(map(len, said))


def test_a_large_beta_holds_the_policy_at_the_reference(letters):
    kl = {}
    for beta in (0.0, 10.0):
        ppo.main(letters.ppo(out=str(letters.out / str(beta)), iterations=15, batch_size=32, minibatch_size=8, lr=5e-3,
                             beta=beta, ptx_coef=0.0))
        kl[beta] = read_log(letters.out / str(beta))[-1]["kl"]
    assert kl[10.0] < 0.2 * kl[0.0]


def test_pretraining_gradients_keep_the_pretraining_loss_down(letters):
    loss = {}
    for coef in (1e-9, 1.0):
        ppo.main(letters.ppo(out=str(letters.out / str(coef)), iterations=15, batch_size=32, minibatch_size=8, lr=5e-3,
                             ptx_coef=coef))
        loss[coef] = read_log(letters.out / str(coef))[-1]["ptx_loss"]
    assert loss[1.0] < loss[1e-9] - 0.1


# ---------------------------------------------------------------- stopping and going on

def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(letters, stop_and_go_on, batches):
    ppo.main(letters.ppo(iterations=5, out=str(letters.out / "whole")))
    stop_and_go_on(ppo.main, letters.ppo(iterations=5), step=3)
    assert len(batches) == 5 + 4 + 2  # gone on from iteration 3, not from the start
    assert same(weights(letters.out / "whole/model.pt"), weights(letters.out / "ppo/model.pt"))
    a, b = ([{k: v for k, v in line.items() if k != "episodes_per_second"} for line in read_log(letters.out / name)]
            for name in ("whole", "ppo"))
    assert a == b
    assert (letters.out / "whole/samples.txt").read_bytes() == (letters.out / "ppo/samples.txt").read_bytes()
    assert sorted(p.name for p in (letters.out / "ppo").iterdir()) == ["log.jsonl", "model.pt", "samples.txt"]


# ---------------------------------------------------------------- bad input

def refused(letters, message, **changes):
    with pytest.raises(UserError, match=message):
        ppo.main(letters.ppo(**changes))
    assert not (letters.out / "ppo").exists()


def test_a_prompt_too_long_for_the_context_is_named(letters):
    lines = (letters.data / "prompts.train.jsonl").read_text().splitlines()
    lines[3] = '{"prompt": "' + "b" * 60 + '", "user": "u"}'
    (letters.data / "prompts.train.jsonl").write_text("\n".join(lines))
    refused(letters, r"prompts.train.jsonl:4: a prompt of 60 tokens; this run takes 1 to 57")


def test_models_of_the_wrong_kind_or_vocabulary_are_refused(letters):
    refused(letters, "reward.pt holds no GPT", policy=str(letters.data / "reward.pt"))
    refused(letters, "sft.pt holds no ScalarModel", reward=str(letters.data / "sft.pt"))
    letters.tokenizer.fingerprint = "another"
    save(random_gpt(), letters.data / "foreign.pt", letters.tokenizer)
    refused(letters, "foreign.pt was trained with another vocabulary", policy=str(letters.data / "foreign.pt"))


def test_too_few_prompts_for_a_batch_are_refused(letters):
    refused(letters, "48 prompts are less than one batch of 64", batch_size=64)


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=8, minibatch_size=3), "--batch_size 8 is not a multiple of --minibatch_size 3"),
    (dict(temperature=0.0), "--temperature is above 0"),
    (dict(lr=-1.0), "at least 0"),
    (dict(ptx_rows=0.0), "for plain PPO say --ptx_coef 0"),
    (dict(ema=1.0), "--ema"),
    (dict(iterations=0), "at least 1"),
    (dict(clip=-0.2), "at least 0"),
    (dict(value_clip=-0.2), "at least 0"),
])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.Config(**changes)
