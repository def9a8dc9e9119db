"""Collect comparisons: sample K responses per prompt, and have a labeler rank them (sections 3.2 to 3.4, figure 2).

    python data/collect.py                          # the first round, from the SFT and base models
    python data/collect.py --sources out/ppo/model.pt@1,out/sft/model.pt@1    # a later one, appended to the first
    torchrun --nproc_per_node=8 data/collect.py

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

from common.checkpoints import load_model
from common.config import UserError, launch
from common.files import lock, unlock, write_atomically
from common.run import progress_bar
from common.runtime import Runtime, RuntimeConfig
from common.seeds import generator
from data import readers
from data.tinyworld import labelers
from data.tokenizer import Tokenizer
from model import GPT, generate

# Mostly the SFT model, as in the paper. With one temperature, a small model's responses are too similar for their
# rankings to teach much; the base model shows what to avoid.
SOURCES = ",".join([*(f"out/sft/model.pt@{temperature}" for temperature in (0.5, 1, 1, 1, 1.4)), "out/base/model.pt@1"])


@dataclass(frozen=True)
class Config:
    data: str = "data/tinyworld"  # the dataset's folder
    sources: str = SOURCES  # CHECKPOINT@TEMPERATURE, each drawn equally often; repeat one to give it more weight
    prompts: int = 5000  # training prompts, the first of prompts.train.jsonl
    valid_prompts: int = 800  # validation prompts
    skip: int = 0  # training prompts to skip first, for example those of earlier rounds
    fewest: int = 4  # minimum number of responses per prompt, which is drawn uniformly (section 3.4: 4)
    most: int = 9  # maximum number of responses per prompt (section 3.4: 9)
    max_new_tokens: int = 48  # the longest response, in tokens
    batch_size: int = 256  # prompts at a time
    append: bool = True  # append to existing comparisons, instead of replacing them
    seed: int = 0  # of K, the sources, the samples, the labelers
    shard: bool = False  # shard each model over the processes (torchrun); for sampling every process has a whole copy
    device: str = "auto"  # cpu, cuda, mps (Apple's GPU), or auto: cuda or mps if available

    def __post_init__(self):
        if not 2 <= self.fewest <= self.most:
            raise ValueError("a comparison takes 2 responses or more: 2 <= --fewest <= --most")
        if min(self.prompts, self.valid_prompts, self.max_new_tokens, self.batch_size) < 1 or self.skip < 0:
            raise ValueError("every size is at least 1, --skip at least 0")


def load_sources(config, tokenizer, runtime):
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
            models[path] = load_model(GPT, path, "make sft", tokenizer, runtime)
        sources.append((models[path], temperature))
    return sources


def sample(sources, prompts, counts, tokenizer, config, split, batch, runtime):
    """K = counts[i] responses to each of the prompts (lists of token ids) -> lists of texts."""
    rng = random.Random(f"{config.seed}/sources/{split}/{batch}")
    jobs = [(i, rng.randrange(len(sources))) for i, k in enumerate(counts) for _ in range(k)]  # (prompt, source)
    uniforms = torch.rand(len(jobs), config.max_new_tokens, generator=generator(config.seed, f"collect {split}", batch))
    texts = [[] for _ in prompts]
    for s, (model, temperature) in enumerate(sources):
        chosen = [j for j, (_, source) in enumerate(jobs) if source == s]
        with runtime.sampling(model) as sampler:
            responses = generate(sampler, [prompts[jobs[j][0]] for j in chosen], config.max_new_tokens,
                                 uniforms[chosen], temperature) if chosen else []
        for j, response in zip(chosen, responses):
            texts[jobs[j][0]].append(tokenizer.decode(response))
    return texts


def rank_responses(records, prompts, sources, tokenizer, config, split, batch, runtime):
    """-> the comparisons of batch number `batch`: responses are sampled, then ranked. `prompts` are the records'
    prompts as token ids."""
    first = batch * config.batch_size
    records, prompts = (x[first : first + config.batch_size] for x in (records, prompts))
    context = min(model.config.context for model, _ in sources)
    rng = random.Random(f"{config.seed}/labelers/{split}/{batch}")
    counts = [rng.randint(config.fewest, config.most) for _ in records]
    texts = sample(sources, prompts, counts, tokenizer, config, split, batch, runtime)
    comparisons = []
    for i, (record, responses) in enumerate(zip(records, texts)):
        team = (first + i) % 2 if split == "valid" else 0
        labeler = rng.choice(labelers.team()[team])
        # A decoded response may have more tokens than were sampled, if it contains invalid UTF-8.
        room = context - len(prompts[i]) - 1
        responses = [r for r in dict.fromkeys(responses) if r.strip() and len(tokenizer.encode(r)) <= room]
        if len(responses) > 1:
            ranks = labeler.rank(record["prompt"], record["asks"], responses, config.seed)
            comparisons.append({**record, "responses": responses, "ranks": ranks, "labeler": labeler.name})
    return comparisons


def read_part(part, signature):
    """The finished batches of a stopped run with the same signature, its first line."""
    if not part.is_file():
        return []
    lines = part.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without an end is incomplete
    return [json.loads(line) for line in lines[1:]] if lines and lines[0] == signature else []


def collect(config, split, records, prompts, part, tokenizer, sources, runtime):
    """-> comparisons on these records; `prompts` are theirs as token ids. Finished batches are kept in the file
    `part`, so that a stopped run can be resumed."""
    inputs = sorted({source.split("@")[0] for source in config.sources.split(",")})
    inputs.append(f"{config.data}/prompts.{split}.jsonl")
    settings = {k: v for k, v in vars(config).items() if k not in ("append", "device", "shard")}
    signature = json.dumps([settings, list(runtime.check_same_files(inputs).values())])
    done = read_part(part, signature)
    runtime.check_same({str(part): len(done)}, "all processes need the same folder")
    lines = "\n".join([signature, *map(json.dumps, done)]) + "\n"
    if runtime.is_main:
        write_atomically(part, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    batches = -(-len(records) // config.batch_size)
    progress = progress_bar(runtime, len(done), batches, f"comparisons.{split}")
    while len(done) < batches:
        first = len(done)
        results = runtime.distribute(  # one batch per rank
            min(runtime.world_size, batches - first),
            lambda i: rank_responses(records, prompts, sources, tokenizer, config, split, first + i, runtime))
        done += results
        progress.update(len(results))
        if runtime.is_main:
            with open(part, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(result) + "\n" for result in results))
    progress.close()
    comparisons = [comparison for result in done for comparison in result]
    if not comparisons:
        if runtime.is_main:
            part.unlink()
        raise UserError(f"no prompt of {len(records)} got two different responses")
    return comparisons


def main(config):
    runtime = Runtime(RuntimeConfig(device=config.device, shard=config.shard), config)
    tokenizer = Tokenizer.load(config.data)
    lock(config.data, runtime)
    sources = load_sources(config, tokenizer, runtime)
    if "asks" not in readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", "prompts")[0]:
        raise UserError(f"{config.data}: only the built-in world has labelers at hand; "
                        "real data comes with its comparisons")
    longest = min(model.config.context for model, _ in sources) - config.max_new_tokens - 1  # 1 for the end of text
    jobs, results = {}, {}
    for split, first, count in (("valid", 0, config.valid_prompts), ("train", config.skip, config.prompts)):
        path = f"{config.data}/prompts.{split}.jsonl"
        records = readers.read_jsonl(path, "requests")[first : first + count]
        if not records:
            raise UserError(f"{path}: no prompt is left after --skip {first}")
        jobs[split] = records, readers.encode_prompts(records, tokenizer, longest, path, first + 1)
    for split, (records, prompts) in jobs.items():
        path = Path(f"{config.data}/comparisons.{split}.jsonl")
        comparisons = collect(config, split, records, prompts, Path(f"{path}.part"), tokenizer, sources, runtime)
        results[path] = comparisons
        if runtime.is_main:
            responses = sum(len(comparison["responses"]) for comparison in comparisons)
            print(f"{path}: {responses:,} responses to {len(comparisons):,} prompts; "
                  f"{len(records) - len(comparisons)} prompts left out, because their responses were all the same")
    if runtime.is_main:
        publish(results, config.append)
        unlock(config.data)


def publish(results, append):
    """Write {path: comparisons}: after the existing ones, or instead of them."""
    for path, comparisons in results.items():  # the training file last: it is make's target
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
