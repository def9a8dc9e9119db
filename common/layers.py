"""Replacements for parts of a model that change its speed and memory, and its results by rounding only. `Runtime.place` puts
them in; parameters and their names stay.
"""

import torch
from torch.utils.checkpoint import checkpoint

from model import GPT, Block


class PlacedGPT(GPT):
    """A GPT that computes log-probabilities for at most `max_logits` logits at a time. If there are more, they are recomputed
    in the backward pass instead of kept. While Runtime.sampling sets a `decoder`, it decodes by that."""

    max_logits = 2**28
    decoder = None

    def logprobs(self, hidden, targets, temperature=1.0):
        size = max(1, self.max_logits // self.config.vocab_size)
        if targets.numel() <= size:
            return super().logprobs(hidden, targets, temperature)
        pieces = zip(hidden.flatten(0, -2).split(size), targets.flatten().split(size))
        pieces = [checkpoint(super(PlacedGPT, self).logprobs, *piece, temperature, use_reentrant=False) for piece in pieces]
        return torch.cat(pieces).view(targets.shape)

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
