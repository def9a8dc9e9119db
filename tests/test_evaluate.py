"""The measures of the report on cases that can be checked by hand."""

import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import common
import evaluate
import report as report_  # `report` is a fixture here
from common import UserError
from conftest import Bigram, random_gpt, write_lines
from data import readers
from data.tinyworld import labelers, requests, web
from data.tokenizer import Tokenizer
from model import ScalarModel

END = 8


# ---------------------------------------------------------------- means

def test_a_mean_has_an_interval_of_1_96_standard_errors():
    assert evaluate.mean_and_error([1, 0, 1, 1]) == pytest.approx((0.75, 1.96 * math.sqrt(0.25 / 4), 4))
    assert evaluate.mean_and_error([3.0]) == (3.0, 0.0, 1) and evaluate.mean_and_error([]) == (None, None, 0)


def test_a_ratio_counts_pairs_and_its_error_counts_prompts():
    share, error, pairs = evaluate.ratio([(10, 6), (1, 1), (5, 2)])
    assert (share, pairs) == (9 / 16, 16)
    residuals = [6 - 10 * share, 1 - share, 2 - 5 * share]
    assert error == pytest.approx(1.96 * math.sqrt(sum(r * r for r in residuals) / 2 / 3) / (16 / 3))
    assert evaluate.ratio([]) == (None, None, 0) == evaluate.ratio([(0, 0)])


def test_saying_everything_twice_narrows_no_interval():  # pitfall 45
    numbers, groups = [1, 0, 1, 1, 0.5], "abbcd"
    once = evaluate.mean_and_error(numbers, groups)
    twice = evaluate.mean_and_error(numbers * 2, groups * 2)
    assert twice[:2] == pytest.approx(once[:2]) and twice[2] == 10
    assert evaluate.mean_and_error(numbers * 2)[1] < once[1]  # which is what counting them as independent would do


def test_the_error_over_groups_is_that_of_their_sums_by_hand():
    mean, error, n = evaluate.mean_and_error([1, 1, 0, 0], "aabb")  # sums 2 and 0 of two each: residuals 1 and -1
    assert (mean, n) == (0.5, 4) and error == pytest.approx(1.96 * math.sqrt((1 + 1) / 1 / 2) / 2)


def test_a_task_that_was_drawn_twice_counts_once():
    a, b = ({"task": "bias", "context": "People from Kelso are", "choices": [" rude.", f" {x}."], "answer": 0} for x in ("lazy", "boring"))
    c = {"task": "translation", "context": "English: the red hat\nPidi:", "target": " Ta bo."}
    assert evaluate.distinct([a, c, b, a, c]) == [a, c, b]


def test_pair_accuracy_leaves_out_tied_ranks_and_halves_tied_numbers():
    assert evaluate.pair_accuracy([3.0, 2.0, 1.0], [1, 2, 3]) == (3, 3)
    assert evaluate.pair_accuracy([1.0, 2.0, 3.0], [1, 2, 2]) == (2, 0)
    assert evaluate.pair_accuracy([2.0, 2.0, 1.0], [1, 2, 2]) == (2, 1.5)
    assert evaluate.pair_accuracy([1.0, 2.0], [1, 1]) == (0, 0)


# ---------------------------------------------------------------- judges

def judge(opinion):
    """A labeler whose impressions of the responses are opinion(first, second)."""
    return SimpleNamespace(impressions=lambda prompt, asks, responses, seed: opinion(*responses))


RECORDS = [{"prompt": f"prompt {i}", "asks": {}} for i in range(1000)]
OURS, THEIRS = ["ours"] * 1000, ["theirs"] * 1000


def win_rate(opinion, ours=OURS, theirs=THEIRS, judges=1):
    rates = evaluate.win_rates(RECORDS, ours, theirs, [judge(opinion) for _ in range(3)], judges, seed=0)
    assert len(rates) == 1000
    return sum(rates) / 1000


def test_a_judge_that_always_takes_the_first_gives_fifty_percent():  # pitfall 40
    assert win_rate(lambda first, second: (1, 0)) == pytest.approx(0.5, abs=0.05)
    assert win_rate(lambda first, second: (0, 1), judges=3) == pytest.approx(0.5, abs=0.05)


def test_a_judge_that_always_prefers_ours_gives_a_hundred_percent_and_the_other_none():
    for text, expected in (("ours", 1), ("theirs", 0)):
        assert win_rate(lambda first, second: (first == text, second == text), judges=3) == expected


