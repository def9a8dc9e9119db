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

import evaluate
from common.config import UserError
from common.runtime import Runtime, RuntimeConfig
from conftest import Bigram, cpu, random_gpt, write_lines
from data import readers
from data.judges import Judge, SimulatedLabelers, score_responses, win_rates
from data.tinyworld import evaluation, labelers, requests, web
from data.tokenizer import Tokenizer
from model import ScalarModel
from paper import models, tables
from paper import tasks as zero_shot
from paper.models import BASELINE, MODELS
from paper.stats import mean_and_error, pair_accuracy, ratio

END = 8
NAMES = [model.name for model in MODELS]


# ---------------------------------------------------------------- means

def test_a_mean_has_an_interval_of_1_96_standard_errors():
    assert mean_and_error([1, 0, 1, 1]) == pytest.approx((0.75, 1.96 * math.sqrt(0.25 / 4), 4))
    assert mean_and_error([3.0]) == (3.0, 0.0, 1) and mean_and_error([]) == (None, None, 0)


def test_a_ratio_counts_pairs_and_its_error_counts_prompts():
    share, error, pairs = ratio([(10, 6), (1, 1), (5, 2)])
    assert (share, pairs) == (9 / 16, 16)
    residuals = [6 - 10 * share, 1 - share, 2 - 5 * share]
    assert error == pytest.approx(1.96 * math.sqrt(sum(r * r for r in residuals) / 2 / 3) / (16 / 3))
    assert ratio([]) == (None, None, 0) == ratio([(0, 0)])


def test_saying_everything_twice_narrows_no_interval():  # pitfall 45
    numbers, groups = [1, 0, 1, 1, 0.5], "abbcd"
    once = mean_and_error(numbers, groups)
    twice = mean_and_error(numbers * 2, groups * 2)
    assert twice[:2] == pytest.approx(once[:2]) and twice[2] == 10
    assert mean_and_error(numbers * 2)[1] < once[1]  # which is what counting them as independent would do


def test_the_error_over_groups_is_that_of_their_sums_by_hand():
    mean, error, n = mean_and_error([1, 1, 0, 0], "aabb")  # sums 2 and 0 of two each: residuals 1 and -1
    assert (mean, n) == (0.5, 4) and error == pytest.approx(1.96 * math.sqrt((1 + 1) / 1 / 2) / 2)


def test_a_task_that_was_drawn_twice_counts_once():
    a, b = ({"task": "bias", "context": "People from Kelso are", "choices": [" rude.", f" {x}."], "answer": 0}
            for x in ("lazy", "boring"))
    c = {"task": "translation", "context": "English: the red hat\nPidi:", "target": " Ta bo."}
    assert zero_shot.distinct([a, c, b, a, c]) == [a, c, b]


def test_pair_accuracy_leaves_out_tied_ranks_and_halves_tied_numbers():
    assert pair_accuracy([3.0, 2.0, 1.0], [1, 2, 3]) == (3, 3)
    assert pair_accuracy([1.0, 2.0, 3.0], [1, 2, 2]) == (2, 0)
    assert pair_accuracy([2.0, 2.0, 1.0], [1, 2, 2]) == (2, 1.5)
    assert pair_accuracy([1.0, 2.0], [1, 1]) == (0, 0)


# ---------------------------------------------------------------- judges

def labeler(opinions):
    """A labeler whose impressions of the two responses are opinions(first, second)."""
    return SimpleNamespace(impressions=lambda prompt, asks, responses, seed: opinions(*responses))


RECORDS = [{"prompt": f"prompt {i}", "asks": {}} for i in range(1000)]
OURS, THEIRS = ["ours"] * 1000, ["theirs"] * 1000


def win_rate(opinions, ours=OURS, theirs=THEIRS, count=1):
    judge = SimulatedLabelers("team", [labeler(opinions) for _ in range(3)], RECORDS, count, seed=0)
    rates = win_rates(judge, RECORDS, ours, theirs)
    assert len(rates) == 1000
    return sum(rates) / 1000


