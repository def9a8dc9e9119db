"""Draw the pictures of docs/how-it-works.md into assets/. Their numbers are computed by the functions of ppo.py.

    python docs/pictures.py
"""

import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(ROOT))

import ppo

WIDTH = 8.8  # inches: what a page shows without shrinking, so that font sizes are true
DARK, LIGHT, SHADE = "#1f3b57", "#e8eef4", "#d9d9d9"
COLORS = {"TRAINED": "#e8873a", "FROZEN": "#eaf2fa", "AVERAGED": "#c3c7a6"}
CLIP, BETA, GAMMA, LAM = 0.2, 0.1, 1.0, 0.95


def save(figure, name):
    figure.savefig(ROOT / "assets" / name, dpi=150, facecolor="white")
    plt.close(figure)
    print(f"assets/{name}")


# ---------------------------------------------------------------- the clipped surrogate loss

def token_loss(ratio, advantage):
    """ppo.policy_loss of a single token, and its derivative with respect to the ratio."""
    ratio = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)  # (1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = ppo.policy_loss(ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, advantage), mask, CLIP)
    loss.backward()
    return loss.item(), ratio.grad.item()


def clipped_loss():
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.6), sharex=True, sharey="row", layout="constrained")
    titles = {1.0: "advantage +1, better than expected:\nraise the token's probability",
              -1.0: "advantage −1, worse than expected:\nlower the token's probability"}
    for (advantage, title), (loss_axis, gradient_axis) in zip(titles.items(), axes.T):
        loss_axis.set_title(title, fontsize=10)
        loss_axis.plot([0.4, 1.6], [-0.4 * advantage, -1.6 * advantage], ":", color="black", label="without the clip")
        for low, high in ((0.4, 1 - CLIP), (1 - CLIP, 1 + CLIP), (1 + CLIP, 1.6)):
            ratios = torch.linspace(low + 1e-6, high - 1e-6, 40, dtype=torch.float64).tolist()
            losses, gradients = zip(*(token_loss(ratio, advantage) for ratio in ratios))
            label = "ppo.policy_loss" if low == 0.4 else None
            loss_axis.plot(ratios, losses, color=DARK, linewidth=2.5, label=label)
            gradient_axis.plot(ratios, gradients, color=DARK, linewidth=2.5)
            flows = any(gradients)
            for axis in (loss_axis, gradient_axis):
                axis.axvline(low, color="grey", linewidth=0.8)
                if not flows:
                    axis.axvspan(low, high, facecolor=SHADE, edgecolor="white", hatch="//", zorder=0)
            where = "inside\nthe clip" if low == 1 - CLIP else "outside\nthe clip"
            word = "gradient\nflows" if flows else "no\ngradient"
            gradient_axis.text((low + high) / 2, 0.45 * advantage, f"{where}:\n{word}", ha="center", va="center",
                               fontsize=9, fontweight="normal" if flows else "bold",
                               bbox=dict(facecolor="white", edgecolor="none", pad=1.5))
        loss_axis.legend(loc="lower left" if advantage > 0 else "lower right", fontsize=9)
        gradient_axis.axhline(0, color="black", linewidth=0.8)
        gradient_axis.set(xlabel="ratio: probability now / when sampled", xlim=(0.4, 1.6),
                          xticks=[0.6, 0.8, 1.0, 1.2, 1.4])
    axes[0, 0].set_ylabel("loss of one token")
    axes[1, 0].set_ylabel("d loss / d ratio")
    axes[1, 0].set_ylim(-1.3, 1.3)
    save(figure, "clipped_loss.png")


# ---------------------------------------------------------------- the five networks

NETWORKS = (  # name, what initializes it, state, output, what the output is for
    ("policy", "starts as the SFT model", "TRAINED", "logprobs (B, R)", "for kl_penalized_rewards\nand policy_loss"),
    ("moving average of the policy", "starts as the SFT model", "AVERAGED", "the saved model",
     "computes nothing\nduring training"),
    ("reference policy", "copy of the SFT model", "FROZEN", "ref_logprobs (B, R)", "for kl_penalized_rewards"),
    ("reward model", "result of stage 2", "FROZEN", "score (B,)", "for kl_penalized_rewards,\nadded at the last token"),
    ("value model", "starts as the reward model", "TRAINED", "values (B, R)", "for gae\nand value_loss"),
)


def box(axis, x, y, width, height, heading, text, **style):
    """A box with its left edge at x and its middle at y."""
    axis.add_patch(plt.Rectangle((x, y - height / 2), width, height, edgecolor="black", **style))
    middle, lines = x + width / 2, 1 + text.count("\n")
    axis.text(middle, y + 1.5 * lines, heading, ha="center", va="center", fontsize=10, fontweight="bold")
    axis.text(middle, y - 1.5, text, ha="center", va="center", fontsize=9.5, linespacing=1.3)


def arrow(axis, start, end, **style):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.2, **style))


