"""The command line, schedules, checkpoints, resuming: what every stage leans on."""

import dataclasses
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.config
import common.files
import common.learner
import common.checkpoints
import common.run
import common.seeds
import ppo
import reward
import sft
from common import devices, processes
from common.config import UserError
from common.learner import Learner
from common.runtime import Runtime, RuntimeConfig
from conftest import cpu, open_run, random_gpt, read_log, ROOT, same, save
from data import collect
from model import GPT, ScalarModel


@dataclass(frozen=True)
class Config:
    lr: float = 1e-3  # the rate (C.4: 9e-6, 50% of it)
    steps: int = 5  # how many
    name: str = "x"  # what to call it
    flag: bool = True  # whether
    out: str = "out"  # where
    resume: bool = True  # go on
    device: str = "cpu"  # cpu or cuda
    precision: str = "auto"  # of products

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps is at least 1")


# ---------------------------------------------------------------- command line

def test_values_flags_and_defaults():
    assert common.config.parse_config(Config, []) == Config()
    parsed = common.config.parse_config(Config, ["--lr", "1", "--steps=7", "--no-flag", "--name", "a b"])
    assert parsed == Config(lr=1.0, steps=7, flag=False, name="a b") and type(parsed.lr) is float


def test_arguments_from_a_file_with_comments(tmp_path):
    (tmp_path / "run.args").write_text("--lr 2e-4  # smaller\n\n# a whole line\n--no-flag\n")
    assert common.config.parse_config(Config, [f"@{tmp_path}/run.args", "--steps", "9"]) == Config(lr=2e-4, flag=False, steps=9)


@pytest.mark.parametrize("argv, message", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    (["--step", "3"], "unrecognized"),  # no abbreviations: they would change meaning with a new field
    (["--steps", "2.5"], "--steps: invalid int value: '2.5'"),
    (["--lr", "fast"], "--lr: invalid .* value: 'fast'"),
    (["--lr", "nan"], "--lr: invalid .* value: 'nan'"),
    (["--lr", "inf"], "--lr: invalid .* value: 'inf'"),
    (["--steps", "0"], "--steps is at least 1"),
    (["--steps"], "--steps: expected one argument"),
    (["@nowhere.args"], "nowhere.args"),
])
def test_what_cannot_be_understood_is_an_error_that_names_it(argv, message):
    with pytest.raises(UserError, match=message):
        common.config.parse_config(Config, argv)


def test_help_shows_comment_and_default_of_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        common.config.parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and __doc__ in text
    for words in ("the rate (C.4: 9e-6, 50% of it) [0.001]", "--flag, --no-flag", "whether [True]"):
        assert words in text


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate", "data.collect", "data.tinyworld.prepare"])
def test_every_field_of_every_stage_has_a_comment_and_a_type_the_command_line_knows(stage, capsys):
    module = __import__(stage, fromlist=["Config"])
    assert common.config.parse_config(module.Config, []) == module.Config()
    with pytest.raises(SystemExit):
        common.config.parse_config(module.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"--{field.name}( \w+|, --no-{field.name}) \w[^\[]+\[", text), field.name


