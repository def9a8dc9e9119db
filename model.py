"""The network: GPT as in GPT-2 and GPT-3, a scalar head for rewards and values, and sampling.

Architecture: Radford et al. 2019, section 2.3, and Brown et al. 2020, section 2.1 (all attention
layers dense). The paper's models are this network with 1.3B, 6B and 175B parameters (3.4 and C).

Shapes: B rows, T tokens, R response tokens, C width, H heads, D = C / H, V vocabulary, S slots.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context: int = 1024  # maximum number of tokens; each position has a learned embedding
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0  # on what each half of a block adds to the residual stream (C.1)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def end_of_text(self):
        """Id of the token that ends a document or a response: the last, as in GPT-2."""
        return self.vocab_size - 1


# Sizes by name. GPT-3's are from Brown et al., table 2.1 (with 16 heads for 1.3B: 24 do not fit).
PRESETS = {
    "nano": dict(layers=2, heads=2, width=32, context=256),  # for tests
    "pocket": dict(layers=3, heads=3, width=48, context=256),
    "laptop": dict(layers=3, heads=4, width=128, context=256),
    "desktop": dict(layers=4, heads=8, width=256, context=256),
    "gpt2": dict(layers=12, heads=12, width=768, context=1024),
    "gpt2-medium": dict(layers=24, heads=16, width=1024, context=1024),
    "gpt2-large": dict(layers=36, heads=20, width=1280, context=1024),
    "gpt2-xl": dict(layers=48, heads=25, width=1600, context=1024),
    "gpt3-1.3b": dict(layers=24, heads=16, width=2048, context=2048),
    "gpt3-6.7b": dict(layers=32, heads=32, width=4096, context=2048),
    "gpt3-175b": dict(layers=96, heads=96, width=12288, context=2048),
}

CHECK_EVERY = {"cpu": 1, "cuda": 8, "mps": 1}  # tokens; a check for finished rows waits for a GPU


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). Each token attends to itself and to the tokens before it. While
        decoding, T is 1 and the tokens before it are in the cache."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # each (B, H, S, D)
        if cache is None or cache.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            mask = cache.mask[..., : k.shape[2]]  # (B, 1, 1, S)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, 1, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm: each half adds to the residual stream a function of the normalized stream."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        C = config.width
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU("tanh"), nn.Linear(4 * C, C))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0):
        x = x + self.dropout(self.attention(self.norm1(x), cache, layer))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LastLayer(nn.Module):
    """A matrix product in float32, also under autocast: GPT-2's logits lie around -100, where
    neighboring bf16 numbers differ by 0.5, more than the clip of PPO's ratio."""

    def forward(self, hidden, weight, bias=None):
        """hidden (..., C), weight (O, C), bias (O,) -> (..., O)"""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(weight.dtype), weight, bias)


class Trunk(nn.Module):
    """All but the last layer's weights: what GPT and ScalarModel share, under the same names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.last_layer = LastLayer()
        # GPT-2's 0.02 is for widths from 768. Narrower networks need more, because a sum over C
        # inputs grows with sqrt(C): with width 128 and 0.02, copying is learned far later.
        std = 0.02 * max(1.0, math.sqrt(768 / config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # Each block adds to the stream twice: keep its variance from growing with depth.
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp[2]):
                nn.init.normal_(projection.weight, std=std / math.sqrt(2 * config.layers))

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> normalized hidden states (B, T, C); while decoding with a cache, T is 1.
        Padding at the end of a row changes nothing before it: attention only looks back."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        positions = torch.arange(T, device=tokens.device)  # (T,)
        if cache is not None and cache.mask is not None:
            positions = cache.lengths[:, None]  # (B, 1)
        x = self.tokens(tokens) + self.positions(positions)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cache, layer=i)
        return self.norm(x)


class GPT(Trunk):
    def unembed(self, hidden):
        """hidden (..., C) -> logits (..., V), by the transposed token embedding."""
        return self.last_layer(hidden, self.tokens.weight)

    def forward(self, tokens, positions=None, temperature=1.0):
        """tokens (B, T) -> logits (B, T, V). With `positions` (B, R): the log-probabilities (B, R)
        of the tokens that follow these positions, without a (B, T, V) tensor."""
        hidden = self.hidden(tokens)  # (B, T, C)
        if positions is None:
            return self.unembed(hidden)
        hidden = gather_positions(hidden, positions)  # (B, R, C)
        return self.logprobs(hidden, tokens.gather(1, positions + 1), temperature)  # (B, R)

    def logprobs(self, hidden, targets, temperature=1.0):
        """log softmax(logits / temperature) at targets: hidden (..., C), targets (...) -> (...)"""
        logits = self.unembed(hidden.flatten(0, -2) / temperature)  # (N, V)
        return -F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)

    def unfinished(self, rows):  # rows of this process -> of all that decode together
        return rows

    def decode(self, tokens, cache):
        """tokens (B,), the next token of each row of the cache -> its hidden state (B, C)."""
        hidden = self.hidden(tokens[:, None], cache)[:, 0]
        cache.used, cache.lengths = cache.used + 1, cache.lengths + 1
        return hidden

    @classmethod
    def from_gpt2(cls, path, dropout=0.0):
        """GPT-2's weights as transformers saves them: a folder or a file."""
        from common import gpt2
        config, weights = gpt2.read(path, PRESETS)
        model = cls(GPTConfig(**config, dropout=dropout))
        model.load_state_dict(weights, assign=True)
        return model

    def save_gpt2(self, folder):
        """Write the weights as transformers' GPT2LMHeadModel reads them."""
        from common import gpt2
        gpt2.write_policy(folder, self)


