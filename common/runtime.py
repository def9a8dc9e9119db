"""This process: its rank among those that torchrun started, its device, its precision, and its share of the work.

One process without torchrun is rank 0 of 1. Nothing here knows about RLHF.
"""

import atexit
import contextlib
import os
import platform
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from common import files, layers, onednn, sharding
from common.config import Disagreement, Others, UserError
from common.decoding import RecordedSteps
from common.devices import PRECISIONS, choose_device, choose_dtype, configure_malloc, device_type
from common.processes import join, loaded_code, settings_and_sizes, start_process_group
from model import GPT


@dataclass(frozen=True)
class RuntimeConfig:
    """How a stage is run: this changes its speed and memory, and its results by rounding only (--compile also changes the
    random numbers of dropout)."""
    device: str = "auto"  # cpu, cuda, cuda:N, mps (Apple's GPU), or auto: cuda or mps if available
    precision: str = "auto"  # float32, bf16, or fp16 with loss scaling; auto: 16 bits on an Nvidia GPU, else float32
    micro_batch: int = 0  # maximum rows per forward pass and process, with gradient accumulation; 0: no maximum
    shard: bool = False  # shard weights, gradients and optimizer state over the processes (FSDP2)
    activation_checkpointing: bool = False  # recompute activations inside the blocks in the backward pass
    sampling_copy: bool = True  # with --shard: sample from a whole copy of the weights; else blocks are gathered per token
    compile: bool = False  # torch.compile the blocks
    logits_memory: float = 0.0  # maximum GiB of logits held at once; more are recomputed in pieces; 0: 0.5, or 5% of an Nvidia GPU
    patience: int = 10  # consecutive updates skipped for a gradient that is not finite, before the run stops
    resume: bool = True  # resume a stopped run of the same configuration

    def __post_init__(self):
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"--precision is auto or one of {', '.join(PRECISIONS)}")
        if self.micro_batch < 0 or self.patience < 1 or self.logits_memory < 0:
            raise ValueError("--micro_batch and --logits_memory are at least 0, --patience is at least 1")


# The settings that a resumed run may change.
RESUMABLE_CHANGES = {field.name for field in fields(RuntimeConfig)} - {"precision"} | {"out", "save_every"}


