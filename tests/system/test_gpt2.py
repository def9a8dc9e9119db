"""GPT-2's weights, vocabulary and files in and out, against transformers and safetensors; and what is refused."""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import requests
import safetensors.torch
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config,
                          GPT2LMHeadModel, GPT2Tokenizer)

import common.files
import common.checkpoints
from common.config import UserError
from common.gpt2 import read_safetensors, resize_positions, write_scalar_model
from conftest import ROOT, cpu, random_gpt, same, save
from data.tokenizer import END, GPT2, Tokenizer, train_bpe
from model import GPT, PRESETS, ScalarModel, generate

REAL = ROOT.parent / "shared" / "real"
BROKEN = "is cut short, damaged or no safetensors file"
LETTERS = [bytes([b]) for b in b"abcdefgh"]  # a vocabulary of 9, with the end of text


def theirs(vocab_size=9, context=16, layers=2, heads=2, width=16, seed=0, **more):
    """transformers' GPT-2 in float64, every parameter random: norms and biases, too."""
    end = vocab_size - 1
    config = GPT2Config(vocab_size=vocab_size, n_positions=context, n_layer=layers, n_head=heads, n_embd=width,
                        bos_token_id=end, eos_token_id=end, **more)
    model = GPT2LMHeadModel(config).double().eval()
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=numbers, dtype=torch.float64) * 0.3)
            if ".ln_" in name and name.endswith("weight"):
                p.add_(1)
    return model


def some_tokens(config, rows=3, seed=1):
    """Rows (3, T) that fill the context."""
    return torch.randint(config.vocab_size, (rows, config.context), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours, hf, bound=1e-10):
    tokens = some_tokens(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), hf.eval()(tokens).logits, rtol=0, atol=bound)


@pytest.fixture
def silence():
    """transformers and Python warn of nothing during the test."""
    complaints, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("transformers")
    handler.emit = lambda record: complaints.append(record.getMessage())
    transformers.utils.logging.warning_once.cache_clear()  # else what was said before is not said again
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(handler)
    assert complaints == []


@contextlib.contextmanager
def little_memory():
    """A quarter of a gigabyte more than now: a huge allocation fails, where else it might only be slow."""
    limits, statm = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------- weights in

SIZES = [dict(vocab_size=7, context=5, layers=1, heads=1, width=4),
         dict(vocab_size=50, context=16, layers=3, heads=4, width=32),
         dict(vocab_size=97, context=11, layers=2, heads=3, width=21)]


def as_safetensors(hf, folder):
    hf.save_pretrained(folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]


def as_safetensors_in_parts(hf, folder):
    hf.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()


def as_pickle(hf, folder):
    hf.config.save_pretrained(folder)
    weights = hf.state_dict()
    assert "transformer.h.0.ln_1.bias" in weights and "lm_head.weight" in weights
    torch.save(weights, folder / "pytorch_model.bin")


def as_pickle_in_parts(hf, folder):
    hf.config.save_pretrained(folder)
    weights = hf.state_dict()
    for part in (1, 2):
        some = {name: weights[name] for name in list(weights)[part - 1::2]}
        torch.save(some, folder / f"pytorch_model-0000{part}-of-00002.bin")


def as_published(hf, folder):
    """The layout of the files of 2019: no prefix, no lm_head, and the causal mask of every layer."""
    hf.config.save_pretrained(folder)
    weights, context = hf.transformer.state_dict(), hf.config.n_positions
    for i in range(hf.config.n_layer):
        weights[f"h.{i}.attn.bias"] = torch.ones(context, context, dtype=torch.uint8).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def as_published_safetensors(hf, folder):
    weights = as_published(hf, folder)
    (folder / "pytorch_model.bin").unlink()
    safetensors.torch.save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("layout", [as_safetensors, as_safetensors_in_parts, as_pickle, as_pickle_in_parts, as_published,
                                    as_published_safetensors])
