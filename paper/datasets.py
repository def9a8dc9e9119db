"""Datasets that only the paper's experiments need, each a folder for sft.py or reward.py.

    python paper/datasets.py --kind flan --out out/paper/flan       # instructions of public tasks, as FLAN words them
    python paper/datasets.py --kind t0 --out out/paper/t0           # as T0 does
    python paper/datasets.py --kind fold --fold 0 --out out/paper/fold0     # comparisons without 1/5 of the labelers

FLAN (Wei et al. 2021) and T0 (Sanh et al. 2021) turn public NLP datasets into instructions. These mixes do the same
with such tasks of the built-in world, in other words than customers use. FLAN's are templates with options and short
answers: classification, reading, translation, completion. T0's are questions that are worded in many ways: facts,
reading, summaries, paraphrases and labels. Neither has open-ended requests, which are most of what customers send
(Table 1).
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from common.config import UserError, launch
from data import readers
from data.tinyworld import requests, web
from data.tinyworld.world import COLOURS, FACTS, NAMES, OBJECTS, TOWNS, ask, capital, state, to_pidi


@dataclass(frozen=True)
class Config:
    kind: str = "flan"  # flan, t0 or fold
    out: str = "out/paper/flan"  # the folder to fill
    data: str = "data/tinyworld"  # the default run's dataset
    examples: int = 4_000  # training examples of a mix of tasks
    fold: int = 0  # the group of labelers to leave out
    folds: int = 5  # number of groups
    seed: int = 0  # of the examples, of the groups

    def __post_init__(self):
        if self.kind not in ("flan", "t0", "fold"):
            raise ValueError("--kind is flan, t0 or fold")
        if not 0 <= self.fold < self.folds or self.folds < 2 or self.examples < 10:
            raise ValueError("--fold is from 0 to under --folds, --folds at least 2, --examples at least 10")


# ---------------------------------------------------------------- mixes of public tasks: rng -> (prompt, response)

def flan_sentiment(rng):
    text, good = requests.review(rng)
    return rng.choice(["{}\nWhat is the sentiment of this review?\nOPTIONS: good, bad",
                       "Review: {}\nRating?\nOPTIONS: good, bad",
                       "{}\nChoose your answer: good, bad"]).format(text), "good" if good else "bad"


def flan_reading(rng):
    text, p = requests.passage(rng)
    question, kind, _ = requests.reading_question(rng, p)
    return rng.choice(["{}\nAnswer a question about this article: {}", "{}\nQuestion: {} Answer in one word.",
                       "Article: {}\n{}"]).format(text, question.format(**p)), p[kind]


def flan_translation(rng):
    c, o = rng.choice(COLOURS), rng.choice(OBJECTS)
    return rng.choice(["the {} {}\nTranslate this to Pidi.", "English: the {} {}\nPidi?"]).format(c, o), to_pidi(c, o)


def flan_completion(rng):
    task = web.completion(rng)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("abcd", task["choices"]))
    return f"{task['context']}How does it go on?\nOPTIONS: {options}", task["choices"][task["answer"]]


def t0_question(rng):
    (relation, x), (truth, _) = rng.choice(sorted(FACTS.items()))
    question = rng.choice(["Please answer: {}", "I was given this question: {} What should I say?",
                           "Question of the day: {}"])
    return question.format(ask(relation, x)), capital(state(relation, x, truth)) + "."


def t0_reading(rng):
    text, p = requests.passage(rng)
    question, _, answer = requests.reading_question(rng, p)
    return rng.choice(["Read this and answer. {} {}", "{} Given this paragraph: {}", "Use the text. {} {}"]).format(
        text, question.format(**p)), answer.format(**p)


def t0_summary(rng):
    text, p = requests.passage(rng)
    return rng.choice(["Condense this: {}", "{} What is the gist?", "How would you put it in short? {}"]).format(
        text), requests.summary_of(p)


def t0_paraphrase(rng):
    n, c, o, t = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS), rng.choice(TOWNS)
    if rng.random() < 0.5:
        text, result = requests.polite_pair(n, c, o)
        return f"Word this with more courtesy: {text}", result
    text, result = requests.past_pair(rng, n, c, o, t)
    return f"Tell this as if it had happened long ago: {text}", result


def t0_sentiment(rng):
    text, good = requests.review(rng)
    return rng.choice(["How does the writer feel about it? {}", "{} Would you say that this is praise?"]).format(
        text), f"The review is {'good' if good else 'bad'}."


MIXES = {"flan": [flan_sentiment, flan_reading, flan_translation, flan_completion],
         "t0": [t0_question, t0_reading, t0_summary, t0_paraphrase, t0_sentiment]}


def tasks(config):
    """{split: demonstrations}, the same number of each task."""
    splits = {}
    for split, count in (("train", config.examples), ("valid", config.examples // 10)):
        rng, makers, records = random.Random(f"{config.seed}/{config.kind}/{split}"), MIXES[config.kind], []
        for i in range(count):
            maker = makers[i % len(makers)]
            prompt, response = maker(rng)
            records.append({"prompt": prompt + "\n", "response": response, "task": maker.__name__})
        splits[f"demonstrations.{split}.jsonl"] = records
    return splits


# ---------------------------------------------------------------- groups of labelers (appendix E)

def folds(config):
    """The comparisons split for cross-validation over labelers. One group of labelers is left out of the training set,
    and of the other groups' comparisons one in `folds`, other ones in each fold. Both are for validation: no prompt of
    either is trained on."""
    path = f"{config.data}/comparisons.train.jsonl"
    records = readers.read_jsonl(path, "comparisons", "make comparisons")
    people = sorted({record["labeler"] for record in records})
    if len(people) < config.folds:
        raise UserError(f"{path}: {len(people)} labelers are too few for --folds {config.folds}")
    random.Random(f"{config.seed}/groups").shuffle(people)
    left_out = set(people[config.fold :: config.folds])
    rng = random.Random(f"{config.seed}/validation")
    train, valid = [], []
    for record in records:
        held_out = rng.randrange(config.folds) == config.fold
        (valid if held_out or record["labeler"] in left_out else train).append(record)
    return {"comparisons.train.jsonl": train, "comparisons.valid.jsonl": valid}


def main(config):
    out = Path(config.out)
    if out.resolve() == Path(config.data).resolve():
        raise UserError(f"--out {config.out} is the dataset that is read")
    if not Path(f"{config.data}/tokenizer.json").is_file():
        raise UserError(f"{config.data}/tokenizer.json is missing; `make data` makes it")
    for name, records in (folds(config) if config.kind == "fold" else tasks(config)).items():
        readers.write_jsonl(out / name, records)
        print(f"{out / name}: {len(records):,} records")
    copied = ["demonstrations.train.jsonl"] if config.kind == "fold" else []
    for name in (*copied, "tokenizer.json"):  # the tokenizer last: it is the file that make looks for
        shutil.copyfile(f"{config.data}/{name}", out / f"{name}.tmp")
        os.replace(out / f"{name}.tmp", out / name)


if __name__ == "__main__":
    launch(main, Config)
