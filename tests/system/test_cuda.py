"""Every stage on a simulated CUDA device and on a simulated Apple GPU (tests/cuda_sim/fakecuda.py, fakemps.py), in processes of
their own. What it shows: which tensors are on which device, the values in each precision, which attention kernels run, how often
the host waits for the device, and how many kernels it starts; that nothing on an Apple GPU is in float64 or lacks a kernel there.
What it can't show: speed, memory, several devices, whether a kernel is right.

`python tests/cuda_sim/count.py` prints which lines wait.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import evaluate
import sample
from conftest import ROOT, read_log

# How often the host may wait for the device.
SFT_STEP = 4
REWARD_STEP = 8  # 8 prompts
PPO_ITERATION = 60  # 64 episodes in 4 minibatches, 48 new tokens, PPO-ptx
EVALUATE_MORE_PROMPTS = 6  # how many more for 48 prompts than for 12, in the same number of batches
EVALUATE_BATCH = 8  # per batch of responses: 6 were measured, 4 of them for prompts and random numbers
# Kernels per sampled token with 12 layers, those of a replayed graph included: 203 were measured, 15 per layer and
# 24 for embeddings, unembedding and choosing the token.
TOKEN_KERNELS = 223

STAGES = ("base", "sft", "collect", "reward", "ppo", "ppo_noptx", "evaluate", "sample")
# Each stage is run in each precision, on another device each time, and the next stage starts with the next device. So all pairs
# of stage, precision and device occur (a T4 has no bf16: there it is auto). {precision: --device}; an Apple GPU has one.
WAYS = {"float32": "auto", "bf16": "cuda", "fp16": "cuda:0", "mps": "mps"}
DEVICES = ("H100", "A100", "T4")
IN_FLOAT32 = ("float32", "mps")
SHORT = {  # in 16 bits only the kinds of operations matter, not the numbers
    "base": dict(epochs=1),
    "sft": dict(epochs=1),
    "collect": dict(prompts=16, valid_prompts=6, max_new_tokens=12),
    "ppo": dict(max_new_tokens=12),
    "ppo_noptx": dict(max_new_tokens=12),
}
REPORT = dict(max_new_tokens=12)
SIMULATOR = ("mixed_devices_raise", "values_and_gradients_are_real", "waits_are_counted",
             "copies_from_pinned_memory_wait_for_nothing", "devices_differ_in_bf16", "a_device_is_set_by_its_index",
             "an_apple_gpu_refuses_float64_and_what_has_no_kernel", "a_graph_must_not_wait", "attention_kernels_are_those_of_the_device")
PROJECT = ("precision_on_each_device", "auto_takes_the_gpu_that_is_there", "an_apple_gpu_takes_float32_and_one_process",
           "device_cuda_without_an_index", "a_twentieth_of_the_memory_is_for_logits",
           "attention_while_sampling", "kernels_per_token")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the simulated device is built for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing, which builds the simulated device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the simulated device needs the CPU build of PyTorch"),
]


@pytest.fixture(scope="session")
def results(chain, tmp_path_factory):
    """{precision: {stage: what drive.py counted}}, and {"counts": {name: of longer steps, or of a check}}. Made once, also if
    pytest-xdist runs the tests in several processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            run_everything(chain, folder)
            (folder / "done").touch()
    return {name: json.loads((folder / name / "results.json").read_text()) for name in (*WAYS, "counts")} | {"folder": folder}


def run_everything(chain, folder):
    """A process per precision, and one for counts and checks, two at a time. Meanwhile what `chain` lacks runs on the CPU."""
    plans = {precision: plan_of_stages(chain, folder / precision, precision) for precision in WAYS}
    plans["counts"] = plan_of_counts(chain, folder / "counts")
    for name, plan in plans.items():
        (folder / name / "plan.json").write_text(json.dumps(plan))
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(drive, folder / name) for name in plans]
        copy_of(chain, folder / "cpu")
        evaluate.main(dataclasses.replace(chain.report, data=f"{folder}/cpu/data", out=f"{folder}/cpu/out", **REPORT))
        for process in running:
            process.result()


