"""Replacements for parts of a model that change its speed and memory, and its results by rounding only. `Runtime.place` puts
them in; parameters and their names stay.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, Block


class PlacedGPT(GPT):
    """A GPT that computes log-probabilities for at most `max_logits` logits at a time. If there are more, they are recomputed
    in the backward pass instead of kept.

    On a GPU the unembedding is multiplied with `pad` more rows, so that their number is a multiple of 64: with GPT-2's 50,257
    the product takes three times as long. While Runtime.sampling sets a `decoder`, it decodes by that."""

    max_logits, pad, decoder = 2**28, 0, None

    def logprobs(self, hidden, targets, temperature=1.0):
        size = max(1, self.max_logits // self.config.vocab_size)
        if targets.numel() <= size:
            return self.piece(hidden.flatten(0, -2), targets.flatten(), temperature).view(targets.shape)
        pieces = zip(hidden.flatten(0, -2).split(size), targets.flatten().split(size))
        pieces = [checkpoint(self.piece, *piece, temperature, use_reentrant=False) for piece in pieces]
        return torch.cat(pieces).view(targets.shape)

    def piece(self, hidden, targets, temperature):
        """hidden (N, C), targets (N,) -> (N,)"""
        if not self.pad:
            return super().logprobs(hidden, targets, temperature)
        weight = F.pad(self.tokens.weight, (0, 0, 0, self.pad))
        bias = torch.zeros(len(weight), device=weight.device)
        bias[self.config.vocab_size:] = -torch.inf  # probability 0
        logits = self.last_layer(hidden / temperature, weight, bias)
        return -F.cross_entropy(logits, targets, reduction="none")

    def unembed(self, hidden):
        if self.decoder is not None:
            return self.last_layer(hidden, self.decoder.unembedding)[..., : self.config.vocab_size]
        return super().unembed(hidden)

    def decode(self, tokens, cache):
        if self.decoder is not None:
            return self.decoder(tokens, cache)
        return super().decode(tokens, cache)


class PlacedBlock(Block):
    """A block that may be compiled, and that may keep only its input for the backward pass and recompute the rest. Neither
    matters while sampling, where it works on a cache."""

    def place(self, compiled, checkpointed):
        self.checkpointed = checkpointed
        self.compute = torch.compile(super().forward, dynamic=True) if compiled else super().forward

    def forward(self, x, cache=None, layer=0):
        if cache is not None:
            return super().forward(x, cache, layer)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)
