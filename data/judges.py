"""Judges: who decides which of two responses to a prompt is better.

A judge has a `name` and `compare(prompt, a, b)`: how much of a win a is over b: 1, 0 or, for a tie, 1/2. The mean over
several opinions may be in between. To add a judge, write a class with these two and add it to `evaluate.make_judges`.
"""

import random

import torch

from common.checkpoints import load_checkpoint
from common.config import UserError
from common.files import digest
from data import readers

# Labelers whose rankings the reward model was trained on, and others.
TEAMS = ("training labelers", "held-out labelers")


class Judge:
    """What judges have in common: which pairs they compare. Each adds a `name` and `compare`."""

    def comparisons(self, model, records, responses, baseline):
        """What the judge compares to evaluate a model: a list of (prompt, user, the model's response, the baseline's).
        responses: {model: one response to each record's prompt}. Default: all of them."""
        return [(record["prompt"], record["user"], a, b)
                for record, a, b in zip(records, responses[model], responses[baseline], strict=True)]


def win_rates(judge, records, responses, baseline):
    """`compare` for each record's prompt: how much of a win each response is over the baseline's."""
    return [judge.compare(record["prompt"], a, b) for record, a, b in zip(records, responses, baseline, strict=True)]


# ---------------------------------------------------------------- simulated labelers

def compare_in_random_order(opinions, a, b, rng):
    """How much of a win a is over b for opinions(first, second) -> one number for each; the higher wins. Presentation
    order is random: a judge that always prefers the first response gives 50% in the long run."""
    swapped = rng.random() < 0.5
    first, second = opinions(b, a) if swapped else opinions(a, b)
    if first == second:
        return 0.5
    win = float(first > second)
    return 1 - win if swapped else win


class SimulatedLabelers(Judge):
    """The mean opinion of `count` labelers of a team of the built-in world, drawn for each prompt."""

    def __init__(self, name, team, records, count, seed):
        self.name, self.team, self.count, self.seed = name, team, count, seed
        self.asks = {record["prompt"]: record["asks"] for record in records}  # what labelers know of a prompt

    def compare(self, prompt, a, b):
        rng = random.Random(f"{self.seed}/judges/{prompt}")
        wins = []
        for labeler in rng.sample(self.team, self.count):
            def opinions(first, second):
                return labeler.impressions(prompt, self.asks[prompt], [first, second], seed="evaluation")
            wins.append(compare_in_random_order(opinions, a, b, rng))
        return sum(wins) / self.count


# ---------------------------------------------------------------- a reward model

class RewardModelJudge(Judge):
    """The response with the higher score wins."""
    name = "judge"

    def __init__(self, records, responses, scores):
        """scores: {model: the score of each of its responses}, from `score_responses`."""
        self.scores = {(record["prompt"], text): score for model in scores
                       for record, text, score in zip(records, responses[model], scores[model], strict=True)}

    def compare(self, prompt, a, b):
        first, second = self.scores[prompt, a], self.scores[prompt, b]
        return 0.5 if first == second else float(first > second)


def check_heads(judge, reward_model, policies, runtime):
    """Paths of two reward models and of the policies. UserError if the judge started from the same random head (reward.start_model) as the
    one that trained the policies, or is that model: it would reward whatever the policies have learned about that
    head."""
    for path in policies:
        trained_by = load_checkpoint(path, "ppo.py", runtime).get("inputs", {})  # {file: digest}, the reward model's among them
        if trained_by and digest(reward_model) not in trained_by.values():
            raise UserError(f"{path} was not trained with {reward_model}: --judge cannot be checked against its reward model")
    heads = [load_checkpoint(path, "reward.py", runtime).get("head_seed") for path in (judge, reward_model)]
    for path, head in zip((judge, reward_model), heads):
        if head is None:
            raise UserError(f"{path} does not say which random head it started from; "
                            "train it again with this reward.py")
    if heads[0] == heads[1]:
        raise UserError(f"--judge {judge} is the reward model that trained the policies, or started from the same "
                        "random head; a judge is another one, trained on other comparisons")


@torch.no_grad()
def score_responses(reward_model, records, responses, tokenizer, device):
    """The reward model's score of one response to each record's prompt, at the response's end of text, in batches."""
    examples = []
    for record, text in zip(records, responses, strict=True):
        prompt, response = readers.example(record["prompt"], text, tokenizer)
        # A decoded response may have more tokens than were sampled, if it contains invalid UTF-8.
        room = reward_model.config.context - len(prompt) - 1
        examples.append((prompt, response[:-1][:room] + response[-1:]))
    scores = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: readers.length(examples[i]))
    for start in range(0, len(order), 128):
        batch = order[start : start + 128]
        batch_scores = readers.last_scores(reward_model, [examples[i] for i in batch], tokenizer.end_of_text, device)
        for i, score in zip(batch, batch_scores.tolist()):
            scores[i] = score
    return scores


# ---------------------------------------------------------------- people

class People(Judge):
    """Whoever filled in pairs.csv. They can only be asked about the pairs that were written there."""
    name = "people"

    def __init__(self, answers):
        """answers: {model: a list of pairs.Answer}, from `pairs.read`."""
        self.answers, self.wins = answers, {}
        for answer in sum(answers.values(), []):
            self.wins.setdefault((answer.prompt, answer.response, answer.baseline), []).append(answer.win)

    def compare(self, prompt, a, b):
        wins = self.wins[prompt, a, b]
        return sum(wins) / len(wins)

    def comparisons(self, model, records, responses, baseline):
        """All that were answered, also if the model would now respond otherwise."""
        return [(answer.prompt, answer.user, answer.response, answer.baseline)
                for answer in self.answers.get(model, [])]
