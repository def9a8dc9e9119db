"""The network: a GPT as in GPT-2 and GPT-3, a scalar head in its place for rewards and values, and sampling.

Used by every stage; runs nothing itself. Architecture: Radford et al. 2019, section 2.3, and Brown et al. 2020,
section 2.1 (all attention layers dense). The paper's models are this network at 1.3B, 6B and 175B parameters
(section 3.4 and C); its reward and value models have the unembedding replaced by a projection to one number.

Shapes: B rows (episodes), T tokens, C width, H heads, D = C / H, V vocabulary, S slots in the KV cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context: int = 1024  # the longest sequence, in tokens: one learned position each
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0  # on what each block adds to the residual stream (C.1: 0.2 in supervised fine-tuning)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def end_of_text(self):
        """Id of the token that ends a document or a response: the last of the vocabulary, as in GPT-2's."""
        return self.vocab_size - 1


# Sizes by name. GPT-3's from Brown et al., table 2.1 (its 1.3B row lists 24 heads of 128, which is not 2048; 16 are).
PRESETS = {
    "nano": dict(layers=2, heads=2, width=32, context=256),  # for tests
    "laptop": dict(layers=3, heads=4, width=128, context=256),
    "gpt2": dict(layers=12, heads=12, width=768, context=1024),
    "gpt2-medium": dict(layers=24, heads=16, width=1024, context=1024),
    "gpt2-large": dict(layers=36, heads=20, width=1280, context=1024),
    "gpt2-xl": dict(layers=48, heads=25, width=1600, context=1024),
    "gpt3-1.3b": dict(layers=24, heads=16, width=2048, context=2048),
    "gpt3-6.7b": dict(layers=32, heads=32, width=4096, context=2048),
    "gpt3-175b": dict(layers=96, heads=96, width=12288, context=2048),
}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, cache=None, positions=None):
        """x (B, T, C). Without `positions` every token attends to itself and those before it, and a `cache`
        (2, B, H, S, D) is filled from slot 0. With `positions` (B,), T is 1: each row's token goes into its own
        slot of the cache and attends to the slots up to it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if positions is None:
            if cache is not None:
                cache[0, :, :, :T], cache[1, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            rows = torch.arange(B, device=x.device)
            cache[0, rows, :, positions], cache[1, rows, :, positions] = k[:, :, 0], v[:, :, 0]
            seen = torch.arange(cache.shape[3], device=x.device) <= positions[:, None]  # (B, S)
            y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=seen[:, None, None])  # (B, H, 1, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: each half adds to the residual stream what it computes from the normalised stream."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, positions=None):
        x = x + self.dropout(self.attention(self.norm1(x), cache, positions))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """All but the last layer: what GPT and ScalarModel share, under the same parameter names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # GPT-2's 0.02, which is for widths from 768. Narrower networks need more, as a sum over C inputs has a standard
        # deviation of sqrt(C): at width 128 and 0.02, attention starts flat and copying is learned far later.
        std = 0.02 * max(1.0, math.sqrt(768 / config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # 2 additions a block: without this the stream's variance grows with depth
            for projection in (block.attention.out, block.mlp[2]):
                nn.init.normal_(projection.weight, std=std / math.sqrt(2 * config.layers))

    def hidden(self, tokens, cache=None, positions=None):
        """tokens (B, T) -> final normalised hidden states (B, T, C).

        Rows of unequal length are padded at the end: attention looks back only, so what stands behind a row's last
        token changes nothing before it. `cache` (layers, 2, B, H, S, D) and `positions` (B,): see Attention."""
        B, T = tokens.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        where = torch.arange(T, device=tokens.device) if positions is None else positions[:, None]
        x = self.tokens(tokens) + self.positions(where)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], positions)
        return self.norm(x)


