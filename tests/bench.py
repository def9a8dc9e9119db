"""Speed and memory beside the peers, transformers and TRL, and beside the machine's own limit.

    make bench                                      # all of it, half an hour on two cores
    .venv/bin/python tests/bench.py sft ppo         # some of: sampling sft reward ppo pretraining growth

Ours and theirs run in turn in one process, on the same weights, data, precision and threads, after a warm-up. What has to be
equal is compared before anything is timed. Medians; a ratio is the median of the ratios of neighbouring runs. Where a
stage is measured, it is the stage's own main(), and TRL's own train(). Peak memory is that of a fresh process each, less what
it held after its imports.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore")

import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

import common.config
import common.files
import common.run
import ppo
import reward
import sft
from common.gpt2 import write_policy, write_scalar_model
from common.learner import Learner
from common.runtime import Runtime, RuntimeConfig
from data import batches, readers
from data.tokenizer import END, Tokenizer
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate

disable_progress_bar()
logging.disable(logging.WARNING)
VOCABULARY = 50257


# ---------------------------------------------------------------- measuring

def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def race(ours, theirs, rounds):
    """ours and theirs return seconds a step -> the median of each, and of the ratios theirs / ours, round by round."""
    for side in (ours, theirs) if rounds > 2 else ():  # a stage leaves its own first step out; at 124M that has to do
        side()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), statistics.median(
        b / a for a, b in pairs)


def limits():
    """-> {precision: matrix products, in FLOP/s} as PyTorch has them, the same by oneDNN if that is faster, and memory's bytes/s,
    read and written."""
    def best(work, n=7):
        work()
        return statistics.median(seconds(work) for _ in range(n))

    plain, rates = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 2048, 2048).to(dtype)
        m = a.to_mkldnn()
        plain[dtype] = 2 * 2048**3 / best(lambda: a @ b)
        rates[dtype] = max(plain[dtype], 2 * 2048**3 / best(lambda: F.linear(m, b)))
    x = torch.randn(2**26)
    y = torch.empty_like(x)
    return plain, rates, 2 * x.nbytes / best(lambda: y.copy_(x))


class Enough(Exception):
    pass


def steps_of(main, config, steps):
    """Mean seconds a step of a stage's own loop, without its set-up and first step."""
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


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    @property
    def mean(self):
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def apart(what, *arguments, **shape):
    """What `--WHAT` of this script prints last, in a process of its own: memory that one row has freed is kept by its process."""
    command = [sys.executable, __file__, f"--{what}", *map(str, arguments), json.dumps(shape)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(row, side, folder, **shape):
    """Bytes that the same steps of one side take at most, above what its process's imports took."""
    return apart("peak", row, side, folder, **shape)


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


# ---------------------------------------------------------------- models and data

def shape(size):
    return GPTConfig(vocab_size=VOCABULARY, **PRESETS[size])


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


def peer_of(model, kind, folder):
    """The same weights, in transformers' model."""
    write = write_scalar_model if isinstance(model, ScalarModel) else write_policy
    write(folder / "exported", model)
    return kind.from_pretrained(folder / "exported")


@functools.cache
def tokenizer():
    """As many tokens as GPT-2's, which would have to be downloaded. A space and two letters are one."""
    letters = [bytes([a]) for a in b"abcdefghijklmnopqrstuvwxyz"]
    tokens = [bytes([i]) for i in range(256)] + [b" " + a for a in letters] + [b" " + a + b for a in letters for b in letters]
    high = [bytes([i]) for i in range(128, 256)]
    tokens += [a + b for a in high for b in high] + [a + b + c for a in high[:3] for b in high for c in high]
    return Tokenizer("bench", tokens[: VOCABULARY - 1])


def peer_tokenizer(folder, padding):
    tokenizer().save_gpt2(folder / "exported", 1024, padding)
    return AutoTokenizer.from_pretrained(folder / "exported", **{} if padding else {"pad_token": END})


def text(tokens, rng):
    return "".join(" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=2)) for _ in range(tokens))


def write_dataset(folder, rows=256, K=9):
    """Prompts of 16 to 64 tokens, responses of 8 to 192, those that are ranked of 8 to 64."""
    rng, one = random.Random(0), dict(labeler="a", user="b", use_case="c")
    folder.mkdir()
    tokenizer().save(folder)
    prompts = [text(rng.randint(16, 64), rng) for _ in range(rows)]
    readers.write_jsonl(folder / "prompts.train.jsonl", [{"prompt": p, **one} for p in prompts])
    for split in ("train", "valid"):
        readers.write_jsonl(folder / f"demonstrations.{split}.jsonl", [
            {"prompt": p, "response": text(rng.randint(8, 192), rng), **one} for p in prompts])
        readers.write_jsonl(folder / f"comparisons.{split}.jsonl", [
            {"prompt": p, "responses": [text(rng.randint(8, 64), rng) for _ in range(K)],
             "ranks": rng.sample(range(1, K + 1), K), **one} for p in prompts[:96]])
    return folder


def mixed_prompts(count, shortest, longest, vocabulary=VOCABULARY):
    rng = random.Random(0)
    return [[rng.randrange(vocabulary - 1) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


# ---------------------------------------------------------------- the rows

def sampling(model, prompts, new, folder):
    model.eval()
    peer = peer_of(model, GPT2LMHeadModel, folder).eval()
    end, longest = model.config.end_of_text, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(0))

    def theirs(**how):
        with torch.no_grad():
            return peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=end, **how)[:, longest:]

    greedy = sample(model, prompts, new, uniforms, 0)
    assert all(row.tolist()[: len(said)] == said for row, said in zip(theirs(do_sample=False), greedy))
    a, b, ratio = race(lambda: seconds(lambda: sample(model, prompts, new, uniforms)),
                       lambda: seconds(lambda: theirs(do_sample=True, top_k=0)), 5)
    tokens = len(prompts) * new
    return f"{tokens / a:,.0f} tokens/s", f"{tokens / b:,.0f} tokens/s", f"{ratio:.1f}×"


def sampling_bf16(folder, bandwidth):
    model = model_of("gpt2").eval()
    prompts, new = mixed_prompts(8, 16, 64), 64
    uniforms = torch.rand(8, new, generator=torch.Generator().manual_seed(0))

    def run():
        sample(model, prompts, new, uniforms, precision="bf16")
    run()
    taken = statistics.median(seconds(run) for _ in range(5))
    read = 2 * (sum(p.numel() for p in model.parameters()) - model.positions.weight.numel())  # the unembedding is read
    return f"{8 * new / taken:,.0f} tokens/s", f"{8 * new / (new * read / bandwidth):,.0f} tokens/s", \
        f"{new * read / bandwidth / taken:.0%}"


def samples_of_one_prompt(folder):
    model = model_of("gpt2").eval()
    (prompt,) = mixed_prompts(1, 256, 256)
    uniforms, read = torch.rand(9, 16, generator=torch.Generator().manual_seed(0)), []
    hidden = model.hidden
    with mock.patch.object(model, "hidden", lambda tokens, *rest: read.append(tokens.shape) or hidden(tokens, *rest)):
        together = sample(model, [prompt] * 9, 16, uniforms)
    assert read[0] == (1, 256) and all(T == 1 for _, T in read[1:])
    assert together == [sample(model, [prompt], 16, uniforms[i : i + 1])[0] for i in range(9)]
    a, b, ratio = race(lambda: seconds(lambda: sample(model, [prompt] * 9, 16, uniforms)),
                       lambda: seconds(lambda: [sample(model, [prompt], 16, uniforms[i : i + 1]) for i in range(9)]), 3)
    return f"{9 / a:.2f} samples/s", f"{9 / b:.2f} samples/s", f"{ratio:.1f}×"


def sft_sides(folder, size, steps=3, batch=16, loss="chunked_nll"):
    data = folder / "data"
    if not (folder / "sft.pt").exists():
        common.files.save(folder / "sft.pt", checkpoint(size))
    pairs = batches.load_demonstrations(data, "train", tokenizer(), shape(size).context)

    def ours():
        config = sft.Config(data=data, out=tempfile.mkdtemp(dir=folder), init=folder / "sft.pt", dropout=0.0, pretrain_mix=0.0,
                            batch_size=batch, lr=1e-5)
        return steps_of(sft.main, config, steps)

    def theirs():
        dataset = Dataset.from_list([dict(input_ids=p + r, completion_mask=[0] * len(p) + [1] * len(r)) for p, r in pairs])
        config = SFTConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=batch, max_steps=steps + 1,
                           max_length=None, completion_only_loss=True, loss_type=loss, learning_rate=1e-5, **PLAIN)
        clock = Clock()
        with quiet():
            SFTTrainer(peer_of(model_of(size), GPT2LMHeadModel, folder), config, train_dataset=dataset,
                       processing_class=peer_tokenizer(folder, False), callbacks=[clock]).train()
        return clock.mean

    def check():
        batch = readers.make_batch(pairs[:4], shape(size).end_of_text)
        loss = sft.masked_loss(model_of(size).eval()(batch.tokens, batch.positions), batch.mask)
        labels = torch.full_like(batch.tokens, -100)
        for row, (context, target) in enumerate(pairs[:4]):
            labels[row, len(context) : len(context) + len(target)] = torch.tensor(target)
        peer = peer_of(model_of(size), GPT2LMHeadModel, folder).eval()
        torch.testing.assert_close(loss / batch.mask.sum(), peer(batch.tokens, labels=labels).loss, rtol=1e-4, atol=0)

    return ours, theirs, check, sum(len(r) for _, r in pairs) / len(pairs) * batch, "tokens that count/s"


# What both sides do without: gradients' checkpoints, bf16, dropout, logs and saves.
PLAIN = dict(gradient_checkpointing=False, bf16=False, report_to="none", disable_tqdm=True, logging_strategy="no",
             save_strategy="no", use_cpu=True, dataloader_pin_memory=False, seed=0)


def checkpoint(size, kind=GPT):
    return dict(model=weights(size, kind), model_config=vars(shape(size)), tokenizer=tokenizer().fingerprint)


def reward_sides(folder, size, steps=2, batch=4):
    data = folder / "data"
    if not (folder / "sft.pt").exists():
        common.files.save(folder / "sft.pt", checkpoint(size))
    comparisons = batches.load_comparisons(data, "train", tokenizer(), shape(size).context)

    def pairs(episodes, order):
        rows = [p + r for p, r in episodes]
        return [dict(chosen_ids=rows[i], rejected_ids=rows[j]) for i in range(9) for j in range(9) if order[i] < order[j]]

    def ours():
        config = reward.Config(data=data, out=tempfile.mkdtemp(dir=folder), init=folder / "sft.pt", batch_size=batch, lr=1e-5)
        return steps_of(reward.main, config, steps)

    def theirs():
        rows = [pair for episodes, order, _ in comparisons[: batch * (steps + 1)] for pair in pairs(episodes, order)]
        config = RewardConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=36 * batch,
                              max_steps=steps + 1, max_length=None, learning_rate=1e-5, **PLAIN)
        clock = Clock()
        with quiet():
            RewardTrainer(peer_of(model_of(size, ScalarModel), GPT2ForSequenceClassification, folder), config,
                          train_dataset=Dataset.from_list(rows), processing_class=peer_tokenizer(folder, True),
                          callbacks=[clock]).train()
        return clock.mean

    def check():
        model, (episodes, order, _) = model_of(size, ScalarModel).eval(), comparisons[0]
        peer = peer_of(model, GPT2ForSequenceClassification, folder).eval()
        scores = readers.last_scores(model, episodes, shape(size).end_of_text, "cpu")
        theirs = torch.cat([peer(torch.tensor([p + r])).logits[0] for p, r in episodes])
        torch.testing.assert_close(scores, theirs, rtol=1e-3, atol=1e-4)
        margins = torch.stack([theirs[i] - theirs[j] for i in range(9) for j in range(9) if order[i] < order[j]])
        torch.testing.assert_close(reward.ranking_loss(scores, order)[0], -F.logsigmoid(margins).mean(), rtol=1e-3, atol=1e-4)

    return ours, theirs, check, batch, "rankings/s"


