"""This process: its rank among those that torchrun started, its device, its precision, and its share of the work.

One process without torchrun is rank 0 of 1. Nothing here knows about RLHF.
"""

import atexit
import contextlib
import os
import platform
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from common import files, layers, onednn
from common.config import Disagreement, Others, UserError
from common.decoding import RecordedSteps
from common.devices import PRECISIONS, choose_device, choose_dtype, join, start_process_group
from model import GPT


@dataclass(frozen=True)
class RuntimeConfig:
    """How a stage is run: this changes its speed and memory, and its results by rounding only (--compile also changes the
    random numbers of dropout)."""
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: cuda if available
    precision: str = "auto"  # float32, bf16, or fp16 with loss scaling; auto: 16 bits on a GPU, float32 on a CPU
    micro_batch: int = 0  # maximum rows per forward pass and process, with gradient accumulation; 0: no maximum
    shard: bool = False  # shard weights, gradients and optimizer state over the processes (FSDP2)
    activation_checkpointing: bool = False  # recompute activations inside the blocks in the backward pass
    compile: bool = False  # torch.compile the blocks
    logits_memory: float = 0.0  # maximum GiB of logits held at once; more are recomputed in pieces; 0: 0.5, or 5% of a GPU
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
        first = (self.world_size > 1 or config.shard) and not dist.is_initialized()
        if first:
            join(self.world_size)
        self.device = choose_device(config.device, self.local_rank)
        self.dtype = choose_dtype(config.precision, self.device)
        self.check_same({"version of PyTorch": torch.__version__, "kind of device": self.device.type,
                         "precision": str(self.dtype), **loaded_code(), **settings_and_sizes(settings or config)})
        if first:
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
        """[work(0), ..., work(count - 1)], each computed by one rank and returned on all."""
        results = self.all_gather([(i, work(i)) for i in range(self.rank, count, self.world_size)])
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    # ---- communication

    def all_reduce(self, *numbers):
        """Each number (a float or a 0-d tensor) summed over all ranks, as a list of floats. Waits for a GPU only if one of
        them is there."""
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
        """UserError if {name: value} differs between the ranks, for example because one machine has other files. None: it has
        none. Before there is a process group, facts go through torchrun's store."""
        if self.world_size > 1 and not dist.is_initialized():
            Others.tell(facts)
            by_rank = Others.hear()
        else:
            by_rank = self.all_gather([(f"{platform.node()} (rank {self.rank})", facts)])
        (first_machine, first), *others = by_rank
        for machine, theirs in by_rank:
            if "error" in theirs:
                raise Disagreement(f"{machine}: {theirs['error']}")
        for machine, theirs in others:
            for name in first | theirs:
                if (a := first.get(name)) != (b := theirs.get(name)):
                    with_it, without = (machine, first_machine) if a is None else (first_machine, machine)
                    difference = (f"{without} has no {name}, unlike {with_it}" if None in (a, b) else
                                  f"{machine} has another {name} than {first_machine}")
                    raise Disagreement(f"{difference}; {advice}")

    def check_same_files(self, paths):
        """UserError if the contents of these files differ between the ranks, or only some have one. -> {path: digest}"""
        digests = {str(path): files.digest(path) if os.path.exists(path) else None for path in paths}
        self.check_same(digests)
        return digests

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    # ---- models

    def place(self, model):
        """Put the model on this rank's device; with --shard, a part of it."""
        if isinstance(model, GPT):
            model.__class__ = layers.PlacedGPT
            model.max_logits = int((self.config.logits_memory or default_logits_memory(self.device)) * 2**28)  # of 4 bytes
            model.padding_rows = -model.config.vocab_size % 64 if self.device.type == "cuda" else 0
        if self.config.compile or self.config.activation_checkpointing:
            for block in model.blocks:
                block.__class__ = layers.PlacedBlock
                block.configure(self.config.compile, self.config.activation_checkpointing)
        if not self.config.shard:
            return model.to(self.device)
        mixed = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        for block in model.blocks:  # gathered one block at a time and freed after use
            fully_shard(block, mesh=self.mesh, mp_policy=mixed, reshard_after_forward=True)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)  # embeddings and last layer, in float32
        with torch.no_grad():  # the first forward pass decides which module is the root: it must not be a block's
            model(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return model

    def autocast(self):
        """Matrix products in --precision, from float32 weights, except the last layer's (model.LastLayer)."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def sampling(self, model):
        """Inside, model.generate may be called. Yields its `count_unfinished` if ranks share the weights, else None."""
        with self.autocast():
            if isinstance(model, FSDPModule):
                model.unshard()  # the embeddings and the last norm; blocks are gathered as they are called
                yield lambda count: self.all_reduce(count)[0]
                model.reshard()
            elif self.device.type == "cuda":
                if model.kept_steps is None:
                    model.kept_steps = RecordedSteps(model, self.dtype, model.padding_rows)
                model.kept_steps.update()
                model.recorded_steps = model.kept_steps
                try:
                    yield None
                finally:
                    model.recorded_steps = None
            else:
                with onednn.packed(model):
                    yield None


def loaded_code():
    """{file: digest} of the project's modules that are imported."""
    root = Path(__file__).resolve().parents[1]
    paths = {Path(getattr(module, "__file__", None) or "").resolve() for module in list(sys.modules.values())}
    return {str(path.relative_to(root)): files.digest(path) for path in sorted(paths)
            if path.is_relative_to(root) and path.is_file() and "site-packages" not in path.parts}


def settings_and_sizes(config):
    """{setting: value} without --device, and {file: bytes} of the files that they name."""
    settings = {name: value for name, value in asdict(config).items() if name != "device"}
    named = [value for value in settings.values() if isinstance(value, str)]
    return ({f"--{name}": value for name, value in settings.items()} |
            {path: os.path.getsize(path) if os.path.isfile(path) else None for path in named})  # None: no file


def default_logits_memory(device):
    """Default of --logits_memory, in GiB."""
    return torch.cuda.get_device_properties(device).total_memory / 20 / 2**30 if device.type == "cuda" else 0.5


def local_sum(*numbers):
    """What Runtime.all_reduce is for a single rank."""
    return numbers
