"""Supervised fine-tuning and pretraining: the real loop on eight letters."""

import json
import math

import pytest
import torch

import common.seeds
import sft
from common.config import UserError
from common.runtime import Runtime
from conftest import cpu, load_model, random_gpt, read_log, same, save, slow_logprobs, weights, write_lines
from data import readers
from model import GPT, ScalarModel

END = 8


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_by_hand(model, pairs):
    """Sum and number of -log p over the target tokens, one at a time."""
    terms = [-p for prompt, response in pairs for p in slow_logprobs(model, prompt, response)]
    return sum(terms), len(terms)


def loss_of(model, pairs):
    batch = readers.make_batch(pairs, END)
    return sft.masked_loss(model(batch.tokens, batch.positions), batch.mask)


# ---------------------------------------------------------------- validation

def test_validation_loss_is_the_mean_over_tokens_for_any_batch_size_without_dropout(letters):
    model = random_gpt(dropout=0.5)
    pairs = [([1], [2, END]), ([3, 4], [5, 6, 7, END]), ([5], [END])]
    total, count = loss_by_hand(model.eval(), pairs)
    model.train()
    for batch_size in (1, 2, 3):
        config = letters.sft(pretrain_mix=0.0, batch_size=batch_size)
        result = sft.validation_loss(model, pairs, config, END, cpu())
        assert result == pytest.approx(total / count, abs=1e-5) and model.training
    assert sft.validation_loss(model, [], config, END, cpu()) == 0


def test_a_rank_without_a_pair_of_its_own_adds_nothing(letters, monkeypatch):
    pairs, runtime, sums = [([1], [2, END]), ([3, 4], [5, 6, 7, END]), ([5], [END])], cpu(), []
    total, count = loss_by_hand(random_gpt(), pairs)
    monkeypatch.setattr(runtime, "all_reduce", lambda *numbers: sums.append(numbers) or numbers)
    runtime.world_size = 4
    for runtime.rank in range(4):
        sft.validation_loss(random_gpt(), pairs, letters.sft(pretrain_mix=0.0, batch_size=1), END, runtime)
    assert len(sums) == 4 and sum(n for _, n in sums) == count and sum(x for x, _ in sums) == pytest.approx(total, abs=1e-4)


# ---------------------------------------------------------------- the real loop

@pytest.fixture
def batches(monkeypatch):
    """The (context, target) pairs of every batch."""
    seen, make_batch = [], readers.make_batch
    monkeypatch.setattr(readers, "make_batch", lambda pairs, *rest: seen.append(pairs) or make_batch(pairs, *rest))
    return seen


def test_the_logged_loss_is_the_mean_over_all_targets_of_the_batch(letters):
    sft.main(letters.sft(pretrain_mix=0.0, batch_size=24, epochs=1, lr=0.0))
    (line,) = read_log(letters.out / "sft")
    model = load_model(GPT, letters.data / "base.pt")
    for split, name in (("train", "loss"), ("valid", "valid_loss")):
        pairs = [readers.example(r["prompt"], r["response"], letters.tokenizer)
                 for r in records(letters.data / f"demonstrations.{split}.jsonl")]
        total, count = loss_by_hand(model, pairs)
        assert line[name] == pytest.approx(total / count, abs=1e-5)
        assert split == "valid" or line["targets"] == count


