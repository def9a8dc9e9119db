"""Stage 3, reinforcement learning: PPO on the reward model's score, with a per-token KL penalty against the SFT model
and, in PPO-ptx, pretraining gradients mixed in (section 3.4, C.4).

    python ppo.py                                   # PPO-ptx, on the laptop
    python ppo.py --ptx_coef 0 --out out/ppo_noptx  # PPO
    torchrun --nproc_per_node=8 ppo.py

The environment is a bandit: a prompt comes, the policy answers, the reward model scores the answer, the episode ends.

    objective = E_(x, y)~policy [ r(x, y) - beta log(policy(y|x) / sft(y|x)) ] + gamma E_x~pretrain [ log policy(x) ]

Not in the paper: the values' clip, whitened advantages, clipped gradients, a penalty for responses cut short.
Departures from it: one reward and value model as large as the policy (the paper: always 6B); as many rows of
pretraining text as episodes (8 times as many; --ptx_rows); batches, rates and coefficients are those of the laptop.

Shapes: B episodes of a minibatch, T tokens of prompt and response, R tokens of the longest response, N response tokens
in all. Tensors (B, R) hold response tokens from column 0, with a mask of those that are there.
"""

import copy
import time
from collections import Counter
from dataclasses import dataclass

import torch

import common
from common import Machine, Ranks, Run, UserError
from data import readers
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate


@dataclass(frozen=True)
class Config(Machine):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/ppo"  # the run's folder
    policy: str = "out/sft/model.pt"  # where the policy starts; also the reference of the KL penalty
    reward: str = "out/reward/model.pt"  # the reward model; the value function starts there too
    iterations: int = 130  # of one batch of episodes each (C.4: 256k episodes in batches of 512)
    batch_size: int = 64  # episodes an iteration (C.4: 512)
    minibatch_size: int = 16  # episodes an update (C.4: 64); one pass over a batch, so old episodes are never reused
    max_new_tokens: int = 48  # the longest response
    temperature: float = 1.0  # of the rollouts (C.4: 1)
    lr: float = 3e-4  # of the policy, constant after 10 iterations of warmup from a tenth of it (C.4)
    value_lr: float = 3e-4  # of the value function (C.4: 9e-6)
    beta: float = 0.1  # KL coefficient (C.4: 0.02)
    ptx_coef: float = 0.5  # weight of the pretraining loss (C.4: 27.8); 0 is plain PPO
    ptx_rows: float = 1.0  # rows of pretraining text an episode (C.4: 8)
    gamma: float = 1.0  # discount (C.4: none)
    lam: float = 0.95  # of GAE (C.4)
    clip: float = 0.2  # of the ratio (C.4)
    value_clip: float = 0.2  # how far a value may move from its old one in an update (not in the paper)
    truncation_penalty: float = 1.0  # taken off the score of a response cut at max_new_tokens (not in the paper)
    ema: float = 0.992  # decay of the averaged weights, per update: they are what is saved (C.4)
    save_every: int = 0  # iterations after which the averaged weights are also kept, as iteration{n}.pt; 0: only at the end
    seed: int = 0  # of the prompts' order, the samples, the pretraining rows

    def __post_init__(self):
        super().__post_init__()
        if min(self.iterations, self.batch_size, self.minibatch_size, self.max_new_tokens) < 1:
            raise ValueError("--iterations and the sizes are at least 1")
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"--batch_size {self.batch_size} is not a multiple of --minibatch_size {self.minibatch_size}")
        if min(self.lr, self.value_lr, self.beta, self.ptx_coef, self.ptx_rows, self.clip, self.value_clip,
               self.truncation_penalty, self.save_every) < 0:
            raise ValueError("rates and coefficients are at least 0")
        if max(self.clip, self.value_clip, self.ptx_rows) > 1e6:
            raise ValueError("--clip, --value_clip and --ptx_rows are at most a million")
        if self.temperature <= 0 or not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1 or not 0 <= self.ema < 1:
            raise ValueError("--temperature is above 0; --gamma and --lam from 0 to 1, --ema from 0 to under 1")
        if self.ptx_coef and round(self.ptx_rows * self.minibatch_size) < 1:
            raise ValueError("--ptx_rows gives no row a minibatch; for plain PPO say --ptx_coef 0")


