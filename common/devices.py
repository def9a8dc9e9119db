"""Which device and precision a process computes with, and how processes start and stop talking to each other."""

import atexit
import contextlib
import ctypes
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from common.config import Others, UserError

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products


def choose_device(name, local_rank):
    """auto, cpu, cuda (this process's GPU) or cuda:N -> torch.device"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention builds a plan for every new shape, and every sampled token is a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(precision, device):
    """The precision of matrix products. auto is the best of a GPU (bf16 where it is not emulated), float32 elsewhere. With
    16 bits, float32 products on a GPU (the last layer's) are TensorFloat-32: their inputs are rounded to 10 bits, those of bf16
    products to 7."""
    if precision == "auto":
        precision = "float32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    return PRECISIONS[precision]


def keep_freed_memory():
    """Linux's malloc returns large blocks to the kernel when they are freed, and the next tensor of that size waits for new,
    zeroed pages: a quarter of the time of a step at 124M parameters."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        never_trim, never_map = (-1, -1), (-4, 0)  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        for parameter, value in (never_trim, never_map):
            ctypes.CDLL(None).mallopt(parameter, value)


def join(world_size):
    """Connect to the store through which the processes find each other."""
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
