"""Which model, prompt, sample and judge each number in evaluate.py's report.json comes from.

Its real main runs twice, with labelers and with a judge, on checkpoints of random weights. What models respond, how
they are scored and what labelers think are stand-ins: functions of all their inputs, including the model's weights. So
the wrong model, prompt, sample or judge gives other numbers. Expected numbers are computed from the recorded calls of
the stand-ins. Only means are compared, no errors."""

import csv
import json
import random
import statistics
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import reward
import sft
from common.run import Run
from common.runtime import Runtime, RuntimeConfig
from conftest import random_gpt, write_lines
from data import readers
from data.tinyworld import labelers, requests, web
from data.tokenizer import Tokenizer
from model import ScalarModel
from paper import tasks as zero_shot

RUNS = {"GPT": "base", "GPT prompted": "base", "SFT": "sft", "PPO": "ppo_noptx", "PPO-ptx": "ppo"}  # folders
SKILL = dict(base=1, sft=2, ppo_noptx=3, ppo=4, gpt2=5)  # of the policies: ~ in what they say, and tasks that they know
TEAMS = ("training labelers", "held-out labelers")
PROMPTS, JUDGES, LONGEST = 30, 2, 300
TOKENIZER = Tokenizer("bytes", [bytes([i]) for i in range(256)])
END = TOKENIZER.end_of_text


def opinion(*of):
    """A number, another one for everything it is of; what stands last is a text, liked the more the more ~ is in
    it."""
    return random.Random(repr(of)).randrange(1024) / 64 + 3 * of[-1].count("~")


# ---------------------------------------------------------------- a dataset and checkpoints

def different(make, count, seed):
    """`count` different things that make(rng) makes."""
    rng, made = random.Random(seed), {}
    while len(made) < count:
        one = make(rng)
        made[one.get("prompt") or one["context"]] = one
    return list(made.values())


def comparison(record, labeler, rng):
    return {**record, "labeler": labeler, "ranks": [rng.randint(1, 3) for _ in range(3)],
            "responses": [f"{requests.write(rng, record['asks'])} {i}" for i in range(3)]}


def greedy_page(model, first):
    """Seven tokens of which the model holds each for the likeliest after those before it."""
    page = [first]
    while len(page) < 7:
        page.append(model(torch.tensor([page]))[0, -1, :END].argmax().item())
    return page


