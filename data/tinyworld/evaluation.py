"""What evaluate.py can measure only in the built-in world, because its labelers are programs."""

import random

from common.config import UserError
from data.judges import TEAMS, SimulatedLabelers
from data.tinyworld import labelers
from data.tinyworld.web import reply_in, with_prefix
from paper.stats import ratio

__all__ = ["reply_in", "with_prefix"]  # the few-shot prompt of the model "GPT prompted"

def check_judges(count):
    if count > min(map(len, labelers.team())):
        raise UserError(f"--judges {count} are more than there are")


def judges(records, count, seed):
    """Both teams, as judges of responses to the records' prompts. `count` labelers compare each pair of responses."""
    return [SimulatedLabelers(name, team, records, count, seed) for name, team in zip(TEAMS, labelers.team())]


def training_labelers():
    """The names of those who write training data."""
    return {labeler.name for labeler in labelers.team()[0]}


def metadata(record, response):
    """The rates of Figure 4: {rate: True or False, or None where it does not apply}."""
    return labelers.metadata(record["prompt"], record["asks"], response)


def metadata_rates(names, records, responses):
    """{rate: {model: its mean}}, the four of Figure 4, each over the responses to which it applies."""
    users = [record["user"] for record in records]
    seen = {name: list(map(metadata, records, responses[name])) for name in names}
    return {rate: {name: ratio([(m[rate] is not None, float(m[rate] or 0)) for m in seen[name]], users)
                   for name in names} for rate in seen["SFT"][0]}


def true_preference(record, response):
    """What a response is worth to the average labeler, without noise."""
    return labelers.true_worth(record["prompt"], record["asks"], response)


def labeler_opinions(comparisons, path, seed):
    """What others than the labeler who ranked them think of the responses of each comparison, a number per response:
    "agreement": another labeler of the same team; "ceiling": the true average preference."""
    team_of = {labeler.name: team for team in labelers.team() for labeler in team}
    opinions = {"agreement": [], "ceiling": []}
    for record in comparisons:
        if record["labeler"] not in team_of:
            raise UserError(f"{path}: {record['labeler']} is no labeler of this world")
        rng = random.Random(f"{seed}/agreement/{record['prompt']}")
        colleague = rng.choice([labeler for labeler in team_of[record["labeler"]] if labeler.name != record["labeler"]])
        opinions["agreement"].append(
            colleague.impressions(record["prompt"], record["asks"], record["responses"], "agreement"))
        opinions["ceiling"].append([true_preference(record, response) for response in record["responses"]])
    return opinions
