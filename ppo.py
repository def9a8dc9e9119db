"""Stage 3, reinforcement learning: PPO on the reward model's score, with a per-token KL penalty
from the SFT model and, in PPO-ptx, pretraining gradients mixed in (section 3.4, C.4).

    python ppo.py                                   # PPO-ptx on the laptop
    python ppo.py --ptx_coef 0 --out out/ppo_noptx  # PPO
    torchrun --nproc_per_node=8 ppo.py

The environment is a bandit: a prompt arrives, the policy writes a response, the reward model scores
it, and the episode ends.

    objective = E_(x, y)~policy [ r(x, y) - beta log(policy(y|x) / sft(y|x)) ]
                + ptx_coef E_x~pretraining [ log policy(x) ]

Not in the paper: clipped values, whitened advantages, clipped gradients, a penalty for truncated
responses. Departures: the reward and value models are as large as the policy (the paper: always
6B); one row of pretraining text per episode (the paper: 8); sizes, rates, coefficients of a laptop.

Shapes: B episodes, T tokens of prompt and response, R tokens of the longest response. Tensors
(B, R) hold response tokens from column 0, with a mask of those that exist.
"""

import time
from dataclasses import dataclass

import torch

from common.checkpoints import load_model
from common.config import check, check_range, launch
from common.learner import Learner, warmup_constant
from common.run import Run
from common.runtime import Runtime, RuntimeConfig, local_sum
from data import readers
from data.batches import PPOData
from data.rollout_log import rollout_statistics, sample_text, update_statistics, value_statistics
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate


@dataclass(frozen=True)
class Config(RuntimeConfig):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/ppo"  # the run's folder
    policy: str = "out/sft/model.pt"  # the SFT model: initial policy, and KL reference
    reward: str = "out/reward/model.pt"  # the reward model: also the initial value model
    iterations: int = 130  # one batch of episodes each (C.4: 256k episodes in batches of 512)
    batch_size: int = 64  # episodes per iteration (C.4: 512)
    minibatch_size: int = 16  # episodes per update, each used once (C.4: 64)
    max_new_tokens: int = 48  # the longest response
    temperature: float = 1.0  # of the rollouts (C.4: 1)
    lr: float = 3e-4  # of the policy, constant after a warmup over 10 iterations (C.4)
    value_lr: float = 3e-4  # of the value model (C.4: 9e-6)
    beta: float = 0.1  # KL coefficient (C.4: 0.02)
    ptx_coef: float = 0.5  # weight of pretraining (C.4: gamma = 27.8); 0: plain PPO
    ptx_rows: float = 1.0  # rows of pretraining text per episode (C.4: 8)
    gamma: float = 1.0  # discount (C.4: none)
    lam: float = 0.95  # lambda of GAE (C.4)
    clip: float = 0.2  # of the ratio (C.4)
    value_clip: float = 0.2  # maximum change of a value per update (not in the paper)
    truncation_penalty: float = 1.0  # on a truncated response's score (not in the paper)
    ema: float = 0.992  # decay per update of the averaged weights, which are saved (C.4)
    save_every: int = 0  # also save iteration{n}.pt after every n iterations; 0: do not
    seed: int = 0  # of the prompts' order, the samples, the pretraining rows

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "iterations", "batch_size", "minibatch_size", "max_new_tokens", low=1)
        check_range(self, "lr", "value_lr", "beta", "ptx_coef", "truncation_penalty", low=0)
        check_range(self, "clip", "value_clip", "ptx_rows", "save_every", low=0, high=1e6)
        check_range(self, "gamma", "lam", low=0, high=1)
        check(self.temperature > 0, "--temperature is above 0")
        check(0 <= self.ema < 1, "--ema is from 0 to under 1")
        check(self.batch_size % self.minibatch_size == 0, f"--batch_size {self.batch_size} is not "
              f"a multiple of --minibatch_size {self.minibatch_size}")
        check(not self.ptx_coef or self.pretraining_rows >= 1,
              "--ptx_rows gives no row a minibatch; for plain PPO say --ptx_coef 0")

    @property
    def pretraining_rows(self):
        """Rows of pretraining text per update."""
        return round(self.ptx_rows * self.minibatch_size) if self.ptx_coef else 0