def test_a_judge_that_always_takes_the_first_gives_fifty_percent():  # pitfall 40
    assert win_rate(lambda first, second: (1, 0)) == pytest.approx(0.5, abs=0.05)
    assert win_rate(lambda first, second: (0, 1), count=3) == pytest.approx(0.5, abs=0.05)


def test_a_judge_that_always_prefers_ours_gives_a_hundred_percent_and_the_other_none():
    for text, expected in (("ours", 1), ("theirs", 0)):
        assert win_rate(lambda first, second: (first == text, second == text), count=3) == expected


def test_ties_are_half_a_win():
    assert win_rate(lambda first, second: (1, 1)) == 0.5


def test_swapping_the_models_swaps_the_win_rate():
    def longer(first, second):
        return len(first), len(second)

    rng = random.Random(0)
    a, b = (["x" * rng.randint(1, 5) for _ in range(1000)] for _ in range(2))
    assert win_rate(longer, a, b) == pytest.approx(1 - win_rate(longer, b, a))
    wins = [(len(x) > len(y)) + 0.5 * (len(x) == len(y)) for x, y in zip(a, b)]
    assert win_rate(longer, a, b) == pytest.approx(sum(wins) / 1000)


def test_judges_of_a_prompt_are_different_people_and_the_same_for_every_model():
    team, asked = [], []
    for i in range(5):
        team.append(SimpleNamespace(impressions=lambda p, a, r, seed, i=i: asked.append((p, i)) or (0, 0)))
    for ours in (OURS, ["another"] * 1000):
        win_rates(SimulatedLabelers("team", team, RECORDS[:50], 3, seed=0), RECORDS[:50], ours[:50], THEIRS[:50])
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
    assert zero_shot.answer_tasks(Bigram(table), tasks, letters.tokenizer, cpu()) == [1, 0, 1]


def test_a_target_is_right_if_greedy_decoding_goes_on_with_that_line_and_no_other(monkeypatch):
    tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)])
    says = {"one": " yes.\nAsk: more", "two": " yes. And more", "three": " ye", "four": " yes."}

    def fake(model, prompts, count, uniforms, temperature):
        assert temperature == 0 and uniforms.shape == (len(prompts), count)
        return [tokenizer.encode(says[tokenizer.decode(p)])[:count] for p in prompts]
    monkeypatch.setattr(zero_shot, "generate", fake)
    tasks = [{"task": "t", "context": context, "target": " yes."} for context in says]
    assert zero_shot.answer_tasks(random_gpt(), tasks, tokenizer, cpu()) == [1, 0, 0, 1]


def test_answers_to_tasks_do_not_depend_on_what_else_is_in_the_batch(letters):  # pitfall 4
    model, rng = random_gpt(), random.Random(0)
    word = lambda most: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, most)))
    many = [{"task": "t", "context": word(20), "choices": [word(5), word(5)], "answer": 0} for _ in range(40)]
    together = zero_shot.answer_tasks(model, many, letters.tokenizer, cpu())
    assert together == [zero_shot.answer_tasks(model, [task], letters.tokenizer, cpu())[0] for task in many]
    assert 0 < sum(together) < 40


def test_scores_are_those_of_each_text_alone_at_its_end_of_text(letters):  # pitfalls 5, 30
    model = random_gpt(kind=ScalarModel)
    records = [{"prompt": p} for p in ("bcd", "e", "fff", "g")] * 35  # more than a batch
    texts = ["a", "bcdefgh", "", "hh"] * 35
    scores = score_responses(model, records, texts, letters.tokenizer, "cpu")
    alone = [model(torch.tensor([letters.tokenizer.encode(r["prompt"] + t) + [END]]))[0, -1].item()
             for r, t in zip(records, texts)]
    assert scores == pytest.approx(alone, abs=1e-5)


