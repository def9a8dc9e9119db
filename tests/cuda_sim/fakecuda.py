"""A simulated CUDA device with real values, for PyTorch's CPU build: code that would fail on a GPU fails here, and what would
be slow there is counted. Import it before torch.

    from fakecuda import A100, FakeCuda
    with FakeCuda(A100) as gpu:  # inside, torch.cuda.is_available() is true and "cuda:0" works
        ...                      # tensors on two devices raise RuntimeError, as on CUDA
    print(gpu.syncs, gpu.kernels, gpu.attention)

A tensor on cuda:0 wraps a CPU tensor. A TorchDispatchMode sees every aten call of forward pass, backward pass and optimizer:
it checks the devices by CUDA's rules, runs the call on the wrapped tensors and wraps the results. The choice of an attention
kernel is compiled into PyTorch, so it is computed here by the rules of PyTorch's sdp_utils.cpp. guard.cpp answers what the
C++ side asks of the device; g++ builds it on first use.

Not simulated: memory, several devices, NCCL, streams, events, CUDA graphs (see `FakeCuda.capture`), torch.compile.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
PROJECT = os.fspath(HERE.parents[1]) + os.sep


def build_guard(torch_folder):
    """Compile guard.cpp unless there is a library of this source for this version of torch. Returns the library's path."""
    source = HERE / "guard.cpp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    library = HERE / "__pycache__" / f"guard-{importlib.metadata.version('torch')}-{digest}.so"
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}.tmp")  # another process may build it at the same time
        subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source), "-o", str(temporary),
                        f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"], check=True)
        os.replace(temporary, library)
    return library


def load_guard():
    folder = Path(importlib.util.find_spec("torch").origin).parent
    libraries = folder / "lib/libc10.so", folder / "lib/libtorch_cpu.so", build_guard(folder)
    return [ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL) for library in libraries][-1]


if "torch" in sys.modules:
    raise ImportError("import fakecuda before torch, which looks for CUDA once")
GUARD = load_guard()

import torch
import torch.cuda.amp.common
from torch._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
CPU = torch.device("cpu")

H100, A100, T4 = (9, 0), (8, 0), (7, 5)  # compute capabilities
MIXED = "Expected all tensors to be on the same device, but found at least two devices, a GPU and cpu! ({})"

# Operators that take CPU tensors next to those of CUDA: copies, and indices, which are copied.
TAKE_BOTH = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default,
             aten.index_put_.default, aten._index_put_impl_.default, aten.lift_fresh.default,
             aten._has_compatible_shallow_copy_type.default, aten.empty_like.default}
# Operators that take 0-d CPU tensors, as every pointwise one does.
TAKE_CPU_SCALARS = {"where", "fill_", "masked_fill", "masked_fill_", "lerp", "lerp_"}
# Operators for which the host waits, because it needs their result, or how large it is.
WAITS = {"_local_scalar_dense": "item", "equal": "equal", "nonzero": "nonzero", "masked_select": "masked_select",
         "masked_scatter_backward": "masked_select", "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique",
         "bincount": "bincount"}
# Operators that start no kernel, besides views.
NO_KERNEL = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_",
             "_has_compatible_shallow_copy_type", "resize_", "_local_scalar_dense", "is_same_size", "_unsafe_view", "view"}


class CudaTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` is the CPU tensor with its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                     dtype=inner.dtype, device=FakeCuda.active.device, requires_grad=False)
        tensor.inner = inner
        return tensor

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
        return memo[id(self)]

    def __repr__(self, **options):
        return f"{self.device.type}({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if FakeCuda.active is None:
            raise RuntimeError("a simulated CUDA tensor is used outside FakeCuda")
        return FakeCuda.active.run(func, args, kwargs or {})


def unwrap(value):
    """An operator's argument, with the CPU tensors instead of their wrappers."""
    if isinstance(value, CudaTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)([unwrap(x) for x in value])
    return value


def tensors_among(values):
    """The tensors among an operator's arguments, which may be lists of tensors."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_among(value)
    return found


def is_device(device, kind):
    return device is not None and torch.device(device).type == kind


@functools.cache
def starts_kernel(operator):
    return not operator.is_view and operator.overloadpacket.__name__ not in NO_KERNEL


class OperatorHook(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.run(func, args, kwargs or {})


class FunctionHook(TorchFunctionMode):
    """Functions that never reach an operator with a wrapped tensor, because their C++ reads memory."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_cuda = bool(args) and isinstance(args[0], CudaTensor)
        if func is torch.nn.functional.scaled_dot_product_attention and on_cuda:
            return self.gpu.run_attention(*args, **kwargs)
        if func is torch.Tensor.tolist and on_cuda:
            return args[0].cpu().tolist()
        if func is torch.Tensor.__format__ and on_cuda and args[0].dim() == 0:
            return args[0].item().__format__(*args[1:])
        if func is torch.Tensor.numpy and on_cuda:
            raise TypeError(f"can't convert {args[0].device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if func in (torch.tensor, torch.as_tensor) and is_device(kwargs.get("device"), self.gpu.device.type):
            device = kwargs.pop("device")
            if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
                return args[0].to(device, kwargs.get("dtype", args[0].dtype))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Attention(torch.autograd.Function):
    """Attention as one kernel in each direction; the plain formula computes it."""

    @staticmethod
    def forward(ctx, gpu, is_causal, mask, q, k, v):
        ctx.gpu, ctx.is_causal, ctx.mask = gpu, is_causal, unwrap(mask)
        ctx.save_for_backward(q, k, v)
        with gpu.paused():
            return gpu.wrap(Attention.formula(ctx, unwrap((q, k, v))).detach())

    @staticmethod
    def formula(ctx, inner):
        y = aten._scaled_dot_product_attention_math(*inner, ctx.mask, is_causal=ctx.is_causal)[0]
        return y.transpose(1, 2).contiguous().transpose(1, 2)  # in the order that the fused kernels write

    @staticmethod
    def backward(ctx, grad):
        ctx.gpu.kernels["backward attention"] += 1
        with ctx.gpu.paused(), torch.enable_grad():
            inner = [x.inner.detach().requires_grad_() for x in ctx.saved_tensors]
            grads = torch.autograd.grad(Attention.formula(ctx, inner), inner, grad.inner)
            return None, None, None, *map(ctx.gpu.wrap, grads)


class FakeCuda:
    """A context manager: inside, there is one CUDA device. Counters, by the line of the project that caused it or by the
    autograd node of a backward pass:

    syncs[place, why]               the host waits for the device: .item(), a copy from pageable memory, a boolean index
    kernels[place]                  operators that start at least one kernel: a lower bound
    attention[place, kind, kernel]  kind: causal or masked; kernel: cudnn, flash, efficient or math
    """

    active = None
    device = torch.device("cuda:0")

    def __init__(self, capability=H100, bf16=None):
        """bf16: whether the device computes with it; default: from the Ampere generation on."""
        self.capability = capability
        self.bf16 = capability >= (8, 0) if bf16 is None else bf16
        self.in_project, self.capturing, self.warns = {}, False, False
        self.reset()

    def reset(self):
        """Forget what was counted."""
        self.syncs, self.kernels, self.attention = (collections.Counter() for _ in range(3))

    def __enter__(self):
        assert FakeCuda.active is None
        FakeCuda.active = self
        self.stack = contextlib.ExitStack()
        self.patch()
        # Module.to makes new parameters: assigning to the .data of the old ones would lose the wrapper.
        future = torch.__future__
        self.stack.callback(future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion())
        future.set_overwrite_module_params_on_conversion(True)
        self.stack.enter_context(OperatorHook(self))
        self.stack.enter_context(FunctionHook(self))
        return self

    def patch(self):
        """What PyTorch's Python side asks of the device."""
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "_lazy_init": lambda: None,
            "set_device": lambda device: _get_device_index(device),  # ValueError for a device without an index
            "synchronize": lambda *device: self.sync("synchronize"),
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "is_bf16_supported": lambda including_emulation=True: self.bf16 or including_emulation,
            "get_device_capability": lambda *device: self.capability,
            "get_device_properties": lambda *device: types.SimpleNamespace(total_memory=80 * 2**30, name="simulated"),
        }
        for name, answer in answers.items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        self.stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        if "common.decoding" in sys.modules:
            self.stack.enter_context(mock.patch("common.decoding.capture", self.capture))

    def __exit__(self, *error):
        self.stack.close()
        FakeCuda.active = None

    @contextlib.contextmanager
    def paused(self):
        """Inside, tensors are what they are, and nothing is counted."""
        with (_disable_current_modes(), torch._C.DisableTorchFunction(), torch.autocast(self.device.type, enabled=False),
              torch.autocast("cpu", enabled=False)):
            yield

    def capture(self, work):
        """Stands in for common.decoding.capture, which records work() as a CUDA graph: does the work, and returns a function
        that does it again. The host must not wait for the device in it."""
        def replay():
            self.capturing = True
            try:
                work()
            finally:
                self.capturing = False
        replay()
        return replay

    # ---- counting

    def place(self):
        """The innermost line of the project that is running, or the autograd node."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return f"backward {node.name()}"
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if self.is_project(name):
                return f"{name.removeprefix(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "?"

    def set_sync_debug_mode(self, mode):
        assert mode in ("default", "warn")
        self.warns = mode == "warn"

    def is_project(self, name):
        if name not in self.in_project:
            path = os.path.realpath(name)
            self.in_project[name] = path.startswith(PROJECT) and path != __file__ and "/.venv/" not in path
        return self.in_project[name]

    def sync(self, why):
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing ({why} at {self.place()})")
        self.syncs[self.place(), why] += 1
        if self.warns and why != "synchronize":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def count(self, func, name, args, kwargs):
        if func in (aten._to_copy.default, aten.copy_.default):
            if self.count_copy(func, args, kwargs):
                return
        if name in WAITS:
            self.sync(WAITS[name])
        if name in ("index", "_unsafe_index") or "index_put" in name:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.sync("boolean index")
                if index is not None and index.dim() and not isinstance(index, CudaTensor):
                    self.sync("index from host memory")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync("repeat_interleave without output_size")
        if starts_kernel(func):
            self.kernels[self.place()] += 1

    def count_copy(self, func, args, kwargs):
        """Count a copy between host and device. Returns whether it is one."""
        if func is aten.copy_.default:
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_host, from_host = not isinstance(target, CudaTensor), not isinstance(source, CudaTensor)
            pinned = to_host and target.is_pinned()
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            to_host, from_host = is_device(kwargs.get("device"), "cpu"), not isinstance(source, CudaTensor)
            pinned = to_host  # without blocking, PyTorch copies into new pinned memory
        if to_host and not (non_blocking and pinned):
            self.sync("copy to host")
        if from_host and not source.is_pinned():
            self.sync("copy from pageable memory")
        elif from_host and not non_blocking:
            self.sync("copy from pinned memory, blocking")
        return to_host or from_host

    # ---- running an operator

    def wrap(self, inner):
        return CudaTensor(inner)

    def run(self, func, args, kwargs):
        """The operator `func`, on whatever device its arguments are."""
        tensors = tensors_among((*args, *kwargs.values()))
        mine = [t for t in tensors if isinstance(t, CudaTensor)]
        to_cuda = is_device(kwargs.get("device"), self.device.type)
        if not mine and not to_cuda:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.check_devices(func, name, args, [t for t in tensors if not isinstance(t, CudaTensor)])
        self.count(func, name, args, kwargs)
        inner_kwargs = {key: unwrap(value) for key, value in kwargs.items()}
        if to_cuda:
            inner_kwargs["device"] = CPU
        if func is aten._to_copy.default:
            inner_kwargs.pop("non_blocking", None)
            result = func(unwrap(args[0]), **inner_kwargs)
            return result if is_device(kwargs.get("device"), "cpu") else self.wrap(result)
        result = func(*unwrap(args), **inner_kwargs)
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            return args[0]
        if func._schema.is_mutable and any(t.shape != t.inner.shape for t in mine):
            raise RuntimeError(f"the simulated device does not follow {func}, which changed a shape")
        return self.wrap_results(result, {id(t.inner): t for t in mine})

    def wrap_results(self, result, known):
        """`known`: {id of a CPU tensor: its wrapper}, for operators that work in place."""
        if isinstance(result, (list, tuple)):
            return type(result)([self.wrap_results(x, known) for x in result])
        if not isinstance(result, torch.Tensor):
            return result
        return known[id(result)] if id(result) in known else self.wrap(result)

    def check_devices(self, func, name, args, on_cpu):
        """RuntimeError where CUDA has one. on_cpu: the arguments that are CPU tensors."""
        is_index = name in ("index", "_unsafe_index") or "index_put" in name
        if is_index and not isinstance(args[0], CudaTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if "index_put" in name and not isinstance(args[2], CudaTensor) and args[2].numel() > 1:
            raise RuntimeError(MIXED.format(func))
        takes_scalars = torch.Tag.pointwise in func.tags or name in TAKE_CPU_SCALARS
        if func not in TAKE_BOTH and any(t.dim() > 0 or not takes_scalars for t in on_cpu):
            raise RuntimeError(MIXED.format(func))

    # ---- attention

    def run_attention(self, q, k, v, attn_mask=None, is_causal=False):
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask.to(dtype)
        if not all(isinstance(x, CudaTensor) for x in (q, k, v, attn_mask) if x is not None):
            raise RuntimeError(MIXED.format("attention"))
        if not q.dtype == k.dtype == v.dtype:
            raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {q.dtype} {k.dtype} {v.dtype}")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
            raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, but got {attn_mask.dtype} and {q.dtype}")
        kernel, place = self.attention_kernel(q, k, v, attn_mask), self.place()
        self.attention[place, "causal" if attn_mask is None else "masked", kernel] += 1
        self.kernels[place] += 1
        if attn_mask is not None and kernel == "efficient" and any(stride % 8 for stride in attn_mask.stride()[:-1]):
            self.kernels[f"{place} (pads the mask)"] += 1
        return Attention.apply(self, is_causal, attn_mask, q, k, v)

    def attention_kernel(self, q, k, v, mask):
        """PyTorch's choice among the kernels, with cuDNN 9.16."""
        enabled, generation, width = torch.backends.cuda, self.capability[0], q.shape[-1]
        low = q.dtype in (torch.float16, torch.bfloat16)
        rows_are_contiguous = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (q, k, v))
        if not rows_are_contiguous:
            return "math"
        if enabled.cudnn_sdp_enabled() and generation in (9, 10) and low and width % 8 == 0 and width <= 128 and k.shape[2] != 1:
            return "cudnn"
        if enabled.flash_sdp_enabled() and generation >= 8 and low and width <= 256 and mask is None:
            return "flash"
        emulated = q.dtype == torch.bfloat16 and generation < 8
        aligned = width % (8 if low else 4) == 0
        if enabled.mem_efficient_sdp_enabled() and aligned and not emulated and q.dtype != torch.float64:
            return "efficient"
        return "math"
