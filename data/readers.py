"""From files to tensors: JSON Lines with errors that name the line, examples, padding, pretraining rows.

Shapes: B rows, T tokens, R response (or target) tokens. Rows are padded at the end with the end-of-text token, which changes
nothing before it in a causal model. Masks, never the padding's value, say what counts.
"""

import gzip
import itertools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import UserError
from common.files import write_atomically
from common.seeds import generator

KEYS = {  # what a record of each file must have, and its type
    "demonstrations": {"prompt": str, "response": str},
    "comparisons": {"prompt": str, "responses": list, "ranks": list, "labeler": str},
    "prompts": {"prompt": str, "user": str},
    "requests": {"prompt": str, "user": str, "use_case": str, "asks": dict},  # prompts that the Vale's labelers can judge
    "judged": {"prompt": str, "responses": list, "ranks": list, "labeler": str, "asks": dict},  # comparisons, likewise
    "tasks": {"task": str, "context": str},
}


def read_jsonl(path, kind, made_by="make data"):
    """The records of a JSON Lines file of one of the KEYS. UserError names the file and the line."""
    records = []
    for place, record in json_lines(path, made_by, strict=True):
        for key, type_ in KEYS[kind].items():
            if not isinstance(record.get(key), type_):
                raise UserError(f"{place}: no {key!r}, or it is no {type_.__name__}")
        check(record, kind, place)
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records")
    return records


def json_lines(path, made_by=None, strict=False):
    """(file:line, object) for each line of a JSON Lines file, which may be gzipped. Empty lines are skipped or, if
    `strict`, refused: the stages rely on record n being in line n."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing" + (f"; in the default run `{made_by}` makes it" if made_by else ""))
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if not line.strip() and not strict:
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # UnicodeDecodeError is one
                    raise UserError(f"{place}: not JSON ({error})") from None
                except RecursionError:
                    raise UserError(f"{place}: not JSON (nested too deep)") from None
                if not isinstance(record, dict):
                    raise UserError(f"{place}: not a JSON object")
                yield place, record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged gzip ({error})") from None


def check(record, kind, place):
    """What types can't say of a record."""
    if kind in ("requests", "judged") and not isinstance(record["asks"].get("form"), str):
        raise UserError(f"{place}: `asks` does not say which form is asked for")
    if kind != "tasks" and not record["prompt"]:
        raise UserError(f"{place}: empty prompt")
    if kind == "demonstrations" and not record["response"]:
        raise UserError(f"{place}: empty response")
    if kind in ("comparisons", "judged"):
        responses, ranks = record["responses"], record["ranks"]
        if len(responses) < 2:
            raise UserError(f"{place}: K = {len(responses)} responses; a comparison takes at least 2")
        if len(ranks) != len(responses):
            raise UserError(f"{place}: {len(responses)} responses but {len(ranks)} ranks")
        if not all(isinstance(r, str) for r in responses):
            raise UserError(f"{place}: a response is no string")
        if not all(type(r) is int and 1 <= r < 2**31 for r in ranks):
            raise UserError(f"{place}: ranks are whole numbers from 1 (best)")
    if kind == "tasks":
        if not record["context"]:
            raise UserError(f"{place}: empty context")
        choices = record.get("choices")
        if choices is not None:
            good = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
            if not good or type(record.get("answer")) is not int or record["answer"] not in range(len(choices)):
                raise UserError(f"{place}: `choices` must be strings and `answer` the index of one")
        elif not isinstance(record.get("target"), str) or not record["target"]:
            raise UserError(f"{place}: neither `choices` with `answer` nor a `target`")


def write_jsonl(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="surrogatepass"))


def encode_prompts(records, tokenizer, maximum, path, first=1):
    """The token ids of each record's prompt; the records start at line `first` of `path`. UserError if one has more than
    `maximum` tokens, or none."""
    if maximum < 1:
        raise UserError("--max_new_tokens leaves no room for a prompt in the context")
    prompts = [tokenizer.encode(r["prompt"]) for r in records]
    for number, ids in enumerate(prompts, first):
        if not 1 <= len(ids) <= maximum:
            raise UserError(f"{path}:{number}: a prompt of {len(ids)} tokens; this run takes 1 to {maximum}")
    return prompts