def test_errors_are_one_line_on_stderr_with_exit_status_2(tmp_path):
    """The scripts themselves, as a person runs them, all at once."""
    (tmp_path / "data").mkdir()
    commands = {
        "sft.py: unrecognized arguments: --learning_rate 1": ["sft.py", "--learning_rate", "1"],
        f"reward.py: {tmp_path}/data/tokenizer.json is missing": ["reward.py", "--data", f"{tmp_path}/data"],
        "ppo.py: --batch_size 10 is not a multiple of --minibatch_size 4":
            ["ppo.py", "--batch_size", "10", "--minibatch_size", "4"],
        "prepare.py: --vocab_size is from 257": ["data/tinyworld/prepare.py", "--vocab_size", "12"],
        "collect.py: a comparison takes 2 responses": ["data/collect.py", "--fewest", "1"],
        "evaluate.py: argument --prompts: invalid int value: 'many'": ["evaluate.py", "--prompts", "many"],
    }
    running = [(message, subprocess.Popen([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
               for message, (script, *arguments) in commands.items()]
    for message, process in running:
        stdout, stderr = process.communicate()
        assert process.returncode == 2 and stdout == "" and stderr.count("\n") == 1 and stderr.startswith(message), stderr
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # nothing is left behind


# ---------------------------------------------------------------- processes, seeds

@pytest.mark.parametrize("device, message", [("abacus", "--device abacus: "), ("meta", "--device meta: neither cpu nor cuda nor mps"),
                                             ("mps", "--device mps: PyTorch finds no Apple GPU here")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^{message}"):
        Runtime(RuntimeConfig(device=device))


def test_ranks_share_out_every_row_once():
    runtime = cpu()
    for world_size in (1, 2, 3, 4):
        for count in (0, 1, 4, 7):
            rows = []
            for rank in range(world_size):
                runtime.rank, runtime.world_size = rank, world_size
                rows += list(range(count))[runtime.local_rows(count)]
            assert rows == list(range(count))


def test_random_numbers_depend_on_seed_purpose_and_step_and_on_nothing_else():  # pitfall 38
    draw = lambda *key: torch.rand(4, generator=common.seeds.generator(*key)).tolist()
    first = draw(0, "rollout", 1)
    torch.rand(100)
    assert draw(0, "rollout", 1) == first
    assert len({str(draw(*key)) for key in [(0, "rollout", 1), (1, "rollout", 1), (0, "other", 1), (0, "rollout", 2)]}) == 4
    assert all(0 <= common.seeds.seed_of(seed, "p", step) < 2**63 for seed in (-1, 0, 10**9) for step in range(50))


# ---------------------------------------------------------------- optimisation

def test_cosine_falls_from_one_to_a_tenth():
    assert [common.learner.cosine(step, 100) for step in (0, 25, 50, 75, 100)] == pytest.approx(
        [1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1])


def test_warmup_rises_from_a_tenth_to_one_in_ten_steps_and_stays():
    assert [common.learner.warmup_constant(step) for step in (0, 1, 5, 10, 11, 10**6)] == pytest.approx([0.1, 0.19, 0.55, 1, 1, 1])


def test_adam_takes_the_steps_that_its_formula_says():  # pitfalls 36, 37
    model = torch.nn.Linear(1, 1, bias=False).double()
    w = start = 0.5
    with torch.no_grad():
        model.weight.fill_(start)
    learner = Learner(model, 1.0, cpu())
    m = v = 0.0
    for step, g in enumerate([1e-3, -4e-8, 2e-8], 1):
        model.weight.grad = torch.tensor([[g]], dtype=torch.float64)
        learner.step(0.01)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w -= 0.01 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
        assert model.weight.item() == pytest.approx(w, abs=1e-12)


def test_an_update_clips_the_norm_over_all_parameters_and_clears_the_gradients():  # pitfall 35
    model = torch.nn.Linear(2, 1)
    learner = Learner(model, 0.0, cpu())
    learner.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert learner.step(1.0) == pytest.approx(5)
    moved = torch.cat([(b - p).detach().flatten() for b, p in zip(before, model.parameters())])
    np.testing.assert_allclose(moved, [0.6, 0, 0.8], atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "deep" / "file"
    common.files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise error("disk full")
    with pytest.raises((error, UserError)):
        common.files.write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with open(path) as reader:  # who has begun to read goes on with the old one
        common.files.write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert reader.read() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_missing_and_foreign_checkpoints_are_refused_and_never_executed(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (letters.data / "sft.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"model": Evil(), "model_config": {}}, tmp_path / "evil.pt")
    for name in ("half", "text", "empty", "foreign", "list", "evil"):
        with pytest.raises(UserError, match=f"{name}.pt is damaged or no checkpoint of this project"):
            common.checkpoints.load_checkpoint(f"{name}.pt", "make sft", cpu())
    for name in ("missing.pt", "."):
        with pytest.raises(UserError, match="is missing; in the default run `make sft` makes it"):
            common.checkpoints.load_checkpoint(name, "make sft", cpu())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("tokenizer"), "was trained with another vocabulary"),
    (lambda c: c["model_config"].update(experts=8), "holds no GPT"),
])
def test_a_checkpoint_of_another_version_of_the_project_is_refused(letters, change, message):
    checkpoint = torch.load(letters.data / "sft.pt", weights_only=True)
    change(checkpoint)
    common.files.save(letters.data / "sft.pt", checkpoint)
    with pytest.raises(UserError, match=f"sft.pt {message}"):
        ppo.main(letters.ppo())


# ---------------------------------------------------------------- stopping and going on

def test_resuming_brings_back_step_parts_and_the_log_as_it_was(tmp_path):
    config, model = Config(out=str(tmp_path / "run")), random_gpt(seed=1)
    run = open_run(config, dict(model=model), save_interval=-1.0)
    assert run.resume() == 0
    run.log(0, loss=1.5)
    run.samples("hello")
    run.checkpoint(1)
    run.log(1, loss=1.25)  # after the checkpoint: will be made again
    other = random_gpt(seed=2)
    again = open_run(config, dict(model=other), save_interval=-1.0)
    assert again.resume() == 1
    assert same(model.state_dict(), other.state_dict())
    assert read_log(config.out) == [{"step": 0, "loss": 1.5, "skipped": 0}] and (tmp_path / "run/samples.txt").read_text() == "hello\n"
    again.finish()
    assert sorted(os.listdir(config.out)) == ["log.jsonl", "samples.txt"]


def test_checkpoints_wait_until_they_are_due(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    run = open_run(config, save_interval=3600.0)
    run.resume()
    run.checkpoint(1)
    assert not (tmp_path / "run/resume.pt").exists()


@pytest.mark.parametrize("took, then", [(0.5, [1, 4]), (2.0, [1])])
def test_a_save_that_takes_long_makes_the_next_one_wait_longer(tmp_path, monkeypatch, took, then):
    clock, saved = [0.0], []
    monkeypatch.setattr(common.run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run = open_run(Config(out=str(tmp_path / "run")))
    run.resume()

    def save(path, state):
        saved.append(state["step"])
        clock[0] += took
    monkeypatch.setattr(common.files, "save", save)
    for step in range(1, 6):
        clock[0] += 12.0 if step > 1 else 31.0
        run.checkpoint(step)
    assert saved == then


def test_a_fresh_start_forgets_the_old_log(tmp_path):
    config = Config(out=str(tmp_path / "run"), resume=False)
    for _ in range(2):
        run = open_run(config, save_interval=-1.0)
        assert run.resume() == 0
        assert not list((tmp_path / "run").glob("*.pt"))  # nor could it be gone on with, or an epoch of it be taken for one of this
        run.log(0)
        run.checkpoint(1)
        common.files.save(tmp_path / "run/epoch2.pt", {})
    assert read_log(config.out) == [{"step": 0, "skipped": 0}]


def test_a_finished_run_waits_in_before_until_the_next_one_is_finished(tmp_path, capsys):
    folder, model = tmp_path / "run", random_gpt()

    def start(number):
        run = open_run(Config(out=str(folder), resume=False))
        assert run.resume() == 0
        run.log(number)
        run.save_model(model, f"epoch{number}.pt")
        return run

    def finish(run):
        run.save_model(model)
        run.finish()

    def names(where):
        return sorted(os.listdir(where))
    finish(start(1))
    assert names(folder) == ["epoch1.pt", "log.jsonl", "model.pt", "samples.txt"] and not capsys.readouterr().out
    start(2)
    assert capsys.readouterr().out == f"{folder}: the finished run that was here is kept in {folder}/before until this one is finished\n"
    run = start(3)  # 2 was stopped
    assert names(folder) == ["before", "epoch3.pt", "log.jsonl", "samples.txt"] and read_log(folder)[0]["step"] == 3
    assert names(folder / "before") == ["epoch1.pt", "log.jsonl", "model.pt", "samples.txt"]
    assert read_log(folder / "before")[0]["step"] == 1
    run.save_model(model)  # and killed now, 3 is what waits for 4
    run = start(4)
    assert names(folder / "before") == ["epoch3.pt", "log.jsonl", "model.pt", "samples.txt"]
    finish(run)
    assert names(folder) == ["epoch4.pt", "log.jsonl", "model.pt", "samples.txt"]


@pytest.mark.parametrize("name", ["model.pt", "epoch2.pt", "before/model.pt"])
def test_a_run_that_would_replace_the_model_it_starts_from_is_refused(letters, name):
    path = letters.out / "sft" / name
    save(random_gpt(), path, letters.tokenizer)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"sft: the run would replace .*{name}, which it starts from; choose another folder"):
        sft.main(letters.sft(init=str(path)))
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_going_on_with_another_configuration_is_an_error_that_names_the_field(tmp_path):
    config, out = Config(out=str(tmp_path / "run")), tmp_path / "run"
    run = open_run(config, save_interval=-1.0)
    run.resume()
    run.log(0)
    run.checkpoint(1)
    for changes, message in ((dict(lr=2e-3), "--lr 0.001, not 0.002"), (dict(name="y"), "--name x, not y"),
                             (dict(precision="bf16"), "--precision auto, not bf16")):
        with pytest.raises(UserError, match=f"resume.pt is of a run with {message}; --no-resume starts over"):
            open_run(Config(out=str(out), **changes)).resume()
    assert read_log(out) == [{"step": 0, "skipped": 0}]  # and nothing is lost
    assert open_run(Config(out=str(out), device="cuda")).resume() == 1  # where it runs makes no other run of it


@pytest.mark.parametrize("stage, changed", [("sft", "base.pt"), ("sft", "demonstrations.train.jsonl"), ("reward", "sft.pt"),
                                            ("reward", "comparisons.train.jsonl"), ("ppo", "reward.pt"),
                                            ("ppo", "prompts.train.jsonl"), ("ppo", "sft.pt"), ("ppo", "pretrain.train.bin"),
                                            ("sft", "pretrain.train.bin"), ("reward", "demonstrations.train.jsonl")])
def test_going_on_from_other_inputs_is_an_error_that_names_the_file(letters, stop_and_go_on, stage, changed):
    def main(config, module=__import__(stage)):
        if (letters.out / stage / "resume.pt").is_file():
            path = letters.data / changed
            if changed.endswith(".pt"):
                save(random_gpt(seed=7, kind=ScalarModel if changed == "reward.pt" else GPT), path, letters.tokenizer)
            elif changed.endswith(".bin"):
                path.write_bytes(path.read_bytes() * 2)
            else:
                path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
        module.main(config)
    with pytest.raises(UserError, match=f"resume.pt is of a run on another .*{changed}; --no-resume starts over"):
        stop_and_go_on(main, getattr(letters, stage)(), step=1)


def test_more_ranks_than_rows_are_refused():
    runtime = cpu()
    runtime.world_size = 4
    runtime.check_batch_size(4, "batch_size")
    with pytest.raises(UserError, match="--batch_size: 3 rows a step leave some of 4 ranks without one"):
        runtime.check_batch_size(3, "batch_size")


def test_a_damaged_resume_file_is_refused(tmp_path):
    (tmp_path / "resume.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="resume.pt is damaged; --no-resume starts over"):
        open_run(Config(out=str(tmp_path))).resume()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_stage_leaves_a_temporary_file(letters, stage):
    module = __import__(stage)
    module.main(getattr(letters, stage)())
    assert not list(letters.out.rglob("*.tmp")) and not list(letters.out.rglob("resume.pt"))


def test_a_checkpoint_says_what_the_next_stage_must_know(letters):
    save(random_gpt(), letters.out / "model.pt", letters.tokenizer)
    checkpoint = common.checkpoints.load_checkpoint(letters.out / "model.pt", "make sft", cpu())
    assert set(checkpoint) >= {"model", "model_config", "config", "data", "tokenizer"}
    assert checkpoint["model_config"]["width"] == 16


def test_micro_batches_hold_rows_of_like_length_and_every_rank_has_as_many():
    rows = ["aaaa", "b", "ccc", "dd", "eeeee", "f", "gg"]  # of 14 in all, on two ranks
    for rank in (0, 1):
        for runtime, expected in ((cpu(micro_batch=3), [["b", "f"], ["dd", "gg"], ["ccc", "aaaa", "eeeee"]]), (cpu(), [rows])):
            runtime.rank, runtime.world_size = rank, 2
            assert runtime.micro_batches(rows, 14, len) == expected


# ---------------------------------------------------------------- seeds, and published settings

def test_every_random_number_of_a_stage_depends_on_its_seed(letters, chain, tmp_path, monkeypatch):
    keys, seed_of = [], common.seeds.seed_of
    monkeypatch.setattr(common.seeds, "seed_of", lambda *key: keys.append(key) or seed_of(*key))
    shutil.copytree(chain.data, tmp_path / "data")
    runs = [(sft, letters.sft(seed=7, dropout=0.1)), (reward, letters.reward(seed=7)), (ppo, letters.ppo(seed=7)),
            (collect, dataclasses.replace(chain.collecting, data=str(tmp_path / "data"), seed=7))]
    for stage, config in runs:
        stage.main(config)
    assert {seed for seed, *_ in keys} == {7}
    purposes = {purpose for _, purpose, *_ in keys}
    assert purposes >= {"sft epoch", "sft: dropout", "reward epoch", "ppo pass", "rollout", "ppo: pretraining pass"}


def test_no_two_stages_draw_the_same_random_numbers(letters, monkeypatch):  # pitfall 43
    drawn, seed_of = {}, common.seeds.seed_of
    stages = {"base": (sft, letters.sft(init="scratch", size="nano", context=64, pretrain_mix=1.0, dropout=0.1)),
              "sft": (sft, letters.sft(dropout=0.1)), "reward": (reward, letters.reward()), "ppo": (ppo, letters.ppo())}
    for name, (stage, config) in stages.items():
        keys = drawn[name] = set()
        monkeypatch.setattr(common.seeds, "seed_of", lambda *key: keys.add(key) or seed_of(*key))
        stage.main(config)
    assert all(drawn.values())
    for a, b in itertools.combinations(drawn.values(), 2):
        assert not a & b


PAPER = {  # C.1 to C.4 of the paper, and GPT-2's recipe, which takes over what its size allows
    "data/paper.sft.args": (sft, dict(epochs=16, batch_size=32, lr=9.65e-6, dropout=0.2, pretrain_mix=0)),
    "data/paper.reward.args": (reward, dict(epochs=1, batch_size=64, lr=9e-6)),
    "data/paper.ppo.args": (ppo, dict(iterations=500, batch_size=512, minibatch_size=64, value_lr=9e-6, beta=0.02, ptx_coef=27.8,
                                      ptx_rows=8, truncation_penalty=0, max_new_tokens=1023)),
    "data/oasst/sft.args": (sft, dict(epochs=4, batch_size=32, dropout=0.2, lr=2e-5, pretrain_mix=0.1)),
    "data/oasst/reward.args": (reward, dict(epochs=1, batch_size=64, lr=4.5e-5)),
    "data/oasst/ppo.args": (ppo, dict(iterations=500, batch_size=128, minibatch_size=32, lr=9.65e-6, value_lr=4.5e-5, beta=0.02,
                                      ptx_coef=27.8, ptx_rows=1, max_new_tokens=256)),
}


@pytest.mark.parametrize("path", PAPER)
def test_paper_argument_files_set_the_papers_values_and_leave_the_rest_at_defaults(path):
    stage, expected = PAPER[path]
    config = dataclasses.asdict(common.config.parse_config(stage.Config, [f"@{ROOT / path}"]))
    defaults = dict(gamma=1.0, lam=0.95, clip=0.2, ema=0.992, temperature=1.0) if stage is ppo else {}
    assert (expected | defaults).items() <= config.items()
    assert all(config[name] == default for name, default in dataclasses.asdict(stage.Config()).items() if name not in expected)


def test_a_machine_with_other_files_or_versions_is_named(monkeypatch):
    runtime, facts = cpu(), {"version of PyTorch": "2.13.0", "data/prompts.train.jsonl": "digest"}
    runtime.check_same(facts)
    for name in facts:
        monkeypatch.setattr(runtime, "all_gather", lambda mine: [*mine, ("node1", facts), ("node2", facts | {name: "other"})])
        with pytest.raises(UserError, match=f"^node2 has another {name} than "):
            runtime.check_same(facts)

def test_a_run_is_refused_if_another_machine_has_other_inputs(monkeypatch, tmp_path):
    """All processes compare what they start from before anything is written."""
    (tmp_path / "data").write_text("one")
    config, runtime = Config(out=str(tmp_path / "out")), cpu()
    common.run.Run(config, runtime, SimpleNamespace(fingerprint="f"), [tmp_path / "data"])
    other = ("node2", {"version of PyTorch": torch.__version__, str(tmp_path / "data"): "other"})
    monkeypatch.setattr(runtime, "all_gather", lambda mine: [*mine, other])
    with pytest.raises(UserError, match="^node2 has another .*data than "):
        common.run.Run(config, runtime, SimpleNamespace(fingerprint="f"), [tmp_path / "data"])


def test_processes_on_gpus_wait_for_hours_and_sum_numbers_of_the_cpu_by_gloo(monkeypatch):
    asked = {}
    store = SimpleNamespace(set_timeout=lambda timeout: None)
    monkeypatch.setattr(processes.dist, "rendezvous", lambda url: iter([(store, 1, 2)]))
    monkeypatch.setattr(processes.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    monkeypatch.setattr(processes.atexit, "register", lambda work: None)
    monkeypatch.setattr(processes.Others, "store", None)
    processes.join(2, "cuda")
    processes.start_process_group(torch.device("cuda:1"))
    assert asked["backend"] == "cpu:gloo,cuda:nccl" and asked["device_id"] == torch.device("cuda:1")
    assert asked["timeout"].total_seconds() >= 3600 and (asked["rank"], asked["world_size"]) == (1, 2)
    processes.start_process_group(torch.device("cpu"))
    assert asked["backend"] == "gloo" and asked["device_id"] is None


@pytest.mark.parametrize("precision, rounded", [("float32", False), ("bf16", True), ("fp16", True)])
def test_float32_products_on_a_gpu_are_rounded_with_16_bits_only(precision, rounded):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not rounded
        devices.choose_dtype(precision, torch.device("cuda:0"))
        assert torch.backends.cuda.matmul.allow_tf32 == rounded
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


FAILING = """
import atexit, sys
from common.config import UserError, guard
atexit.register(print, "the process group is destroyed")
def work():
    print("so far", end="")
    if sys.argv[1] == "2":
        raise UserError("one line")
    raise KeyboardInterrupt if sys.argv[1] == "130" else ValueError("a bug")
guard(work)
"""


@pytest.mark.parametrize("status", [1, 2, 130])
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_that_fails_does_not_wait_for_the_others(status, processes):
    done = subprocess.run([sys.executable, "-c", FAILING, str(status)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"WORLD_SIZE": str(processes)})
    ended = "" if processes == 2 else "the process group is destroyed\n"
    assert (done.returncode, done.stdout) == (status, "so far" + ended)
    assert ("ValueError: a bug" in done.stderr) == (status == 1)
    assert done.stderr.count("\n") == 1 or status == 1
