"""What ppo.py logs of an iteration's rollouts (ppo.Rollout)."""

import torch


def rollout_statistics(rollouts, runtime):
    """Means over the global batch: score, reward (score minus KL penalty), KL and length per response; entropy per token,
    estimated by the samples, as the KL is."""
    def total(field):
        return sum(getattr(rollout, field).sum() for rollout in rollouts)

    responses, tokens, score, reward, kl, logprobs, truncated = runtime.all_reduce(
        sum(len(rollout.responses) for rollout in rollouts), sum(rollout.count for rollout in rollouts),
        *map(total, ("scores", "rewards", "kl", "logprobs", "truncated")))
    return dict(score=score / responses, reward=reward / responses, kl=kl / responses, entropy=-logprobs / tokens,
                length=tokens / responses, truncated=truncated / responses)


def value_statistics(rollouts, runtime):
    """How much of the returns' variance the values explain, over the tokens of the global batch."""
    mask, returns, values = (torch.cat([getattr(rollout, field).flatten() for rollout in rollouts])
                             for field in ("mask", "returns", "values"))
    errors = returns - values  # all three are 0 outside the mask
    count, return_sum, error_sum = runtime.all_reduce(mask.sum(), returns.sum(), errors.sum())
    variance, error_variance = runtime.all_reduce((mask * (returns - return_sum / count) ** 2).sum(),
                                                  (mask * (errors - error_sum / count) ** 2).sum())
    return dict(explained_variance=1 - error_variance / max(variance, 1e-8))


def sample_text(rollout, iteration, tokenizer):
    """Two episodes with score and KL: reward hacking is seen, not plotted."""
    scores, kl = rollout.scores.tolist(), rollout.kl.sum(1).tolist()
    return "\n".join(f"[{iteration}] score {scores[i]:.2f}, KL {kl[i]:.2f}: "
                     f"{tokenizer.decode(rollout.prompts[i])}|{tokenizer.decode(rollout.responses[i])}"
                     for i in range(min(2, len(rollout.prompts))))


def update_statistics(logs):
    """The numbers of each update -> their means; `ratio` and `clip_fraction` are sums over `tokens`, and become means."""
    mean = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    tokens = mean.pop("tokens")
    return mean | dict(ratio=mean["ratio"] / tokens, clip_fraction=mean["clip_fraction"] / tokens)