def test_a_response_longer_than_the_context_is_cut_and_scored_at_an_end_of_text(letters):  # pitfalls 5, 30
    model = random_gpt(kind=ScalarModel, context=8)
    (score,) = score_responses(model, [{"prompt": "bcd"}], ["abcdefgh"], letters.tokenizer, "cpu")
    cut = letters.tokenizer.encode("bcd" + "abcd") + [END]  # 8 tokens
    assert score == pytest.approx(model(torch.tensor([cut]))[0, -1].item(), abs=1e-5)


# ---------------------------------------------------------------- preferences and metadata

def careless_responses(records, seed):
    """A response to each record, by other careless writers for each seed."""
    rng = random.Random(seed)
    return [requests.write(rng, record["asks"], **web.CARELESS) for record in records]


def test_each_team_judges_each_model_beside_the_other_sample_of_sft(chain):
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:30]
    responses = {name: careless_responses(records, name) for name in ("GPT", "SFT", BASELINE)}
    judges = evaluate.make_judges(chain.report, evaluation, records, responses, {}, {})
    rates = evaluate.preferences(judges, ("GPT", "SFT"), records, responses)
    for name, by_team in rates.items():
        assert list(by_team) == ["training labelers", "held-out labelers"]
        for team, number in zip(labelers.team(), by_team.values()):
            judge = SimulatedLabelers("", team, records, 3, chain.report.seed)
            expected = win_rates(judge, records, responses[name], responses[BASELINE])
            assert number == mean_and_error(expected, [record["user"] for record in records]) and number[0] != 0.5


def test_another_judge_takes_one_class_and_one_line(chain, monkeypatch):
    class LongerIsBetter(Judge):
        name = "ruler"

        def compare(self, prompt, a, b):
            return 0.5 if len(a) == len(b) else float(len(a) > len(b))

    records = [{"prompt": f"prompt {i}", "user": f"user {i}"} for i in range(4)]
    responses = {"PPO": ["aa", "a", "a", "aaa"], BASELINE: ["a", "aa", "b", "bb"]}
    rates = evaluate.preferences([LongerIsBetter()], ["PPO"], records, responses)
    assert rates == {"PPO": {"ruler": mean_and_error([1, 0, 0.5, 1])}}


def test_metadata_are_means_over_the_responses_that_they_apply_to(chain):
    records = readers.read_jsonl(chain.data / "prompts.test.jsonl", "requests")[:30]
    responses = {name: careless_responses(records, name) for name in NAMES}
    rates = evaluation.metadata_rates(NAMES, records, responses)
    for name, texts in responses.items():
        seen = [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, texts)]
        for rate in seen[0]:
            apply = [i for i, row in enumerate(seen) if row[rate] is not None]
            users = [records[i]["user"] for i in apply]
            assert rates[rate][name] == pytest.approx(mean_and_error([float(seen[i][rate]) for i in apply], users))
    assert rates["keeps the stated constraint"]["SFT"][2] < 30 == rates["attempts the right task"]["SFT"][2]
    assert rates["keeps the stated constraint"]["GPT"] != rates["keeps the stated constraint"]["SFT"]


def test_safety_tasks_are_those_of_the_built_in_world():
    assert list(zero_shot.SAFETY) == list(web.SAFETY)


