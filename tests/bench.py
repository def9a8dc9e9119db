"""Speed and memory next to other projects (transformers, TRL, nanoGPT), and next to the limits of the machine.

    make bench                                        # everything, up to an hour on two cores
    make bench QUICK=1                                # every row once, smaller and without memory: at most five minutes
    .venv/bin/python tests/bench.py sft ppo           # only some parts: those of PARTS below
    .venv/bin/python tests/bench.py --path plain sampling  # without packed copies of the weights; packed: of all weights
    .venv/bin/python tests/bench.py --table FILE ...  # results of several machines as a Markdown table, one column each

All sides run in turn in one process, on the same weights, data, precision and threads, after a warm-up. What has to be equal is
compared before anything is timed. Times are medians; a ratio is the median of the ratios of neighboring runs, and above 1 where
this project is faster. Where a stage is measured, it is the stage's own main(), and TRL's own train(). Memory is the peak of a
fresh process for each side, minus what it held after its imports. A result goes to out/bench/<processor>.json, where rows that
were measured earlier on the same machine stay.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(ROOT))
if __name__ == "__main__":  # before the imports that read them
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
                   "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

import torch
import torch.nn.functional as F
from torch import nn

import common.config
import common.files
import common.onednn
import common.run
import ppo
import reward
import sft
from bench_data import VOCABULARY, mixed_prompts, tokenizer, write_dataset
from bench_results import Results, machine, print_table
from common import download
from common.gpt2 import parameter_names, write_policy, write_scalar_model
from common.learner import Learner
from common.runtime import Runtime, RuntimeConfig
from data import batches, readers
from data.tokenizer import END
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate

SIZES = PRESETS | {"4x128": PRESETS["laptop"] | dict(layers=4), "gpt2-cut": PRESETS["gpt2"] | dict(layers=2)}
LABELS = {"nano": "nano, 1.6M parameters", "laptop": "laptop", "4x128": "4 layers of width 128", "desktop": "4 layers of width 256",
          "gpt2": "124M", "gpt2-cut": "124M cut to 2 layers"}
NANOGPT = "https://raw.githubusercontent.com/karpathy/nanoGPT/3adf61e154c3fe3fca428ad6bc3818b27a3b8291/model.py"
NANOGPT_SHA256 = "7c01703240dbec5d554527dc666e35b3df8391d0b117fddc07afcf325a21d11c"


# ---------------------------------------------------------------- measuring

def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def race(sides, rounds):
    """Functions that return seconds per step -> the median of each, and the median over the rounds of the time of each but the
    first divided by the time of the first."""
    if rounds > 2:  # else the warm-up is the first step, which a stage's own loop leaves out
        for side in sides:
            side()
    times = [[side() for side in sides] for _ in range(rounds)]
    ratios = [statistics.median(row[i] / row[0] for row in times) for i in range(1, len(sides))]
    return [statistics.median(column) for column in zip(*times)], ratios


def measure_limits(results):
    """-> {precision: matrix products of PyTorch or of oneDNN, the faster, in FLOP/s}, bytes/s that copying reads and writes"""
    def median(work, n=7):
        work()
        return statistics.median(seconds(work) for _ in range(n))

    rates = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, 2048, 2048).to(dtype)
        products = {"PyTorch": lambda: a @ b}
        if precision == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            m = a.to_mkldnn()
            products["oneDNN"] = lambda: F.linear(m, b)
        found = {name: 2 * 2048**3 / median(product) for name, product in products.items()}
        rates[precision] = max(found.values())
        for name, rate in found.items():
            results.add(f"machine: matrix products, {precision}", name, "GFLOP/s", rate / 1e9)
    x = torch.randn(2**26)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / median(lambda: y.copy_(x))
    results.add("machine: copying, read and written", "PyTorch", "GB/s", bandwidth / 1e9)
    return rates, bandwidth


class Enough(Exception):
    pass


def steps_of(main, config, steps):
    """Mean seconds per step of a stage's own loop, without its set-up and first step."""
    times = []

    def log(run, step, **numbers):
        times.append(time.perf_counter())
        if len(times) > steps:
            raise Enough
    with mock.patch.object(common.run.Run, "log", log), contextlib.suppress(Enough), quiet():
        main(config)
    common.config.Interrupt.waiting = False
    return (times[-1] - times[0]) / (len(times) - 1)


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def peer_steps(make_trainer):
    """Mean seconds per step of the trainer that make_trainer(callbacks) makes, without its set-up and first step."""
    from transformers import TrainerCallback
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())
    with quiet():
        make_trainer([Clock()]).train()
    return (times[-1] - times[0]) / (len(times) - 1)


