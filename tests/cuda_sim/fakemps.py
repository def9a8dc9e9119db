"""A simulated Apple GPU: fakecuda.py's device under the name mps, which refuses what an Apple GPU refuses: tensors in float64,
and operators for which this version of PyTorch has no kernel there, by the table that it is built from. It can't show whether
those kernels compute the right values."""

import functools
import importlib.util
import re
from pathlib import Path
from unittest import mock

from fakecuda import GUARD, FakeCuda, aten, is_device  # before torch
import torch


@functools.cache
def operators():
    """{name: its entry in the table of PyTorch's operators}"""
    folder = Path(importlib.util.find_spec("torchgen").origin).parent
    table = (folder / "packaged/ATen/native/native_functions.yaml").read_text()
    return {entry[: entry.index("(")]: entry for entry in table.split("\n- func: ")[1:]}


@functools.cache
def has_kernel(name):
    """Whether PyTorch computes an operator on an Apple GPU: by a kernel, or by other operators."""
    entry = operators().get(name, "")  # one that is not in the table is made of others
    delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
    kernels = re.findall(r"^    ([\w, ]+): ", entry.partition("\n  dispatch:\n")[2], re.MULTILINE)
    if any(key == "MPS" or key.startswith("Composite") for line in kernels for key in line.split(", ")):
        return True
    return has_kernel(delegate[1]) if delegate else not kernels


class FakeMps(FakeCuda):
    """A context manager: inside, "mps" works, with FakeCuda's rules and counters."""

    device = torch.device("mps:0")

    def patch(self):
        GUARD.simulate_mps(True)
        self.stack.callback(GUARD.simulate_mps, False)
        self.stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))

    def wrap(self, inner):
        if inner.dtype == torch.float64:
            raise TypeError("mps has no float64")
        return super().wrap(inner)

    def count(self, func, name, args, kwargs):
        """Called before each operator on the device."""
        if func.namespace == "aten" and not has_kernel(func.name().removeprefix("aten::")):
            raise NotImplementedError(f"mps has no kernel for {func}")
        if func is aten._to_copy.default and is_device(kwargs.get("device"), "cpu") and kwargs.get("dtype") == torch.float64:
            raise TypeError("mps has no float64: copy to the CPU first, then convert")
        super().count(func, name, args, kwargs)

    def attention_kernel(self, q, k, v, mask):
        return "mps"
