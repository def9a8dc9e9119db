"""Print how often the host waits for a GPU, and how many kernels it starts, per step of each stage, with twelve layers.

    python tests/cuda_sim/count.py

Both are counted on the simulated device (fakecuda.py) and do not depend on the width, so that the models are narrow. Below
each stage: the lines of code that wait. Takes about a minute.
"""

import collections
import tempfile

import drive  # before torch
import checks
import fakecuda
import torch

import model
from data.tinyworld import prepare

model.PRESETS["deep"] = dict(layers=12, heads=2, width=32, context=256)


def stages(folder):
    """{name: (module, settings)} of a small run of every stage."""
    data, out = f"{folder}/data", f"{folder}/out"
    sft, models = f"{out}/sft/model.pt", dict(policy=f"{out}/sft/model.pt", reward=f"{out}/reward/model.pt")
    stages = {
        "base": ("sft", dict(out=f"{out}/base", init="scratch", size="deep", pretrain_mix=1.0, epochs=1)),
        "sft": ("sft", dict(out=f"{out}/sft", init=f"{out}/base/model.pt", epochs=1, batch_size=8, pretrain_mix=0.125)),
        "collect": ("data.collect", dict(sources=f"{sft}@1,{out}/base/model.pt@1", prompts=40, valid_prompts=12, most=5,
                                         max_new_tokens=24, batch_size=16)),
        "reward": ("reward", dict(out=f"{out}/reward", init=sft)),
        "ppo": ("ppo", dict(out=f"{out}/ppo", **models, iterations=3)),
        "ppo_noptx": ("ppo", dict(out=f"{out}/ppo_noptx", **models, iterations=3, ptx_coef=0.0)),
        "evaluate": ("evaluate", dict(out=out, prompts=12, max_new_tokens=24)),
    }
    return {name: (module, dict(data=data, **settings)) for name, (module, settings) in stages.items()}


def print_step(name, counts, steps):
    """One line with the numbers of a step, then a line per place that waits."""
    syncs, kernels = (sum(counts[kind].values()) / steps for kind in ("syncs", "kernels"))
    print(f"\n{name}: {syncs:.1f} synchronizations, {kernels:.0f} kernels")
    for (place, why), number in counts["syncs"].most_common():
        print(f"{number / steps:10.2f}  {why:<34} {place}")
    for (place, kind, kernel), number in counts["attention"].most_common():
        print(f"{number / steps:10.2f}  {kind} attention by {kernel:<18} {place}")


def main():
    torch.set_num_threads(1)
    gpu = fakecuda.FakeCuda()
    with tempfile.TemporaryDirectory() as folder:
        prepare.main(prepare.Config(out=f"{folder}/data", documents=300, log=700, customers=40, demonstrations=64, tasks=4,
                                    vocab_size=600))
        for name, (module, settings) in stages(folder).items():
            result = drive.run(gpu, module, settings, "bf16")
            if result["error"]:
                raise SystemExit(f"{name}: {result['error']}")
            steps = result["steps"][1:-1] or result["steps"][-1:] or [result["total"]]  # the last one may validate or save
            total = {kind: sum((step[kind] for step in steps), collections.Counter()) for kind in steps[0]}
            print_step(f"{name}, {'a step' if result['steps'] else 'in all'}", total, len(steps))
    print(f"\ndecoding: {checks.kernels_per_token():.0f} kernels per token")


if __name__ == "__main__":
    main()