@contextlib.contextmanager
def product_path(name):
    """Inside, sampling uses weights as they are (plain) or copies of all in oneDNN's order (packed); None: copies of the large
    ones, which is the project's choice (common/onednn.py)."""
    large = {None: common.onednn.LARGE, "plain": 2**62, "packed": 1}[name]
    with mock.patch.object(common.onednn, "LARGE", large):
        yield


def apart(**task):
    """The result of child(**task) in a fresh process: memory that one row has freed would stay with this one."""
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(task)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{json.dumps(task)}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child(part, folder, how, path, rounds=None, side=None):
    """With `rounds`: check that the sides agree, then race them. With `side`: the bytes that its steps take at most, minus those
    held after the imports."""
    with product_path(path):
        sides, check, count, unit = SIDES[part](Path(folder), **how)
        if side is None:
            check()
            return dict(names=list(sides), count=count, unit=unit, race=race(list(sides.values()), rounds))
        before = process_memory("VmRSS")
        list(sides.values())[side]()
        return process_memory("VmHWM") - before


def process_memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


# ---------------------------------------------------------------- models and data

def shape(size, vocabulary=VOCABULARY):
    return GPTConfig(vocab_size=vocabulary, **SIZES[size])


@functools.cache
def weights(size, kind=GPT):
    torch.manual_seed(0)
    return kind(shape(size)).state_dict()


def model_of(size, kind=GPT):
    model = kind(shape(size))
    model.load_state_dict(weights(size, kind))
    return Runtime(RuntimeConfig(device="cpu")).place(model)


def sample(model, prompts, new, uniforms, temperature=1.0, precision="float32"):
    with Runtime(RuntimeConfig(device="cpu", precision=precision)).sampling(model):
        return generate(model, prompts, new, uniforms, temperature)


