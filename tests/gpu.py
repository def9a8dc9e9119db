"""Acceptance on a GPU: is everything right there, and how fast is it next to the GPU's own limits?

    make gpu                                         # all checks, ten minutes; exit status 1 if one fails, 2 without a GPU
    .venv/bin/python tests/gpu.py decoding training  # some of them

Limits of speed follow from the bandwidth and the rate of matrix products that this GPU is measured to have. Models have
GPT-2's shape (124M parameters) and random weights, and the data is random: nothing is downloaded. Writes out/gpu.json.

Each check is a process of its own: what it leaves behind, an error that breaks CUDA or a hang end that check only. On the
simulated device, with small models (tests/system/test_gpu.py does this; what needs hardware is not measured):

    .venv/bin/python tests/cuda_sim/script.py tests/gpu.py --size simulated
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(ROOT))
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import bench_data
import common.config
import common.run
import ppo
import sft
from bench import quiet
from common import files, layers, plan
from common.learner import Learner
from common.runtime import Runtime, RuntimeConfig
from data import readers
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate

DEVICE = "cuda:0"


@dataclass(frozen=True)
class Size:
    """How large the checks are, and how their processes are started."""
    preset: str = "gpt2"
    vocabulary: int = bench_data.VOCABULARY
    row: int = 1024  # tokens of a row of text when the speed of SFT is measured
    text: int = 256  # and otherwise
    decoding: tuple = ((64, 128), (256, 128), (64, 1024))  # rows and slots
    new_tokens: int = 64  # of each of these rows
    episodes: int = 64  # of a PPO iteration
    response: int = 48  # maximum number of their tokens
    iterations: int = 12  # of a run that is stopped after a third of them, and resumed
    copied: int = 2**30  # numbers of the copy that measures the bandwidth
    matrix: int = 8192  # width of the matrices that measure the rate of products
    seconds: int = 300  # maximum time of a check
    python: tuple = (sys.executable,)
    not_measured: tuple = ()  # checks that are left out, because they need hardware

    @property
    def shape(self):
        return dict(vocab_size=self.vocabulary, **PRESETS[self.preset])

    @property
    def end(self):
        return self.vocabulary - 1


SIMULATED = Size(preset="nano", vocabulary=1000, row=128, text=64, decoding=((8, 64),), new_tokens=16, episodes=16, response=16,
                 iterations=6, copied=2**20, matrix=256, python=(sys.executable, os.fspath(ROOT / "tests/cuda_sim/script.py")),
                 not_measured=("rates", "compiled", "attention", "decoding", "training", "ppo_speed", "memory", "torchrun",
                               "default_run"))
SIZES = {"gpt2": Size(), "simulated": SIMULATED}


@dataclass
class Setup:
    """What a check gets."""
    size: Size
    folder: Path  # for all checks: data/ is a dataset
    bandwidth: float = None  # bytes/s of this GPU
    rate: float = None  # FLOP/s of matrix products in 16 bits


# ---------------------------------------------------------------- helpers

def runtime(precision="auto", **how):
    return Runtime(RuntimeConfig(device=DEVICE, precision=precision, **how))


def random_model(size, kind=GPT, dtype=torch.float32, **shape):
    torch.manual_seed(0)
    return kind(GPTConfig(**size.shape | shape)).to(dtype)


def parameters(size):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(GPTConfig(**size.shape)).parameters())


def seconds(work, rounds=5, warmup=2):
    """Median time of work() on the GPU, in seconds."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def relative(a, b):
    """|a - b| / |b|, for tensors or lists of them."""
    a, b = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (a, b))
    squares = sum(((x.double().cpu() - y.double().cpu()) ** 2).sum() for x, y in zip(a, b))
    return math.sqrt(squares / sum((y.double().cpu() ** 2).sum() for y in b))


