"""Means with 95% intervals, and how often a number orders responses as a labeler did. No model is needed here."""

from collections import defaultdict


def ratio(counts, groups=None):
    """A share of pairs, with its 95% interval: counts: (pairs, successes) of each item; groups: the group of each
    item, for example its customer. -> (successes / pairs, half the width of the interval, number of pairs).

    Items of one group are not independent, so the standard error is over the groups' totals, as a ratio estimator,
    because groups differ in size: repeating every item within its group changes nothing. Default: each item is a
    group."""
    if groups is None:
        groups = range(len(counts))
    totals = defaultdict(lambda: (0, 0.0))  # group: (pairs, successes)
    for (n, successes), group in zip(counts, groups, strict=True):
        if n:
            totals[group] = totals[group][0] + n, totals[group][1] + successes
    pairs, m = sum(n for n, _ in totals.values()), len(totals)
    if not pairs:
        return None, None, 0
    share = sum(successes for _, successes in totals.values()) / pairs
    squares = sum((successes - share * n) ** 2 for n, successes in totals.values())
    variance = squares / max(1, m - 1) / m / (pairs / m) ** 2
    return share, 1.96 * variance ** 0.5, pairs


def mean_and_error(numbers, groups=None):
    """-> (mean, half the width of its 95% interval, how many); groups as in `ratio`."""
    return ratio([(1, x) for x in numbers], groups)


def pair_accuracy(numbers, ranks):
    """Over the pairs of responses that the ranks do not tie: (number of pairs, how many of them `numbers` order as the
    ranks do). Equal numbers count half. Rank 1 is the best: numbers 3, 2, 1 and ranks 1, 2, 2 give (2, 2)."""
    pairs = correct = 0
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if ranks[i] < ranks[j]:
                pairs += 1
                correct += 0.5 if numbers[i] == numbers[j] else numbers[i] > numbers[j]
    return pairs, correct