def likeliest(model, task):
    """The index of the choice with the highest log-probability."""
    context, sums = TOKENIZER.encode(task["context"]), []
    for choice in map(TOKENIZER.encode, task["choices"]):
        logprobs = model(torch.tensor([context + choice]))[0].log_softmax(-1)
        sums.append(sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(choice)))
    return sums.index(max(sums))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folders `data` and `out`, and what is in them. For each policy there are tasks with choices and pages of the
    web that were made for it to be right on: SKILL of them."""
    folder, rng = tmp_path_factory.mktemp("wiring"), random.Random(0)
    data, out = folder / "data", folder / "out"
    models = {name: random_gpt(257, 1024, seed=seed) for seed, name in enumerate((*SKILL, "epoch1", "epoch2"))}
    models |= {name: random_gpt(257, 1024, seed=seed, kind=ScalarModel)
               for seed, name in enumerate(("reward", "judge"), 7)}
    for name, model in models.items():
        path = out / "sft" / f"{name}.pt" if name.startswith("epoch") else out / name / "model.pt"
        folders = dict(out=str(path.parent), data=str(data))
        config = sft.Config(**folders)
        if isinstance(model, ScalarModel):
            config = reward.Config(**folders, seed=int(name == "judge"))
        run = Run(config, Runtime(RuntimeConfig(device="cpu")), TOKENIZER)
        run.save_model(model, path.name, head_seed=config.seed)
        run.finish()
    models["gpt2"].save_gpt2(out / "gpt2")
    write_lines(out / "sft/log.jsonl", [{"step": i, "epoch": i + 1, "valid_loss": 3.5 - i} for i in range(2)])
    for name in ("ppo", "ppo_noptx"):
        write_lines(out / name / "log.jsonl", [{"step": 0, "score": 0.0, "kl": 0.0, "entropy": 1.0}])

    data.mkdir()
    TOKENIZER.save(data)
    posts = [{**post, "user": f"customer-{i // 2}"} for i, post in enumerate(different(requests.request, 70, "posts"))]
    split = {"test": posts[:40], "valid": posts[40:52], "train": posts[52:]}
    for name, records in split.items():
        write_lines(data / f"prompts.{name}.jsonl", records)
    for name, teams in (("valid", 2), ("train", 1)):
        write_lines(data / f"comparisons.{name}.jsonl",
                    [comparison(r, f"{TEAMS[i % teams]} {i % 3}", rng) for i, r in enumerate(split[name])])
    meant_for, kinds = [name for name, skill in SKILL.items() for _ in range(skill)], {**web.ABILITIES, **web.SAFETY}
    for name in ("test", "valid"):
        tasks = {kind: different(kinds[kind], len(meant_for), f"{name}/{kind}")
                 for kind in ("reading", "completion", "truth")}
        for policy, *some in zip(meant_for, tasks["completion"], tasks["truth"]):
            for task in some:
                task["answer"] = likeliest(models[policy], task)
        write_lines(data / f"tasks.{name}.jsonl", [task for some in tasks.values() for task in some])
    pages = [greedy_page(models[name], first) for first, name in enumerate(meant_for)]
    np.array([token for page in pages for token in (*page, END)], np.uint16).tofile(data / "pretrain.valid.bin")
    return SimpleNamespace(data=data, out=out, models=models, pages=pages)


# ---------------------------------------------------------------- two evaluations, listened to

class Labeler:
    """Who thinks what the whole team thinks, so that it does not matter who of them is asked."""

    def __init__(self, team, i, asked):
        self.team, self.name, self.asked = team, f"{team} {i}", asked

    def impressions(self, prompt, asks, responses, seed):
        self.asked.append(SimpleNamespace(who=self.name, team=self.team, prompt=prompt, responses=set(responses)))
        return [opinion(self.team, prompt, asks, text) for text in responses]


def speech(who, asks, prompt, numbers):
    """An answer as on a help page, where the next question follows."""
    rng, marks = random.Random(repr((who, prompt, numbers))), "~" * (SKILL.get(who, 0) + prompt.startswith("Help page"))
    text = requests.write(rng, asks, **web.CARELESS)
    return f" {text} {marks}{rng.randrange(10**6)}.\nAsk: What else?\nReply: Nothing."


def evaluate_and_listen(world, **changes):
    """evaluate.main -> its `results`, who was `asked` what ({(weights, prompt): its answers}), what `people` were
    asked, and what it read of the dataset."""
    names = {model.tokens.weight.detach().numpy().tobytes(): name for name, model in world.models.items()}
    name_of = lambda model: names[model.tokens.weight.detach().numpy().tobytes()]
    read = lambda split, kind: readers.read_jsonl(world.data / f"{kind}.{split}.jsonl", kind)
    asks, lines, asked, people = {}, {}, defaultdict(list), []
    for split in ("test", "valid"):
        asks |= {prompt: r["asks"] for r in read(split, "prompts")
                 for prompt in (r["prompt"], web.with_prefix(r["prompt"]))}
        lines |= {task["context"]: (i, task["target"]) for i, task in enumerate(read(split, "tasks"))
                  if "target" in task}

    def generate(model, prompts, max_new_tokens, uniforms, temperature=1.0, **rest):
        who, responses = name_of(model), []
        for prompt, numbers in zip(map(TOKENIZER.decode, prompts), uniforms.tolist(), strict=True):
            if prompt in asks:
                text = speech(who, asks[prompt], prompt, numbers)
            else:
                i, target = lines[prompt]
                text = target if i < SKILL[who] else " nothing"
            responses.append((TOKENIZER.encode(text) + [END])[:max_new_tokens])
            asked[who, prompt].append(SimpleNamespace(numbers=tuple(numbers), max_new_tokens=max_new_tokens,
                                                      temperature=temperature, text=TOKENIZER.decode(responses[-1])))
        return responses

    def last_scores(model, episodes, *rest):
        return torch.tensor([opinion(name_of(model), *map(TOKENIZER.decode, episode)) for episode in episodes])

    config = evaluate.Config(data=str(world.data), out=str(world.out), device="cpu", prompts=PROMPTS, judges=JUDGES,
                             max_new_tokens=LONGEST, batch_size=7, **changes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, zero_shot):
            patch.setattr(module, "generate", generate)
        patch.setattr(readers, "last_scores", last_scores)
        patch.setattr(labelers, "team", lambda: tuple([Labeler(team, i, people) for i in range(3)] for team in TEAMS))
        patch.setattr(evaluate.tables, "draw", lambda *_: None)  # figures take longer than everything else
        evaluate.main(config)
    return SimpleNamespace(config=config, results=json.loads((world.out / "report.json").read_text()),
                           asked=dict(asked),
                           people=people, records=read("test", "prompts")[:PROMPTS], valid=read("valid", "prompts"),
                           comparisons=read("valid", "comparisons"), tasks=read("test", "tasks"),
                           runs=RUNS if not config.judge else {
                               name: run for name, run in {**RUNS, "GPT": "gpt2"}.items() if name != "GPT prompted"})


@pytest.fixture(scope="module")
def by_labelers(world):
    return evaluate_and_listen(world)


@pytest.fixture(scope="module")
def by_judge(world):
    return evaluate_and_listen(world, judge=f"{world.out}/judge/model.pt", base=f"{world.out}/gpt2", pairs=5)


@pytest.fixture(params=["by_labelers", "by_judge"])
def either(request):
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------- what is expected of them

def questions(run, name):
    """The texts that a model reads, in the order of the records."""
    return [web.with_prefix(r["prompt"]) if name == "GPT prompted" else r["prompt"] for r in run.records]


def responses_of(run, name):
    """A model's response to each record's prompt. Of SFT's two samples, SFT's is the one that the report shows."""
    answers = [run.asked[run.runs[name.split(" baseline")[0]], prompt] for prompt in questions(run, name)]
    if name.startswith("SFT"):
        _, prompt, shown = run.results["samples"][0]
        which = [call.text for call in run.asked["sft", prompt]].index(shown["SFT"])
        return [calls[which if name == "SFT" else 1 - which].text for calls in answers]
    texts = [call.text for call, in answers]
    return [text.split("\n")[0].strip() for text in texts] if name == "GPT prompted" else texts


def mean(measure, run, name):
    """The mean of measure(record, response) over a model's responses to which it applies."""
    numbers = [measure(r, text) for r, text in zip(run.records, responses_of(run, name))]
    return statistics.mean([x for x in numbers if x is not None])


