"""Checks that drive.py runs in a process with the simulated device: of the device itself, and of what the project chooses on
it. An assertion or error is a failed check; what a check returns is judged by tests/system/test_cuda.py."""

import collections
import contextlib
import os
from unittest import mock

from fakecuda import A100, H100, T4, FakeCuda  # before torch
from fakemps import FakeMps
import torch

import common.runtime
import model
from common.config import UserError
from common.runtime import Runtime, RuntimeConfig

DEVICES = {"H100": H100, "A100": A100, "T4": T4}


@contextlib.contextmanager
def raises(kind, words):
    try:
        yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def waits(gpu, work):
    """What the host waits for in work()."""
    gpu.reset()
    work()
    return sorted(why for (_, why), number in gpu.syncs.items() for _ in range(number))


# ---------------------------------------------------------------- the simulated device

def mixed_devices_raise():
    with FakeCuda():
        x = torch.ones(3, device="cuda")
        for mixed in (lambda: x + torch.ones(3), lambda: torch.where(torch.ones(3) > 0, x, x), lambda: x @ torch.ones(3),
                      lambda: torch.ones(3)[x.long()], lambda: torch.nn.functional.embedding(torch.zeros(2).long(), x[:, None])):
            with raises(RuntimeError, "same device"):
                mixed()
        assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a 0-d CPU tensor is a number


def values_and_gradients_are_real():
    weights = torch.nn.Linear(3, 2)
    with FakeCuda():
        twin = torch.nn.Linear(3, 2).to("cuda")
        twin.load_state_dict(weights.state_dict())
        assert twin.weight.is_cuda and twin.weight.is_leaf
        twin(torch.ones(3, device="cuda")).square().sum().backward()
        gradient = twin.weight.grad.cpu()
    weights(torch.ones(3)).square().sum().backward()
    assert torch.allclose(gradient, weights.weight.grad)


def waits_are_counted():
    with FakeCuda() as gpu:
        x = torch.ones(3, device="cuda")
        assert waits(gpu, lambda: x + x) == []
        assert waits(gpu, lambda: x.sum().item()) == ["item"]
        assert waits(gpu, lambda: bool(x.sum() > 0)) == ["item"]
        assert waits(gpu, lambda: x.tolist()) == ["copy to host"]
        assert waits(gpu, lambda: x.cpu()) == ["copy to host"]
        assert waits(gpu, lambda: x[x > 0]) == ["boolean index"]
        assert waits(gpu, lambda: x.nonzero()) == ["nonzero"]
        assert waits(gpu, lambda: torch.tensor([1.0], device="cuda")) == ["copy from pageable memory"]
        gpu.reset()
        x.sum().item()
        [(place, why)] = gpu.syncs
        assert place.startswith("tests/cuda_sim/checks.py:") and place.endswith(" waits_are_counted") and why == "item"
        assert gpu.kernels.total() == 1


def copies_from_pinned_memory_wait_for_nothing():
    with FakeCuda() as gpu:
        pageable, target = torch.arange(6), torch.zeros(6, dtype=torch.long, device="cuda")
        pinned = pageable.pin_memory()
        assert pinned.is_pinned() and pinned[2:].is_pinned() and not pageable.is_pinned()
        assert waits(gpu, lambda: pinned.to("cuda", non_blocking=True)) == []
        assert waits(gpu, lambda: target.copy_(pinned, non_blocking=True)) == []
        assert waits(gpu, lambda: pinned.copy_(target, non_blocking=True)) == []
        assert waits(gpu, lambda: target.to("cpu", non_blocking=True)) == []
        assert waits(gpu, lambda: pinned.to("cuda")) == ["copy from pinned memory, blocking"]
        assert waits(gpu, lambda: pageable.to("cuda", non_blocking=True)) == ["copy from pageable memory"]
        assert waits(gpu, lambda: pageable.copy_(target, non_blocking=True)) == ["copy to host"]
        assert target.tolist() == [0, 1, 2, 3, 4, 5]


def devices_differ_in_bf16():
    for name, emulated in (("H100", False), ("A100", False), ("T4", True)):
        with FakeCuda(DEVICES[name]):
            assert torch.cuda.is_bf16_supported(including_emulation=False) == (not emulated)
            assert torch.cuda.is_bf16_supported()
    with FakeCuda(H100, bf16=False):
        assert not torch.cuda.is_bf16_supported(including_emulation=False)


def a_device_is_set_by_its_index():
    with FakeCuda():
        torch.cuda.set_device("cuda:0")
        torch.cuda.set_device(0)
        with raises(ValueError, "with a specified index"):
            torch.cuda.set_device("cuda")


def an_apple_gpu_refuses_float64_and_what_has_no_kernel():
    with FakeMps():
        x = torch.ones(3, device="mps")
        for work in (lambda: torch.ones(3).double().to("mps"), x.double, lambda: x.to("cpu", torch.float64),
                     lambda: x.cumsum(0, dtype=torch.float64)):
            with raises(TypeError, "float64"):
                work()
        with raises(NotImplementedError, "aten.geqrf"):
            torch.geqrf(x[:, None])
        assert (x + x).cpu().double().tolist() == [2, 2, 2] and x.device.type == "mps"


