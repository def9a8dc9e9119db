"""Models whose weights are spread over the processes (--shard, FSDP2), without a process ever holding all of them.

A model starts with its weights on the meta device, where tensors have a shape and no memory. Each process then allocates its
part and fills it from the whole weights, one tensor at a time: they lie in a file that is mapped into memory, or are random
numbers. Buffers are small: every process has them.
"""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT


class Recording(TorchDispatchMode):
    """Records the in-place operations (normal_, zeros_) that would give weights on the meta device their values. `shard` repeats
    them for one whole tensor at a time, so that a sharded model starts with the same random numbers as any other."""

    def __init__(self):
        super().__init__()
        self.calls, self.random_state = [], torch.get_rng_state()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name.endswith("_") and args[0].is_meta:  # in place
            self.calls.append((operation, args, kwargs or {}))
        return operation(*args, **(kwargs or {}))


def build(kind, config):
    """kind(config) with its weights on the meta device -> the model, and a Recording of their initial values."""
    hook = nn.modules.module.register_module_parameter_registration_hook(
        lambda module, name, parameter: nn.Parameter(parameter.to("meta")))
    try:
        with Recording() as recording:
            return kind(config), recording
    finally:
        hook.remove()


def allocate(model, device):
    """Give a model of `build`, sharded or not, memory on the device, in place. Weights have no values yet."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def shard(model, mesh, dtype, device, recording=None):
    """Spread the weights of `model`, which are whole on the CPU or on the meta device, over the mesh, in place.
    Those of the meta device get their initial values from the recording, if any. dtype: of matrix products in the blocks."""
    weights = dict(model.named_parameters())
    names = {id(weight): name for name, weight in weights.items()}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for block in model.blocks:  # gathered one block at a time and freed after use
        fully_shard(block, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # embeddings and last layer, in float32
    allocate(model, device)
    fill(model, {name: weight for name, weight in weights.items() if not weight.is_meta})
    if recording is not None:
        torch.set_rng_state(recording.random_state)
        for operation, (weight, *args), kwargs in recording.calls:  # a later one replaces the values of an earlier one
            values = operation(torch.empty(weight.shape), *args, **kwargs)
            fill(model, {names[id(weight)]: values})
    # The first forward pass decides which module is the root, but sampling calls the blocks without one. FSDP has no public
    # name for this, and a forward pass would gather every block.
    model._get_fsdp_state()._lazy_init()


@torch.no_grad()
def fill(model, weights):
    """Copy {name: whole tensor} into the weights of a model, sharded or not, one after the other."""
    targets = model.state_dict()
    for name, weight in weights.items():
        target = targets[name]
        if hasattr(target, "device_mesh"):
            weight = distribute_tensor(weight, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(weight)


@torch.no_grad()
def whole_copy(model, dtype):
    """A sharded GPT -> an unsharded one on every rank, to sample from. Weights of matrix products are in `dtype`, embeddings
    and norms in float32."""
    copy, _ = build(GPT, model.config)
    weights = model.state_dict()
    for name, weight in weights.items():
        if hasattr(weight, "full_tensor"):
            in_product = name.startswith("blocks.") and ".norm" not in name
            weights[name] = weight.to(dtype if in_product else torch.float32).full_tensor()
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False).to(weights["tokens.weight"].device)
