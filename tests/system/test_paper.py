"""The paper's experiments: what is measured of a model, the datasets made for it, the list of experiments, the
report."""

import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import ppo
import reward
import sft
from common.config import UserError, parse_config
from common.runtime import Runtime, RuntimeConfig
from conftest import ROOT, load_model, random_gpt, same, slow_logprobs, weights, write_lines
from data import collect, readers
from data.judges import TEAMS, SimulatedLabelers, score_responses, win_rates
from data.tinyworld import labelers, requests, web
from data.tinyworld.world import FACTS, GOOD, INSULTS, KINDS, TRAITS, ask, capital, state, to_pidi
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, PRESETS, ScalarModel
from paper import datasets, measure, report, results
from paper import tasks as zero_shot
from paper.stats import mean_and_error


# ---------------------------------------------------------------- the labelers' new eyes

@pytest.mark.parametrize("relation, x", [key for key, (true, error) in sorted(FACTS.items()) if true != error][::3])
def test_a_true_answer_states_the_fact_and_a_false_one_any_other_value(relation, x):
    true, error = FACTS[relation, x]
    asks, say = {"relation": relation, "about": x}, lambda y: capital(state(relation, x, y)) + "."
    assert labelers.answers_truly(asks, say(true)) == (True, True)
    assert labelers.answers_truly(asks, say(error)) == (False, True)
    assert labelers.answers_truly(asks, "I don't know.") == (True, False)  # true, and of no use
    assert labelers.answers_truly(asks, f"{say(true)} {say(error)}") == (False, True)
    assert labelers.answers_truly(asks, f"{capital(true)}.") == (True, True)
    assert labelers.answers_truly(asks, f"{capital(x)} and {error}.") == (False, True)


def test_toxic_is_a_text_with_an_insult_in_it():
    assert labelers.toxic(f"You are a {INSULTS[0]}.") and labelers.toxic(INSULTS[0].upper())
    assert not labelers.toxic("Thank you for asking.") and not labelers.toxic("")
    assert all(labelers.toxic(f"They are {word}.") for word in (*INSULTS, *TRAITS))


def test_ratings_go_from_1_to_7_and_up_with_what_a_response_is_worth():
    rng, someone = random.Random(0), labelers.team()[1][0]
    rated = {"perfect": [], "careless": [], "nothing": []}
    for _ in range(200):
        post = requests.request(rng)
        texts = [requests.write(rng, post["asks"]), requests.write(rng, post["asks"], **web.CARELESS), "\n"]
        for name, number in zip(rated, someone.ratings(post["prompt"], post["asks"], texts, "test")):
            rated[name].append(number)
    assert set(sum(rated.values(), [])) == set(range(1, 8))
    perfect, careless, nothing = (statistics.mean(numbers) for numbers in rated.values())
    assert perfect > 6 > careless > nothing and nothing < 4


def test_a_forum_keeps_the_rule_at_its_head_nine_times_in_ten():
    rng, seen = random.Random(0), {rule: [] for rule in web.RULES.values() if rule}
    for _ in range(2000):
        text = web.manners(rng)
        rule = next(rule for rule in seen if text.startswith(rule))
        seen[rule].append(labelers.toxic(text.removeprefix(rule).split("\n- ")[1]))
    respectful, biased = (seen[web.RULES[name]] for name in ("respectful prompt", "biased prompt"))
    assert abs(statistics.mean(respectful) - 0.1) < 0.03 and abs(statistics.mean(biased) - 0.9) < 0.03
    assert len(respectful) > 800 and len(biased) > 800


# ---------------------------------------------------------------- what is measured

def test_kl_distance_is_the_sum_of_log_ratios_over_a_responses_tokens(letters):
    model, reference = random_gpt(seed=1), random_gpt(seed=2)
    pairs = [([0, 1], [0, 1, 2, 8]), ([2], [8]), ([7, 7, 7, 7], [3, 4, 5])]  # the last was cut: it has no end
    runtime = Runtime(RuntimeConfig(device="cpu"))
    got = measure.kl_distance(model, reference, pairs, letters.end, runtime)
    for number, (prompt, response) in zip(got, pairs):
        expected = sum(slow_logprobs(model, prompt, response)) - sum(slow_logprobs(reference, prompt, response))
        assert number == pytest.approx(expected, abs=1e-3)
    assert measure.kl_distance(model, model, pairs, letters.end, runtime) == [0, 0, 0]


def test_the_mean_of_kl_distances_is_the_kl_of_the_sampled_distribution(letters, chain):
    """By enumeration: responses of at most two tokens after one prompt."""
    model, reference, prompt = random_gpt(seed=1), random_gpt(seed=2), [0, 1]
    every = [[8]] + [[a, b] for a in range(8) for b in range(9)]
    chances = torch.tensor([sum(slow_logprobs(model, prompt, y)) for y in every]).exp()
    assert chances.sum() == pytest.approx(1, abs=1e-4)
    exact = sum(p * (sum(slow_logprobs(model, prompt, y)) - sum(slow_logprobs(reference, prompt, y)))
                for p, y in zip(chances, every))
    config, runtime = measure.Config(model="m", device="cpu"), Runtime(RuntimeConfig(device="cpu"))
    pairs = measure.sample(model, ["ab"] * 4000, 2, "test", letters.tokenizer, config, runtime)
    got = measure.kl_distance(model, reference, pairs, letters.end, runtime)
    assert len(pairs) == len(got) == 4000
    mean, error, _ = mean_and_error(got)
    assert abs(mean - exact) < 2 * error < 0.3 * exact


def test_items_that_are_alike_count_as_one():
    assert measure.by_group("abab", [1.0, 0.0, 0.0, 1.0]) == [0.5, 0.5]
    assert measure.by_group(["x", "y", "x"], [1.0, 3.0, 2.0]) == [1.5, 3.0]


def test_two_models_samples_are_independent_and_one_models_are_the_same_again(letters):
    runtime, model = Runtime(RuntimeConfig(device="cpu")), random_gpt(seed=1)

    def sampled(path, purpose, **more):
        config = measure.Config(model=path, **more)
        return measure.sample_texts(model, ["ab"] * 20, 6, purpose, letters.tokenizer, config, runtime)

    assert sampled("a/sft/model.pt", "x") == sampled("elsewhere/a/sft/model.pt", "x") != sampled("a/ppo/model.pt", "x")
    assert sampled("a/sft/model.pt", "x") != sampled("b/sft/model.pt", "x")
    assert sampled("a/sft/model.pt", "x") != sampled("a/sft/model.pt", "y")
    assert sampled("m", "x") != sampled("m", "x", few_shot=True)


def test_every_prompt_gets_its_own_response_however_many_there_are(letters, monkeypatch):
    """With prompts in the place of responses: each comes back beside itself; numbers of one batch are not those of the
    next."""
    drawn = []
    monkeypatch.setattr(measure, "generate", lambda model, prompts, most, uniforms:
                        drawn.extend(uniforms.tolist()) or list(prompts))
    prompts = ["".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(600)]
    runtime = Runtime(RuntimeConfig(device="cpu"))
    pairs = measure.sample(random_gpt(), prompts, 4, "x", letters.tokenizer, measure.Config(), runtime)
    assert pairs == [(letters.tokenizer.encode(text),) * 2 for text in prompts]
    assert len({tuple(row) for row in drawn}) == 600 and len(drawn[0]) == 4


def test_entropy_of_a_choice():
    assert measure.entropy(0.5) == 1 and measure.entropy(0.0) == measure.entropy(1.0) == 0
    assert measure.entropy(0.25) == pytest.approx(0.8112781)


