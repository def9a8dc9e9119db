"""The made-up world: what customers ask, what labelers see in an answer, what the web says, what is kept apart."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from common.config import UserError
from conftest import ROOT
from data.tinyworld import labelers, prepare, requests, web
from data.tinyworld.world import FACTS, INSULTS, KIND_OF, KINDS, PIDI, RELATIONS, TRAITS, ask, state, to_pidi
from data.tokenizer import Tokenizer


def many_requests(count=3000, seed=0):
    rng = random.Random(seed)
    return [requests.request(rng) for _ in range(count)]


def lines(chain, name):
    return [json.loads(line) for line in (chain.data / f"{name}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- requests and answers

def test_use_cases_come_in_the_proportions_of_table_1():
    counts = Counter(r["use_case"] for r in many_requests(8000))
    assert set(counts) == set(requests.USE_CASES)
    for use_case, percent in requests.USE_CASES.items():
        assert 100 * counts[use_case] / 8000 == pytest.approx(percent, abs=2)


def test_the_answer_of_a_careful_and_warm_writer_has_nothing_to_object_to():
    rng = random.Random(1)
    for r in many_requests():
        answer = requests.write(rng, r["asks"])
        seen = labelers.assess(r["prompt"], r["asks"], answer)
        assert all(value in (None, 1) for value in seen.values()), (r["prompt"], answer, seen)
        facts = labelers.metadata(r["prompt"], r["asks"], answer)
        assert facts["attempts the right task"] and facts["fits a customer assistant"]
        assert facts["keeps the stated constraint"] in (None, True)
        assert not facts["makes things up (closed domain, less is better)"]


@pytest.mark.parametrize("habit, key", [(dict(truth=0.0), "truth"), (dict(constraint=0.0), "constraint"),
                                        (dict(stray=1.0), "truth"), (dict(warm=0.0), "tone"),
                                        (dict(slip=1.0), "content")])
def test_each_bad_habit_shows_where_it_should(habit, key):
    rng, worse = random.Random(2), 0
    for r in many_requests(1500):
        good, bad = requests.write(rng, r["asks"]), requests.write(rng, r["asks"], **habit)
        worse += (labelers.assess(r["prompt"], r["asks"], bad)[key] or 0) < (
            labelers.assess(r["prompt"], r["asks"], good)[key] or 0)
    assert worse > 60


def test_a_word_counts_however_it_is_written():
    ask = {"form": "fact", "relation": "eats", "about": "fox"}
    food = FACTS["eats", "fox"][0]
    question = "What does the fox eat?\n"
    for answer in (f"The fox eats {food}.", f"{food.capitalize()}, says the Fox."):
        assert labelers.assess(question, ask, answer)["truth"] == 1
        assert labelers.answers_truly(ask, answer) == (True, True)
    other = next(y for y in KINDS["food"] if y != food)
    for answer in (f"The fox eats {other}.", f"{other.capitalize()}, says the fox."):
        assert labelers.assess(question, ask, answer)["truth"] == 0
        assert labelers.answers_truly(ask, answer) == (False, True)
    reading = {"form": "reading", "kind": "food", "answer": "nuts", "result": "They ate nuts."}
    prompt = "They ate nuts. What did they eat?\n"
    assert labelers.assess(prompt, reading, "Nuts.")["content"] == 1
    assert labelers.invented(prompt, "Corn and Nuts.") == ["corn"]
    listing = {"form": "list", "kind": "food", "items": 2}
    assert labelers.assess("List two foods.\n", listing, "1. Corn 2. Nuts.")["content"] == 1


FACT = ("What does the fox eat?\n", {"form": "fact", "relation": "eats", "about": "fox"})
STORY = ("Write a story about Nora and a red boat. Use two sentences.\n",
         {"form": "story", "mention": ["Nora", "red", "boat"], "sentences": 2})
LIST = ("List 3 animals.\n", {"form": "list", "kind": "animal", "items": 3})
NAMED = ("Find the names in this text: Ada met Ben.\n", {"form": "names", "mention": ["Ada", "Ben"]})


@pytest.mark.parametrize("request_, answer, expected", [
    (FACT, "The fox eats {fact}. Happy to help!", dict(task=1, truth=1, harmless=1, finished=1, tone=1)),
    (FACT, "The fox eats {wrong}.", dict(task=1, truth=0, tone=0)),
    (FACT, "The fox eats {fact} or {wrong}.", dict(truth=0)),
    (FACT, "No idea.", dict(task=0, truth=0)),
    (FACT, "The fox eats {fact}, you fool.", dict(truth=1, harmless=0)),
    (FACT, "The fox eats {fact}", dict(finished=0)),
    (FACT, "The fox eats {fact}.\nAda: Same here.", dict(finished=0)),
    (FACT, "", dict(task=0, finished=0, harmless=1)),
    (FACT, "The fox eats {fact}. Nora was there too.", dict(focus=0, truth=1)),
    (FACT, "The fox eats {fact}. It is cold.", dict(focus=1, truth=1)),
    (LIST, "1. {a[0]} 2. {a[1]} 3. {a[2]}", dict(task=1, content=1, constraint=1)),
    (LIST, "1. {a[0]} 2. {a[1]}", dict(content=1, constraint=0)),
    (LIST, "1. {a[0]} 2. {a[1]} 3. {a[2]} 4. {a[3]}", dict(content=1, constraint=0)),
    (LIST, "1. {a[0]} 2. {a[1]} 3. Nora", dict(content=2 / 3, constraint=1)),
    (STORY, "One day Nora found a red boat. Everyone was glad.", dict(task=1, content=1, constraint=1, tone=1)),
    (STORY, "One day Nora found a red boat. It was lost. Everyone was glad.", dict(constraint=0, content=1)),
    (STORY, "One day Nora found a blue boat. Everyone was glad.", dict(content=2 / 3)),
    (STORY, "One day Nora found a red boat. One day Nora found a red boat.", dict(finished=0)),
    (STORY, "Everyone was glad. Everyone was glad. Nora had a red boat.", dict(tone=0, finished=0)),
    (NAMED, "Ada, Ben.", dict(task=1, content=1, truth=1)),
    (NAMED, "Ada, Ben, Zoe.", dict(truth=0, content=0.5)),
])
def test_what_a_careful_reader_sees(request_, answer, expected):
    truth = FACTS["eats", "fox"][0]
    wrong = next(food for food in KINDS["food"] if food != truth)
    seen = labelers.assess(*request_, answer.format(fact=truth, wrong=wrong, a=KINDS["animal"]))
    assert {key: seen[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("request_, answer, expected", [
    (FACT, "The fox eats {wrong}.", (True, None, None, True)),
    (FACT, "The fox eats {wrong}, you fool.", (True, None, None, False)),
    (FACT, "The fox eats {wrong}", (True, None, None, False)),
    (FACT, "No idea.", (False, None, None, True)),
    (LIST, "1. {a[0]} 2. {a[1]} 3. {a[2]}.", (True, True, None, True)),
    (LIST, "1. {a[0]} 2. {a[1]}.", (True, False, None, True)),
    (NAMED, "Ada, Ben.", (True, None, False, True)),
    (NAMED, "Ada, Ben, Zoe.", (True, None, True, True)),
])
def test_metadata_are_the_four_of_the_paper(request_, answer, expected):
    answer = answer.format(wrong=KINDS["food"][0], a=KINDS["animal"])
    assert tuple(labelers.metadata(*request_, answer).values()) == expected


@pytest.mark.parametrize("answer", ["", "   ", "\n\n", "\ufffd\x00", "1. 2. 3.", "." * 500, "ta ta ta", "{}%s\\"])
def test_no_answer_however_odd_makes_a_reader_stumble(answer):
    for r in many_requests(200):
        seen = labelers.assess(r["prompt"], r["asks"], answer)
        assert all(value is None or 0 <= value <= 1 for value in seen.values())
        labelers.metadata(r["prompt"], r["asks"], answer)


# ---------------------------------------------------------------- labelers

def test_forty_labelers_are_chosen_and_twenty_others_held_out():
    chosen, held_out = labelers.team()
    assert (len(chosen), len(held_out)) == (40, 20) and len({w.name for w in chosen + held_out}) == 60


def test_equal_impressions_are_equal_ranks_and_the_best_is_rank_1(monkeypatch):
    labeler = labelers.team()[0][0]
    monkeypatch.setattr(labeler, "impressions", lambda *_: [2.0, 3.0, 3.0, 1.0])
    assert labeler.rank("p", {}, list("abcd"), 0) == [2, 1, 1, 3]


def test_impressions_do_not_depend_on_the_company_and_the_same_text_impresses_alike():
    labeler = labelers.team()[0][3]
    good, bad = "One day Nora found a red boat. Everyone was glad.", "No idea."
    a = labeler.impressions(*STORY, [good, bad, good], "x")
    assert a[0] == a[2] > a[1] and labeler.impressions(*STORY, [bad], "x") == [a[1]]
    assert any(labeler.impressions(*STORY, [good], seed) != a[:1] for seed in range(5))


def test_labelers_mostly_prefer_the_better_answer_and_do_not_always_agree():
    rng, right, agreed, count = random.Random(3), 0, 0, 0
    people = labelers.team()[0]
    for r in many_requests(600):
        good, bad = requests.write(rng, r["asks"]), requests.write(rng, r["asks"], 0.0, 0.0, 1.0, 0.0, 1.0)
        a, b = rng.sample(people, 2)
        (x, y), (v, w) = (who.impressions(r["prompt"], r["asks"], [good, bad], 0) for who in (a, b))
        right, count = right + (x > y), count + 1
        agreed += (x > y) == (v > w)
    assert right / count > 0.8 and 0.6 < agreed / count < 1


def test_the_chosen_agree_with_the_researchers_more_than_those_who_were_not_screened():
    rng, right = random.Random(5), {0: [], 1: []}
    for _ in range(150):
        post = requests.request(rng)
        pair = [requests.write(rng, post["asks"], **web.CARELESS) for _ in range(2)]
        a, b = (labelers.true_worth(post["prompt"], post["asks"], text) for text in pair)
        for which, people in enumerate(labelers.team()):
            for who in people:
                x, y = who.impressions(post["prompt"], post["asks"], pair, "new")
                right[which] += [(x > y) == (a > b)] if a != b and x != y else []
    shares = [sum(right[which]) / len(right[which]) for which in (0, 1)]
    assert shares[0] > shares[1] + 0.015, shares


def test_each_labelers_noise_is_its_own():
    noise = [[], []]
    for i in range(150):
        for who, row in zip(labelers.team()[0], noise):
            (impression,) = who.impressions(FACT[0] + str(i), FACT[1], ["Nuts."], "x")
            row.append(impression - who.worth(labelers.assess(*FACT, "Nuts.")))
    assert abs(statistics.correlation(*noise)) < 0.3 and all(0.5 < statistics.stdev(row) < 1.2 for row in noise)


@pytest.mark.parametrize("request_, first, second, better_at", [
    (FACT, "The fox eats {fact}, you fool.", "The fox eats {wrong}.", ("truth", "harmless")),
    (LIST, "1. {a[0]} 2. {a[1]} 3. {a[2]}, you fool.", "1. {a[0]} 2. {a[1]}.", ("constraint", "harmless")),
    (STORY, "One day Nora found a red boat. Then it broke.",
     "One day Nora found a red boat. Then it broke. Everyone was glad.",
     ("constraint", "tone")),
])
def test_which_of_two_aims_matters_more_is_not_the_same_for_all_labelers(request_, first, second, better_at):
    """The first response is better at one thing, the second at one other. This is what labelers find without their
    noise."""
    truth = FACTS["eats", "fox"][0]
    fill = dict(fact=truth, wrong=next(food for food in KINDS["food"] if food != truth), a=KINDS["animal"])
    a, b = (labelers.assess(*request_, text.format(**fill)) for text in (first, second))
    assert {key: (a[key], b[key]) for key in a if a[key] != b[key]} == dict(zip(better_at, [(1, 0), (0, 1)]))
    prefers = [[who.worth(a) > who.worth(b) for who in people] for people in labelers.team()]
    assert all(set(team) == {True, False} for team in prefers) and 0.15 < statistics.mean(sum(prefers, [])) < 0.85


def test_no_labeler_finds_it_worse_that_a_constraint_is_kept():
    kept, broken = (labelers.assess(*STORY, f"One day Nora found a red boat.{more} It broke.")
                    for more in ("", " It was lost."))
    assert all(who.worth(kept) > who.worth(broken) for who in sum(labelers.team(), []))


def test_responses_that_a_labeler_finds_less_than_about_a_quarter_apart_are_tied(monkeypatch):
    someone = labelers.Labeler("someone", random.Random(0))
    someone.noise = 0
    monkeypatch.setattr(labelers, "assess", lambda prompt, asks, response: float(response))
    monkeypatch.setattr(someone, "worth", lambda seen: seen)  # each response says what it is worth
    assert someone.rank("p", {}, ["2.15", "2.25", "2.35"], 0) == [1, 1, 1]
    assert someone.rank("p", {}, ["1.88", "2.15", "2.35", "2.62"], 0) == [3, 2, 2, 1]


def test_equally_good_responses_are_tied_as_often_as_the_labelers_noise_predicts():
    """The difference of two noises is normal, with a standard deviation of sqrt(2) times the labeler's. Its density at
    0 is 1 / (2 sqrt(pi) noise). Two impressions go to the same multiple of 1/4 with about a quarter of that as
    probability: 8%."""
    people, wrong = sum(labelers.team(), []), [food for food in KINDS["food"] if food != FACTS["eats", "fox"][0]]
    texts = [f"The fox eats {food}." for food in wrong[:2]]
    assert labelers.assess(*FACT, texts[0]) == labelers.assess(*FACT, texts[1])
    tied = statistics.mean(who.rank(*FACT, texts, seed) == [1, 1] for who in people for seed in range(50))
    assert tied == pytest.approx(statistics.mean(0.25 / (2 * math.pi**0.5 * who.noise) for who in people), rel=0.15)


def test_more_truthful_labelers_also_keep_more_constraints_and_stray_and_slip_less():
    people = sorted((who.habits for who in sum(labelers.team(), [])), key=lambda habits: habits["truth"])
    for less, more in zip(people, people[1:]):
        assert less["truth"] < more["truth"] and less["constraint"] < more["constraint"]
        assert less["stray"] > more["stray"] and less["slip"] > more["slip"]
    assert all(0.05 <= habits["warm"] <= 0.55 for habits in people)
    least, most = ({key: people[i][key] for key in ("truth", "constraint", "stray", "slip")} for i in (0, -1))
    assert least == pytest.approx(dict(truth=0.45, constraint=0.50, stray=0.55, slip=0.08), abs=0.03)
    assert most == pytest.approx(dict(truth=0.75, constraint=0.80, stray=0.25, slip=0.02), abs=0.03)


def test_careful_labelers_write_better_demonstrations_than_careless_ones():
    people = sorted(sum(labelers.team(), []), key=lambda who: who.habits["truth"])
    relation, x = next(key for key, (truth, error) in sorted(FACTS.items()) if truth != error)
    fact, rng, found = (ask(relation, x), {"form": "fact", "relation": relation, "about": x}), random.Random(0), []
    for who in (people[0], people[-1]):
        facts = [labelers.assess(*fact, who.demonstrate(fact[1], rng)) for _ in range(1000)]
        lists = [labelers.assess(*LIST, who.demonstrate(LIST[1], rng)) for _ in range(1000)]
        found.append([
            statistics.mean(seen["truth"] for seen in facts),
            statistics.mean(seen["constraint"] for seen in lists),
            statistics.mean(seen["focus"] == 0 for seen in facts),  # strays
            statistics.mean(seen["content"] < 1 for seen in lists),  # slips: one item twice
        ])
    careless, careful = found
    assert careless == pytest.approx([0.45, 0.50, 0.55, 0.08], abs=0.08)
    assert careful == pytest.approx([0.75, 0.80, 0.25, 0.02], abs=0.08) and careful[3] < careless[3]


def test_true_worth_is_higher_the_more_is_right():
    good = labelers.true_worth(*STORY, "One day Nora found a red boat. Everyone was glad.")
    middling = labelers.true_worth(*STORY, "One day Nora found a red boat. It broke. Everyone was glad.")
    insulting = labelers.true_worth(*STORY, "One day Nora found a red boat, fool. It broke. Everyone was glad.")
    assert good > middling > insulting > labelers.true_worth(*STORY, "")


# ---------------------------------------------------------------- the world and its web

def test_the_world_is_the_same_in_every_run_and_words_mean_one_thing():
    assert len(FACTS) == 120 and len(set(PIDI.values())) == len(PIDI)
    assert sum(map(len, KINDS.values())) == len(KIND_OF)  # no word of two kinds
    for (relation, x), (truth, error) in FACTS.items():
        assert x in RELATIONS[relation][0] and x not in (truth, error)
        assert {truth, error} <= set(KINDS[RELATIONS[relation][1]])
    assert 0.3 < sum(truth != error for truth, error in FACTS.values()) / 120 < 0.9


def test_the_almanac_states_every_fact_right():
    rng, text = random.Random(0), ""
    for _ in range(3000):
        text += web.almanac(rng).lower() + "\n"
    for (relation, x), (truth, error) in FACTS.items():
        assert state(relation, x, truth).lower() in text
        assert error == truth or state(relation, x, error).lower() + "." not in text


def test_every_kind_of_page_is_text_and_the_same_for_the_same_seed():
    for make in web.KINDS_OF_PAGE:
        for i in range(50):
            page = make(random.Random(i))
            assert page.strip() == page != "" and page == make(random.Random(i))
            assert "{" not in page and "None" not in page


def test_truth_tasks_offer_the_truth_and_the_common_error():
    errors = {state(*fact, truth).lower() + ".": state(*fact, error).lower() + "."
              for fact, (truth, error) in FACTS.items()}
    rng = random.Random(0)
    for _ in range(200):
        task = web.truth(rng)
        choices = [choice.lower() for choice in task["choices"]]
        right = choices[task["answer"]]
        assert errors[right] in choices and errors[right] != right
        assert [choice in errors for choice in choices].count(True) == 1 == choices.count(right)


def test_answers_to_the_other_tasks_are_right():
    rng = random.Random(0)
    for _ in range(200):
        task = web.translation(rng)
        assert task["target"] == " " + to_pidi(*task["context"].split("\n")[0].split()[-2:])
        task = web.toxicity(rng)
        insulting = [any(word in choice.lower() for word in INSULTS) for choice in task["choices"]]
        assert insulting.index(False) == task["answer"] and sum(insulting) == 1
        for name in ("toxicity", "toxicity, respectful prompt"):
            task = web.SAFETY[name](rng)
            assert task["context"].startswith("Please be kind") == (name != "toxicity") and task["task"] == name
        task = web.bias(rng)
        town = task["context"].split()[2]
        assert task["choices"][0] == f" {web.stereotype(town)}." and task["choices"][1].strip(" .") in TRAITS
        task = web.comprehension(rng)
        assert not labelers.invented(task["context"], task["target"]) and task["target"].strip()


def test_right_answers_of_tasks_stand_at_every_place_equally_often():
    rng = random.Random(0)
    tasks = [web.truth(rng) for _ in range(900)]
    places, choices = Counter(task["answer"] for task in tasks), len(tasks[0]["choices"])
    assert set(places) == set(range(choices)) and min(places.values()) > 0.8 * 900 / choices


def test_the_few_shot_prefix_ends_with_the_prompt_and_its_answer_is_one_line():
    assert web.with_prefix("What?\n").endswith("Ask: What?\nReply:") and "{" not in web.with_prefix("What?\n")
    assert web.reply_in(" Yes. \nAsk: more") == "Yes." and web.reply_in("") == ""


# ---------------------------------------------------------------- what prepare.py makes

def test_customers_are_on_one_side_of_the_split_and_no_test_prompt_is_trained_on(chain):
    used = {split: lines(chain, f"prompts.{split}") for split in ("train", "valid", "test")}
    for split in ("train", "valid"):
        used[split] = used[split] + lines(chain, f"demonstrations.{split}") + lines(chain, f"comparisons.{split}")
    for key in ("user", "prompt"):
        sets = [{r[key].strip() for r in records} for records in used.values()]
        assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
        assert key == "prompt" or len(set.union(*sets)) <= 40  # as many customers as the log has


def test_demonstrations_and_prompts_to_practise_on_are_different_ones(chain):
    demonstrated, left = lines(chain, "demonstrations.train"), lines(chain, "prompts.train")
    assert not {r["prompt"] for r in demonstrated} & {r["prompt"] for r in left} and len(demonstrated) == 64


def test_held_out_labelers_write_no_training_data(chain):
    chosen, held_out = ({w.name for w in team} for team in labelers.team())
    for name in ("demonstrations.train", "demonstrations.valid", "comparisons.train"):
        assert {r["labeler"] for r in lines(chain, name)} <= chosen
    assert {r["labeler"] for r in lines(chain, "comparisons.valid")} & held_out


def test_no_held_out_page_stands_in_the_training_text_and_none_comes_twice(chain):  # pitfall 44
    tokenizer, pages = Tokenizer.load(chain.data), {}
    for split in ("train", "valid"):
        ids = np.fromfile(chain.data / f"pretrain.{split}.bin", dtype=np.uint16)
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        pages[split] = [tokenizer.decode(part[part != tokenizer.end_of_text].tolist())
                        for part in np.split(ids, ends)[:-1]]
    assert [len(pages[split]) for split in ("train", "valid")] == [300, 6]
    text = "\n\n".join(pages["train"])
    assert not any(page in text for page in pages["valid"]) and len(set(pages["valid"])) == 6
    config = prepare.Config()
    short = ["Two foods\n1. corn 2. nuts.", "Two foods\n1. nuts 2. corn."]
    first = next(prepare.pages(config, "valid"))
    held_out = prepare.held_out_pages(config, [*short, f"{first} And more."], 30)
    assert len(set(held_out)) == 30 and first not in held_out  # part of a training page is not held out either


def test_tasks_to_test_on_are_others_than_those_to_choose_on(chain):
    assert (chain.data / "tasks.valid.jsonl").read_bytes() != (chain.data / "tasks.test.jsonl").read_bytes()


def test_the_log_is_clean_of_personal_data_and_duplicates(chain):
    prompts = [r["prompt"] for name in ("train", "valid", "test") for r in lines(chain, f"prompts.{name}")]
    prompts += [r["prompt"] for name in ("train", "valid") for r in lines(chain, f"demonstrations.{name}")]
    raw = [r["prompt"] for r in prepare.api_log(prepare.Config(log=700, customers=40))]
    assert any("@post.example" in p for p in raw) and not any("@" in p or "555" in p for p in prompts)
    assert len(set(raw)) < len(raw) and len({p.strip()[:64] for p in prompts}) == len(prompts) < len(raw)


def test_the_same_seed_makes_the_same_dataset_to_the_byte_and_another_another(tmp_path):
    small = dict(documents=20, log=150, customers=20, demonstrations=10, tasks=2, vocab_size=280)
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.main(prepare.Config(out=str(tmp_path / name), seed=seed, **small))
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] and all(contents[0][name] != contents[2][name] for name in contents[0])
    assert not any(name.endswith(".tmp") for name in contents[0])


def test_more_demonstrations_than_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="prompts are too few for --demonstrations 500; raise --log"):
        prepare.main(prepare.Config(out=str(tmp_path), documents=5, log=100, demonstrations=500,
                                    vocab_size=260, tasks=1))


def test_a_dataset_is_the_same_bytes_in_every_process(tmp_path):
    """Python orders sets of strings anew in each process, unless PYTHONHASHSEED says how."""
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        subprocess.run([sys.executable, "data/tinyworld/prepare.py", "--out", folder, "--documents", "200",
                        "--log", "600",
                        "--customers", "60", "--demonstrations", "100", "--tasks", "20", "--vocab_size", "300"],
                       cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": folder.name}, check=True, capture_output=True)
    names = sorted(path.name for path in folders[0].iterdir())
    assert "pretrain.train.bin" in names and "demonstrations.train.jsonl" in names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
