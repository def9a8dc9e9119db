"""Acceptance on a GPU: is everything right there, and how fast is it next to the GPU's own limits?

    make gpu                                    # all checks, about eight minutes; exit status 1 if one fails
    .venv/bin/python tests/gpu.py decoding ppo  # some of them

Limits of speed follow from the bandwidth and the rate of matrix products that this GPU is measured to have. Models have
GPT-2's shape (124M parameters) and random weights, and the data is random: nothing is downloaded. Writes out/gpu.json.
"""

import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
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

SHAPE = dict(vocab_size=bench_data.VOCABULARY, **PRESETS["gpt2"])
END = bench_data.VOCABULARY - 1


# ---------------------------------------------------------------- helpers

def runtime(precision="auto", **how):
    return Runtime(RuntimeConfig(device=DEVICE, precision=precision, **how))


def random_model(kind=GPT, dtype=torch.float32, **shape):
    torch.manual_seed(0)
    return kind(GPTConfig(**SHAPE | shape)).to(dtype)


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
    return dict(what=what, measured=measured, limit=limit, passed=bool(passed))


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


def rows_of_text(count, length, seed=0):
    numbers = torch.randint(0, END, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(row[:1], row[1:]) for row in numbers]


def sft_losses(how, pairs, steps=20):
    """Losses of `steps` updates on the same rows, and the learner."""
    machine = runtime(**how)
    learner = Learner(machine.place(random_model()), 3e-4, machine)
    config = sft.Config(pretrain_mix=1.0, init="scratch")
    losses = [sft.train_step(learner, pairs, step, 3e-4, config, END)["loss"] for step in range(steps)]
    return losses, learner


# ---------------------------------------------------------------- the checks

def float32(folder):
    """1: logits, gradients and greedy tokens in float32, without TensorFloat-32."""
    exact, machine = random_model(dtype=torch.float64, layers=4), runtime("float32")
    model = machine.place(copy.deepcopy(exact).float())
    pairs = rows_of_text(2, 65)
    sides = []
    for side, device in ((exact, "cpu"), (model, DEVICE)):
        batch = readers.make_batch(pairs, END, device)
        side.zero_grad()
        side(batch.tokens, batch.positions).sum().backward()
        with torch.no_grad():
            sides.append((side(batch.tokens), [p.grad for p in side.parameters()]))
    logits, gradients = (relative(a, b) for a, b in zip(sides[1], sides[0]))
    prompts = bench_data.mixed_prompts(8, 4, 24)
    with machine.sampling(model):
        cached = generate(model, prompts, 32, torch.zeros(8, 32), temperature=0)
    slow = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(32):
            batch = readers.make_batch([(row[:-1], row[-1:]) for row in slow], END, DEVICE)
            last = torch.tensor([[len(row) - 1] for row in slow], device=DEVICE)
            tokens = model(batch.tokens).gather(1, last[:, :, None].expand(-1, -1, SHAPE["vocab_size"])).argmax(-1)
            slow = [row + token for row, token in zip(slow, tokens.tolist())]
    equal = sum(a == row[len(prompt):] for a, row, prompt in zip(cached, slow, prompts))
    return [row("logits, float32 against float64 on the CPU", f"{logits:.1e}", "< 1e-5", logits < 1e-5),
            row("gradients, the same", f"{gradients:.1e}", "< 1e-5", gradients < 1e-5),
            row("greedy responses with and without a cache", f"{equal} of 8 equal", "8", equal == 8)]


def sixteen_bits(folder):
    """2: the error of bf16, PPO's ratio before an update with logits around -100, losses next to float32's."""
    exact, machine = random_model(), runtime()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[machine.dtype]
    batch = readers.make_batch(rows_of_text(4, 128), END, DEVICE)
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
    policy, prompts = Learner(model, 1e-4, machine), bench_data.mixed_prompts(16, 16, 64)
    ((rollout,),) = ppo.generate_rollouts(policy, [prompts], [torch.rand(16, 48)], config, END)
    with torch.no_grad(), machine.autocast():
        old = model(rollout.tokens, rollout.positions)
    new = policy(rollout.tokens, rollout.positions)
    ratio = ((new - old).exp() - 1)[rollout.mask].abs().max().item()
    pairs = rows_of_text(8, 256)
    losses = {precision: sft_losses(dict(precision=precision), pairs)[0] for precision in ("float32", name)}
    off = max(abs(a / b - 1) for a, b in zip(losses[name], losses["float32"]))
    return [row(f"logits, {name} against float32", f"{error:.1e}", "1e-4 to 1e-2", 1e-4 < error < 1e-2),
            row("PPO's ratio before the first update, logits near -100", f"1 ± {ratio:.0e}", "1 ± 1e-3", ratio < 1e-3),
            row(f"20 SFT losses, {name} against float32", f"{off:.2%}", "< 1%", off < 0.01)]


