"""The made-up tokenizer, dataset and prompts of tests/bench.py and tests/gpu.py: nothing has to be downloaded."""

import functools
import random

from data import readers
from data.tokenizer import Tokenizer

VOCABULARY = 50257


@functools.cache
def tokenizer(vocabulary=VOCABULARY):
    """By default as many tokens as GPT-2's, which would have to be downloaded. A space and two letters are one."""
    letters = [bytes([a]) for a in b"abcdefghijklmnopqrstuvwxyz"]
    tokens = [bytes([i]) for i in range(256)] + [b" " + a for a in letters] + [b" " + a + b for a in letters for b in letters]
    high = [bytes([i]) for i in range(128, 256)]
    tokens += [a + b for a in high for b in high] + [a + b + c for a in high[:3] for b in high for c in high]
    return Tokenizer("bench", tokens[: vocabulary - 1])


def text(tokens, rng):
    return "".join(" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=2)) for _ in range(tokens))


def write_dataset(folder, rows=256, K=9, prompt_tokens=(16, 64), page_tokens=None, vocabulary=VOCABULARY):
    """Responses have 8 to 192 tokens, those that are ranked 8 to 64. With `page_tokens`, also pretraining text."""
    rng, one = random.Random(0), dict(labeler="a", user="b", use_case="c")
    folder.mkdir(parents=True)
    tokenizer(vocabulary).save(folder)
    prompts = [text(rng.randint(*prompt_tokens), rng) for _ in range(rows)]
    readers.write_jsonl(folder / "prompts.train.jsonl", [{"prompt": p, **one} for p in prompts])
    for split in ("train", "valid"):
        readers.write_jsonl(folder / f"demonstrations.{split}.jsonl", [
            {"prompt": p, "response": text(rng.randint(8, 192), rng), **one} for p in prompts])
        readers.write_jsonl(folder / f"comparisons.{split}.jsonl", [
            {"prompt": p, "responses": [text(rng.randint(8, 64), rng) for _ in range(K)],
             "ranks": rng.sample(range(1, K + 1), K), **one} for p in prompts[:96]])
        if page_tokens:
            pages = [text(rng.randint(*page_tokens), rng) for _ in range(8 * rows)]
            readers.write_tokens(folder / f"pretrain.{split}.bin", pages, tokenizer(vocabulary))


def mixed_prompts(count, shortest, longest, vocabulary=VOCABULARY):
    rng = random.Random(0)
    return [[rng.randrange(vocabulary - 1) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