# ---------------------------------------------------------------- the ideas, as pure functions

def kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward of every response token: -beta (log policy - log reference), and at the last one also the score (3.4).

    scores (B,); logprobs, ref_logprobs, mask (B, R) -> (B, R), 0 outside the mask. The sum over a row estimates
    score - beta KL(policy || reference): the log ratio itself is credited, negative where the reference is likelier."""
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)  # (B,), -1 where none
    is_last = torch.arange(mask.shape[1], device=mask.device) == last[:, None]  # (B, R)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


def whiten(x, mask, total=lambda *numbers: numbers):
    """Shift and scale x (B, R) to mean 0 and variance 1 (of the population, not n - 1) over the mask; 0 outside it.
    `total` sums numbers over the ranks that share the batch."""
    x = torch.where(mask, x, 0.0)
    count, sum_ = total(mask.sum(), x.sum())
    mean = sum_ / max(1, count)
    (squares,) = total(torch.where(mask, (x - mean) ** 2, 0.0).sum())
    return torch.where(mask, (x - mean) * (squares / max(1, count) + 1e-8) ** -0.5, 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, equation 16), from the last token back:

        delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  return_t = A_t + V_t

    rewards, values, mask (B, R) -> (advantages, returns), each (B, R) and 0 outside the mask. The episode ends with its
    last token: V and A behind it are 0, whatever stands there."""
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
    """The clipped surrogate (Schulman et al. 2017, equation 7), to be minimised: the mean over the response tokens of
    max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) with ratio = policy / old policy.

    All (B, R). `count`: what to divide by, when the batch is shared among ranks; by default the mask's tokens.
    Returns the loss and diagnostics, sums over the mask: ratio, and how many tokens had their gradient clipped."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    advantages = torch.where(mask, advantages, 0.0)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(free, clipped).sum() / (mask.sum().clamp(min=1) if count is None else count)
    diagnostics = {"ratio": torch.where(mask, ratio, 0.0).sum().detach(), "clipped": (clipped > free).sum()}
    return loss, diagnostics


def value_loss(values, old_values, returns, mask, clip, count=None):
    """Half the squared error, the worse of the value's and of the value's clamped to within `clip` of the old one:
    a value that has moved far enough gains nothing by moving on. All (B, R); `count` as in policy_loss."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clamped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns) ** 2, (clamped - returns) ** 2)
    return 0.5 * worse.sum() / (mask.sum().clamp(min=1) if count is None else count)


# ---------------------------------------------------------------- episodes

@dataclass
class Episodes:
    """A minibatch of rollouts (this rank's share), and what was computed of them before any update."""
    prompts: list  # B lists of token ids
    responses: list  # B lists of token ids, ended by the end of text unless truncated
    tokens: torch.Tensor  # (B, T) prompt and response, padded
    where: torch.Tensor  # (B, T) positions whose next token is of the response: N in all
    mask: torch.Tensor  # (B, R) which response tokens there are: the same N, in the same order
    logprobs: torch.Tensor = None  # (B, R) of the response tokens under the policy that sampled them
    ref_logprobs: torch.Tensor = None  # (B, R) under the SFT model
    values: torch.Tensor = None  # (B, R) of the text before each response token
    scores: torch.Tensor = None  # (B,) the reward model's, less the penalty where truncated
    cut: torch.Tensor = None  # (B,) which were truncated
    advantages: torch.Tensor = None  # (B, R) whitened over the global batch
    returns: torch.Tensor = None  # (B, R)


