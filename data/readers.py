"""From files to tensors: JSON Lines with errors that name the line, episodes, padding, pretraining rows.

Shapes: B rows, T tokens. Rows are padded at the end with the end-of-text token, which changes nothing before it in a
causal model; masks, never the padding's value, say what counts.
"""

import gzip
import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from common import UserError, generator, write_atomically

KEYS = {  # what a record of each file must have, and its type
    "demonstrations": {"prompt": str, "response": str},
    "comparisons": {"prompt": str, "responses": list, "ranks": list, "labeler": str},
    "prompts": {"prompt": str, "user": str},
    "requests": {"prompt": str, "user": str, "use_case": str, "asks": dict},  # prompts that the Vale's labelers can judge
    "judged": {"prompt": str, "responses": list, "ranks": list, "labeler": str, "asks": dict},  # comparisons, likewise
    "tasks": {"task": str, "context": str},
}


def read_jsonl(path, kind, made_by="make data"):
    """The records of a JSON Lines file of one of the KEYS. UserError names file and line of what is wrong."""
    records = []
    for where, record in json_lines(path, made_by, strict=True):
        for key, type_ in KEYS[kind].items():
            if not isinstance(record.get(key), type_):
                raise UserError(f"{where}: no {key!r}, or it is no {type_.__name__}")
        check(record, kind, where)
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records")
    return records


def json_lines(path, made_by=None, strict=False):
    """(file:line, object) for each line of a JSON Lines file, which may be gzipped. Empty lines are passed over or, when
    `strict`, refused: the stages count on record n standing in line n."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing" + (f"; in the default run `{made_by}` makes it" if made_by else ""))
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip() and not strict:
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # UnicodeDecodeError is one
                    raise UserError(f"{where}: not JSON ({error})") from None
                except RecursionError:
                    raise UserError(f"{where}: not JSON (nested too deep)") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: not a JSON object")
                yield where, record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged gzip ({error})") from None


def check(record, kind, where):
    """What types can't say of a record."""
    if kind in ("requests", "judged") and not isinstance(record["asks"].get("form"), str):
        raise UserError(f"{where}: `asks` does not say which form is asked for")
    if kind != "tasks" and not record["prompt"]:
        raise UserError(f"{where}: empty prompt")
    if kind == "demonstrations" and not record["response"]:
        raise UserError(f"{where}: empty response")
    if kind in ("comparisons", "judged"):
        responses, ranks = record["responses"], record["ranks"]
        if len(responses) < 2:
            raise UserError(f"{where}: K = {len(responses)} responses; a comparison takes at least 2")
        if len(ranks) != len(responses):
            raise UserError(f"{where}: {len(responses)} responses but {len(ranks)} ranks")
        if not all(isinstance(r, str) for r in responses):
            raise UserError(f"{where}: a response is no string")
        if not all(type(r) is int and 1 <= r < 2**31 for r in ranks):
            raise UserError(f"{where}: ranks are whole numbers from 1 (best)")
    if kind == "tasks":
        if not record["context"]:
            raise UserError(f"{where}: empty context")
        choices = record.get("choices")
        if choices is not None:
            good = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
            if not good or type(record.get("answer")) is not int or record["answer"] not in range(len(choices)):
                raise UserError(f"{where}: `choices` must be strings and `answer` the index of one")
        elif not isinstance(record.get("target"), str) or not record["target"]:
            raise UserError(f"{where}: neither `choices` with `answer` nor a `target`")


def write_jsonl(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="surrogatepass"))


def encode_prompts(records, tokenizer, most, path, first=1):
    """The token ids of each record's prompt, the records standing in `path` from line `first`. UserError where one is
    longer than `most`, or has no tokens."""
    if most < 1:
        raise UserError("--max_new_tokens leaves no room for a prompt in the context")
    prompts = [tokenizer.encode(r["prompt"]) for r in records]
    for number, ids in enumerate(prompts, first):
        if not 1 <= len(ids) <= most:
            raise UserError(f"{path}:{number}: a prompt of {len(ids)} tokens; this run takes 1 to {most}")
    return prompts


def episode(prompt, response, tokenizer):
    """tokens(prompt), tokens(response) + [end of text]: tokenized apart, as they are when a response is sampled."""
    return tokenizer.encode(prompt), tokenizer.encode(response) + [tokenizer.end_of_text]


def length(pair):
    """Tokens of an episode, or of any (context ids, target ids)."""
    return len(pair[0]) + len(pair[1])