class ScalarModel(Trunk):
    """Reward model and value function: the unembedding is replaced by a projection to a scalar."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.width, 1)
        # Hidden states are normalized, so scores start with a variance of about 1.
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, positions=None):
        """tokens (B, T) -> (B, T): at each position, the score of the text up to and including its
        token. With `positions` (B, R): only at those, (B, R)."""
        hidden = self.hidden(tokens)  # (B, T, C)
        if positions is not None:
            hidden = gather_positions(hidden, positions)  # (B, R, C)
        return self.last_layer(hidden, self.head.weight, self.head.bias).squeeze(-1)


def gather_positions(hidden, positions):  # (B, T, C), (B, R) -> (B, R, C)
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))


class KVCache:
    """Keys and values of B rows: the prompts, padded at their end, then one slot per new token."""

    def __init__(self, model, rows, slots):
        config, weight = model.config, model.tokens.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        shape = config.layers, 2, rows, config.heads, slots, config.width // config.heads
        self.keys_values = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.used, self.mask, self.lengths = 0, None, None  # slots in use; the rest when decoding

    def append(self, layer, k, v):
        """Store keys and values (B, H, T, D) in the next slots; return all so far (B, H, S, D)."""
        end = self.used + k.shape[2]
        self.keys_values[layer, :, :, :, self.used : end] = torch.stack([k, v])
        return self.keys_values[layer, :, :, :, :end]

    def start_decoding(self, lengths, prompt_slots):
        """The prompts are read; now one token per row at a time. lengths (B,): the prompts'."""
        slots = torch.arange(self.keys_values.shape[4], device=lengths.device)  # (S,)
        padding = (slots >= lengths[:, None]) & (slots < prompt_slots)  # (B, S)
        mask = torch.zeros_like(padding, dtype=self.keys_values.dtype)
        self.mask = mask.masked_fill_(padding, -math.inf)[:, None, None]  # (B, 1, 1, S)
        self.used, self.lengths = prompt_slots, lengths  # (B,) the position of the next token

    def keep(self, rows):
        self.keys_values, self.mask = self.keys_values[:, :, rows], self.mask[rows]
        self.lengths = self.lengths[rows]


def read_prompts(model, prompts, max_new_tokens):
    """Fill a cache from the prompts; equal ones are read once.
    -> the cache, and the hidden state of each prompt's last token (B, C)."""
    T, device = max(map(len, prompts)), model.tokens.weight.device
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = torch.tensor([[*p] + [0] * (T - len(p)) for p in number], device=device)
    lengths = torch.tensor([len(p) for p in number], device=device)
    cache = KVCache(model, len(number), T + max_new_tokens)
    hidden = gather_positions(model.hidden(tokens, cache), lengths[:, None] - 1)[:, 0]
    cache.start_decoding(lengths, T)
    rows = torch.tensor([number[tuple(p)] for p in prompts], device=device)  # (B,)
    if len(number) < len(prompts):
        cache.keep(rows)
    return cache, hidden[rows]


def sample_tokens(logits, uniforms, temperature):
    """One token per row by inverse CDF: the first whose cumulative probability exceeds the row's
    uniform number. logits (B, V), uniforms (B,) -> (B,). Temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1)
    if logits.device.type == "mps":  # which has no float64: float32 loses the rare tokens
        return sample_tokens(logits.cpu(), uniforms.cpu(), temperature).to(logits.device)
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    thresholds = uniforms.double()[:, None] * cdf[:, -1:]  # (B, 1); the last is 1 up to rounding
    return torch.searchsorted(cdf, thresholds, right=True).squeeze(-1).clamp_(max=cdf.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, uniforms, temperature=1.0):
    """Sample a response to each prompt, with a KV cache. prompts: B lists of token ids. uniforms:
    (B, max_new_tokens) in [0, 1), decide every choice. Returns B lists of token ids, each ended by
    the end of text or cut. ValueError if a prompt is empty or leaves no room in the context."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ValueError("a prompt has no tokens")
    if max(lengths) + max_new_tokens > model.config.context:
        raise ValueError(f"{max(lengths)} tokens of prompt and {max_new_tokens} of response do not "
                         f"fit the context of {model.config.context}")
    was_training = model.training
    model.eval()
    cache, hidden = read_prompts(model, prompts, max_new_tokens)
    rows = torch.arange(len(prompts), device=hidden.device)  # (B,) those in the batch
    running = torch.ones_like(rows, dtype=torch.bool)
    responses = rows.new_full((len(prompts), max_new_tokens), -1)
    uniforms = uniforms.to(hidden.device)
    for t in range(max_new_tokens):
        tokens = sample_tokens(model.unembed(hidden), uniforms[rows, t], temperature)  # (B,)
        responses[rows, t] = torch.where(running, tokens, -1)
        running = running & (tokens != model.config.end_of_text)
        if (t + 1) % CHECK_EVERY[hidden.device.type] == 0:
            left = int(running.sum())
            if model.unfinished(left) == 0:
                break
            if 0 < left <= len(rows) // 2:  # drop the finished rows
                kept = running.nonzero().squeeze(1)
                rows, tokens, running = rows[kept], tokens[kept], running[kept]
                cache.keep(kept)
        if t + 1 < max_new_tokens:
            hidden = model.decode(tokens, cache)  # (B, C)
    model.train(was_training)
    return [[token for token in row if token >= 0] for row in responses.tolist()]
