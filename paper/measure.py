"""Measure one model for the paper's figures: everything that section 4 and appendix E ask of it, one number an item, as JSON.

    python paper/measure.py --model out/sft/model.pt --out measured.json
    python paper/measure.py --model out/ppo/model.pt --out m.json --baseline measured.json --reward out/reward/model.pt --reference out/sft/model.pt

In the built-in world only. Lists over the same prompts, questions or tasks stand in the same order in every file, so models
can be compared item by item. The names of a file's lists are the keys of the dict that `measure` returns.
"""

import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

import torch

import common
import evaluate
from common import Machine, Ranks, UserError
from data import readers
from data.tinyworld import labelers, web
from data.tinyworld.world import FACTS, ask
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate


@dataclass(frozen=True)
class Config:
    model: str = "out/ppo/model.pt"  # what is measured
    out: str = "measured.json"  # where the numbers go
    data: str = "data/tinyworld"  # the dataset's folder
    baseline: str = ""  # the file of the model that it is compared with; without one, no preference is measured
    reward: str = ""  # the reward model whose scores are wanted
    reference: str = ""  # the SFT model from which the KL distance is wanted
    few_shot: bool = False  # the model is prompted with a help page's examples (GPT prompted)
    best_of: int = 0  # measure only what is preferred when the reward model chooses among 1, 2, 4, ... so many samples
    prompts: int = 1000  # test prompts
    questions: int = 4  # answers to each question that is commonly got wrong
    threads: int = 400  # forum threads whose next reply may be an insult, of each kind
    seed: int = 0  # of the samples and of who judges
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        if min(self.prompts, self.questions, self.threads) < 1 or self.best_of < 0:
            raise ValueError("every number of prompts, questions and threads is at least 1, --best_of at least 0")
        if self.best_of and not (self.reward and self.baseline):
            raise ValueError("--best_of takes --reward and --baseline")


def sample(model, prompts, most, purpose, tokenizer, config, ranks):
    """One response at temperature 1 to each text -> (prompt ids, response ids) pairs. Two models' samples are independent."""
    pairs, encoded = [], [tokenizer.encode(text) for text in prompts]
    who = "/".join([*Path(config.model).parts[-3:], "few-shot" * config.few_shot])
    for first in range(0, len(prompts), 256):
        chosen = encoded[first : first + 256]
        uniforms = torch.rand(len(chosen), most, generator=common.generator(config.seed, f"{purpose} of {who}", first))
        with ranks.autocast():
            pairs += zip(chosen, generate(model, chosen, most, uniforms))
    return pairs


def say(model, prompts, most, purpose, tokenizer, config, ranks):
    """The same as texts."""
    return [tokenizer.decode(said) for _, said in sample(model, prompts, most, purpose, tokenizer, config, ranks)]


def respond(model, prompts, purpose, tokenizer, config, ranks):
    """-> the (prompt ids, response ids) pairs, and the texts as a customer would see them: of a prompted model, the reply in
    what the help page goes on with."""
    asked = [web.with_prefix(prompt) for prompt in prompts] if config.few_shot else prompts
    pairs = sample(model, asked, 48, purpose, tokenizer, config, ranks)
    said = [tokenizer.decode(response) for _, response in pairs]
    return pairs, [web.reply_in(text) for text in said] if config.few_shot else said


def preferences(records, responses, baseline, config):
    """{judge: how much of a win over the baseline's response, one a prompt}: 3 labelers of each team, and the true average
    preference."""
    if len(baseline) != len(records):
        raise UserError(f"{config.baseline} has responses to {len(baseline)} prompts, not to {len(records)}")
    result = {f"preferred by {team}": evaluate.win_rates(records, responses, baseline, people, 3, config.seed)
              for team, people in zip(evaluate.TEAMS, labelers.team())}
    worth = lambda r, text: round(labelers.true_worth(r["prompt"], r["asks"], text), 6)  # equal sums may differ by rounding
    pairs = [(worth(r, a), worth(r, b)) for r, a, b in zip(records, responses, baseline)]
    return result | {"truly preferred": [0.5 if a == b else float(a > b) for a, b in pairs]}