class Runtime:
    """Rank, device and precision of this process, and communication with the others."""

    def __init__(self, config=RuntimeConfig(), settings=None):
        """settings: the script's Config, if it is not `config`. All ranks must have the same."""
        self.config = config
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        starts_group = (self.world_size > 1 or config.shard) and not dist.is_initialized()
        if starts_group:
            join(self.world_size, device_type(config.device))
        self.device = choose_device(config.device, self.local_rank)
        self.dtype = choose_dtype(config.precision, self.device)
        if self.world_size > 1:
            self.check_same({"version of PyTorch": torch.__version__, "kind of device": self.device.type,
                             "precision": str(self.dtype), **loaded_code(), **settings_and_sizes(settings or config)})
        if self.device.type == "cpu":
            configure_malloc(config.shard)
        if starts_group:
            start_process_group(self.device)
        if config.shard:
            self.mesh = init_device_mesh(self.device.type, (self.world_size,))
            atexit.register(self.mesh._pg_registry.clear)  # else DTensor's caches keep the mesh, and it keeps the group

    @property
    def is_main(self):
        return self.rank == 0

    # ---- this rank's share of the work

    def local_rows(self, count):
        """This rank's share of `count` rows of the global batch, as a slice."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def micro_batches(self, rows, count, length):
        """Split `rows`, this rank's share of `count` rows of the global batch, into lists of at most --micro_batch rows:
        rows of similar length together, so that little is padding; the same number of lists on every rank."""
        n = self.num_micro_batches(count)
        rows = sorted(rows, key=length) if n > 1 else rows
        return [rows[i * len(rows) // n : (i + 1) * len(rows) // n] for i in range(n)]

    def num_micro_batches(self, count):
        return -(-count // (self.world_size * self.config.micro_batch)) if self.config.micro_batch else 1

    def check_batch_size(self, count, flag):
        """UserError if a rank would have no row in some micro-batch. Nothing to check if there are no rows at all."""
        if count and count // self.world_size < self.num_micro_batches(count):
            detail = f" in a --micro_batch of {self.config.micro_batch}" if self.config.micro_batch else ""
            raise UserError(f"--{flag}: {count} rows a step leave some of {self.world_size} ranks without one{detail}")

    def local_batches(self, items, batch_size):
        """This rank's part of the items in lists of at most `batch_size`, the same number on every rank: (list, True). A rank
        without items left gets (the first item, False), so that all ranks make the same collective calls."""
        for i in range(0, len(items), batch_size * self.world_size):
            group = items[i : i + batch_size * self.world_size]
            mine = group[self.local_rows(len(group))]
            yield (mine, True) if mine else (items[:1], False)

    def distribute(self, count, work):
        """[work(0), ..., work(count - 1)], each computed by one rank and returned on all. With --shard, ranks call work equally
        often, because they gather weights together: one that has none left repeats the last."""
        results = []
        for first in range(0, count, self.world_size):
            i = first + self.rank
            if i < count or self.config.shard:
                results.append((i, work(min(i, count - 1))))
        results = sorted(self.all_gather(results), key=lambda pair: pair[0])
        return [result for i, result in results if i < count]

    # ---- communication

    def all_reduce(self, *numbers):
        """Each number (a float or a 0-d tensor) summed over all ranks, as a list of floats. Waits for a GPU only if one of
        them is there."""
        if self.device.type == "mps":  # no float64 there, and one rank
            return [float(n) for n in numbers]
        on_device = any(isinstance(n, torch.Tensor) and n.device.type != "cpu" for n in numbers)
        device = self.device if on_device else torch.device("cpu")
        total = torch.stack([n.detach().to(device, torch.float64) if isinstance(n, torch.Tensor)
                             else torch.full((), n, dtype=torch.float64, device=device) for n in numbers])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, items):
        """A list from each rank -> the concatenation in rank order, on every rank."""
        if self.world_size == 1:
            return items
        lists = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def once_per_machine(self, work):
        """Call work() on one rank of each machine first, then on its others, which find its result (a download)."""
        result = work() if self.local_rank == 0 else None
        self.barrier()
        return result if self.local_rank == 0 else work()

    def check_same(self, facts, advice="all processes need the same"):
        """UserError if {name: value} differs between the ranks, for example because one machine has other files; the value None
        is for something that is missing. A rank with None instead of facts takes part, but is not compared. Before there is a
        process group, facts go through torchrun's store. Returns the facts of the first rank."""
        if Others.store is not None and not dist.is_initialized():
            Others.tell(facts)
            by_rank = Others.hear()
        else:
            by_rank = self.all_gather([(f"{platform.node()} (rank {self.rank})", facts)])
        (first_machine, first), *others = [(machine, theirs) for machine, theirs in by_rank if theirs is not None]
        for machine, theirs in [(first_machine, first), *others]:
            if "error" in theirs:
                raise Disagreement(f"{machine}: {theirs['error']}")
        for machine, theirs in others:
            for name in first | theirs:
                a, b = first.get(name), theirs.get(name)
                if a is None and b is not None:
                    raise Disagreement(f"{first_machine} has no {name}, unlike {machine}; {advice}")
                if b is None and a is not None:
                    raise Disagreement(f"{machine} has no {name}, unlike {first_machine}; {advice}")
                if a != b:
                    raise Disagreement(f"{machine} has another {name} than {first_machine}; {advice}")
        return first

    def check_same_files(self, paths):
        """UserError if the contents of these files differ between the machines, or only some have one. -> {path: digest}"""
        if self.local_rank > 0:  # one process per machine reads them
            return self.check_same(None)
        return self.check_same({str(path): files.digest(path) if os.path.exists(path) else None for path in paths})

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    # ---- models

    def new_model(self, kind, config):
        """kind(config) with random weights, placed."""
        return self.place(*sharding.build(kind, config)) if self.config.shard else self.place(kind(config))

    def place(self, model, recording=None):
        """Put the model on this rank's device; with --shard, a part of it. Weights on the meta device get memory, and values if
        there is a recording of them (sharding.build)."""
        self.configure(model)
        if self.config.shard:
            sharding.shard(model, self.mesh, self.dtype, self.device, recording)
        elif model.tokens.weight.is_meta:
            sharding.allocate(model, self.device)
        else:
            model.to(self.device)
        return model

    def configure(self, model):
        """Replace the parts of a model that common/layers.py has."""
        if isinstance(model, GPT):
            model.__class__ = layers.PlacedGPT
            model.max_logits = int((self.config.logits_memory or default_logits_memory(self.device)) * 2**28)  # of 4 bytes
            model.padding_rows = -model.config.vocab_size % 64 if self.device.type == "cuda" else 0
        if self.config.compile or self.config.activation_checkpointing:
            for block in model.blocks:
                block.__class__ = layers.PlacedBlock
                block.configure(self.config.compile, self.config.activation_checkpointing)

    def autocast(self):
        """Matrix products in --precision, from float32 weights, except the last layer's (model.LastLayer)."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def sampling(self, model):
        """Yields the model to sample from by model.generate, for as long as its weights stay the same: `model` itself, or a
        whole copy of a sharded one."""
        with self.autocast():
            if isinstance(model, FSDPModule) and not self.config.sampling_copy:
                with layers.sampling_in_step(model, self.all_reduce):
                    yield model
                return
            if isinstance(model, FSDPModule):
                model = sharding.whole_copy(model, self.dtype if self.device.type == "cuda" else torch.float32)
                self.configure(model)
            if self.device.type == "cuda":
                if model.kept_steps is None:
                    model.kept_steps = RecordedSteps(model, self.dtype, model.padding_rows)
                model.kept_steps.update()
                model.recorded_steps = model.kept_steps
                try:
                    yield model
                finally:
                    model.recorded_steps = None
            else:
                with onednn.packed(model):
                    yield model


def default_logits_memory(device):
    """Default of --logits_memory, in GiB."""
    return torch.cuda.get_device_properties(device).total_memory / 20 / 2**30 if device.type == "cuda" else 0.5


def local_sum(*numbers):
    """What Runtime.all_reduce is for a single rank."""
    return numbers