def test_ties_are_half_a_win():
    assert win_rate(lambda first, second: (1, 1)) == 0.5


def test_swapping_the_models_swaps_the_win_rate():
    longer = lambda first, second: (len(first), len(second))
    rng = random.Random(0)
    a, b = (["x" * rng.randint(1, 5) for _ in range(1000)] for _ in range(2))
    assert win_rate(longer, a, b) == pytest.approx(1 - win_rate(longer, b, a))
    assert win_rate(longer, a, b) == pytest.approx(sum((len(x) > len(y)) + 0.5 * (len(x) == len(y)) for x, y in zip(a, b)) / 1000)


def test_judges_of_a_prompt_are_different_people_and_the_same_for_every_model():
    team, asked = [], []
    for i in range(5):
        team.append(SimpleNamespace(impressions=lambda p, a, r, seed, i=i: asked.append((p, i)) or (0, 0)))
    for ours in (OURS, ["another"] * 1000):
        evaluate.win_rates(RECORDS[:50], ours[:50], THEIRS[:50], team, 3, seed=0)
    assert asked[:150] == asked[150:] and len(set(asked)) == 150
    assert {i for _, i in asked} == set(range(5))


# ---------------------------------------------------------------- tasks

def test_a_choice_is_right_if_its_summed_logprob_is_the_highest(letters):
    table = torch.full((9, 9), 1.0)
    table[1, 2], table[2, 3] = 3, 9  # after b: c, and then nearly surely d
    table[3, 7], table[3, 2] = 2, 5  # after d: c rather than h
    tasks = [{"task": "t", "context": "b", "choices": ["a", "cd"], "answer": 1},
             {"task": "t", "context": "bcd", "choices": ["ha", "c", "f"], "answer": 0},
             # After g, a and c are alike: so cd is a little less likely, though likelier a token.
             {"task": "t", "context": "g", "choices": ["a", "cd"], "answer": 0}]
    assert evaluate.answer_tasks(Bigram(table), tasks, letters.tokenizer, "cpu") == [1, 0, 1]


def test_a_target_is_right_if_greedy_decoding_goes_on_with_that_line_and_no_other(monkeypatch):
    tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)])
    says = {"one": " yes.\nAsk: more", "two": " yes. And more", "three": " ye", "four": " yes."}

    def fake(model, prompts, count, uniforms, temperature):
        assert temperature == 0 and uniforms.shape == (len(prompts), count)
        return [tokenizer.encode(says[tokenizer.decode(p)])[:count] for p in prompts]
    monkeypatch.setattr(evaluate, "generate", fake)
    tasks = [{"task": "t", "context": context, "target": " yes."} for context in says]
    assert evaluate.answer_tasks(None, tasks, tokenizer, "cpu") == [1, 0, 0, 1]


def test_answers_to_tasks_do_not_depend_on_what_else_is_in_the_batch(letters):  # pitfall 4
    model, rng = random_gpt(), random.Random(0)
    word = lambda most: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, most)))
    many = [{"task": "t", "context": word(20), "choices": [word(5), word(5)], "answer": 0} for _ in range(40)]
    together = evaluate.answer_tasks(model, many, letters.tokenizer, "cpu")
    assert together == [evaluate.answer_tasks(model, [task], letters.tokenizer, "cpu")[0] for task in many]
    assert 0 < sum(together) < 40


def test_scores_are_those_of_each_text_alone_at_its_end_of_text(letters):  # pitfalls 5, 30
    model = random_gpt(kind=ScalarModel)
    records = [{"prompt": p} for p in ("bcd", "e", "fff", "g")] * 35  # more than a batch
    texts = ["a", "bcdefgh", "", "hh"] * 35
    scores = evaluate.score(model, records, texts, letters.tokenizer, "cpu")
    alone = [model(torch.tensor([letters.tokenizer.encode(r["prompt"] + t) + [END]]))[0, -1].item()
             for r, t in zip(records, texts)]
    assert scores == pytest.approx(alone, abs=1e-5)


def test_a_response_that_outgrows_the_context_is_scored_at_its_end_of_text_all_the_same(letters):  # pitfalls 5, 30
    model = random_gpt(kind=ScalarModel, context=8)
    (score,) = evaluate.score(model, [{"prompt": "bcd"}], ["abcdefgh"], letters.tokenizer, "cpu")
    cut = letters.tokenizer.encode("bcd" + "abcd") + [END]  # 8 tokens
    assert score == pytest.approx(model(torch.tensor([cut]))[0, -1].item(), abs=1e-5)


