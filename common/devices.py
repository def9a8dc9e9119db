"""Which device and precision a process computes with."""

import contextlib
import ctypes

import torch

from common.config import UserError

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products


def device_type(name):
    """auto, cpu, cuda, cuda:N or mps -> cpu, cuda or mps"""
    if name != "auto":
        return name.split(":")[0]
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name, local_rank):
    """auto, cpu, cuda (this process's GPU), cuda:N or mps (Apple's GPU) -> torch.device"""
    if name == "auto":
        name = device_type(name)
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither cpu nor cuda nor mps")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("PyTorch finds no Apple GPU here")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention builds a plan for every new shape, and every sampled token is a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def choose_dtype(precision, device):
    """The precision of matrix products. auto is the best of an Nvidia GPU (bf16 where it is not emulated), float32 elsewhere.
    With 16 bits, float32 products on such a GPU (the last layer's) are TensorFloat-32: their inputs are rounded to 10 bits,
    those of bf16 products to 7. On an Apple GPU 16 bits are refused: there, attention may see later tokens
    (github.com/pytorch/pytorch/issues/195910)."""
    if precision == "auto":
        precision = "float32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    if device.type == "mps" and precision != "float32":
        raise UserError(f"--precision {precision}: an Apple GPU takes float32; PyTorch's 16-bit attention is wrong there")
    return PRECISIONS[precision]


def configure_malloc(shard):
    """Linux's malloc returns large blocks to the kernel when they are freed, and the next tensor of that size waits for new,
    zeroed pages: a quarter of the time of a step at 124M parameters. So freed memory is kept. With `shard`, where memory is
    scarce, each block from 1 MiB on is returned: kept blocks rarely have the size of the next tensor, and memory
    grows to several times of what is in use."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # parameters of malloc.h
    settings = {mmap_threshold: 2**20} if shard else {trim_threshold: -1, mmap_max: 0}
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        for parameter, value in settings.items():
            ctypes.CDLL(None).mallopt(parameter, value)
