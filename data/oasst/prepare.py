"""OpenAssistant conversations (Köpf et al. 2023): trees of messages by volunteers, who also ranked the replies.

    python data/oasst/prepare.py                    # downloads 34 MB; writes into data/oasst/
    python data/oasst/prepare.py --source trees.jsonl.gz

Each user's message, with the conversation before it, is a prompt. The best-ranked reply is the demonstration, the ranked
replies are the comparison. The crowd's votes are merged into one ranking, so there is one labeler, "crowd".
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

REVISION = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
FILE = "2023-04-12_oasst_ready.trees.jsonl.gz"
SHA256 = "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7"
TYPES = {"text": str, "role": str, "lang": str, "replies": list}  # what a message must have


@dataclass(frozen=True)
class Config(dataset.Config):
    out: str = "data/oasst"  # the folder to fill
    lang: str = "en"  # the language to keep, or all


def check(message, where):
    if not isinstance(message, dict):
        raise UserError(f"{where}: a message is no JSON object")
    for key, type_ in TYPES.items():
        if not isinstance(message.get(key), type_):
            raise UserError(f"{where}: a message has no {key!r}, or it is no {type_.__name__}")
    if message["role"] not in ("prompter", "assistant"):
        raise UserError(f"{where}: role {message['role']!r} is neither prompter nor assistant")


def wanted(message, lang, dropped):
    if message.get("deleted") or message.get("review_result") is False:
        dropped["message deleted or rejected in review"] += 1
    elif lang not in ("all", message["lang"]):
        dropped[f"message not in {lang}"] += 1
    else:
        return True
    return False


def walk(tree, where, lang, dropped):
    """The records of one tree: those of each user's message that has replies. A message that is not wanted takes what
    follows it along."""
    root = tree.get("prompt")
    name = str(tree.get("message_tree_id") or f"tree-{where.rpartition(':')[2]}")
    waiting = [(root, [])]  # messages, and the turns before them
    while waiting:
        message, before = waiting.pop()
        check(message, where)
        if not wanted(message, lang, dropped):
            continue
        turns = [*before, ("user" if message["role"] == "prompter" else "assistant", message["text"])]
        waiting += [(child, turns) for child in message["replies"]]
        if message["role"] == "assistant":
            continue
        replies = []
        for child in message["replies"]:
            check(child, where)
            if child["role"] == "assistant" and wanted(child, lang, Counter()):  # it is counted when its turn comes
                replies.append(child)
        record = {"prompt": dataset.chat(turns), "user": name, "opening": root["text"], "use_case": "chat"}
        ranked = [child for child in replies if type(child.get("rank")) is int]
        dropped["reply without a rank, beside others"] += (len(replies) - len(ranked)) * (len(replies) > 1)
        if len(ranked) > 1:
            found = dataset.ranking(record, [dataset.reply(child["text"]) for child in ranked],
                                    [child["rank"] for child in ranked], "crowd")
            best = min(ranked, key=lambda child: child["rank"])
        elif len(replies) == 1:
            best = replies[0]
            found = [{**record, "response": dataset.reply(best["text"]), "labeler": "crowd"}]
        else:
            found = [record]
        if any("response" in r for r in found) and best.get("synthetic"):
            dropped["demonstration written by a model"] += 1
            found = [r for r in found if "response" not in r] or [record]
        yield from found


def main(config):
    if config.source:
        paths = dataset.find(config.source, (".jsonl", ".jsonl.gz"))
    else:
        url = f"{download.HUB}/datasets/OpenAssistant/oasst1/resolve/{REVISION}/{FILE}"
        paths = [download.fetch(url, download.cache() / FILE, SHA256)]
    dropped = Counter()
    records = [r for path in paths for where, tree in json_lines(path) for r in walk(tree, where, config.lang, dropped)]
    dataset.publish(records, config, dropped)


if __name__ == "__main__":
    launch(main, Config)