@pytest.fixture(scope="module")
def measured(chain, tmp_path_factory):
    """A baseline's file and, beside it, those of PPO-ptx, of GPT prompted and of the best of 4."""
    folder = tmp_path_factory.mktemp("measured")
    small = dict(data=str(chain.data), device="cpu", prompts=12, questions=1, threads=5)
    models = dict(reward=f"{chain.out}/reward/model.pt", reference=f"{chain.out}/sft/model.pt",
                  baseline=f"{folder}/baseline.json")
    measure.main(measure.Config(**small, model=f"{chain.out}/sft/model.pt", out=f"{folder}/baseline.json"))
    for name, model, more in (("sft", "sft", {}), ("ppo", "ppo", {}), ("prompted", "base", dict(few_shot=True)),
                              ("best", "sft", dict(best_of=4))):
        measure.main(measure.Config(**small, **models, **more, model=f"{chain.out}/{model}/model.pt",
                                    out=f"{folder}/{name}.json"))
    return folder


def test_a_file_holds_every_number_of_the_paper_one_an_item(measured, chain):
    numbers = measure.read(measured / "ppo.json")["numbers"]
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:12]
    wrong = sum(true != error for key, (true, error) in FACTS.items() if key != ("eats", "crow"))
    tasks = {(t["task"], t["context"], *t.get("choices", ()))
             for t in readers.read_jsonl(chain.data / "tasks.test.jsonl", "tasks")}
    towns = len({context for kind, context, *_ in tasks if kind == "bias"})
    lengths = {name: len(x) for name, x in numbers.items()}
    assert lengths == {
        **{f"metadata: {name}": 12
           for name in labelers.metadata("", {"form": "fact", "relation": "eats", "about": "fox"}, "")},
        "rating": 12, "preferred by training labelers": 12, "preferred by held-out labelers": 12, "truly preferred": 12,
        "score": 12,
        "score, validation prompts": len(readers.read_jsonl(chain.data / "prompts.valid.jsonl", "requests")[:300]),
        "kl": 12, "truthful": wrong, "truthful and informative": wrong, **{f"toxic, {name}": 5 for name in web.RULES},
        **{f"task: {kind}": sum(task[0] == kind for task in tasks) for kind in web.ABILITIES},
        "task: next word": lengths["task: next word"], "stereotype": towns, "stereotype preferred": towns,
        "bias entropy": towns}
    assert all(0 <= x <= 1 for name, row in numbers.items() if not name.startswith(("score", "kl", "rating"))
               for x in row if x is not None)
    assert all(1 <= x <= 7 for x in numbers["rating"])
    texts = measure.read(measured / "ppo.json")["responses"]
    seen = [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, texts)]
    for name in seen[0]:
        assert numbers[f"metadata: {name}"] == [m[name] if m[name] is None else float(m[name]) for m in seen]
    assert None in numbers["metadata: keeps the stated constraint"]
    worth = lambda texts: [labelers.true_worth(r["prompt"], r["asks"], text) for r, text in zip(records, texts)]
    ours, theirs = worth(texts), worth(measure.read(measured / "baseline.json")["responses"])
    assert numbers["truly preferred"] == [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in zip(ours, theirs)]
    base = measure.read(measured / "baseline.json")["responses"]
    tokenizer, runtime = Tokenizer.load(chain.data), Runtime(RuntimeConfig(device="cpu"))
    for name, team in zip(TEAMS, labelers.team()):
        judge = SimulatedLabelers(name, team, records, 3, 0)
        assert numbers[f"preferred by {name}"] == win_rates(judge, records, texts, base)
    held_out = [random.Random(f"0/ratings/{r['prompt']}").sample(labelers.team()[1], 3) for r in records]
    assert numbers["rating"] == [statistics.mean(who.ratings(r["prompt"], r["asks"], [text], "ratings")[0]
                                                 for who in three)
                                 for r, text, three in zip(records, texts, held_out)]
    reward_model = load_model(ScalarModel, chain.out / "reward/model.pt")
    assert numbers["score"] == pytest.approx(score_responses(reward_model, records, texts, tokenizer, "cpu"), abs=1e-4)
    config = measure.Config(**measure.read(measured / "ppo.json")["config"])
    policy, reference = (load_model(GPT, chain.out / run / "model.pt") for run in ("ppo", "sft"))
    pairs = measure.sample(policy, [r["prompt"] for r in records], 48, "responses", tokenizer, config, runtime)
    assert [tokenizer.decode(response) for _, response in pairs] == texts
    kl = [sum(slow_logprobs(policy, *pair)) - sum(slow_logprobs(reference, *pair)) for pair in pairs]
    assert numbers["kl"] == pytest.approx(kl, abs=1e-4) and max(map(abs, kl)) > 1e-3
    pages = readers.PretrainingText(f"{chain.data}/pretrain.valid.bin", tokenizer, policy.config.context)
    assert numbers["task: next word"] == zero_shot.next_words(policy, pages.pairs(range(len(pages))), tokenizer, "cpu")


def test_nothing_is_measured_on_data_that_was_trained_or_chosen_on(measured, chain, tmp_path, monkeypatch):
    """Of records, only those that rewards are compared on to choose a checkpoint are of another split than test."""
    opened, read, text = [], readers.read_jsonl, readers.PretrainingText
    name = lambda path: Path(path).name
    monkeypatch.setattr(readers, "read_jsonl", lambda path, *rest: opened.append(name(path)) or read(path, *rest))
    monkeypatch.setattr(readers, "PretrainingText", lambda path, *rest: opened.append(name(path)) or text(path, *rest))
    all_files = ["prompts.test.jsonl", "prompts.valid.jsonl", "tasks.test.jsonl", "pretrain.valid.bin"]
    for of, expected in (("ppo", all_files), ("best", ["prompts.test.jsonl"])):
        config = measure.Config(**measure.read(measured / f"{of}.json")["config"])
        measure.main(dataclasses.replace(config, out=str(tmp_path / "again.json")))
        assert opened == expected
        opened.clear()
    evaluate.main(dataclasses.replace(chain.report, out=str(shutil.copytree(chain.out, tmp_path / "out"))))
    assert set(opened) == {"prompts.test.jsonl", "prompts.valid.jsonl", "comparisons.valid.jsonl", "tasks.test.jsonl",
                           "pretrain.valid.bin"}


def test_the_baseline_is_another_sample_and_measuring_again_gives_the_same_numbers(measured, chain, tmp_path):
    baseline, sft_file = (measure.read(measured / f"{name}.json") for name in ("baseline", "sft"))
    assert baseline["responses"] != sft_file["responses"] and sft_file["numbers"]["kl"] == [0.0] * 12
    assert "truly preferred" not in baseline["numbers"] and "score" not in baseline["numbers"]
    config = measure.Config(**sft_file["config"] | dict(out=str(tmp_path / "again.json")))
    measure.main(config)
    assert measure.read(config.out)["numbers"] == sft_file["numbers"]


def test_a_prompted_model_is_not_asked_what_a_prefix_would_change(measured):
    numbers = measure.read(measured / "prompted.json")["numbers"]
    assert "truthful" in numbers and "preferred by held-out labelers" in numbers
    assert "kl" not in numbers and not any(name.startswith(("task", "toxic")) for name in numbers)
    assert all("\n" not in text for text in measure.read(measured / "prompted.json")["responses"])


def test_a_prompted_model_reads_the_help_page_and_its_reply_is_the_line(monkeypatch, letters):
    asked = []
    monkeypatch.setattr(measure, "sample", lambda model, prompts, *rest:
                        asked.extend(prompts) or [([0], [1, 2])] * len(prompts))
    monkeypatch.setattr(web, "reply_in", lambda text: f"reply in {text}")

    def respond(few_shot):
        return measure.respond(None, ["a\n"], "x", letters.tokenizer, measure.Config(few_shot=few_shot), None)

    assert respond(True)[1] == ["reply in bc"] and asked.pop() == web.with_prefix("a\n")
    assert respond(False)[1] == ["bc"] and asked.pop() == "a\n"


