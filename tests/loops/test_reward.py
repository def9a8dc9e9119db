"""Scores, and the reward model's real loop on eight letters."""

import json
import math
import random
import shutil

import pytest
import torch

import reward
from common.config import UserError
from common.learner import Learner
from conftest import brute_ranking_loss, cpu, load_model, random_gpt, read_log, same, save, weights, write_lines
from data import batches, readers
from model import GPT, GPTConfig, ScalarModel

END = 8


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score_alone(model, prompt, response, tokenizer):
    """The score of one text, read alone, at its end of text."""
    return model(torch.tensor([tokenizer.encode(prompt) + tokenizer.encode(response) + [END]]))[0, -1].item()


# ---------------------------------------------------------------- scores

def test_the_score_of_a_row_is_the_same_alone_and_among_longer_ones():  # pitfalls 5, 10
    model = random_gpt(kind=ScalarModel)
    episodes = [([1, 2], [3, END]), ([4], [5, 6, 7, 0, 1, END]), ([2], [END])]
    together = readers.last_scores(model, episodes, END, "cpu")
    assert together.shape == (3,)
    alone = [model(torch.tensor([prompt + response]))[0, -1].item() for prompt, response in episodes]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("seen", [{"labeler-0", "labeler-1", "labeler-2"}, {"stranger"}, {"labeler-1"}])
def test_validation_is_the_accuracy_on_labelers_that_were_seen_and_on_others(letters, seen):
    comparisons = batches.load_comparisons(str(letters.data), "valid", letters.tokenizer, 64)
    model = load_model(ScalarModel, letters.data / "reward.pt")
    loss, accuracy, held_out = reward.validate(model, comparisons, seen, END, cpu())
    pairs, right, losses = {True: 0, False: 0}, {True: 0, False: 0}, []
    for r in records(letters.data / "comparisons.valid.jsonl"):
        scores = [score_alone(model, r["prompt"], response, letters.tokenizer) for response in r["responses"]]
        ranked = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if r["ranks"][i] < r["ranks"][j]]
        pairs[r["labeler"] in seen] += len(ranked)
        right[r["labeler"] in seen] += sum(scores[i] > scores[j] for i, j in ranked)
        losses += [brute_ranking_loss(scores, r["ranks"])] if ranked else []
    assert accuracy == right[True] / pairs[True] and held_out == right[False] / pairs[False]
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_without_pairs_of_held_out_labelers_there_is_no_accuracy_on_them(letters):
    comparisons = batches.load_comparisons(str(letters.data), "valid", letters.tokenizer, 64)
    model = load_model(ScalarModel, letters.data / "reward.pt")
    everyone = {labeler for _, _, labeler in comparisons}
    assert reward.validate(model, comparisons, everyone, END, cpu())[2] is None
    assert reward.validate(model, comparisons, set(), END, cpu())[1] is None


def test_a_rank_without_a_comparison_of_its_own_adds_nothing(letters, monkeypatch):
    comparisons = batches.load_comparisons(str(letters.data), "valid", letters.tokenizer, 64)[:3]
    model, runtime, sums = load_model(ScalarModel, letters.data / "reward.pt"), cpu(), []
    examples = [example for examples, _, _ in comparisons for example in examples][:3]
    all_reduce = runtime.all_reduce
    monkeypatch.setattr(runtime, "all_reduce", lambda *numbers: sums.append(all_reduce(*numbers)) or sums[-1])
    reward.validate(model, comparisons, {"stranger"}, END, runtime)
    score = reward.demonstration_score(model, examples, END, runtime)
    whole, sums[:] = sums[0], []

    def on_four_ranks(work):
        monkeypatch.setattr(runtime, "world_size", 4)
        monkeypatch.setattr(runtime, "all_reduce", lambda *numbers: sums.append(numbers) or list(numbers))
        results = []
        for rank in range(4):
            monkeypatch.setattr(runtime, "rank", rank)
            results.append(work())
        return results

    on_four_ranks(lambda: reward.validate(model, comparisons, {"stranger"}, END, runtime))
    assert [sum(numbers) for numbers in zip(*sums)] == pytest.approx(whole)
    scores = on_four_ranks(lambda: reward.demonstration_score(model, examples, END, runtime))
    assert sum(scores) == pytest.approx(score)