def rated(records, responses, config):
    """The mean of 3 held-out labelers' ratings from 1 to 7, one a prompt (section 3.5)."""
    result = []
    for r, text in zip(records, responses):
        people = random.Random(f"{config.seed}/ratings/{r['prompt']}").sample(labelers.team()[1], 3)
        result.append(sum(who.ratings(r["prompt"], r["asks"], [text], "ratings")[0] for who in people) / len(people))
    return result


@torch.no_grad()
def kl_distance(model, reference, pairs, end, ranks):
    """log model(y | x) - log reference(y | x) of each (prompt ids, response ids), in nats, over the tokens that were sampled:
    over samples of the model its mean is the KL."""
    differences = []
    for first in range(0, len(pairs), 128):
        tokens, where = readers.batch_of(pairs[first : first + 128], end, ranks.device)
        with ranks.autocast():
            ratio = model(tokens, where) - reference(tokens, where)  # (N,)
        differences += [part.sum().item() for part in ratio.split(where.sum(1).tolist())]
    return differences


def truth(model, tokenizer, config, ranks):
    """Figure 5b: of the questions that people commonly get wrong, but the one that the few-shot prefix answers, in what share
    of `config.questions` answers is nothing false, and in what share the truth."""
    facts = [key for key, (true, error) in sorted(FACTS.items()) if true != error and key != ("eats", "crow")]
    asked = [key for key in facts for _ in range(config.questions)]
    _, said = respond(model, [f"{ask(*key)}\n" for key in asked], "truth", tokenizer, config, ranks)
    judged = [labelers.answers_truly({"relation": relation, "about": x}, text) for (relation, x), text in zip(asked, said)]
    return {"truthful": by_group(asked, [float(true) for true, _ in judged]),
            "truthful and informative": by_group(asked, [float(true and answers) for true, answers in judged])}


def by_group(groups, numbers):
    """The mean of each group's numbers, in the order in which groups first come: items that are alike count as one."""
    members = {}
    for group, x in zip(groups, numbers):
        members.setdefault(group, []).append(x)
    return [sum(row) / len(row) for row in members.values()]


def toxicity(model, tokenizer, config, ranks):
    """Figure 5c: how often the next reply in a forum insults, by the rule that stands at its head."""
    rng, result = random.Random(f"{config.seed}/threads"), {}
    posts = [web.requests.request(rng)["prompt"] for _ in range(config.threads)]
    for name, rule in web.RULES.items():
        said = say(model, [f"{rule}{post}-" for post in posts], 24, "toxicity", tokenizer, config, ranks)
        result[f"toxic, {name}"] = [float(labelers.toxic(text.split("\n")[0])) for text in said]
    return result


def abilities(model, tokenizer, config, ranks):
    """The zero-shot tasks, each once, and the next word of a thousand pages; and of each town the bias pairs: how likely the
    stereotype is beside another trait, from 0 to 1, and how often it is the likelier."""
    tasks = evaluate.distinct(readers.read_jsonl(f"{config.data}/tasks.test.jsonl", "tasks"))
    text = readers.PretrainingText(f"{config.data}/pretrain.valid.bin", tokenizer, model.config.context)
    pairs = [task for task in tasks if task["task"] == "bias"]
    with ranks.autocast():
        right = evaluate.answer_tasks(model, tasks, tokenizer, ranks.device)
        rows = range(min(len(text), 1000))
        pages = by_group(text.documents, evaluate.next_words(model, text.pairs(rows), tokenizer, ranks.device))
        stereotype = torch.tensor(evaluate.choice_logprobs(model, pairs, tokenizer, ranks.device)).softmax(1)[:, 0]
    result = {f"task: {kind}": [x for x, task in zip(right, tasks) if task["task"] == kind] for kind in web.ABILITIES}
    towns = [task["context"] for task in pairs]
    return result | {f"task: {evaluate.NEXT_WORD}": pages, "stereotype": by_group(towns, stereotype.tolist()),
                     "stereotype preferred": by_group(towns, [x for x, task in zip(right, tasks) if task["task"] == "bias"]),
                     "bias entropy": by_group(towns, [entropy(p) for p in stereotype.tolist()])}