def pad(rows, value, device=None, dtype=torch.long):
    """Rows of unequal length -> (B, T), padded at the end: pad([[5, 6], [7]], 0) = [[5, 6], [7, 0]]."""
    table = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return table.to(device)


def batch_of(pairs, end, device=None):
    """(context ids, target ids) pairs -> tokens (B, T), and a mask (B, T) of the positions whose next token is a
    target. Prompt 7 8, response 9 and end 0: tokens [7 8 9 0], mask [0 1 1 0]: 8 must say 9, and 9 must say 0."""
    tokens = pad([prompt + response for prompt, response in pairs], end, device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, response) in enumerate(pairs):
        mask[i, max(len(prompt) - 1, 0) : len(prompt) + len(response) - 1] = True
    return tokens, mask


def last_scores(model, episodes, end, device):
    """The scalar model's output at the last token of each episode. episodes: B (prompt ids, response ids) -> (B,)"""
    rows = [prompt + response for prompt, response in episodes]
    scores = model(pad(rows, end, device))  # (B, T)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    return scores.gather(1, last[:, None]).squeeze(1)


# ---------------------------------------------------------------- pretraining text

def write_tokens(path, documents, tokenizer):
    """documents (an iterable of texts) -> one file of uint16, each document ended by the end-of-text token. Returns how
    many tokens it holds."""
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"a vocabulary of {tokenizer.vocab_size} does not fit {path}: tokens are kept as uint16")
    documents, count = iter(documents), 0

    def write(temporary):
        nonlocal count
        with open(temporary, "wb") as file:
            while some := list(itertools.islice(documents, 1000)):
                ids = [i for row in tokenizer.encode_batch(some) for i in (*row, tokenizer.end_of_text)]
                np.array(ids, dtype=np.uint16).tofile(file)
                count += len(ids)
        if count == 0:
            raise UserError(f"{path}: no document to write")

    write_atomically(path, write)
    return count


class PretrainingText:
    """Rows of a pretrain.*.bin, memory-mapped. A row is a document, its end-of-text token included, from position 0;
    of a document longer than the context, a piece of it. (Windows cut anywhere from a stream teach a small model far
    less: it sees few texts from their beginning.)"""

    def __init__(self, path, tokenizer, context):
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; `make data`, or data/webtext/prepare.py, makes it")
        if Path(path).stat().st_size < 4 or Path(path).stat().st_size % 2:
            raise UserError(f"{path} is cut short: it holds 2 bytes a token")
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        if int(self.tokens.max()) >= tokenizer.vocab_size:
            raise UserError(f"{path} holds token {self.tokens.max()}, but the vocabulary has {tokenizer.vocab_size}")
        ends = np.flatnonzero(self.tokens == tokenizer.end_of_text) + 1
        if len(ends) == 0 or ends[-1] != len(self.tokens):
            ends = np.append(ends, len(self.tokens))
        self.rows, self.documents = [], []  # of each row: (start, end), and the number of its document
        for document, (start, end) in enumerate(zip(np.append(0, ends[:-1]).tolist(), ends.tolist())):
            pieces = [(a, min(a + context, end)) for a in range(start, end, context) if end - a > 1]
            self.rows += pieces
            self.documents += [document] * len(pieces)
        if not self.rows:
            raise UserError(f"{path}: no document of two tokens or more")

    def __len__(self):
        return len(self.rows)

    def pairs(self, indices):
        """Rows as (context, target) pairs for `batch_of`: all but the first token are targets."""
        rows = [self.tokens[slice(*self.rows[i])].tolist() for i in indices]
        return [(row[:1], row[1:]) for row in rows]

    def draw(self, count, seed, stage, step, pool=32):
        """`count` row indices for a step of a stage; no two stages draw the same. Each run of `pool` steps shares out one draw
        of rows so that a step's rows are of similar length, in an order of steps that is shuffled: little padding, no
        pattern. No row comes twice in a pass over them; those that fill no pool are left out of it."""
        per_pass = max(1, len(self.rows) // (count * pool))  # pools in one pass over the rows
        shuffled = torch.randperm(len(self.rows), generator=generator(seed, f"{stage}: pretraining pass", step // pool // per_pass))
        start = step // pool % per_pass * count * pool
        rows = shuffled[start : start + count * pool].tolist() if len(self.rows) >= count * pool else [
            shuffled[i % len(self.rows)].item() for i in range(count * pool)]
        rows.sort(key=lambda i: self.rows[i][1] - self.rows[i][0])
        turn = torch.randperm(pool, generator=generator(seed, f"{stage}: pretraining turn", step // pool))[step % pool].item()
        return rows[turn * count : (turn + 1) * count]