def peer_of(model, folder):
    """The same weights, in transformers' model."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    scalar = isinstance(model, ScalarModel)
    (write_scalar_model if scalar else write_policy)(folder / "exported", model)
    return (GPT2ForSequenceClassification if scalar else GPT2LMHeadModel).from_pretrained(folder / "exported")


def peer_tokenizer(folder, padding):
    from transformers import AutoTokenizer
    tokenizer().save_gpt2(folder / "exported", 1024, padding)
    return AutoTokenizer.from_pretrained(folder / "exported", **{} if padding else {"pad_token": END})


def write_checkpoint(path, size, kind=GPT):
    if not path.exists():
        common.files.save(path, dict(model=weights(size, kind), model_config=vars(shape(size)), tokenizer=tokenizer().fingerprint))
    return path


# ---------------------------------------------------------------- sampling and pretraining, in this process

def measure_sampling(results, bandwidth, size="gpt2", rounds=5):
    torch.manual_seed(0)
    small, large = GPT(GPTConfig(vocab_size=1280, **PRESETS["laptop"])), model_of(size)
    with tempfile.TemporaryDirectory() as folder:
        for model, label, prompts, new, aim in ((small, LABELS["laptop"], mixed_prompts(64, 16, 96, 1280), 40, "3×"),
                                                (large, LABELS[size], mixed_prompts(8, 16, 64), 64, "2×")):
            tokens = len(prompts) * new
            (ours, theirs), (ratio,) = race(sampling_sides(model, prompts, new, Path(folder)), rounds)
            results.add(f"sampling, {label}, {len(prompts)} prompts, {new} tokens", "transformers", "tokens/s", tokens / ours,
                        tokens / theirs, ratio, aim=aim)
    ours, limit = bf16_sampling(large, mixed_prompts(8, 16, 64), 64, bandwidth, rounds)
    results.add(f"sampling, {LABELS[size]}, 8 prompts, 64 tokens, bf16", "limit: reading the weights once per token", "tokens/s",
                ours, limit, ours / limit, limit=True, aim="50%")
    (ours, theirs), (ratio,) = race(sides_of_one_prompt(large), min(rounds, 3))
    results.add(f"9 samples of one prompt of 256 tokens, {LABELS[size]}", "9 calls", "samples/s", 9 / ours, 9 / theirs, ratio)


def sampling_sides(model, prompts, new, folder):
    model.eval()
    peer = peer_of(model, folder).eval()
    end, longest = model.config.end_of_text, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(0))

    def theirs(**how):
        with torch.no_grad():
            return peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=end, **how)[:, longest:]

    greedy = sample(model, prompts, new, uniforms, 0)
    assert all(row.tolist()[: len(said)] == said for row, said in zip(theirs(do_sample=False), greedy))
    return [lambda: seconds(lambda: sample(model, prompts, new, uniforms)),
            lambda: seconds(lambda: theirs(do_sample=True, top_k=0))]


def bf16_sampling(model, prompts, new, bandwidth, rounds):
    """-> tokens/s, and those of a machine that only reads the weights, once per token"""
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(0))

    def run():
        sample(model, prompts, new, uniforms, precision="bf16")
    run()
    taken = statistics.median(seconds(run) for _ in range(rounds))
    read = 2 * (sum(p.numel() for p in model.parameters()) - model.positions.weight.numel())  # the unembedding is read
    return len(prompts) * new / taken, len(prompts) * bandwidth / read


def sides_of_one_prompt(model):
    (prompt,) = mixed_prompts(1, 256, 256)
    uniforms, read = torch.rand(9, 16, generator=torch.Generator().manual_seed(0)), []
    hidden = model.hidden
    with mock.patch.object(model, "hidden", lambda tokens, *rest: read.append(tokens.shape) or hidden(tokens, *rest)):
        together = sample(model, [prompt] * 9, 16, uniforms)
    assert read[0] == (1, 256) and all(T == 1 for _, T in read[1:])
    assert together == [sample(model, [prompt], 16, uniforms[i : i + 1])[0] for i in range(9)]
    return [lambda: seconds(lambda: sample(model, [prompt] * 9, 16, uniforms)),
            lambda: seconds(lambda: [sample(model, [prompt], 16, uniforms[i : i + 1]) for i in range(9)])]


def measure_pretraining(results, rates, size="gpt2", batch=8, rounds=3):
    """rates: {precision: FLOP/s of matrix products}, the limit"""
    model = model_of(size)
    tokens = torch.randint(VOCABULARY - 1, (batch, 512), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens.shape[1] - 1).repeat(batch, 1)
    c = model.config
    # 6 FLOP per parameter and token, and attention's two products, of which the causal half is needed (Chowdhery et al. 2022, B).
    flops = tokens.numel() * (6 * (sum(p.numel() for p in model.parameters()) - c.context * c.width) +
                              6 * c.layers * c.width * tokens.shape[1])
    for precision, rate in rates.items():
        learner = Learner(model, 1e-5, Runtime(RuntimeConfig(device="cpu", precision=precision)))

        def step():
            learner.backward(-learner(tokens, positions).mean())
            learner.step(1e-5)
        step(), step()
        taken = statistics.median(seconds(step) for _ in range(rounds))
        results.add(f"pretraining step, {LABELS[size]}, {batch} × 512 tokens, {precision}", "limit: matrix products alone",
                    "tokens/s", tokens.numel() / taken, rate / flops * tokens.numel(), flops / taken / rate, limit=True, aim="70%")


# ---------------------------------------------------------------- stages: each function below makes the sides of a race
# -> {name: function that returns seconds per step}, ours first; check(), which asserts that the sides compute the same; and how
# many units of what a step handles

# What both sides do without: gradients' checkpoints, bf16, dropout, logs and saves.
PLAIN = dict(gradient_checkpointing=False, bf16=False, report_to="none", disable_tqdm=True, logging_strategy="no",
             save_strategy="no", use_cpu=True, dataloader_pin_memory=False, seed=0)


def sft_sides(folder, size, batch, steps=3, loss="chunked_nll"):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    data, policy = folder / "data", write_checkpoint(folder / "sft.pt", size)
    pairs = batches.load_demonstrations(data, "train", tokenizer(), shape(size).context)

    def ours():
        config = sft.Config(data=data, out=tempfile.mkdtemp(dir=folder), init=policy, dropout=0.0, pretrain_mix=0.0,
                            batch_size=batch, lr=1e-5)
        return steps_of(sft.main, config, steps)

    def theirs():
        dataset = Dataset.from_list([dict(input_ids=p + r, completion_mask=[0] * len(p) + [1] * len(r)) for p, r in pairs])
        config = SFTConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=batch, max_steps=steps + 1,
                           max_length=None, completion_only_loss=True, loss_type=loss, learning_rate=1e-5, **PLAIN)
        return peer_steps(lambda callbacks: SFTTrainer(
            peer_of(model_of(size), folder), config, train_dataset=dataset, processing_class=peer_tokenizer(folder, False),
            callbacks=callbacks))

    def check():
        batch = readers.make_batch(pairs[:4], shape(size).end_of_text)
        loss = sft.masked_loss(model_of(size).eval()(batch.tokens, batch.positions), batch.mask)
        labels = torch.full_like(batch.tokens, -100)
        for row, (context, target) in enumerate(pairs[:4]):
            labels[row, len(context) : len(context) + len(target)] = torch.tensor(target)
        peer = peer_of(model_of(size), folder).eval()
        torch.testing.assert_close(loss / batch.mask.sum(), peer(batch.tokens, labels=labels).loss, rtol=1e-4, atol=0)

    name = "TRL's SFTTrainer" + (" with transformers' own loss" if loss == "nll" else "")
    return {"ours": ours, name: theirs}, check, sum(len(r) for _, r in pairs) / len(pairs) * batch, "tokens that count/s"


def reward_sides(folder, size, batch, steps=2):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    data, policy = folder / "data", write_checkpoint(folder / "sft.pt", size)
    comparisons = batches.load_comparisons(data, "train", tokenizer(), shape(size).context)

    def pairs(episodes, order):
        rows = [p + r for p, r in episodes]
        return [dict(chosen_ids=rows[i], rejected_ids=rows[j]) for i in range(9) for j in range(9) if order[i] < order[j]]

    def ours():
        config = reward.Config(data=data, out=tempfile.mkdtemp(dir=folder), init=policy, batch_size=batch, lr=1e-5)
        return steps_of(reward.main, config, steps)

    def theirs():
        rows = [pair for episodes, order, _ in comparisons[: batch * (steps + 1)] for pair in pairs(episodes, order)]
        config = RewardConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=36 * batch,
                              max_steps=steps + 1, max_length=None, learning_rate=1e-5, **PLAIN)
        return peer_steps(lambda callbacks: RewardTrainer(
            peer_of(model_of(size, ScalarModel), folder), config, train_dataset=Dataset.from_list(rows),
            processing_class=peer_tokenizer(folder, True), callbacks=callbacks))

    def check():
        model, (episodes, order, _) = model_of(size, ScalarModel).eval(), comparisons[0]
        peer = peer_of(model, folder).eval()
        scores = readers.last_scores(model, episodes, shape(size).end_of_text, "cpu")
        theirs = torch.cat([peer(torch.tensor([p + r])).logits[0] for p, r in episodes])
        torch.testing.assert_close(scores, theirs, rtol=1e-3, atol=1e-4)
        margins = torch.stack([theirs[i] - theirs[j] for i in range(9) for j in range(9) if order[i] < order[j]])
        torch.testing.assert_close(reward.ranking_loss(scores, order)[0], -F.logsigmoid(margins).mean(), rtol=1e-3, atol=1e-4)

    return {"ours": ours, "TRL's RewardTrainer, 36 pairs per ranking": theirs}, check, batch, "rankings/s"


def ppo_sides(folder, size, batch, new=48, steps=2):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    data, policy = folder / "data", write_checkpoint(folder / "sft.pt", size)
    reward_model = write_checkpoint(folder / "reward.pt", size, ScalarModel)
    prompts = [tokenizer().encode(r["prompt"]) for r in readers.read_jsonl(data / "prompts.train.jsonl", "prompts")]

    def ours():
        config = ppo.Config(data=data, out=tempfile.mkdtemp(dir=folder), policy=policy, reward=reward_model, iterations=steps + 1,
                            batch_size=batch, minibatch_size=batch // 2, max_new_tokens=new, ptx_coef=0.0, lr=1e-6, value_lr=1e-6)
        return steps_of(ppo.main, config, steps)

    def theirs():
        config = PPOConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=batch, num_mini_batches=2,
                           num_ppo_epochs=1, total_episodes=(steps + 1) * batch, response_length=new, temperature=1.0,
                           stop_token="eos", num_sample_generations=0, learning_rate=1e-6,
                           local_rollout_forward_batch_size=batch, **PLAIN)
        policy = peer_of(model_of(size), folder)
        reward_model, value_model = (peer_of(model_of(size, ScalarModel), folder) for _ in range(2))
        pad = peer_tokenizer(folder, True)
        pad.padding_side = "left"
        policy.resize_token_embeddings(VOCABULARY + 1)  # for the padding
        return peer_steps(lambda callbacks: PPOTrainer(
            config, pad, policy, None, reward_model, Dataset.from_dict({"input_ids": prompts}), value_model,
            eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}), callbacks=callbacks))

    def check():
        model = model_of(size).eval()
        peer = peer_of(model, folder).eval()
        tokens = torch.tensor([prompts[0]])
        theirs = peer(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)  # (1, T - 1)
        positions = torch.arange(tokens.shape[1] - 1)[None]
        torch.testing.assert_close(model(tokens, positions), theirs, rtol=1e-4, atol=1e-4)

    return {"ours": ours, "TRL's PPOTrainer": theirs}, check, batch, "episodes/s"


# ---------------------------------------------------------------- nanoGPT

def find_nanogpt(given):
    """-> the path of nanoGPT's model.py: the one given, or one that is downloaded once"""
    if given is None:
        return download.fetch(NANOGPT, download.cache() / "nanogpt" / "model.py", NANOGPT_SHA256, patience=2)
    if common.files.digest(given) != NANOGPT_SHA256:
        print(f"note: {given} is not the model.py of {NANOGPT}")
    return given