def row(what, measured, limit, passed):
    """A line of the table. passed: None if this was not measured."""
    return dict(what=what, measured=measured, limit=limit, passed=None if passed is None else bool(passed))


def speed_row(what, speed, unit, share, limit):
    return row(what, f"{speed:,.0f} {unit}", f"≥ {share:.1%} of {limit:,.0f}", speed >= share * limit)


def steps_of(main, config):
    """Run a stage in this process -> (seconds from each step to the next, the lines of its log)."""
    times, log = [], common.run.Run.log

    def logged(run, step, **numbers):
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        log(run, step, **numbers)

    with mock.patch.object(common.run.Run, "log", logged), quiet():
        main(config)
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    return [b - a for a, b in zip(times, times[1:])], lines


def rows_of_text(size, count, length, seed=0):
    numbers = torch.randint(0, size.end, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(row[:1], row[1:]) for row in numbers]


def sft_losses(size, how, steps=20):
    """Losses of `steps` updates on the same rows, and the learner."""
    machine, pairs = runtime(**how), rows_of_text(size, 8, size.text)
    learner = Learner(machine.place(random_model(size)), 3e-4, machine)
    config = sft.Config(pretrain_mix=1.0, init="scratch")
    losses = [sft.train_step(learner, pairs, step, 3e-4, config, size.end)["loss"] for step in range(steps)]
    return losses, learner


# ---------------------------------------------------------------- the checks

def float32(on):
    """1: logits, gradients and greedy tokens in float32, without TensorFloat-32."""
    exact, machine = random_model(on.size, dtype=torch.float64, layers=4), runtime("float32")
    model = machine.place(copy.deepcopy(exact).float())
    pairs, end = rows_of_text(on.size, 2, 65), on.size.end
    sides = []
    for side, device in ((exact, "cpu"), (model, DEVICE)):
        batch = readers.make_batch(pairs, end, device)
        side.zero_grad()
        side(batch.tokens, batch.positions).sum().backward()
        with torch.no_grad():
            sides.append((side(batch.tokens), [p.grad for p in side.parameters()]))
    logits, gradients = (relative(a, b) for a, b in zip(sides[1], sides[0]))
    prompts = bench_data.mixed_prompts(8, 4, 24, on.size.vocabulary)
    with machine.sampling(model):
        cached = generate(model, prompts, 32, torch.zeros(8, 32), temperature=0)
    slow = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(32):
            batch = readers.make_batch([(row[:-1], row[-1:]) for row in slow], end, DEVICE)
            last = torch.tensor([[len(row) - 1] for row in slow], device=DEVICE)
            tokens = model(batch.tokens).gather(1, last[:, :, None].expand(-1, -1, on.size.vocabulary)).argmax(-1)
            slow = [row + token for row, token in zip(slow, tokens.tolist())]
    equal = sum(a == row[len(prompt):] for a, row, prompt in zip(cached, slow, prompts))
    return [row("logits, float32 against float64 on the CPU", f"{logits:.1e}", "< 1e-5", logits < 1e-5),
            row("gradients, the same", f"{gradients:.1e}", "< 1e-5", gradients < 1e-5),
            row("greedy responses with and without a cache", f"{equal} of 8 equal", "8", equal == 8)]