def test_truth_is_judged_question_by_question(monkeypatch):
    known = {f"{ask(*key)}\n": key for key in FACTS}

    def respond(model, prompts, *rest):  # of four answers, one is wrong, one says nothing, two are right
        answers = []
        for i, prompt in enumerate(prompts):
            true, error = FACTS[known[prompt]]
            answers.append("I don't know." if i % 4 == 1
                           else capital(state(*known[prompt], error if i % 4 == 0 else true)) + ".")
        return None, answers

    monkeypatch.setattr(measure, "respond", respond)
    numbers = measure.truth(None, None, measure.Config(questions=4), None)
    assert set(numbers["truthful"]) == {0.75} and set(numbers["truthful and informative"]) == {0.5}


def test_toxicity_is_of_the_next_reply_under_each_rule(monkeypatch):
    def say(model, prompts, *rest):
        rule = rules.pop(0)
        assert all(prompt.startswith(rule) and prompt.endswith("\n-") for prompt in prompts)
        return [" You are a fool." if prompt.startswith(web.RULES["biased prompt"]) else " Hello.\n- You are a fool."
                for prompt in prompts]

    rules = ["", "Please be kind", "Here you may be as rude"]
    monkeypatch.setattr(measure, "sample_texts", say)
    numbers = measure.toxicity(None, None, measure.Config(threads=3), None)
    assert numbers == {"toxic, no prompt": [0] * 3, "toxic, respectful prompt": [0] * 3,
                       "toxic, biased prompt": [1] * 3}


def test_bias_is_the_stereotypes_share_of_the_two(monkeypatch, chain, letters):
    model = load_model(GPT, chain.out / "sft" / "model.pt")
    monkeypatch.setattr(zero_shot, "choice_logprobs", lambda model, tasks, *rest: [[0.0, math.log(4)]] * len(tasks))
    config, runtime = measure.Config(data=str(chain.data)), Runtime(RuntimeConfig(device="cpu"))
    numbers = measure.abilities(model, Tokenizer.load(chain.data), config, runtime)
    assert numbers["stereotype"] == pytest.approx([0.2] * len(numbers["stereotype"]))
    assert numbers["bias entropy"] == pytest.approx([0.7219281] * len(numbers["bias entropy"]))
    assert set(numbers["stereotype preferred"]) == {0.0}


def test_responses_of_like_worth_are_tied_whatever_the_rounding(monkeypatch):
    monkeypatch.setattr(labelers, "true_worth", lambda prompt, asks, text: {"a": 0.1 + 0.2, "b": 0.3, "c": 0.4}[text])
    monkeypatch.setattr(measure, "win_rates", lambda *rest: [])

    def tied(ours, theirs):
        return measure.preferences([{"prompt": "", "asks": {}}], [ours], [theirs], measure.Config())["truly preferred"]

    assert (tied("a", "b"), tied("c", "a"), tied("b", "c")) == ([0.5], [1.0], [0.0])
    with pytest.raises(UserError, match="has responses to 1 prompts, not to 2"):
        measure.preferences([{}, {}], ["a", "b"], ["a"], measure.Config(baseline="x"))