def win_rate(worth, run, name):
    """How often a model's response is worth more than the baseline's."""
    wins = [(worth(r, a) > worth(r, b)) + 0.5 * (worth(r, a) == worth(r, b))
            for r, a, b in zip(run.records, responses_of(run, name), responses_of(run, "SFT baseline"))]
    return statistics.mean(wins)


def check(reported, expected):
    """Both are {name: {what: number}}."""
    assert reported == {name: pytest.approx(numbers) for name, numbers in expected.items()}


def means(table):
    """{name: {what: mean}} of {name: {what: (mean, error, n)}}."""
    return {name: {what: number[0] for what, number in by.items()} for name, by in table.items()}


def turned(table):
    """{a: {b: x}} -> {b: {a: x}}"""
    return {b: {a: by[b] for a, by in table.items()} for b in next(iter(table.values()))}


# ---------------------------------------------------------------- who speaks

def test_each_model_answers_each_test_prompt_once_and_sft_twice(either):  # pitfall 47
    """Twice for the baseline. These weights, these prompts, and no others."""
    expected = Counter((run, prompt) for name, run in either.runs.items() for prompt in questions(either, name))
    expected.update(("sft", r["prompt"]) for r in either.records)
    elsewhere = {task["context"] for task in either.tasks} | {r["prompt"] for r in either.valid}
    assert {key: len(calls) for key, calls in either.asked.items() if key[1] not in elsewhere} == expected


def test_sft_and_its_baseline_are_samples_of_different_random_numbers(either):  # pitfall 46
    for r in either.records:
        ours, theirs = either.asked["sft", r["prompt"]]
        assert ours.numbers != theirs.numbers
    shares = either.results["preference"]["SFT"].values()
    assert shares and all(share[1] > 0 for share in shares)  # not 50.0 ± 0.0


def test_each_response_of_a_model_has_random_numbers_of_its_own(either):
    for name, run in either.runs.items():
        numbers = [call.numbers for prompt in questions(either, name) for call in either.asked[run, prompt]]
        assert len(set(numbers)) == len(numbers) >= PROMPTS


def test_responses_are_sampled_at_temperature_1_up_to_max_new_tokens(either):
    prompts = {prompt for name in either.runs for prompt in questions(either, name)}
    prompts |= {r["prompt"] for r in either.valid}
    calls = [call for (_, prompt), calls in either.asked.items() if prompt in prompts for call in calls]
    assert {(call.temperature, call.max_new_tokens, len(call.numbers)) for call in calls} == {(1.0, LONGEST, LONGEST)}