def sixteen_bits(on):
    """2: the error of bf16, PPO's ratio before an update with logits around -100, losses next to float32's."""
    exact, machine, size = random_model(on.size), runtime(), on.size
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[machine.dtype]
    batch = readers.make_batch(rows_of_text(size, 4, 128), size.end, DEVICE)
    runtime("float32")  # switches TensorFloat-32 off
    with torch.no_grad():
        expected = exact.to(DEVICE)(batch.tokens)
    machine = runtime()
    model = machine.place(copy.deepcopy(exact))
    with torch.no_grad(), machine.autocast():
        error = relative(model(batch.tokens), expected)
    del expected
    with torch.no_grad():  # one number of the hidden states is constant: it moves all logits to -100
        model.norm.weight[0], model.norm.bias[0], model.tokens.weight[:, 0] = 0, -100, 1
    config = ppo.Config(batch_size=16, minibatch_size=16)
    policy, prompts = Learner(model, 1e-4, machine), bench_data.mixed_prompts(16, 16, 64, size.vocabulary)
    ((rollout,),) = ppo.generate_rollouts(policy, [prompts], [torch.rand(16, 48)], config, size.end)
    with torch.no_grad(), machine.autocast():
        old = model(rollout.tokens, rollout.positions)
    new = policy(rollout.tokens, rollout.positions)
    ratio = ((new - old).exp() - 1)[rollout.mask].abs().max().item()
    losses = {precision: sft_losses(size, dict(precision=precision))[0] for precision in ("float32", name)}
    off = max(abs(a / b - 1) for a, b in zip(losses[name], losses["float32"]))
    return [row(f"logits, {name} against float32", f"{error:.1e}", "1e-4 to 1e-2", 1e-4 < error < 1e-2),
            row("PPO's ratio before the first update, logits near -100", f"1 ± {ratio:.0e}", "1 ± 1e-3", ratio < 1e-3),
            row(f"20 SFT losses, {name} against float32", f"{off:.2%}", "< 1%", off < 0.01)]


def compiled(on):
    """3: --compile computes the same, and does not compile again and again."""
    plain, _ = sft_losses(on.size, {})
    pairs, end = rows_of_text(on.size, 8, on.size.text), on.size.end
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    began = time.perf_counter()
    losses, learner = sft_losses(on.size, dict(compile=True), 3)
    first = time.perf_counter() - began
    graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    config = sft.Config(pretrain_mix=1.0, init="scratch")
    for step in range(3, 20):
        losses.append(sft.train_step(learner, pairs, step, 3e-4, config, end)["loss"])
    for step in range(6):  # other lengths and numbers of rows
        sft.train_step(learner, rows_of_text(on.size, 4 + step, 100 + 16 * step), step, 0.0, config, end)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    off = max(abs(a / b - 1) for a, b in zip(losses, plain))
    return [row("20 SFT losses, compiled against not", f"{off:.2%}", "< 1%", off < 0.01),
            row("graphs compiled in all; after three steps", f"{graphs[1]}; {graphs[1] - graphs[0]}", "at most 6; 1",
                graphs[1] <= 6 and graphs[1] - graphs[0] <= 1),
            row("seconds until three steps are done", f"{first:.0f}", "", True)]


def attention(on):
    """4: which kernels attention uses, and whether a new shape is slow."""
    machine = runtime()
    learner = Learner(machine.place(random_model(on.size)), 1e-5, machine)
    config = sft.Config(pretrain_mix=1.0, init="scratch")

    def step(length):
        sft.train_step(learner, rows_of_text(on.size, 16, length), 0, 0.0, config, on.size.end)

    for length in (64, 96, 128):
        step(length)
    times = []
    for length in range(101, 171, 7):
        times.append(seconds(lambda: step(length), rounds=1, warmup=0))
    slowest = max(times) / statistics.median(times)
    prompts = bench_data.mixed_prompts(16, 16, 64, on.size.vocabulary)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, machine.sampling(learner.model):
        step(128)
        generate(learner.model, prompts, 12, torch.rand(16, 12))
    names = {event.key for event in profile.key_averages()}
    cudnn = [name for name in names if "cudnn" in name.lower() and "sdp" in name.lower() or "cudnn_generated" in name]
    kernels = sorted({kind for name in names for kind in ("flash", "fmha", "cutlassF") if kind in name})
    return [row("cuDNN's attention", f"{len(cudnn)} kernels (attention by {', '.join(kernels)})", "0", not cudnn),
            row("the slowest first step of ten lengths", f"{slowest:.1f} × the median", "< 2", slowest < 2)]