# ---------------------------------------------------------------- the real loop

@pytest.fixture
def read(monkeypatch):
    """The episodes of every call that gives scores."""
    seen, last_scores = [], readers.last_scores
    monkeypatch.setattr(readers, "last_scores", lambda model, examples, *rest: seen.append(examples) or last_scores(
        model, examples, *rest))
    return seen


def test_the_logged_loss_is_the_mean_over_prompts_that_have_a_pair(letters, monkeypatch):  # pitfall 28
    uneven = [{"prompt": "b", "responses": ["a", "b"], "ranks": [1, 2]},
              {"prompt": "cd", "responses": ["a", "bb", "ccc", "d", "e"], "ranks": [5, 1, 3, 2, 4]},
              {"prompt": "d", "responses": ["a", "b", "cc"], "ranks": [1, 2, 2]},
              {"prompt": "e", "responses": ["a", "b"], "ranks": [1, 1]}]
    write_lines(letters.data / "comparisons.train.jsonl", [{**r, "labeler": "labeler-0"} for r in uneven])
    heads = []
    monkeypatch.setattr(reward, "demonstration_score", lambda model, *rest: heads.append(model) or 0.0)
    reward.main(letters.reward(batch_size=4, lr=0.0))
    (line,) = read_log(letters.out / "reward")
    scores = [[score_alone(heads[0], r["prompt"], text, letters.tokenizer) for text in r["responses"]] for r in uneven]
    losses = [brute_ranking_loss(s, r["ranks"]) for s, r in zip(scores, uneven)]
    assert line["pairs"] == 1 + 10 + 2 and line["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    right = lambda s, order: sum(s[i] > s[j] for i in range(len(s)) for j in range(len(s)) if order[i] < order[j])
    assert line["accuracy"] == sum(right(s, r["ranks"]) for s, r in zip(scores, uneven)) / 13
    valid = records(letters.data / "comparisons.valid.jsonl")  # of which half are a stranger's
    for name, mine in (("valid", [r for r in valid if r["labeler"] == "labeler-0"]),
                       ("held_out", [r for r in valid if r["labeler"] != "labeler-0"])):
        scores = [[score_alone(heads[0], r["prompt"], text, letters.tokenizer) for text in r["responses"]] for r in mine]
        pairs = sum(a < b for r in mine for a in r["ranks"] for b in r["ranks"])
        assert line[f"{name}_accuracy"] == sum(right(s, r["ranks"]) for s, r in zip(scores, mine)) / pairs


def test_gradients_are_of_the_mean_over_prompts(letters, monkeypatch):  # pitfalls 28, 34
    seen, step = [], Learner.step

    def remember(learner, lr):
        parameters = dict(learner.model.named_parameters())
        seen.append(({n: p.detach().clone() for n, p in parameters.items()}, {n: p.grad.clone() for n, p in parameters.items()}))
        return step(learner, lr)

    monkeypatch.setattr(Learner, "step", remember)
    reward.main(letters.reward(batch_size=48))
    before, grads = seen[0]
    model = load_model(ScalarModel, letters.out / "reward/model.pt")
    model.load_state_dict(before)
    losses = []
    for r in records(letters.data / "comparisons.train.jsonl"):
        scores = torch.stack([model(torch.tensor([letters.tokenizer.encode(r["prompt"] + text) + [END]]))[0, -1]
                              for text in r["responses"]])
        loss, pairs, _ = reward.ranking_loss(scores, torch.tensor(r["ranks"]))
        losses += [loss] if pairs else []
    (sum(losses) / len(losses)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


def test_all_responses_of_a_prompt_are_read_together_and_once_an_epoch(letters, read):  # pitfall 29
    reward.main(letters.reward(epochs=2, batch_size=8))
    of = {str([readers.example(r["prompt"], text, letters.tokenizer) for text in r["responses"]]): i
          for i, r in enumerate(records(letters.data / "comparisons.train.jsonl"))}
    seen = []
    for episodes in read[:6] + read[6 + 8 : 12 + 8]:  # the steps of both epochs; a call a prompt of validation between them
        groups, start = [], 0
        for stop in range(2, len(episodes) + 1):
            if str(episodes[start:stop]) in of:
                groups.append(of[str(episodes[start:stop])])
                start = stop
        assert start == len(episodes) and len(groups) == 8  # whole prompts and nothing else
        seen += groups
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48)) and seen[:48] != seen[48:]