def compiled(folder):
    """3: --compile computes the same, and does not compile again and again."""
    pairs = rows_of_text(8, 256)
    plain, _ = sft_losses({}, pairs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    began = time.perf_counter()
    losses, learner = sft_losses(dict(compile=True), pairs, 3)
    first = time.perf_counter() - began
    graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    config = sft.Config(pretrain_mix=1.0, init="scratch")
    for step in range(3, 20):
        losses.append(sft.train_step(learner, pairs, step, 3e-4, config, END)["loss"])
    for step in range(6):  # other lengths and numbers of rows
        sft.train_step(learner, rows_of_text(4 + step, 100 + 16 * step), step, 0.0, config, END)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    off = max(abs(a / b - 1) for a, b in zip(losses, plain))
    return [row("20 SFT losses, compiled against not", f"{off:.2%}", "< 1%", off < 0.01),
            row("graphs compiled in all; after three steps", f"{graphs[1]}; {graphs[1] - graphs[0]}", "at most 6; 1",
                graphs[1] <= 6 and graphs[1] - graphs[0] <= 1),
            row("seconds until three steps are done", f"{first:.0f}", "", True)]


def attention(folder):
    """4: which kernels attention uses, and whether a new shape is slow."""
    machine = runtime()
    learner = Learner(machine.place(random_model()), 1e-5, machine)
    config = sft.Config(pretrain_mix=1.0, init="scratch")

    def step(length):
        sft.train_step(learner, rows_of_text(16, length), 0, 0.0, config, END)

    for length in (64, 96, 128):
        step(length)
    times = []
    for length in range(101, 171, 7):
        times.append(seconds(lambda: step(length), rounds=1, warmup=0))
    slowest = max(times) / statistics.median(times)
    prompts = bench_data.mixed_prompts(16, 16, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, machine.sampling(learner.model):
        step(128)
        generate(learner.model, prompts, 12, torch.rand(16, 12))
    names = {event.key for event in profile.key_averages()}
    cudnn = [name for name in names if "cudnn" in name.lower() and "sdp" in name.lower() or "cudnn_generated" in name]
    kernels = sorted({kind for name in names for kind in ("flash", "fmha", "cutlassF") if kind in name})
    return [row("cuDNN's attention", f"{len(cudnn)} kernels (attention by {', '.join(kernels)})", "0", not cudnn),
            row("the slowest first step of ten lengths", f"{slowest:.1f} × the median", "< 2", slowest < 2)]


def rates():
    """Bytes/s of a copy, read and written; FLOP/s of matrix products in 16 bits."""
    x = torch.randn(2**30, device=DEVICE)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=runtime().dtype) for _ in range(2))
    return bandwidth, 2 * 8192**3 / seconds(lambda: a @ b)


def decoding(folder):
    """5: tokens/s of sampling, next to reading the weights (2 bytes each) and the cache once per token."""
    bandwidth, _ = rates()
    machine = runtime()
    model = machine.place(random_model()).eval()
    weights = 2 * (sum(p.numel() for p in model.parameters()) - model.positions.weight.numel())
    result = []
    for rows, slots, share in ((64, 128, 0.6), (256, 128, 0.6), (64, 1024, 0.6)):
        new = 64
        prompts = bench_data.mixed_prompts(rows, slots - new, slots - new)
        uniforms = torch.rand(rows, new) * 0.999

        def work(new):
            with machine.sampling(model):
                generate(model, prompts, new, uniforms[:, :new])

        taken = (seconds(lambda: work(new), 3, 1) - seconds(lambda: work(1), 3, 1)) / (new - 1)
        with mock.patch.object(layers.PlacedGPT, "decode", GPT.decode):
            plain = (seconds(lambda: work(new), 1, 1) - seconds(lambda: work(1), 1, 1)) / (new - 1)
        cache = rows * slots * SHAPE["layers"] * 2 * SHAPE["width"] * 2
        limit = rows * bandwidth / (weights + cache)
        result.append(row(f"decoding, {rows} rows, {slots} slots", f"{rows / taken:,.0f} tokens/s ({rows / plain:,.0f} without graphs)",
                          f"≥ {share:.0%} of {limit:,.0f}", rows / taken >= share * limit))
    return result


def training(folder):
    """6: tokens/s of SFT at 1,024 tokens, next to the rate of matrix products."""
    _, rate = rates()
    per_token = 6 * sum(p.numel() for p in random_model().parameters()) + 6 * SHAPE["layers"] * SHAPE["width"] * 1024
    limit, result = rate / per_token, []
    pairs = rows_of_text(16, 1024)
    for name, how, share in (("eager", {}, 0.2), ("compiled", dict(compile=True), 0.35)):
        torch._dynamo.reset()
        machine = runtime(**how)
        learner = Learner(machine.place(random_model()), 1e-5, machine)
        config = sft.Config(pretrain_mix=1.0, init="scratch")
        taken = seconds(lambda: sft.train_step(learner, pairs, 0, 1e-5, config, END), 5, 3)
        speed = 16 * 1023 / taken
        result.append(row(f"SFT, 16 × 1,024 tokens, {name}", f"{speed:,.0f} tokens/s", f"≥ {share:.0%} of {limit:,.0f}",
                          speed >= share * limit))
    return result


