"""The processes of a run: how they find each other, and what must be equal in all of them."""

import atexit
import gc
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from common import files
from common.config import Others, UserError


def join(world_size, device_type):
    """Connect to the store through which the processes find each other."""
    if device_type == "mps":
        raise UserError("--device mps: an Apple GPU computes in one process, without --shard; several take --device cpu")
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("--shard spreads a model over processes: start it with torchrun")
    store, Others.rank, Others.world_size = next(dist.rendezvous("env://"))
    # After a restart by torchrun the store still has the addresses of the dead ranks: use another prefix.
    Others.store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    Others.store.set_timeout(timedelta(minutes=10))


def start_process_group(device):
    gpu = device.type == "cuda"
    # Numbers that are on the CPU are summed there by gloo. Two hours: the others wait while one rank downloads or saves.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=Others.store, rank=Others.rank,
                            world_size=Others.world_size, timeout=timedelta(hours=2), device_id=device if gpu else None)
    atexit.register(stop_process_group)


def stop_process_group():
    """At a successful exit (see config.leave). gloo's threads live as long as anything refers to the group; one that is still
    alive while Python shuts down sometimes aborts the process (SIGABRT)."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


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