def test_one_update_is_adams_with_the_gradient_of_the_mean(letters):  # pitfalls 34, 35
    sft.main(letters.sft(pretrain_mix=0.0, batch_size=24, epochs=1, lr=1e-3))
    model = load_model(GPT, letters.data / "base.pt")
    pairs = [readers.example(r["prompt"], r["response"], letters.tokenizer)
             for r in records(letters.data / "demonstrations.train.jsonl")]
    loss = sum(loss_of(model, [pair]) for pair in pairs)
    (loss / sum(len(response) for _, response in pairs)).backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    assert read_log(letters.out / "sft")[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    after = weights(letters.out / "sft/model.pt")
    for name, p in model.named_parameters():  # Adam's first step: lr * g / (|g| + eps)
        g = p.grad * min(1, 1 / norm)
        expected = p - 1e-3 * g / (g.abs() + 1e-8)
        solid = g.abs() > 1e-5
        torch.testing.assert_close(after[name][solid], expected[solid], rtol=0, atol=1e-5)


def test_an_epoch_sees_each_demonstration_once_in_a_new_order_each_time(letters, batches):
    sft.main(letters.sft(pretrain_mix=0.0, batch_size=8, epochs=2, lr=0.0))
    flat = [str(pair) for pairs in batches if len(pairs) == 8 for pair in pairs]  # the 4 of validation aside
    assert len(flat) == 48 and sorted(flat[:24]) == sorted(flat[24:]) and flat[:24] != flat[24:]


def test_a_batch_holds_the_fraction_of_pretraining_text_that_was_asked_for(letters, batches):
    sft.main(letters.sft(pretrain_mix=0.25, batch_size=8, epochs=1))
    text = readers.PretrainingText(letters.data / "pretrain.train.bin", letters.tokenizer, 64)
    demonstrations = [readers.example(r["prompt"], r["response"], letters.tokenizer)
                      for r in records(letters.data / "demonstrations.train.jsonl")]
    for step, pairs in enumerate(batches[:4]):
        assert len(pairs) == 8 and all(pair in demonstrations for pair in pairs[:6])
        assert pairs[6:] == text.pairs(text.draw(2, 0, "sft", step))
    assert len(batches) == 4 + 1  # 24 demonstrations by 6, and one batch of validation


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth(letters):
    sft.main(letters.sft(pretrain_mix=0.0, batch_size=8, epochs=2, lr=1e-3))
    expected = [1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 6))) for step in range(6)]
    assert [line["lr"] for line in read_log(letters.out / "sft")] == pytest.approx(expected)


def test_fine_tuning_learns_the_demonstrations(letters):
    write_lines(letters.data / "demonstrations.train.jsonl", [{"prompt": c, "response": c * 3} for c in "abcdefgh"] * 3)
    write_lines(letters.data / "demonstrations.valid.jsonl", [{"prompt": c, "response": c * 3} for c in "abcdefgh"])
    sft.main(letters.sft(epochs=30, lr=1e-2, pretrain_mix=0.0))
    assert read_log(letters.out / "sft")[-1]["valid_loss"] < 0.05
    assert "\nb|bbb" in (letters.out / "sft/samples.txt").read_text()


def test_dropout_is_on_while_training_and_off_in_validation(letters):
    for name, dropout in (("without", 0.0), ("with", 0.5)):
        sft.main(letters.sft(out=str(letters.out / name), dropout=dropout, lr=0.0, epochs=1))
    without, with_ = (read_log(letters.out / name) for name in ("without", "with"))
    assert abs(without[0]["loss"] - with_[0]["loss"]) > 1e-3
    assert without[-1]["valid_loss"] == pytest.approx(with_[-1]["valid_loss"], abs=1e-6)


def test_dropouts_masks_are_new_in_every_step_and_on_every_rank(letters, monkeypatch):
    same_ = [{"prompt": "ab", "response": "cdefgh"}] * 24
    write_lines(letters.data / "demonstrations.train.jsonl", same_)
    sft.main(letters.sft(dropout=0.5, lr=0.0, pretrain_mix=0.0, batch_size=4))
    log = read_log(letters.out / "sft")
    assert len({line["loss"] for line in log}) == len(log) == 12
    seeds, seed_of = [], common.seeds.seed_of
    monkeypatch.setattr(common.seeds, "seed_of", lambda *key: seeds.append(key) or seed_of(*key))

    class OneOfTwo(Runtime):  # the other rank agrees in everything
        is_main = True  # each has a folder of its own here

        def __init__(self, config):
            super().__init__(config)
            self.rank, self.world_size = rank, 2

        def all_reduce(self, *numbers):
            return list(map(float, numbers))

        def all_gather(self, items):
            return items

        def barrier(self):
            pass

    monkeypatch.setattr(sft, "Runtime", OneOfTwo)
    monkeypatch.setattr("common.learner.DistributedDataParallel", lambda model: model)
    for rank in (0, 1):
        sft.main(letters.sft(out=str(letters.out / f"{rank}"), dropout=0.5, pretrain_mix=0.0, batch_size=4))
    drawn = [key for key in seeds if key[1] == "sft: dropout"]
    assert len(drawn) == len(set(drawn)) == 24


