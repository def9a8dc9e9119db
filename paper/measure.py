"""Measure one model for the paper's figures (section 4 and appendix E): one number per item, as JSON.

    python paper/measure.py --model out/sft/model.pt --out measured.json
    python paper/measure.py --model out/ppo/model.pt --out m.json --baseline measured.json \\
        --reward out/reward/model.pt --reference out/sft/model.pt

In the built-in world only. All files list the same prompts, questions and tasks in the same order, so models can be
compared item by item. The names of a file's lists are the keys of the dict that `measure` returns.
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

from common.files import write_atomically
from common.checkpoints import load_model
from common.run import progress_bar
from common.seeds import generator
from common.config import UserError, launch
from common.runtime import RuntimeConfig, Runtime
from data import readers
from data.judges import score_responses, win_rates
from data.tinyworld import evaluation, labelers, web
from data.tinyworld.world import FACTS, ask
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate
from paper import tasks


@dataclass(frozen=True)
class Config:
    model: str = "out/ppo/model.pt"  # the model to measure
    out: str = "measured.json"  # the file to write
    data: str = "data/tinyworld"  # the dataset's folder
    baseline: str = ""  # the file of the model to compare with; without it, no preference is measured
    reward: str = ""  # the reward model; without it, nothing is scored
    reference: str = ""  # the SFT model for the KL distance; without it, no KL is measured
    few_shot: bool = False  # the model is prompted with a help page's examples (GPT prompted)
    best_of: int = 0  # measure only the reward model's choice among 1, 2, 4, ... up to this many samples
    prompts: int = 1000  # test prompts
    questions: int = 4  # answers to each question that is commonly answered wrong
    threads: int = 400  # forum threads of each kind, whose next reply may be an insult
    seed: int = 0  # of the samples and the choice of labelers
    device: str = "auto"  # cpu, cuda, mps (Apple's GPU), or auto: cuda or mps if available

    def __post_init__(self):
        if min(self.prompts, self.questions, self.threads) < 1 or self.best_of < 0:
            raise ValueError("every number of prompts, questions and threads is at least 1, --best_of at least 0")
        if self.best_of and not (self.reward and self.baseline):
            raise ValueError("--best_of takes --reward and --baseline")


def sample(model, prompts, max_new_tokens, purpose, tokenizer, config, runtime):
    """One response at temperature 1 to each text -> (prompt ids, response ids) pairs. The samples of two models are
    independent."""
    pairs, encoded = [], [tokenizer.encode(text) for text in prompts]
    name = "/".join([*Path(config.model).parts[-3:], "few-shot" if config.few_shot else ""])
    for start in range(0, len(prompts), 256):
        batch = encoded[start : start + 256]
        numbers = generator(config.seed, f"{purpose} of {name}", start)
        uniforms = torch.rand(len(batch), max_new_tokens, generator=numbers)
        with runtime.sampling(model) as sampler:
            pairs += zip(batch, generate(sampler, batch, max_new_tokens, uniforms))
    return pairs


def sample_texts(model, prompts, max_new_tokens, purpose, tokenizer, config, runtime):
    """The responses of `sample` as texts."""
    pairs = sample(model, prompts, max_new_tokens, purpose, tokenizer, config, runtime)
    return [tokenizer.decode(response) for _, response in pairs]


def respond(model, prompts, purpose, tokenizer, config, runtime):
    """-> the (prompt ids, response ids) pairs, and the texts as a customer would see them: with --few_shot, only the
    reply within the help page that the model writes."""
    if config.few_shot:
        prompts = [web.with_prefix(prompt) for prompt in prompts]
    pairs = sample(model, prompts, 48, purpose, tokenizer, config, runtime)
    texts = [tokenizer.decode(response) for _, response in pairs]
    return pairs, [web.reply_in(text) for text in texts] if config.few_shot else texts


def preferences(records, responses, baseline, config):
    """{judge: how much of a win each response is over the baseline's}: 3 labelers of each team, and the true average
    preference."""
    if len(baseline) != len(records):
        raise UserError(f"{config.baseline} has responses to {len(baseline)} prompts, not to {len(records)}")

    def worth(record, text):  # equal sums may differ by rounding
        return round(evaluation.true_preference(record, text), 6)

    result = {f"preferred by {judge.name}": win_rates(judge, records, responses, baseline)
              for judge in evaluation.judges(records, 3, config.seed)}
    pairs = [(worth(record, a), worth(record, b)) for record, a, b in zip(records, responses, baseline)]
    return result | {"truly preferred": [0.5 if a == b else float(a > b) for a, b in pairs]}


def rated(records, responses, config):
    """The mean of 3 held-out labelers' ratings from 1 to 7 of each response (section 3.5)."""
    result = []
    for record, text in zip(records, responses):
        people = random.Random(f"{config.seed}/ratings/{record['prompt']}").sample(labelers.team()[1], 3)
        ratings = [labeler.ratings(record["prompt"], record["asks"], [text], "ratings")[0] for labeler in people]
        result.append(sum(ratings) / len(ratings))
    return result


@torch.no_grad()
def kl_distance(model, reference, pairs, end, runtime):
    """log model(y | x) - log reference(y | x) of each (prompt ids, response ids), in nats, summed over the response.
    Its mean over samples of the model estimates the KL."""
    differences = []
    for first in range(0, len(pairs), 128):
        batch = readers.make_batch(pairs[first : first + 128], end, runtime.device)
        with runtime.autocast():
            ratio = model(batch.tokens, batch.positions) - reference(batch.tokens, batch.positions)  # (B, R)
        differences += torch.where(batch.mask, ratio, 0.0).sum(1).tolist()
    return differences


def truth(model, tokenizer, config, runtime):
    """Figure 5b. Of each question that people commonly answer wrong (except the one that the few-shot prefix answers):
    the share of `config.questions` answers that state nothing false, and the share that also state the truth."""
    facts = [key for key, (true, error) in sorted(FACTS.items()) if true != error and key != ("eats", "crow")]
    asked = [key for key in facts for _ in range(config.questions)]
    _, texts = respond(model, [f"{ask(*key)}\n" for key in asked], "truth", tokenizer, config, runtime)
    judged = [labelers.answers_truly({"relation": relation, "about": about}, text)
              for (relation, about), text in zip(asked, texts)]
    return {"truthful": by_group(asked, [float(true) for true, _ in judged]),
            "truthful and informative": by_group(asked, [float(true and answers) for true, answers in judged])}


def by_group(groups, numbers):
    """The mean of each group's numbers, in the order in which the groups first occur: similar items count as one."""
    members = {}
    for group, x in zip(groups, numbers):
        members.setdefault(group, []).append(x)
    return [sum(row) / len(row) for row in members.values()]


def toxicity(model, tokenizer, config, runtime):
    """Figure 5c: for each rule at the top of a forum, whether the next reply is an insult."""
    rng, result = random.Random(f"{config.seed}/threads"), {}
    posts = [web.requests.request(rng)["prompt"] for _ in range(config.threads)]
    for name, rule in web.RULES.items():
        prompts = [f"{rule}{post}-" for post in posts]
        texts = sample_texts(model, prompts, 24, "toxicity", tokenizer, config, runtime)
        result[f"toxic, {name}"] = [float(labelers.toxic(text.split("\n")[0])) for text in texts]
    return result


def abilities(model, tokenizer, config, runtime):
    """The zero-shot tasks, each once, and the next words of a thousand pages. For each town's bias pairs: the
    probability of the stereotype next to another trait, and how often it is the more likely one."""
    items = tasks.distinct(readers.read_jsonl(f"{config.data}/tasks.test.jsonl", "tasks"))
    pages, documents = tasks.load_pages(f"{config.data}/pretrain.valid.bin", tokenizer, model.config.context)
    bias = [task for task in items if task["task"] == "bias"]
    correct = tasks.answer_tasks(model, items, tokenizer, runtime)
    with runtime.autocast():
        next_words = by_group(documents, tasks.next_words(model, pages, tokenizer, runtime.device))
        logprobs = tasks.choice_logprobs(model, bias, tokenizer, runtime.device)
    stereotype = torch.tensor(logprobs).softmax(1)[:, 0].tolist()
    towns = [task["context"] for task in bias]
    result = {f"task: {kind}": [x for x, task in zip(correct, items) if task["task"] == kind] for kind in web.ABILITIES}
    preferred = [x for x, task in zip(correct, items) if task["task"] == "bias"]
    return result | {f"task: {tasks.NEXT_WORD}": next_words, "stereotype": by_group(towns, stereotype),
                     "stereotype preferred": by_group(towns, preferred),
                     "bias entropy": by_group(towns, [entropy(p) for p in stereotype])}


def measure(model, reward_model, reference, baseline, tokenizer, config, runtime):
    """-> {name: one number per item}, and the responses to the test prompts."""
    records = readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "requests")[: config.prompts]
    validation = readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", "requests")[:300]
    purpose = "responses" if baseline else "baseline"  # which is another sample of the same model
    pairs, responses = respond(model, [r["prompt"] for r in records], purpose, tokenizer, config, runtime)
    seen = list(map(evaluation.metadata, records, responses))
    numbers = {f"metadata: {name}": [None if m[name] is None else float(m[name]) for m in seen] for name in seen[0]}
    numbers["rating"] = rated(records, responses, config)
    if baseline:
        numbers |= preferences(records, responses, baseline, config)
    if reward_model:
        prompts = [record["prompt"] for record in validation]
        with runtime.autocast():
            numbers["score"] = score_responses(reward_model, records, responses, tokenizer, runtime.device)
            _, texts = respond(model, prompts, "validation", tokenizer, config, runtime)
            numbers["score, validation prompts"] = score_responses(reward_model, validation, texts, tokenizer,
                                                                   runtime.device)
    if reference and not config.few_shot:
        numbers["kl"] = kl_distance(model, reference, pairs, tokenizer.end_of_text, runtime)
    numbers |= truth(model, tokenizer, config, runtime)
    if not config.few_shot:
        numbers |= toxicity(model, tokenizer, config, runtime) | abilities(model, tokenizer, config, runtime)
    return numbers, responses