def drive(folder):
    command = [sys.executable, ROOT / "tests/cuda_sim/drive.py", folder / "plan.json", folder / "results.json"]
    done = subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def copy_of(chain, folder):
    """A copy of the dataset and of the models of `chain`, from which every stage starts."""
    shutil.copytree(chain.data, folder / "data")
    shutil.copytree(chain.out, folder / "out")


def moved(config, chain, folder, device, **changes):
    """A stage's settings on the copy, without those that the plan decides."""
    text = json.dumps(dataclasses.asdict(config)).replace(str(chain.out), f"{folder}/out").replace(str(chain.data), f"{folder}/data")
    settings = {key: value for key, value in json.loads(text).items() if key != "precision"}
    return settings | {"device": device} | changes


def plan_of_stages(chain, folder, precision):
    copy_of(chain, folder)
    jobs, device = {}, WAYS[precision]
    for name, config in chain.stages.items():
        changes = dict(append=False) if name == "collect" else dict(out=f"{folder}/new/{name}")
        if precision not in IN_FLOAT32:
            changes |= SHORT.get(name, {})
        jobs[name] = type(config).__module__, moved(config, chain, folder, device, **changes)
    jobs["collect"] = jobs.pop("collect")  # last: reward.py reads the same comparisons as in `chain`
    jobs["evaluate"] = "evaluate", moved(chain.report, chain, folder, device, **REPORT)
    jobs["sample"] = "sample", sample_settings(f"{folder}/out", device)
    return dict(jobs={name: (*job, *way(name, precision)) for name, job in jobs.items()}, checks=[])


def way(stage, precision):
    """-> (device, precision) of a stage."""
    if precision == "mps":
        return "mps", "auto"
    device = DEVICES[(STAGES.index(stage) + list(WAYS).index(precision)) % len(DEVICES)]
    return device, "auto" if (device, precision) == ("T4", "bf16") else precision


def sample_settings(out, device):
    return dict(models=f"{out}/ppo", data=f"{Path(out).parent}/data", reference=f"{out}/sft/model.pt", reward=f"{out}/reward/model.pt",
                prompt="What does the fox eat?", n=2, max_new_tokens=12, tokens=True, html=f"{out}/page.html", device=device)


def plan_of_counts(chain, folder):
    copy_of(chain, folder)
    new = {name: moved(config, chain, folder, "cuda", out=f"{folder}/new/{name}") for name, config in chain.stages.items()}
    jobs = {
        "sft": ("sft", new["sft"]),
        "reward": ("reward", new["reward"] | dict(batch_size=8)),
        "ppo": ("ppo", new["ppo"] | dict(batch_size=64, minibatch_size=16, max_new_tokens=48, iterations=3)),
        "more prompts": ("evaluate", moved(chain.report, chain, folder, "cuda", **REPORT, prompts=48)),
        "more batches": ("evaluate", moved(chain.report, chain, folder, "cuda", **REPORT, prompts=48, batch_size=12)),
    }
    return dict(jobs={name: (*job, "H100", "bf16") for name, job in jobs.items()}, checks=SIMULATOR + PROJECT)


def value(results, check):
    """What a check returned."""
    result = results["counts"][check]
    assert result["error"] is None, result["error"]
    return result["value"]


# ---------------------------------------------------------------- the simulated device itself

@pytest.mark.parametrize("check", SIMULATOR)
def test_the_simulated_device(results, check):
    value(results, check)


# ---------------------------------------------------------------- every stage

@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", WAYS)
def test_a_stage_runs_on_a_gpu(results, precision, stage):
    result = results[precision][stage]
    assert result["error"] is None, result["error"]
    log = results["folder"] / precision / "new" / stage / "log.jsonl"
    if log.exists():
        numbers = [number for line in read_log(log.parent) for number in line.values() if number is not None]
        assert numbers and all(map(math.isfinite, numbers))


@pytest.mark.parametrize("way", IN_FLOAT32)
@pytest.mark.parametrize("stage", ["base", "sft", "reward", "ppo", "ppo_noptx"])
def test_in_float32_a_run_on_a_gpu_logs_what_it_logs_on_a_cpu(results, chain, stage, way):
    assert_close(read_log(results["folder"] / way / "new" / stage), read_log(chain.out / stage))