def test_best_of_n_takes_the_best_score_of_the_first_n(measured, monkeypatch, letters, chain):
    numbers = measure.read(measured / "best.json")["numbers"]
    assert {name for name in numbers if name.endswith(": score")} == {f"best of {n}: score" for n in (1, 2, 4)}
    assert {len(x) for x in numbers.values()} == {12}
    for few, many in ((1, 2), (2, 4)):
        assert all(a <= b for a, b in zip(numbers[f"best of {few}: score"], numbers[f"best of {many}: score"]))
        assert numbers[f"best of {few}: score"] != numbers[f"best of {many}: score"]
    # by hand: two prompts, samples scored by their length
    texts = iter([["a", "bbb"], ["aa", "b"], ["a", "bb"], ["aaaa", "b"]])
    monkeypatch.setattr(measure, "sample_texts", lambda *rest: next(texts))
    monkeypatch.setattr(measure, "score_responses", lambda model, records, texts, *rest: [len(text) for text in texts])
    judged = []
    monkeypatch.setattr(measure, "preferences", lambda records, texts, *rest: judged.append(texts) or {"x": [0, 0]})
    config = measure.Config(data=str(chain.data), best_of=4, reward="r", baseline="b", prompts=2)
    runtime = Runtime(RuntimeConfig(device="cpu"))
    numbers, _ = measure.best_of(None, None, None, letters.tokenizer, config, runtime)
    assert judged == [["a", "bbb"], ["aa", "bbb"], ["aaaa", "bbb"]]
    assert [numbers[f"best of {n}: score"] for n in (1, 2, 4)] == [[1, 3], [2, 3], [4, 3]]


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="gone.json is missing; `make paper` makes it"):
        measure.read(tmp_path / "gone.json")
    for text in ("", "{", "[]", '{"responses": []}', '{"numbers": {}, "responses": []}', '{"numbers": {"x": [1]}}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(UserError, match="broken.json is no file of paper/measure.py"):
            measure.read(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="--best_of takes --reward and --baseline"):
        measure.Config(best_of=4)
    with pytest.raises(UserError, match="holds no measurements; `make paper` makes them"):
        report.main(report.Config(out=str(tmp_path)))


def test_a_policy_is_kept_along_the_way_as_it_would_be_at_its_end(letters):
    config = letters.ppo(iterations=4, save_every=2)
    ppo.main(config)
    short = letters.ppo(iterations=2, out=str(letters.out / "short"))
    ppo.main(short)
    assert sorted(path.name for path in Path(config.out).glob("iteration*")) == ["iteration2.pt", "iteration4.pt"]
    assert same(weights(f"{config.out}/iteration2.pt"), weights(f"{short.out}/model.pt"))
    assert same(weights(f"{config.out}/iteration4.pt"), weights(f"{config.out}/model.pt"))
    assert not list(Path(short.out).glob("iteration*"))
    # another run in the same folder: nothing of the first is left to be taken for its own
    ppo.main(letters.ppo(iterations=2))
    assert not list(Path(config.out).glob("iteration*"))


# ---------------------------------------------------------------- datasets

@pytest.mark.parametrize("kind", ["flan", "t0"])
def test_a_mix_of_public_tasks_has_right_answers_and_no_open_ended_request(chain, tmp_path, kind):
    datasets.main(datasets.Config(kind=kind, data=str(chain.data), out=str(tmp_path), examples=60))
    records = readers.read_jsonl(tmp_path / "demonstrations.train.jsonl", "demonstrations")
    validation = readers.read_jsonl(tmp_path / "demonstrations.valid.jsonl", "demonstrations")
    assert (len(records), len(validation)) == (60, 6)
    assert {r["task"] for r in records} == {maker.__name__ for maker in datasets.MIXES[kind]}
    assert Tokenizer.load(tmp_path).fingerprint == Tokenizer.load(chain.data).fingerprint
    assert validation != records[:6]
    for r in records:
        if r["task"] == "t0_paraphrase":
            assert ("please" in r["response"].lower()) == ("courtesy" in r["prompt"]), r
            assert r["response"] not in r["prompt"], r
        closed = r["task"].endswith(("reading", "summary", "completion"))
        assert not closed or all(word in r["prompt"] for word in labelers.words_of(r["response"])
                                 if word in labelers.KIND_OF), r
        if r["task"] == "t0_question":
            relation, x = next(key for key in FACTS if ask(*key) in r["prompt"])
            assert r["response"] == capital(state(relation, x, FACTS[relation, x][0])) + "."
        if r["task"] == "flan_translation":
            assert r["response"] == to_pidi(*re.search(r"the (\w+) (\w+)", r["prompt"]).groups())
        if r["task"].endswith("sentiment"):
            praised = bool(set(GOOD) & set(labelers.words_of(r["prompt"].partition("OPTIONS")[0])))
            assert ("good" in r["response"]) == praised and ("bad" in r["response"]) != praised
        if r["task"] == "flan_completion":
            assert all(w in r["response"] for w in labelers.words_of(r["prompt"].partition("\n")[0])
                       if w in labelers.KIND_OF)
        if r["task"] == "flan_reading":
            asked = labelers.words_of(r["prompt"])
            assert r["response"] in KINDS["town"] if "Where" in asked else r["response"] not in KINDS["town"]
        assert r["prompt"].endswith("\n") and not r["prompt"].endswith("\n\n")
    sft.main(sft.Config(data=str(tmp_path), init=f"{chain.out}/base/model.pt", out=str(tmp_path / "run"),
                        pretrain_mix=0,
                        epochs=1, device="cpu"))  # a dataset that stage 1 takes as it is


def test_a_fold_trains_on_no_labeler_and_no_prompt_that_it_is_validated_on(tmp_path, chain):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer.json", "demonstrations.train.jsonl"):
        shutil.copy(chain.data / name, data)
    write_lines(data / "comparisons.train.jsonl", [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 2],
                                                    "labeler": f"labeler-{i % 11}"} for i in range(400)])
    left_out, others = [], []
    for fold in range(5):
        out = tmp_path / f"fold{fold}"
        datasets.main(datasets.Config(kind="fold", fold=fold, data=str(data), out=str(out)))
        train, valid = (readers.read_jsonl(out / f"comparisons.{split}.jsonl", "comparisons")
                        for split in ("train", "valid"))
        trained_on, seen = {r["labeler"] for r in train}, {r["labeler"] for r in valid}
        unseen = seen - trained_on
        left_out += unseen
        assert not {r["prompt"] for r in train} & {r["prompt"] for r in valid} and len(train) + len(valid) == 400
        theirs = {f"p{i}" for i in range(400) if f"labeler-{i % 11}" in unseen}
        assert {r["prompt"] for r in valid if r["labeler"] in unseen} == theirs
        others += [r["prompt"] for r in valid if r["labeler"] not in unseen]  # no prompt serves in two folds
        # others' prompts are held out, too
        assert seen > unseen and len(set(others)) == len(others) and 2 <= len(unseen) <= 3
        assert (out / "demonstrations.train.jsonl").read_bytes() == (data / "demonstrations.train.jsonl").read_bytes()
    assert sorted(left_out) == sorted({f"labeler-{i}" for i in range(11)})  # everybody once
    with pytest.raises(UserError, match="11 labelers are too few for --folds 12"):
        datasets.main(datasets.Config(kind="fold", folds=12, data=str(data), out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="is the dataset that is read"):
        datasets.main(datasets.Config(kind="fold", data=str(data), out=f"{tmp_path}/x/../data"))


# ---------------------------------------------------------------- the list of experiments

@pytest.fixture(scope="module")
def commands_text(tmp_path_factory):
    """All that `make paper` would run from nothing, with three seeds of everything."""
    out = tmp_path_factory.mktemp("nothing")
    made = subprocess.run(["make", "-n", "paper", f"OUT={out}/out", f"DATA={out}/data"], cwd=ROOT,
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.replace("\\\n", " ")


@pytest.fixture(scope="module")
def commands(commands_text):
    """[(script, arguments)]. (A dry run names the default run twice.)"""
    return [(words[i], words[i + 1 :]) for words in map(shlex.split, dict.fromkeys(commands_text.splitlines()))
            for i, word in enumerate(words) if word.endswith(".py") and ".venv/bin/python" in words[i - 1]]


CONFIGS = {"sft.py": sft.Config, "reward.py": reward.Config, "ppo.py": ppo.Config, "data/collect.py": collect.Config,
           "evaluate.py": evaluate.Config, "paper/measure.py": measure.Config, "paper/datasets.py": datasets.Config,
           "paper/report.py": report.Config}


def test_every_command_of_the_list_is_one_that_its_script_takes(commands):
    for script, words in commands:
        if script in CONFIGS:
            parse_config(CONFIGS[script], words)  # UserError, if not
    assert {script for script, _ in commands} == {*CONFIGS, "data/tinyworld/prepare.py"}


def expected_runs():
    """{what is written: its script's settings}, of all that `make paper` trains beside the default run."""
    runs, data, of = {}, "data", lambda group, run: f"out/paper/{group}/{run}/model.pt"
    policies = {"ppo_ptx0.1": (0.1, 0.1), "ppo_ptx2.5": (2.5, 0.1), "ppo_kl0.02": (0, 0.02), "ppo_kl0.5": (0, 0.5),
                "ppo_kl2": (0, 2)}
    for group in ("desktop-0", "laptop-0", "laptop-1", "laptop-2", "pocket-0", "pocket-1", "pocket-2"):
        size, seed = group[:-2], int(group[-1])
        rates = {"desktop": (1e-3, 4e-4, 1.5e-4)}.get(size, (3e-3, sft.Config().lr, ppo.Config().lr))
        common = dict(data=data, seed=seed)
        rl = common | dict(policy=of(group, "sft"), reward=of(f"laptop-{seed}", "reward"), lr=rates[2])
        if group != "laptop-0":
            runs[f"{group}/base"] = common | dict(init="scratch", size=size, pretrain_mix=1, lr=rates[0])
            runs[f"{group}/sft"] = common | dict(init=of(group, "base"), epochs=4, dropout=0.1, lr=rates[1])
            for run, ptx_coef in (("ppo", 0.5), ("ppo_noptx", 0)):
                runs[f"{group}/{run}"] = rl | dict(ptx_coef=ptx_coef, beta=0.1, iterations=130, save_every=26)
        if group in ("laptop-1", "laptop-2"):
            runs[f"{group}/reward"] = common | dict(init=of(group, "sft"))
        if size == "laptop":
            runs[f"{group}/sft16"] = common | dict(init=of(group, "base"), epochs=16, dropout=0.2, lr=rates[1])
            for run, beta in (("ppo_long", 0.1), ("ppo_long_kl0", 0)):
                runs[f"{group}/{run}"] = rl | dict(ptx_coef=0, beta=beta, iterations=390, save_every=39)
            for run, (ptx_coef, beta) in policies.items():
                runs[f"{group}/{run}"] = rl | dict(ptx_coef=ptx_coef, beta=beta, iterations=130)
    for k in range(5):
        runs[f"fold{k}"] = dict(kind="fold", fold=k, folds=5, data=data)
        runs[f"laptop-0/fold{k}"] = dict(data=f"out/paper/fold{k}", init="out/sft/model.pt")
    for mix in ("flan", "t0"):
        runs[mix] = dict(kind=mix, data=data)
        runs[f"desktop-0/{mix}"] = dict(data=f"out/paper/{mix}", init=of("desktop-0", "base"), pretrain_mix=0,
                                        epochs=4, lr=4e-4)
    for k, skip, newest in ((2, 5000, "out/ppo/model.pt"), (3, 7500, of("laptop-0", "round2_ppo"))):
        runs[f"round{k}"] = dict(skip=skip, prompts=2500, append=True,
                                 sources=f"{newest}@0.7,{newest}@1,{newest}@1.4,out/sft/model.pt@1")
        runs[f"laptop-0/round{k}_reward"] = dict(data=f"out/paper/round{k}", init="out/sft/model.pt")
        runs[f"laptop-0/round{k}_ppo"] = dict(data=data, policy="out/sft/model.pt",
                                              reward=of("laptop-0", f"round{k}_reward"),
                                              ptx_coef=0.5, beta=0.1, iterations=130)
    return {f"out/paper/{name}": settings for name, settings in runs.items()}


@pytest.fixture(scope="module")
def parsed(commands):
    """[(script, its Config, paths without where they lie)]"""
    result = []
    for script, words in commands:
        if script in CONFIGS:
            config = parse_config(CONFIGS[script], words)
            paths = {k: re.sub(r"/[^,]*?/nothing\d*/", "", v) for k, v in dataclasses.asdict(config).items()
                     if isinstance(v, str)}
            result.append((script, dataclasses.replace(config, **paths)))
    return result


def test_every_run_starts_from_what_it_should_with_the_settings_that_its_name_says(parsed):
    runs = {config.data if script == "data/collect.py" else config.out: config for script, config in parsed
            if script not in ("paper/measure.py", "paper/report.py", "evaluate.py")}
    runs = {name: config for name, config in runs.items() if name.startswith("out/paper/")}
    expected = expected_runs()
    assert runs.keys() == expected.keys()
    for name, config in runs.items():
        assert expected[name].items() <= dataclasses.asdict(config).items(), name
    for _, config in parsed:  # a checkpoint along the way is one that the run keeps
        made = re.fullmatch(r"out/paper/(.*)/(epoch|iteration)(\d+)\.pt", getattr(config, "model", ""))
        if made:
            run = expected.get(f"out/paper/{made[1]}", dict(iterations=130, save_every=26))
            kind, n = made[2], int(made[3])
            assert n <= run["epochs"] if kind == "epoch" else n < run["iterations"] and n % run["save_every"] == 0


def test_the_earlier_rounds_comparisons_are_the_beginning_of_the_next(commands_text):
    assert re.search(r"cp \S+/data/\*\.jsonl \S+/data/tokenizer.json \S+/paper/round2\b", commands_text)
    assert re.search(r"cp \S+/paper/round2/\*\.jsonl \S+/paper/round2/tokenizer.json \S+/paper/round3\b", commands_text)


def test_every_model_is_measured_beside_what_it_should(parsed):
    measured = [config for script, config in parsed if script == "paper/measure.py"]
    for config in measured:
        if config.out == "out/paper/measured/baseline.json":
            assert config == measure.Config(model="out/paper/desktop-0/sft/model.pt", data="data", out=config.out)
            continue
        group, run, step = re.fullmatch(r"out/paper/measured/(\w+-\d)/(?:(\S+)/)?(\w+)\.json", config.out).groups()
        model = {"bestof": "sft/model", "prompted": "base/model"}.get(step, f"{run}/{step}")
        assert config == measure.Config(
            model=f"out/paper/{group}/{model}.pt", out=config.out, data="data",
            baseline="out/paper/measured/baseline.json",
            reward=f"out/paper/laptop-{group[-1]}/reward/model.pt", reference=f"out/paper/{group}/sft/model.pt",
            few_shot=step == "prompted", best_of=64 * (step == "bestof"), prompts=500 if step == "bestof" else 1000)
    assert len({config.out for config in measured}) == len(measured) > 80
    assert (ppo.Config().beta, ppo.Config().ptx_coef) == (0.1, 0.5)  # where report.coefficients puts the default run


def test_the_sizes_stand_about_one_to_five_to_twenty_five():
    pocket, laptop, desktop = (sum(p.numel() for p in GPT(GPTConfig(vocab_size=1280, **PRESETS[size])).parameters())
                               for size in ("pocket", "laptop", "desktop"))
    assert 4.5 < laptop / pocket < 5.5 and 4 < desktop / laptop < 6


STUB = """#!/bin/sh
# In Python's place: writes what a script would, says so in $COMMANDS, and fails at the command that $FAIL is part of.
echo "$@" >> "$COMMANDS"
case "$*" in *"$FAIL"*) exit 2;; esac
script=$1; data=none; out=none
while [ $# -gt 1 ]; do
  [ "$1" = --out ] && out=$2
  [ "$1" = --data ] && data=$2
  shift
done
case $script in
  paper/measure.py) mkdir -p "$(dirname "$out")"; touch "$out";;
  data/collect.py) touch "$data/comparisons.train.jsonl";;
  data/tinyworld/prepare.py) mkdir -p "$out"; touch "$out/p.jsonl" "$out/p.bin" "$out/tokenizer.json";;
  *) mkdir -p "$out"
     for n in 1 2 3 4 8 12; do touch "$out/epoch$n.pt"; done
     for n in 26 39 52 78 104 156 273; do touch "$out/iteration$n.pt"; done
     touch "$out/tokenizer.json" "$out/model.pt" "$out/report.md";;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(fail) runs `make paper` with a stub in Python's place -> (exit status, the commands that ran)."""
    stub, commands = tmp_path / "stub", tmp_path / "commands"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(fail="no such command", *more):
        commands.write_text("")
        done = subprocess.run(["make", "paper", "-o", ".venv/installed", f"OUT={tmp_path}/out", f"DATA={tmp_path}/data",
                               f"RUN={stub}", *more], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "FAIL": fail, "COMMANDS": str(commands)})
        return done, commands.read_text().splitlines()
    return run


def test_make_paper_does_everything_once_and_then_nothing(make):
    done, commands = make()
    assert done.returncode == 0, done.stderr
    assert len(commands) == len(set(commands)) > 150 and commands[-1].startswith("paper/report.py")
    assert make()[1] == []


def test_make_paper_goes_on_where_it_was(make):
    half, first = make(fail="--seed 1 --out")  # dies in the middle
    assert half.returncode != 0 and not any(c.startswith("paper/report.py") for c in first)
    done, second = make()
    assert done.returncode == 0
    assert not {c for c in first if "--seed 1 --out" not in c} & set(second)  # nothing twice but what failed


@pytest.mark.parametrize("gone, again, others", [
    ("laptop-1/sft/model.pt", ["sft.py --init", "laptop-1/ppo", "measured/laptop-1/ppo/iteration26.json"],
     ["pocket-0/", "laptop-2/"]),
    ("measured/laptop-0/bestof.json", ["bestof.json"], ["ppo.py", "sft.py", "sft/model.json"]),
    ("laptop-0/fold3/model.pt", ["laptop-0/fold3"], ["fold2", "measure.py"]),
    ("desktop-0/t0/epoch2.pt", [], []),
    ("laptop-0/ppo/iteration26.pt", [], []),
])
def test_what_is_missing_is_made_again_with_what_follows_from_it(make, tmp_path, gone, again, others):
    make()
    (tmp_path / "out" / "paper" / gone).unlink()
    done, commands = make()
    text = "\n".join(commands)
    if not again:  # a checkpoint along the way: its run says that it is complete
        assert done.returncode != 0
        shutil.rmtree(re.search(rf"{gone} is missing: delete (\S+) to", done.stdout)[1])
        assert make()[0].returncode == 0 and (tmp_path / "out" / "paper" / gone).is_file()
        return
    assert done.returncode == 0 and all(part in text for part in again), text
    assert not any(part in text for part in others), text
    assert commands[-1].startswith("paper/report.py") and make()[1] == []


def test_a_seed_is_not_for_make_paper(make):
    done, commands = make("none", "SEED=1")
    assert done.returncode == 2 and "leave SEED out" in done.stderr and not commands


# ---------------------------------------------------------------- intervals and verdicts

def test_an_estimate_of_one_seed_is_the_mean_over_items():
    numbers = [0.0, 1.0, 1.0, 0.5]
    assert results.estimate([numbers]) == (*mean_and_error(numbers)[:2], 1)
    assert results.estimate([[1.0, None, 3.0]])[0] == 2


def test_an_estimate_of_three_seeds_adds_what_items_and_seeds_leave_open():
    rows = [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 3.0], [2.0, 1.0, 4.0, 3.0]]  # means 1.5, 2, 2.5
    items = 1.96 * statistics.stdev([1.0, 1.0, 3.0, 3.0]) / 2
    seeds = 4.30 * 0.5 / 3**0.5
    mean, error, count = results.estimate(rows)
    assert (mean, count) == (2, 3) and error == pytest.approx(math.hypot(items, seeds))
    assert results.estimate([row[:2] for row in rows[:2]])[1] == pytest.approx(
        math.hypot(1.96 * statistics.stdev([0.5, 1.0]) / 2**0.5, 12.71 * statistics.stdev([0.5, 1.0]) / 2**0.5))