def measure(model, reward, reference, baseline, tokenizer, config, ranks):
    """-> {name: numbers, one an item}, and the responses to the test prompts."""
    records = readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "requests")[: config.prompts]
    valid = readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", "requests")[:300]
    purpose = "responses" if baseline else "baseline"  # which is another sample of the same model
    pairs, responses = respond(model, [r["prompt"] for r in records], purpose, tokenizer, config, ranks)
    seen = [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, responses)]
    numbers = {f"metadata: {name}": [None if m[name] is None else float(m[name]) for m in seen] for name in seen[0]}
    numbers["rating"] = rated(records, responses, config)
    if baseline:
        numbers |= preferences(records, responses, baseline, config)
    if reward:
        with ranks.autocast():
            numbers["score"] = evaluate.score(reward, records, responses, tokenizer, ranks.device)
            _, said = respond(model, [r["prompt"] for r in valid], "validation", tokenizer, config, ranks)
            numbers["score, validation prompts"] = evaluate.score(reward, valid, said, tokenizer, ranks.device)
    if reference and not config.few_shot:
        numbers["kl"] = kl_distance(model, reference, pairs, tokenizer.end_of_text, ranks)
    numbers |= truth(model, tokenizer, config, ranks)
    if not config.few_shot:
        numbers |= toxicity(model, tokenizer, config, ranks) | abilities(model, tokenizer, config, ranks)
    return numbers, responses


def entropy(p):
    """Of a choice between two, the one with probability p, in bits."""
    return -sum(x * math.log2(x) for x in (p, 1 - p) if x > 0)


def best_of(model, reward, baseline, tokenizer, config, ranks):
    """-> {"best of n, ...": numbers, one a prompt} for n = 1, 2, 4, ...: the reward model chooses among the first n samples."""
    records, numbers = readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "requests")[: config.prompts], {}
    samples, scores = [], []  # [k][prompt]
    for k in common.bar(ranks, config.best_of, 0, config.out):
        samples.append(say(model, [r["prompt"] for r in records], 48, f"best of {k}", tokenizer, config, ranks))
        with ranks.autocast():
            scores.append(evaluate.score(reward, records, samples[-1], tokenizer, ranks.device))
    n = 1
    while n <= config.best_of:
        best = [max(range(n), key=lambda k: scores[k][i]) for i in range(len(records))]
        chosen = [samples[k][i] for i, k in enumerate(best)]
        numbers |= {f"best of {n}: {name}": x for name, x in preferences(records, chosen, baseline, config).items()}
        numbers[f"best of {n}: score"] = [scores[k][i] for i, k in enumerate(best)]
        n *= 2
    return numbers, []


def read(path):
    """A file that `main` wrote."""
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        if measured["numbers"] and isinstance(measured["responses"], list):
            return measured
        raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `make paper` makes it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of paper/measure.py; delete it and make it again") from None


def main(config):
    ranks = Ranks(Machine(device=config.device))
    tokenizer = Tokenizer.load(config.data)
    load = lambda kind, path: common.load_model(kind, path, "make paper", tokenizer).to(ranks.device).eval() if path else None
    model, reward, reference = load(GPT, config.model), load(ScalarModel, config.reward), load(GPT, config.reference)
    baseline = read(config.baseline)["responses"][: config.prompts] if config.baseline else None
    if config.best_of:
        numbers, responses = best_of(model, reward, baseline, tokenizer, config, ranks)
    else:
        numbers, responses = measure(model, reward, reference, baseline, tokenizer, config, ranks)
    measured = {"config": asdict(config), "parameters": sum(p.numel() for p in model.parameters()), "numbers": numbers,
                "responses": responses}
    common.write_atomically(Path(config.out), lambda path: path.write_text(json.dumps(measured), encoding="utf-8"))
    print(f"{config.out}: {config.model}")


if __name__ == "__main__":
    common.launch(main, Config)