def a_graph_must_not_wait():
    with FakeCuda() as gpu:
        x = torch.zeros(3, device="cuda")
        replay = gpu.capture(lambda: x.add_(1))
        replay()
        assert x.tolist() == [2, 2, 2]
        with raises(RuntimeError, "stream is capturing"):
            gpu.capture(lambda: x.sum().item())


def attention_kernels_are_those_of_the_device():
    expected = {  # (causal, masked) with cuDNN, and without
        ("H100", torch.bfloat16): (("cudnn", "cudnn"), ("flash", "efficient")),
        ("A100", torch.bfloat16): (("flash", "efficient"), ("flash", "efficient")),
        ("T4", torch.float16): (("efficient", "efficient"), ("efficient", "efficient")),
        ("T4", torch.bfloat16): (("math", "math"), ("math", "math")),
        ("H100", torch.float32): (("efficient", "efficient"), ("efficient", "efficient")),
    }
    for (device, dtype), kernels in expected.items():
        for cudnn, (causal, masked) in zip((True, False), kernels):
            with FakeCuda(DEVICES[device]) as gpu, cudnn_attention(cudnn):
                q = torch.ones(1, 2, 8, 16, dtype=dtype, device="cuda")
                torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
                torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(8, 8, dtype=dtype, device="cuda"))
                assert {kind: kernel for _, kind, kernel in gpu.attention} == {"causal": causal, "masked": masked}


@contextlib.contextmanager
def cudnn_attention(enabled):
    """The project may disable it for the whole process: restore it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


# ---------------------------------------------------------------- the project on it

def precision_on_each_device():
    """-> {device: the precision that --precision auto chooses}"""
    names = {dtype: name for name, dtype in common.runtime.PRECISIONS.items()}
    chosen = {}
    for device, capability in DEVICES.items():
        with FakeCuda(capability):
            chosen[device] = names[Runtime(RuntimeConfig(device="cuda:0")).dtype]
    return chosen


def device_cuda_without_an_index():
    with FakeCuda():
        assert str(Runtime(RuntimeConfig(device="cuda")).device) == "cuda:0"


def auto_takes_the_gpu_that_is_there():
    """-> {what is there: the device that --device auto chooses}"""
    chosen = {"nothing": Runtime(RuntimeConfig()).device}
    with FakeMps():
        chosen["mps"] = Runtime(RuntimeConfig()).device
    with FakeCuda(), mock.patch.object(torch.backends.mps, "is_available", lambda: True):
        chosen["both"] = Runtime(RuntimeConfig()).device
    return {there: str(device) for there, device in chosen.items()}


def an_apple_gpu_takes_float32_and_one_process():
    with FakeMps():
        assert Runtime(RuntimeConfig(device="mps")).dtype == torch.float32
        for refused in (dict(precision="bf16"), dict(precision="fp16"), dict(shard=True)):
            with raises(UserError, "an Apple GPU"):
                Runtime(RuntimeConfig(device="mps", **refused))
        with mock.patch.dict(os.environ, WORLD_SIZE="2"), raises(UserError, "one process"):
            Runtime(RuntimeConfig(device="mps"))


def a_twentieth_of_the_memory_is_for_logits():
    with FakeCuda():  # 80 GiB
        placed = Runtime(RuntimeConfig(device="cuda")).place(model.GPT(model.GPTConfig(**model.PRESETS["nano"])))
    assert placed.max_logits == 4 * 2**28 and placed.padding_rows == 47
    assert Runtime(RuntimeConfig(device="cpu")).place(model.GPT(model.GPTConfig(**model.PRESETS["nano"]))).max_logits == 2**27


def sample_on(gpu, lengths, precision="auto", layers=2):
    """Responses of each of these numbers of tokens, to 64 prompts, by a random model, which rarely ends one.
    -> [kernels started, for each length]; gpu.attention counts for all."""
    totals, attention = [], collections.Counter()
    config = model.GPTConfig(vocab_size=600, context=256, layers=layers, heads=2, width=32)
    with gpu, cudnn_attention(True):
        torch.manual_seed(0)
        runtime = Runtime(RuntimeConfig(device="cuda:0", precision=precision))
        gpt = runtime.place(model.GPT(config))
        for tokens in lengths:
            gpu.reset()
            with runtime.sampling(gpt):
                model.generate(gpt, [[1] * (20 + i % 9) for i in range(64)], tokens, torch.rand(64, tokens))
            totals.append(gpu.kernels.total())
            attention += gpu.attention
    gpu.attention = attention
    return totals


def attention_while_sampling():
    """-> {device: {prompts or tokens: the kernel}}"""
    chosen = {}
    for device, precision in (("H100", "bf16"), ("A100", "bf16"), ("T4", "fp16")):
        gpu = FakeCuda(DEVICES[device])
        sample_on(gpu, [3], precision)
        kinds = {"causal": "prompts", "masked": "tokens"}
        chosen[device] = {kinds[kind]: kernel for _, kind, kernel in gpu.attention}
    return chosen


def kernels_per_token():
    """With twelve layers."""
    few, many = sample_on(FakeCuda(), [1, 17], "bf16", layers=12)
    return (many - few) / 16