def test_recomputing_draws_the_same_dropout_again(letters):
    for on in (False, True):
        sft.main(letters.sft(out=str(letters.out / f"{on}"), dropout=0.3, activation_checkpointing=on))
    assert read_log(letters.out / "False") == read_log(letters.out / "True")


def test_validation_of_pretraining_is_on_the_pages_of_the_valid_file(letters):
    sft.main(letters.sft(pretrain_mix=1.0, epochs=1, lr=0.0))
    text = readers.PretrainingText(letters.data / "pretrain.valid.bin", letters.tokenizer, 64)
    total, count = loss_by_hand(load_model(GPT, letters.data / "base.pt"), text.pairs(range(len(text))))
    assert read_log(letters.out / "sft")[-1]["valid_loss"] == pytest.approx(total / count, abs=1e-5)


def test_pretraining_learns_from_text_alone_and_depends_only_on_the_seed(letters):
    for split in ("train", "valid"):
        (letters.data / f"demonstrations.{split}.jsonl").unlink()
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft.main(letters.sft(out=str(letters.out / name), seed=seed, init="scratch", size="nano", pretrain_mix=1.0, epochs=2,
                             lr=1e-2))
        runs.append(weights(letters.out / name / "model.pt"))
    log = read_log(letters.out / "a")
    assert log[-1]["valid_loss"] < log[0]["loss"] - 0.2 and log[0]["loss"] == pytest.approx(math.log(9), abs=0.4)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_each_epoch_leaves_a_checkpoint_and_the_last_is_the_model(letters):
    sft.main(letters.sft())
    out = letters.out / "sft"
    assert sorted(p.name for p in out.iterdir()) == ["epoch1.pt", "epoch2.pt", "log.jsonl", "model.pt", "samples.txt"]
    assert same(weights(out / "epoch2.pt"), weights(out / "model.pt"))
    assert not same(weights(out / "epoch1.pt"), weights(out / "epoch2.pt"))
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    assert checkpoint["config"]["lr"] == letters.sft().lr and checkpoint["tokenizer"] == letters.tokenizer.fingerprint


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(letters, stop_and_go_on, step):
    sft.main(letters.sft(out=str(letters.out / "whole"), dropout=0.2))
    stop_and_go_on(sft.main, letters.sft(dropout=0.2), step)
    for name in ("epoch1.pt", "epoch2.pt", "model.pt"):
        assert same(weights(letters.out / "whole" / name), weights(letters.out / "sft" / name))
    for name in ("log.jsonl", "samples.txt"):
        assert (letters.out / "whole" / name).read_bytes() == (letters.out / "sft" / name).read_bytes()
    assert not (letters.out / "sft/resume.pt").exists()


# ---------------------------------------------------------------- bad input

def refused(letters, message, **changes):
    with pytest.raises(UserError, match=message):
        sft.main(letters.sft(**changes))
    assert not (letters.out / "sft").exists()


def test_missing_files_are_named_with_the_command_that_makes_them(letters):
    refused(letters, "nowhere.pt is missing; in the default run `make base` makes it", init="nowhere.pt")
    refused(letters, "nowhere/tokenizer.json is missing", data="nowhere")
    for name in ("pretrain.train.bin", "demonstrations.train.jsonl", "demonstrations.valid.jsonl"):
        (letters.data / name).rename(letters.data / "away")
        refused(letters, f"{name} is missing; .*`make data`")
        (letters.data / "away").rename(letters.data / name)


