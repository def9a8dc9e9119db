"""What training a size takes: parameters, and bytes a GPU for everything that ppo.py keeps there. Nothing is allocated.

    python model.py plan gpt3-1.3b --gpus 8         # --help lists what else can be said

PPO is the most of the three stages: it keeps the policy and the value function with gradients and Adam's two averages, and
the reference, the reward model and the policy's moving average without (C.4).
"""

import argparse
import sys

import torch

import common
from model import GPT, LOGITS, PRESETS, GPTConfig, ScalarModel

GIB = 2**30


def parameters(kind, config):
    """(of the whole model, of its largest block), counted on the meta device."""
    with torch.device("meta"):
        model = kind(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    return count(model), max(count(block) for block in model.blocks)


def activations(config, tokens, width, recompute):
    """Bytes that a training pass over so many tokens keeps for its backward pass, at `width` bytes a number. A block keeps, in
    units of C numbers a token: the two norms' inputs and outputs (4), queries, keys and values (3), what attention gives,
    before and after the heads are laid side by side (2, of which one is the first norm's of the next), the hidden layer of
    the MLP before and after its nonlinearity (8): 16. With `recompute`, blocks keep their input (1), and one at a time all."""
    block = 16 * config.width * width * tokens
    kept = config.layers * config.width * width * tokens + block if recompute else config.layers * block
    return kept + 2 * config.width * width * tokens  # the embedding's sum and the last norm


def plan(config, gpus=1, batch=512, micro_batch=8, width=2, shard=False, recompute=False):
    """-> {what: bytes a GPU}. batch: episodes an iteration, all of them sampled at once; micro_batch: rows of a
    training pass, all as long as the context; width: bytes of a number in matrix products."""
    whole, block = parameters(GPT, config)
    scalar, _ = parameters(ScalarModel, config)
    part, blocks = gpus if shard else 1, config.layers * block
    rows, T = -(-batch // gpus), config.context
    logits = min(micro_batch * T * config.vocab_size, LOGITS)  # of pretraining text every position has a target
    sizes = {
        "policy": 4 * whole / part,
        "value": 4 * scalar / part,
        "reference": 4 * whole / part,
        "reward": 4 * scalar / part,
        "moving average": 4 * whole / part,
        "gradients": 4 * (whole + scalar) / part,
        "optimizer": 8 * (whole + scalar) / part,
        # What is computed with: in 16 bits a copy of the blocks; sharded, one block (the next is on its way) and, in float32,
        # the ends; and their gradients.
        "working copies": 2 * block * (width + 4) + (whole - blocks) * 2 * 4 if shard else blocks * width * (width < 4),
        "activations": activations(config, micro_batch * T, width, recompute) + logits * 3 * 4,
    }
    # Keys and values of every episode; half of them twice when finished ones leave, all where sharding reads prompts at once.
    sizes["KV cache"] = 2 * config.layers * config.width * rows * T * width * (2 if shard else 1.5)
    sizes["at most"] = sum(sizes.values()) - min(sizes["activations"], sizes["KV cache"])  # never at once
    return sizes


def main():
    parser = common.Parser(prog="model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True, metavar="plan").add_parser("plan", help="bytes a GPU")
    command.add_argument("preset", choices=list(PRESETS), metavar="preset", help=", ".join(PRESETS))
    command.add_argument("--gpus", type=int, default=1, help="processes, one a GPU [1]")
    command.add_argument("--memory", type=common.number, default=80, help="GiB of a GPU [80]")
    command.add_argument("--batch", type=int, default=512, help="episodes an iteration, over all GPUs [512]")
    command.add_argument("--micro_batch", type=int, default=8, help="rows a GPU trains on at once [8]")
    command.add_argument("--precision", choices=["bf16", "fp16", "float32"], default="bf16", help="of matrix products [bf16]")
    command.add_argument("--shard", action=argparse.BooleanOptionalAction, default=False, help="as in ppo.py")
    command.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False, help="as in ppo.py")
    config = parser.parse_args()
    if min(config.gpus, config.batch, config.micro_batch, config.memory) <= 0:
        raise common.UserError("every size is at least 1")
    shape = GPTConfig(**PRESETS[config.preset])
    sizes = plan(shape, config.gpus, config.batch, config.micro_batch, width=4 if config.precision == "float32" else 2,
                 shard=config.shard, recompute=config.recompute)
    print(f"{config.preset}: {parameters(GPT, shape)[0]:,} parameters; GiB a GPU, of {config.gpus}"
          f"{', sharded' * config.shard}{', recomputing' * config.recompute}:\n")
    for what, size in sizes.items():
        print(f"{what:<16}{size / GIB:>12,.2f}")
    fits = sizes["at most"] <= config.memory * GIB
    print(f"\n{'fits' if fits else 'does not fit'} {config.memory:g} GiB (an estimate: what libraries and fragmentation take is "
          "not in it)")


if __name__ == "__main__":
    sys.argv[0] = "model.py"  # which runs this file
    common.guard(main)
