"""Shared by the tests: a dataset of eight letters on which every stage runs in milliseconds, with a reward model built by
hand, and a small tinyworld with a run of every stage on it."""

import itertools
import json
import math
import random
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
import torch.distributed.checkpoint as dcp

import evaluate
import ppo
import reward
import sft
from common.run import Run
from common.runtime import Runtime, RuntimeConfig
from data import collect, readers
from data.tinyworld import prepare
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, ScalarModel

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_real_cache(monkeypatch, tmp_path_factory):
    """Nothing that a test downloads may land where a person's downloads are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# ---------------------------------------------------------------- small models

def random_gpt(vocab_size=9, context=64, dropout=0.0, seed=0, dtype=torch.float32, kind=GPT):
    """A GPT (or ScalarModel) with parameters large enough that every one of them matters."""
    model = kind(GPTConfig(vocab_size=vocab_size, context=context, layers=2, heads=2, width=16, dropout=dropout)).to(dtype)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=numbers, dtype=torch.float64) * 0.3)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
        model.tokens.weight.mul_(0.6)  # so that many tokens are likely, the end of text among them
    return model


class Bigram(torch.nn.Module):
    """Stands in for a GPT: the logits after a token are a row of a table, so every probability is known by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table))

    def hidden(self, tokens):
        return self.table[tokens]  # (B, T, V)

    def unembed(self, hidden):
        return hidden

    def forward(self, tokens, positions=None, temperature=1.0):
        logits = self.hidden(tokens)
        if positions is None:
            return logits
        logprobs = (logits / temperature).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (B, T - 1)
        return logprobs.gather(1, positions)


def share_of_a():
    """A reward model built by hand for the letters: it grows with the share of the token 0, `a`, in an episode that ends
    with the end of text, and with nothing else. Width 6: numbers 0 and 1 say which token, 2 and 3 the mean over the text,
    4 and 5 whether this is the end."""
    model = ScalarModel(GPTConfig(vocab_size=9, context=64, layers=1, heads=1, width=6))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        model.tokens.weight[:, 0], model.tokens.weight[:, 1] = -1, 1
        model.tokens.weight[0, 0], model.tokens.weight[0, 1] = 1, -1
        model.tokens.weight[8] = torch.tensor([0.0, 0, 0, 0, 1, -1])
        block = model.blocks[0]  # queries and keys are 0: attention is the mean over the text so far
        block.attention.qkv.weight[12, 0], block.attention.qkv.weight[13, 1] = 1, 1
        block.attention.out.weight[2, 0], block.attention.out.weight[3, 1] = 1, 1
        model.head.weight[0, 2] = 3
    return model


def save(model, path, tokenizer, **config):
    """A checkpoint as a stage leaves it."""
    @dataclass(frozen=True)
    class Config:
        out: str = str(Path(path).parent)
        data: str = "letters"

    run = Run(Config(), Runtime(RuntimeConfig(device="cpu")), tokenizer)
    run.save_model(model, name=Path(path).name)


def cpu(**changes):
    """The runtime of one process on the CPU."""
    return Runtime(RuntimeConfig(device="cpu", **changes))


def open_run(config, parts=None, save_interval=30.0, runtime=None):
    """A Run in config.out."""
    return Run(config, runtime or cpu(), SimpleNamespace(fingerprint="letters"), (), parts, save_interval)


def write_lines(path, records):
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in records))


# ---------------------------------------------------------------- the letters

