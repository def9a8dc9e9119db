"""From people's records to a dataset's folder: what the prepare.py of oasst, hh, tldr and jsonl have in common.

A reader yields records: a prompt and what people made of it.

    {"prompt", "user", "opening"}                         an input for PPO
    {..., "response", "labeler"}                          a demonstration
    {..., "responses", "ranks", "labeler"}                a comparison

`opening` is how the conversation began and tells conversations apart; `user` is who must not stand on two sides of a
split: the customer, or where nobody knows, `nobody(opening)`, the conversation itself. All of it passes through
data/cleaning.py.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from data import cleaning
from data.readers import read_jsonl, write_jsonl, write_tokens
from data.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class Config:
    source: str = ""  # a file or folder to read instead of downloading it
    out: str = ""  # the folder to fill
    bpe: str = ""  # a folder with GPT-2's vocab.bpe and encoder.json, instead of tiktoken's cache or download
    vocab_size: int = 0  # train a vocabulary of this size on the dataset's own text; 0 takes GPT-2's
    context: int = 1024  # tokens of the model's context: prompts take at most half of it, responses the other half
    valid: float = 0.05  # fraction of the conversations for validation
    test: float = 0.05  # fraction of the conversations whose prompts evaluate.py answers
    judge: float = 0.2  # fraction of the conversations whose rankings only train the judge of evaluate.py
    ppo: float = 0.3  # fraction of the rest whose prompts only PPO sees
    held_out: float = 0.2  # fraction of the labelers, where they are known, who write no training data
    prefix: int = 64  # conversations that begin with the same so many characters are one; 0: only equal beginnings
    own_text: bool = False  # also write pretrain.*.bin from the conversations, all replies, to pretrain a small model on
    seed: int = 0  # of the splits and of who is held out

    def __post_init__(self):
        if min(self.valid, self.test, self.judge, self.held_out) < 0 or self.valid + self.test + self.judge >= 1:
            raise ValueError("--valid, --test, --judge and --held_out are fractions, the first three under 1 together")
        if not 0 <= self.ppo < 1 or self.held_out >= 1:
            raise ValueError("--ppo and --held_out are fractions from 0 to under 1")
        if self.vocab_size and not 257 <= self.vocab_size <= 65_536:
            raise ValueError("--vocab_size is from 257 (bytes and the end of text) to 65536 (uint16), or 0")
        if self.context < 4 or self.prefix < 0:
            raise ValueError("--context is at least 4, --prefix at least 0")
        if not self.out:
            raise ValueError("--out is the folder to fill")
        if self.bpe and self.vocab_size:
            raise ValueError("--bpe is GPT-2's vocabulary, --vocab_size a new one: say one of them")


def find(source, suffixes):
    """The files that --source names: itself, or those below it with these suffixes, in order."""
    root = Path(source)
    paths = sorted(p for p in root.rglob("*") if p.name.endswith(suffixes)) if root.is_dir() else [root]
    if not paths:
        raise UserError(f"{root} holds no file that ends with {', '.join(suffixes)}")
    return paths


def chat(turns):
    """[(role, text)] -> the prompt that asks for the assistant's next turn: "Human: Hi\\n\\nAssistant:". Its response
    begins with a space, as in HH-RLHF. A system's text stands at the top."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "\n\n".join([*(names[role] + text.strip() for role, text in turns), "Assistant:"])


def reply(text):
    return " " + text.strip()


def as_prompt(text, data):
    """A question in the form of the prompts of the dataset in the folder `data`: a conversation, or a line, or as it is."""
    path = Path(data) / "prompts.test.jsonl"
    example = read_jsonl(path, "prompts")[0]["prompt"] if path.is_file() else ""
    if example.endswith("\n\nAssistant:"):
        return chat([("user", text)])
    return text + "\n" if example.endswith("\n") else text