def test_a_file_without_demonstrations_is_refused(letters):
    (letters.data / "demonstrations.train.jsonl").write_text("")
    refused(letters, "demonstrations.train.jsonl: no records")


def test_fewer_demonstrations_than_a_batch_are_refused(letters):
    refused(letters, "24 rows are less than one batch of 64", batch_size=64)


def test_a_demonstration_that_does_not_fit_the_context_is_named(letters):
    lines = records(letters.data / "demonstrations.train.jsonl")
    lines[4] = {"prompt": "b" * 30, "response": "c" * 34}  # 30 + 34 + the end of text = 65
    write_lines(letters.data / "demonstrations.train.jsonl", lines)
    refused(letters, "demonstrations.train.jsonl:5: 30 tokens of prompt and 35 of response do not fit the context of 64")


def test_a_checkpoint_of_another_vocabulary_is_refused(letters):
    letters.tokenizer.fingerprint = "another"
    save(random_gpt(), letters.data / "foreign.pt", letters.tokenizer)
    refused(letters, "foreign.pt was trained with another vocabulary than .*tokenizer.json",
            init=str(letters.data / "foreign.pt"))


def test_a_checkpoint_of_another_kind_is_refused(letters):
    save(random_gpt(kind=ScalarModel), letters.data / "reward.pt", letters.tokenizer)
    refused(letters, "reward.pt holds no GPT", init=str(letters.data / "reward.pt"))


@pytest.mark.parametrize("changes, message", [
    (dict(pretrain_mix=1.5), "fraction"),
    (dict(size="huge"), "--size is one of nano, pocket, laptop"),
    (dict(init="scratch"), "--init scratch has nothing to fine-tune"),
    (dict(epochs=0), "at least 1"),
    (dict(dropout=1.0), "--dropout"),
    (dict(pretrain_mix=0.01, batch_size=8), "all or nothing"),
])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sft.Config(**changes)


# ---------------------------------------------------------------- where it starts from

def test_a_folder_in_transformers_layout_starts_the_same_run_as_a_checkpoint(letters):
    base = load_model(GPT, letters.data / "base.pt")
    base.save_gpt2(letters.out / "gpt2")
    sft.main(letters.sft(out=str(letters.out / "one"), dropout=0.1))
    sft.main(letters.sft(out=str(letters.out / "two"), dropout=0.1, init=str(letters.out / "gpt2")))
    sft.main(letters.sft(out=str(letters.out / "three"), dropout=0.1, init=str(letters.out / "gpt2/model.safetensors")))
    assert same(weights(letters.out / "one/model.pt"), weights(letters.out / "two/model.pt"))
    assert same(weights(letters.out / "one/model.pt"), weights(letters.out / "three/model.pt"))


def test_the_context_changes_only_where_it_is_asked_for(letters):
    sft.main(letters.sft(out=str(letters.out / "longer"), context=80, lr=0.0))
    sft.main(letters.sft(out=str(letters.out / "shorter"), context=32, lr=0.0))
    before = weights(letters.data / "base.pt")["positions.weight"]
    longer, shorter = (weights(letters.out / name / "model.pt")["positions.weight"] for name in ("longer", "shorter"))
    assert longer.shape == (80, 16) and torch.equal(longer[:64], before) and longer[64:].abs().min(1).values.gt(0).any()
    assert torch.equal(shorter, before[:32])
    assert load_model(GPT, letters.out / "longer/model.pt").config.context == 80


def test_weights_of_another_vocabulary_are_refused(letters):
    random_gpt(vocab_size=10).save_gpt2(letters.out / "gpt2")
    with pytest.raises(UserError, match="vocabulary of 10, the dataset's tokenizer.json one of 9"):
        sft.main(letters.sft(init=str(letters.out / "gpt2")))
    with pytest.raises(UserError, match="gpt2-xl has a vocabulary of 50257"):  # before it is downloaded
        sft.main(letters.sft(init="gpt2-xl"))