# ---------------------------------------------------------------- examples and batches

def example(prompt, response, tokenizer):
    """tokens(prompt), tokens(response) + [end of text]: tokenized separately, as they are when a response is sampled."""
    return tokenizer.encode(prompt), tokenizer.encode(response) + [tokenizer.end_of_text]


def length(pair):
    """Number of tokens of an example, or of any (context ids, target ids)."""
    return len(pair[0]) + len(pair[1])


def pad(rows, value):
    """Rows of unequal length -> (B, T), padded at the end: pad([[5, 6], [7]], 0) = [[5, 6], [7, 0]]."""
    longest = max(map(len, rows))
    return torch.from_numpy(np.array([[*row] + [value] * (longest - len(row)) for row in rows], dtype=np.int64))


def to_device(tensor, device):
    """A copy on the device. The CPU goes on while it is made."""
    if device is not None and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Batch:
    """Examples as tensors. Prompt 7 8, response 9 and end of text 0: tokens [7 8 9 0], positions [1 2]: the model must
    predict 9 after 8, and 0 after 9."""
    tokens: torch.Tensor  # (B, T) prompt and response, padded at the end
    positions: torch.Tensor  # (B, R) the positions that predict the R response tokens
    mask: torch.Tensor  # (B, R) which of them exist: rows with shorter responses are padded
    count: int  # of tokens in the mask


def make_batch(pairs, end_of_text, device=None):
    """B pairs of (context ids, target ids) -> Batch."""
    tokens = pad([context + target for context, target in pairs], end_of_text)  # (B, T)
    starts = torch.tensor([len(context) for context, _ in pairs])  # (B,)
    lengths = torch.tensor([len(target) for _, target in pairs])  # (B,)
    r = torch.arange(max(len(target) for _, target in pairs))  # (R,)
    mask = r < lengths[:, None]  # (B, R)
    positions = (starts[:, None] - 1 + r) * mask  # (B, R), 0 outside the mask
    return Batch(*(to_device(x, device) for x in (tokens, positions, mask)), int(lengths.sum()))


def last_scores(model, examples, end_of_text, device):
    """A scalar model's output at the end of text of each example: B (prompt ids, response ids) -> (B,). A truncated response
    gets an end of text, which the reward model has seen at the end of every response in its training."""
    rows = [prompt + response if response[-1] == end_of_text else prompt + response + [end_of_text]
            for prompt, response in examples]
    last = torch.tensor([[len(row) - 1] for row in rows])  # (B, 1)
    return model(to_device(pad(rows, end_of_text), device), to_device(last, device)).squeeze(1)


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
    """Rows of a pretrain.*.bin, memory-mapped. A row is one document with its end-of-text token, starting at position 0. A
    document longer than the context becomes several rows. (Windows cut anywhere from one stream teach a small model far
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
        """Rows as (context, target) pairs for `make_batch`: all but the first token are targets."""
        rows = [self.tokens[slice(*self.rows[i])].tolist() for i in indices]
        return [(row[:1], row[1:]) for row in rows]

    def draw(self, count, seed, stage, step, pool=32):
        """`count` row indices for a step of a stage; no two stages draw the same. Every `pool` steps divide one random draw of
        rows so that the rows of a step have similar lengths, and take their turns in random order. No row occurs twice in
        a pass over them; rows that do not fill a pool are left out of that pass."""
        per_pass = max(1, len(self.rows) // (count * pool))  # pools in one pass over the rows
        pool_number, turn = divmod(step, pool)
        pass_number, i = divmod(pool_number, per_pass)
        numbers = generator(seed, f"{stage}: pretraining pass", pass_number)
        shuffled = torch.randperm(len(self.rows), generator=numbers).tolist()
        if len(shuffled) < count * pool:
            shuffled = list(itertools.islice(itertools.cycle(shuffled), count * pool))
        rows = shuffled[i * count * pool : (i + 1) * count * pool]
        rows.sort(key=lambda i: self.rows[i][1] - self.rows[i][0])
        numbers = generator(seed, f"{stage}: pretraining turn", pool_number)
        first = torch.randperm(pool, generator=numbers)[turn].item() * count
        return rows[first : first + count]
