"""The network: a GPT as in GPT-2 and GPT-3, a scalar head in its place for rewards and values, sampling, and GPT-2's
weights in and out.

    python model.py export out/ppo FOLDER           # a trained model, as transformers reads it
    python model.py plan gpt3-6.7b --gpus 64        # what training a size takes

Used by every stage; imports nothing of the project. Architecture: Radford et al. 2019, section 2.3, and Brown et al. 2020,
section 2.1 (all attention layers dense). The paper's models are this network at 1.3B, 6B and 175B parameters
(section 3.4 and C); its reward and value models have the unembedding replaced by a projection to one number.

Shapes: B rows (episodes), T tokens, C width, H heads, D = C / H, V vocabulary, S slots in the KV cache, N positions whose
next token counts.
"""

import contextlib
import dataclasses
import json
import math
import os
import runpy
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


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

LOGITS = 2**23  # at most so many at a time where log-probabilities are wanted: 32 MiB in float32
ASK_EVERY = {"cpu": 1, "cuda": 8}  # tokens after which generate looks who is done; to ask a GPU is to wait for it


def rounded(n, multiple):
    """n rounded up. Libraries and compilers prepare a kernel for each size they meet, so there should be few."""
    return -(-n // multiple) * multiple


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)  # nn.Linear, but faster on a CPU
        self.out = Linear(config.width, config.width)

    def forward(self, x, cache=None, slot=0, mask=None):
        """x (B, T, C); its keys and values go into the `cache` (2, B, H, S, D), where there is one, from `slot` on. Without
        a `mask` every token attends to itself and those before it in x. With one, (B, 1, 1, S), T is 1: the token attends to
        the slots up to its own to which the mask adds 0, not minus infinity."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            cache[0, :, :, slot : slot + T], cache[1, :, :, slot : slot + T] = k, v
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            k, v = cache[:, :, :, : slot + 1]  # each (B, H, slot + 1, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., : slot + 1])  # (B, H, 1, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: each half adds to the residual stream what it computes from the normalised stream."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            Linear(4 * config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, slot=0, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), cache, slot, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """All but the last layer: what GPT and ScalarModel share, under the same parameter names."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
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

    def set_context(self, context):
        """Grow or cut the context to `context` tokens: the first positions stay what they are, new ones start at random
        and have to be learned."""
        kept, std = min(context, self.config.context), self.positions.weight.std().item()
        positions = torch.randn(context, self.config.width).to(self.positions.weight) * std  # (context, C)
        positions[:kept] = self.positions.weight.detach()[:kept]
        self.positions = nn.Embedding.from_pretrained(positions, freeze=False)
        self.config = dataclasses.replace(self.config, context=context)

    def hidden(self, tokens, cache=None, slot=0, positions=None, mask=None):
        """tokens (B, T) -> final normalised hidden states (B, T, C).

        Rows of unequal length are padded at the end: attention looks back only, so what stands behind a row's last
        token changes nothing before it. To go on from a `cache` (layers, 2, B, H, S, D), give one token a row, the `slot`
        that its key and value take, its positions (B,), and the `mask` of Attention."""
        B, T = tokens.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        if cache is None:  # prompts for a cache have lengths that leave room in it
            tokens = F.pad(tokens, (0, min(rounded(T, 8), self.config.context) - T))
        where = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions[:, None]
        x = self.tokens(tokens) + self.positions(where)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():  # only x is kept for the backward pass
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], slot, mask)
        return self.norm(x)[:, :T]