def assert_close(a, b):
    """Two objects of JSON, with numbers equal up to rounding; how long it took does not count."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"episodes_per_second", "config"}:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    else:
        assert a == b


@pytest.mark.parametrize("way", IN_FLOAT32)
def test_in_float32_a_gpu_samples_and_evaluates_as_a_cpu(results, chain, way):
    folder = results["folder"]
    for split in ("train", "valid"):
        here, there = (f"{data}/comparisons.{split}.jsonl" for data in (folder / way / "data", chain.data))
        assert Path(here).read_text() == Path(there).read_text()
    assert_close(*(json.loads((folder / place / "out/report.json").read_text()) for place in (way, "cpu")))


@pytest.mark.parametrize("way", IN_FLOAT32)
def test_in_float32_a_gpu_shows_the_same_tokens_and_numbers(results, capsys, way):
    out = results["folder"] / "cpu/out"
    sample.main(sample.Config(**sample_settings(out, "cpu")))
    number = r"[-+]?\d+\.\d+"
    here, there = results[way]["sample"]["output"], capsys.readouterr().out
    here, there = (text.replace(str(results["folder"] / place), "") for text, place in ((here, way), (there, "cpu")))
    assert re.sub(number, "", here).split() == re.sub(number, "", there).split()
    assert [float(x) for x in re.findall(number, here)] == pytest.approx([float(x) for x in re.findall(number, there)], abs=0.011)


# ---------------------------------------------------------------- device, precision, attention

def test_auto_is_bf16_where_a_gpu_computes_with_it_and_fp16_elsewhere(results):
    assert value(results, "precision_on_each_device") == {"H100": "bf16", "A100": "bf16", "T4": "fp16"}


def test_auto_takes_an_nvidia_gpu_then_an_apple_gpu_then_the_cpu(results):
    assert value(results, "auto_takes_the_gpu_that_is_there") == {"both": "cuda:0", "mps": "mps", "nothing": "cpu"}


def test_an_apple_gpu_takes_float32_and_one_process(results):
    value(results, "an_apple_gpu_takes_float32_and_one_process")


def test_the_device_cuda_is_the_gpu_of_this_process(results):
    value(results, "device_cuda_without_an_index")


def test_logits_get_a_twentieth_of_the_memory_of_a_gpu(results):
    value(results, "a_twentieth_of_the_memory_is_for_logits")


@pytest.mark.parametrize("device", ["H100", "A100", "T4"])
def test_prompts_take_flash_attention_and_tokens_the_efficient_one(results, device):
    kernels = {"prompts": "efficient" if device == "T4" else "flash", "tokens": "efficient"}
    assert value(results, "attention_while_sampling")[device] == kernels


def test_no_stage_uses_cudnn_attention(results):
    runs = [*results["bf16"].values(), *results["fp16"].values()]
    used = {kernel for result in runs for _, _, _, kernel in result["total"]["attention"]}
    assert used and not used & {"cudnn", "math"}


# ---------------------------------------------------------------- synchronizations and kernels

def syncs_per_step(result, step):
    """The number, and which lines wait."""
    waits = result["steps"][step]["syncs"]
    return sum(number for number, _, _ in waits), waits


def test_an_sft_step_waits_rarely(results):
    number, waits = syncs_per_step(results["counts"]["sft"], 1)
    assert number <= SFT_STEP, waits


def test_a_reward_step_waits_rarely(results):
    number, waits = syncs_per_step(results["counts"]["reward"], 1)
    assert number <= REWARD_STEP, waits


def test_a_ppo_iteration_waits_rarely(results):
    number, waits = syncs_per_step(results["counts"]["ppo"], 1)
    assert number <= PPO_ITERATION, waits


def test_the_evaluation_waits_per_batch_not_per_response(results):
    counted = results["bf16"]["evaluate"], results["counts"]["more prompts"], results["counts"]["more batches"]
    few, many, batches = (sum(number for number, _, _ in result["total"]["syncs"]) for result in counted)
    assert many - few <= EVALUATE_MORE_PROMPTS
    more = 3 * 6 + 2 * 2  # batches: 4 instead of 1 by 5 models and the baseline, 3 instead of 1 by the 2 epochs of SFT
    assert 0 < (batches - many) / more <= EVALUATE_BATCH


def test_a_sampled_token_takes_few_kernels(results):
    assert value(results, "kernels_per_token") <= TOKEN_KERNELS
