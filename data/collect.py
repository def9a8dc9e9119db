"""Collect comparisons: sample K responses a prompt, and have a labeler rank them (sections 3.2 to 3.4, figure 2).

    python data/collect.py                          # the first round, from the SFT and base models
    python data/collect.py --sources out/ppo/model.pt@1,out/sft/model.pt@1    # a later one, appended to the first

Training prompts go to training labelers. Validation prompts go in turn to a training labeler and to a held-out one, so
that a reward model's accuracy can be measured on both. In the default world labelers are programs
(data/tinyworld/labelers.py); identical responses to a prompt are shown to them once.
"""

import json
import math
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

import torch

import common
from common import Machine, Ranks, UserError, generator, launch, write_atomically
from data import readers
from data.tinyworld import labelers
from data.tokenizer import Tokenizer
from model import GPT, generate


# Mostly the SFT model, as in the paper. One temperature gives too many like responses for a small model's rankings to
# teach much; the base model shows what to stay away from.
SOURCES = ",".join([*(f"out/sft/model.pt@{temperature}" for temperature in (0.5, 1, 1, 1, 1.4)), "out/base/model.pt@1"])


@dataclass(frozen=True)
class Config:
    data: str = "data/tinyworld"  # the dataset's folder
    sources: str = SOURCES  # CHECKPOINT@TEMPERATURE, each drawn equally often; repeat one to weigh it
    prompts: int = 5000  # training prompts to collect on, the first of prompts.train.jsonl
    valid_prompts: int = 800  # validation prompts
    skip: int = 0  # training prompts to leave out first, those of earlier rounds say
    fewest: int = 4  # responses a prompt, drawn evenly from here (section 3.4: 4)
    most: int = 9  # to here (section 3.4: 9)
    max_new_tokens: int = 48  # the longest response, in tokens
    batch_size: int = 256  # prompts at a time
    append: bool = True  # add to the comparisons that are there, rather than replace them
    seed: int = 0  # of K, the sources, the samples, the labelers
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        if not 2 <= self.fewest <= self.most:
            raise ValueError("a comparison takes 2 responses or more: 2 <= --fewest <= --most")
        if min(self.prompts, self.valid_prompts, self.max_new_tokens, self.batch_size) < 1 or self.skip < 0:
            raise ValueError("every size is at least 1, --skip at least 0")


def load_sources(config, tokenizer, ranks):
    """-> a list of (model, temperature), each checkpoint loaded once."""
    models, sources = {}, []
    for source in config.sources.split(","):
        path, _, temperature = source.partition("@")
        try:
            temperature = float(temperature or 1)
        except ValueError:
            raise UserError(f"--sources: {source!r} is not CHECKPOINT@TEMPERATURE") from None
        if not 0 <= temperature < math.inf:
            raise UserError(f"--sources: {source!r} has no temperature from 0")
        if path not in models:
            models[path] = common.load_model(GPT, path, "make sft", tokenizer).to(ranks.device)
        sources.append((models[path], temperature))
    return sources


def sample(sources, prompts, counts, tokenizer, config, split, batch):
    """K = counts[i] responses to each of the prompts (lists of token ids) -> lists of texts."""
    rng = random.Random(f"{config.seed}/sources/{split}/{batch}")
    jobs = [(i, rng.randrange(len(sources))) for i, k in enumerate(counts) for _ in range(k)]
    uniforms = torch.rand(len(jobs), config.max_new_tokens, generator=generator(config.seed, f"collect {split}", batch))
    texts = [[] for _ in prompts]
    for s, (model, temperature) in enumerate(sources):
        mine = [j for j, (_, source) in enumerate(jobs) if source == s]
        if mine:
            said = generate(model, [prompts[jobs[j][0]] for j in mine], config.max_new_tokens, uniforms[mine], temperature)
            for j, response in zip(mine, said):
                texts[jobs[j][0]].append(tokenizer.decode(response))
    return texts