def ppo_config(folder, layers=12, **changes):
    """Settings of a PPO run in a new folder, from random models."""
    names = [f"{name}{layers}" for name in ("sft", "reward")]
    for name, kind in zip(names, (GPT, ScalarModel)):
        if not (folder / f"{name}.pt").exists():
            files.save(folder / f"{name}.pt", dict(model=random_model(kind, layers=layers).state_dict(), config={},
                                                   model_config=SHAPE | dict(layers=layers),
                                                   tokenizer=bench_data.tokenizer().fingerprint))
    how = dict(data=str(folder / "data"), out=tempfile.mkdtemp(dir=folder), policy=str(folder / f"{names[0]}.pt"),
               reward=str(folder / f"{names[1]}.pt"), device=DEVICE, resume=False, lr=1e-5, value_lr=1e-5)
    return ppo.Config(**how | changes)


def ppo_speed(folder):
    """7: the default settings of ppo.py at 124M: episodes/s, waits for the GPU, the ratio before an update."""
    counts, log = [], common.run.Run.log

    def logged(run, step, **numbers):
        counts.append(len(caught))
        log(run, step, **numbers)

    times, lines = steps_of(ppo.main, ppo_config(folder, iterations=15))
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(common.run.Run, "log", logged):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        with quiet():
            ppo.main(ppo_config(folder, iterations=6))
        torch.cuda.set_sync_debug_mode("default")
    waits = statistics.median(b - a for a, b in zip(counts[2:], counts[3:]))
    speed = 64 / statistics.median(times[5:])
    ratio = abs(lines[0]["ratio"] - 1)  # a mean over four updates, the first of them at ratio 1
    return [row("PPO, default settings, 124M", f"{speed:.0f} episodes/s", "≥ 100", speed >= 100),
            row("waits for the GPU per iteration", f"{waits:.0f}", "≤ 60", waits <= 60),
            row("mean ratio in the first iteration", f"1 ± {ratio:.0e}", "1 ± 1e-2", ratio < 1e-2)]


def memory(folder):
    """8: the peak of PPO's memory next to plan.py's, with rows of equal length; and whether it grows."""
    if not (folder / "equal").exists():
        bench_data.write_dataset(folder / "equal", prompt_tokens=(64, 64), page_tokens=(111, 111))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, peaks, log = torch.cuda.memory_allocated(), [], common.run.Run.log

    def logged(run, step, **numbers):
        peaks.append(torch.cuda.max_memory_allocated() - before)
        log(run, step, **numbers)

    with mock.patch.object(common.run.Run, "log", logged), quiet():
        ppo.main(ppo_config(folder, iterations=20, data=str(folder / "equal")))
    sizes = plan.plan(GPTConfig(**SHAPE), batch=64, micro_batch=16, length=112)
    off = peaks[-1] / sizes["at most"]
    return [row("peak memory against plan.py's", f"{peaks[-1] / 2**30:.2f} GiB, {off:.0%}", "within 15%", abs(off - 1) < 0.15),
            row("peak memory from iteration 5 to 20", f"+{peaks[-1] / peaks[5] - 1:.1%}", "flat", peaks[-1] <= 1.01 * peaks[5])]