# ---------------------------------------------------------------- who says what of whom

def said(records, seed):
    """A response to each record, by careless writers of another kind for each seed."""
    rng = random.Random(seed)
    return [requests.write(rng, r["asks"], **web.CARELESS) for r in records]


def test_each_team_judges_each_model_beside_the_other_sample_of_sft(chain):
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:30]
    responses = {name: said(records, name) for name in ("GPT", "SFT", evaluate.BASELINE)}
    rates = evaluate.asked_labelers(records, responses, chain.report)
    assert rates.keys() == {"GPT", "SFT"}
    for name, by_team in rates.items():
        assert list(by_team) == ["training labelers", "held-out labelers"]
        for people, number in zip(labelers.team(), by_team.values()):
            expected = evaluate.win_rates(records, responses[name], responses[evaluate.BASELINE], people, 3, chain.report.seed)
            assert number == evaluate.mean_and_error(expected, [r["user"] for r in records]) and number[0] != 0.5


def test_metadata_are_means_over_the_responses_that_they_apply_to(chain):
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:30]
    responses = {name: said(records, name) for name in evaluate.MODELS}
    rates = evaluate.metadata_rates(records, responses)
    for name, texts in responses.items():
        seen = [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, texts)]
        for rate in seen[0]:
            apply = [i for i, row in enumerate(seen) if row[rate] is not None]
            expected = evaluate.mean_and_error([float(seen[i][rate]) for i in apply], [records[i]["user"] for i in apply])
            assert rates[rate][name] == pytest.approx(expected)
    assert rates["keeps the stated constraint"]["SFT"][2] < 30 == rates["attempts the right task"]["SFT"][2]
    assert rates["keeps the stated constraint"]["GPT"] != rates["keeps the stated constraint"]["SFT"]


def test_the_tax_is_taken_task_by_task_and_item_by_item(chain, monkeypatch):
    tokenizer, answers, rng = Tokenizer.load(chain.data), {}, random.Random(0)
    tasks = evaluate.distinct(readers.read_jsonl(chain.data / "tasks.test.jsonl", "tasks"))
    text = readers.PretrainingText(chain.data / "pretrain.valid.bin", tokenizer, 256)
    pages = text.pairs(range(len(text)))

    def over_contexts(numbers, chosen):
        return evaluate.mean_and_error(numbers, [task["context"] for task in chosen])

    def answer(model, items, *rest):
        assert items == (tasks if "choices" in items[0] or "target" in items[0] else pages)
        return answers.setdefault(model.name, []).append([rng.random() for _ in items]) or answers[model.name][-1]
    monkeypatch.setattr(evaluate, "answer_tasks", answer)
    monkeypatch.setattr(evaluate, "next_words", answer)
    models = {name: SimpleNamespace(name=name, config=SimpleNamespace(context=256)) for name in ("GPT", "SFT", "PPO", "PPO-ptx")}
    table, changes = evaluate.alignment_tax(models, chain.report, tokenizer, common.Ranks(common.Machine(device="cpu")))
    for name, (right, words) in answers.items():
        for kind in {task["task"] for task in tasks}:
            chosen = [i for i, task in enumerate(tasks) if task["task"] == kind]
            assert table[kind][name] == over_contexts([right[i] for i in chosen], [tasks[i] for i in chosen])
        assert table["next word"][name] == evaluate.mean_and_error(words)
    able = {name: [x for x, task in zip(right, tasks) if task["task"] in web.ABILITIES] + words for name, (right, words) in answers.items()}
    for name in able:
        assert table["all abilities"][name] == evaluate.mean_and_error(able[name])
    assert list(changes) == ["PPO - SFT", "PPO-ptx - SFT", "PPO-ptx - PPO", "PPO - GPT", "PPO-ptx - GPT"]
    for pair, number in changes.items():
        more, less = pair.split(" - ")
        assert number == evaluate.mean_and_error([a - b for a, b in zip(able[more], able[less])]) and number[0] != 0