@pytest.fixture(scope="session")
def letters_original(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("letters"), random.Random(0)
    tokenizer = Tokenizer("letters", [bytes([b]) for b in b"abcdefgh"])  # ids 0 to 7; 8 is the end of text
    tokenizer.save(folder)
    alphabet = "abcdefgh" * 3  # the pretraining text goes through it in order
    word = lambda most, of="abcdefgh": "".join(rng.choice(of) for _ in range(rng.randint(1, most)))
    for split, many in (("train", 48), ("valid", 8)):
        write_lines(folder / f"prompts.{split}.jsonl", [{"prompt": word(6, "bcdefgh"), "user": "u"} for _ in range(many)])
        write_lines(folder / f"demonstrations.{split}.jsonl",
                    [{"prompt": word(6), "response": word(9)} for _ in range(many // 2)])
        comparisons = []
        for i in range(many):  # the more `a` the better; equally many is a tie
            responses = [word(8, "aabc") for _ in range(rng.randint(2, 5))]
            counts = sorted({r.count("a") for r in responses}, reverse=True)
            comparisons.append({"prompt": word(4), "responses": responses, "labeler": f"labeler-{i % 3}",
                                "ranks": [counts.index(r.count("a")) + 1 for r in responses]})
        if split == "valid":
            for r in comparisons[::2]:
                r["labeler"] = "stranger"
        write_lines(folder / f"comparisons.{split}.jsonl", comparisons)
        readers.write_tokens(folder / f"pretrain.{split}.bin", [alphabet[rng.randrange(8):][:rng.randint(2, 12)]
                                                                for _ in range(many)], tokenizer)
    save(random_gpt(seed=1), folder / "base.pt", tokenizer)
    save(random_gpt(seed=9), folder / "sft.pt", tokenizer)
    save(share_of_a(), folder / "reward.pt", tokenizer)
    return folder


@pytest.fixture
def letters(letters_original, tmp_path):
    """A copy to break: `.data`, `.tokenizer`, `.end`, and a Config for each stage, made for a run of milliseconds."""
    data = tmp_path / "letters"
    shutil.copytree(letters_original, data)
    folder, cpu = str(data), dict(data=str(data), device="cpu")
    tokenizer = Tokenizer.load(data)
    return SimpleNamespace(
        data=data, tokenizer=tokenizer, end=tokenizer.end_of_text, out=tmp_path,
        sft=lambda **changes: sft.Config(**cpu | dict(
            out=str(tmp_path / "sft"), init=f"{folder}/base.pt", pretrain_mix=0.25, batch_size=8, epochs=2,
            dropout=0.0) | changes),
        reward=lambda **changes: reward.Config(**cpu | dict(
            out=str(tmp_path / "reward"), init=f"{folder}/sft.pt", batch_size=8) | changes),
        ppo=lambda **changes: ppo.Config(**cpu | dict(
            out=str(tmp_path / "ppo"), policy=f"{folder}/sft.pt", reward=f"{folder}/reward.pt", iterations=3, batch_size=8,
            minibatch_size=4, max_new_tokens=6) | changes),
    )


# ---------------------------------------------------------------- every stage on a small tinyworld

@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """prepare, base, sft, collect, reward, PPO and PPO-ptx through their real main(config)."""
    folder = tmp_path_factory.mktemp("tinyworld")
    data, out = str(folder / "data"), folder / "out"
    cpu = dict(data=data, device="cpu")
    prepare.main(prepare.Config(out=data, documents=300, log=700, customers=40, demonstrations=64, tasks=4, vocab_size=600))
    rl = dict(policy=f"{out}/sft/model.pt", reward=f"{out}/reward/model.pt", iterations=2, batch_size=8, minibatch_size=4,
              max_new_tokens=24)
    stages = {
        "base": sft.Config(**cpu, out=f"{out}/base", init="scratch", size="nano", pretrain_mix=1.0, epochs=2, lr=3e-3),
        "sft": sft.Config(**cpu, out=f"{out}/sft", init=f"{out}/base/model.pt", epochs=2, batch_size=16, pretrain_mix=0.125),
        "collect": collect.Config(**cpu, sources=f"{out}/sft/model.pt@1,{out}/base/model.pt@0.7", prompts=40, valid_prompts=12,
                                  most=5, max_new_tokens=24, batch_size=16),
        "reward": reward.Config(**cpu, out=f"{out}/reward", init=f"{out}/sft/model.pt"),
        "ppo": ppo.Config(**cpu, **rl, out=f"{out}/ppo", ptx_coef=0.5),
        "ppo_noptx": ppo.Config(**cpu, **rl, out=f"{out}/ppo_noptx", ptx_coef=0.0),
    }
    for config in stages.values():
        sys.modules[type(config).__module__].main(config)
    report = evaluate.Config(**cpu, out=str(out), prompts=12, max_new_tokens=24)
    return SimpleNamespace(data=Path(data), out=out, stages=stages, collecting=stages["collect"], report=report)


# ---------------------------------------------------------------- what tests say often

def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights(path):
    """Those of a checkpoint, a file or a folder."""
    path = Path(path)
    if not path.is_dir():
        return torch.load(path, weights_only=True)["model"]
    shapes = torch.load(path / "state.pt", weights_only=True)["shapes"]["model"]
    model = {name: torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load({"model": model}, checkpoint_id=path, no_dist=True)
    return model


def same(a, b):
    """Two state dicts, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def brute_ranking_loss(rewards, ranks):
    """Equation 1 with a loop over pairs and math.log."""
    terms = []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            terms.append(-math.log(1 / (1 + math.exp(-(rewards[better] - rewards[worse])))))
    return sum(terms) / len(terms) if terms else 0.0


def slow_logprobs(model, prompt, response, temperature=1.0):
    """log p of each response token, one forward pass and one token at a time."""
    tokens, result = list(prompt), []
    for token in response:
        logits = model(torch.tensor([tokens]))[0, -1].double() / temperature
        result.append((logits[token] - logits.exp().sum().log()).item())
        tokens.append(token)
    return result


def load_model(kind, path):
    """The model of a checkpoint, a file or a folder."""
    checkpoint = torch.load(path / "state.pt" if path.is_dir() else path, weights_only=True)
    model = kind(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(weights(path))
    return model.eval()


@pytest.fixture
def every_step(monkeypatch):
    """Runs save their state after every step."""
    start = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *rest: start(self, *rest[:5], save_interval=-1.0))


@pytest.fixture
def stop_and_go_on(monkeypatch):
    """stop_and_go_on(main, config, step): a run that saves every step and is killed right after its log line of `step`,
    before that step is saved; then the same again, to its end."""
    start, log = Run.__init__, Run.log

    def run(main, config, step):
        def log_and_die(self, at, **numbers):
            log(self, at, **numbers)
            if at == step:
                raise KeyboardInterrupt

        def save_every_step(self, *arguments):
            start(self, *arguments, save_interval=-1.0)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "__init__", save_every_step)
            patch.setattr(Run, "log", log_and_die)
            with pytest.raises(KeyboardInterrupt):
                main(config)
        out = Path(config.out)
        assert (out / "resume.pt").is_file() and not (out / "model.pt").exists()
        assert read_log(out)[-1]["step"] == step  # this line is forgotten and made again
        main(config)
    return run