class GPT(Trunk):
    def unembed(self, hidden):
        """hidden (..., C) -> logits (..., V), by the transposed token embedding."""
        return F.linear(hidden, self.tokens.weight)

    def forward(self, tokens, where=None):
        """tokens (B, T) -> logits (B, T, V), for the token that follows each; with a mask `where` (B, T) of the N
        positions that matter, logits (N, V) of those alone, in reading order."""
        hidden = self.hidden(tokens)
        return self.unembed(hidden if where is None else hidden[where])


class ScalarModel(Trunk):
    """Reward model and value function: one number at every position."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.width, 1)
        # Hidden states are normalised, so this gives scores of variance about 1 (Stiennon et al. 2020 do likewise).
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens (B, T) -> (B, T): at each position, the score of the text up to and including its token."""
        return self.head(self.hidden(tokens)).squeeze(-1)

    def load_trunk(self, weights):
        """Start from a GPT's weights (a state dict); the head keeps its own initialisation."""
        missing, unexpected = self.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != {"head.weight", "head.bias"}:
            raise ValueError("not the weights of a GPT of this size")


def token_logprobs(logits, tokens):
    """Log-probability of each token given those before it. logits (B, T, V), tokens (B, T) -> (B, T - 1) float32
    or wider: entry t is log p(tokens[:, t + 1] | tokens[:, : t + 1])."""
    return gather_logprobs(logits[:, :-1], tokens[:, 1:])


def gather_logprobs(logits, targets):
    """logits (..., V), targets (...) -> log softmax(logits) at the targets (...), in float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def pick(logits, uniforms, temperature):
    """One token a row by inverse CDF: the first whose cumulative probability exceeds the row's uniform number.
    logits (B, V), uniforms (B,) in [0, 1) -> (B,). Temperature 0 takes the likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    chosen = torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return chosen.clamp_(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, uniforms, temperature=1.0):
    """Sample a response to each prompt, with a KV cache.

    prompts: B lists of token ids, of any lengths from 1; equal ones are read once, however often they occur.
    uniforms: (B, max_new_tokens) numbers in [0, 1) that decide every choice, so the same numbers give the same text.
    Returns B lists of token ids, each ended by the end-of-text token or, if that never came, cut after
    max_new_tokens. Raises ValueError where a prompt is empty or leaves no room in the context.
    """
    device, end, S = model.tokens.weight.device, model.config.end_of_text, max(map(len, prompts)) + max_new_tokens
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt has no tokens")
    if S > model.config.context:
        raise ValueError(f"{S - max_new_tokens} tokens of prompt and {max_new_tokens} of response do not fit the "
                         f"context of {model.config.context}")
    training, heads = model.training, model.config.heads
    model.eval()
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = torch.full((len(distinct), S - max_new_tokens), end, device=device)
    for prompt, i in distinct.items():
        tokens[i, : len(prompt)] = torch.tensor(prompt, device=device)
    which = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,), of the next token
    cache = torch.zeros(model.config.layers, 2, len(distinct), heads, S, model.config.width // heads,
                        device=device, dtype=model.tokens.weight.dtype)
    last = model.hidden(tokens, cache)[which, positions - 1]  # (B, C)
    cache = cache[:, :, which]  # (layers, 2, B, H, S, D)

    rows = torch.arange(len(prompts), device=device)  # which prompts are still in the batch
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    responses = torch.full((len(prompts), max_new_tokens), -1, device=device)
    uniforms = uniforms.to(device)
    longest = S - max_new_tokens
    for t in range(max_new_tokens):
        token = pick(model.unembed(last), uniforms[rows, t], temperature)  # (rows,)
        responses[rows, t] = torch.where(running, token, -1)
        running = running & (token != end)
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= len(rows) // 2:  # finished rows leave the batch; the copy costs less than carrying half for nothing
            rows, token, positions, cache = rows[running], token[running], positions[running], cache[:, :, running]
            running = running[running]
        longest += 1
        last = model.hidden(token[:, None], cache[..., :longest, :], positions)[:, 0]  # (rows, C)
        positions = positions + 1
    model.train(training)
    return [[token for token in row if token >= 0] for row in responses.tolist()]
