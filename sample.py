"""Talk to a trained model, compare several models, or look at one response token by token.

    python sample.py                                        # questions from the terminal, answers by out/ppo
    python sample.py --prompt "What does the fox eat?"      # one answer
    python sample.py --models out/base,out/sft,out/ppo --prompt "What does the fox eat?" --n 3
    python sample.py --prompt "What does the fox eat?" --tokens --html response.html

A question is put into the form of the dataset's prompts, so that it looks like what the model was trained on. Every question
stands alone: the model does not see earlier ones. Scores are the reward model's.

Shapes: R tokens of the response.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import report
from common import Machine, Ranks, UserError
from data import dataset, readers
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate
from ppo import gae, kl_penalized_rewards


@dataclass(frozen=True)
class Config:
    models: str = "out/ppo"  # run folders, checkpoints or GPT-2 weights as transformers saves them, separated by commas
    prompt: str = ""  # the question; without it, questions are read from the terminal
    data: str = ""  # the dataset's folder; default: the one that the first model was trained on
    reward: str = "out/reward"  # the reward model; if it does not exist, nothing is scored
    reference: str = "out/sft"  # --tokens: the SFT model, from which the KL penalty is measured
    n: int = 1  # answers per model
    temperature: float = 1.0  # 0 takes the most likely token
    max_new_tokens: int = 48  # the longest response
    tokens: bool = False  # show the first answer of the first model token by token; the model is a ppo.py run's folder
    html: str = ""  # --tokens: also write the response, with colors, as a page to this file
    seed: int = 0  # of the samples
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        if min(self.n, self.max_new_tokens) < 1 or self.temperature < 0:
            raise ValueError("--n and --max_new_tokens are at least 1, --temperature is at least 0")


def checkpoint_of(path):
    """A run's folder -> its model.pt; anything else is a checkpoint, or GPT-2 weights."""
    model = Path(path) / "model.pt"
    return str(model) if model.is_file() else path


def as_prompt(text, data):
    """The question in the form of the dataset's prompts: a conversation, or a line, or as it is."""
    path = Path(data) / "prompts.test.jsonl"
    example = readers.read_jsonl(path, "prompts")[0]["prompt"] if path.is_file() else ""
    if example.endswith("\n\nAssistant:"):
        return dataset.chat([("user", text)])
    if example.endswith("\n"):
        return text + "\n"
    return text


def answers(model, prompt, question, config, ranks):
    """-> config.n responses to the prompt (token ids), as lists of token ids. `question` counts the questions so far."""
    if len(prompt) + config.max_new_tokens > model.config.context:
        raise UserError(f"the prompt has {len(prompt)} tokens; with --max_new_tokens {config.max_new_tokens} it does not fit "
                        f"the context of {model.config.context}")
    uniforms = torch.rand(config.n, config.max_new_tokens, generator=common.generator(config.seed, "sample", question))
    with ranks.autocast():
        return generate(model, [prompt] * config.n, config.max_new_tokens, uniforms, config.temperature)


@torch.no_grad()
def score_of(reward_model, prompt, response, end, ranks):
    ended = response if response[-1] == end else response + [end]
    with ranks.autocast():
        return readers.last_scores(reward_model, [(prompt, ended)], end, ranks.device).item()


@torch.no_grad()
def token_table(policy, reference, reward_model, value_model, settings, prompt, response, end, ranks):
    """What PPO computes for one response -> {column: R numbers}. The reward is the KL penalty and, at the last token, the
    score; advantage and return are those of GAE, before whitening. `settings` holds beta, gamma and lam."""
    tokens, where = readers.batch_of([(prompt, response)], end, ranks.device)
    mask = torch.ones(1, len(response), dtype=torch.bool, device=ranks.device)  # (1, R)
    with ranks.autocast():
        logprobs, ref_logprobs = (model(tokens, where)[None] for model in (policy, reference))  # each (1, R)
        values = value_model(tokens)[where][None]  # (1, R), before each token
    scores = torch.tensor([score_of(reward_model, prompt, response, end, ranks)], device=ranks.device)  # (1,)
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, settings["beta"])
    advantages, returns = gae(rewards, values, mask, settings["gamma"], settings["lam"])
    rows = {"log p": logprobs, "log p SFT": ref_logprobs, "log ratio": logprobs - ref_logprobs, "reward": rewards,
            "value": values, "advantage": advantages, "return": returns}
    return {name: row[0].tolist() for name, row in rows.items()}


def show_tokens(config, policy, prompt, response, tokenizer, ranks, load):
    folder, end = Path(config.models.split(",")[0]), tokenizer.end_of_text
    if not (folder / "value.pt").is_file():
        raise UserError(f"{folder}/value.pt is missing: --tokens takes the folder of a ppo.py run, which leaves its value function")
    settings = common.load_checkpoint(folder / "model.pt", "make ppo")["config"]
    others = load(GPT, config.reference), load(ScalarModel, config.reward), load(ScalarModel, folder / "value.pt")
    table = token_table(policy, *others, settings, prompt, response, end, ranks)
    texts = ["<end>" if token == end else tokenizer.decode([token]) for token in response]
    print(f"{'token':<16}" + "".join(f"{name:>11}" for name in table))
    for i, text in enumerate(texts):
        print(f"{text!r:<16}" + "".join(f"{column[i]:>11.3f}" for column in table.values()))
    if config.html:
        report.token_page(config.html, tokenizer.decode(prompt), texts, table)
        print(f"{config.html} shows it with colors")


def questions(config):
    """The question of the command line, or the lines that are typed."""
    if config.prompt:
        return [config.prompt]
    if sys.stdin.isatty():
        print("Type a question and Enter; Ctrl-D ends.")
    return (line.strip() for line in sys.stdin if line.strip())


def main(config):
    ranks = Ranks(Machine(device=config.device))
    paths = [checkpoint_of(path) for path in config.models.split(",")]
    data = config.data or common.load_checkpoint(paths[0], "make ppo")["data"]
    tokenizer = Tokenizer.load(data)
    end = tokenizer.end_of_text

    def load(kind, path):
        return common.load_model(kind, checkpoint_of(path), "make", tokenizer, dropout=0.0).to(ranks.device).eval()

    models = {path: load(GPT, path) for path in config.models.split(",")}
    reward_model = load(ScalarModel, config.reward) if Path(checkpoint_of(config.reward)).is_file() else None
    for question, text in enumerate(questions(config)):
        prompt = tokenizer.encode(as_prompt(text, data))
        for i, (path, model) in enumerate(models.items()):
            for j, response in enumerate(answers(model, prompt, question, config, ranks)):
                name = f"{path}: " if len(models) > 1 else ""
                score = "" if reward_model is None else f"  [score {score_of(reward_model, prompt, response, end, ranks):+.2f}]"
                print(f"{name}{tokenizer.decode(response).strip()}{score}")
                if (config.tokens or config.html) and i == j == 0:
                    show_tokens(config, model, prompt, response, tokenizer, ranks, load)


if __name__ == "__main__":
    common.launch(main, Config)
