"""Anthropic's HH-RLHF (Bai et al. 2022): conversations with two replies each, of which people chose one. Crude in places.

    python data/hh/prepare.py                       # downloads 16 MB; writes into data/hh/
    python data/hh/prepare.py --subsets harmless-base,helpful-base
    python data/hh/prepare.py --source train.jsonl.gz

The chosen reply is the demonstration, the two are the comparison. Who compared is not known: one labeler, "anthropic".
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from common.config import UserError, launch
from common import download
from data import dataset
from data.readers import json_lines

REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
SHA256 = {
    "harmless-base/train.jsonl.gz": "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "harmless-base/test.jsonl.gz": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    "helpful-base/train.jsonl.gz": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test.jsonl.gz": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
}
SUBSETS = sorted({name.split("/")[0] for name in SHA256})
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Config(dataset.Config):
    out: str = "data/hh"  # the folder to fill
    subsets: str = "helpful-base"  # of the download: helpful-base, harmless-base, or both with a comma between

    def __post_init__(self):
        super().__post_init__()
        if not self.subsets or set(self.subsets.split(",")) - set(SUBSETS):
            raise ValueError(f"--subsets is one or more of {', '.join(SUBSETS)}, with commas between")


def parse(row, where, dropped):
    """The records of one line: {"chosen", "rejected"}, two conversations that differ in the last reply."""
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), str) or HUMAN not in "\n\n" + row[key].lstrip("\n") or ASSISTANT not in row[key]:
            raise UserError(f"{where}: {key!r} is no conversation of Human and Assistant")
    (prompt, chosen), (other, rejected) = (row[key].rsplit(ASSISTANT, 1) for key in ("chosen", "rejected"))
    for why, wrong in (("replies to two different prompts", prompt != other),
                       ("conversation that ends with the human's turn", HUMAN in chosen or HUMAN in rejected)):
        if wrong:
            dropped[why] += 1
            return []
    opening = prompt.split(ASSISTANT)[0].strip().removeprefix(HUMAN.strip()).strip()
    record = {"prompt": prompt.strip() + ASSISTANT, "user": dataset.nobody(opening), "opening": opening, "use_case": "chat"}
    return dataset.ranking(record, [dataset.reply(chosen), dataset.reply(rejected)], [1, 2], "anthropic")


def main(config):
    if config.source:
        paths = dataset.find(config.source, (".jsonl", ".jsonl.gz"))
    else:
        paths = [download.fetch(f"{download.HUB}/datasets/Anthropic/hh-rlhf/resolve/{REVISION}/{name}",
                                download.cache() / "hh-rlhf" / name, sha256)
                 for name, sha256 in SHA256.items() if name.split("/")[0] in config.subsets.split(",")]
    dropped = Counter()
    records = [r for path in paths for where, row in json_lines(path) for r in parse(row, where, dropped)]
    dataset.publish(records, config, dropped)


if __name__ == "__main__":
    launch(main, Config)