def nanogpt_model(file, model):
    """nanoGPT's GPT with the weights of ours."""
    spec = importlib.util.spec_from_file_location("nanogpt", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = model.config
    with quiet():
        theirs = module.GPT(module.GPTConfig(block_size=c.context, vocab_size=c.vocab_size, n_layer=c.layers, n_head=c.heads,
                                             n_embd=c.width, dropout=0.0, bias=True))
    ours, names = model.state_dict(), parameter_names(c.layers)
    theirs.load_state_dict({f"transformer.{names[name]}": w for name, w in ours.items()} | {"lm_head.weight": ours["tokens.weight"]})
    return theirs


def nanogpt_sides(folder, file, size, vocabulary, batch, length, steps=1, lr=1e-4):
    """A pretraining step: forward, backward, clipping, Adam. The sides are this project, nanoGPT's model, and plain PyTorch, which
    is model.GPT as it is: F.linear, and the logits in one piece. nanoGPT has the exact GELU, which is faster than the tanh of GPT-2,
    so it also runs with the latter: then all compute the same. All use the Adam of this project (fused, no weight decay): the one
    of nanoGPT's configure_optimizers is not fused on a CPU. All keep freed memory (Runtime), which nanoGPT by itself does not."""
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    targets = F.pad(tokens[:, 1:], (0, 1), value=-1).flatten()  # the last token of a row has no target
    runtime = Runtime(RuntimeConfig(device="cpu", precision="float32"))

    def new_model():
        torch.manual_seed(0)
        return GPT(shape(size, vocabulary))

    @functools.cache
    def ours():
        learner, positions = Learner(runtime.place(new_model()), lr, runtime), torch.arange(length - 1).repeat(batch, 1)

        def step():
            loss = -learner(tokens, positions).mean()
            learner.backward(loss)
            learner.step(lr)
            return loss
        return step

    @functools.cache
    def nanogpt(gelu="none"):
        model = nanogpt_model(file, new_model())
        for block in model.transformer.h:
            block.mlp.gelu = nn.GELU(approximate=gelu)
        return plain_step(model, lambda: model(tokens, targets)[1], lr)

    @functools.cache
    def plain():
        model = new_model()
        return plain_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets, ignore_index=-1), lr)

    makers = {"ours": ours, "nanoGPT's model": nanogpt, "nanoGPT's model with GPT-2's GELU": lambda: nanogpt("tanh"),
              "plain PyTorch, logits in one piece": plain}

    def check():
        for _ in range(2):  # the second loss also depends on the gradients and on Adam
            losses = [make()() for make in makers.values()]
            for loss, tolerance in zip(losses[1:], (1e-3, 1e-5, 1e-5)):  # the exact GELU is close to the other
                torch.testing.assert_close(loss, losses[0], rtol=tolerance, atol=0)

    def timed(make):
        return lambda: seconds(lambda: [make()() for _ in range(steps)]) / steps
    return {name: timed(make) for name, make in makers.items()}, check, batch * length, "tokens/s"