def networks():
    figure, axis = plt.subplots(figsize=(WIDTH, 6.2), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(-4, 92))
    axis.axis("off")
    box(axis, 1, 44, 19, 17, "tokens (B, T)", "prompt, and the\nresponse that the\npolicy sampled", facecolor="white")
    middles = [80 - 18 * i for i in range(len(NETWORKS))]
    for (name, start, state, output, use), y in zip(NETWORKS, middles):
        box(axis, 31, y, 30, 13, name, f"{start}\n{state}", facecolor=COLORS[state],
            linewidth=2.2 if state == "TRAINED" else 1, linestyle="--" if state == "FROZEN" else "-")
        box(axis, 71, y, 28, 13, output, use, facecolor="white", linewidth=0.8)
        arrow(axis, (61, y), (71, y))
        if state != "AVERAGED":
            arrow(axis, (20, 44), (31, y))
    arrow(axis, (50, middles[0] - 6.5), (50, middles[1] + 6.5))
    axis.text(52, (middles[0] + middles[1]) / 2, "after every update", fontsize=9, va="center")
    axis.text(1, 88, "PPO (stage 3):\nfive networks", fontsize=12, fontweight="bold", va="top")
    axis.text(1, 5, "B responses of a batch\nT tokens of prompt and response\nR tokens of the longest response",
              fontsize=9, va="top")
    save(figure, "networks.png")


# ---------------------------------------------------------------- one response, token by token

PROMPT, RESPONSE = ["Name", "a", "color", "."], ["Dark", "red", ",", "<end>"]
LOGPROBS, REF_LOGPROBS = [-0.9, -0.2, -2.0, -0.1, 0.0], [-1.4, -0.4, -1.0, -0.1, 0.0]  # the last column is padding
VALUES, SCORE = [0.4, 0.5, 0.2, 0.6, 0.0], 1.0


def alignment():
    mask = torch.tensor([[True] * len(RESPONSE) + [False]])  # (1, R)
    logprobs, ref_logprobs, values = (torch.tensor([x], dtype=torch.float64) for x in (LOGPROBS, REF_LOGPROBS, VALUES))
    score = torch.tensor([SCORE], dtype=torch.float64)
    penalty = ppo.kl_penalized_rewards(torch.zeros_like(score), logprobs, ref_logprobs, mask, BETA)
    rewards = ppo.kl_penalized_rewards(score, logprobs, ref_logprobs, mask, BETA)
    advantages, returns = ppo.gae(rewards, values, mask, GAMMA, LAM)
    whitened = ppo.whiten(advantages, mask)

    tokens = PROMPT + RESPONSE + ["(pad)"]
    first, end = len(PROMPT), len(PROMPT) + len(RESPONSE)  # columns of the response
    blank = [""] * first
    numbers = [("log-probability, policy", logprobs), ("log-probability, reference", ref_logprobs),
               ("KL penalty: −β (policy − reference)", penalty), (f"reward: score {SCORE:.0f} added at <end>", rewards),
               ("value of the text before the token", values), ("advantage (ppo.gae)", advantages),
               ("return: advantage + value", returns), ("advantage after ppo.whiten", whitened)]
    rows = [("position", [str(t) for t in range(len(tokens))]), ("token", tokens),
            ("target mask (B, T)", [str(int(first - 1 <= t < end - 1)) for t in range(len(tokens))]),
            ("response mask (B, R)", blank + [str(int(m)) for m in mask[0]])]
    rows += [(name, blank + [f"{x:.2f}".replace("-", "−") for x in row[0].tolist()]) for name, row in numbers]

    figure, axis = plt.subplots(figsize=(WIDTH, 5.6), layout="constrained")
    axis.set(xlim=(-4.1, len(tokens) + 0.1), ylim=(len(rows) + 1.9, -1.4))
    axis.axis("off")
    for i, (name, cells) in enumerate(rows):
        y = i + 0.35 * (i > 2) + 0.2 * (i > 3)  # room for the arrows
        axis.text(-0.15, y + 0.5, name, ha="right", va="center", fontsize=9)
        for t, text in enumerate(cells):
            if not text:
                continue
            dark = i in (2, 3) and text == "1"
            color = DARK if dark else SHADE if t >= end else "white" if t < first or i == 2 else LIGHT
            axis.add_patch(plt.Rectangle((t + 0.03, y + 0.04), 0.94, 0.92, facecolor=color, edgecolor="grey"))
            axis.text(t + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    for t in range(first - 1, end - 1):
        arrow(axis, (t + 0.65, 2.9), (t + 1.35, 3.45))
    axis.plot([first, first], [-0.45, 2.98], color="black", linewidth=2)
    for start, stop, name in ((0, first, "prompt"), (first, end, "response"), (end, len(tokens), "padding")):
        axis.text((start + stop) / 2, -0.3, name, ha="center", fontsize=10, fontweight="bold")
    axis.text(-4.1, -1, f"One response, token by token (example values; β = {BETA}, γ = {GAMMA:.0f}, λ = {LAM})",
              fontsize=11, fontweight="bold")
    axis.text(-4.1, len(rows) + 0.75, fontsize=9, va="top", s=(
        "Arrows: position t predicts the token at t + 1. Log-probabilities and values are read at the positions whose\n"
        "target mask is 1, and written under the token that is predicted. The score is read at <end> itself."))
    save(figure, "alignment.png")


if __name__ == "__main__":
    clipped_loss()
    networks()
    alignment()