def test_a_task_counts_once_and_tasks_on_one_context_or_pages_of_one_document_as_one(chain, tmp_path, monkeypatch):  # pitfall 45
    tokenizer = Tokenizer.load(chain.data)
    ask = lambda kind, context, target: {"task": kind, "context": context, "target": target}
    drawn = [ask("reading", "a", " 1"), ask("reading", "b", " 2"), ask("reading", "a", " 1"), ask("truth", "c", " 3"),
             ask("truth", "c", " 4"), ask("truth", "d", " 5"), ask("truth", "d", " 6")]
    (tmp_path / "tasks.test.jsonl").write_text("".join(json.dumps(task) + "\n" for task in drawn))
    end = tokenizer.end_of_text
    np.array([1, 2, 3, 4, 1, 2, end, 5, 6, end], dtype=np.uint16).tofile(tmp_path / "pretrain.valid.bin")  # pieces of 4: 2 + 1
    right = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}
    monkeypatch.setattr(evaluate, "answer_tasks", lambda model, tasks, *rest: [right[task["context"]] for task in tasks])
    monkeypatch.setattr(evaluate, "next_words", lambda model, pages, *rest: [1.0, 1.0, 0.0][: len(pages)])
    monkeypatch.setattr(readers, "PretrainingText", lambda path, tokenizer, context, real=readers.PretrainingText: real(path, tokenizer, 4))
    models = {"SFT": SimpleNamespace(config=SimpleNamespace(context=64))}
    config = dataclasses.replace(chain.report, data=str(tmp_path))
    table, _ = evaluate.alignment_tax(models, config, tokenizer, common.Ranks(common.Machine(device="cpu")))
    assert table["reading"]["SFT"] == evaluate.mean_and_error([1, 0])  # not three
    assert table["truth"]["SFT"][:2] == evaluate.mean_and_error([1, 0])[:2]  # two questions, of two wordings each
    mean, error, pages = table["next word"]["SFT"]
    assert (mean, pages) == (pytest.approx(2 / 3), 3) and error == evaluate.mean_and_error([1, 1, 0], "aab")[1]


def test_weights_are_downloaded_once_per_machine(chain, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate.download, "weights", lambda name, tokenizer: calls.append(name) or f"{chain.out}/base/model.pt")
    ranks = SimpleNamespace(device="cpu", main=True, first=lambda work: calls.append("first") or work())
    evaluate.load_models(dataclasses.replace(chain.report, base="gpt2"), Tokenizer.load(chain.data), ranks, world=True)
    assert calls == ["first", "gpt2"]  # Ranks.first: one process of each machine, then its others


# ---------------------------------------------------------------- the report

@pytest.fixture(scope="module")
def report(chain):
    evaluate.main(chain.report)
    return chain