# ---------------------------------------------------------------- the math

def kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward of each response token: -beta (log policy - log sft); at the last one plus the score.

    scores (B,); logprobs, ref_logprobs, mask (B, R) -> (B, R), 0 outside the mask. In expectation,
    a row sums to score - beta KL(policy || sft). A single log ratio can have either sign."""
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    column = torch.arange(mask.shape[1], device=mask.device)  # (R,)
    last = torch.where(mask, column, -1).amax(1)  # (B,)
    return rewards + torch.where(column == last[:, None], scores[:, None], 0.0)


def whiten(x, mask, all_reduce=local_sum):
    """Shift and scale x (B, R) to mean 0 and variance 1 over the mask; 0 outside it. `all_reduce`
    sums numbers over the ranks that share the batch."""
    x = torch.where(mask, x, 0.0)
    count, total = all_reduce(mask.sum(), x.sum())
    mean = total / max(1, count)
    (squares,) = all_reduce(torch.where(mask, (x - mean) ** 2, 0.0).sum())
    variance = squares / max(1, count)
    return torch.where(mask, (x - mean) * (variance + 1e-8) ** -0.5, 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, equation 16), from the last token:

    delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  return_t = A_t + V_t

    rewards, values, mask (B, R) -> (advantages, returns), each (B, R) and 0 outside the mask. The
    episode ends with its last token: after it, V and A are 0."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, count=None):
    """Clipped surrogate (Schulman et al. 2017, equation 7), to be minimized: the mean over tokens
    of max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) with ratio = policy / old policy.

    All (B, R). `count`: what to divide by, for a part of a batch; default: the mask's tokens.
    Returns the loss, and sums over the mask: {"ratio", "clipped": tokens without a gradient}."""
    count = mask.sum().clamp(min=1) if count is None else count
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    advantages = torch.where(mask, advantages, 0.0)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(free, clipped).sum() / count
    return loss, {"ratio": (ratio * mask).sum().detach(), "clipped": (clipped > free).sum()}


def value_loss(values, old_values, returns, mask, clip, count=None):
    """Half the squared error, or that of the value clipped to within `clip` of the old one if it is
    larger: a value that moved far gains nothing by moving on. All (B, R); `count` as above."""
    count = mask.sum().clamp(min=1) if count is None else count
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    larger = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * larger.sum() / count


# ---------------------------------------------------------------- rollouts

@dataclass
class Rollout:
    """Episodes of one micro-batch, and what was computed for them before any update."""
    prompts: list  # B lists of token ids
    responses: list  # B lists of token ids, ended by the end of text unless truncated
    tokens: torch.Tensor  # (B, T) prompt and response, padded
    positions: torch.Tensor  # (B, R) the positions that predict the response tokens
    mask: torch.Tensor  # (B, R) which response tokens exist
    count: int  # how many exist
    truncated: torch.Tensor  # (B,)
    logprobs: torch.Tensor = None  # (B, R) under the policy that sampled them
    ref_logprobs: torch.Tensor = None  # (B, R) under the SFT model
    values: torch.Tensor = None  # (B, R) of the text before each response token
    scores: torch.Tensor = None  # (B,) the reward model's, minus the penalty if truncated
    kl: torch.Tensor = None  # (B, R) log policy - log sft
    rewards: torch.Tensor = None  # (B, R) KL penalty and score
    advantages: torch.Tensor = None  # (B, R) whitened over the global batch
    returns: torch.Tensor = None  # (B, R)


def make_rollout(pairs, end_of_text, device):
    """B pairs of (prompt, response) -> Rollout."""
    prompts, responses = map(list, zip(*pairs))
    batch = readers.make_batch(pairs, end_of_text, device)
    truncated = readers.to_device(torch.tensor([r[-1] != end_of_text for r in responses]), device)
    return Rollout(prompts, responses, batch.tokens, batch.positions, batch.mask, batch.count,
                   truncated)


@torch.no_grad()
def generate_rollouts(policy, prompts, uniforms, config, end_of_text):
    """Sample a response to each prompt of each minibatch -> minibatches: lists of micro-batches."""
    runtime, minibatches = policy.runtime, []
    with runtime.sampling(policy.model) as sampler:
        responses = iter(generate(sampler, sum(prompts, []), config.max_new_tokens,
                                  torch.cat(uniforms), config.temperature))
    for minibatch in prompts:
        pairs = [(prompt, next(responses)) for prompt in minibatch]
        parts = runtime.micro_batches(pairs, config.minibatch_size, readers.length)
        minibatches.append([make_rollout(part, end_of_text, runtime.device) for part in parts])
    return minibatches


@torch.no_grad()
def score_rollout(rollout, policy, ref_policy, reward_model, value_model, config, end_of_text):
    """Log-probabilities, values, score, and the rewards that follow from them."""
    tokens, positions, mask = rollout.tokens, rollout.positions, rollout.mask
    episodes = list(zip(rollout.prompts, rollout.responses))
    with policy.runtime.autocast():
        logprobs = policy.model(tokens, positions, config.temperature)  # (B, R)
        ref_logprobs = ref_policy(tokens, positions, config.temperature)  # (B, R)
        values = value_model.model(tokens, positions)  # (B, R)
        scores = readers.last_scores(reward_model, episodes, end_of_text, tokens.device)  # (B,)
    rollout.logprobs, rollout.ref_logprobs, rollout.values = (
        torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs, values))
    rollout.kl = rollout.logprobs - rollout.ref_logprobs
    rollout.scores = scores - config.truncation_penalty * rollout.truncated
    rollout.rewards = kl_penalized_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs,
                                           mask, config.beta)


def estimate_advantages(rollouts, config, runtime):
    """GAE for each rollout, then whitening over the global batch. On the CPU: many operations on
    few numbers are slow on a GPU."""
    for rollout in rollouts:
        rewards, values, mask = (x.cpu() for x in (rollout.rewards, rollout.values, rollout.mask))
        rollout.advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        rollout.returns = readers.to_device(returns, runtime.device)
    advantages = torch.cat([rollout.advantages.flatten() for rollout in rollouts])  # (N,)
    mask = torch.cat([rollout.mask.flatten() for rollout in rollouts]).cpu()  # (N,), with padding
    whitened = whiten(advantages, mask, runtime.all_reduce)
    for rollout, part in zip(rollouts, whitened.split([r.mask.numel() for r in rollouts])):
        rollout.advantages = readers.to_device(part.view_as(rollout.mask), runtime.device)


# ---------------------------------------------------------------- updates

def policy_step(policy, ema, minibatch, pretraining, count, warmup, config):
    """One update: the gradient of the clipped surrogate plus ptx_coef times that of the pretraining
    loss (C.4). count: response tokens of the global minibatch. warmup: fraction of the rates."""
    total = ratio = clipped = ptx_loss = 0.0
    for rollout in policy.accumulate(minibatch, more_follow=bool(pretraining)):
        logprobs = policy(rollout.tokens, rollout.positions, config.temperature)  # (B, R)
        loss, sums = policy_loss(logprobs, rollout.logprobs, rollout.advantages, rollout.mask,
                                 config.clip, count)
        policy.backward(loss)
        total, ratio = total + loss.detach(), ratio + sums["ratio"]
        clipped = clipped + sums["clipped"]
    (targets,) = policy.runtime.all_reduce(sum(batch.count for batch in pretraining))
    for batch in policy.accumulate(pretraining):
        logprobs = policy(batch.tokens, batch.positions)  # (B, R)
        loss = -torch.where(batch.mask, logprobs, 0.0).sum() / targets
        policy.backward(config.ptx_coef * loss)
        ptx_loss += loss.detach()
    grad_norm = policy.step(config.lr * warmup)
    update_ema(ema, policy.model, config.ema)
    total, ratio, clipped, ptx_loss = policy.runtime.all_reduce(total, ratio, clipped, ptx_loss)
    return dict(policy_loss=total, ratio=ratio, clip_fraction=clipped, tokens=count,
                ptx_loss=ptx_loss, grad_norm=grad_norm)


def value_step(value_model, minibatch, count, warmup, config):
    """One update of the value model. -> numbers to log."""
    total = 0.0
    for rollout in value_model.accumulate(minibatch):
        values = value_model(rollout.tokens, rollout.positions)  # (B, R)
        loss = value_loss(values, rollout.values, rollout.returns, rollout.mask, config.value_clip,
                          count)
        value_model.backward(loss)
        total += loss.detach()
    value_model.step(config.value_lr * warmup)
    return dict(value_loss=value_model.runtime.all_reduce(total)[0])


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, in place (C.4)."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------- the stage

def load_models(config, tokenizer, runtime):
    """-> policy (a Learner), ref_policy, ema, reward_model, value_model (a Learner)."""
    def load(kind, path, made_by):
        return load_model(kind, path, made_by, tokenizer, runtime, dropout=0.0)
    policy, ref_policy, ema = (load(GPT, config.policy, "make sft") for _ in range(3))
    reward_model, value_model = (load(ScalarModel, config.reward, "make reward") for _ in range(2))
    frozen = [model.requires_grad_(False) for model in (ref_policy, ema, reward_model)]
    return (Learner(policy, config.lr, runtime), *frozen,
            Learner(value_model, config.value_lr, runtime))


def main(config):
    runtime = Runtime(config)
    runtime.check_batch_size(config.minibatch_size, "minibatch_size")
    runtime.check_batch_size(config.pretraining_rows, "ptx_rows")
    tokenizer = Tokenizer.load(config.data)
    end_of_text = tokenizer.end_of_text
    policy, ref_policy, ema, reward_model, value_model = load_models(config, tokenizer, runtime)
    data = PPOData(config, tokenizer, policy.model.config.context, reward_model.config.context)
    updates = config.batch_size // config.minibatch_size  # per iteration
    run = Run(config, runtime, tokenizer, [config.policy, config.reward, *data.files],
              {"policy": policy, "value": value_model, "ema": ema})
    run.print(f"{config.iterations} iterations x {updates} minibatches x {config.minibatch_size} "
              f"episodes + {config.pretraining_rows} rows of pretraining text; "
              f"{len(data.prompts):,} prompts")
    progress = run.progress_bar(run.resume(), config.iterations)
    for iteration in progress:
        started, warmup, logs = time.monotonic(), warmup_constant(iteration), []
        prompts, uniforms = data.batch(iteration, runtime)
        minibatches = generate_rollouts(policy, prompts, uniforms, config, end_of_text)
        rollouts = [rollout for minibatch in minibatches for rollout in minibatch]
        for rollout in rollouts:
            score_rollout(rollout, policy, ref_policy, reward_model, value_model, config,
                          end_of_text)
        estimate_advantages(rollouts, config, runtime)
        for i, minibatch in enumerate(minibatches):
            (count,) = runtime.all_reduce(sum(rollout.count for rollout in minibatch))
            pretraining = data.pretraining_batches(iteration * updates + i, end_of_text, runtime)
            numbers = policy_step(policy, ema, minibatch, pretraining, count, warmup, config)
            logs.append(numbers | value_step(value_model, minibatch, count, warmup, config))
        numbers = rollout_statistics(rollouts, runtime) | update_statistics(logs)
        numbers |= value_statistics(rollouts, runtime)
        numbers["episodes_per_second"] = config.batch_size / (time.monotonic() - started)
        progress.set_postfix(refresh=False, score=f"{numbers['score']:.2f}",
                             kl=f"{numbers['kl']:.2f}", length=f"{numbers['length']:.0f}")
        if config.save_every and (iteration + 1) % config.save_every == 0:
            run.save_model(ema, f"iteration{iteration + 1}.pt")
        run.log(iteration, **numbers)
        if iteration % 10 == 0:
            run.samples(sample_text(rollouts[len(rollouts) // 2], iteration, tokenizer))
        run.checkpoint(iteration + 1)
    run.save_model(value_model.model, "value.pt")  # for sample.py
    run.save_model(ema)
    run.finish()


if __name__ == "__main__":
    launch(main, Config)
