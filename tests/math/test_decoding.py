"""Sampling by recorded steps (common/decoding.py), replayed here by calling them again: the tokens are those without."""

import pytest
import torch

from common import decoding
from common.layers import PlacedGPT
from conftest import random_gpt
from model import generate


@pytest.fixture(autouse=True)
def replayed_by_calling(monkeypatch):
    monkeypatch.setattr(decoding, "capture", lambda work: work)


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


@pytest.mark.parametrize("rows", [1, 5, 8, 40])
def test_recorded_steps_sample_the_same_tokens(rows):
    """Batches one after the other: their graphs share memory, and rows are dropped in between."""
    model = placed(seed=4)
    decoder = decoding.Decoder(model, torch.float32)  # no copies in 16 bits
    for seed in range(3):
        prompts = random_prompts(rows, seed)
        model.decoder = None
        expected = sample(model, prompts, 12, seed)
        decoder.update()
        model.decoder = decoder
        assert sample(model, prompts, 12, seed) == expected


def test_a_larger_batch_after_a_smaller_one_gets_new_memory():
    model = placed(seed=4)
    expected = [sample(model, random_prompts(rows, rows), 12) for rows in (3, 30, 3)]
    model.decoder = decoding.Decoder(model, torch.float32, pad=7)
    model.decoder.update()
    assert [sample(model, random_prompts(rows, rows), 12) for rows in (3, 30, 3)] == expected


def test_steps_in_16_bits_use_the_newest_weights():
    """The same hidden states as autocast gives, also after the weights have changed."""
    model = placed(dtype=torch.float32, seed=4)
    decoder = decoding.Decoder(model, torch.bfloat16)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.decoder = None
            expected = sample(model, [[1, 2, 3], [4]], 12)
            decoder.update()
            model.decoder = decoder
            assert sample(model, [[1, 2, 3], [4]], 12) == expected
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
