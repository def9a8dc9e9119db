"""Sampling on a CPU takes as long as reading the weights once per token. Large weights get a copy in the order that oneDNN
reads fastest, for the time of a `Runtime.sampling`. Small ones stay in the CPU's cache, and PyTorch's own products are faster.
"""

import contextlib

import torch
from torch import nn

from model import LastLayer

LARGE = 2**19  # numbers in a weight; docs/speed.md says what was measured


@contextlib.contextmanager
def packed(model):
    """Inside, large layers compute with copies of their weights. Under autocast the copies are in its precision, except the
    unembedding's, which is float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            if can_be_packed(layer.weight, dtype):
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), None)
                layer.__class__ = PackedLinear
        if can_be_packed(model.tokens.weight, torch.float32):
            model.last_layer.packed = torch.ops.mkldnn._reorder_linear_weight(model.tokens.weight.detach(), None)
            model.last_layer.__class__ = PackedLastLayer
        yield
    finally:
        for layer in (*layers, model.last_layer):
            if vars(layer).pop("packed", None) is not None:
                layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else LastLayer


def can_be_packed(weight, dtype):
    if not torch.backends.mkldnn.is_available() or weight.device.type != "cpu":
        return False
    if weight.numel() < LARGE or weight.dtype != torch.float32:
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Linear):
    def forward(self, x):
        x = x.to(self.packed.dtype)
        return product(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))


class PackedLastLayer(LastLayer):
    def forward(self, hidden, weight, bias=None):
        with torch.autocast("cpu", enabled=False):
            return product(hidden.float(), self.packed, bias)


def product(x, weight, bias):
    """F.linear by oneDNN: x (..., I), packed weight (O, I), bias (O,) -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