def plain_step(model, compute_loss, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)

    def step():
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step


# ---------------------------------------------------------------- all parts

SIDES = {"nanogpt": nanogpt_sides, "sft": sft_sides, "reward": reward_sides, "ppo": ppo_sides}
NANOGPT_STEP = "pretraining step, {batch} × {length} tokens, vocabulary {vocabulary:,}"
RACES = [  # part, arguments of its sides, what it is, aim
    ("nanogpt", dict(size="laptop", vocabulary=1280, batch=16, length=128, rounds=15, steps=5), NANOGPT_STEP, "1×"),
    ("nanogpt", dict(size="4x128", vocabulary=1280, batch=16, length=256, rounds=15, steps=3), NANOGPT_STEP, "1×"),
    ("nanogpt", dict(size="desktop", vocabulary=1280, batch=16, length=256, rounds=9, steps=2), NANOGPT_STEP, "1×"),
    ("nanogpt", dict(size="gpt2", vocabulary=VOCABULARY, batch=4, length=512, rounds=5, steps=1), NANOGPT_STEP, "1×"),
    ("sft", dict(size="laptop", rounds=3, batch=16), "SFT step, {batch} padded demonstrations", "1.5×, half the memory"),
    ("sft", dict(size="laptop", rounds=3, batch=16, loss="nll"), "SFT step, {batch} padded demonstrations", "1.5×, half the memory"),
    ("sft", dict(size="gpt2", rounds=2, batch=16, steps=1), "SFT step, {batch} padded demonstrations", "1.5×, half the memory"),
    ("sft", dict(size="gpt2", rounds=2, batch=16, steps=1, loss="nll"), "SFT step, {batch} padded demonstrations", "1.5×, half the memory"),
    ("reward", dict(size="laptop", rounds=3, batch=4), "reward step, {batch} rankings of K = 9", "4×"),
    ("reward", dict(size="gpt2", rounds=2, batch=1, steps=1), "reward step, {batch} ranking of K = 9", "4×"),
    ("ppo", dict(size="laptop", rounds=3, batch=32, new=48), "PPO iteration, {batch} episodes of {new} tokens", "3×, half the memory"),
    ("ppo", dict(size="gpt2", rounds=2, batch=16, new=48, steps=1), "PPO iteration, {batch} episodes of {new} tokens",
     "3×, half the memory"),
]
GROWTH = [("ppo", dict(size="laptop", batch=32, new=48) | change) for change in (
    {}, dict(batch=64), dict(batch=128), dict(batch=256), dict(new=96), dict(new=160), dict(size="nano"),
    dict(size="gpt2", steps=1, batch=16))] + [("reward", dict(size="laptop", batch=4, K=K)) for K in (2, 4, 9, 18)]


