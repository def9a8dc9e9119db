"""Sampling by recorded steps (common/decoding.py). A graph is replaced by calls of what it records, with the limits of a graph:
its tensors must keep their addresses, and each replay overwrites the hidden states of the one before."""

import gc
import inspect
import weakref

import pytest
import torch

from common import decoding
from common.layers import PlacedGPT
from conftest import cpu, random_gpt
from model import generate


def addresses(graph, steps):
    tensors = graph.keys_values, graph.mask, graph.slot, graph.lengths, graph.tokens, *steps.network.parameters()
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture(autouse=True)
def replayed_by_calling(monkeypatch):
    def capture(work):
        graph, steps = (weakref.proxy(inspect.getclosurevars(work).nonlocals[name]) for name in ("graph", "self"))
        work()
        hidden, before = graph.hidden, addresses(graph, steps)

        def replay():
            assert addresses(graph, steps) == before
            graph.run(steps.network)
            graph.hidden = hidden.copy_(graph.hidden)
        return replay
    monkeypatch.setattr(decoding, "capture", capture)


def placed(dtype=torch.float64, **shape):
    model = random_gpt(dtype=dtype, **shape)
    model.__class__ = PlacedGPT
    return model


def sample(model, prompts, length, seed=1):
    uniforms = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(seed))
    return generate(model, prompts, length, uniforms)


def random_prompts(count, seed):
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=numbers).tolist()
    return [torch.randint(0, 8, (n,), generator=numbers).tolist() for n in lengths]


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("rows", [1, 5, 8, 40])
def test_recorded_steps_sample_the_same_tokens(rows):
    """Batch after batch: their graphs share memory, and rows are dropped in between."""
    model = placed(seed=4)
    steps = decoding.RecordedSteps(model, torch.float32)  # no copies in 16 bits
    for seed in range(8):
        prompts = random_prompts(rows, seed)
        model.recorded_steps = None
        expected = sample(model, prompts, 12, seed)
        steps.update()
        model.recorded_steps = steps
        assert sample(model, prompts, 12, seed) == expected
        steps.storage.fill_(torch.nan)  # what a diverged run may leave


def test_a_larger_batch_after_a_smaller_one_gets_new_memory():
    model = placed(seed=4)
    expected = [sample(model, random_prompts(rows, rows), 12) for rows in (3, 30, 3)]
    model.recorded_steps = steps = decoding.RecordedSteps(model, torch.float32, padding_rows=7)
    steps.update()
    assert sample(model, random_prompts(3, 3), 12) == expected[0]
    old = weakref.ref(steps.storage)
    assert [sample(model, random_prompts(rows, rows), 12) for rows in (30, 3)] == expected[1:]
    assert old() is None


def test_steps_in_16_bits_use_the_newest_weights():
    """The same tokens as under autocast, also after the weights have changed."""
    model = placed(dtype=torch.float32, seed=4)
    steps = decoding.RecordedSteps(model, torch.bfloat16)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.recorded_steps = None
            expected = sample(model, [[1, 2, 3], [4]], 12)
            steps.update()
            model.recorded_steps = steps
            assert sample(model, [[1, 2, 3], [4]], 12) == expected
        change(model)


def test_steps_are_recorded_without_dropout():
    model = placed(dropout=0.5, seed=4).train()
    expected = sample(model, [[1, 2, 3], [4]], 12)
    model.recorded_steps = decoding.RecordedSteps(model, torch.float32)
    model.recorded_steps.update()
    assert sample(model, [[1, 2, 3], [4]], 12) == expected and model.training


def on_a_gpu(model):
    """The model placed, and a runtime that believes to be on a GPU."""
    runtime = cpu()
    model = runtime.place(model)
    runtime.device = torch.device("cuda")
    return model, runtime


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_sampling_on_a_gpu_records_steps_of_the_newest_weights_and_ends_with_them():
    model, runtime = on_a_gpu(random_gpt(seed=4))
    for _ in range(3):
        expected = sample(model, [[1, 2, 3], [4]], 12)
        with runtime.sampling(model):
            assert model.recorded_steps is not None
            assert sample(model, [[1, 2, 3], [4]], 12) == expected
        assert model.recorded_steps is None
        change(model)
    with pytest.raises(ValueError), runtime.sampling(model):
        sample(model, [[]], 12)
    assert model.recorded_steps is None


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_a_model_that_is_gone_takes_its_recorded_steps_along():
    model, runtime = on_a_gpu(random_gpt(seed=4))
    with runtime.sampling(model):
        sample(model, [[1, 2, 3], [4]], 12)
    gone = weakref.ref(model), weakref.ref(model.kept_steps)
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("rows_at_once", [1000, 2])
def test_padding_the_unembedding_changes_no_logprob_and_no_gradient(rows_at_once):
    tokens, positions = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[0, 1], [1, 2]])
    results = []
    for padding_rows in (0, 7):
        model = cpu(logits_memory=rows_at_once * 9 / 2**28).place(random_gpt(dtype=torch.float64))
        model.padding_rows = padding_rows
        logprobs = model(tokens, positions, 0.7)
        logprobs.mul(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        results.append((logprobs.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])