def test_the_tax_is_taken_task_by_task_and_item_by_item(chain, monkeypatch):
    tokenizer, answers, rng = Tokenizer.load(chain.data), {}, random.Random(0)
    tasks = zero_shot.distinct(readers.read_jsonl(chain.data / "tasks.test.jsonl", "tasks"))
    text = readers.PretrainingText(chain.data / "pretrain.valid.bin", tokenizer, 256)
    pages = text.pairs(range(len(text)))

    def over_contexts(numbers, chosen):
        return mean_and_error(numbers, [task["context"] for task in chosen])

    def answer(model, items, *rest):
        assert items == (tasks if "choices" in items[0] or "target" in items[0] else pages)
        return answers.setdefault(model.name, []).append([rng.random() for _ in items]) or answers[model.name][-1]
    monkeypatch.setattr(zero_shot, "answer_tasks", answer)
    monkeypatch.setattr(zero_shot, "next_words", answer)
    models = {name: SimpleNamespace(name=name, config=SimpleNamespace(context=256))
              for name in ("GPT", "SFT", "PPO", "PPO-ptx")}
    table, changes = zero_shot.alignment_tax(models, chain.report, tokenizer, Runtime(RuntimeConfig(device="cpu")))
    for name, (right, words) in answers.items():
        for kind in {task["task"] for task in tasks}:
            chosen = [i for i, task in enumerate(tasks) if task["task"] == kind]
            assert table[kind][name] == over_contexts([right[i] for i in chosen], [tasks[i] for i in chosen])
        assert table["next word"][name] == mean_and_error(words)
    able = {name: [x for x, task in zip(right, tasks) if task["task"] in web.ABILITIES] + words
            for name, (right, words) in answers.items()}
    for name in able:
        assert table["all abilities"][name] == mean_and_error(able[name])
    assert list(changes) == ["PPO - SFT", "PPO-ptx - SFT", "PPO-ptx - PPO", "PPO - GPT", "PPO-ptx - GPT"]
    for pair, number in changes.items():
        more, less = pair.split(" - ")
        assert number == mean_and_error([a - b for a, b in zip(able[more], able[less])]) and number[0] != 0


def test_tasks_on_one_context_and_pages_of_one_document_count_as_one_group(chain, tmp_path, monkeypatch):  # pitfall 45
    tokenizer = Tokenizer.load(chain.data)
    ask = lambda kind, context, target: {"task": kind, "context": context, "target": target}
    drawn = [ask("reading", "a", " 1"), ask("reading", "b", " 2"), ask("reading", "a", " 1"), ask("truth", "c", " 3"),
             ask("truth", "c", " 4"), ask("truth", "d", " 5"), ask("truth", "d", " 6")]
    (tmp_path / "tasks.test.jsonl").write_text("".join(json.dumps(task) + "\n" for task in drawn))
    end = tokenizer.end_of_text
    # pieces of 4: 2 + 1
    np.array([1, 2, 3, 4, 1, 2, end, 5, 6, end], dtype=np.uint16).tofile(tmp_path / "pretrain.valid.bin")
    right = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}
    monkeypatch.setattr(zero_shot, "answer_tasks",
                        lambda model, tasks, *rest: [right[task["context"]] for task in tasks])
    monkeypatch.setattr(zero_shot, "next_words", lambda model, pages, *rest: [1.0, 1.0, 0.0][: len(pages)])
    monkeypatch.setattr(readers, "PretrainingText",
                        lambda path, tokenizer, context, real=readers.PretrainingText: real(path, tokenizer, 4))
    models = {"SFT": SimpleNamespace(config=SimpleNamespace(context=64))}
    config = dataclasses.replace(chain.report, data=str(tmp_path))
    table, _ = zero_shot.alignment_tax(models, config, tokenizer, Runtime(RuntimeConfig(device="cpu")))
    assert table["reading"]["SFT"] == mean_and_error([1, 0])  # not three
    assert table["truth"]["SFT"][:2] == mean_and_error([1, 0])[:2]  # two questions, of two wordings each
    mean, error, pages = table["next word"]["SFT"]
    assert (mean, pages) == (pytest.approx(2 / 3), 3) and error == mean_and_error([1, 1, 0], "aab")[1]


def test_weights_are_downloaded_once_per_machine(chain, monkeypatch):
    calls = []

    def weights(name, tokenizer):
        calls.append(name)
        return f"{chain.out}/base/model.pt"

    class Machine(Runtime):
        def once_per_machine(self, work):  # on one process of each machine first, then on its others
            calls.append("once per machine")
            return work()

    monkeypatch.setattr(evaluate.download, "weights", weights)
    config, runtime = dataclasses.replace(chain.report, base="gpt2"), Machine(RuntimeConfig(device="cpu"))
    evaluate.load_models(config, Tokenizer.load(chain.data), runtime, world=evaluation)
    assert calls == ["once per machine", "gpt2"]