def smaller(how):
    """Arguments of a race, for --quick."""
    how = how | dict(rounds=1, steps=1)
    if how["size"] == "gpt2":
        limits = dict(batch=2, length=256, new=16)
        how |= {key: min(how[key], limit) for key, limit in limits.items() if key in how} | dict(size="gpt2-cut")
    return how


def measure_race(results, part, how, what, aim):
    quick, path = results.machine["quick"], results.machine["path"]
    how = smaller(how) if quick else dict(how)
    rounds = how.pop("rounds")
    with tempfile.TemporaryDirectory() as folder:
        if part != "nanogpt":
            write_dataset(Path(folder) / "data")
        measure = child if quick else apart  # a new process takes ten seconds to import the peers
        done = measure(part=part, folder=folder, how=how, path=path, rounds=rounds)
        if part == "nanogpt":
            how["steps"] = 2  # in the second, Adam has its averages
        sides = [] if quick else range(len(done["names"]))
        memory = [apart(part=part, folder=folder, how=how, path=path, side=i) for i in sides]
    times, ratios = done["race"]
    for i in range(1, len(times)):
        results.add(f"{what.format(**how)}, {LABELS[how['size']]}", done["names"][i], done["unit"], done["count"] / times[0],
                    done["count"] / times[i], ratios[i - 1], aim=aim, memory=memory and [memory[0], memory[i]])