def test_the_trunk_starts_as_the_sft_models_and_the_head_anew(letters):
    reward.main(letters.reward(lr=0.0))
    trunk, model = weights(letters.data / "sft.pt"), weights(letters.out / "reward/model.pt")
    assert set(model) - set(trunk) == {"head.weight", "head.bias"}
    assert all(torch.equal(trunk[name], model[name]) for name in trunk) and model["head.weight"].abs().sum() > 0


def test_another_set_of_comparisons_or_another_seed_starts_from_another_random_head(letters):  # pitfall 41
    other = letters.out / "other"
    shutil.copytree(letters.data, other)
    lines = (other / "comparisons.train.jsonl").read_text().splitlines(keepends=True)
    (other / "comparisons.train.jsonl").write_text("".join(lines[1:]))
    runs = dict(first={}, again=dict(lr=1e-3), seed=dict(seed=1), data=dict(data=str(other)))
    heads, seeds = {}, {}
    for name, changes in runs.items():
        reward.main(letters.reward(**dict(lr=0.0) | changes, out=str(letters.out / name)))
        checkpoint = torch.load(letters.out / name / "model.pt", weights_only=True)
        heads[name], seeds[name] = checkpoint["model"]["head.weight"], checkpoint["head_seed"]
    assert seeds["first"] == seeds["again"] and len({seeds[name] for name in ("first", "seed", "data")}) == 3
    for a, b in (("first", "seed"), ("first", "data"), ("seed", "data")):
        assert not torch.allclose(heads[a], heads[b])


def test_untrained_judge_and_reward_model_have_uncorrelated_margins(letters):  # pitfall 41
    torch.manual_seed(0)
    save(GPT(GPTConfig(vocab_size=9, context=64, layers=2, heads=4, width=128)), letters.data / "sft.pt", letters.tokenizer)
    margins = []
    for i in range(16):  # the same run on 16 sets of comparisons
        with open(letters.data / "comparisons.train.jsonl", "a") as file:
            file.write(json.dumps({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "labeler": f"{i}"}) + "\n")
        model, _ = reward.start_model(letters.reward(), letters.tokenizer, cpu())
        tokens = torch.randint(8, (2, 300, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            margins.append(model(tokens[0])[:, -1] - model(tokens[1])[:, -1])  # (300,)
    others = torch.corrcoef(torch.stack(margins))[~torch.eye(16, dtype=torch.bool)]
    assert others.abs().max() < 0.7 and others.mean().abs() < 0.1


def test_demonstrations_score_zero_on_average_in_the_saved_model(letters):
    reward.main(letters.reward(lr=1e-3))
    model = load_model(ScalarModel, letters.out / "reward/model.pt")
    scores = [score_alone(model, r["prompt"], r["response"], letters.tokenizer)
              for r in records(letters.data / "demonstrations.train.jsonl")]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5) and max(scores) > 0.01
    assert model.head.bias.abs().item() > 1e-4


def test_dropout_of_fine_tuning_is_gone(letters):  # pitfall 1
    save(random_gpt(seed=5, dropout=0.5), letters.data / "sft.pt", letters.tokenizer)
    for name in ("a", "b"):
        reward.main(letters.reward(out=str(letters.out / name)))
    assert torch.load(letters.out / "a/model.pt", weights_only=True)["model_config"]["dropout"] == 0
    assert read_log(letters.out / "a") == read_log(letters.out / "b")


def test_it_learns_what_labelers_prefer_and_generalises_to_strangers(letters):
    rng = random.Random(0)
    for split, many in (("train", 200), ("valid", 40)):
        lines = []
        for i in range(many):
            counts = rng.sample(range(5), 3)  # of a, in a word of five
            lines.append({"prompt": rng.choice("bcd"), "responses": ["a" * n + "b" * (4 - n) for n in counts],
                          "ranks": [5 - n for n in counts], "labeler": "stranger" if split == "valid" and i % 2 else "x"})
        write_lines(letters.data / f"comparisons.{split}.jsonl", lines)
    reward.main(letters.reward(epochs=2, lr=1e-2))
    last = read_log(letters.out / "reward")[-1]
    assert last["valid_accuracy"] > 0.9 and last["held_out_accuracy"] > 0.9 and last["valid_loss"] < 0.3
    model = load_model(ScalarModel, letters.out / "reward/model.pt")
    assert score_alone(model, "b", "aaab", letters.tokenizer) > score_alone(model, "b", "abbb", letters.tokenizer) + 1


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth(letters):
    reward.main(letters.reward(batch_size=8, lr=1e-3, epochs=2))
    expected = [1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 12))) for step in range(12)]
    assert [line["lr"] for line in read_log(letters.out / "reward")] == pytest.approx(expected)


