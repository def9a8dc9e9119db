"""Make the default dataset: the web of the Vale, its API's log cleaned and split by customer, demonstrations, tasks.

    python data/tinyworld/prepare.py            # about 15 seconds; writes into data/tinyworld/

Comparisons come later, from data/collect.py: they need a model to sample from.
"""

import itertools
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from common.config import UserError, launch
from data import cleaning
from data.readers import write_jsonl, write_tokens
from data.tinyworld import labelers, requests, web
from data.tinyworld.world import NAMES
from data.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class Config:
    out: str = "data/tinyworld"  # the folder to fill
    documents: int = 66_000  # pages of the web to pretrain on
    log: int = 36_000  # prompts in the API's log, before cleaning
    customers: int = 400  # who wrote them
    demonstrations: int = 4_000  # prompts that labelers answer; the rest is for comparisons and PPO
    tasks: int = 400  # zero-shot questions of each kind
    vocab_size: int = 1_280  # of the byte-level BPE
    seed: int = 0  # of all of it but the world itself, which is fixed

    def __post_init__(self):
        if self.vocab_size < 257 or self.vocab_size > 65_536:
            raise ValueError("--vocab_size is from 257 (bytes and the end of text) to 65536 (uint16)")
        if min(self.documents, self.log, self.customers, self.demonstrations, self.tasks) < 1:
            raise ValueError("every size is at least 1")


def api_log(config):
    """What customers sent: a few send most of it; 6% is sent again, sometimes with words added behind; 2% has personal
    data in it."""
    rng, records = random.Random(f"{config.seed}/log"), []
    customers = [f"customer-{i:03}" for i in range(config.customers)]
    weights = [1 / (i + 20) for i in range(config.customers)]
    for user in rng.choices(customers, weights, k=config.log):
        record = {**(rng.choice(records) if records and rng.random() < 0.06 else requests.request(rng)), "user": user}
        if rng.random() < 0.02:
            record["prompt"] = record["prompt"].rstrip("\n") + " Thanks!\n"
        if rng.random() < 0.02:
            address = rng.choice([f"{rng.choice(NAMES).lower()}@post.example", f"555 01{rng.randrange(10, 100)} 22"])
            record["prompt"] = f"Write back to {address}. {record['prompt']}"
        records.append(record)
    return records


def pages(config, split):
    """Page after page of the web, without end."""
    return (web.page(random.Random(f"{config.seed}/web/{split}/{i}")) for i in itertools.count())


def held_out_pages(config, training_pages, count):
    """`count` different pages, none of which occurs anywhere in the training text."""
    training_text, held_out = "\0".join(training_pages), {}
    for page in pages(config, "valid"):
        if page not in training_text:
            held_out[page] = None
        if len(held_out) == count:
            return list(held_out)


def main(config):
    out = Path(config.out)
    training_pages = list(itertools.islice(pages(config, "train"), config.documents))
    valid_pages = held_out_pages(config, training_pages, max(1, config.documents // 50))
    tokenizer = Tokenizer("tinyworld", train_bpe(training_pages[:4000], config.vocab_size))
    for split, documents in [("train", training_pages), ("valid", valid_pages)]:
        tokens = write_tokens(out / f"pretrain.{split}.bin", documents, tokenizer)
        print(f"pretrain.{split}.bin: {len(documents):,} documents, {tokens:,} tokens, vocabulary {tokenizer.vocab_size:,}")

    records, steps = cleaning.clean(api_log(config))
    print("prompts: " + ", ".join(f"{left:,} {what}" for what, left in steps))
    splits = cleaning.split_by_customer(records, {"test": len(records) // 10, "valid": len(records) // 20}, config.seed)
    demonstrators, _ = labelers.team()
    counts = {"train": config.demonstrations, "valid": config.demonstrations // 10}
    for split, prompts in splits.items():
        if counts.get(split, 0) >= len(prompts):
            raise UserError(f"{len(prompts)} {split} prompts are too few for --demonstrations {config.demonstrations}; "
                            "raise --log")
        rng, shown = random.Random(f"{config.seed}/demonstrations/{split}"), counts.get(split, 0)
        if shown:
            records = []
            for record in prompts[:shown]:
                labeler = rng.choice(demonstrators)
                records.append({**record, "response": labeler.demonstrate(record["asks"], rng), "labeler": labeler.name})
            write_jsonl(out / f"demonstrations.{split}.jsonl", records)
        write_jsonl(out / f"prompts.{split}.jsonl", prompts[shown:])
        print(f"{split}: {shown:,} demonstrations, {len(prompts) - shown:,} prompts, "
              f"{len({r['user'] for r in prompts})} customers")
    for split in ("valid", "test"):
        rng = random.Random(f"{config.seed}/tasks/{split}")
        write_jsonl(out / f"tasks.{split}.jsonl", [make(rng) for make in [*web.ABILITIES.values(), *web.SAFETY.values()]
                                                   for _ in range(config.tasks)])
    tokenizer.save(out)  # last: it is the file that make looks for


if __name__ == "__main__":
    launch(main, Config)