def measure_growth(results, part, how):
    """How cost grows with the batch, the length of the responses, K, and the size of the model."""
    quick, path = results.machine["quick"], results.machine["path"]
    how = dict(how)
    K = how.pop("K", 9)
    if quick:
        how = smaller(how | dict(batch=max(2, how["batch"] // 4)))
        how.pop("rounds")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "data", K=K)
        sides, _, count, _ = SIDES[part](Path(folder), **how)
        if not quick:
            sides["ours"]()
        what = f"PPO iteration, {count} episodes of {how['new']} tokens" if part == "ppo" else f"reward step, {count} rankings of K = {K}"
        taken = sides["ours"]()
        memory = [] if quick else [apart(part=part, folder=folder, how=how, path=path, side=0)]
        results.add(f"growth: {what}, {LABELS[how['size']]}", "", "s", taken, memory=memory)


PARTS = ("nanogpt", "sampling", "sft", "reward", "ppo", "pretraining", "growth")


def arguments():
    parser = argparse.ArgumentParser(description="Speed and memory next to other projects and the machine's limits.")
    parser.add_argument("parts", nargs="*", help=f"what to measure: {' '.join(PARTS)}; default: everything")
    parser.add_argument("--quick", action="store_true", help="every row once, smaller and without memory")
    parser.add_argument("--path", choices=("plain", "packed"), help="force these weights for sampling; default: the project's choice")
    parser.add_argument("--nanogpt", type=Path, metavar="FILE", help="nanoGPT's model.py; default: download it")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print these results as a Markdown table, and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        print(f"bench.py has no part {' '.join(unknown)}: its parts are {' '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    return args


def print_machine(here):
    print(f"{here['cpu']} ({' '.join(here['flags'])}), {here['cores']} cores, {here['threads']} threads, load {here['load']}; " +
          ", ".join(f"{package} {here[package]}" for package in ("torch", "transformers", "trl")))
    if here["load"] > 0.5 * here["cores"]:
        print(f"warning: the load at the start is {here['load']} on {here['cores']} cores: other work will distort the numbers")
    print()


def main(args):
    parts, here = args.parts or PARTS, machine() | dict(path=args.path, quick=args.quick)
    print_machine(here)
    results = Results(here, ROOT / "out/bench")
    rates, bandwidth = measure_limits(results)
    nanogpt = {}
    if "nanogpt" in parts:
        try:
            nanogpt = dict(file=os.fspath(find_nanogpt(args.nanogpt)))
        except common.config.UserError as error:
            print(f"nanogpt is left out: give its model.py by --nanogpt FILE ({error})")
            parts = [part for part in parts if part != "nanogpt"]
    if "sampling" in parts:
        measure_sampling(results, bandwidth, **dict(size="gpt2-cut", rounds=1) if args.quick else {})
    for part, how, what, aim in RACES:
        if part in parts:
            measure_race(results, part, how | (nanogpt if part == "nanogpt" else {}), what, aim)
    if "pretraining" in parts:
        measure_pretraining(results, rates, **dict(size="gpt2-cut", batch=2, rounds=1) if args.quick else {})
    if "growth" in parts:
        for part, how in GROWTH:
            measure_growth(results, part, how)
    print(f"\nwritten to {results.path.relative_to(ROOT)}")


if __name__ == "__main__":
    args = arguments()
    if args.table:
        print_table(args.table)
    elif args.child:
        print(json.dumps(child(**json.loads(args.child))))
    else:
        with product_path(args.path):
            main(args)
