"""Replacements for parts of a model that change its speed and memory, and its results by rounding only. `Runtime.place` puts
them in; parameters and their names stay.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, Block

MANY_LOGITS = 2**24  # from this number on, the logits of padding cost more than leaving them out


class PlacedGPT(GPT):
    """A GPT that computes log-probabilities for at most `max_logits` logits at a time. If there are more, they are recomputed
    in the backward pass instead of kept.

    On a GPU the unembedding gets `padding_rows` rows of zeros, so that it has a multiple of 64 rows: the product with GPT-2's
    50,257 takes three times as long. Within Runtime.sampling, a GPU decodes by `recorded_steps`."""

    max_logits, padding_rows = 2**27, 0
    all_reduce = None  # while sampling, if ranks share the weights
    kept_steps = recorded_steps = None  # a RecordedSteps, once there is one; the same, but only within Runtime.sampling

    def forward(self, tokens, positions=None, temperature=1.0):
        """As GPT's. With a large vocabulary on a CPU, positions that only pad a row are left out: their log-probability is 0.
        Positions rise along a row, so a 0 after the first column is padding (readers.make_batch)."""
        if positions is None or tokens.device.type != "cpu" or positions.numel() * self.config.vocab_size < MANY_LOGITS:
            return super().forward(tokens, positions, temperature)
        exists = positions > 0
        exists[:, 0] = True
        rows = exists.nonzero()[:, 0]  # (N,)
        positions = positions[exists]  # (N,)
        logprobs = self.logprobs(self.hidden(tokens)[rows, positions], tokens[rows, positions + 1], temperature)
        return torch.zeros(exists.shape, dtype=logprobs.dtype).masked_scatter(exists, logprobs)

    def logprobs(self, hidden, targets, temperature=1.0):
        rows_at_once = max(1, self.max_logits // self.config.vocab_size)
        rows = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
        if targets.numel() <= rows_at_once:
            return self.logprobs_of_rows(*rows, temperature).view(targets.shape)
        pieces = zip(*(x.split(rows_at_once) for x in rows))
        pieces = [checkpoint(self.logprobs_of_rows, *piece, temperature, use_reentrant=False) for piece in pieces]
        return torch.cat(pieces).view(targets.shape)

    def logprobs_of_rows(self, hidden, targets, temperature):
        """hidden (N, C), targets (N,) -> (N,)"""
        if not self.padding_rows:
            return super().logprobs(hidden, targets, temperature)
        weight = F.pad(self.tokens.weight, (0, 0, 0, self.padding_rows))
        bias = torch.zeros(len(weight), device=weight.device, dtype=weight.dtype)
        bias[self.config.vocab_size:] = -torch.inf  # probability 0
        logits = self.last_layer(hidden / temperature, weight, bias)
        return -F.cross_entropy(logits, targets, reduction="none")

    def unfinished(self, rows):
        return rows if self.all_reduce is None else self.all_reduce(rows)[0]

    def unembed(self, hidden):
        if self.recorded_steps is not None:
            return self.last_layer(hidden, self.recorded_steps.unembedding)[..., : self.config.vocab_size]
        return super().unembed(hidden)

    def decode(self, tokens, cache):
        if self.recorded_steps is not None:
            return self.recorded_steps(tokens, cache)
        return super().decode(tokens, cache)


@contextlib.contextmanager
def sampling_in_step(model, all_reduce):
    """Inside, a sharded model is sampled from as it is: ranks gather each block for each token, so all continue until the last
    one's rows are finished."""
    model.unshard()  # the embeddings and the last norm; blocks are gathered as they are called
    model.all_reduce = all_reduce
    try:
        yield
    finally:
        model.all_reduce = None
        model.reshard()


class PlacedBlock(Block):
    """A block that may be compiled, and that may keep only its input for the backward pass and recompute the rest. Neither
    matters while sampling, where it works on a cache."""

    def configure(self, compiled, checkpointed):
        self.checkpointed = checkpointed
        self.compute = torch.compile(super().forward, dynamic=True) if compiled else super().forward

    def forward(self, x, cache=None, layer=0):
        if cache is not None:
            return super().forward(x, cache, layer)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)