def ppo_sides(folder, size, steps=2, batch=32, new=48):
    data = folder / "data"
    for name, kind in (("sft", GPT), ("reward", ScalarModel)):
        if not (folder / f"{name}.pt").exists():
            common.files.save(folder / f"{name}.pt", checkpoint(size, kind))
    prompts = [tokenizer().encode(r["prompt"]) for r in readers.read_jsonl(data / "prompts.train.jsonl", "prompts")]

    def ours():
        config = ppo.Config(data=data, out=tempfile.mkdtemp(dir=folder), policy=folder / "sft.pt", reward=folder / "reward.pt",
                            iterations=steps + 1, batch_size=batch, minibatch_size=batch // 2, max_new_tokens=new, ptx_coef=0.0,
                            lr=1e-6, value_lr=1e-6)
        return steps_of(ppo.main, config, steps)

    def theirs():
        config = PPOConfig(output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=batch, num_mini_batches=2,
                           num_ppo_epochs=1, total_episodes=(steps + 1) * batch, response_length=new, temperature=1.0,
                           stop_token="eos", num_sample_generations=0, learning_rate=1e-6,
                           local_rollout_forward_batch_size=batch, **PLAIN)
        policy, clock = peer_of(model_of(size), GPT2LMHeadModel, folder), Clock()
        scalar = lambda: peer_of(model_of(size, ScalarModel), GPT2ForSequenceClassification, folder)
        pad = peer_tokenizer(folder, True)
        pad.padding_side = "left"
        policy.resize_token_embeddings(VOCABULARY + 1)  # for the padding
        trainer = PPOTrainer(config, pad, policy, None, scalar(), Dataset.from_dict({"input_ids": prompts}), scalar(),
                             eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}), callbacks=[clock])
        with quiet():
            trainer.train()
        return clock.mean

    def check():
        model = model_of(size).eval()
        peer = peer_of(model, GPT2LMHeadModel, folder).eval()
        tokens = torch.tensor([prompts[0]])
        theirs = peer(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)  # (1, T - 1)
        positions = torch.arange(tokens.shape[1] - 1)[None]
        torch.testing.assert_close(model(tokens, positions), theirs, rtol=1e-4, atol=1e-4)

    return ours, theirs, check, batch, "episodes/s"