def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(letters, stop_and_go_on):
    reward.main(letters.reward(out=str(letters.out / "whole"), epochs=2))
    stop_and_go_on(reward.main, letters.reward(epochs=2), step=7)
    assert same(weights(letters.out / "whole/model.pt"), weights(letters.out / "reward/model.pt"))
    assert read_log(letters.out / "whole") == read_log(letters.out / "reward")


# ---------------------------------------------------------------- bad input

def refused(letters, message, **changes):
    with pytest.raises(UserError, match=message):
        reward.main(letters.reward(**changes))
    assert not (letters.out / "reward").exists()


@pytest.mark.parametrize("change, message", [
    (dict(responses=["a"], ranks=[1]), "K = 1 responses; a comparison takes at least 2"),
    (dict(ranks=[1, 2, 3]), "2 responses but 3 ranks"),
    (dict(ranks=[0, 1]), "ranks are whole numbers from 1"),
    (dict(ranks=[1, 1.5]), "ranks are whole numbers from 1"),
    (dict(ranks=[True, 2]), "ranks are whole numbers from 1"),
    (dict(responses=["a", 3]), "a response is no string"),
    (dict(labeler=None), "no 'labeler'"),
    (dict(prompt=""), "empty prompt"),
    (dict(responses=["a", "b" * 80]), "82 tokens do not fit the context of 64"),
])
def test_a_comparison_that_is_none_is_named_by_file_and_line(letters, change, message):
    lines = records(letters.data / "comparisons.train.jsonl")
    lines[6] = {"prompt": "b", "responses": ["a", "b"], "ranks": [1, 2], "labeler": "x"} | change
    write_lines(letters.data / "comparisons.train.jsonl", lines)
    refused(letters, "comparisons.train.jsonl:7: .*" + message)


def test_an_empty_response_is_a_comparison_like_any_other(letters):
    lines = records(letters.data / "comparisons.train.jsonl")
    lines[6] = {"prompt": "b", "responses": ["", "b"], "ranks": [2, 1], "labeler": "x"}
    write_lines(letters.data / "comparisons.train.jsonl", lines)
    reward.main(letters.reward())
    assert all(math.isfinite(line["loss"]) for line in read_log(letters.out / "reward"))


def test_what_is_missing_or_too_little_is_refused(letters):
    refused(letters, "48 comparisons are less than one batch of 64", batch_size=64)
    refused(letters, "nowhere.pt is missing; in the default run `make sft` makes it", init="nowhere.pt")
    (letters.data / "comparisons.train.jsonl").unlink()
    refused(letters, "comparisons.train.jsonl is missing; in the default run `make comparisons` makes it")


def test_a_checkpoint_of_another_vocabulary_is_refused(letters):
    letters.tokenizer.fingerprint = "another"
    save(random_gpt(), letters.data / "foreign.pt", letters.tokenizer)
    refused(letters, "foreign.pt was trained with another vocabulary", init=str(letters.data / "foreign.pt"))


def test_a_checkpoint_without_a_language_model_is_refused(letters):
    refused(letters, "reward.pt holds no GPT", init=str(letters.data / "reward.pt"))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        reward.Config(epochs=0)
