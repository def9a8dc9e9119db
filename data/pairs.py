"""Pairs of responses for people to judge, in a table that any spreadsheet opens.

A row is a prompt with two responses, of which one is the baseline's, in an order that tells nothing. Who judges writes
`first`, `second` or `tie` into the last column. Whose response is whose stands in a file beside it, the key.
"""

import csv
import io
import json
import random
import re
from collections import defaultdict
from pathlib import Path

from common import UserError, write_atomically

COLUMNS = ("pair", "prompt", "first", "second", "preferred")
WON = {"first": 1.0, "second": 0.0, "tie": 0.5}  # how much of a win it is for the first
# What a spreadsheet may take for a formula, and run: some look behind white space, some know the wide characters.
FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")


def draw(records, responses, same, baseline, count, seed):
    """-> (rows, {pair: (whose response is first, whose is second, whose prompt it is)}): of each model in {model: responses} but `same` and
    `baseline`, which are one model, its responses to the first `count` prompts beside the baseline's, shuffled."""
    rng = random.Random(f"{seed}/pairs")
    chosen = [(name, i) for name in responses if name not in (same, baseline) for i in range(min(count, len(records)))]
    rng.shuffle(chosen)
    rows, sides = [], {}
    for number, (name, i) in enumerate(chosen, 1):
        first, second = (name, baseline) if rng.random() < 0.5 else (baseline, name)
        sides[str(number)] = first, second, records[i]["user"]
        rows.append([str(number), records[i]["prompt"], responses[first][i], responses[second][i], ""])
    return rows, sides


def write(path, rows, sides, models):
    """The table at `path` and its key beside it. models: {model: a fingerprint}, to tell later whether they are the same.
    An apostrophe goes before a text that might be a formula, as is usual: a person reads over it."""
    rows = [["'" + cell if FORMULA.match(cell) else cell for cell in row] for row in rows]
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    key = json.dumps({"models": models, "sides": sides})
    write_atomically(path, lambda temporary: temporary.write_bytes(text.getvalue().encode("utf-8", "replace")))
    write_atomically(key_of(path), lambda temporary: temporary.write_text(key))


def key_of(path):
    return Path(path).with_suffix(".key.json")


def read(path, baseline, models):
    """What people wrote -> {model: (win, user) of each of its pairs}: how much of a win it is, the mean where several people
    judged it, and whose prompt it was; {} where nobody has judged or nothing was written. UserError names what can't be understood."""
    path = Path(path)
    if not path.is_file() or not key_of(path).is_file():
        return {}
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline="")))
        key = json.loads(key_of(path).read_text())
        sides, made_by = key["sides"], key["models"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 with commas between the columns ({error})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{key_of(path)} is damaged: without it nobody knows whose responses are whose") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"pair", "preferred"} <= set(header):
        raise UserError(f"{path}: its first line has no columns `pair` and `preferred`, with a comma between")
    judged = defaultdict(list)  # (model, pair): how much of a win
    for row in rows[1:]:
        cells = dict(zip(header, (cell.strip() for cell in row)))
        pair, said = cells.get("pair", ""), cells.get("preferred", "").lower()
        if said in ("", "preferred"):  # not judged; or another table's first line
            continue
        if said not in WON:
            raise UserError(f"{path}: pair {pair}: {said!r} is none of first, second, tie")
        if pair not in sides:
            raise UserError(f"{path}: {pair!r} is no pair of this table")
        first, second, user = (*sides[pair], pair)[:3]  # an older key has no users: each pair stands for itself
        judged[second if first == baseline else first, pair, user].append(1 - WON[said] if first == baseline else WON[said])
    if judged and made_by != models:
        raise UserError(f"{path}: people have judged other models than these; move it and its key away to keep it")
    wins = defaultdict(list)
    for (name, _, user), numbers in judged.items():
        wins[name].append((sum(numbers) / len(numbers), user))
    return dict(wins)