class GPT(Trunk):
    def unembed(self, hidden):
        """hidden (..., C) -> logits (..., V), by the transposed token embedding; in float32 also under autocast."""
        return last_layer(hidden, self.tokens.weight)

    def forward(self, tokens, where=None, temperature=1.0):
        """tokens (B, T) -> logits (B, T, V). With a mask `where` (B, T) of the N positions that matter: the
        log-probabilities (N,) of the tokens that follow them, in reading order. (Both in one method, since a model that is
        spread over processes must be called by this one.)"""
        hidden = self.hidden(tokens)
        if where is None:
            return self.unembed(hidden)
        at = where.flatten().nonzero().squeeze(1)  # (N,)
        padded = F.pad(at, (0, rounded(len(at), 64) - len(at)))
        hidden, targets = hidden.flatten(0, 1)[padded], tokens.roll(-1, dims=1).flatten()[padded]
        return self.logprobs(hidden, targets, temperature)[: len(at)]

    def logprobs(self, hidden, targets, temperature=1.0):
        """log softmax(logits / temperature) at the targets: hidden (N, C), targets (N,) -> (N,) float32 or wider.

        Logits are the largest thing there is, so here there are never more than LOGITS of them: where it takes several
        pieces, a piece's logits are let go and computed again in the backward pass."""
        def score(hidden, targets):
            return gather_logprobs(self.unembed(hidden / temperature), targets)  # dividing hidden: C numbers rather than V

        size = LOGITS // self.config.vocab_size
        size = size // 64 * 64 or max(1, size)
        if len(hidden) <= size:
            return score(hidden, targets)
        return torch.cat([checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False)
                          for piece in zip(hidden.split(size), targets.split(size))])

    @classmethod
    def from_gpt2(cls, path, dropout=0.0):
        """GPT-2's weights in transformers' layout: `path` is a folder with model.safetensors or pytorch_model.bin, in parts
        or whole, or one such file. config.json beside it says the shape; without one, the weights must be of a size in
        PRESETS. float64 stays, narrower types become float32. Raises ValueError where it is not this architecture."""
        return gpt2_in(cls, Path(path), dropout)

    def save_gpt2(self, folder):
        """Write config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them."""
        gpt2_out(folder, self.config, gpt2_weights(self), architectures=["GPT2LMHeadModel"])


class ScalarModel(Trunk):
    """Reward model and value function: one number at every position."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.width, 1)
        # Hidden states are normalised, so this gives scores of variance about 1 (Stiennon et al. 2020 do likewise).
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens (B, T) -> (B, T): at each position, the score of the text up to and including its token; in float32 also
        under autocast."""
        return last_layer(self.hidden(tokens), self.head.weight, self.head.bias).squeeze(-1)

    def load_trunk(self, weights):
        """Start from a GPT's weights (a state dict); the head keeps its own initialisation."""
        missing, unexpected = self.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != {"head.weight", "head.bias"}:
            raise ValueError("not the weights of a GPT of this size")

    def save_gpt2(self, folder):
        """Write config.json and model.safetensors, as transformers' GPT2ForSequenceClassification with one label reads
        them: its logit is the score at a text's last token, which has to be the end of text.

        transformers finds that token as the last that is no padding, so padding gets an id of its own behind the
        vocabulary; and its head has no bias, so ours goes into the last norm's: w (h + b w / |w|^2) = w h + b."""
        weights, head = gpt2_weights(self), self.head.weight.detach()  # (1, C)
        if not head.any():
            raise ValueError("the head's weights are all 0: nothing to fold its bias into")
        shift = self.head.bias.detach() * head[0] / head.square().sum()  # (C,)
        weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + shift
        padding = torch.zeros_like(self.tokens.weight[:1])
        weights["transformer.wte.weight"] = torch.cat([weights["transformer.wte.weight"], padding])  # (V + 1, C)
        gpt2_out(folder, self.config, weights | {"score.weight": head}, architectures=["GPT2ForSequenceClassification"],
                 vocab_size=self.config.vocab_size + 1, pad_token_id=self.config.vocab_size, id2label={"0": "score"},
                 label2id={"score": 0})


def last_layer(hidden, weight, bias=None):
    """hidden (..., C), weight (O, C), bias (O,) -> (..., O), in the weights' precision also under autocast.

    GPT-2's logits lie around -100, where bf16 numbers are 0.5 apart: log-probabilities computed from such logits are off by
    more than the clip of PPO's ratio, and scores that differ by less than that tie."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.to(weight.dtype), weight, bias)


def token_logprobs(logits, tokens):
    """Log-probability of each token given those before it. logits (B, T, V), tokens (B, T) -> (B, T - 1) float32
    or wider: entry t is log p(tokens[:, t + 1] | tokens[:, : t + 1])."""
    return gather_logprobs(logits[:, :-1], tokens[:, 1:])


def gather_logprobs(logits, targets):
    """logits (..., V), targets (...) -> log softmax(logits) at the targets (...), in float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")  # in one go: less memory and time
    return -losses.view(targets.shape)