def test_only_prompted_gpt_reads_the_few_shot_prefix(either):
    expected = {"base"} if "GPT prompted" in either.runs else set()
    assert {who for who, prompt in either.asked if prompt.startswith("Help page\n")} == expected


def test_samples_show_what_each_model_said_to_that_prompt(either):
    answers = {name: dict(zip([r["prompt"] for r in either.records], responses_of(either, name)))
               for name in either.runs}
    use_cases = {r["prompt"]: r["use_case"] for r in either.records}
    assert {use_case for use_case, _, _ in either.results["samples"]} == set(use_cases.values())
    for use_case, prompt, shown in either.results["samples"]:
        assert use_cases[prompt] == use_case and shown == {name: answers[name][prompt] for name in either.runs}


def test_only_prompted_gpts_replies_are_cut_where_the_next_question_begins(by_labelers):
    for _, _, shown in by_labelers.results["samples"]:
        for name, text in shown.items():
            assert ("\nAsk: " not in text and text == text.strip()) == (name == "GPT prompted")


def test_the_report_says_how_many_prompts_and_which_runs_it_is_of(either):
    assert either.results["prompts"] == PROMPTS and either.results["customers"] == PROMPTS // 2
    assert either.results["runs"] == {"PPO": "ppo_noptx", "PPO-ptx": "ppo"}
    assert either.results["world"] == (not either.config.judge)


# ---------------------------------------------------------------- who judges whom

def test_scores_are_the_reward_models_and_the_judges_of_each_models_own_responses(either):
    models = {"reward model's score": "reward"} | ({"judge's score": "judge"} if either.config.judge else {})
    reported = {what: by for what, by in either.results["scores"].items() if what != "true average preference"}
    check(turned(means(reported)), {name: {what: mean(lambda r, text: opinion(model, r["prompt"], text), either, name)
                                           for what, model in models.items()} for name in either.runs})


def test_true_average_preference_and_metadata_are_of_each_models_own_responses(by_labelers):
    run, rates = by_labelers, list(by_labelers.results["metadata"])
    worth = means(run.results["scores"])["true average preference"]
    check({name: {"worth": x} for name, x in worth.items()},
          {name: {"worth": mean(lambda r, text: labelers.true_worth(r["prompt"], r["asks"], text), run, name)}
           for name in RUNS})
    check(turned(means(run.results["metadata"])), {
        name: {rate: mean(lambda r, text: labelers.metadata(r["prompt"], r["asks"], text)[rate], run, name)
               for rate in rates}
        for name in RUNS})


def test_each_team_compares_each_model_with_the_other_sample_of_sft(by_labelers):
    check(means(by_labelers.results["preference"]), {
        name: {team: win_rate(lambda r, text: opinion(team, r["prompt"], r["asks"], text), by_labelers, name)
               for team in TEAMS} for name in RUNS})


def test_as_many_labelers_of_each_team_as_asked_for_compare_two_responses(by_labelers):
    votes = Counter((x.team, x.prompt, frozenset(x.responses)) for x in by_labelers.people)
    voters = {(x.who, x.prompt, frozenset(x.responses)) for x in by_labelers.people}
    pairs = [(r["prompt"], frozenset(pair)) for name in RUNS
             for r, *pair in zip(by_labelers.records, responses_of(by_labelers, name),
                                 responses_of(by_labelers, "SFT baseline"))]
    for team in TEAMS:
        for pair in pairs:
            assert votes[team, *pair] == sum((f"{team} {i}", *pair) in voters for i in range(3)) == JUDGES


def test_it_is_the_judges_scores_that_say_which_response_wins(by_judge):
    reported = means(by_judge.results["preference"])
    check(reported, {name: {"judge": win_rate(lambda r, text: opinion("judge", r["prompt"], text), by_judge, name)}
                     for name in by_judge.runs})


