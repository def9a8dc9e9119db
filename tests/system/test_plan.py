"""What training a size takes, against real models and counted bytes."""

import functools
import re
import resource
import subprocess
import sys
import time

import pytest
import torch

import common.config
from common import plan
from conftest import ROOT, cpu
from model import GPT, PRESETS, GPTConfig, ScalarModel


plan.parameters = functools.cache(plan.parameters)


def config_of(preset):
    return GPTConfig(**PRESETS[preset])


@pytest.mark.parametrize("preset", ["nano", "laptop"])
@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_parameters_are_those_of_the_real_model(kind, preset):
    model = kind(config_of(preset))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert plan.parameters(kind, config_of(preset)) == (sum(p.numel() for p in model.parameters()), block)


@pytest.mark.parametrize("preset, published", [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_parameters_of_gpt2_are_the_published_ones(preset, published):
    assert plan.parameters(GPT, config_of(preset))[0] == published


def kept_bytes(config, rows, tokens, activation_checkpointing=False):
    """What autograd keeps of a pass to the logits, counted: each storage once, parameters and the input not."""
    model = GPT(config)
    cpu(activation_checkpointing=activation_checkpointing).place(model)
    ids = torch.randint(config.vocab_size, (rows, tokens))
    ours, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.unembed(model.hidden(ids))
    return sum(kept.values()), logits


SHAPES = [(2, 64, 3, 4, 50), (1, 128, 4, 2, 200), (3, 128, 8, 8, 33), (2, 256, 6, 4, 300)]  # layers, width, rows, heads, T


@pytest.mark.parametrize("layers, width, rows, heads, tokens", SHAPES)
def test_activations_are_what_autograd_keeps(layers, width, rows, heads, tokens):
    config = GPTConfig(vocab_size=50, context=tokens, layers=layers, heads=heads, width=width)
    counted, _ = kept_bytes(config, rows, tokens)
    assert plan.activations(config, rows * tokens, 4, False) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("layers, width, rows, heads, tokens", [(6, 128, 4, 4, 64), (12, 64, 2, 2, 100)])
def test_recomputing_keeps_the_inputs_of_all_blocks_and_the_insides_of_one(layers, width, rows, heads, tokens):
    shape = dict(vocab_size=50, context=tokens, heads=heads, width=width)
    config = GPTConfig(layers=layers, **shape)
    one, none = (kept_bytes(GPTConfig(layers=n, **shape), rows, tokens)[0] for n in (1, 0))
    inputs = layers * rows * tokens * width * 4
    assert plan.activations(config, rows * tokens, 4, True) == pytest.approx(none + inputs + (one - none), rel=0.15)


def test_recomputing_is_done_where_it_is_asked_for():
    config = GPTConfig(vocab_size=50, context=64, layers=6, heads=4, width=128)
    assert kept_bytes(config, 4, 64, activation_checkpointing=True)[0] < kept_bytes(config, 4, 64)[0] / 4


def test_sharding_divides_weights_gradients_and_optimizer_and_nothing_else():
    whole, part = (plan.plan(config_of("gpt2"), gpus=8, shard=shard) for shard in (False, True))
    for what in ("policy", "value", "reference", "reward", "moving average", "gradients", "optimizer"):
        assert part[what] == pytest.approx(whole[what] / 8)
    assert part["activations"] == whole["activations"]
    assert part["KV cache"] == whole["KV cache"] and whole["sampling copy"] == 0
    assert part["averaging"] == 0 and whole["averaging"] == whole["optimizer"] / 2  # DDP keeps a copy of both gradients
    assert part["at most"] < whole["at most"]


def test_a_sampling_copy_has_16_bit_blocks_and_is_freed_for_training():
    with_it, without = (plan.plan(config_of("gpt3-6.7b"), gpus=64, shard=True, micro_batch=1, sampling_copy=copy) for copy in (True, False))
    blocks = 32 * (12 * 4096**2 + 13 * 4096)
    ends = (50257 + 2048 + 2) * 4096
    assert with_it["sampling copy"] == 2 * blocks + 4 * (ends + 50257 * 4096)  # and the unembedding, padded
    assert without["sampling copy"] == without["KV cache"] == 0
    for sizes in (with_it, without):
        kept = sum(sizes[what] for what in ("policy", "value", "reference", "reward", "moving average", "gradients", "optimizer",
                                            "working copies"))
        sampling = sum(sizes[what] for what in ("sampling copy", "KV cache", "reading prompts"))
        assert sizes["at most"] == kept + max(sampling, sizes["activations"])


@pytest.mark.parametrize("preset", ["nano", "gpt2", "gpt3-6.7b"])
@pytest.mark.parametrize("shard", [False, True])
def test_more_gpus_never_need_more_memory_each(preset, shard):
    needs = [plan.plan(config_of(preset), gpus=n, shard=shard)["at most"] for n in (1, 2, 3, 8, 64, 1000)]
    assert needs == sorted(needs, reverse=True)


def test_policy_gradients_and_optimizer_of_one_gpu_by_hand():
    sizes = plan.plan(config_of("gpt2"), width=4)
    gpt2 = 124_439_808
    scalar = gpt2 + 769
    assert (sizes["policy"], sizes["reference"], sizes["moving average"]) == (4 * gpt2,) * 3
    assert (sizes["value"], sizes["reward"]) == (4 * scalar,) * 2
    assert sizes["gradients"] == 4 * scalar and sizes["optimizer"] == 8 * (gpt2 + scalar)  # gradients: of one at a time
    assert sizes["KV cache"] == 2 * 12 * 768 * 512 * 1024 * 4
    assert sizes["reading prompts"] == sizes["KV cache"] + 9 * 768 * 512 * 1024 * 4  # once more, and the prompts' MLP


def test_rows_and_slots_of_the_kv_cache_are_rounded_up():
    sizes = [plan.plan(config_of("gpt2"), batch=batch, length=length)["KV cache"] for batch, length in ((512, 64), (300, 50), (9, 1))]
    assert sizes[0] == sizes[1] == 32 * sizes[2]


def test_smaller_micro_batches_shorter_numbers_and_recomputing_need_less():
    need = lambda **how: plan.plan(config_of("gpt2"), **how)["activations"]
    assert need(micro_batch=1) - need(micro_batch=2) == need(micro_batch=7) - need(micro_batch=8) < 0
    assert need(activation_checkpointing=True) < need() < need(width=4)


def test_175b_is_computed_without_allocating_it():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    sizes = plan.plan(config_of("gpt3-175b"), gpus=1024, shard=True, activation_checkpointing=True)
    assert time.process_time() - began < 5
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * unit < 10**8
    assert 170e9 < sizes["optimizer"] * 1024 / 8 / 2 < 180e9
    assert sizes["policy"] == pytest.approx(4 * 175e9 / 1024, rel=0.02)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(common.config.signal, "signal", lambda *rest: None)
        try:
            common.config.guard(plan.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, *capsys.readouterr()


def test_the_command_line_prints_every_part_and_whether_it_fits(monkeypatch, capsys):
    status, out, err = command(monkeypatch, capsys, "gpt2", "--gpus", "8", "--shard")
    assert status == 0 and err == "" and "124,439,808 parameters" in out and "\nfits 80 GiB" in out
    starts = [line[:16].strip() for line in out.splitlines()]
    for what in ("policy", "value", "reference", "reward", "gradients", "optimizer", "activations", "KV cache"):
        assert starts.count(what) == 1
    assert "\ndoes not fit 1 GiB" in command(monkeypatch, capsys, "gpt2", "--memory", "1")[1]


def test_the_table_of_the_documentation_is_what_the_commands_above_it_print(monkeypatch, capsys):
    text = (ROOT / "docs/scaling.md").read_text()
    commands = re.findall(r"^python common/plan.py (gpt.*)$", text, re.MULTILINE)
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| [\d.]+[MB] \(", line)]
    assert len(commands) == len(rows) == 5
    for arguments, row in zip(commands, rows):
        printed = command(monkeypatch, capsys, *arguments.split())[1]
        numbers = {line[:16].strip(): float(line[16:]) for line in printed.splitlines() if re.fullmatch(r".{16} +[\d.]+", line)}
        models = sum(numbers[name] for name in ("policy", "value", "reference", "reward", "moving average"))
        training = sum(numbers[name] for name in ("gradients", "averaging", "optimizer"))
        rest = [numbers[name] for name in ("working copies", "activations", "sampling copy", "KV cache", "reading prompts", "at most")]
        assert [float(cell) for cell in row[3:11]] == pytest.approx([models, training, *rest], abs=0.06)


@pytest.mark.parametrize("memory", ["nan", "inf"])
def test_memory_is_a_finite_number(monkeypatch, capsys, memory):
    assert command(monkeypatch, capsys, "gpt2", "--memory", memory)[0] == 2


@pytest.mark.parametrize("arguments", [
    ["gpt5"], [], ["gpt2", "--gpus", "0"], ["gpt2", "--gpus", "2.5"], ["gpt2", "--batch", "-1"],
    ["gpt2", "--micro_batch", "0"], ["gpt2", "--memory", "0"], ["gpt2", "--memory", "-1"], ["gpt2", "--precision", "int8"],
    ["gpt2", "--wings"]])
def test_bad_arguments_are_one_line_with_exit_status_2(monkeypatch, capsys, arguments):
    status, out, err = command(monkeypatch, capsys, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1


def test_it_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "common/plan.py"), "nano", "--gpus", "0"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(".py: every size is at least 1\n")
    assert done.stderr.count("\n") == 1
