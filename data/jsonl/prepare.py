"""Anyone's own JSON Lines, in the formats in common use, each line as it is:

    {"prompt": "...", "completion": "..."}                          a demonstration ("response" will do, too)
    {"messages": [{"role": "user", "content": "..."}, ...]}         one for every turn of the assistant
    {"prompt": "...", "chosen": "...", "rejected": "..."}           a comparison, and a demonstration
    {"prompt": "...", "responses": ["...", ...], "ranks": [2, 1]}   a comparison (lower is better), and a demonstration
    {"prompt": "..."}                                               a prompt for PPO

    python data/jsonl/prepare.py --source FILE_OR_FOLDER --out data/mine

A prompt or a reply may be a string, which is taken as it is, or a list of messages. "user", "labeler", "use_case" and any
other keys (but "opening") are kept where they are given.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from common.config import UserError, launch
from data import dataset
from data.readers import json_lines

TEXT = ("prompt", "completion", "response", "messages", "chosen", "rejected", "responses", "ranks")


@dataclass(frozen=True)
class Config(dataset.Config):
    out: str = "data/jsonl"  # the folder to fill
    prefix: int = 0  # conversations that begin with the same so many characters are one; 0: only equal ones, as for templates

    def __post_init__(self):
        super().__post_init__()
        if not self.source:
            raise ValueError("--source says which file or folder to read")


def turns_of(messages, where):
    """[{"role", "content"}] -> [(role, text)]"""
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a message is an object with a 'content', a string")
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: the role {message.get('role')!r} is none of system, user, assistant")
        turns.append((message["role"], message["content"]))
    return turns


def prompt_of(value, where):
    """A prompt, as a string or messages -> (its text, how the conversation began)."""
    if isinstance(value, str):
        return value, value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: 'prompt' is neither a string nor a list of messages")
    turns = turns_of(value, where)
    if turns[-1][0] == "assistant":
        raise UserError(f"{where}: 'prompt' ends with the assistant's turn, not the user's")
    return dataset.chat(turns), next((text for role, text in turns if role == "user"), turns[0][1])


def reply_of(value, prompt, where):
    """A reply to a prompt of the file, as a string or as messages of which the last is the assistant's. A string behind a
    prompt that is one, too, is taken as it is."""
    if isinstance(value, str):
        return value if isinstance(prompt, str) else dataset.reply(value)
    turns = turns_of(value, where) if isinstance(value, list) else []
    if not turns or turns[-1][0] != "assistant":
        raise UserError(f"{where}: a reply is neither a string nor messages that end with the assistant's")
    return dataset.reply(turns[-1][1])


def records_of(row, where):
    """The records of one line."""
    kinds = [keys for keys in (("messages",), ("completion",), ("response",), ("chosen", "rejected"), ("responses", "ranks"))
             if any(key in row for key in keys)]
    if len(kinds) > 1 or "messages" in row and "prompt" in row:
        raise UserError(f"{where}: {' and '.join(repr(key) for key in row if key in TEXT)} are of two formats")
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise UserError(f"{where}: 'messages' is no list")
        turns = turns_of(row["messages"], where)
        if not any(role == "user" for role, _ in turns):
            raise UserError(f"{where}: no message of the user")
        opening = next(text for role, text in turns if role == "user")
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant" and i]
        record = common_of(row, where, opening)
        records = [{**record, "prompt": dataset.chat(turns[:i]), "response": dataset.reply(turns[i][1])} for i in answers]
        if turns[-1][0] != "assistant":  # what nobody has answered yet
            records.append(bare({**record, "prompt": dataset.chat(turns)}))
        return records
    chosen = row.get("chosen")
    if "prompt" not in row and isinstance(chosen, list) and len(chosen) > 1:  # the prompt is what the two begin with
        row = {**row, "prompt": chosen[:-1]}
        if not isinstance(row.get("rejected"), list) or row["rejected"][:-1] != chosen[:-1]:
            raise UserError(f"{where}: 'chosen' and 'rejected' do not begin with the same messages")
    if "prompt" not in row:
        raise UserError(f"{where}: neither 'prompt' nor 'messages'")
    prompt, opening = prompt_of(row["prompt"], where)
    record = common_of(row, where, opening) | {"prompt": prompt}
    for key in ("completion", "response"):
        if key in row:
            return [{**record, "response": reply_of(row[key], row["prompt"], where)}]
    if "chosen" in row or "rejected" in row:
        return dataset.ranking(record, [reply_of(row.get(key), row["prompt"], where) for key in ("chosen", "rejected")], [1, 2],
                               record["labeler"])
    if "responses" in row or "ranks" in row:
        responses, ranks = row.get("responses"), row.get("ranks")
        if not isinstance(responses, list) or len(responses) < 2:
            raise UserError(f"{where}: 'responses' is a list of two or more")
        if not isinstance(ranks, list) or len(ranks) != len(responses) or any(type(rank) is not int for rank in ranks):
            raise UserError(f"{where}: 'ranks' is a list of whole numbers, one a response")
        return dataset.ranking(record, [reply_of(text, row["prompt"], where) for text in responses], ranks, record["labeler"])
    return [bare(record)]


def bare(record):
    return {key: value for key, value in record.items() if key != "labeler"}


def common_of(row, where, opening):
    record = {"user": dataset.nobody(opening), "labeler": "people", "use_case": "other"}
    record |= {key: value for key, value in row.items() if key not in TEXT} | {"opening": opening}
    for key in ("user", "labeler", "use_case"):
        if not isinstance(record[key], str):
            raise UserError(f"{where}: {key!r} is no string")
    return record


def main(config):
    paths = dataset.find(config.source, (".jsonl", ".jsonl.gz"))
    dataset.publish([r for path in paths for where, row in json_lines(path) for r in records_of(row, where)], config, Counter())


if __name__ == "__main__":
    launch(main, Config)