def pick(logits, uniforms, temperature):
    """One token a row by inverse CDF: the first whose cumulative probability exceeds the row's uniform number.
    logits (B, V), uniforms (B,) in [0, 1) -> (B,). Temperature 0 takes the likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    chosen = torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return chosen.clamp_(max=logits.shape[-1] - 1)


def read_prompts(model, prompts, cache, together):
    """Fill the cache from prompts in order of length, `together` of them at a time; equal ones stand side by side and are
    read once. -> the hidden state of each one's last token (B, C)."""
    counts, device = Counter(map(tuple, prompts)), cache.device
    distinct, row, last = list(counts), 0, []
    for i in range(0, len(distinct), together):
        some = distinct[i : i + together]
        copies = torch.tensor([counts[prompt] for prompt in some], device=device)
        lengths = torch.tensor([len(prompt) for prompt in some], device=device)
        T = min(rounded(len(some[-1]), 8), len(prompts[-1]))
        tokens = torch.tensor([[*prompt] + [0] * (T - len(prompt)) for prompt in some], device=device)  # padded at the end
        part = torch.empty_like(cache[:, :, : len(some), :, :T])
        hidden = model.hidden(tokens, part)[torch.arange(len(some), device=device), lengths - 1]  # (some, C)
        if len(some) < copies.sum():
            hidden, part = hidden.repeat_interleave(copies, dim=0), part.repeat_interleave(copies, dim=2)
        cache[:, :, row : row + len(hidden), :, :T] = part
        row += len(hidden)
        last.append(hidden)
    return torch.cat(last)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, uniforms, temperature=1.0, anyone=None):
    """Sample a response to each prompt, with a KV cache.

    prompts: B lists of token ids, of any lengths from 1; equal ones are read once, however often they occur.
    uniforms: (B, max_new_tokens) numbers in [0, 1) that decide every choice, so the same numbers give the same text.
    anyone: where processes share one model's weights, they must go on together: asked with how many rows are left here,
    it says how many there are in all.
    Returns B lists of token ids, each ended by the end-of-text token or, if that never came, cut after
    max_new_tokens. Raises ValueError where a prompt is empty or leaves no room in the context.
    """
    device, config, P = model.tokens.weight.device, model.config, max(map(len, prompts))
    S = P + max_new_tokens  # slots: the prompt's, padded at its end, and then the response's
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt has no tokens")
    if S > config.context:
        raise ValueError(f"{P} tokens of prompt and {max_new_tokens} of response do not fit the context of {config.context}")
    training, every = model.training, ASK_EVERY[device.type]
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # little padding, equal ones together
    rows = torch.tensor(order, device=device)  # (B,), which prompts are still in the batch
    positions = torch.tensor([len(prompts[i]) for i in order], device=device)  # (B,), of the next token
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.tokens.weight.dtype
    cache = torch.zeros(config.layers, 2, len(prompts), config.heads, S, config.width // config.heads, device=device,
                        dtype=dtype)
    slots = torch.arange(S, device=device)
    mask = torch.zeros(len(prompts), 1, 1, S, device=device, dtype=dtype)  # no row looks at the padding of its prompt
    mask[:, 0, 0].masked_fill_((slots >= positions[:, None]) & (slots < P), -math.inf)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    responses = torch.full((len(prompts), max_new_tokens), -1, device=device)
    uniforms = uniforms.to(device)
    with contextlib.nullcontext() if anyone else packed(model):
        last = read_prompts(model, [prompts[i] for i in order], cache, len(prompts) if anyone else 16)  # (B, C)
        for t in range(max_new_tokens):
            token = pick(model.unembed(last), uniforms[rows, t], temperature)  # (rows,)
            responses[rows, t] = torch.where(running, token, -1)
            running = running & (token != config.end_of_text)
            if t + 1 == max_new_tokens:
                break
            if t % every == every - 1:
                left = int(running.sum())
                if (anyone(left) if anyone else left) == 0:
                    break
                if 0 < rounded(left, 16) <= len(rows) // 2:  # finished rows leave, by sixteens; a copy costs less than they do
                    kept = running.argsort(descending=True)[: rounded(left, 16)]
                    rows, token, positions, running = rows[kept], token[kept], positions[kept], running[kept]
                    mask, cache = mask[kept], cache[:, :, kept]
            last = model.hidden(token[:, None], cache, P + t, positions, mask)[:, 0]  # (rows, C)
            positions = positions + 1
    model.train(training)
    return [[token for token in row if token >= 0] for row in responses.tolist()]