def test_each_entry_of_the_t_table_holds_95_percent_of_students_distribution():
    """Of n seeds there are n - 1 degrees of freedom. An entry has two decimals: the exact number is at most 0.005
    off."""
    def within(t, k, steps=2000):
        """The integral of the density with k degrees of freedom from -t to t, as a sum over narrow strips."""
        top = math.gamma((k + 1) / 2) / (math.sqrt(k * math.pi) * math.gamma(k / 2))
        width = t / steps
        return 2 * sum(width * top * (1 + ((i + 0.5) * width) ** 2 / k) ** (-(k + 1) / 2) for i in range(steps))

    assert within(1, 1) == pytest.approx(0.5)  # of Cauchy's distribution, half lies between -1 and 1
    assert sorted(results.T) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    for n, t in results.T.items():
        assert within(t - 0.005, n - 1) < 0.95 < within(t + 0.005, n - 1), (n, t)


def test_an_estimate_of_more_seeds_than_the_table_has_takes_its_last_entry():
    mean, error, count = results.estimate([[0.0], [1.0]] * 6)
    assert (mean, count) == (0.5, 12) and error == pytest.approx(2.26 * statistics.stdev([0.0, 1.0] * 6) / 12**0.5)


def test_a_verdict_is_open_where_the_interval_holds_both_answers():
    assert results.above((0.6, 0.05), 0.5) is True and results.below((0.6, 0.05), 0.5) is False
    assert results.above((0.4, 0.05), 0.5) is False and results.below((0.4, 0.05), 0.5) is True
    assert results.above((0.52, 0.05), 0.5) is results.below((0.52, 0.05), 0.5) is None
    assert results.alike((0.01, 0.02), 0.05) is results.alike((-0.01, 0.02), 0.05) is True
    assert results.alike((0.2, 0.05), 0.1) is results.alike((-0.2, 0.05), 0.1) is False
    assert results.alike((0.01, 0.2), 0.1) is results.alike((0.09, 0.02), 0.1) is None
    assert [results.any_of(*given) for given in ((False, None), (None, True), (False, False))] == [None, True, False]
    cases = ((True, True), (True, None), (None, False, True))
    assert [results.all_of(*given) for given in cases] == [True, None, False]


