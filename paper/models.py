"""The models that evaluate.py compares. Its tables and figures follow this list."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluatedModel:
    name: str
    run: str  # its folder below --out
    color: str  # in all figures; they also differ when printed in gray
    few_shot: bool = False  # prompted with examples; in the built-in world only
    ppo_log: bool = False  # its log has the score, the KL and the entropy per PPO iteration


MODELS = (
    EvaluatedModel("GPT", "base", "#bdbdbd"),
    EvaluatedModel("GPT prompted", "base", "#e6ab02", few_shot=True),
    EvaluatedModel("SFT", "sft", "#66a61e"),
    EvaluatedModel("PPO", "ppo_noptx", "#7570b3", ppo_log=True),
    EvaluatedModel("PPO-ptx", "ppo", "#a6004d", ppo_log=True),
)

BASELINE = "SFT baseline"  # another sample of the SFT model, which all models are compared with


def trained_from_sft():
    """The names of the models that start from the SFT model."""
    return [model.name for model in MODELS if model.run not in ("base", "sft")]


def colors():
    return {model.name: model.color for model in MODELS}