# ---------------------------------------------------------------- products on a CPU

def onednn(x, weight, bias=None):
    """x (..., I), weight (O, I) or packed, bias (O,) -> (..., O), on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """F.linear and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        x, flat = x.reshape(-1, x.shape[-1]), grad.view(-1, len(weight))  # (rows, I), (rows, O)
        wide = len(weight) < weight.shape[1]  # the larger factor goes second: oneDNN packs it
        to_weight = onednn(flat.t(), x.t()) if wide else onednn(x.t(), flat.t()).t()  # (O, I)
        return onednn(grad, weight.t()), to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear(x, weight, bias=None):
    """F.linear: x (..., I), weight (O, I), bias (O,) -> (..., O).

    On a CPU PyTorch multiplies float32 by MKL, which leaves the widest instructions of an AMD processor unused; oneDNN is twice
    as fast there. And for sampling it can read weights that were packed beforehand: another two to four times."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    packed = getattr(weight, "packed", None)
    if packed is not None:
        x = x.to(packed.dtype)
        return onednn(x, packed, None if bias is None else bias.to(x.dtype))
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if single and x.numel() * len(weight) > 2**22:  # below, the call costs more than it brings
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


@contextlib.contextmanager
def packed(model):
    """Sampling on a CPU takes as long as it takes to read the weights, once a token. Inside this context there is a copy of
    them in the order that oneDNN reads fastest and, under autocast, already in its precision (the unembedding's is float32
    always): see `linear`."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.tokens.weight.dtype
    weights = [(model.tokens.weight, model.tokens.weight.dtype)]
    weights += [(module.weight, dtype) for module in model.modules() if isinstance(module, Linear)]
    try:
        for weight, dtype in weights:
            if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
                    dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
                weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), None)
        yield
    finally:
        for weight, _ in weights:
            vars(weight).pop("packed", None)


# ---------------------------------------------------------------- GPT-2's weights, in and out

def gpt2_names(layers):
    """{our name of a parameter: transformers', without its prefix "transformer."}"""
    modules = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
    for i in range(layers):
        modules |= {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for ours, theirs in (
            ("norm1", "ln_1"), ("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj"), ("norm2", "ln_2"),
            ("mlp.0", "mlp.c_fc"), ("mlp.2", "mlp.c_proj"))}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")
            if kind == "weight" or theirs not in ("wte", "wpe")}


def transposed(name):
    """Whether transformers, whose GPT-2 multiplies by weights (in, out), keeps this parameter the other way round."""
    return name.startswith("blocks.") and ".norm" not in name and name.endswith(".weight")


def gpt2_weights(model):
    """The trunk's parameters under transformers' names and in its shapes."""
    weights = model.state_dict()
    return {f"transformer.{theirs}": weights[ours].T if transposed(ours) else weights[ours]
            for ours, theirs in gpt2_names(model.config.layers).items()}


def gpt2_in(kind, path, dropout):
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for file in files:
        weights |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    config = gpt2_config(folder / "config.json", shapes, path)
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise ValueError(f"{path}: the unembedding lm_head is not the token embedding; here they are one")
    names = gpt2_names(config.layers)
    for name in weights.keys() - names.values():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # buffers: the causal mask
            raise ValueError(f"{path}: {name} has no place in GPT-2 with {config.layers} layers")
    with torch.device("meta"):  # shapes alone: the values come from the file
        model = kind(dataclasses.replace(config, dropout=dropout))
    ours = {}
    for name, parameter in model.named_parameters():
        w = weights.get(names[name])
        if w is None:
            raise ValueError(f"{path}: {names[name]} is missing")
        w = (w.T if transposed(name) and w.dim() == 2 else w).contiguous()
        if w.shape != parameter.shape or not w.is_floating_point():
            raise ValueError(f"{path}: {names[name]} is not of the shape or type that config.json asks for")
        ours[name] = w
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in ours.values()) else torch.float32
    model.load_state_dict({name: w.to(dtype) for name, w in ours.items()}, assign=True)
    return model