@pytest.mark.parametrize("size", SIZES, ids=["one layer", "three layers", "head width 7"])
def test_logits_of_gpt2s_weights_are_those_of_transformers(size, layout, tmp_path):
    if layout is as_safetensors_in_parts and size is SIZES[0]:
        size = size | dict(vocab_size=700)
    hf = theirs(**size)
    layout(hf, tmp_path)
    ours = GPT.from_gpt2(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert_same_logits(ours, hf)


@pytest.mark.parametrize("layout, name", [(as_safetensors, "model.safetensors"), (as_published, "pytorch_model.bin")])
def test_one_file_is_read_with_the_config_beside_it(layout, name, tmp_path):
    hf = theirs(heads=4)
    layout(hf, tmp_path)
    path = (tmp_path / name).rename(tmp_path / ("mine" + Path(name).suffix))
    assert_same_logits(GPT.from_gpt2(path), hf)
    assert_same_logits(GPT.from_gpt2(str(path)), hf)


@pytest.mark.parametrize("layout, name", [(as_safetensors, "model.safetensors"), (as_published, "pytorch_model.bin")])
def test_weights_without_a_config_are_known_by_their_size(layout, name, tmp_path, monkeypatch):
    hf = theirs(heads=4)
    layout(hf, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{name}: config.json is missing beside it, and it is of no size known by name"):
        GPT.from_gpt2(tmp_path / name)
    monkeypatch.setitem(PRESETS, "tiny", dict(layers=2, heads=4, width=16, context=16))
    for path in (tmp_path, tmp_path / name):
        assert_same_logits(GPT.from_gpt2(path), hf)


@pytest.mark.parametrize("change", [dict(layers=3), dict(layers=1), dict(context=15), dict(width=12)])
def test_weights_of_another_size_than_a_known_one_are_not_taken_for_it(change, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dict(layers=2, heads=4, width=16, context=16))
    as_safetensors(theirs(**dict(heads=4) | change), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no size known by name"):
        GPT.from_gpt2(tmp_path)


@pytest.mark.parametrize("layout", [as_safetensors, as_pickle])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_become_single_precision_and_lose_nothing(dtype, layout, tmp_path):
    hf = theirs().to(dtype)
    layout(hf, tmp_path)
    ours = GPT.from_gpt2(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours.double(), hf.double())


def test_the_other_name_of_the_tanh_gelu_is_the_same_network(tmp_path):
    hf = theirs(activation_function="gelu_pytorch_tanh")
    hf.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_gpt2(tmp_path), hf)


def test_gpt2s_weights_train_with_the_dropout_asked_for(tmp_path):
    theirs().save_pretrained(tmp_path)
    model = GPT.from_gpt2(tmp_path, dropout=0.25).train()
    assert model.config.dropout == 0.25 and all(block.dropout.p == 0.25 for block in model.blocks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = some_tokens(model.config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(tokens).logsumexp(-1).sub(model(tokens)[..., 3]).mean().backward()
    optimizer.step()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


# ---------------------------------------------------------------- weights out

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transformers_reads_an_exported_policy_without_a_complaint(dtype, tmp_path, silence):
    ours = random_gpt(dtype=dtype, dropout=0.1)
    ours.save_gpt2(tmp_path / "new" / "folder")
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert type(hf) is GPT2LMHeadModel and not any(info.values()) and hf.dtype == dtype
    c = hf.config
    assert (c.n_positions, c.bos_token_id, c.eos_token_id) == (64, 8, 8)
    assert (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) == (0.1, 0, 0)
    assert_same_logits(ours.double(), hf.double())


@pytest.mark.parametrize("size", SIZES, ids=["one layer", "three layers", "head width 7"])
def test_weights_that_went_in_come_out_to_the_bit(size, tmp_path):
    hf = theirs(**size)
    hf.save_pretrained(tmp_path / "in")
    ours = GPT.from_gpt2(tmp_path / "in")
    ours.save_gpt2(tmp_path / "out")
    assert same(*(safetensors.torch.load_file(tmp_path / way / "model.safetensors") for way in ("in", "out")))
    again = GPT.from_gpt2(tmp_path / "out")
    assert same(again.state_dict(), ours.state_dict()) and again.config == ours.config


def test_a_full_disk_during_an_export_is_named_and_the_old_files_stay(tmp_path):
    old = random_gpt(seed=1)
    old.save_gpt2(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(UserError, match="^[^\n]*model.safetensors could not be written: [^\n]*$"):
            random_gpt(seed=2).save_gpt2(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    assert same(GPT.from_gpt2(tmp_path).state_dict(), old.state_dict())


def test_weights_that_were_read_do_not_change_when_their_file_does(tmp_path):
    random_gpt().save_gpt2(tmp_path)
    ours, file = GPT.from_gpt2(tmp_path), tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:  # in place, as cp does
        opened.write(bytes(file.stat().st_size))
    assert same(ours.state_dict(), random_gpt().state_dict())


def test_greedy_generation_says_what_transformers_says(tmp_path):
    prompts = [[1], [2, 3, 4, 5, 6, 7], [3, 3], [7, 1, 2], [5, 5, 5, 5, 5], [0, 2], [4, 4, 1], [8, 1]]
    everything = set()
    for seed in (4, 9, 10, 11):
        ours = random_gpt(dtype=torch.float64, seed=seed)
        ours.save_gpt2(tmp_path)
        hf = AutoModelForCausalLM.from_pretrained(tmp_path)
        said = generate(ours, prompts, 12, torch.zeros(len(prompts), 12), temperature=0)
        for prompt, response in zip(prompts, said):
            ids = torch.tensor([prompt])
            expected = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                                   pad_token_id=0)
            assert prompt + response == expected[0].tolist()
        everything |= set(map(tuple, said))
    assert len(everything) > 16 and {response[-1] == 8 for response in everything} == {True, False}


def test_an_exported_reward_model_scores_texts_in_transformers_as_here(tmp_path, silence):
    ours = random_gpt(dtype=torch.float64, kind=ScalarModel)
    assert abs(ours.head.bias.item()) > 0.1
    write_scalar_model(tmp_path, ours)
    hf, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and hf.num_labels == 1 and hf.dtype == torch.float64
    assert (hf.config.vocab_size, hf.config.pad_token_id, hf.config.eos_token_id) == (10, 9, 8)
    episodes = [[1, 2, 3, 8], [8], [5, 8, 5, 0, 8], [7] * 63 + [8]]  # each ends with the end of text
    with torch.no_grad():
        expected = torch.stack([ours(torch.tensor([e]))[0, -1] for e in episodes])
        alone = torch.cat([hf(torch.tensor([e])).logits[0] for e in episodes])
        padded = torch.tensor([e + [9] * (64 - len(e)) for e in episodes])
        together = hf(padded, attention_mask=(padded != 9).long()).logits[:, 0]
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)


def test_exporting_a_reward_model_leaves_it_as_it_was(tmp_path):
    ours = random_gpt(kind=ScalarModel)
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    write_scalar_model(tmp_path, ours)
    assert same(ours.state_dict(), before)


def test_an_exported_reward_model_is_no_gpt(tmp_path):
    write_scalar_model(tmp_path, random_gpt(kind=ScalarModel))
    with pytest.raises(ValueError, match="score.weight has no place in GPT-2"):
        GPT.from_gpt2(tmp_path)


# ---------------------------------------------------------------- the context

@pytest.fixture
def loaded(tmp_path):
    """A model of context 16 that came in by from_gpt2."""
    theirs().save_pretrained(tmp_path / "loaded")
    return GPT.from_gpt2(tmp_path / "loaded").eval()


def resized(model, context):
    """The model saved as a run does and loaded with another context."""
    common.files.save("model.pt", dict(model=model.state_dict(), model_config=vars(model.config), tokenizer="letters"))
    return common.checkpoints.load_model(GPT, "model.pt", "", Letters, cpu(), context=context)


class Letters:
    fingerprint = "letters"


@pytest.mark.parametrize("context", [17, 40, 16, 9, 1])
def test_another_context_keeps_the_logits_of_what_fits_both(loaded, context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = some_tokens(loaded.config)[:, :context]
    model = resized(loaded, context)
    torch.testing.assert_close(model(tokens), loaded(tokens).float(), rtol=0, atol=1e-5)
    assert model.config.context == model.positions.num_embeddings == len(model.positions.weight) == context
    model(torch.zeros(1, context, dtype=torch.long))
    with pytest.raises(ValueError, match=f"{context + 1} tokens do not fit the context of {context}"):
        model(torch.zeros(1, context + 1, dtype=torch.long))


def test_new_positions_are_random_and_as_large_as_the_old(loaded):
    old = loaded.positions.weight.detach()
    new = resize_positions(old, 200)
    assert torch.equal(new[:16], old) and new.dtype == torch.float64
    assert new[16:].std().item() == pytest.approx(old.std().item(), rel=0.1) and abs(new[16:].mean()) < 0.1 * old.std()
    assert len(new[16:].unique(dim=0)) == 184


def test_a_model_of_another_context_trains_and_goes_out(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = resized(loaded, 24)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens, optimizer = some_tokens(model.config), torch.optim.Adam(model.parameters(), 1e-3)
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    assert (after["positions.weight"] != before["positions.weight"])[:23].any(1).all()
    model.save_gpt2(tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    assert hf.config.n_positions == 24
    assert_same_logits(model.double(), hf)


# ---------------------------------------------------------------- what is no GPT-2

@pytest.fixture
def gpt2(tmp_path):
    """A folder that from_gpt2 reads, to break; `.config(...)` changes config.json, `.weights(...)` the weights, where None
    takes one away."""
    folder = tmp_path / "gpt2"
    hf = theirs(layers=1)
    hf.config.save_pretrained(folder)
    original = {name: w.contiguous() for name, w in hf.transformer.state_dict().items()}

    class Broken:
        path = folder

        def config(self, **changes):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        def weights(self, **changes):
            weights = {name: w for name, w in (original | changes).items() if w is not None}
            safetensors.torch.save_file(weights, folder / "model.safetensors")

        def refused(self, *words, path=folder):
            with pytest.raises(ValueError) as refusal:
                GPT.from_gpt2(path)
            message = str(refusal.value)
            assert [word for word in words if word not in message] == [] and "\n" not in message
            with pytest.raises(UserError) as refusal:
                common.checkpoints.load_model(GPT, path, "make", Tokenizer("letters", LETTERS), cpu())
            assert str(refusal.value) == message

    Broken.names = list(original)
    Broken().weights()
    GPT.from_gpt2(folder)
    return Broken()


@pytest.mark.parametrize("name, value", [
    ("model_type", "llama"), ("model_type", None), ("activation_function", "gelu"), ("activation_function", "relu"),
    ("activation_function", ["gelu_new"]), ("layer_norm_epsilon", 1e-6), ("layer_norm_epsilon", None),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("tie_word_embeddings", False)])
def test_another_architecture_is_refused_by_the_setting_that_makes_it_one(gpt2, name, value):
    gpt2.config(**{name: value})
    gpt2.refused("config.json", name, str(value))


@pytest.mark.parametrize("change", [
    dict(n_head=3), dict(n_head=0), dict(n_head=-2), dict(n_head="2"), dict(n_head=None), dict(n_head=True),
    dict(n_head=2.0), dict(n_embd=0), dict(n_embd=-16), dict(n_embd="16"), dict(n_embd="%d"), dict(n_embd=[16]),
    dict(n_embd=float("nan")), dict(n_embd=float("inf")), dict(n_layer=0), dict(n_layer=-2), dict(n_layer="2"),
    dict(n_layer=2.0), dict(n_layer={}), dict(vocab_size=0), dict(vocab_size=-9), dict(vocab_size="9"),
    dict(n_positions=-16), dict(n_positions=None)], ids=str)
def test_sizes_that_are_none_are_refused(gpt2, change):
    gpt2.config(**change)
    gpt2.refused("config.json", "no configuration of GPT-2")


@pytest.mark.parametrize("change", [dict(n_embd=2**62), dict(vocab_size=10**30), dict(n_positions=2**62),
                                    dict(n_layer=10**9), dict(n_head=1, n_embd=10**12)], ids=str)
def test_sizes_beyond_any_file_are_refused_before_anything_of_that_size_is_made(gpt2, change):
    gpt2.config(**change)
    with little_memory():
        gpt2.refused()


@pytest.mark.parametrize("change", [dict(n_head=4, n_embd=32), dict(n_layer=2), dict(vocab_size=10), dict(vocab_size=8),
                                    dict(n_positions=15), dict(n_positions=17), dict(n_inner=24)], ids=str)
def test_a_config_of_other_sizes_than_the_weights_is_refused(gpt2, change):
    gpt2.config(**change)
    if "n_inner" in change:
        gpt2.weights(**{"h.0.mlp.c_fc.weight": torch.zeros(16, 24).double(), "h.0.mlp.c_fc.bias": torch.zeros(24).double()})
    gpt2.refused(str(gpt2.path))


@pytest.mark.parametrize("text", [b"", b"{", b"no JSON", b"\xff\xfe{}", b"[]", b"null", b"3", b'"gpt2"', b"{}",
                                  b'{"vocab_size": 9, "n_layer": 2, "n_head": 2}', b"[" * 100_000, b'{"a":' * 100_000],
                         ids=lambda text: repr(text[:20]))
def test_a_config_that_is_none_is_refused(gpt2, text):
    (gpt2.path / "config.json").write_bytes(text)
    gpt2.refused("config.json", "no configuration of GPT-2")


def test_a_missing_weight_is_refused_by_name_whichever_it_is(gpt2):
    for name in gpt2.names:
        gpt2.weights(**{name: None})
        gpt2.refused(name, "is missing")


def test_a_weight_of_another_shape_is_refused_by_name_whichever_it_is(gpt2):
    for name in gpt2.names:
        width = safetensors.torch.load_file(gpt2.path / "model.safetensors")[name].shape[-1]
        for shape in ((), (width + 1,), (3, width), (1, 1, width)):
            gpt2.weights(**{name: torch.zeros(shape, dtype=torch.float64)})
            with pytest.raises(ValueError, match=f"{name} is not of the shape"):
                GPT.from_gpt2(gpt2.path)
        gpt2.weights()


def test_weights_of_whole_numbers_are_refused(gpt2):
    for name in gpt2.names:
        shape = safetensors.torch.load_file(gpt2.path / "model.safetensors")[name].shape
        for dtype in (torch.int64, torch.bool):
            gpt2.weights(**{name: torch.ones(shape, dtype=dtype)})
            with pytest.raises(ValueError, match=f"{name} is not of the shape or type"):
                GPT.from_gpt2(gpt2.path)
        gpt2.weights()


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.lora", "h.1.ln_1.weight", "h.0.crossattention.c_attn.weight",
                                  "score.weight", "transformer.transformer.wte.weight", "bias", "h.0.ln_3.bias"])
def test_a_weight_that_gpt2_has_no_place_for_is_refused_by_name(gpt2, name):
    gpt2.weights(**{name: torch.zeros(16, dtype=torch.float64)})
    gpt2.refused(name.removeprefix("transformer."), "has no place in GPT-2 with 1 layers")


def test_an_unembedding_of_its_own_is_refused_and_the_token_embedding_again_is_not(gpt2):
    tied = safetensors.torch.load_file(gpt2.path / "model.safetensors")["wte.weight"]
    gpt2.weights(**{"lm_head.weight": tied.clone()})
    GPT.from_gpt2(gpt2.path)
    for other in (tied.clone().index_fill_(0, torch.tensor([3]), 0), tied[:, :-1].contiguous(), torch.zeros(())):
        gpt2.weights(**{"lm_head.weight": other})
        gpt2.refused("lm_head")


def test_a_lone_file_that_is_nothing_like_gpt2_is_refused(gpt2):
    (gpt2.path / "config.json").unlink()
    for weights in ({}, {"a": torch.zeros(3)}, {"wte.weight": torch.zeros(())}, {"wte.weight": torch.zeros(0, 16)},
                    {"wpe.weight": torch.zeros(16, 16)}):
        safetensors.torch.save_file(weights, gpt2.path / "model.safetensors")
        gpt2.refused("config.json is missing", path=gpt2.path / "model.safetensors")


def test_a_folder_without_weights_is_refused(gpt2, tmp_path):
    (gpt2.path / "model.safetensors").unlink()
    gpt2.refused("holds neither model.safetensors nor pytorch_model.bin")
    gpt2.refused("nowhere", "holds neither", path=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="holds neither"):
        GPT.from_gpt2(tmp_path / "nowhere")


def test_a_part_that_is_missing_is_refused(tmp_path):
    as_safetensors_in_parts(theirs(), tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="is missing"):
        GPT.from_gpt2(tmp_path)


def test_gpt2_weights_need_the_datasets_vocabulary_size_and_are_loaded_as_float32(gpt2):
    with pytest.raises(UserError, match="has a vocabulary of 9, the dataset's tokenizer.json one of 8"):
        common.checkpoints.load_model(GPT, gpt2.path, "make", Tokenizer("letters", LETTERS[:-1]), cpu())
    model = common.checkpoints.load_model(GPT, str(gpt2.path), "make", Tokenizer("letters", LETTERS), cpu(), dropout=0.5)
    assert model.config.dropout == 0.5 and {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_reward_model_cannot_come_of_gpt2s_weights(gpt2):
    for path in (gpt2.path, gpt2.path / "model.safetensors"):
        with pytest.raises(UserError, match=str(path)):
            common.checkpoints.load_model(ScalarModel, path, "make reward", Tokenizer("letters", LETTERS), cpu())


# ---------------------------------------------------------------- pickles

class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda weights, path: torch.save(weights, path),
                                   lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
                                   lambda weights, path: path.write_bytes(pickle.dumps(weights, protocol=2))],
                         ids=["archive", "old", "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(gpt2, write, tmp_path):
    (gpt2.path / "model.safetensors").unlink()
    write({"wte.weight": torch.zeros(9, 16), "wpe.weight": Touch(tmp_path / "it ran")}, gpt2.path / "pytorch_model.bin")
    gpt2.refused("pytorch_model.bin", "is damaged or holds more than plain weights")
    assert not (tmp_path / "it ran").exists()
    with contextlib.suppress(RuntimeError):  # the bare one runs before torch misses its magic number
        torch.load(gpt2.path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("bare", [b"", b"PK", b"no pickle at all", pickle.dumps([1, 2], 2), pickle.dumps(None, 2)], ids=repr)
def test_a_pickle_that_holds_no_weights_is_refused(gpt2, bare):
    (gpt2.path / "model.safetensors").unlink()
    (gpt2.path / "pytorch_model.bin").write_bytes(bare)
    gpt2.refused("pytorch_model.bin", "is damaged or holds more than plain weights")


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight", "lm_head.weight"])
def test_tensors_without_numbers_of_their_own_are_refused_in_a_pickle(gpt2, name):
    (gpt2.path / "model.safetensors").unlink()
    weights = theirs(layers=1).state_dict()
    for odd in (lambda w: w.to_sparse(), lambda w: w.to("meta")):
        torch.save({k.removeprefix("transformer."): odd(w) if k.endswith(name) else w for k, w in weights.items()},
                   gpt2.path / "pytorch_model.bin")
        gpt2.refused(str(gpt2.path))


def test_a_pickle_cut_short_is_refused(gpt2):
    (gpt2.path / "model.safetensors").unlink()
    path = gpt2.path / "pytorch_model.bin"
    torch.save(theirs().state_dict(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        gpt2.refused("pytorch_model.bin", "is damaged")


# ---------------------------------------------------------------- safetensors

def refused(data, path):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=BROKEN) as refusal:
        read_safetensors(path)
    assert str(path) in str(refusal.value)


def test_a_file_cut_anywhere_or_with_something_appended_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.int8)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    assert read_safetensors(path).keys() == {"a", "b"}
    for length in range(len(whole)):
        refused(whole[:length], path)
    for more in (b"\0", b" ", whole):
        refused(whole + more, path)


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"null", b'"a"', b"\xff\xff\xff", b'{"a": 1}', b'{"a": {}}', b"[" * 100_000,
    b'{"a": {"dtype": "F128", "shape": [2], "data_offsets": [0, 8]}}', b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'], ids=lambda text: repr(text[:40]))
def test_headers_that_are_none_are_refused(header, tmp_path):
    refused(len(header).to_bytes(8, "little") + header + bytes(8), tmp_path / "t.safetensors")


def test_a_lie_about_the_headers_length_is_refused_without_allocating_it(tmp_path):
    for length in (0, 1, 10**6, 2**31, 2**63, 2**64 - 1):
        with little_memory():
            refused(length.to_bytes(8, "little") + b"{}", tmp_path / "t.safetensors")


def test_without_the_package_one_line_says_what_to_install(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        GPT.from_gpt2(gpt2.path)


# ---------------------------------------------------------------- a trained vocabulary out

TEXT = """The naïve reader's café: "it's 7 o'clock", they'll say; we've 1234 books, I'd 56.\n\n\tdef f(x):\n\t\treturn x\n
ἀλήθεια Правда 言葉を話す 🙂🙂🏽 é (e + ́)   three   blanks \u00a0\u2003 and the end of the text, the end, the end.\r\n""" * 3

any_text = st.text(st.characters(exclude_categories=["Cs"]))
blanks = " \t\n\r\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u200b\u3000\ufeff"
blank_text = st.text(blanks + " a1'.é_") | st.text(" \n")
texts = st.lists(any_text | blank_text | st.sampled_from(TEXT.split(" ")), max_size=6).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Tokenizer with a BPE of 400 ids and transformers' of its export."""
    folder = tmp_path_factory.mktemp("trained")
    ours = Tokenizer("trained", train_bpe([TEXT, (ROOT / "README.md").read_text(encoding="utf-8")[:8000]], 400))
    ours.save_gpt2(folder, 77)
    return ours, AutoTokenizer.from_pretrained(folder)


def assert_same_ids(tokenizers, text):
    ours, hf = tokenizers
    ids = ours.encode(text)
    assert hf(text)["input_ids"] == ids
    assert hf.decode(ids) == ours.decode(ids) == text


@settings(deadline=None, max_examples=300, database=None)
@given(texts)
@example("")
@example(TEXT)
@example(" " * 50 + "\n" * 50 + "x")
@example("<|endoftext| > do n't , I 'm . ! ?")
def test_transformers_cuts_any_text_as_the_trained_vocabulary_does(trained, text):
    assume(END not in text)
    assert_same_ids(trained, text)


def test_transformers_cuts_characters_of_every_kind_as_the_trained_vocabulary_does(trained):
    for first in range(0, 0x30000, 0x1000):  # planes 0 to 2, one character of 37; all of them were compared once
        characters = [chr(c) for c in range(first, first + 0x1000, 37) if not 0xd800 <= c < 0xe000]
        assert_same_ids(trained, "".join(f"a{c}a {c}{c} 1{c}1  {c} '{c}\n" for c in characters))


def test_transformers_knows_the_end_of_text_and_the_context(trained):
    ours, hf = trained
    assert len(hf) == hf.vocab_size == ours.vocab_size == 400
    assert hf.eos_token_id == hf.bos_token_id == ours.end_of_text == 399 and hf.pad_token_id is None
    assert hf.model_max_length == 77 and hf.eos_token == END and hf.clean_up_tokenization_spaces is False
    assert hf.convert_ids_to_tokens(range(256, 400))[-1] == END


@settings(deadline=None, max_examples=50, database=None)
@given(texts, texts)
def test_end_of_text_within_a_text_is_special_to_transformers_only_and_round_trips(trained, before, after):
    assume(END not in before and END not in after)
    ours, hf = trained
    ids = hf(before + END + after)["input_ids"]
    assert ids == ours.encode(before) + [399] + ours.encode(after) and hf.decode(ids) == before + END + after
    ids = ours.encode(before + END + after)
    assert 399 not in ids and ours.decode(ids) == before + END + after


def test_padding_has_the_id_behind_the_end_of_text(trained, tmp_path):
    trained[0].save_gpt2(tmp_path, 77, padding=True)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert (hf.eos_token_id, hf.pad_token_id, len(hf)) == (399, 400, 401)
    batch = hf(["a", "a reader"], padding=True)
    assert batch["input_ids"][0][-1] == 400 and batch["attention_mask"][0][-1] == 0
    assert_same_ids((trained[0], hf), TEXT)


def test_merges_are_refused_where_a_token_is_not_made_of_two_before_it():
    assert Tokenizer("t", [b"a", b"b", b"c", b"ab", b"abc"]).merges() == [(b"a", b"b"), (b"ab", b"c")]
    for tokens in ([b"a", b"b", b"c", b"abc"], [b"a", b"b", b"c", b"abc", b"ab"]):
        with pytest.raises(ValueError, match="b'abc' is not made of two tokens of lower rank"):
            Tokenizer("t", tokens).merges()


# ---------------------------------------------------------------- GPT-2's vocabulary

@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """tiktoken's cache is empty, and the network down."""
    def down(*args, **more):
        raise requests.ConnectionError("down")

    monkeypatch.setattr(requests, "get", down)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with GPT-2's vocab.bpe and encoder.json."""
    if not (REAL / "gpt2.vocab.bpe").is_file():
        pytest.skip(f"{REAL} is not here")
    folder = tmp_path_factory.mktemp("published")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copyfile(REAL / f"gpt2.{name}", folder / name)
    return folder


@pytest.fixture(scope="module")
def gpt2_tokenizer(published, tmp_path_factory):
    """GPT-2's Tokenizer, from the published files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return Tokenizer.gpt2(str(published))


@pytest.fixture(scope="module")
def hf_gpt2_tokenizer(published, tmp_path_factory):
    """transformers' tokenizer, from the published files under the names it knows."""
    folder = tmp_path_factory.mktemp("renamed")
    shutil.copyfile(published / "vocab.bpe", folder / "merges.txt")
    shutil.copyfile(published / "encoder.json", folder / "vocab.json")
    return GPT2Tokenizer.from_pretrained(folder)


def test_gpt2s_vocabulary_has_its_ids_and_goes_out_as_it_was_published(gpt2_tokenizer, published, tmp_path):
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.end_of_text) == (50257, 50256)
    assert gpt2_tokenizer.encode("Hello world") == [15496, 995]
    gpt2_tokenizer.save_gpt2(tmp_path, 1024)
    assert (tmp_path / "merges.txt").read_bytes() == (published / "vocab.bpe").read_bytes()
    vocabulary, original = (json.loads(p.read_text("utf-8")) for p in (tmp_path / "vocab.json", published / "encoder.json"))
    assert vocabulary == original


def test_gpt2s_vocabulary_cuts_real_texts_as_transformers_does(gpt2_tokenizer, hf_gpt2_tokenizer):
    lines = (REAL / "oasst.en_100_trees.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    for text in [TEXT, (ROOT / "README.md").read_text("utf-8"), (ROOT / "model.py").read_text("utf-8"), *lines]:
        for part in text.split(END):
            assert_same_ids((gpt2_tokenizer, hf_gpt2_tokenizer), part)


@settings(deadline=None, max_examples=150, database=None)
@given(texts)
def test_gpt2s_vocabulary_cuts_any_text_as_transformers_does(gpt2_tokenizer, hf_gpt2_tokenizer, text):
    assume(END not in text)
    assert_same_ids((gpt2_tokenizer, hf_gpt2_tokenizer), text)


def test_gpt2s_vocabulary_saved_and_loaded_is_the_same(gpt2_tokenizer, tmp_path, no_cache):
    gpt2_tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.name, again.tokens, again.fingerprint) == ("gpt2", gpt2_tokenizer.tokens, gpt2_tokenizer.fingerprint)
    assert again.encode(TEXT) == gpt2_tokenizer.encode(TEXT) and again.vocab_size == 50257


@pytest.mark.parametrize("cache", ["cache", ""], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_file_of_gpt2s_vocabulary_that_was_changed_or_is_missing_is_refused(name, cache, published, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache and str(tmp_path / cache))  # "" turns it off
    for file in published.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole + b"\n", whole[:-1], b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{tmp_path / name} is damaged or not GPT-2's"):
            Tokenizer.gpt2(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{tmp_path / name} is missing; it is at {GPT2}/{name}"):
        Tokenizer.gpt2(str(tmp_path))


def test_a_file_that_changed_after_it_was_read_once_is_still_refused(published, tmp_path, no_cache):
    for file in published.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    Tokenizer.gpt2(str(tmp_path))
    (tmp_path / "vocab.bpe").write_bytes(b"#version: 0.2\n")
    with pytest.raises(UserError, match=f"{tmp_path / 'vocab.bpe'} is damaged"):
        Tokenizer.gpt2(str(tmp_path))


def test_the_name_gpt2_alone_loads_through_tiktokens_cache(gpt2_tokenizer, published, tmp_path, no_cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copyfile(published / name, tmp_path / hashlib.sha1(f"{GPT2}/{name}".encode()).hexdigest())
    (tmp_path / "tokenizer.json").write_text('{"name": "gpt2"}')
    again = Tokenizer.load(tmp_path)
    assert (again.name, again.fingerprint, again.vocab_size) == ("gpt2", gpt2_tokenizer.fingerprint, 50257)


def test_the_name_gpt2_alone_without_cache_or_network_says_what_to_put_where(tmp_path, no_cache):
    (tmp_path / "tokenizer.json").write_text('{"name": "gpt2"}')
    with pytest.raises(UserError, match=f"put vocab.bpe and encoder.json from {GPT2} into a folder and say --bpe FOLDER"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("cache", ["cache", ""], ids=["cache", "no cache"])
@pytest.mark.parametrize("status, body, words", [(200, b"", "came damaged"), (200, b"#version: 0.2\na\n", "came damaged"),
                                                 (200, b"{}", "came damaged"), (404, b"gone", "can't be downloaded")])
def test_a_download_of_something_else_is_refused_and_not_kept(status, body, words, cache, tmp_path, monkeypatch):
    answer = requests.Response()
    answer.status_code, answer._content = status, body
    monkeypatch.setattr(requests, "get", lambda *args, **more: answer)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache and str(tmp_path / cache))
    with pytest.raises(UserError, match=words):
        Tokenizer.gpt2()
    assert not list(tmp_path.rglob("*"))


# ---------------------------------------------------------------- data/export.py

@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A folder in which `python data/export.py` was run three times: .policy and .reward are the models, .done has exit
    status, stdout and stderr by name. The dataset is in `data`, as the policy's checkpoint says; the reward model's says, as
    conftest.save does, `letters`."""
    folder, tokenizer = tmp_path_factory.mktemp("commands"), Tokenizer("letters", LETTERS)
    tokenizer.save(folder / "data")
    policy, reward = random_gpt(dtype=torch.float64), random_gpt(kind=ScalarModel)
    save(policy, folder / "run" / "model.pt", tokenizer)
    checkpoint = torch.load(folder / "run" / "model.pt", weights_only=True)
    common.files.save(folder / "run" / "model.pt", checkpoint | {"data": "data"})
    save(reward, folder / "elsewhere" / "reward.pt", tokenizer)
    given = {"policy": ["run", "policy"], "reward": ["../reward.pt", "../../reward", "--data", "../../data"],
             "nowhere": ["nowhere", "exported"]}
    where = {"reward": folder / "elsewhere" / "deep"}
    where["reward"].mkdir()
    started = {name: subprocess.Popen([sys.executable, ROOT / "data/export.py", *arguments], cwd=where.get(name, folder),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}) for name, arguments in given.items()}
    outputs = {name: process.communicate() for name, process in started.items()}
    return SimpleNamespace(folder=folder, policy=policy, reward=reward,
                           done={name: (started[name].returncode, *outputs[name]) for name in given})


def test_a_run_of_a_policy_is_exported_by_the_command_line(commands, silence):
    assert commands.done["policy"] == (0, "policy: for transformers' AutoModelForCausalLM and AutoTokenizer\n", "")
    hf, tokenizer = (kind.from_pretrained(commands.folder / "policy") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (9, 8, None, 64)
    assert tokenizer("headache")["input_ids"] == [7, 4, 0, 3, 0, 2, 7, 4]
    assert_same_logits(commands.policy.float(), hf, bound=1e-5)


def test_a_reward_model_is_exported_by_the_command_line_with_the_dataset_elsewhere(commands, silence):
    status, out, error = commands.done["reward"]
    assert (status, error) == (0, "") and "AutoModelForSequenceClassification and AutoTokenizer" in out
    hf = AutoModelForSequenceClassification.from_pretrained(commands.folder / "reward")
    tokenizer = AutoTokenizer.from_pretrained(commands.folder / "reward")
    episodes = ["a", "headache", "cabbage"]
    with torch.no_grad():
        scores = hf(**tokenizer([e + END for e in episodes], padding=True, return_tensors="pt")).logits[:, 0]
        expected = [commands.reward(torch.tensor([["abcdefgh".index(c) for c in e] + [8]]))[0, -1] for e in episodes]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_wrong_path_on_the_command_line_is_one_line_and_status_two(commands):
    assert commands.done["nowhere"] == (2, "", "export.py: nowhere is missing; in the default run `make` makes it\n")
    assert not (commands.folder / "exported").exists()


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.pt", "out"], "nowhere.pt is missing"), (["letters", "out"], "model.pt is missing"),
    (["letters/tokenizer.json", "out"], "no checkpoint"), (["run.pt", "run.pt"], "run.pt"),
    (["run.pt", "out", "--data", "nowhere"], "tokenizer.json is missing"), (["other.pt", "out"], "another vocabulary"),
    (["run.pt"], "folder"), ([], "run")], ids=str)
def test_what_cannot_be_exported_is_said_in_one_line(arguments, words, letters, tmp_path, monkeypatch, capsys):
    save(random_gpt(), tmp_path / "run.pt", letters.tokenizer)
    save(random_gpt(), tmp_path / "other.pt", Tokenizer("other", LETTERS[::-1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "data/export.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