def rates(on):
    """Bytes/s of a copy, read and written; FLOP/s of matrix products in 16 bits. All limits of speed follow from these."""
    x = torch.randn(on.size.copied, device=DEVICE)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    a, b = (torch.randn(on.size.matrix, on.size.matrix, device=DEVICE, dtype=runtime().dtype) for _ in range(2))
    rate = 2 * on.size.matrix**3 / seconds(lambda: a @ b)
    (on.folder / "rates").write_text(json.dumps(dict(bandwidth=bandwidth, rate=rate)))
    return [row("copying, bytes read and written", f"{bandwidth / 1e12:.4g} TB/s", "", True),
            row("matrix products in 16 bits", f"{rate / 1e12:.4g} TFLOP/s", "", True)]


def measured_rates(folder):
    """What `rates` has measured, for a Setup."""
    return json.loads((folder / "rates").read_text()) if (folder / "rates").exists() else {}


def token_seconds(on, rows, slots):
    """For one token per row, the weights (2 bytes each) and the cache have to be read."""
    shape = on.size.shape
    weights = 2 * (parameters(on.size) - shape["context"] * shape["width"])
    return (weights + rows * slots * shape["layers"] * 2 * shape["width"] * 2) / on.bandwidth


def decoding(on):
    """5: tokens/s of sampling."""
    machine = runtime()
    model = machine.place(random_model(on.size)).eval()
    result, new = [], on.size.new_tokens
    for rows, slots in on.size.decoding:
        prompts = bench_data.mixed_prompts(rows, slots - new, slots - new, on.size.vocabulary)
        uniforms = torch.rand(rows, new) * 0.999

        def work(new):
            with machine.sampling(model):
                generate(model, prompts, new, uniforms[:, :new])

        taken = (seconds(lambda: work(new), 3, 1) - seconds(lambda: work(1), 3, 1)) / (new - 1)
        with mock.patch.object(layers.PlacedGPT, "decode", GPT.decode):
            plain = (seconds(lambda: work(new), 1, 1) - seconds(lambda: work(1), 1, 1)) / (new - 1)
        unit, limit = f"tokens/s ({rows / plain:,.0f} without graphs)", rows / token_seconds(on, rows, slots)
        result.append(speed_row(f"decoding, {rows} rows, {slots} slots", rows / taken, unit, 0.6, limit))
    return result


def sft_limit(on):
    """Tokens/s if only the matrix products of forward and backward pass took time."""
    shape = on.size.shape
    return on.rate / (6 * parameters(on.size) + 6 * shape["layers"] * shape["width"] * on.size.row)


def training(on):
    """6: tokens/s of SFT."""
    result, pairs = [], rows_of_text(on.size, 16, on.size.row)
    for name, how, share in (("eager", {}, 0.2), ("compiled", dict(compile=True), 0.35)):
        torch._dynamo.reset()
        machine = runtime(**how)
        learner = Learner(machine.place(random_model(on.size)), 1e-5, machine)
        config = sft.Config(pretrain_mix=1.0, init="scratch")
        taken = seconds(lambda: sft.train_step(learner, pairs, 0, 1e-5, config, on.size.end), 5, 3)
        result.append(speed_row(f"SFT, 16 × {on.size.row:,} tokens, {name}", 16 * (on.size.row - 1) / taken, "tokens/s", share,
                                sft_limit(on)))
    return result