def pretraining(rates, folder):
    model = model_of("gpt2")
    tokens = torch.randint(VOCABULARY - 1, (8, 512), generator=torch.Generator().manual_seed(0))
    learners = {dtype: Learner(model, 1e-5, Runtime(RuntimeConfig(device="cpu", precision=name)))
                for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16"))}
    positions = torch.arange(tokens.shape[1] - 1).repeat(len(tokens), 1)
    c = model.config
    # 6 FLOP a parameter and token, and attention's two products, of which the causal half is needed (Chowdhery et al. 2022, B).
    flops = tokens.numel() * (6 * (sum(p.numel() for p in model.parameters()) - c.context * c.width) +
                              6 * c.layers * c.width * tokens.shape[1])
    result = {}
    for dtype, rate in rates.items():
        def step():
            learner = learners[dtype]
            learner.backward(-learner(tokens, positions).mean())
            learner.step(1e-5)
        step(), step()
        taken = statistics.median(seconds(step) for _ in range(3))
        result[dtype] = tokens.numel() / taken, rate / flops * tokens.numel(), flops / taken / rate
    return result


SIDES = {"sft": sft_sides, "reward": reward_sides, "ppo": ppo_sides}
ROWS = [  # kind of row, its shape, what it is, against what, at least
    ("sft", dict(size="laptop"), "SFT step, 16 padded demonstrations", "TRL's SFTTrainer", "1.5×, half the memory"),
    ("sft", dict(size="laptop", loss="nll"), "the same", "with transformers' own loss", "1.5×, half the memory"),
    ("sft", dict(size="gpt2", steps=1), "the same, 124M", "TRL's SFTTrainer", "1.5×, half the memory"),
    ("sft", dict(size="gpt2", steps=1, loss="nll"), "the same, 124M", "with transformers' own loss", "1.5×, half the memory"),
    ("reward", dict(size="laptop"), "reward step, 4 rankings of K = 9", "TRL's RewardTrainer, 36 pairs a ranking", "4×"),
    ("reward", dict(size="gpt2", steps=1, batch=1), "the same, 124M, 1 ranking", "TRL's RewardTrainer", "4×"),
    ("ppo", dict(size="laptop"), "PPO iteration, 32 episodes of 48 tokens", "TRL's PPOTrainer", "3×, half the memory"),
    ("ppo", dict(size="gpt2", steps=1, batch=16), "the same, 124M, 16 episodes", "TRL's PPOTrainer", "3×, half the memory"),
]
GROWTH = [("ppo", dict(size="laptop", batch=32, new=48) | change) for change in (
    {}, dict(batch=64), dict(batch=128), dict(batch=256), dict(new=96), dict(new=160), dict(size="nano"),
    dict(size="gpt2", steps=1, batch=16))] + [("reward", dict(size="laptop", K=K)) for K in (2, 4, 9, 18)]


def gib(size):
    return f"{size / 2**30:.2f} GiB"


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main(wanted):
    plain, rates, bandwidth = limits()
    show = lambda rates: f"{rates[torch.float32] / 1e9:.0f} GFLOP/s in float32 and {rates[torch.bfloat16] / 1e9:.0f} in bf16"
    print(f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
          f"{transformers.__version__}, trl {trl.__version__}\nmatrix products: {show(plain)} as PyTorch has them, {show(rates)} "
          f"at best; copying {bandwidth / 1e9:.0f} GB/s, read and written\n")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if set(wanted) - {"growth"}:
            row("what", "against", "ours", "theirs", "ratio", "at least", "our memory", "theirs")
            row(*["---"] * 8)
        if "sampling" in wanted:
            torch.manual_seed(0)
            small, large = GPT(GPTConfig(vocab_size=1280, **PRESETS["laptop"])), model_of("gpt2")
            row("sampling, laptop, 64 prompts, 40 tokens", "transformers", *sampling(small, mixed_prompts(64, 16, 96, 1280), 40,
                folder), "3×", "", "")
            row("sampling, 124M, 8 prompts, 64 tokens", "transformers", *sampling(large, mixed_prompts(8, 16, 64), 64, folder),
                "2×", "", "")
            row("the same, weights in bf16", "reading the weights once a token", *sampling_bf16(folder, bandwidth), "50%", "", "")
            row("9 samples of a prompt of 256 tokens, 124M", "9 times one", *samples_of_one_prompt(folder), "prompt once", "", "")
        for i, (name, how, what, against, least) in enumerate(ROWS):
            if name in wanted:
                place = folder / f"{i}"
                place.mkdir()
                write_dataset(place / "data")
                a, b, ratio, count, unit = apart("race", name, place, **how)
                peaks = [gib(peak_memory(name, side, place, **how)) for side in ("ours", "theirs")]
                row(what, against, f"{count / a:,.2f} {unit}", f"{count / b:,.2f}", f"{ratio:.1f}×", least, *peaks)
        if "pretraining" in wanted:
            for dtype, (ours, limit, share) in pretraining(rates, folder).items():
                row(f"pretraining step, 124M, 8 rows of 512, {str(dtype)[6:]}", "matrix products alone",
                    f"{ours:,.0f} tokens/s", f"{limit:,.0f} tokens/s", f"{share:.0%}", "70%", "", "")
        if "growth" in wanted:
            print("\nHow cost grows:\n")
            row("what", "model", "batch", "length or K", "seconds", "memory")
            row(*["---"] * 6)
            for i, (name, how) in enumerate(GROWTH):
                place = folder / f"growth{i}"
                place.mkdir()
                K = how.pop("K", 9)
                write_dataset(place / "data", K=K)
                ours, _, _, count, _ = SIDES[name](place, **how)
                ours()
                row({"ppo": "PPO iteration", "reward": "reward step"}[name], how["size"], str(count),
                    str(how.get("new", f"K = {K}")), f"{ours():.2f}", gib(peak_memory(name, "ours", place, **how)))


def cpu():
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        name, side, folder, how = sys.argv[2:]
        before = status("VmRSS")
        SIDES[name](Path(folder), **json.loads(how))[side == "theirs"]()
        print(status("VmHWM") - before)
    elif sys.argv[1:2] == ["--race"]:
        name, folder, how = sys.argv[2:]
        ours, theirs, check, count, unit = SIDES[name](Path(folder), **json.loads(how))
        check()
        print(json.dumps([*race(ours, theirs, 3 if '"laptop"' in how else 2), count, unit]))
    else:
        main(sys.argv[1:] or ["sampling", "sft", "reward", "ppo", "pretraining", "growth"])