def gpt2_config(path, shapes, source):
    """-> GPTConfig, from config.json or, without it, as the size in PRESETS that has weights of these shapes."""
    def sizes(config):
        return {"wte.weight": (config.vocab_size, config.width), "wpe.weight": (config.context, config.width),
                f"h.{config.layers - 1}.ln_1.weight": (config.width,)}

    if not path.is_file():
        vocab_size = (*shapes.get("wte.weight", ()), 0)[0]
        for shape in PRESETS.values():
            config = GPTConfig(vocab_size=vocab_size, **shape)
            if sizes(config).items() <= shapes.items() and f"h.{config.layers}.ln_1.weight" not in shapes:
                return config
        raise ValueError(f"{source}: config.json is missing beside it, and it is of no size known by name")
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        if c.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type {c['model_type']} is not supported, only gpt2")
        config = GPTConfig(vocab_size=c["vocab_size"], context=c.get("n_positions", 1024), layers=c["n_layer"],
                           heads=c["n_head"], width=c["n_embd"])
        if any(type(n) is not int or n < 1 for n in dataclasses.astuple(config)[:-1]):
            raise ValueError("sizes are whole numbers from 1")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{path}: no configuration of GPT-2 ({type(error).__name__}: {error})") from None
    expected = dict(activation_function=["gelu_new", "gelu_pytorch_tanh"], layer_norm_epsilon=[1e-5],
                    scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False],
                    tie_word_embeddings=[True])
    for name, values in expected.items():
        if c.get(name, values[0]) not in values:
            raise ValueError(f"{path}: {name} {c[name]} is not supported, only {values[0]}")
    if config.layers > len(shapes):
        raise ValueError(f"{source}: its weights are not of {config.layers} layers")
    for name, shape in sizes(config).items():  # before anything of these sizes is made
        if shapes.get(name, shape) != shape:
            raise ValueError(f"{source}: {name} is not of the shape that config.json asks for")
        if name not in shapes:
            raise ValueError(f"{source}: {name} is missing")
    return config


def gpt2_out(folder, config, weights, **more):
    end = config.end_of_text
    record = dict(model_type="gpt2", vocab_size=config.vocab_size, n_positions=config.context, n_ctx=config.context,
                  n_embd=config.width, n_layer=config.layers, n_head=config.heads, activation_function="gelu_new",
                  layer_norm_epsilon=1e-5, resid_pdrop=config.dropout, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end,
                  eos_token_id=end, tie_word_embeddings=True,
                  dtype=str(weights["transformer.wte.weight"].dtype).removeprefix("torch.")) | more
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """-> {name: tensor}. The format: 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}},
    and the tensors' bytes without a gap. Raises ValueError where the header promises anything else than the file holds."""
    broken = ValueError(f"{path} is cut short, damaged or no safetensors file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise broken
        entries = []
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, e in header.items():
                (start, stop), shape, dtype = e["data_offsets"], e["shape"], DTYPES[e["dtype"]]
                numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
                if any(type(n) is not int or n < 0 for n in numbers) or math.prod(n or 1 for n in shape) > 2**48:
                    raise broken
                entries.append((start, stop, name, dtype, shape))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise broken from None
        tensors, position = {}, 0
        for start, stop, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
            if start != position or stop - start != math.prod(shape) * dtype.itemsize or stop > size - 8 - length:
                raise broken
            data = bytearray(file.read(stop - start))
            tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
            position = stop
        if position != size - 8 - length:
            raise broken
    return tensors


def read_pickle(path):
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: no code is run
        weights = {name: w for name, w in weights.items() if isinstance(name, str) and isinstance(w, torch.Tensor)}
        if all(w.layout == torch.strided and w.device.type == "cpu" for w in weights.values()):
            return weights
    except Exception:  # torch raises a dozen kinds here
        pass
    raise ValueError(f"{path} is damaged or holds more than plain weights")


def write_safetensors(path, tensors):
    """The reverse of read_safetensors; the file appears whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, w in tensors.items():
        header[name] = dict(dtype=names[w.dtype], shape=list(w.shape), data_offsets=[position, position + w.nbytes])
        position += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for w in tensors.values():
                file.write(w.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":  # the network imports nothing of the project; its two commands do
    tool = "plan.py" if sys.argv[1:2] == ["plan"] else "data/export.py"
    runpy.run_path(str(Path(__file__).parent / tool), run_name="__main__")
