"""Collect comparisons: sample K responses a prompt, and have a labeler rank them (sections 3.2 to 3.4, figure 2).

    python data/collect.py                          # the first round, from the SFT and base models
    python data/collect.py --sources out/ppo/model.pt@1,out/sft/model.pt@1    # a later one, appended to the first

Training prompts go to training labelers. Validation prompts go in turn to a training labeler and to a held-out one, so
that a reward model's accuracy can be measured on both. In the default world labelers are programs
(data/tinyworld/labelers.py); identical responses to a prompt are shown to them once.
"""

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

import torch

import common
from common import Ranks, UserError, generator, launch, write_atomically
from data import readers
from data.tinyworld import labelers
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate


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
    batch_size: int = 64  # prompts at a time
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
        if path not in models:
            checkpoint = common.load_checkpoint(path, "make sft")
            readers.check_vocabulary(checkpoint, path, tokenizer, config.data)
            models[path] = GPT(GPTConfig(**checkpoint["model_config"])).to(ranks.device).eval()
            models[path].load_state_dict(checkpoint["model"])
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


def collect(config, split, records, path, tokenizer, sources, ranks):
    """Comparisons on these records -> how many responses, and how many prompts were left with fewer than 2 distinct.

    Finished batches wait in a .part file, so a stopped run goes on from there; the comparisons themselves are replaced
    in one step at the end."""
    part, teams = Path(f"{path}.part"), labelers.team()
    signature = json.dumps({k: v for k, v in vars(config).items() if k not in ("append", "device")})
    done = []
    if part.is_file():
        lines = part.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without its end is half a line
        if lines and lines[0] == signature:
            done = [json.loads(line) for line in lines[1:]]
    longest = sources[0][0].config.context - config.max_new_tokens
    prompts = readers.encode_prompts(records, tokenizer, longest, f"{config.data}/prompts.{split}.jsonl")
    batches = range(0, len(records), config.batch_size)
    if ranks.main:
        part.write_text("\n".join([signature, *map(json.dumps, done)]) + "\n", encoding="utf-8")
    for batch in common.bar(ranks, len(batches), len(done), f"comparisons.{split}"):
        first = batches[batch]
        chosen = records[first : first + config.batch_size]
        rng = random.Random(f"{config.seed}/labelers/{split}/{batch}")
        counts = [rng.randint(config.fewest, config.most) for _ in chosen]
        texts = sample(sources, prompts[first : first + len(chosen)], counts, tokenizer, config, split, batch)
        result = []
        for i, (record, responses) in enumerate(zip(chosen, texts)):
            labeler = rng.choice(teams[(first + i) % 2 if split == "valid" else 0])
            responses = [r for r in dict.fromkeys(responses) if r.strip()]
            if len(responses) > 1:
                ranks_ = labeler.rank(record["prompt"], record["asks"], responses, config.seed)
                result.append({**record, "responses": responses, "ranks": ranks_, "labeler": labeler.name})
        done.append(result)
        if ranks.main:
            with open(part, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    comparisons = [r for result in done for r in result]
    if not comparisons:
        raise UserError(f"no prompt of {len(records)} got two different responses")
    if ranks.main:
        old = Path(path).read_bytes() if config.append and Path(path).is_file() else b""
        new = "".join(json.dumps(r) + "\n" for r in comparisons).encode()
        write_atomically(path, lambda temporary: temporary.write_bytes(old + new))
        part.unlink()
    return sum(len(r["responses"]) for r in comparisons), len(records) - len(comparisons)


def main(config):
    ranks = Ranks(config.device)
    tokenizer = Tokenizer.load(config.data)
    sources = load_sources(config, tokenizer, ranks)
    for split in ("valid", "train"):  # the training file last: it is the one that make looks for
        records = readers.read_jsonl(f"{config.data}/prompts.{split}.jsonl", "prompts")
        first, count = (config.skip, config.prompts) if split == "train" else (0, config.valid_prompts)
        path = f"{config.data}/comparisons.{split}.jsonl"
        responses, dropped = collect(config, split, records[first : first + count], path, tokenizer, sources, ranks)
        if ranks.main:
            print(f"{path}: {responses:,} responses; {dropped} prompts left out, their responses being all the same")


if __name__ == "__main__":
    launch(main, Config)
