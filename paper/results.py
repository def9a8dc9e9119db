"""What was measured, put together: means over prompts and seeds with their intervals, and verdicts on claims.

Every number is a mean with a 95% interval. Of one seed, the interval is over the items (prompts, questions, tasks)
alone. Of several seeds it is the root of the summed squares of two: over the items, each averaged over the seeds, and
over the seeds' means (Student's t). Seeds share the dataset, its comparisons and the baseline's responses, so the
interval does not include the variation between datasets. A verdict depends on the interval: "agrees" and "does not
agree" if all of it lies on one side, "open" otherwise.
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from data import readers
from data.judges import win_rates
from data.tinyworld import evaluation
from paper import measure
from paper.stats import mean_and_error

# Student's t, 95%, by the number of seeds.
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def estimate(rows):
    """rows[seed][item] (None where an item does not apply) -> (mean, half the width of its 95% interval, number of
    seeds)."""
    by_item = [[x for x in row if x is not None] for row in zip(*rows, strict=True)]  # [item][seed]
    mean, error, _ = mean_and_error([sum(row) / len(row) for row in by_item if row])
    seeds = max(map(len, by_item), default=0)
    if seeds > 1:
        complete = [row for row in by_item if len(row) == seeds]
        seed_means = [sum(row[k] for row in complete) / len(complete) for k in range(seeds)]
        _, seed_error, _ = mean_and_error(seed_means)
        error = (error ** 2 + (seed_error / 1.96 * T[min(seeds, max(T))]) ** 2) ** 0.5
    return mean, error, seeds


class Measurements:
    """The files of paper/measure.py, each read when it is first needed."""

    def __init__(self, config):
        self.config, self.folder, self.cache = config, Path(config.out) / "measured", {}
        groups = sorted(path.parts[-3] for path in self.folder.glob("*/sft/model.json"))
        if not groups:
            raise UserError(f"{self.folder} holds no measurements; `make paper` makes them")
        self.seeds = {}  # size: its groups, SIZE-SEED
        for group in groups:
            self.seeds.setdefault(group.rpartition("-")[0], []).append(group)
        self.parameters = {size: self.read(f"{groups[0]}/sft/model")["parameters"]
                           for size, groups in self.seeds.items()}
        self.sizes = sorted(self.seeds, key=self.parameters.get)

    def read(self, name):
        if name not in self.cache:
            self.cache[name] = measure.read(self.folder / f"{name}.json")
        return self.cache[name]

    def items(self, size, files, key):
        """For each seed for which all `files` were measured: the list of items of each file. A key may be several
        lists' keys: their items are joined."""
        keys = [key] if isinstance(key, str) else key
        groups = [group for group in self.seeds[size]
                  if all((self.folder / group / f"{file}.json").exists() for file in files)]
        rows = []
        for group in groups or self.seeds[size][:1]:
            try:
                numbers = [self.read(f"{group}/{file}")["numbers"] for file in files]
                rows.append([sum((by_key[k] for k in keys), []) for by_key in numbers])
            except KeyError as missing:
                raise UserError(f"{self.folder / group}: a file of {', '.join(files)} lacks {missing}; "
                                "delete it and make it again") from None
        if len({len(items) for row in rows for items in row}) != 1:
            raise UserError(f"{self.folder}: files of {size}, {', '.join(files)}, hold different numbers of items")
        return rows

    def mean(self, size, file, key):
        return estimate([items for [items] in self.items(size, [file], key)])

    def weighted(self, size, terms, key, part=slice(None)):
        """The mean of a sum of (weight, file) terms, item by item and seed by seed, over all items or some."""
        weights, files = zip(*terms)
        rows = []
        for by_file in self.items(size, files, key):
            rows.append([None if None in row else sum(w * x for w, x in zip(weights, row))
                         for row in zip(*by_file)][part])
        return estimate(rows)

    def change(self, size, file, before, key, part=slice(None)):
        """The mean of `file` minus that of `before`."""
        return self.weighted(size, [(1, file), (-1, before)], key, part)

    def duel(self, size, file, other_size, other_file):
        """How often held-out labelers prefer the responses of a file to those of another one's first seed."""
        records = readers.read_jsonl(f"{self.config.data}/prompts.test.jsonl", "requests")
        opponent = self.read(f"{self.seeds[other_size][0]}/{other_file}")["responses"]
        _, held_out = evaluation.judges(records, 3, 0)
        rows = []
        for group in self.seeds[size]:
            responses = self.read(f"{group}/{file}")["responses"]
            n = len(responses)
            rows.append(win_rates(held_out, records[:n], responses, opponent[:n]))
        return estimate(rows)

    def abilities(self):
        """The keys of all zero-shot tasks of the alignment tax."""
        numbers = self.read(f"{self.seeds[self.sizes[0]][0]}/sft/model")["numbers"]
        return [key for key in numbers if key.startswith("task: ")]


def seeds_of(number):
    return f"{number[2]} seeds" if number[2] > 1 else "one seed"


def plain(number, signed=False):
    return f"{number[0]:{'+' if signed else ''}.2f} ± {number[1]:.2f}"


def above(number, than=0.0):
    """Is it above `than`? True or False if its whole interval is on one side, None if the interval includes `than`."""
    mean, error = number[:2]
    return None if abs(mean - than) <= error else mean > than


def below(number, than=0.0):
    return None if above(number, than) is None else not above(number, than)


def alike(number, margin):
    """Is a difference at most the margin, in both directions? True if its interval lies within the margin, False if it
    lies outside, otherwise None."""
    mean, error = number[:2]
    if abs(mean) + error < margin:
        return True
    return False if abs(mean) - error > margin else None


def all_of(*verdicts):
    if False in verdicts:
        return False
    return None if None in verdicts else True


def any_of(*verdicts):
    if True in verdicts:
        return True
    return None if None in verdicts else False


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and what is measured here."""
    text: str  # what the paper says
    paper: str  # its number
    here: str  # the number here
    agrees: bool | None  # None: the interval leaves it open

    def row(self):
        verdict = {True: "agrees", False: "**does not agree**", None: "open"}[self.agrees]
        return [self.text, self.paper, self.here, verdict]


# Stands for the paper's number in claims that are expected for other reasons; they are counted separately.
ELSEWHERE = "not in the paper"
