"""Text to pretrain on: OpenAI's released sample of WebText, GPT-2's own pretraining data, for the pretraining mix of PPO-ptx
and SFT; or any folder of text.

    python data/webtext/prepare.py --out data/oasst             # downloads 0.7 GB; adds pretrain.*.bin to the dataset there
    python data/webtext/prepare.py --source FOLDER --out data/mine

A source is a .txt file (one document; alone, its end is for validation), a .jsonl or .jsonl.gz file (a "text" per line), or
a folder of them. Empty documents and those that begin like an earlier one are left out. The vocabulary is the dataset's, if
it has one, else GPT-2's.
"""

import itertools
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from common.config import UserError, launch
from common import download
from data import dataset
from data.readers import json_lines, write_tokens
from data.tokenizer import Tokenizer

URL = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1"
SHA256 = {"train": "cf6db7bb5c72b5ac683e52ed102203ae36ad88089344aafe0d64ca5f09f3c5e8",
          "valid": "e080dcf561d9ec19e9c4333ef1f48a48d1b677ff0b48bae2451f3aac5522033a"}
PREFIX = 64  # characters by which two documents are the same, as in data/cleaning.py


@dataclass(frozen=True)
class Config:
    source: str = ""  # a file or folder to read instead of downloading the sample
    out: str = "data/webtext"  # the dataset's folder to add to
    bpe: str = ""  # a folder with GPT-2's vocab.bpe and encoder.json, instead of tiktoken's cache or download
    documents: int = 0  # read so many and no more; 0 reads all
    valid_every: int = 50  # of a source, one document in so many is for validation

    def __post_init__(self):
        if self.documents < 0 or self.valid_every < 2:
            raise ValueError("--documents is at least 0, --valid_every at least 2")


def texts(path):
    """The documents of a file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for where, row in json_lines(path):
            if not isinstance(row.get("text"), str):
                raise UserError(f"{where}: no 'text', or it is no string")
            yield row["text"]
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error})") from None
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None


def documents(paths, most, dropped, held_out=()):
    """Those of all the files, distinct by their beginning; none begins like a text of `held_out`."""
    seen, count = {hash(text.strip()[:PREFIX]) for text in held_out}, 0
    for text in tqdm((text for path in paths for text in texts(path)), desc="documents", unit="", dynamic_ncols=True):
        start = text.strip()[:PREFIX]
        if not start:
            dropped["empty"] += 1
        elif hash(start) in seen:
            dropped["begins like an earlier one"] += 1
        else:
            seen.add(hash(start))
            count += 1
            yield text
        if most and count == most:
            return


def main(config):
    out, dropped = Path(config.out), Counter()
    tokenizer = Tokenizer.load(out) if (out / "tokenizer.json").is_file() else Tokenizer.gpt2(config.bpe)
    if config.source:
        paths, every = dataset.find(config.source, (".txt", ".jsonl", ".jsonl.gz")), config.valid_every
        parts = {"valid": (text for i, text in enumerate(documents(paths, config.documents, Counter())) if i % every == 0),
                 "train": (text for i, text in enumerate(documents(paths, config.documents, dropped)) if i % every)}
        if len(paths) == 1 and not paths[0].name.endswith((".jsonl", ".jsonl.gz")):  # one long text: its end is for validation
            (text,) = texts(paths[0])
            cut = len(text) - len(text) // every
            parts = {"valid": [text[cut:]], "train": [text[:cut]]}
    else:
        files = {split: download.fetch(f"{URL}/webtext.{split}.jsonl", download.cache() / "webtext" / f"{split}.jsonl", sha256)
                 for split, sha256 in SHA256.items()}
        valid = list(documents([files["valid"]], config.documents, dropped))
        parts = {"valid": valid, "train": documents([files["train"]], config.documents, dropped, held_out=valid)}
    for split, some in parts.items():  # before anything is written
        some = (text for text in some if text.strip())
        first = next(some, None)
        if first is None:
            raise UserError(f"{config.source}: no document is left for pretrain.{split}.bin")
        parts[split] = itertools.chain([first], some)
    for split, some in parts.items():
        tokens = write_tokens(out / f"pretrain.{split}.bin", some, tokenizer)
        print(f"{out}/pretrain.{split}.bin: {tokens:,} tokens")
    print("left out: " + (", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "nothing"))
    if not (out / "tokenizer.json").is_file():
        tokenizer.save(out)


if __name__ == "__main__":
    launch(main, Config)
