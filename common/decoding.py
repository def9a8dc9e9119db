"""Sampling on a GPU: the network's work for one token per row, recorded once as a CUDA graph and replayed for every token.

One token takes about 15 kernels per layer, of a few microseconds each; starting them from Python takes longer than running
them. A graph starts all of them at once, but every tensor in it keeps its address and shape. So the cache has all of its
slots from the first token on (those not yet used are masked), and the numbers of rows and slots are rounded up, so that a few
graphs serve all batches.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import sharding
from model import GPT


class RecordedSteps:
    """Computes `GPT.decode` for a placed model while it is sampled from. Weights of matrix products are copied in the precision
    `dtype`, because autocast would convert them again for each token. The unembedding is copied with `padding_rows` more rows
    (see layers.PlacedGPT)."""

    def __init__(self, model, dtype, padding_rows=0):
        self.parameters = dict(model.named_parameters())  # not the model, which has this object: they are freed together
        self.padding_rows = padding_rows
        self.network, _ = sharding.build(GPT, model.config)
        weights = dict(model.state_dict())
        self.copies = {}  # name: copy
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and dtype not in (torch.float32, module.weight.dtype):
                for kind in ("weight", "bias"):
                    self.copies[f"{name}.{kind}"] = torch.empty_like(weights[f"{name}.{kind}"], dtype=dtype)
        self.network.load_state_dict(weights | self.copies, assign=True)
        self.network.to(model.tokens.weight.device).eval().requires_grad_(False)
        self.unembedding = self.storage = self.loaded = self.graph = None
        self.graphs = {}  # (rows, slots): Graph

    def update(self):
        """Copy the weights, which an update may have changed, to where the graphs read them."""
        for name, copy in self.copies.items():
            copy.copy_(self.parameters[name].detach())
        self.unembedding = F.pad(self.parameters["tokens.weight"].detach(), (0, 0, 0, self.padding_rows))

    @torch.no_grad()
    def __call__(self, tokens, cache):
        """tokens (B,), the next of each row of the KVCache -> their hidden states (B, C), valid until the next call."""
        if cache.keys_values is not self.loaded:
            self.load(cache)
        self.graph.tokens[: len(tokens), 0] = tokens
        self.graph.replay()
        cache.used += 1
        return self.graph.hidden[: len(tokens), 0]

    def load(self, cache):
        """A new cache, or one that lost rows: its contents move to where a graph works."""
        layers, two, rows, heads, slots, width = cache.keys_values.shape
        rounded = max(8, 1 << (rows - 1).bit_length()), -(-slots // 64) * 64
        shape = layers, two, rounded[0], heads, rounded[1], width
        if rounded not in self.graphs:
            self.graphs[rounded] = self.record(cache.keys_values, shape)
        self.graph = graph = self.graphs[rounded]
        graph.keys_values.zero_()
        graph.keys_values[:, :, :rows, :, : cache.used] = cache.keys_values[..., : cache.used, :]
        graph.mask.fill_(-torch.inf)
        graph.mask[..., : cache.used] = 0
        graph.mask[:rows, ..., : cache.used] = cache.mask[..., : cache.used]
        graph.slot.fill_(cache.used)
        graph.lengths.zero_()
        graph.lengths[:rows] = cache.lengths
        cache.keys_values = self.loaded = graph.keys_values[:, :, :rows, :, :slots]
        cache.lengths = graph.lengths[:rows]

    def record(self, like, shape):
        """A new Graph for keys and values of this shape, in memory that all graphs share: one is used at a time."""
        size = torch.Size(shape).numel()
        if self.storage is None or size > self.storage.numel() or self.storage.dtype != like.dtype:
            self.graphs.clear()  # they work in the old storage, which is freed first
            self.storage = self.loaded = self.graph = None
            self.storage = torch.zeros(size, dtype=like.dtype, device=like.device)
        graph = Graph(self.storage[:size].view(shape))
        graph.replay = capture(lambda: graph.run(self.network))
        return graph


class Graph:
    """The tensors of one graph. To Attention and Trunk.hidden this is a KVCache; here the next slot is a tensor."""

    def __init__(self, keys_values):
        self.keys_values = keys_values  # (layers, 2, B, H, S, D)
        _, _, rows, _, slots, _ = keys_values.shape
        device = keys_values.device
        self.mask = torch.zeros(rows, 1, 1, slots, dtype=keys_values.dtype, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)

    def append(self, layer, k, v):
        """Store keys and values (B, H, 1, D) in the next slot; return all slots, used or not."""
        keys, values = self.keys_values[layer]  # each (B, H, S, D)
        keys.index_copy_(2, self.slot, k)
        values.index_copy_(2, self.slot, v)
        return keys, values

    def run(self, network):
        self.mask.index_fill_(3, self.slot, 0)
        self.hidden = network.hidden(self.tokens, self)  # (B, 1, C)
        self.slot += 1
        self.lengths += 1


def capture(work):
    """Record the kernels that work() starts -> a function that starts them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces the first time
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
