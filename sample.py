"""Talk to a trained model, compare several models, or look at one response token by token.

    python sample.py                                        # questions from the terminal, answers by out/ppo
    python sample.py --prompt "What does the fox eat?"      # one answer
    python sample.py --models out/base,out/sft,out/ppo --prompt "What does the fox eat?" --n 3
    python sample.py --prompt "What does the fox eat?" --tokens --html response.html

A question is put into the form of the dataset's prompts. The model does not see earlier ones. Scores are the reward model's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.checkpoints import checkpoint_of, is_checkpoint, load_checkpoint, load_model
from common.config import UserError, check, launch
from common.runtime import Runtime, RuntimeConfig
from common.seeds import generator
from data import dataset, readers
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate
from paper.token_page import print_tokens, write_token_page


@dataclass(frozen=True)
class Config:
    models: str = "out/ppo"  # run folders, checkpoints or GPT-2 weights as transformers saves them, comma-separated
    prompt: str = ""  # the question; without it, questions are read from the terminal
    data: str = ""  # the dataset's folder; default: the one that the first model was trained on
    reward: str = ""  # the reward model; default: the first model's own, else the folder reward next to it, if any
    reference: str = ""  # --tokens: the SFT model of the KL penalty; default: the one that the policy started from
    n: int = 1  # answers per model
    temperature: float = 1.0  # 0 takes the most likely token
    max_new_tokens: int = 48  # the longest response
    tokens: bool = False  # show the first answer of the first model token by token; the model is a ppo.py run's folder
    html: str = ""  # --tokens: also write the response, with colors, as a page to this file
    seed: int = 0  # of the samples
    device: str = "auto"  # cpu, cuda, mps (Apple's GPU), or auto: cuda or mps if available

    def __post_init__(self):
        check(min(self.n, self.max_new_tokens) >= 1 and self.temperature >= 0,
              "--n and --max_new_tokens are at least 1, --temperature is at least 0")
        check(all(self.models.split(",")), "--models has an empty name")


def related(given, first, name, sibling, runtime):
    """The model that goes with the first one: `given`, or what its run says under `name`, or the folder next to it."""
    if given:
        return given
    path = Path(checkpoint_of(first))
    recorded = load_checkpoint(path, "make ppo", runtime)["config"].get(name, "") if path.suffix == ".pt" else ""
    return recorded if recorded and is_checkpoint(recorded) else str(Path(first).parent / sibling)


def questions(config):
    """The question of the command line, or the lines that are typed."""
    if config.prompt:
        return [config.prompt]
    if sys.stdin.isatty():
        print("Type a question and Enter; Ctrl-D ends.")
    return (line.strip() for line in sys.stdin if line.strip())


def sample_answers(model, prompt, question, config, runtime):
    """-> config.n responses to the prompt, as lists of token ids. `question` counts the questions so far."""
    uniforms = torch.rand(config.n, config.max_new_tokens, generator=generator(config.seed, "sample", question))
    with runtime.sampling(model) as sampler:
        return generate(sampler, [prompt] * config.n, config.max_new_tokens, uniforms, config.temperature)


@torch.no_grad()
def score_of(reward_model, prompt, response, end, runtime):
    """The reward model's score, at an end of text."""
    with runtime.autocast():
        return readers.last_scores(reward_model, [(prompt, response)], end, runtime.device).item()


@torch.no_grad()
def token_table(policy, ref_policy, reward_model, value_model, settings, prompt, response, end, runtime):
    """What PPO computes for one response of R tokens -> {column: R numbers}: the reward is the KL penalty and, at the
    last token, the score; advantage and return are GAE's, before whitening. `settings`: the config of ppo.py's run."""
    from ppo import gae, kl_penalized_rewards  # only this needs them
    batch = readers.make_batch([(prompt, response)], end, runtime.device)
    with runtime.autocast():
        logprobs, ref_logprobs = (model(batch.tokens, batch.positions, settings["temperature"])
                                  for model in (policy, ref_policy))  # (1, R)
        values = value_model(batch.tokens, batch.positions)  # (1, R)
    penalty = settings["truncation_penalty"] if response[-1] != end else 0.0
    score = torch.tensor([score_of(reward_model, prompt, response, end, runtime) - penalty], device=runtime.device)
    rewards = kl_penalized_rewards(score, logprobs, ref_logprobs, batch.mask, settings["beta"])  # (1, R)
    advantages, returns = gae(rewards, values, batch.mask, settings["gamma"], settings["lam"])  # (1, R) each
    columns = {"log p": logprobs, "log p SFT": ref_logprobs, "KL": logprobs - ref_logprobs, "reward": rewards,
               "value": values, "advantage": advantages, "return": returns}
    return {name: column[0].tolist() for name, column in columns.items()}


def show_tokens(config, policy, reward_model, prompt, response, tokenizer, runtime, load):
    """Print the table of one response; with --html, also write the page."""
    folder, end = Path(config.models.split(",")[0]), tokenizer.end_of_text
    settings = load_checkpoint(folder / "model.pt", "make ppo", runtime)["config"]
    ref_policy = load(GPT, related(config.reference, folder, "policy", "sft", runtime))
    value_model = load(ScalarModel, folder / "value.pt")
    table = token_table(policy, ref_policy, reward_model, value_model, settings, prompt, response, end, runtime)
    texts = ["<end>" if token == end else tokenizer.decode([token]) for token in response]
    print_tokens(texts, table)
    if config.html:
        write_token_page(config.html, tokenizer.decode(prompt), texts, table)
        print(f"{config.html} shows it with colors")


def main(config):
    runtime = Runtime(RuntimeConfig(device=config.device))
    paths = config.models.split(",")
    data = config.data or load_checkpoint(checkpoint_of(paths[0]), "make ppo", runtime)["data"]
    tokenizer = Tokenizer.load(data)

    def load(kind, path):
        return load_model(kind, checkpoint_of(path), "make", tokenizer, runtime, dropout=0.0).eval()

    models = {path: load(GPT, path) for path in paths}
    show = config.tokens or config.html
    if show and not is_checkpoint(Path(paths[0]) / "value.pt"):
        raise UserError(f"{paths[0]}/value.pt is missing: --tokens takes the folder of a ppo.py run, "
                        "which leaves its value function")
    reward = related(config.reward, paths[0], "reward", "reward", runtime)
    reward_model = load(ScalarModel, reward) if show or is_checkpoint(checkpoint_of(reward)) else None
    context = min(model.config.context for model in models.values())
    for question, text in enumerate(questions(config)):
        prompt = tokenizer.encode(dataset.as_prompt(text, data))
        if len(prompt) + config.max_new_tokens > context:
            problem = (f"the prompt has {len(prompt)} tokens; with --max_new_tokens {config.max_new_tokens} it does "
                       f"not fit the context of {context}")
            if config.prompt:
                raise UserError(problem)
            print(problem)
            continue
        for path, model in models.items():
            for i, response in enumerate(sample_answers(model, prompt, question, config, runtime)):
                line = (f"{path}: " if len(models) > 1 else "") + tokenizer.decode(response).strip()
                if reward_model is not None:
                    line += f"  [score {score_of(reward_model, prompt, response, tokenizer.end_of_text, runtime):+.2f}]"
                print(line)
                if show and path == paths[0] and i == 0:
                    show_tokens(config, model, reward_model, prompt, response, tokenizer, runtime, load)


if __name__ == "__main__":
    launch(main, Config)