def nobody(opening):
    """A user's name for a conversation of nobody in particular."""
    return "conversation-" + hashlib.sha256(opening.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def ranking(record, responses, ranks, labeler):
    """A comparison, its ranks made 1 (best), 2, ... without gaps; and, as the best-ranked response is a demonstration, that,
    unless all are tied."""
    order = sorted(set(ranks))
    records = [{**record, "responses": responses, "ranks": [order.index(rank) + 1 for rank in ranks], "labeler": labeler}]
    if len(order) > 1:
        records.append({**record, "response": responses[ranks.index(order[0])], "labeler": labeler})
    return records


# ---------------------------------------------------------------- what is left out, and why

def fitting(records, tokenizer, context, dropped):
    """The records whose prompt takes 1 to context / 2 tokens and whose responses, their end of text included, do too. A
    comparison loses the responses that don't, and is left out if no two of different rank remain."""
    half, kept = context // 2, []

    def lengths(texts):
        return map(len, tokenizer.encode_batch(texts))

    for r, length in zip(records, lengths([r["prompt"] for r in records])):
        if not r["prompt"].strip():
            dropped["empty prompt"] += 1
        elif length > half:
            dropped[f"prompt over {half} tokens"] += 1
        else:
            kept.append(r)
    records, kept = kept, []
    texts = {text: None for r in records for text in (*r.get("responses", ()), *([r["response"]] if "response" in r else ()))}
    texts = dict(zip(texts, lengths(list(texts))))
    bad = f"response empty or over {half - 1} tokens"

    def good(text):
        return text.strip() and texts[text] < half

    for r in records:
        if "response" in r and not good(r["response"]):
            dropped[bad] += 1
        elif "responses" in r:
            pairs = [(text, rank) for text, rank in zip(r["responses"], r["ranks"]) if good(text)]
            dropped[bad] += len(r["responses"]) - len(pairs)
            if len({rank for _, rank in pairs}) < 2 or len({text for text, _ in pairs}) < 2:
                dropped["comparison without two ranks, or of equal responses"] += 1
            else:
                kept.append({**r, "responses": [text for text, _ in pairs], "ranks": [rank for _, rank in pairs]})
        else:
            kept.append(r)
    return kept


def clean(records, prefix, dropped):
    """The project's cleaning (data/cleaning.py): personal data is looked for in each prompt; duplicates, and more than 200
    of one customer, among the conversations' openings."""
    left = cleaning.without_personal_data(records)
    dropped["personal data in the prompt"] += len(records) - len(left)
    openings = {}  # the same words by another user are a duplicate, too
    for r in left:
        openings.setdefault(r["opening"], {"prompt": r["opening"], "user": r["user"]})
    kept = list(openings.values())
    for why, step in (("conversation begins like another", lambda rows: cleaning.deduplicate(rows, prefix)),
                      ("more than 200 conversations of one customer", cleaning.limit_per_customer)):
        kept = step(kept)
        names = {(r["prompt"], r["user"]) for r in kept}
        result = [r for r in left if (r["opening"], r["user"]) in names]
        dropped[why] += len(left) - len(result)
        left = result
    return left


def distinct(records):
    """Without records that say the same."""
    seen, kept = set(), []
    for r in records:
        key = (r["prompt"], r.get("response"), tuple(r.get("responses", ())), tuple(r.get("ranks", ())), r.get("labeler"))
        if key not in seen:
            seen.add(key)
            kept.append(r)
    return kept


# ---------------------------------------------------------------- the folder

def split(records, config):
    """-> {"test", "valid", "judge", "train": records}, every user's on one side; and the users whose prompts are PPO's: of
    the training users a part, and those who gave prompts only."""
    users = list(dict.fromkeys(r["user"] for r in records))
    sizes = {name: round(len(users) * getattr(config, name)) for name in ("test", "valid", "judge")}
    if not any("responses" in r for r in records):
        sizes["judge"] = 0  # there is nothing to train one on
    sides = cleaning.split_by_customer([{"user": user} for user in users], sizes, config.seed)
    side = {r["user"]: name for name, rows in sides.items() for r in rows}
    labeled = {r["user"] for r in records if "labeler" in r}
    train = [user for user in users if side[user] == "train" and user in labeled]
    unlabeled = set(random.Random(f"{config.seed}/ppo").sample(train, round(len(train) * config.ppo)))
    return {name: [r for r in records if side[r["user"]] == name] for name in sides}, unlabeled | set(users) - labeled


def hold_out(records, valid, config):
    """The labelers who write no training data, of those whose comparisons for validation measure what that means; none
    where there is but one."""
    everyone = {r["labeler"] for r in records if "responses" in r}
    names = sorted({r["labeler"] for r in valid if "responses" in r})
    count = min(round(len(everyone) * config.held_out), len(everyone) - 1, len(names))
    return set(random.Random(f"{config.seed}/labelers").sample(names, max(0, count)))


def publish(records, config, dropped):
    """Clean, split and write: into `out` the dataset, into `out`/judge what trains evaluate.py's judge. `dropped` counts
    what the reader has left out already. Prints the sizes and what was dropped as tables."""
    records, dropped, out = list(records), Counter(dropped), Path(config.out)
    if not records:
        raise UserError(f"{config.source or 'the download'}: no records" + "".join(f"; {n:,} {why}" for why, n in
                                                                                 dropped.items() if n))
    total = len(records)
    unique = distinct(records)
    dropped["said twice"] += total - len(unique)
    sides, unlabeled = split(clean(unique, config.prefix, dropped), config)

    def own(name):
        """The texts of a side: each prompt with each of its responses."""
        return (f"{r['prompt']}{text}" for r in sides[name] for text in (r.get("responses") or [r.get("response", "")]))

    if config.vocab_size:
        tokenizer = Tokenizer(out.name, train_bpe(own("train"), config.vocab_size))
    else:
        tokenizer = Tokenizer.gpt2(config.bpe)
    sides = {name: fitting(rows, tokenizer, config.context, dropped) for name, rows in sides.items()}
    strangers = hold_out([r for rows in sides.values() for r in rows], sides["valid"], config)
    labeled = {r["opening"] for r in sides["train"] if "labeler" in r and r["user"] not in unlabeled}

    def kinds(rows, trained=True):
        known = [r for r in rows if not (trained and r.get("labeler") in strangers)]
        dropped["for training, but by a held-out labeler"] += len(rows) - len(known)
        return {"demonstrations": [r for r in known if "response" in r], "comparisons": [r for r in known if "responses" in r]}

    def prompts(rows):
        bare = ({k: v for k, v in r.items() if k not in ("response", "responses", "ranks", "labeler")} for r in rows)
        return {"prompts": list({r["prompt"]: r for r in bare}.values())}

    def for_ppo(r):
        """Whether it is PPO's alone: of a user set apart for that, or of a conversation without any label."""
        return r["user"] in unlabeled or r["opening"] not in labeled

    files = {
        "train": kinds([r for r in sides["train"] if not for_ppo(r)]) | prompts([r for r in sides["train"] if for_ppo(r)]),
        "valid": kinds(sides["valid"], trained=False) | prompts(sides["valid"]),
        "test": prompts(sides["test"]),
        "judge": kinds(sides["judge"], trained=False),
    }
    dropped["prompt alone, in a conversation that trains by labels"] += sum(
        "labeler" not in r and not for_ppo(r) for r in sides["train"])
    dropped["prompt alone, in a conversation for the judge"] += sum("labeler" not in r for r in sides["judge"])
    dropped["label in a conversation that only gives prompts"] += sum(
        "labeler" in r and (name == "test" or for_ppo(r)) for name in ("train", "test") for r in sides[name])
    if not any(files["train"].values()):
        raise UserError(f"{config.source or 'the download'}: nothing is left to train on; {show(dropped)}")
    if config.own_text and not any(own("valid")):
        raise UserError(f"--own_text: no conversation is left for validation; raise --valid {config.valid}")
    if fingerprint_of(out) != tokenizer.fingerprint:
        for path in out.glob("pretrain.*.bin"):
            print(f"{path} was of another vocabulary and is deleted")
            path.unlink()
    for name, by_kind in files.items():
        for kind, rows in by_kind.items():
            write(out / "judge" / f"{kind}.train.jsonl" if name == "judge" else out / f"{kind}.{name}.jsonl", rows)
    write(out / "judge" / "comparisons.valid.jsonl", files["valid"]["comparisons"])
    if config.own_text:
        held_out = dict.fromkeys(own("valid"))
        trained = [text for text in dict.fromkeys(own("train")) if text not in held_out]
        write_tokens(out / "pretrain.train.bin", trained, tokenizer)
        write_tokens(out / "pretrain.valid.bin", held_out, tokenizer)
    elif (out / "pretrain.train.bin").is_file():
        print(f"{out}/pretrain.*.bin is kept from before; if it was made with --own_text, it may contain this split's held-out texts")
    tokenizer.save(out / "judge")
    tokenizer.save(out)
    report(files, sides, strangers, total, dropped, tokenizer, out)


def fingerprint_of(folder):
    """The fingerprint of the vocabulary that a folder has so far; None where it has none, or a damaged one."""
    try:
        return Tokenizer.load(folder).fingerprint
    except UserError:
        return None


def write(path, rows):
    """The file of these rows; without rows, no file: what an earlier run left there is not this dataset's."""
    if rows:
        write_jsonl(path, [{key: value for key, value in r.items() if key != "opening"} for r in rows])
    else:
        path.unlink(missing_ok=True)


def show(dropped):
    return ", ".join(f"{n:,} {why}" for why, n in dropped.items() if n) or "nothing was dropped"


def report(files, sides, strangers, total, dropped, tokenizer, out):
    """Sizes by split, in number of prompts, as in the paper's Table 6; and what was left out, and why."""
    print(f"{out}: {total:,} demonstrations, comparisons and bare prompts read; vocabulary {tokenizer.name} of "
          f"{tokenizer.vocab_size:,}\n")
    print(f"{'':<16}" + "".join(f"{name:>10}" for name in files))
    for kind in ("demonstrations", "comparisons", "prompts"):
        sizes = [len(by_kind[kind]) if kind in by_kind else None for by_kind in files.values()]
        print(f"{kind:<16}" + "".join(f"{'-' if n is None else format(n, ',d'):>10}" for n in sizes))
    print(f"{'customers':<16}" + "".join(f"{len({r['user'] for r in sides[name]}):>10,}" for name in files))
    compared = [r for name in files for r in files[name].get("comparisons", ())]
    if compared:
        mean = sum(len(r["responses"]) for r in compared) / len(compared)
        labelers = len({r["labeler"] for r in compared})
        print(f"\n{labelers:,} labelers, {len(strangers)} of them held out; K = {mean:.1f} on average")
    for name, needed in (("valid", "sft.py and reward.py"), ("test", "evaluate.py")):
        if not any(files[name].values()):
            print(f"\nnothing is left for {name}, which {needed} will miss: raise --{name}, or bring more conversations")
    print("\nleft out:" + ("" if any(dropped.values()) else " nothing"))
    for why, n in dropped.most_common():
        if n:
            print(f"{n:>10,}  {why}")
