"""Pairs of responses for people to judge, in a table that any spreadsheet opens.

A row is a prompt with two responses, one of them the baseline's, in random order. The person writes `first`, `second`
or `tie` into the last column. A second file, the key, records whose response is whose.
"""

import csv
import hashlib
import io
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from common.files import write_atomically

COLUMNS = ("pair", "prompt", "first", "second", "preferred")
WIN_OF_FIRST = {"first": 1.0, "second": 0.0, "tie": 0.5}  # how much of a win each answer is for the first response
# What a spreadsheet may take for a formula, and run: some look behind white space, some know the wide characters.
FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")


@dataclass(frozen=True)
class Answer:
    """What people answered about one pair."""
    prompt: str
    user: str  # the customer who sent the prompt
    response: str  # the model's
    baseline: str  # the baseline's response
    win: float  # how much of a win the model's response is: the mean, if several people judged the pair


def draw(records, responses, same, baseline, count, seed):
    """-> (rows of the table, sides: {pair: (model of the first response, model of the second, user, prompt, first
    response, second response)}). responses: {model: one response to each record's prompt}. Each model except `same`
    and `baseline`, which are one model, is paired with the baseline on the first `count` prompts; the pairs are
    shuffled."""
    rng = random.Random(f"{seed}/pairs")
    chosen = [(name, i) for name in responses if name not in (same, baseline) for i in range(min(count, len(records)))]
    rng.shuffle(chosen)
    rows, sides = [], {}
    for number, (name, i) in enumerate(chosen, 1):
        first, second = (name, baseline) if rng.random() < 0.5 else (baseline, name)
        prompt, texts = records[i]["prompt"], (responses[first][i], responses[second][i])
        sides[str(number)] = first, second, records[i]["user"], prompt, *texts
        rows.append([str(number), prompt, *texts, ""])
    return rows, sides


def write(path, rows, sides, models):
    """The table at `path` and its key next to it. models: {model: a fingerprint}, to detect later if a model has
    changed. A text that might be a formula gets a leading apostrophe, as is usual in spreadsheets."""
    rows = [["'" + cell if FORMULA.match(cell) else cell for cell in row] for row in rows]
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    key = json.dumps({"models": models, "sides": sides})
    write_atomically(path, lambda temporary: temporary.write_bytes(text.getvalue().encode("utf-8", "replace")))
    write_atomically(key_of(path), lambda temporary: temporary.write_text(key))


def write_new(path, count, records, responses, same, baseline, seed, models):
    """`draw` and `write`."""
    rows, sides = draw(records, responses, same, baseline, count, seed)
    write(path, rows, sides, models)
    print(f"{path}: {len(rows)} pairs for people to judge; with answers in its last column, run this again")


def fingerprint(model):
    """Identifies a model's weights."""
    total = hashlib.sha256()
    for weight in model.state_dict().values():
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded
        total.update(weight.cpu().numpy().tobytes())
    return total.hexdigest()


def key_of(path):
    return Path(path).with_suffix(".key.json")


def read_table(path):
    """-> the table's rows as {column: cell}."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 with commas between the columns ({error})") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"pair", "preferred"} <= set(header):
        raise UserError(f"{path}: its first line has no columns `pair` and `preferred`, with a comma between")
    return [dict(zip(header, (cell.strip() for cell in row))) for row in rows[1:]]


def read_key(path):
    """What `write` put into the key of this table. UserError if it is missing or damaged."""
    try:
        key = json.loads(key_of(path).read_text())
        if all(isinstance(side, list) and len(side) >= 2 and all(isinstance(text, str) for text in side)
               for side in key["sides"].values()) and isinstance(key["models"], dict):
            return key
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{key_of(path)} is missing or damaged: without it nobody knows whose responses are whose")


def same_pair(row, texts):
    """Whether a row shows a pair with these texts (prompt, first and second response), as far as it shows them: at least two
    of the three must be equal, since spreadsheets change some texts."""
    def plain(text):
        return "".join(text.encode("utf-8", "replace").decode().split()).lstrip("'")

    equal = [plain(row[column]) == plain(text) for column, text in zip(("prompt", "first", "second"), texts) if column in row]
    return len(equal) < 3 or sum(equal) >= 2


def read(path, baseline, models):
    """What people answered -> {model: its Answers, one per pair}; {} if there is no table or nobody has filled it in.
    UserError names what cannot be understood."""
    path = Path(path)
    if not path.is_file():
        return {}
    rows = [row for row in read_table(path) if row.get("preferred", "").lower() not in ("", "preferred")]  # judged
    if not rows:
        return {}
    key = read_key(path)
    wins = defaultdict(list)  # pair: how much of a win for the model, one number per person
    for row in rows:
        pair, preferred = row.get("pair", ""), row["preferred"].lower()
        if preferred not in WIN_OF_FIRST:
            raise UserError(f"{path}: pair {pair}: {preferred!r} is none of first, second, tie")
        if pair not in key["sides"]:
            raise UserError(f"{path}: {pair!r} is no pair of this table")
        if not same_pair(row, key["sides"][pair][3:]):
            raise UserError(f"{path}: pair {pair} has other texts than in {key_of(path).name}, which belongs to another table")
        win = WIN_OF_FIRST[preferred]
        wins[pair].append(1 - win if key["sides"][pair][0] == baseline else win)
    if wins and key["models"] != models:
        raise UserError(f"{path}: people have judged other models than these; move it and its key away to keep it")
    answers = defaultdict(list)
    for pair, numbers in wins.items():
        side = key["sides"][pair]
        # Keys of earlier versions have no texts, perhaps no user: the pair's number and the models' names replace them.
        replacements = (pair, f"pair {pair}", side[0], side[1])
        first, second, user, prompt, *texts = (*side, *replacements[len(side) - 2 :])
        model, response, other = (second, *texts[::-1]) if first == baseline else (first, *texts)
        answers[model].append(Answer(prompt, user, response, other, sum(numbers) / len(numbers)))
    return dict(answers)
