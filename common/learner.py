"""A model that is trained: its optimizer, gradient accumulation, clipping, and learning-rate schedules."""

import contextlib
import math

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from common.config import UserError


class Learner:
    """A model with its Adam optimizer. Gradients accumulate over micro-batches and are averaged over the ranks:

        for micro_batch in learner.accumulate(micro_batches):
            loss = ...learner(micro_batch)... / number of terms in the global batch
            learner.backward(loss)
        grad_norm = learner.step(lr)
    """

    def __init__(self, model, lr, runtime):
        self.model, self.runtime = model, runtime
        # Adam as in the paper: beta1 0.9, beta2 0.95 (C), no weight decay.
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.skipped = self.skipped_in_a_row = 0  # updates
        data_parallel = runtime.world_size > 1 and not runtime.config.shard
        self.wrapped = DistributedDataParallel(model) if data_parallel else model

    def __call__(self, *args):
        """The model's forward pass, in the precision of the run."""
        with self.runtime.autocast():
            return self.wrapped(*args)

    def accumulate(self, micro_batches, more_follow=False):
        """Iterate over micro-batches. Ranks average their gradients after the last one only, or not yet if `more_follow`."""
        for i, micro_batch in enumerate(micro_batches):
            with self.no_sync(more_follow or i + 1 < len(micro_batches)):
                yield micro_batch

    @contextlib.contextmanager
    def no_sync(self, enabled):
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not enabled)
            yield
        elif enabled and self.wrapped is not self.model:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    def backward(self, loss):
        """The backward pass of this rank's part of a global mean: its sum, divided by the global count. Ranks average
        gradients, so it is multiplied by their number; with fp16, by the loss scale. The loss may be on the CPU, where
        reward.py computes it: many small operations are faster there than on a GPU."""
        self.scaler.scale(loss.to(self.runtime.device) * self.runtime.world_size).backward()

    def step(self, lr, max_norm=1.0):
        """One optimizer step, with gradients clipped to a global norm (GPT-3's: 1). Returns the norm before clipping. An update
        with a gradient that is not finite is skipped; UserError after --patience of them in a row."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.scaler.update()
        if self.skipped_in_a_row >= self.runtime.config.patience:
            raise UserError(f"the gradient was not finite {self.skipped_in_a_row} times in a row (--patience): the run diverged; "
                            "a lower --lr may help")
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self):
        """What a resumed run needs besides weights and optimizer state."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state):
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def cosine(step, steps, final=0.1):
    """Fraction of the peak learning rate: half a cosine from 1 down to `final` (C.1, C.2), no warmup."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_constant(step, warmup=10, start=0.1):
    """Fraction of the peak learning rate: linear from `start` to 1 over `warmup` steps, then 1 (C.4)."""
    return min(1.0, start + (1 - start) * step / warmup)
