"""Models whose weights are spread over the processes (--shard, FSDP2), without a process ever holding all of them.

A model starts on the meta device, where tensors have a shape and no memory. Each process then allocates its part and fills it
from the whole weights, one tensor at a time: they lie in a file that is mapped into memory, or are random numbers.
"""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT


class Recording(TorchDispatchMode):
    """While a model is built on the meta device, records the in-place operations that would give its weights their values."""

    def __init__(self):
        super().__init__()
        self.calls, self.random_state = [], torch.get_rng_state()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name.endswith("_"):
            self.calls.append((operation, args, kwargs or {}))
        return operation(*args, **(kwargs or {}))


def build(kind, config):
    """kind(config) on the meta device; `shard` computes the same initial weights."""
    with torch.device("meta"), Recording() as recording:
        model = kind(config)
    model.recording = recording
    return model


@torch.no_grad()
def shard(model, mesh, dtype, device):
    """Spread the weights of `model`, which are whole on the CPU or on the meta device, over the mesh, in place.
    Weights of the meta device get their initial values if `build` made them, else none."""
    weights, recording = dict(model.named_parameters()), vars(model).pop("recording", None)
    names = {id(weight): name for name, weight in weights.items()}
    model.to("meta")
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for block in model.blocks:  # gathered one block at a time and freed after use
        fully_shard(block, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # embeddings and last layer, in float32
    model.to_empty(device=device)
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
    """Copy {name: whole tensor} into the parameters of a model, sharded or not, one after the other."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameter = parameters[name]
        if hasattr(parameter, "device_mesh"):
            weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(weight)


@torch.no_grad()
def whole_copy(model, dtype):
    """A sharded GPT -> an unsharded one on every rank, to sample from. Weights of matrix products are in `dtype`, embeddings
    and norms in float32."""
    with torch.device("meta"):
        copy = GPT(model.config)
    weights = {}
    for name, parameter in model.named_parameters():
        in_product = name.startswith("blocks.") and ".norm" not in name
        weights[name] = parameter.detach().to(dtype if in_product else torch.float32).full_tensor()
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False)