def test_the_report_has_every_section_figure_and_model(report):
    text = (report.out / "report.md").read_text()
    for words in ("## Preferred to SFT", "## Metadata", "## Reward model", "## Zero-shot tasks", "## SFT epochs", "## Samples"):
        assert words in text
    assert all(f"| {name} |" in text for name in evaluate.MODELS) and "nan" not in text.lower().split()
    for name in ("preference", "metadata", "tax", "training"):
        assert (report.out / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(report.out.rglob("*.tmp"))


def test_the_reports_numbers_are_those_of_its_measures(report):
    results = json.loads((report.out / "report.json").read_text())
    for name in evaluate.MODELS:
        for share, error, n in results["preference"][name].values():
            assert 0 <= share <= 1 and error >= 0 and n == 12
    table, changes = results["zero-shot"]
    able = table["all abilities"]
    assert able["PPO"][2] == sum(table[kind]["PPO"][2] for kind in web.ABILITIES) + table["next word"]["PPO"][2] and table["next word"]["PPO"][2] > 0
    assert changes["PPO-ptx - SFT"][0] == pytest.approx(able["PPO-ptx"][0] - able["SFT"][0])
    assert set(results["metadata"]) == {"attempts the right task", "keeps the stated constraint",
                                        "makes things up (closed domain, less is better)", "fits a customer assistant"}
    assert [row[0] for row in results["sft epochs"]] == [1, 2]
    assert results["config"]["prompts"] == 12


def test_the_headline_says_what_was_measured():
    shares = {"training labelers": (0.7, 0.01, 5), "held-out labelers": (0.6, 0.02, 5)}
    results = {
        "world": True, "preference": {"PPO": shares, "SFT": {team: (0.5, 0.03, 5) for team in shares}},
        "reward model": {"training labelers": {"reward model": (0.7, 0.01, 9), "agreement": (0.65, 0.02, 9), "ceiling": (0.9, 0.03, 9)},
                         "held-out labelers": {"reward model": (0.1, 0, 1), "agreement": (0.1, 0, 1), "ceiling": (0.1, 0, 1)}},
        "metadata": {"makes things up (closed domain, less is better)": {"SFT": (0.4, 0.1, 2), "PPO": (0.3, 0.1, 2), "PPO-ptx": (0.2, 0.05, 2)}},
        "zero-shot": ({"all abilities": {"SFT": (0.8, 0, 1), "PPO": (0.6, 0, 1), "PPO-ptx": (0.75, 0, 1)}},
                      {"PPO - SFT": (-0.2, 0.05, 1), "PPO-ptx - SFT": (-0.05, 0.02, 1), "PPO-ptx - PPO": (0.15, 0.1, 1)})}
    assert report_.headline(results) == [
        ("PPO preferred to SFT", "60.0 ± 2.0%"), ("SFT preferred to SFT (itself: 50%)", "50.0 ± 3.0%"),
        ("reward model, unseen prompts (ceiling)", "70.0 ± 1.0% (90.0 ± 3.0%)"), ("reward model's way from 50% to the ceiling", "50%"),
        ("two training labelers agree", "65.0 ± 2.0%"), ("makes things up, closed domain: SFT", "40.0 ± 10.0%"),
        ("makes things up, closed domain: PPO-ptx", "20.0 ± 5.0%"), ("zero-shot tasks, PPO less SFT", "-20.0 ± 5.0%"),
        ("zero-shot tasks, PPO-ptx less SFT", "-5.0 ± 2.0%"), ("of PPO's drop, PPO-ptx gives back", "75%")]
    results["zero-shot"][1]["PPO - SFT"] = (-0.2, 0.3, 1)
    assert report_.headline(results)[-1] == ("of PPO's drop, PPO-ptx gives back", "no drop")


def test_bars_stand_at_their_group_with_their_error():
    axis = mock.MagicMock()
    values = {"a": {"SFT": (0.5, 0.1, 3), "PPO": (0.7, 0.2, 3)}, "b": {"SFT": (0.25, 0.05, 3), "PPO": (None, None, 0)}}
    report_.bars(axis, ["a", "b"], values, ["SFT", "PPO"], "share")
    drawn = [(call.kwargs["label"], *call.args[:2], call.kwargs["yerr"]) for call in axis.bar.call_args_list]
    assert [(label, len(x), y, error) for label, x, y, error in drawn] == [
        ("SFT", 2, [50, 25], [10, 5]), ("PPO", 1, [70], [20])]
    assert drawn[0][1] == (-0.2, 0.8) and drawn[1][1] == (0.2,)


def test_the_next_word_is_right_where_the_likeliest_token_comes():
    counting = Bigram(torch.eye(9).roll(1, dims=1))  # after i it expects i + 1
    pages = [([0], [1, 2, 5, 6]), ([3], [4]), ([7], [1, 1])]
    assert evaluate.next_words(counting, pages, SimpleNamespace(end_of_text=8, vocab_size=9), "cpu") == [0.75, 1.0, 0.0]


def test_the_same_seed_writes_the_same_report(report):
    first = (report.out / "report.md").read_text()
    evaluate.main(report.report)
    assert (report.out / "report.md").read_text() == first


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        evaluate.Config(judges=0)


def test_more_judges_than_labelers_are_refused(chain):
    with pytest.raises((ValueError, UserError), match="--judges"):
        evaluate.main(dataclasses.replace(chain.report, judges=21))  # there are 20 held-out labelers


def test_a_team_that_ranked_no_pair_leaves_a_gap_in_the_report(chain, tmp_path):
    shutil.copytree(chain.data, tmp_path / "data")
    path = tmp_path / "data/comparisons.valid.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**r, "ranks": [1] * len(r["ranks"])} for r in records])
    shutil.copytree(chain.out, tmp_path / "out")
    evaluate.main(dataclasses.replace(chain.report, data=str(tmp_path / "data"), out=str(tmp_path / "out")))


def test_what_a_stage_has_not_made_yet_is_named_with_the_command_that_makes_it(chain, tmp_path):
    shutil.copytree(chain.out, tmp_path / "out")
    (tmp_path / "out/ppo_noptx/model.pt").unlink()
    with pytest.raises(UserError, match="ppo_noptx/model.pt is missing; in the default run `make ppo` makes it"):
        evaluate.main(dataclasses.replace(chain.report, out=str(tmp_path / "out")))
