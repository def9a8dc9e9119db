"""Matrix products on a CPU by oneDNN instead of MKL: a copy of the network's layers that compute the same, and the weights in
the order that oneDNN reads fastest while sampling. See docs/speed.md for when this is faster.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model import LastLayer


def accelerate(model):
    """Replace the linear layers by those below; parameters and their names stay."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
            elif type(module) is LastLayer:
                module.__class__ = OneDNNLastLayer


class OneDNNLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class OneDNNLastLayer(LastLayer):
    def forward(self, hidden, weight, bias=None):
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.to(weight.dtype), weight, bias)


def linear(x, weight, bias=None):
    """F.linear: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    packed_weight = getattr(weight, "packed", None)
    if packed_weight is not None:
        x = x.to(packed_weight.dtype)
        return product(x, packed_weight, None if bias is None else bias.to(x.dtype))
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if float32 and x.numel() * len(weight) > 2**22:  # smaller products are faster by MKL
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """F.linear and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        x, flat = x.reshape(-1, x.shape[-1]), grad.view(-1, len(weight))  # (rows, I), (rows, O)
        if len(weight) < weight.shape[1]:  # the larger factor goes second: oneDNN packs it
            grad_weight = product(flat.t(), x.t())  # (O, I)
        else:
            grad_weight = product(x.t(), flat.t()).t()
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return product(grad, weight.t()), grad_weight, grad_bias


@contextlib.contextmanager
def packed(model):
    """Inside, each weight has a copy in the order that oneDNN reads fastest: sampling on a CPU takes as long as reading the
    weights once per token. Under autocast the copy is in its precision, except the unembedding's, which is float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.tokens.weight.dtype
    weights = [(module.weight, dtype) for module in model.modules() if isinstance(module, OneDNNLinear)]
    if weights:
        weights.append((model.tokens.weight, model.tokens.weight.dtype))
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if weights else False
    try:
        for weight, dtype in weights:
            if weight.device.type == "cpu" and (dtype == torch.float32 or dtype == torch.bfloat16 and bf16):
                weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), None)
        yield
    finally:
        for weight, _ in weights:
            vars(weight).pop("packed", None)
