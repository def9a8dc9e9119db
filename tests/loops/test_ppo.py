"""PPO's rollouts and updates: the real loop on eight letters. The math has its own tests, in tests/math."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ppo
from common.config import UserError
from common.learner import Learner
from conftest import Bigram, cpu, load_model, random_gpt, read_log, same, save, share_of_a, slow_logprobs, weights, write_lines
from data import readers
from model import GPT, ScalarModel, generate

END = 8


# ---------------------------------------------------------------- rollouts

TABLE = torch.log_softmax(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)), -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_responses_are_the_bigram_tables_entries(temperature):  # pitfalls 3, 20
    rollout = ppo.make_rollout([([1, 2], [4, 5, END]), ([3], [6])], END, "cpu")
    logprobs = Bigram(TABLE)(rollout.tokens, rollout.positions, temperature) * rollout.mask
    table = (TABLE / temperature).log_softmax(-1)
    expected = torch.tensor([[table[2, 4], table[4, 5], table[5, END]], [table[3, 6], 0, 0]])
    torch.testing.assert_close(logprobs, expected)


def test_the_value_of_a_response_token_is_that_of_the_text_before_it():
    model = random_gpt(kind=ScalarModel)
    rollout = ppo.make_rollout([([1, 2], [4, END]), ([3], [5, 6, 7])], END, "cpu")
    at = lambda tokens: model(torch.tensor([tokens]))[0, -1].item()
    expected = [[at([1, 2]), at([1, 2, 4]), 0], [at([3]), at([3, 5]), at([3, 5, 6])]]
    values = model(rollout.tokens, rollout.positions) * rollout.mask
    np.testing.assert_allclose(values.detach(), expected, atol=1e-5)


@pytest.fixture
def scored(letters):
    """scored(pairs, **changes): a rollout of (prompt, response) pairs, scored by four random models."""
    def score(pairs, **changes):
        policy, ref_policy = random_gpt(seed=1), random_gpt(seed=2)
        reward_model, value_model = random_gpt(seed=3, kind=ScalarModel), random_gpt(seed=4, kind=ScalarModel)
        rollout = ppo.make_rollout(pairs, END, "cpu")
        ppo.score_rollout(rollout, Learner(policy, 0.0, cpu()), ref_policy, reward_model, Learner(value_model, 0.0, cpu()),
                          letters.ppo(**changes), END)
        return rollout, reward_model
    return score


def test_scores_are_read_at_the_end_of_text_and_a_truncated_response_pays(scored):  # pitfalls 5, 6, 30, 32
    pairs = [([1, 2], [4, END]), ([3], [5, 6, 7]), ([3], [END])]
    rollout, reward_model = scored(pairs, truncation_penalty=1.5)
    at = lambda tokens: reward_model(torch.tensor([tokens]))[0, -1].item()
    expected = [at([1, 2, 4, END]), at([3, 5, 6, 7, END]) - 1.5, at([3, END])]
    assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert rollout.truncated.tolist() == [False, True, False]


def test_what_is_outside_the_mask_is_zero_in_a_scored_rollout(scored):  # pitfalls 10, 11
    rollout, _ = scored([([1, 2], [4, END]), ([3], [5, 6, 7, 0, 1, END])], beta=0.5)
    for name in ("logprobs", "ref_logprobs", "values", "kl", "rewards"):
        x = getattr(rollout, name)
        assert x.shape == rollout.mask.shape == (2, 6) and (x[~rollout.mask] == 0).all() and x[rollout.mask].all(), name
    torch.testing.assert_close(rollout.kl, rollout.logprobs - rollout.ref_logprobs)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - 0.5 * rollout.kl.sum(1))


def test_ppo_and_the_reward_models_training_read_the_same_tokens(letters, scored):  # pitfall 30
    examples = [readers.example("bcd", "ab", letters.tokenizer), readers.example("h", "aaaaaa", letters.tokenizer)]
    rollout, reward_model = scored(examples, truncation_penalty=9.0)
    torch.testing.assert_close(rollout.scores, readers.last_scores(reward_model, examples, END, "cpu").detach())


def test_a_score_is_read_at_the_end_of_text_and_not_at_the_token_before_it():  # pitfall 6
    model = random_gpt(kind=ScalarModel)
    (score,) = readers.last_scores(model, [([1], [2, END])], END, "cpu")
    before, end = model(torch.tensor([[1, 2, END]]))[0, 1:]
    assert score.item() == pytest.approx(end.item(), abs=1e-5) and abs(score - before) > 1e-3


# ---------------------------------------------------------------- the real loop

@pytest.fixture
def batches(monkeypatch):
    """The minibatches of every iteration that ppo.main goes through."""
    seen, statistics = [], ppo.rollout_statistics
    monkeypatch.setattr(ppo, "rollout_statistics", lambda rollouts, runtime: seen.append(rollouts) or statistics(rollouts, runtime))
    return seen


@pytest.fixture
def updates(monkeypatch):
    """(model, gradients, learning rate) of every update, as the optimizer is about to see them."""
    seen, step = [], Learner.step

    def spy(learner, lr):
        seen.append((learner.model, {name: p.grad.clone() for name, p in learner.model.named_parameters()}, lr))
        return step(learner, lr)
    monkeypatch.setattr(Learner, "step", spy)
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

    def spy(new, old, advantages, mask, *rest):
        losses.append((new.detach()[mask], old[mask]))
        return policy_loss(new, old, advantages, mask, *rest)
    monkeypatch.setattr(ppo, "policy_loss", spy)
    ppo.main(letters.ppo(lr=1e-2, iterations=3))
    for i, (new, old) in enumerate(losses):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5 if i % 2 == 0 else 10)
    assert not torch.allclose(*losses[5], atol=1e-3)  # the second has a policy that has moved


def test_dropout_of_fine_tuning_is_gone_and_what_is_scored_twice_scores_the_same(letters):  # pitfalls 1, 2
    save(random_gpt(seed=5, dropout=0.5), letters.data / "sft.pt", letters.tokenizer)
    batch = readers.make_batch([([1, 2], [3, 4, END])], END)
    policy, ref_policy, *_ = ppo.load_models(letters.ppo(), letters.tokenizer, cpu())
    one, again, reference = (model(batch.tokens, batch.positions) for model in (policy, policy, ref_policy))
    assert torch.equal(one, again) and torch.equal(one, reference)


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
    assert any(bool(e.truncated.any()) for e in batches[0]) and not all(bool(e.truncated.all()) for e in batches[0])


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
        score = sum(e.scores[i].item() for e, i, _ in rows) / 8
        assert line["score"] == pytest.approx(score, abs=1e-5)
        assert line["reward"] == pytest.approx(score - letters.ppo().beta * kl / 8, abs=1e-5)
        assert line["entropy"] == pytest.approx(-sum(e.logprobs[i, :n].sum().item() for e, i, n in rows) / tokens, abs=1e-5)
        assert line["truncated"] == sum(e.responses[i][-1] != END for e, i, _ in rows) / 8
        returns, values = (np.concatenate([x(e)[i, :n].numpy() for e, i, n in rows])
                           for x in (lambda e: e.returns, lambda e: e.values))
        explained = 1 - np.var(returns - values) / np.var(returns)
        assert line["explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_what_is_logged_of_updates_is_their_mean(letters, monkeypatch):
    losses, norms, step = {"policy": [], "value": []}, [], Learner.step
    policy_loss, value_loss = ppo.policy_loss, ppo.value_loss

    def policy(*rest):
        loss, diagnostics = policy_loss(*rest)
        losses["policy"].append((loss.item(), diagnostics["ratio"].item(), diagnostics["clipped"].item(), int(rest[3].sum())))
        return loss, diagnostics

    def value(*rest):
        losses["value"].append(value_loss(*rest))
        return losses["value"][-1]

    def spy(learner, lr):
        norm = step(learner, lr)
        norms.extend([norm] if isinstance(learner.model, GPT) else [])
        return norm
    monkeypatch.setattr(ppo, "policy_loss", policy)
    monkeypatch.setattr(ppo, "value_loss", value)
    monkeypatch.setattr(Learner, "step", spy)
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
    after, step = [], Learner.step

    def spy(learner, lr):
        norm = step(learner, lr)
        if isinstance(learner.model, GPT):
            after.append({name: p.detach().double() for name, p in learner.model.state_dict().items()})
        return norm
    monkeypatch.setattr(Learner, "step", spy)
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


def test_reference_and_reward_model_are_frozen_and_the_value_model_starts_as_reward(letters):
    policy, reference, ema, reward_model, value = ppo.load_models(letters.ppo(), letters.tokenizer, cpu())
    models = [policy.model, reference, ema, reward_model, value.model]
    assert [any(p.requires_grad for p in m.parameters()) for m in models] == [True, False, False, False, True]
    assert same(policy.model.state_dict(), reference.state_dict()) and same(reward_model.state_dict(), value.model.state_dict())
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
    assert log[-1]["score"] > log[0]["score"] + 1.0 and log[-1]["kl"] > 0.5
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
    assert sorted(p.name for p in (letters.out / "ppo").iterdir()) == ["log.jsonl", "model.pt", "samples.txt", "value.pt"]


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