def command(script, config, launcher=(), **how):
    arguments = [argument for name, value in vars(config).items() for argument in flag(name, value)]
    return subprocess.Popen([sys.executable, *launcher, os.fspath(ROOT / script), *arguments], stdout=subprocess.PIPE,
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


def torchrun(folder):
    """9: one process under torchrun, sharded: saves, is stopped, resumes, ends; its numbers are those without sharding."""
    how = dict(layers=2, iterations=12, batch_size=16, minibatch_size=8, precision="float32")
    _, expected = steps_of(ppo.main, ppo_config(folder, **how))
    config = ppo_config(folder, **how, shard=True, resume=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    output = stop_in_the_middle(command("ppo.py", config, launcher), config, 4)
    stopped_at = len(log_of(config))
    process = command("ppo.py", config, launcher)
    output += process.communicate(timeout=200)[0]
    lines = log_of(config)
    off = max((abs(a[k] - b[k]) / max(1e-2, abs(b[k])) for a, b in zip(lines, expected) for k in ("score", "policy_loss", "kl")),
              default=math.inf)
    done = process.returncode == 0 and len(lines) == 12
    return [row("sharded PPO, stopped and resumed", f"stopped after {stopped_at}, {len(lines)} of 12, "
                f"exit status {process.returncode}", "12, 0", done and 4 <= stopped_at < 12) | dict(output=output[-2000:]),
            row("its numbers against those without sharding", f"{off:.1e}", "< 1e-3", off < 1e-3)]


def fp16(folder):
    """10: loss scaling skips few updates."""
    losses, learner = sft_losses(dict(precision="fp16"), rows_of_text(8, 256), 50)
    return [row("updates skipped in fp16", f"{learner.skipped} of 50, last loss {losses[-1]:.2f}", "< 3", learner.skipped < 3)]


def faults(folder):
    """11: --device cuda; stopped by SIGTERM and resumed, the final losses are those of an uninterrupted run."""
    how = dict(layers=2, iterations=12, batch_size=16, minibatch_size=8, device="cuda" if DEVICE.startswith("cuda") else DEVICE)
    _, expected = steps_of(ppo.main, ppo_config(folder, **how))
    config = ppo_config(folder, **how, resume=True)
    output = stop_in_the_middle(command("ppo.py", config), config, 4)
    stopped_at = len(log_of(config))
    process = command("ppo.py", config)
    output += process.communicate(timeout=200)[0]
    lines = log_of(config)
    off = max((abs(a["policy_loss"] - b["policy_loss"]) for a, b in zip(lines, expected)), default=math.inf)
    return [row("--device cuda, SIGTERM, resumed", f"stopped after {stopped_at}, {len(lines)} of 12, policy loss off by {off:.0e}",
                "< 1e-3", process.returncode == 0 and len(lines) == 12 and off < 1e-3) | dict(output=output[-2000:])]


def default_run(folder):
    """12: the default run, in its own folders."""
    began = time.perf_counter()
    stages, out, data = [], folder / "default", folder / "vale"
    environment = os.environ | {"TQDM_DISABLE": "1"}
    make = subprocess.Popen(["make", f"OUT={out}", f"DATA={data}", f"RUN={sys.executable}", "-o", ".venv/installed", "report"],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
    output = []
    for line in make.stdout:
        output.append(line)
        if sys.executable in line and ".py" in line:
            stages.append(f"{time.perf_counter() - began:.0f} s: {next(word for word in line.split() if word.endswith('.py'))}")
            print(stages[-1], file=sys.stderr, flush=True)
    make.wait()
    stages.append(f"{time.perf_counter() - began:.0f} s: done")
    taken = time.perf_counter() - began
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}
    wins = {name: next(iter(by.values()))[0] for name, by in report.get("preference", {}).items()}
    good = make.returncode == 0 and wins.get("PPO-ptx", 0) > 0.65
    return [row("the default run (make)", f"{taken:.0f} s; preferred to SFT: " +
                ", ".join(f"{name} {win:.1%}" for name, win in wins.items()), "PPO-ptx > 65%", good)
            | dict(output="".join(output)[-3000:], stages=stages)]


CHECKS = {check.__name__: check for check in (float32, sixteen_bits, compiled, attention, decoding, training, ppo_speed,
                                              memory, torchrun, fp16, faults, default_run)}


def main(names):
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise common.config.UserError(f"{unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    if not torch.cuda.is_available():
        raise common.config.UserError("PyTorch finds no Nvidia GPU here")
    properties = torch.cuda.get_device_properties(0)
    bandwidth, rate = rates()
    print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; PyTorch {torch.__version__}; copies {bandwidth / 1e12:.2f} "
          f"TB/s, matrix products {rate / 1e12:.0f} TFLOP/s\n\n| check | measured | limit | |\n|---|---|---|---|", flush=True)
    table, out = [], Path(os.environ.get("OUT", ROOT / "out"))
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench_data.write_dataset(Path(folder) / "data", page_tokens=(64, 256))
        for name in names or CHECKS:
            began = time.perf_counter()
            try:
                rows = CHECKS[name](Path(folder))
            except Exception as error:
                traceback.print_exc()
                rows = [row(name, f"{type(error).__name__}: {str(error)[:200]}", "", False)]
            torch.cuda.empty_cache()
            for line in rows:
                print(f"| {line['what']} | {line['measured']} | {line['limit']} | {'passed' if line['passed'] else 'FAILED'} |",
                      flush=True)
            table += [line | dict(check=name, seconds=time.perf_counter() - began) for line in rows]
            (out / "gpu.json").write_text(json.dumps(dict(device=properties.name, torch=torch.__version__, bandwidth=bandwidth,
                                                          rate=rate, table=table), indent=1))
    sys.exit(0 if all(line["passed"] for line in table) else 1)


DEVICE = "cuda:0"

if __name__ == "__main__":
    common.config.guard(lambda: main(sys.argv[1:]))
