"""What was measured, put together: means over prompts and seeds with their intervals, and verdicts on claims.

Every number is a mean with a 95% interval. Of one seed, the interval is over the items (prompts, questions, tasks) alone. Of
several seeds it is the root of the summed squares of two: over the items, each averaged over the seeds, and over the seeds' means
(Student's t). Seeds share the dataset, its comparisons and the baseline's responses, so what another dataset would change is not in
it. A verdict goes by the interval: "agrees" and "does not agree" where all of it lies on one side, "open" otherwise.
"""

from dataclasses import dataclass
from pathlib import Path

import evaluate
from common import UserError
from data import readers
from data.tinyworld import labelers
from paper import measure

T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's, 95%, by how many


def estimate(rows):
    """rows[seed][item] (None where an item does not apply) -> (mean, half the width of its 95% interval, how many seeds)."""
    rows = [[x for x in row if x is not None] for row in zip(*rows, strict=True)]  # [item][seed]
    items = [sum(row) / len(row) for row in rows if row]
    mean, error, _ = evaluate.mean_and_error(items)
    seeds = max(map(len, rows), default=0)
    if seeds > 1:
        kept = [row for row in rows if len(row) == seeds]
        _, spread, _ = evaluate.mean_and_error([sum(row[k] for row in kept) / len(kept) for k in range(seeds)])
        error = (error ** 2 + (spread / 1.96 * T[min(seeds, max(T))]) ** 2) ** 0.5
    return mean, error, seeds


class Measurements:
    """The files of paper/measure.py, read when they are first asked for."""

    def __init__(self, config):
        self.config, self.folder, self.read = config, Path(config.out) / "measured", {}
        groups = sorted(path.parts[-3] for path in self.folder.glob("*/sft/model.json"))
        if not groups:
            raise UserError(f"{self.folder} holds no measurements; `make paper` makes them")
        self.seeds = {}  # size -> its groups, SIZE-SEED
        for group in groups:
            self.seeds.setdefault(group.rpartition("-")[0], []).append(group)
        self.parameters = {size: self.of(f"{groups[0]}/sft/model")["parameters"] for size, groups in self.seeds.items()}
        self.sizes = sorted(self.seeds, key=self.parameters.get)

    def of(self, name):
        if name not in self.read:
            self.read[name] = measure.read(self.folder / f"{name}.json")
        return self.read[name]

    def items(self, size, files, key):
        """For each seed of which all `files` are measured: of each file the list of its items. A key of several lists is all
        their items."""
        keys = [key] if isinstance(key, str) else key
        groups = [g for g in self.seeds[size] if all((self.folder / g / f"{file}.json").exists() for file in files)]
        rows = []
        for group in groups or self.seeds[size][:1]:
            try:
                rows.append([sum((self.of(f"{group}/{file}")["numbers"][k] for k in keys), []) for file in files])
            except KeyError as missing:
                raise UserError(f"{self.folder / group}: a file of {', '.join(files)} lacks {missing}; delete it and make it again") from None
        if len({len(items) for row in rows for items in row}) != 1:
            raise UserError(f"{self.folder}: files of {size}, {', '.join(files)}, hold different numbers of items")
        return rows

    def mean(self, size, file, key):
        return estimate([items for [items] in self.items(size, [file], key)])

    def weighted(self, size, terms, key, part=slice(None)):
        """The mean of a sum of (weight, file) terms, item by item and seed by seed, over all items or a part of them."""
        weights, files = zip(*terms)
        return estimate([[None if None in row else sum(w * x for w, x in zip(weights, row)) for row in zip(*by_file)][part]
                         for by_file in self.items(size, files, key)])

    def change(self, size, file, than, key, part=slice(None)):
        return self.weighted(size, [(1, file), (-1, than)], key, part)

    def duel(self, size, file, other, theirs):
        """How often the responses of one file of a size are preferred to those of another's first seed, by held-out labelers."""
        records = readers.read_jsonl(f"{self.config.data}/prompts.test.jsonl", "requests")
        against = self.of(f"{self.seeds[other][0]}/{theirs}")["responses"]
        said = [self.of(f"{group}/{file}")["responses"] for group in self.seeds[size]]
        return estimate([evaluate.win_rates(records[: len(ours)], ours, against, labelers.team()[1], 3, 0) for ours in said])

    def abilities(self):
        """The keys of all zero-shot tasks of the alignment tax."""
        return [key for key in self.of(f"{self.seeds[self.sizes[0]][0]}/sft/model")["numbers"] if key.startswith("task: ")]


def seeds_of(number):
    return f"{number[2]} seeds" if number[2] > 1 else "one seed"


def plain(number, signed=False):
    return f"{number[0]:{'+' if signed else ''}.2f} ± {number[1]:.2f}"


def above(number, than=0.0):
    """Is it above: True or False where its whole interval says so, None where the interval leaves it open."""
    mean, error = number[:2]
    return None if abs(mean - than) <= error else mean > than


def below(number, than=0.0):
    return None if above(number, than) is None else not above(number, than)


def alike(number, margin):
    """Is a difference no larger than the margin either way: True where its interval lies within, False where beyond."""
    mean, error = number[:2]
    return True if abs(mean) + error < margin else False if abs(mean) - error > margin else None


def all_of(*verdicts):
    return False if False in verdicts else None if None in verdicts else True


def any_of(*verdicts):
    return True if True in verdicts else None if None in verdicts else False


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, and what is seen here."""
    text: str  # what the paper says
    paper: str  # its number
    here: str  # the number here
    agrees: bool | None  # None: the interval leaves it open

    def row(self):
        return [self.text, self.paper, self.here, {True: "agrees", False: "**does not agree**", None: "open"}[self.agrees]]


ELSEWHERE = "not in the paper"  # the paper's number of what is expected for other reasons; such claims are counted apart