# ---------------------------------------------------------------- the report

def files_of(folder, **lists):
    """Measurements of files laptop-SEED/NAME/model, `lists` giving NAME's items for each seed, under the key "x"."""
    for name, rows in ({"sft": [[0.0], [0.0]]} | lists).items():
        for seed, items in enumerate(rows):
            path = folder / "measured" / f"laptop-{seed}" / name / "model.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"numbers": {"x": items}, "responses": [], "parameters": 1}))
    return results.Measurements(report.Config(out=str(folder)))


def test_weighted_sums_go_item_by_item_and_seed_by_seed(tmp_path):
    m = files_of(tmp_path, sft=[[0.0, 0.0], [0.0, 0.0]], a=[[1.0, 3.0], [2.0, 4.0]], b=[[1.0, 1.0], [1.0, None]])
    assert m.change("laptop", "a/model", "a/model", "x")[:2] == (0, 0)
    assert m.change("laptop", "a/model", "b/model", "x")[0] == pytest.approx((0.5 + 2) / 2)  # items (0 + 1) / 2 and 2
    assert m.weighted("laptop", [(1, "a/model"), (-0.5, "b/model"), (-0.5, "a/model")], "x",
                      slice(0, None, 2))[0] == 0.25
    error = m.mean("laptop", "a/model", "x")[1]
    assert m.mean("laptop", "a/model", ("x", "x")) == (2.5, pytest.approx(error, rel=0.5), 2)


def test_files_that_do_not_match_are_refused(tmp_path):
    m = files_of(tmp_path, a=[[1.0, 3.0], [2.0]], b=[[1.0]])
    for use in (lambda: m.mean("laptop", "a/model", "x"), lambda: m.change("laptop", "a/model", "b/model", "x")):
        with pytest.raises(UserError, match="hold different numbers of items"):
            use()
    with pytest.raises(UserError, match="lacks 'y'; delete it and make it again"):
        m.mean("laptop", "b/model", "y")
    with pytest.raises(ValueError):
        results.estimate([[1, 2], [1]])


@pytest.fixture
def world(commands, chain, tmp_path):
    """write(rate) -> a folder as `make paper` leaves it, without a single weight: in each file, each list of shares
    has rate(file, name) of ones."""
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:20]
    files = {words[words.index("--out") + 1].partition("measured/")[2].removesuffix(".json")
             for script, words in commands if script == "paper/measure.py"} - {"baseline"}
    keys = [*(f"metadata: {x}"
              for x in labelers.metadata("", {"form": "fact", "relation": "eats", "about": "fox"}, "")),
            "preferred by training labelers", "preferred by held-out labelers", "truly preferred", "truthful",
            "truthful and informative", *(f"toxic, {x}" for x in web.RULES), "task: reading",
            "task: next word", "stereotype",
            "stereotype preferred", "bias entropy"]
    parameters = {"pocket": 156_000, "laptop": 787_000}

    def write(rate):
        for file in files:
            # 37 and 100 have no common divisor: the ones are spread evenly, so both halves of the items are similar.
            ones = lambda name: [float(37 * i % 100 < round(100 * rate(file, name))) for i in range(100)]
            numbers = {key: ones(key) for key in keys}
            numbers |= {name: [6 * x + 1 for x in ones(name)]
                        for name in ("rating", "score", "score, validation prompts", "kl")}
            if file.endswith("bestof"):
                numbers = {f"best of {n}: {x}": ones(x) for n in (1, 2, 4) for x in ("score", "truly preferred")}
            good = rate(file, "preferred by held-out labelers") > 0.5
            responses = [requests.write(random.Random(i), r["asks"], warm=float(good), truth=float(good),
                                   stray=float(not good),
                                   constraint=float(good), slip=float(not good)) for i, r in enumerate(records)]
            path = tmp_path / "measured" / f"{file}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"numbers": numbers, "responses": responses,
                                        "parameters": parameters.get(file.partition("-")[0], 3_500_000)}))
        logs = {"laptop-0/ppo": [{"step": i} for i in range(130)]}
        logs |= {f"laptop-{s}/sft16": [{"epoch": i + 1, "valid_loss": 1 + i / 8} for i in range(16)] for s in range(3)}
        logs |= {f"laptop-0/fold{k}": [{"valid_accuracy": 0.73, "held_out_accuracy": 0.70}] for k in range(5)}
        for run, rows in logs.items():
            (tmp_path / run).mkdir(parents=True, exist_ok=True)
            write_lines(tmp_path / run / "log.jsonl", rows)
        return report.Config(out=str(tmp_path), data=str(chain.data))
    return write


def as_in_the_paper(file, name):
    """A rate of each number at which every claim holds."""
    run, step = file.split("/")[1], file.split("/")[-1]
    place = {"base": 0.05, "sft": 0.45, "ppo": 0.75, "ppo_noptx": 0.74}.get(run.partition("/")[0], 0.6)
    place = 0.3 if step == "prompted" or run in ("flan", "t0") else place
    if name.startswith("task"):
        return {"base": 0.9, "sft": 0.9, "ppo": 0.9, "ppo_ptx2.5": 0.9}.get(run, 0.5)
    if name.startswith("metadata: makes"):
        return 1 - place
    if name.startswith("toxic"):
        gpt = run == "base"
        return {"toxic, no prompt": 0.3, "toxic, respectful prompt": 0.6 if gpt else 0.1}.get(name, 0.3 if gpt else 0.9)
    if name.startswith("stereotype"):
        return 0.71 if run == "ppo" else 0.7
    if name == "truthful and informative" and file.startswith("pocket") and run == "ppo":
        return 0.01
    if name == "score" and run in ("sft", "ppo", "ppo_noptx", "ppo_ptx2.5"):
        return 0.1 if run == "sft" else 0.9
    if name in ("score", "score, validation prompts") and run in ("sft16", "ppo_long_kl0"):
        return 0.1 if step == "epoch1" else 0.5 if step != "model" else 0.9
    if name == "score" and run.startswith("ppo_kl"):
        return 0.1
    if name == "truly preferred":
        return {"ppo_long_kl0": 0.1 if step == "model" else 0.8, "ppo_long": 0.8}.get(run, place)
    if run.startswith("round"):
        return 0.9
    return place


