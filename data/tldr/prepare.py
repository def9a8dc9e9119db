"""OpenAI's summarize-from-feedback (Stiennon et al. 2020): Reddit posts, the summaries that their authors wrote, and
comparisons of summaries by named workers.

    python data/tldr/prepare.py                     # downloads about 500 MB; writes into data/tldr/
    python data/tldr/prepare.py --source FOLDER     # with train.jsonl (posts) and comparisons/batch*.json, any of them

A post's own summary is the demonstration. A comparison keeps its worker and batch; the workers held out are the held-out
labelers of the reward model. Comparisons of news articles, which are in the same files, are left out.
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

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
FILES = {"train.jsonl": f"{URL}/datasets/tldr_3_filtered/train.jsonl"} | {
    f"comparisons/batch{i}.json": f"{URL}/dataset/comparisons/batch{i}.json" for i in (*range(3, 21), 22)}


@dataclass(frozen=True)
class Config(dataset.Config):
    out: str = "data/tldr"  # the folder to fill
    posts: int = 20_000  # posts with their summaries to read, of about 117,000; 0 reads all


def record_of(post, where):
    """What a summary answers, in the words of Stiennon et al."""
    for key in ("id", "subreddit", "title", "post"):
        if not isinstance(post.get(key), str):
            raise UserError(f"{where}: the post has no {key!r}, or it is no string")
    prompt = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: {post['post'].strip()}\n\nTL;DR:"
    return {"prompt": prompt, "user": post["id"], "opening": f"{post['title']}\n{post['post']}", "use_case": "summarization"}


def demonstration(row, where):
    if not isinstance(row.get("summary"), str):
        raise UserError(f"{where}: no 'summary', or it is no string")
    return {**record_of(row, where), "response": dataset.reply(row["summary"]), "labeler": "author"}


def comparison(row, where, dropped):
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict) or not isinstance(row.get("worker"), str):
        raise UserError(f"{where}: a comparison has an 'info' and a 'worker'")
    if "article" in info:
        dropped["comparison of a news article's summaries"] += 1
        return []
    good = isinstance(summaries, list) and all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in summaries)
    if not good or len(summaries) < 2 or type(choice) is not int or choice not in range(len(summaries)):
        raise UserError(f"{where}: 'summaries' is a list of two texts or more, 'choice' the index of the better one")
    record = record_of(info, where) | {"batch": row.get("batch", "")}
    ranks = [1 if i == choice else 2 for i in range(len(summaries))]
    return dataset.ranking(record, [dataset.reply(s["text"]) for s in summaries], ranks, row["worker"])[:1]


def main(config):
    if config.posts < 0:
        raise UserError("--posts is at least 0")
    if config.source:
        paths = dataset.find(config.source, (".json", ".jsonl", ".json.gz", ".jsonl.gz"))
    else:
        paths = [download.fetch(url, download.cache() / "tldr" / name) for name, url in FILES.items()]
    dropped, records, posts = Counter(), [], 0
    for path in paths:
        for where, row in json_lines(path):
            if "summaries" in row:
                records += comparison(row, where, dropped)
            elif not config.posts or posts < config.posts:
                posts += 1
                records.append(demonstration(row, where))
    dataset.publish(records, config, dropped)


if __name__ == "__main__":
    launch(main, Config)