def collect(config, split, records, prompts, part, tokenizer, sources, ranks):
    """-> comparisons on these records, whose prompts are given as token ids, too. Finished batches wait in the file `part`, so a
    stopped run goes on from there."""
    teams = labelers.team()
    inputs = sorted({source.split("@")[0] for source in config.sources.split(",")}) + [f"{config.data}/prompts.{split}.jsonl"]
    signature = json.dumps([{k: v for k, v in vars(config).items() if k not in ("append", "device")},
                            [common.digest(path) for path in inputs]])
    done = []
    if part.is_file():
        lines = part.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without its end is half a line
        if lines and lines[0] == signature:
            done = [json.loads(line) for line in lines[1:]]
    batches, context = range(0, len(records), config.batch_size), min(model.config.context for model, _ in sources)
    lines = "\n".join([signature, *map(json.dumps, done)]) + "\n"
    ranks.barrier()  # everyone has read it
    if ranks.main:
        write_atomically(part, lambda temporary: temporary.write_text(lines, encoding="utf-8"))

    def one(batch):
        first = batches[batch]
        chosen = records[first : first + config.batch_size]
        rng = random.Random(f"{config.seed}/labelers/{split}/{batch}")
        counts = [rng.randint(config.fewest, config.most) for _ in chosen]
        with ranks.autocast():
            texts = sample(sources, prompts[first : first + len(chosen)], counts, tokenizer, config, split, batch)
        result = []
        for i, (record, responses) in enumerate(zip(chosen, texts)):
            labeler = rng.choice(teams[(first + i) % 2 if split == "valid" else 0])
            room = context - len(prompts[first + i]) - 1  # broken characters can outgrow it, read back
            responses = [r for r in dict.fromkeys(responses) if r.strip() and len(tokenizer.encode(r)) <= room]
            if len(responses) > 1:
                ranks_ = labeler.rank(record["prompt"], record["asks"], responses, config.seed)
                result.append({**record, "responses": responses, "ranks": ranks_, "labeler": labeler.name})
        return result

    progress = common.bar(ranks, len(batches), len(done), f"comparisons.{split}")
    while len(done) < len(batches):
        first = len(done)
        results = ranks.spread(min(ranks.size, len(batches) - first), lambda i: one(first + i))  # a batch a rank
        done += results
        progress.update(len(results))
        if ranks.main:
            with open(part, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(result) + "\n" for result in results))
    progress.close()
    comparisons = [r for result in done for r in result]
    if not comparisons:
        if ranks.main:
            part.unlink()
        raise UserError(f"no prompt of {len(records)} got two different responses")
    return comparisons


def main(config):
    ranks = Ranks(Machine(device=config.device))
    tokenizer = Tokenizer.load(config.data)
    common.lock(config.data, ranks)
    sources = load_sources(config, tokenizer, ranks)
    longest = min(model.config.context for model, _ in sources) - config.max_new_tokens - 1  # for the end
    if "asks" not in readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", "prompts")[0]:
        raise UserError(f"{config.data}: only the built-in world has labelers at hand; real data comes with its comparisons")
    jobs, results = {}, {}
    for split, first, count in (("valid", 0, config.valid_prompts), ("train", config.skip, config.prompts)):
        path = f"{config.data}/prompts.{split}.jsonl"
        records = readers.read_jsonl(path, "requests")[first : first + count]
        if not records:
            raise UserError(f"{path}: no prompt is left after --skip {first}")
        jobs[split] = records, readers.encode_prompts(records, tokenizer, longest, path, first + 1)
    for split, (records, prompts) in jobs.items():
        path = Path(f"{config.data}/comparisons.{split}.jsonl")
        results[path] = collect(config, split, records, prompts, Path(f"{path}.part"), tokenizer, sources, ranks)
        if ranks.main:
            print(f"{path}: {sum(len(r['responses']) for r in results[path]):,} responses to {len(results[path]):,} prompts; "
                  f"{len(records) - len(results[path])} prompts left out, their responses being all the same")
    if ranks.main:
        publish(results, config.append)
        common.unlock(config.data)


def publish(results, append):
    """Write {path: comparisons}, behind those that are there or in their place."""
    for path, comparisons in results.items():  # the training file last: it is the one that make looks for
        old = path.read_bytes() if append and path.is_file() else b""
        new = "".join(json.dumps(r) + "\n" for r in comparisons).encode()
        if new in old:
            print(f"{path} holds these comparisons already")
            continue
        write_atomically(path, lambda temporary: temporary.write_bytes(old + new))
    for path in results:
        Path(f"{path}.part").unlink()


if __name__ == "__main__":
    launch(main, Config)