# ---------------------------------------------------------------- the report

@pytest.fixture(scope="module")
def report(chain):
    evaluate.main(chain.report)
    return chain


def test_the_report_has_every_section_figure_and_model(report):
    text = (report.out / "report.md").read_text()
    for words in ("## Preferred to SFT", "## Metadata", "## Reward model", "## Zero-shot tasks", "## SFT epochs",
                  "## Samples"):
        assert words in text
    assert all(f"| {name} |" in text for name in NAMES) and "nan" not in text.lower().split()
    for name in ("preference", "metadata", "tax", "training"):
        assert (report.out / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(report.out.rglob("*.tmp"))


def test_the_reports_numbers_are_those_of_its_measures(report):
    results = json.loads((report.out / "report.json").read_text())
    for name in NAMES:
        for share, error, n in results["preference"][name].values():
            assert 0 <= share <= 1 and error >= 0 and n == 12
    table, changes = results["zero-shot"]
    able = table["all abilities"]
    pages = table["next word"]["PPO"][2]
    assert able["PPO"][2] == sum(table[kind]["PPO"][2] for kind in web.ABILITIES) + pages and pages > 0
    assert changes["PPO-ptx - SFT"][0] == pytest.approx(able["PPO-ptx"][0] - able["SFT"][0])
    assert set(results["metadata"]) == {"attempts the right task", "keeps the stated constraint",
                                        "makes things up (closed domain, less is better)", "fits a customer assistant"}
    assert [row[0] for row in results["sft epochs"]] == [1, 2]
    assert results["config"]["prompts"] == 12


def test_the_headline_says_what_was_measured():
    shares = {"training labelers": (0.7, 0.01, 5), "held-out labelers": (0.6, 0.02, 5)}
    results = {
        "world": True, "preference": {"PPO": shares, "SFT": {team: (0.5, 0.03, 5) for team in shares}},
        "reward model": {"training labelers": {"reward model": (0.7, 0.01, 9), "agreement": (0.65, 0.02, 9),
                                               "ceiling": (0.9, 0.03, 9)},
                         "held-out labelers": {"reward model": (0.1, 0, 1), "agreement": (0.1, 0, 1),
                                               "ceiling": (0.1, 0, 1)}},
        "metadata": {"makes things up (closed domain, less is better)": {"SFT": (0.4, 0.1, 2), "PPO": (0.3, 0.1, 2),
                                                                         "PPO-ptx": (0.2, 0.05, 2)}},
        "zero-shot": ({"all abilities": {"SFT": (0.8, 0, 1), "PPO": (0.6, 0, 1), "PPO-ptx": (0.75, 0, 1)}},
                      {"PPO - SFT": (-0.2, 0.05, 1), "PPO-ptx - SFT": (-0.05, 0.02, 1),
                       "PPO-ptx - PPO": (0.15, 0.1, 1)})}
    assert tables.headline(results) == [
        ("PPO preferred to SFT", "60.0 ± 2.0%"), ("SFT preferred to SFT (itself: 50%)", "50.0 ± 3.0%"),
        ("reward model, unseen prompts (ceiling)", "70.0 ± 1.0% (90.0 ± 3.0%)"),
        ("reward model's way from 50% to the ceiling", "50%"),
        ("two training labelers agree", "65.0 ± 2.0%"), ("makes things up, closed domain: SFT", "40.0 ± 10.0%"),
        ("makes things up, closed domain: PPO-ptx", "20.0 ± 5.0%"), ("zero-shot tasks, PPO minus SFT", "-20.0 ± 5.0%"),
        ("zero-shot tasks, PPO-ptx minus SFT", "-5.0 ± 2.0%"), ("of PPO's drop, PPO-ptx gives back", "75%")]
    results["zero-shot"][1]["PPO - SFT"] = (-0.2, 0.3, 1)
    assert tables.headline(results)[-1] == ("of PPO's drop, PPO-ptx gives back", "no drop")


def test_bars_stand_at_their_group_with_their_error():
    axis = mock.MagicMock()
    values = {"a": {"SFT": (0.5, 0.1, 3), "PPO": (0.7, 0.2, 3)}, "b": {"SFT": (0.25, 0.05, 3), "PPO": (None, None, 0)}}
    tables.bars(axis, ["a", "b"], values, ["SFT", "PPO"], "share")
    drawn = [(call.kwargs["label"], *call.args[:2], call.kwargs["yerr"]) for call in axis.bar.call_args_list]
    assert [(label, len(x), y, error) for label, x, y, error in drawn] == [
        ("SFT", 2, [50, 25], [10, 5]), ("PPO", 1, [70], [20])]
    assert drawn[0][1] == (-0.2, 0.8) and drawn[1][1] == (0.2,)


def test_the_next_word_is_right_where_the_likeliest_token_comes():
    counting = Bigram(torch.eye(9).roll(1, dims=1))  # after i it expects i + 1
    pages = [([0], [1, 2, 5, 6]), ([3], [4]), ([7], [1, 1])]
    tokenizer = SimpleNamespace(end_of_text=8, vocab_size=9)
    assert zero_shot.next_words(counting, pages, tokenizer, "cpu") == [0.75, 1.0, 0.0]


def test_a_model_that_is_added_to_the_list_is_in_every_table_and_figure(report, tmp_path, monkeypatch):
    shutil.copytree(report.out, tmp_path / "out")
    shutil.copytree(report.out / "ppo_noptx", tmp_path / "out/dpo")
    added = (*MODELS, models.EvaluatedModel("DPO", "dpo", "#1f78b4"))  # the one line that it takes
    for module in (models, evaluate, zero_shot):
        monkeypatch.setattr(module, "MODELS", added)
    drawn, draw = [], tables.bars
    monkeypatch.setattr(tables, "bars", lambda *given: drawn.append(given[3]) or draw(*given))
    evaluate.main(dataclasses.replace(report.report, out=str(tmp_path / "out")))
    results = json.loads((tmp_path / "out/report.json").read_text())
    before = json.loads((report.out / "report.json").read_text())
    assert list(results["preference"]) == [*NAMES, "DPO"] and results["runs"] == before["runs"]
    assert {name: results["preference"][name] for name in NAMES} == before["preference"]
    table, changes = results["zero-shot"]
    assert all(by_model["DPO"] == by_model["PPO"] for by_model in table.values())  # the same weights
    assert changes["DPO - SFT"] == changes["PPO - SFT"] and changes["DPO - GPT"] == changes["PPO - GPT"]
    text = (tmp_path / "out/report.md").read_text()
    for line in ("| DPO preferred to SFT |", "| zero-shot tasks, DPO minus SFT |", "| DPO - SFT |", "\n| DPO |"):
        assert line in text
    assert drawn and all("DPO" in names for names in drawn)


def test_the_training_figure_shows_the_mean_score_thin_and_smoothed(monkeypatch, tmp_path):
    import matplotlib.axes

    curves, plot = [], matplotlib.axes.Axes.plot

    def recorded(axis, x, y, **style):
        curves.append((y, style["linewidth"]))
        return plot(axis, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", recorded)
    log = [{"step": i, "score": float(i % 2), "reward": -9.0, "kl": 1.0, "entropy": 2.0} for i in range(40)]
    (tmp_path / "figures").mkdir()
    tables.draw_training(tmp_path, {"PPO": log})
    (raw, thin), (smoothed, thick) = curves[:2]  # of the first panel
    assert raw == [0.0, 1.0] * 20 and thin < thick
    assert smoothed[20] == pytest.approx(2 / 5) and all(abs(x - 0.5) <= 0.2 for x in smoothed)
    assert tables.smooth([1.0, 2.0]) == [1.0, 2.0]


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