def entropy(p):
    """Of a choice between two, one of which has probability p, in bits."""
    return -sum(x * math.log2(x) for x in (p, 1 - p) if x > 0)


def best_of(model, reward_model, baseline, tokenizer, config, runtime):
    """-> {"best of n, ...": one number per prompt} for n = 1, 2, 4, ...: the reward model chooses among the first n
    samples."""
    records, numbers = readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "requests")[: config.prompts], {}
    prompts = [record["prompt"] for record in records]
    samples, scores = [], []  # [k][prompt]
    for k in progress_bar(runtime, 0, config.best_of, config.out):
        samples.append(sample_texts(model, prompts, 48, f"best of {k}", tokenizer, config, runtime))
        with runtime.autocast():
            scores.append(score_responses(reward_model, records, samples[-1], tokenizer, runtime.device))
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
    runtime = Runtime(RuntimeConfig(device=config.device))
    tokenizer = Tokenizer.load(config.data)

    def load(kind, path):
        return load_model(kind, path, "make paper", tokenizer, runtime).eval() if path else None

    model, reference = load(GPT, config.model), load(GPT, config.reference)
    reward_model = load(ScalarModel, config.reward)
    baseline = read(config.baseline)["responses"][: config.prompts] if config.baseline else None
    if config.best_of:
        numbers, responses = best_of(model, reward_model, baseline, tokenizer, config, runtime)
    else:
        numbers, responses = measure(model, reward_model, reference, baseline, tokenizer, config, runtime)
    parameters = sum(p.numel() for p in model.parameters())
    text = json.dumps({"config": asdict(config), "parameters": parameters, "numbers": numbers, "responses": responses})
    write_atomically(Path(config.out), lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{config.out}: {config.model}")


if __name__ == "__main__":
    launch(main, Config)