def ppo_config(on, layers=None, **changes):
    """Settings of a PPO run in a new folder, from random models."""
    shape = on.size.shape | (dict(layers=layers) if layers else {})
    names = [f"{name}{shape['layers']}" for name in ("sft", "reward")]
    for name, kind in zip(names, (GPT, ScalarModel)):
        if not (on.folder / f"{name}.pt").exists():
            files.save(on.folder / f"{name}.pt", dict(model=random_model(on.size, kind, **shape).state_dict(), config={},
                                                      model_config=shape,
                                                      tokenizer=bench_data.tokenizer(on.size.vocabulary).fingerprint))
    how = dict(data=str(on.folder / "data"), out=tempfile.mkdtemp(dir=on.folder), policy=str(on.folder / f"{names[0]}.pt"),
               reward=str(on.folder / f"{names[1]}.pt"), device=DEVICE, resume=False, lr=1e-5, value_lr=1e-5,
               batch_size=on.size.episodes, minibatch_size=on.size.episodes // 4, max_new_tokens=on.size.response)
    return ppo.Config(**how | changes)


def ppo_limit(on):
    """Episodes/s if only matrix products, and reading weights and cache while sampling, took time. On average a prompt has 40
    tokens and a row of text 160 (bench_data.write_dataset), and no response ends early. Forward passes: the prompts, four
    models, and three updates, whose backward passes count twice."""
    products = 40 * 2 + (40 + on.size.response) * (4 * 2 + 2 * 6) + 160 * 6  # per parameter and episode
    sampling = on.size.response * token_seconds(on, on.size.episodes, 64 + on.size.response)
    return on.size.episodes / (on.size.episodes * products * parameters(on.size) / on.rate + sampling)


def ppo_speed(on):
    """7: the default settings of ppo.py: episodes/s."""
    times, _ = steps_of(ppo.main, ppo_config(on, iterations=15))
    speed = on.size.episodes / statistics.median(times[5:])
    return [speed_row("PPO, default settings", speed, "episodes/s", 0.055, ppo_limit(on))]


def ppo_waits(on):
    """7: waits for the GPU in an iteration of PPO, and the ratio before an update."""
    counts, log, config = [], common.run.Run.log, ppo_config(on, iterations=5)

    def logged(run, step, **numbers):
        counts.append(len(caught))
        log(run, step, **numbers)

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(common.run.Run, "log", logged), quiet():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        ppo.main(config)
        torch.cuda.set_sync_debug_mode("default")
    waits = statistics.median(b - a for a, b in zip(counts[1:], counts[2:]))
    ratio = abs(log_of(config)[0]["ratio"] - 1)  # a mean over four updates, the first of them at ratio 1
    return [row("waits for the GPU per iteration of PPO", f"{waits:.0f}", "1 to 60", 1 <= waits <= 60),
            row("mean ratio in the first iteration", f"1 ± {ratio:.0e}", "1 ± 1e-2", ratio < 1e-2)]


def memory(on):
    """8: the peak of PPO's memory next to plan.py's, with rows of equal length; and whether it grows."""
    if not (on.folder / "equal").exists():
        bench_data.write_dataset(on.folder / "equal", prompt_tokens=(64, 64), page_tokens=(111, 111),
                                 vocabulary=on.size.vocabulary)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, peaks, log = torch.cuda.memory_allocated(), [], common.run.Run.log

    def logged(run, step, **numbers):
        peaks.append(torch.cuda.max_memory_allocated() - before)
        log(run, step, **numbers)

    with mock.patch.object(common.run.Run, "log", logged), quiet():
        ppo.main(ppo_config(on, iterations=20, data=str(on.folder / "equal")))
    sizes = plan.plan(GPTConfig(**on.size.shape), batch=on.size.episodes, micro_batch=on.size.episodes // 4, length=112)
    off = peaks[-1] / sizes["at most"]
    return [row("peak memory against plan.py's", f"{peaks[-1] / 2**30:.2f} GiB, {off:.0%}", "within 15%", abs(off - 1) < 0.15),
            row("peak memory from iteration 5 to 20", f"+{peaks[-1] / peaks[5] - 1:.1%}", "flat", peaks[-1] <= 1.01 * peaks[5])]


def command(on, script, config, launcher=(), **how):
    arguments = [argument for name, value in vars(config).items() for argument in flag(name, value)]
    return subprocess.Popen([*on.size.python, *launcher, os.fspath(ROOT / script), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=ROOT, **how)


def flag(name, value):
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", str(value)]


def log_of(config):
    path = Path(config.out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stop_in_the_middle(process, config, steps):
    while process.poll() is None and len(log_of(config)) < steps:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=120)[0]


def torchrun(on):
    """9: one process under torchrun, sharded: saves, is stopped, resumes, ends; its numbers are those without sharding."""
    how = dict(layers=2, iterations=on.size.iterations, batch_size=16, minibatch_size=8, precision="float32")
    _, expected = steps_of(ppo.main, ppo_config(on, **how))
    config = ppo_config(on, **how, shard=True, resume=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    output = stop_in_the_middle(command(on, "ppo.py", config, launcher), config, config.iterations // 3)
    stopped_at = len(log_of(config))
    process = command(on, "ppo.py", config, launcher)
    output += process.communicate(timeout=200)[0]
    lines = log_of(config)
    off = max((abs(a[k] - b[k]) / max(1e-2, abs(b[k])) for a, b in zip(lines, expected) for k in ("score", "policy_loss", "kl")),
              default=math.inf)
    done = process.returncode == 0 and len(lines) == config.iterations
    return [row("sharded PPO, stopped and resumed", f"stopped after {stopped_at}, {len(lines)} of {config.iterations}, "
                f"exit status {process.returncode}", f"{config.iterations}, 0", done and 0 < stopped_at < config.iterations)
            | dict(output=output[-2000:]),
            row("its numbers against those without sharding", f"{off:.1e}", "< 1e-3", off < 1e-3)]


def fp16(on):
    """10: loss scaling skips few updates."""
    losses, learner = sft_losses(on.size, dict(precision="fp16"), 50)
    return [row("updates skipped in fp16", f"{learner.skipped} of 50, last loss {losses[-1]:.2f}", "< 3", learner.skipped < 3)]


def faults(on):
    """11: --device cuda; stopped by SIGTERM and resumed, the final losses are those of an uninterrupted run."""
    how = dict(layers=2, iterations=on.size.iterations, batch_size=16, minibatch_size=8, device="cuda")
    _, expected = steps_of(ppo.main, ppo_config(on, **how))
    config = ppo_config(on, **how, resume=True)
    output = stop_in_the_middle(command(on, "ppo.py", config), config, config.iterations // 3)
    stopped_at = len(log_of(config))
    process = command(on, "ppo.py", config)
    output += process.communicate(timeout=200)[0]
    lines = log_of(config)
    done = process.returncode == 0 and len(lines) == config.iterations
    off = max((abs(a["policy_loss"] - b["policy_loss"]) for a, b in zip(lines, expected)), default=math.inf)
    return [row("--device cuda, SIGTERM, resumed", f"stopped after {stopped_at}, {len(lines)} of {config.iterations}, "
                f"policy loss off by {off:.0e}", "all, < 1e-3", done and 0 < stopped_at < config.iterations and off < 1e-3)
            | dict(output=output[-2000:])]


def default_run(on):
    """12: the default run, in its own folders. If it takes too long, its output says which line it was at."""
    began = time.perf_counter()
    stages, out, data = [], on.folder / "default", on.folder / "vale"
    environment = os.environ | {"TQDM_DISABLE": "1"}
    command = ["make", f"OUT={out}", f"DATA={data}", f"RUN={sys.executable} -X faulthandler", "-o", ".venv/installed", "report"]
    make = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
                            start_new_session=True)
    limit = threading.Timer(on.size.seconds - 20, os.killpg, (make.pid, signal.SIGABRT))
    limit.start()
    output = []
    for line in make.stdout:
        output.append(line)
        if sys.executable in line and ".py" in line:
            stages.append(f"{time.perf_counter() - began:.0f} s: {next(word for word in line.split() if word.endswith('.py'))}")
            print(stages[-1], file=sys.stderr, flush=True)
    make.wait()
    limit.cancel()
    stages.append(f"{time.perf_counter() - began:.0f} s: done")
    taken = time.perf_counter() - began
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}
    wins = {name: next(iter(by.values()))[0] for name, by in report.get("preference", {}).items()}
    good = make.returncode == 0 and wins.get("PPO-ptx", 0) > 0.65
    return [row("the default run (make)", f"{taken:.0f} s; preferred to SFT: " +
                ", ".join(f"{name} {win:.1%}" for name, win in wins.items()), "PPO-ptx > 65%", good)
            | dict(output="".join(output)[-6000:], stages=stages)]


CHECKS = {check.__name__: check for check in (rates, float32, sixteen_bits, compiled, attention, decoding, training, ppo_speed,
                                              ppo_waits, memory, torchrun, fp16, faults, default_run)}


# ---------------------------------------------------------------- running them

def check_here(name, on):
    """Run a check in this process; its rows go to a file in on.folder. An error is a failed row."""
    try:
        rows = CHECKS[name](on)
    except Exception as error:
        traceback.print_exc()
        rows = [row(name, f"{type(error).__name__}: {str(error)[:200]}", "", False)]
    (on.folder / f"{name}.json").write_text(json.dumps(rows))


def check_in_a_process(name, size_name, folder):
    """-> the rows of a check. If its process dies or does not end, that is a failed row."""
    size, result = SIZES[size_name], folder / f"{name}.json"
    if name in size.not_measured:
        return [row(name, "needs a GPU", "", None)]
    command = [*size.python, ROOT / "tests/gpu.py", "--size", size_name, "--folder", folder, name]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)  # a group of its own, which is ended as a whole
    try:
        status = process.wait(size.seconds)
    except subprocess.TimeoutExpired:
        return [row(name, f"not finished after {size.seconds} seconds", "", False)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return json.loads(result.read_text()) if result.exists() else [row(name, f"exit status {status}", "", False)]


def check_all(names, size_name, out):
    """Print a row of the table for each result of these checks, and write all to out/gpu.json. -> the table's rows"""
    if not torch.cuda.is_available():
        raise common.config.UserError("PyTorch finds no Nvidia GPU here")
    properties, table = torch.cuda.get_device_properties(0), []
    print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; PyTorch {torch.__version__}\n\n"
          "| check | measured | limit | |\n|---|---|---|---|", flush=True)
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bench_data.write_dataset(folder / "data", page_tokens=(64, 256), vocabulary=SIZES[size_name].vocabulary)
        for name in names:
            began = time.perf_counter()
            rows = check_in_a_process(name, size_name, folder)
            for line in rows:
                verdict = {True: "passed", False: "FAILED", None: "not measured"}[line["passed"]]
                print(f"| {line['what']} | {line['measured']} | {line['limit']} | {verdict} |", flush=True)
            table += [line | dict(check=name, seconds=time.perf_counter() - began) for line in rows]
            facts = dict(device=properties.name, torch=torch.__version__, **measured_rates(folder), table=table)
            (out / "gpu.json").write_text(json.dumps(facts, indent=1))
    return table


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all of {', '.join(CHECKS)}")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--folder", type=Path, help="run the checks in this process; their rows go to files in this folder")
    args = parser.parse_args(argv)
    for name in args.checks:
        if name not in CHECKS:
            raise common.config.UserError(f"{name}: no such check; there are {', '.join(CHECKS)}")
    if args.folder:
        for name in args.checks:
            check_here(name, Setup(SIZES[args.size], args.folder, **measured_rates(args.folder)))
        return
    names = ["rates", *(name for name in args.checks or CHECKS if name != "rates")]  # limits follow from the rates
    table = check_all(names, args.size, Path(os.environ.get("OUT", ROOT / "out")))
    sys.exit(1 if any(line["passed"] is False for line in table) else 0)


if __name__ == "__main__":
    common.config.guard(lambda: main(sys.argv[1:]))