def test_pairs_for_people_are_a_models_response_and_the_baselines(by_judge, world):
    with open(world.out / "pairs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sides = json.loads((world.out / "pairs.key.json").read_text())["sides"]
    prompts = [r["prompt"] for r in by_judge.records]
    assert Counter(name for pair in sides.values() for name in pair[:2] if "baseline" not in name) == {
        name: 5 for name in by_judge.runs if name != "SFT"}
    for row in rows:
        i, (first, second, user, *texts) = prompts.index(row["prompt"]), sides[row["pair"]]
        assert texts == [row["prompt"], row["first"], row["second"]]
        assert [row["first"], row["second"]] == [responses_of(by_judge, name)[i] for name in (first, second)]
        assert any("SFT" in name for name in (first, second)) and user == by_judge.records[i]["user"]


# ---------------------------------------------------------------- the reward model, the epochs, the tasks

def right_pairs(run, team, worth):
    """The share of pairs ranked by that team's labelers that worth(comparison, response) orders likewise."""
    right = [(worth(r, a) > worth(r, b)) + 0.5 * (worth(r, a) == worth(r, b)) for r in run.comparisons
             if r["labeler"].startswith(team) for a, i in zip(r["responses"], r["ranks"])
             for b, j in zip(r["responses"], r["ranks"]) if i < j]
    return statistics.mean(right)


def test_rankings_of_each_team_are_compared_with_each_judges_own(either):
    judges = {"reward model": lambda team: lambda r, text: opinion("reward", r["prompt"], text)}
    if either.config.judge:
        judges["judge"] = lambda team: lambda r, text: opinion("judge", r["prompt"], text)
    else:
        judges["agreement"] = lambda team: lambda r, text: opinion(team, r["prompt"], r["asks"], text)
        judges["ceiling"] = lambda team: lambda r, text: labelers.true_worth(r["prompt"], r["asks"], text)
    check(means(either.results["reward model"]), {team: {who: right_pairs(either, team, worth(team))
                                                        for who, worth in judges.items()} for team in TEAMS})


def test_agreement_is_with_another_labeler_of_the_same_team(by_labelers):
    authors = {r["prompt"]: r["labeler"] for r in by_labelers.comparisons}
    colleagues = [(x.who, authors[x.prompt]) for x in by_labelers.people if x.prompt in authors]
    assert len(colleagues) == len(authors)
    for colleague, author in colleagues:
        assert colleague != author and colleague[:-1] == author[:-1]


def test_sft_epochs_are_scored_by_each_epochs_answers_to_validation_prompts(either):
    prompts, rows = [r["prompt"] for r in either.valid], {}
    assert {who for who, prompt in either.asked if prompt in prompts} == {"epoch1", "epoch2"}
    for epoch, loss in ((1, 3.5), (2, 2.5)):
        answers = [(prompt, call.text) for prompt in prompts
                   for call in either.asked.get((f"epoch{epoch}", prompt), [])]
        assert [prompt for prompt, _ in answers] == prompts
        rows[epoch] = {"loss": loss, "score": statistics.mean(opinion("reward", *answer) for answer in answers)}
    check({epoch: {"loss": loss, "score": score} for epoch, loss, score, *_ in either.results["sft epochs"]}, rows)


@torch.no_grad()
def right_items(run, world, name):
    """[(kind, how much of it is right)] of the test split's tasks and of the pages of the web."""
    who, result = run.runs[name], []
    model = world.models[who]
    for i, task in enumerate(run.tasks):
        right = likeliest(model, task) == task["answer"] if "choices" in task else i < SKILL[who]
        result.append((task["task"], float(right)))
    for page in world.pages:
        row = torch.tensor([*page, END])
        result.append(("next word", (model(row[None])[0, :-1].argmax(-1) == row[1:]).float().mean().item()))
    return result


def test_answers_to_tasks_stand_under_the_name_of_the_model_that_gave_them(either, world):
    table, changes = either.results["zero-shot"]
    right = {name: right_items(either, world, name) for name in either.runs if name != "GPT prompted"}
    expected = {kind: {name: statistics.mean(x for k, x in items if k == kind) for name, items in right.items()}
                for kind in ("reading", "completion", "truth", "next word")}
    expected["all abilities"] = {name: statistics.mean(x for kind, x in items if kind != "truth")
                                 for name, items in right.items()}
    check(means(table), expected)
    assert {"PPO - SFT", "PPO-ptx - SFT", "PPO-ptx - PPO"} <= changes.keys()
    for pair, number in changes.items():
        more, less = (expected["all abilities"][name] for name in pair.split(" - "))
        assert number[0] == pytest.approx(more - less)


def test_each_model_answers_the_tasks_of_the_test_split_greedily_and_once(either):
    contexts = [task["context"] for task in either.tasks if "target" in task]
    greedy = {key: [call.temperature for call in calls] for key, calls in either.asked.items()
              if any(call.temperature != 1 for call in calls)}
    assert greedy == {(run, context): [0] for run in {*either.runs.values()} for context in contexts}
