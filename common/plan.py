"""What training a size takes: parameters, and bytes a GPU for everything that ppo.py keeps there. Nothing is allocated.

    python common/plan.py gpt3-1.3b --gpus 8        # --help lists the other settings

PPO is the most of the three stages: it keeps the policy and the value function with gradients and Adam's two averages, and
the reference, the reward model and the policy's moving average without (C.4).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

import torch

from common.config import Parser, UserError, guard, number
from model import GPT, PRESETS, GPTConfig, ScalarModel

GIB = 2**30


def parameters(kind, config):
    """(of the whole model, of its largest block), counted on the meta device."""
    with torch.device("meta"):
        model = kind(config)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, *model.blocks)]
    return sizes[0], max(sizes[1:])


def activations(config, tokens, width, activation_checkpointing):
    """Bytes that a training pass over so many tokens keeps for its backward pass, at `width` bytes a number. A block keeps, in
    units of C numbers a token: the two norms' inputs and outputs (4), queries, keys and values (3), what attention gives,
    before and after the heads are laid side by side (2, of which one is the first norm's of the next), the hidden layer of
    the MLP before and after its nonlinearity (8): 16. With `activation_checkpointing`, blocks keep their input (1), and one
    block at a time keeps all."""
    block = 16 * config.width * width * tokens
    kept = config.layers * config.width * width * tokens + block if activation_checkpointing else config.layers * block
    return kept + 2 * config.width * width * tokens  # the embedding's sum and the last norm


def plan(config, gpus=1, batch=512, micro_batch=8, width=2, shard=False, activation_checkpointing=False, logits_memory=4.0,
         length=None, sampling_copy=True):
    """-> {what: bytes per GPU}. batch: episodes an iteration, all of them sampled at once; micro_batch: rows of a
    training pass, all of `length` tokens (the context's); width: bytes of a number in matrix products."""
    whole, block = parameters(GPT, config)
    scalar, _ = parameters(ScalarModel, config)
    part, blocks = gpus if shard else 1, config.layers * block
    rows, T = -(-batch // gpus), length or config.context
    logits = min(4 * micro_batch * T * config.vocab_size,  # of pretraining text every position has a target
                 logits_memory * GIB)
    sizes = {
        "policy": 4 * whole / part,
        "value": 4 * scalar / part,
        "reference": 4 * whole / part,
        "reward": 4 * scalar / part,
        "moving average": 4 * whole / part,
        "gradients": 4 * max(whole, scalar) / part,  # of one model at a time
        "averaging": 0 if shard or gpus == 1 else 4 * (whole + scalar),  # where processes average them (DDP's buckets)
        "optimizer": 8 * (whole + scalar) / part,
        # What is computed with: in 16 bits two copies of the blocks, for training and for sampling, and as many of the
        # unembedding, in float32; sharded, one block (the next is on its way), the ends in float32, and their gradients.
        "working copies": (2 * block * (width + 4) + (whole - blocks) * 2 * 4 if shard else
                           2 * blocks * width * (width < 4) + 2 * 4 * config.vocab_size * config.width),
        "activations": activations(config, micro_batch * T, width, activation_checkpointing) + logits * 3,
    }
    # Sharded, sampling gathers a whole copy, with the unembedding a second time (decoding.py), or as many blocks as above.
    copies = shard and sampling_copy
    ends = whole - blocks
    sizes["sampling copy"] = (blocks * width + 4 * (ends + config.vocab_size * config.width)) * copies
    # Keys and values where the recorded steps of sampling work: rows and slots are rounded up. Without a copy, none are recorded.
    per_slot = 2 * config.layers * config.width * width
    rounded = max(8, 1 << (rows - 1).bit_length()) * (-(-T // 64) * 64)
    recorded = copies or not shard
    sizes["KV cache"] = per_slot * rounded * recorded
    # While prompts are read: their keys and values (not recorded: half of them twice when finished rows are dropped), and the
    # stream and the hidden layer of an MLP before and after its nonlinearity, 9 numbers per unit of width and token.
    sizes["reading prompts"] = (per_slot * (1 if recorded else 1.5) + 9 * config.width * width) * rows * T
    # Sampling and training take turns. Where weights are not sharded, the cache is kept.
    sampling = sizes["reading prompts"] + (sizes["sampling copy"] + sizes["KV cache"]) * shard
    sizes["at most"] = sum(sizes.values()) - min(sizes["activations"], sampling)
    return sizes


def main():
    parser = Parser(prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=list(PRESETS), metavar="preset", help=", ".join(PRESETS))
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU [1]")
    parser.add_argument("--memory", type=number, default=80, help="GiB of a GPU [80]")
    parser.add_argument("--batch", type=int, default=512, help="episodes an iteration, over all GPUs [512]")
    parser.add_argument("--micro_batch", type=int, default=8, help="rows a GPU trains on at once [8]")
    parser.add_argument("--precision", choices=["bf16", "fp16", "float32"], default="bf16", help="of matrix products [bf16]")
    parser.add_argument("--shard", action=argparse.BooleanOptionalAction, default=False, help="as in ppo.py")
    parser.add_argument("--activation_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="as in ppo.py")
    parser.add_argument("--sampling_copy", action=argparse.BooleanOptionalAction, default=True, help="as in ppo.py")
    config = parser.parse_args()
    if min(config.gpus, config.batch, config.micro_batch, config.memory) <= 0:
        raise UserError("every size is at least 1")
    shape = GPTConfig(**PRESETS[config.preset])
    settings = dict(gpus=config.gpus, batch=config.batch, micro_batch=config.micro_batch, shard=config.shard,
                    width=4 if config.precision == "float32" else 2, activation_checkpointing=config.activation_checkpointing,
                    logits_memory=config.memory / 20)  # the default of --logits_memory
    sizes = plan(shape, sampling_copy=config.sampling_copy, **settings)
    print(f"{config.preset}: {parameters(GPT, shape)[0]:,} parameters; GiB a GPU, of {config.gpus}"
          f"{', sharded' * config.shard}{', with activation checkpointing' * config.activation_checkpointing}:\n")
    for what, size in sizes.items():
        print(f"{what:<16}{size / GIB:>12,.2f}")
    fits = sizes["at most"] <= config.memory * GIB
    print(f"\n{'fits' if fits else 'does not fit'} {config.memory:g} GiB (an estimate: what libraries and fragmentation take is "
          "not in it)")
    if config.shard and config.sampling_copy and not fits:
        without = plan(shape, sampling_copy=False, **settings)["at most"]
        print(f"with --no-sampling_copy, which samples far slower: {without / GIB:,.2f}")


if __name__ == "__main__":
    guard(main)