def make_episodes(prompts, responses, end, device):
    tokens, where = readers.batch_of(list(zip(prompts, responses)), end, device)
    lengths = torch.tensor([len(r) for r in responses], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # (B, R)
    return Episodes(prompts, responses, tokens, where, mask)


def by_response(flat, mask):
    """flat (N,), in reading order -> (B, R), 0 outside the mask."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def response_logprobs(model, episodes, temperature):
    """Log-probability of each response token at the sampling temperature -> (B, R)"""
    return by_response(model(episodes.tokens, episodes.where, temperature), episodes.mask)


def response_values(model, episodes):
    """The value before each response token: at the position that predicts it. -> (B, R)"""
    return by_response(model(episodes.tokens)[episodes.where], episodes.mask)


def reward_scores(model, episodes, end, penalty):
    """The reward model's score of each episode, read at the end of text as in its training, less the penalty where the
    response was cut before one. -> (B,), and which were cut (B,)"""
    cut = torch.tensor([response[-1] != end for response in episodes.responses], device=episodes.tokens.device)
    ended = [(p, r + [end] * (r[-1] != end)) for p, r in zip(episodes.prompts, episodes.responses)]
    return readers.last_scores(model, ended, end, cut.device) - penalty * cut, cut


# ---------------------------------------------------------------- the stage

def load_models(config, tokenizer):
    """-> policy, reference, reward model, value function."""
    policy = common.load_model(GPT, config.policy, "make sft", tokenizer, dropout=0.0)
    reward = common.load_model(ScalarModel, config.reward, "make reward", tokenizer, dropout=0.0)
    value = copy.deepcopy(reward)
    return policy, copy.deepcopy(policy).requires_grad_(False), reward.requires_grad_(False), value


@torch.no_grad()
def average(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, in place."""
    for slow, fast in zip(ema.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)


def main(config):
    ranks = Ranks(config)
    tokenizer = Tokenizer.load(config.data)
    end = tokenizer.end_of_text
    policy, reference, reward_model, value_model = models = load_models(config, tokenizer)
    ema = copy.deepcopy(policy).requires_grad_(False)
    for model in (*models, ema):
        ranks.place(model)
    context = min(policy.config.context, reward_model.config.context - 1)  # a truncated response is scored with its end
    path = f"{config.data}/prompts.train.jsonl"
    prompts = readers.encode_prompts(readers.read_jsonl(path, "prompts"), tokenizer, context - config.max_new_tokens, path)
    if len(prompts) < config.batch_size:
        raise UserError(f"{path}: {len(prompts)} prompts are less than one batch of {config.batch_size}")
    ptx_rows = round(config.ptx_rows * config.minibatch_size) if config.ptx_coef else 0
    text = readers.PretrainingText(f"{config.data}/pretrain.train.bin", tokenizer, policy.config.context) if ptx_rows else None
    ranks.check_share(config.minibatch_size, "minibatch_size")
    if ptx_rows:
        ranks.check_share(ptx_rows, "ptx_rows")
    minibatches = config.batch_size // config.minibatch_size
    if ranks.main:
        print(f"{config.iterations} iterations x {minibatches} minibatches x {config.minibatch_size} episodes + {ptx_rows} "
              f"rows of pretraining text; {len(prompts):,} prompts")

    inputs = [config.policy, config.reward, path] + [f"{config.data}/pretrain.train.bin"] * bool(ptx_rows)
    run = Run(config.out, config, ranks, inputs)
    optimizer, value_optimizer = common.adam(policy, config.lr), common.adam(value_model, config.value_lr)
    parts = dict(policy=(policy, optimizer), value=(value_model, value_optimizer), ema=ema)
    start = run.resume(config.resume, **parts)
    ddp_policy, ddp_value = ranks.wrap(policy), ranks.wrap(value_model)

    def draw_prompts(iteration):
        """This rank's share of every minibatch of the iteration, no prompt twice in a pass over them."""
        per_pass = len(prompts) // config.batch_size
        order = torch.randperm(len(prompts), generator=common.generator(config.seed, "ppo pass", iteration // per_pass))
        first = iteration % per_pass * config.batch_size
        chosen = order[first : first + config.batch_size].view(minibatches, -1)[:, ranks.rows(config.minibatch_size)]
        uniforms = torch.rand(config.batch_size, config.max_new_tokens,
                              generator=common.generator(config.seed, "rollout", iteration))
        uniforms = uniforms.view(minibatches, config.minibatch_size, -1)[:, ranks.rows(config.minibatch_size)]
        return [prompts[i] for i in chosen.flatten().tolist()], uniforms.flatten(0, 1)

    @torch.no_grad()
    def rollout(iteration):
        """Sample this rank's episodes and score them under all four models -> minibatches, each a list of micro-batches."""
        mine, uniforms = draw_prompts(iteration)
        with ranks.autocast(), ranks.sampling(policy) as anyone:
            responses = generate(policy, mine, config.max_new_tokens, uniforms, config.temperature, anyone)
        pairs, share = list(zip(mine, responses)), len(mine) // minibatches
        return [[score(part) for part in ranks.micro_batches(pairs[i : i + share], config.minibatch_size, readers.length)]
                for i in range(0, len(mine), share)]

    def score(pairs):
        e = make_episodes(*map(list, zip(*pairs)), end, ranks.device)
        with ranks.autocast():
            e.logprobs = response_logprobs(policy, e, config.temperature)
            e.ref_logprobs = response_logprobs(reference, e, config.temperature)
            e.values = response_values(value_model, e)
            e.scores, e.cut = reward_scores(reward_model, e, end, config.truncation_penalty)
        return e

    def estimate_advantages(batch):
        """Rewards, GAE, and whitening over the global batch."""
        for e in batch:
            rewards = kl_penalized_rewards(e.scores, e.logprobs, e.ref_logprobs, e.mask, config.beta)
            e.advantages, e.returns = gae(rewards, e.values, e.mask, config.gamma, config.lam)
        flat = torch.cat([e.advantages[e.mask] for e in batch])  # (tokens,)
        white = whiten(flat, torch.ones_like(flat, dtype=torch.bool), ranks.sum)
        for e, part in zip(batch, white.split([int(e.mask.sum()) for e in batch])):
            e.advantages = by_response(part, e.mask)

    def improve_policy(minibatch, count, step, lr_fraction):
        """One step up the clipped surrogate, its gradient and then the pretraining gradient accumulated (C.4)."""
        sums, ptx_loss = Counter(), 0.0
        for i, e in enumerate(minibatch):
            with ranks.adding(ddp_policy, ptx_rows or i + 1 < len(minibatch)):
                with ranks.autocast():
                    logprobs = response_logprobs(ddp_policy, e, config.temperature)
                loss, diagnostics = policy_loss(logprobs, e.logprobs, e.advantages, e.mask, config.clip, count)
                ranks.backward(loss)
            sums.update({"policy_loss": loss.item()} | {name: x.item() for name, x in diagnostics.items()})
        if ptx_rows:
            rows = text.pairs(text.draw(ptx_rows, config.seed, "ppo", step))
            mine = ranks.micro_batches(rows[ranks.rows(ptx_rows)], ptx_rows, readers.length)
            mine = [readers.batch_of(part, end, ranks.device) for part in mine]
            (targets,) = ranks.sum(sum(where.sum() for _, where in mine))
            for i, (tokens, where) in enumerate(mine):
                with ranks.adding(ddp_policy, i + 1 < len(mine)):
                    with ranks.autocast():
                        loss = -ddp_policy(tokens, where).sum() / targets
                    ranks.backward(config.ptx_coef * loss)
                ptx_loss += loss.item()
            (ptx_loss,) = ranks.sum(ptx_loss)
        norm = common.update(optimizer, policy, config.lr * lr_fraction, ranks)
        average(ema, policy, config.ema)
        return sums, dict(ptx_loss=ptx_loss, grad_norm=norm)

    def improve_value(minibatch, count, lr_fraction):
        sums = Counter()
        for i, e in enumerate(minibatch):
            with ranks.adding(ddp_value, i + 1 < len(minibatch)):
                with ranks.autocast():
                    values = response_values(ddp_value, e)
                loss = value_loss(values, e.values, e.returns, e.mask, config.value_clip, count)
                ranks.backward(loss)
            sums.update(value_loss=loss.item())
        common.update(value_optimizer, value_model, config.value_lr * lr_fraction, ranks)
        return sums

    progress = common.bar(ranks, config.iterations, start, config.out)
    for iteration in progress:
        began = time.monotonic()
        batch = rollout(iteration)
        episodes = [e for minibatch in batch for e in minibatch]
        estimate_advantages(episodes)
        sums, means, lr_fraction = Counter(), Counter(), common.warmup_constant(iteration)
        for i, minibatch in enumerate(batch):
            (count,) = ranks.sum(sum(e.mask.sum() for e in minibatch))  # response tokens of the global minibatch
            local, shared = improve_policy(minibatch, count, iteration * minibatches + i, lr_fraction)
            sums.update(local)
            sums.update(improve_value(minibatch, count, lr_fraction))
            means.update({name: x / minibatches for name, x in shared.items()})
        numbers = summarize(episodes, sums, minibatches, ranks) | means
        numbers["episodes_per_second"] = config.batch_size / (time.monotonic() - began)
        progress.set_postfix(refresh=False, reward=f"{numbers['reward']:.2f}", kl=f"{numbers['kl']:.2f}",
                             entropy=f"{numbers['entropy']:.2f}", length=f"{numbers['length']:.0f}")
        if config.save_every and (iteration + 1) % config.save_every == 0:
            run.save_model(ema, config.data, f"iteration{iteration + 1}.pt", tokenizer=tokenizer.fingerprint)
        run.log(iteration, **numbers)
        if iteration % 10 == 0:
            e = episodes[len(episodes) // 2]
            kl = ((e.logprobs - e.ref_logprobs) * e.mask).sum(1)
            run.samples("\n".join(f"[{iteration}] score {e.scores[j]:.2f}, KL {kl[j]:.2f}: {tokenizer.decode(e.prompts[j])}|"
                                  f"{tokenizer.decode(e.responses[j])}" for j in range(min(2, len(e.prompts)))))
        run.checkpoint(iteration + 1, **parts)
    run.save_model(value_model, config.data, "value.pt", tokenizer=tokenizer.fingerprint)  # for sample.py
    run.save_model(ema, config.data, tokenizer=tokenizer.fingerprint)
    run.finish()


def summarize(batch, sums, minibatches, ranks):
    """Means over the global batch: scores and lengths an episode, KL summed over an episode's tokens, the rest a
    token. The entropy is estimated as the KL is, by the samples: the mean of -log p."""
    def cat(f):
        return torch.cat([f(e) for e in batch])
    mask = [e.mask for e in batch]
    returns, errors = cat(lambda e: e.returns[e.mask]), cat(lambda e: (e.returns - e.values)[e.mask])
    episodes, tokens, score, kl, entropy, cut, returned, ratio, clipped, policy, value = ranks.sum(
        sum(len(m) for m in mask), sum(m.sum() for m in mask), cat(lambda e: e.scores).sum(),
        cat(lambda e: (e.logprobs - e.ref_logprobs)[e.mask]).sum(), -cat(lambda e: e.logprobs[e.mask]).sum(),
        cat(lambda e: e.cut).sum(), returns.sum(), sums["ratio"], sums["clipped"], sums["policy_loss"], sums["value_loss"])
    spread, error_mean = ranks.sum(((returns - returned / tokens) ** 2).sum(), errors.sum())
    (error_spread,) = ranks.sum(((errors - error_mean / tokens) ** 2).sum())
    return dict(reward=score / episodes, kl=kl / episodes, entropy=entropy / tokens, ratio=ratio / tokens,
                clip_fraction=clipped / tokens, explained_variance=1 - error_spread / max(spread, 1e-8),
                length=tokens / episodes, truncated=cut / episodes, policy_loss=policy / minibatches,
                value_loss=value / minibatches)


if __name__ == "__main__":
    common.launch(main, Config)