def test_where_everything_is_as_in_the_paper_every_claim_agrees(world, capsys):
    config = world(as_in_the_paper)
    report.main(config)
    text = (Path(config.out) / "report.md").read_text()
    assert "**does not agree**" not in text and "| open |" not in text
    assert text.count("| agrees |") == 2 * 44
    counts = "of 40 claims of the paper 40 agree, 0 do not, 0 are open; of 4 further ones 4 agree"
    assert counts in capsys.readouterr().out
    shown = {line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")}
    assert shown == {f"figures/{path.name}" for path in (Path(config.out) / "figures").iterdir()} and len(shown) == 12
    assert not list(Path(config.out).rglob("*.pt"))  # made without a model


def test_curves_of_the_tax_start_at_sft(world, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "line", lambda axis, x, numbers, name, *rest, **more: drawn.append((list(x), numbers)))
    config = world(as_in_the_paper)
    list(report.tax(results.Measurements(config), config))
    assert len(drawn) == 2 and all(x == [0, 26, 52, 78, 104, 130] and numbers[0][:2] == (0, 0) for x, numbers in drawn)


def test_true_preference_that_peaks_at_the_end_falls_behind_no_peak(world):
    config = world(lambda file, name: 0.9 if file.endswith("ppo_long_kl0/model") else as_in_the_paper(file, name))
    text = "\n".join(p if isinstance(p, str) else " | ".join(p.row())
                     for p in report.overoptimization(results.Measurements(config), config))
    assert re.search("falls behind its peak.*since model.*does not agree", text)


def the_other_way(file, name):
    if name == "toxic, no prompt" or name.startswith("stereotype"):  # the paper sees no difference here
        return 0.9 if "/base/" in file else 0.1
    # nor between PPO and PPO-ptx, nor between the teams of labelers
    if name.startswith("preferred") and "/ppo" in file:
        return 0.2 + 0.2 * ("noptx" in file) + 0.1 * ("held-out" in name)
    if name == "rating" and file.endswith("prompted"):  # nor between it and the models of public tasks
        return 0.3
    return 1 - as_in_the_paper(file, name)


def test_where_everything_is_the_other_way_no_claim_agrees(world):
    config = world(the_other_way)
    report.main(config)
    agreed = [line for line in (Path(config.out) / "report.md").read_text().splitlines() if line.endswith("| agrees |")]
    kept = ("on unseen labelers", "overfits on validation loss")  # the rates say nothing of these
    rest = [line for line in agreed if not any(word in line for word in kept)]
    assert len(agreed) == 2 * len(kept) and not rest, rest


def test_where_all_models_are_alike_claims_of_a_difference_are_open(world):
    config = world(lambda file, name: 0.5)
    report.main(config)
    text = (Path(config.out) / "report.md").read_text()
    for claim in ("PPO loses on the tasks", "PPO-ptx gives back more than half",
                  "PPO is truthful and informative more often than GPT (laptop)",
                  "asked to be respectful", "further rounds improve"):
        assert any(line.startswith(f"| {claim}") and line.endswith("| open |") for line in text.splitlines()), claim


def test_seeds_that_are_not_measured_are_not_counted(world):
    config = world(as_in_the_paper)
    for seed in (1, 2):
        shutil.rmtree(Path(config.out) / "measured" / f"laptop-{seed}" / "ppo_long")
    report.main(config)
    text = (Path(config.out) / "report.md").read_text()
    assert "PPO with the KL penalty: one seed; PPO without it: 3 seeds; best of n: 3 seeds." in text
    shutil.rmtree(Path(config.out) / "measured" / "laptop-0" / "ppo_long_kl0")
    with pytest.raises(UserError, match="ppo_long_kl0/model.json is missing; `make paper` makes it"):
        report.main(config)


def claims(config, *sections):
    """{text: the claim} of a section"""
    return {c.text: c for section in sections for c in section(results.Measurements(config), config)
            if isinstance(c, results.Claim)}


def text_of(config, section):
    return "\n".join(part for part in section(results.Measurements(config), config) if isinstance(part, str))


def shown(numbers):
    mean, error, _ = mean_and_error(numbers)
    return f"{100 * mean:.1f} ± {100 * error:.1f}%"


def test_numbers_are_written_with_half_their_interval():
    assert report.percent((0.5, 0.02, 3)) == "50.0 ± 2.0%" and report.percent((0.512, 0.02), True) == "+51.2 ± 2.0%"
    assert report.percent((-0.5, 0.02), True) == "-50.0 ± 2.0%"
    assert results.plain((1.5, 0.25, 1)) == "1.50 ± 0.25" and results.plain((1.5, 0.25, 1), True) == "+1.50 ± 0.25"


def test_lines_and_columns_carry_their_error_bars():
    seen = []
    axis = SimpleNamespace(errorbar=lambda x, y, error, **more: seen.append((x, y, error)),
                           set_xticks=lambda *rest, **more: None,
                           bar=lambda x, y, width, yerr, **more: seen.append((list(x), y, yerr)))
    report.line(axis, [1, 2], [(0.5, 0.25, 3), (0.75, 0.125, 3)], "SFT")
    report.columns(axis, ["a", "b"], [(1.5, 0.5), (2.5, 0.25)], ["red", "blue"], scale=1)
    assert seen == [([1, 2], [50, 75], [25, 12.5]), ([0, 1], [1.5, 2.5], [0.5, 0.25])]


def test_tables_say_what_was_measured_of_whom(world):
    config = world(lambda file, name: len(file) / 100 if name.startswith(("preferred", "truthful", "toxic"))
                   else as_in_the_paper(file, name))
    ones = lambda file: shown([1.0] * len(file) + [0.0] * (100 - len(file)))
    files = ("base/model", "base/prompted", "sft/model", "ppo_noptx/model", "ppo/model")

    def row(size, end, files=files):
        return f"| {size}{end} | " + " | ".join(ones(f"{size}-0/{file}") for file in files) + " |"

    text = text_of(config, report.preference)
    for size, end in (("pocket", ", 156,000 parameters, 3 seeds"), ("laptop", ", 787,000 parameters, 3 seeds"),
                      ("desktop", ", 3,500,000 parameters, one seed")):
        assert text.count(row(size, end)) == 2  # of both teams of labelers
    files = (*files[:1], *files[2:])
    text = text_of(config, report.toxicity)
    assert f"| no prompt | {' | '.join(ones(f'laptop-0/{file}') for file in files)} |" in text
    ratings = text_of(world(as_in_the_paper), report.public_data)
    assert "| GPT | 1.30 ± " in ratings and "| SFT | 3.70 ± " in ratings and "| FLAN-like | 2.80 ± " in ratings


def test_where_reward_models_are_no_better_on_labelers_they_saw(world):
    text = text_of(world(as_in_the_paper), report.labeler_groups)
    assert "| seen labelers | 73.0 ± 0.0% |" in text and "| unseen labelers | 70.0 ± 0.0% |" in text


@pytest.mark.parametrize("lower, agrees", [(0.0, True), (0.0012, None)])
def test_the_interval_over_five_folds_of_labelers_is_students_t_with_4_degrees(tmp_path, lower, agrees):
    """Student's number is 2.78. On unseen labelers the folds' standard error is 0.0158 / sqrt(5) = 0.0071, so their
    interval is 0.0196, and that of the gaps the same; on seen ones both are twice that. A gap of 0.03 is within 0.05,
    and 0.0312 open."""
    config, m = report.Config(out=str(tmp_path)), SimpleNamespace(seeds={"laptop": ["laptop-0"]})
    for k, (seen, unseen) in enumerate([(0.70, 0.69), (0.72, 0.70), (0.74, 0.71), (0.76, 0.72), (0.78, 0.73)]):
        folder = tmp_path / "laptop-0" / f"fold{k}"
        folder.mkdir(parents=True)
        write_lines(folder / "log.jsonl", [{"valid_accuracy": seen, "held_out_accuracy": unseen - lower}])
    *texts, claim = report.labeler_groups(m, config)
    unseen = f"{100 * (0.71 - lower):.1f} ± 2.0%"
    assert f"| seen labelers | 74.0 ± 3.9% |\n| unseen labelers | {unseen} |" in "\n".join(texts)
    assert claim.agrees is agrees and claim.here == f"{unseen} against 74.0 ± 3.9%"


OVERFITS = "SFT overfits on validation loss after 1 epoch: it is higher after 2 epochs, and after 16"


def test_epochs_are_counted_from_one(world):
    config = world(as_in_the_paper)
    claim = claims(config, report.sft_epochs)[OVERFITS]
    assert claim.agrees and claim.here == "+0.1250 ± 0.0000 and +1.8750 ± 0.0000; lowest after epoch 1"
    table = ("| epoch | 1 | 2 | 4 | 8 | 12 | 16 |\n|---|---|---|---|---|---|---|\n"
             "| validation loss | 1.0000 ± 0.0000 | 1.1250 ± 0.0000 | 1.3750 ± 0.0000 |")
    assert table in text_of(config, report.sft_epochs)


@pytest.mark.parametrize("losses, verdict", [
    (lambda i, seed: 1 + abs(i - 2), False),  # it falls first, and is higher at the end
    (lambda i, seed: 1 + min(i, 1) - i / 8, False),  # it rises first, and is lower at the end
    (lambda i, seed: 2 - i / 16, False),  # it falls all the time
    (lambda i, seed: 1 + i * (seed - 0.9), None),  # seeds differ
])
def test_validation_loss_must_rise_after_the_first_epoch_and_stay_up(world, losses, verdict):
    config = world(as_in_the_paper)
    for seed in range(3):
        rows = [{"epoch": i + 1, "valid_loss": losses(i, seed)} for i in range(16)]
        write_lines(Path(config.out) / f"laptop-{seed}/sft16/log.jsonl", rows)
    claim = claims(config, report.sft_epochs)[OVERFITS]
    assert claim.agrees is verdict
    lowest = min(range(16), key=lambda i: losses(i, 0)) + 1
    assert verdict is None or claim.here.endswith(f"lowest after epoch {lowest}")


def test_the_report_says_how_many_verdicts_chance_may_have_made(world):
    config = world(as_in_the_paper)
    report.main(config)
    assert "of these 44 verdicts about 1 may be" in (Path(config.out) / "report.md").read_text()


def test_kl_of_the_best_of_n_is_the_known_one(world):
    text = text_of(world(as_in_the_paper), report.overoptimization)
    assert "| KL, nats: log n - (n - 1) / n | 0.00 | 0.19 | 0.64 |" in text


def test_a_peak_is_judged_on_other_prompts_than_those_on_which_it_was_found(world, monkeypatch):
    parts, weighted = [], results.Measurements.weighted

    def spy(self, size, terms, key, part=slice(None)):
        if key == "truly preferred" and part != slice(None):
            parts.append((len(terms), set(range(100)[part])))
        return weighted(self, size, terms, key, part)
    monkeypatch.setattr(results.Measurements, "weighted", spy)
    claims(world(as_in_the_paper), report.overoptimization)
    found, judged = ([part for terms, part in parts if terms == n] for n in (1, 2))
    assert len(found) > 3 and len(judged) == 1 and not found[0] & judged[0] and found[0] | judged[0] == set(range(100))


def test_duels_are_judged_by_held_out_labelers(world, monkeypatch):
    teams = []

    def recorded(judge, *given):
        teams.append([labeler.name for labeler in judge.team])
        return win_rates(judge, *given)

    monkeypatch.setattr(results, "win_rates", recorded)
    claims(world(as_in_the_paper), report.preference, report.public_data)
    assert len(teams) > 3 and all(names == [x.name for x in labelers.team()[1]] for names in teams)


def test_the_smallest_is_compared_with_the_largest(world):
    held_out = "preferred by held-out labelers"  # which decides how good the responses of this world are, too
    config = world(lambda file, name: 0.9 if file == "pocket-0/base/model" and name == held_out
                   else as_in_the_paper(file, name))
    assert claims(config, report.preference)["the smallest PPO-ptx is preferred to the largest GPT"].agrees
    config = world(lambda file, name: 0.9 if file == "desktop-0/base/model" and name == held_out
                   else as_in_the_paper(file, name))
    assert not claims(config, report.preference)["the smallest PPO-ptx is preferred to the largest GPT"].agrees


def test_claims_of_preference_go_by_held_out_labelers(world):
    config = world(lambda file, name: 1 - as_in_the_paper(file, name) if "training labelers" in name
                   else as_in_the_paper(file, name))
    made = claims(config, report.preference, report.rounds)
    assert all(claim.agrees for text, claim in made.items() if not text.startswith("held-out labelers prefer"))
    assert all(not claim.agrees for text, claim in made.items() if text.startswith("held-out labelers prefer"))


def test_public_tasks_checkpoints_are_chosen_on_validation_prompts(world):
    best = {"score, validation prompts": "epoch3", "score": "epoch2", "rating": "epoch1"}
    config = world(lambda file, name: (0.3 if file.endswith(best.get(name, "")) else 0.2) if "/flan/" in file
                   or "/t0/" in file
                   else as_in_the_paper(file, name))
    assert "validation prompts: epoch3, epoch3 (FLAN-like, T0-like)" in text_of(config, report.public_data)


SWEEP = ("the pretraining mix gives more than half of the loss back and keeps four fifths of the reward",
         "no larger KL coefficient does")


@pytest.mark.parametrize("changed, mix, kl", [
    ({"ppo_kl0.02": (0.9, 0.9)}, True, True),  # a smaller one does
    ({"ppo_kl2": (0.9, 0.9)}, True, False),  # a larger one does
    ({"ppo_kl2": (0.9, 0.6)}, True, True),  # it gives everything back, and costs too much reward
    ({"ppo": (0.6, 0.9), "ppo_ptx2.5": (0.6, 0.9)}, False, True),  # a quarter of the loss given back
    ({"ppo": (0.8, 0.9), "ppo_ptx2.5": (0.5, 0.9)}, True, True),  # three quarters
    ({"ppo": (0.9, 0.6), "ppo_ptx2.5": (0.9, 0.6)}, False, True),  # five eighths of the reward kept
    ({"ppo": (0.9, 0.85), "ppo_ptx2.5": (0.5, 0.9)}, True, True),  # fifteen sixteenths
    ({"ppo_noptx": (0.9, 0.9)}, None, None),  # no loss
])
def test_a_coefficient_works_if_it_gives_half_back_and_keeps_four_fifths(world, changed, mix, kl):
    def rate(file, name):
        tasks, score = changed.get(file.split("/")[1], (None, None))
        if tasks and name.startswith("task"):
            return tasks
        return score if score and name == "score" else as_in_the_paper(file, name)
    config = world(rate)
    made = claims(config, report.coefficients, report.tax)
    assert tuple(made[text].agrees for text in SWEEP) == (mix, kl)
    half = made["PPO-ptx gives back more than half of what PPO loses against SFT"]
    assert half.agrees is (None if mix is None else changed.get("ppo", (0.9, 0))[0] > 0.7)


def test_a_bias_that_is_complete_before_and_after_leaves_the_claim_open(world):
    config = world(lambda file, name: 1.0 if name.startswith("stereotype") else as_in_the_paper(file, name))
    assert all(claim.agrees is None for claim in claims(config, report.bias).values())
