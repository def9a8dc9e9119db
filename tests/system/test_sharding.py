"""--shard: checkpoints in parts, memory per process, resuming on other numbers of processes, sampling from a whole copy."""

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import common.checkpoints
import common.files
import common.run
import sft
from common.config import UserError
from conftest import ROOT, cpu, load_model, random_gpt, read_log, same, save
from model import GPT, GPTConfig, ScalarModel
from test_faults import (SHORT, STAGES, Evil, assert_same_run, config_of, count_moments, die, ended, fork, fork_ranks, lines_in,
                         nearly, wait_for)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def torchrun(script, size, *arguments):
    """Run a script, a text, on so many processes -> (exit status, what it printed)."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", script,
                           str(ROOT), *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    return done.returncode, done.stdout


def one_rank():
    """Make this process the only rank of a group, as torchrun --nproc_per_node=1 would."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")


# ---------------------------------------------------------------- memory

MEMORY = """
import dataclasses, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common import checkpoints, files
from common.learner import Learner
from common.run import Run
from common.runtime import Runtime, RuntimeConfig
from model import GPT, GPTConfig, ScalarModel

folder = Path(sys.argv[2])
MIB = 2**20

class Tokenizer:
    fingerprint, vocab_size = "tokenizer", 64

def memory():  # of this process alone, in bytes
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(("RssAnon", "RssShmem")))

def peak(work):  # -> what work() returns, and the most memory above that before it
    start = most = memory()
    over = []
    def watch():
        nonlocal most
        while not over:
            most = max(most, memory())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    over.append(True)
    watcher.join()
    return result, max(most, memory()) - start

config = GPTConfig(vocab_size=64, context=64, layers=8, heads=8, width=512)
runtime = Runtime(RuntimeConfig(device="cpu", shard=True))
with torch.device("meta"):
    whole = GPT(config)
size, block = (4 * sum(p.numel() for p in module.parameters()) for module in (whole, whole.blocks[0]))
share = size / runtime.world_size

# Libraries allocate for themselves the first time.
tiny = runtime.new_model(GPT, dataclasses.replace(config, layers=1, width=64))
checkpoints.save(folder / "tiny.pt", {"model_config": vars(tiny.config), "tokenizer": "tokenizer"},
                 {"model": checkpoints.model_tensors(tiny, runtime)}, runtime)
checkpoints.load_model(GPT, folder / "tiny.pt", "", Tokenizer, runtime)

if runtime.is_main and not (folder / "whole.pt").exists():
    torch.manual_seed(0)
    model = GPT(config)
    files.save(folder / "whole.pt", {"model": model.state_dict(), "model_config": vars(config), "tokenizer": "tokenizer"})
    model.save_gpt2(folder / "gpt2")
    del model
    runtime.barrier()
else:
    runtime.barrier()

def check(what, grown, shares, of_state=1):
    grown = max(runtime.all_gather([grown]))
    limit = 1.3 * shares * share + block
    if runtime.is_main:
        print(f"{what}: {grown / MIB:.1f} of at most {limit / MIB:.1f} MiB", flush=True)
    assert grown <= limit, what

def load(kind, path, **more):
    return peak(lambda: checkpoints.load_model(kind, path, "", Tokenizer, runtime, **more))

model, grown = peak(lambda: runtime.new_model(GPT, config))
check("random weights", grown, 1)
for what, path in (("a file", folder / "whole.pt"), ("GPT-2's weights", folder / "gpt2")):
    loaded, grown = load(GPT, path)
    check(what, grown, 1)
    del loaded
loaded, grown = load(ScalarModel, folder / "whole.pt", new_head=True)
check("a reward model of a file", grown, 1)
del loaded

learner = Learner(model, 1e-3, runtime)
out = dataclasses.make_dataclass("Config", [("out", str, str(folder / "run"))])()
run = Run(out, runtime, Tokenizer, [], {"policy": learner}, save_interval=-1.0)
run.resume()
learner.backward(learner(torch.zeros(2, 8, dtype=torch.long)).square().mean())
learner.step(1e-3)
_, grown = peak(lambda: run.checkpoint(1))  # weights and two averages
check("saving the state", grown, 3)
assert grown < share + block  # they are written as they are
_, grown = peak(lambda: run.save_model(model))
check("saving the model", grown, 1)
loaded, grown = load(GPT, folder / "run/model.pt")
check("a folder", grown, 1)
del learner, model, loaded
again = Learner(runtime.new_model(GPT, config), 1e-3, runtime)
run = Run(out, runtime, Tokenizer, [], {"policy": again}, save_interval=-1.0)
step, grown = peak(run.resume)
assert step == 1
check("resuming", grown, 3)  # gradients and two averages
"""


@LINUX
def test_starting_and_saving_take_little_more_than_a_process_s_share_of_memory(tmp_path):
    (tmp_path / "memory.py").write_text(MEMORY)
    status, output = torchrun(tmp_path / "memory.py", 4, tmp_path)
    assert status == 0 and output.count("of at most") == 8, output
    print(output)


# ---------------------------------------------------------------- the same weights

class WithBuffers(GPT):
    """A model changed by a student: tables that are no weights, saved with it or not."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks[0].register_buffer("angles", torch.arange(5.0), persistent=False)
        self.register_buffer("scale", torch.full((3,), 2.0))


def assert_buffers_are_right(model):
    assert torch.equal(model.blocks[0].angles, torch.arange(5.0)) and torch.equal(model.scale, torch.full((3,), 2.0))
    assert "scale" in model.state_dict() and "blocks.0.angles" not in model.state_dict()


def test_buffers_of_a_changed_model_keep_their_values_sharded_or_loaded(tmp_path):
    class Tokenizer:
        fingerprint = "a"
    config = GPTConfig(vocab_size=9, context=16, layers=2, heads=2, width=16)
    whole = WithBuffers(config)
    common.files.save(tmp_path / "model.pt", dict(model=whole.state_dict(), model_config=vars(config), tokenizer="a"))
    loaded = common.checkpoints.load_model(WithBuffers, tmp_path / "model.pt", "", Tokenizer, cpu())
    assert_buffers_are_right(loaded)
    errors = tmp_path / "errors"

    def work():
        one_rank()
        assert_buffers_are_right(cpu(shard=True).new_model(WithBuffers, config))
        assert_buffers_are_right(common.checkpoints.load_model(WithBuffers, tmp_path / "model.pt", "", Tokenizer, cpu(shard=True)))
    assert ended(fork(work, str(errors))) == 0, errors.read_text()


SAME = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common import checkpoints
from common.runtime import Runtime, RuntimeConfig
from model import GPT, GPTConfig, ScalarModel

runtime = Runtime(RuntimeConfig(device="cpu", shard=True))
for kind in (GPT, ScalarModel):
    config = GPTConfig(vocab_size=50, context=32, layers=3, heads=2, width=32)
    torch.manual_seed(5)
    whole, after = kind(config), torch.rand(1)
    torch.manual_seed(5)
    sharded = runtime.new_model(kind, config)
    assert torch.equal(torch.rand(1), after)  # later random numbers are the same, too
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b.detach().full_tensor()), name
        assert b.to_local().numel() < a.numel() or len(a) == 1
print("right", flush=True)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_the_initial_weights_do_not_depend_on_sharding(tmp_path, size):
    (tmp_path / "same.py").write_text(SAME)
    status, output = torchrun(tmp_path / "same.py", size)
    assert status == 0 and output.count("right") == size, output


# ---------------------------------------------------------------- stopped and resumed

@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("before, after", [((2, True), (4, True)), ((4, True), (1, False)), ((1, False), (2, True))],
                         ids=["2 sharded, 4 sharded", "4 sharded, 1 whole", "1 whole, 2 sharded"])
def test_a_killed_run_resumes_on_another_number_of_processes_sharded_or_not(letters, stage, before, after, every_step):
    module, changes = STAGES[stage], dict(sft=dict(epochs=3), ppo=dict(iterations=6))[stage]
    save(random_gpt(kind=ScalarModel, seed=3), letters.data / "reward.pt", letters.tokenizer)
    whole = config_of(letters, stage, "whole", **changes)
    module.main(whole)
    for (size, shard), is_last in ((before, False), (after, True)):
        config = config_of(letters, stage, "run", **changes, shard=shard)
        children = fork_ranks(size, lambda: module.main(config)) if size > 1 else [fork(lambda: module.main(config))]
        if not is_last:
            wait_for(lambda: lines_in(config.out) >= 3)
            for child in children:
                os.kill(child, signal.SIGKILL)
        assert [ended(child) for child in children] == [0 if is_last else -signal.SIGKILL] * size
        assert is_last or list((letters.out / "run").glob("resume*.pt"))
    nearly(read_log(config.out), read_log(whole.out))
    a, b = (load_model(GPT, letters.out / run / "model.pt") for run in ("run", "whole"))
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_killed_at_any_moment_of_saving_parts_a_run_resumes_to_the_same_bits(letters, stage, every_step, monkeypatch):
    module = STAGES[stage]
    save_parts = dcp.save

    def run(out, n=None):
        one_rank()
        config = config_of(letters, stage, out, **SHORT[stage], shard=True)
        if n is not None:
            seen = count_moments(n, last=3)
            dcp.save = common.checkpoints.dcp.save = save_parts
        module.main(config)
        if n == 0:
            (letters.out / "moments").write_text(str(len(seen) - 1))

    assert ended(fork(lambda: run("whole"))) == 0
    assert (letters.out / "whole/model.pt/state.pt").is_file()
    assert ended(fork(lambda: run("cut0", 0))) == 0
    moments = int((letters.out / "moments").read_text())
    assert moments > 40
    for n in random.Random(stage).sample(range(1, moments + 1), 10 if stage == "sft" else 5):
        assert ended(fork(lambda: run(f"cut{n}", n))) == -signal.SIGKILL
        assert ended(fork(lambda: run(f"cut{n}"))) == 0
        assert_same_run(letters.out / f"cut{n}", letters.out / "whole")


def test_a_killed_rank_leaves_a_state_that_all_can_resume_from(letters, every_step):
    """One of three ranks dies while it writes its part."""
    whole = config_of(letters, "sft", "whole", epochs=2)
    sft.main(whole)
    config = config_of(letters, "sft", "run", epochs=2, shard=True)

    def work():
        write, calls = dcp.FileSystemWriter.write_data, []

        def dying(self, plan, planner):
            calls.append(1)
            if os.environ["RANK"] == "1" and len(calls) == 4:
                die()
            return write(self, plan, planner)
        dcp.FileSystemWriter.write_data = dying
        sft.main(config)

    children = fork_ranks(3, work)
    assert ended(children[1]) == -signal.SIGKILL
    for child in (children[0], children[2]):
        os.kill(child, signal.SIGKILL)
        ended(child)
    children = fork_ranks(3, lambda: sft.main(config))
    assert [ended(child) for child in children] == [0] * 3
    nearly(read_log(config.out), read_log(whole.out))
    assert not list(Path(config.out).glob("*.tmp")) and not list(Path(config.out).glob("resume*"))


# ---------------------------------------------------------------- damaged, manipulated, no room

def parts(folder, model=None):
    """A checkpoint in parts, made in this process alone."""
    errors = folder.parent / "errors"

    def work():
        one_rank()
        runtime = cpu(shard=True)
        placed = runtime.place(model or random_gpt(seed=2))
        state = {"model_config": vars(placed.config), "tokenizer": "a", "step": 1, "config": {}, "inputs": {}}
        common.checkpoints.save(folder, state, {"model": common.checkpoints.model_tensors(placed, runtime)}, runtime)
    assert ended(fork(work, str(errors))) == 0, errors.read_text()


LOAD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common import checkpoints
from common.runtime import Runtime, RuntimeConfig
from model import GPT

class Tokenizer:
    fingerprint = "a"

model = checkpoints.load_model(GPT, Path(sys.argv[2]) / "model.pt", "", Tokenizer, Runtime(RuntimeConfig(device="cpu")))
expected = torch.load(Path(sys.argv[2]) / "expected.pt", weights_only=True)
assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
print("right", flush=True)
"""


def test_a_checkpoint_in_parts_is_loaded_whole_by_several_processes(tmp_path):
    model = random_gpt(seed=2)
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    parts(tmp_path / "model.pt", model)
    (tmp_path / "load.py").write_text(LOAD)
    status, output = torchrun(tmp_path / "load.py", 2, tmp_path)
    assert status == 0 and output.count("right") == 2, output


def test_a_checkpoint_in_parts_is_loaded_by_a_gpu(tmp_path, monkeypatch):
    """As on any device whose tensors get_model_state_dict would copy: what is filled must be the model's own."""
    class Tokenizer:
        fingerprint = "a"
    model = random_gpt(seed=2)
    parts(tmp_path / "model.pt", model)

    def as_on_a_gpu(model, options):
        return {name: weight.clone() if options.cpu_offload else weight for name, weight in model.state_dict().items()}
    monkeypatch.setattr(common.checkpoints, "get_model_state_dict", as_on_a_gpu)
    loaded = common.checkpoints.load_model(GPT, tmp_path / "model.pt", "", Tokenizer, cpu())
    assert same(loaded.state_dict(), model.state_dict())


def test_what_a_sharded_run_left_half_written_does_not_stop_an_unsharded_one(tmp_path):
    (tmp_path / "file.pt.tmp").mkdir()
    (tmp_path / "file.pt.tmp/state.pt").write_text("half")
    common.files.save(tmp_path / "file.pt", {"step": 1})
    assert common.files.load(tmp_path / "file.pt") == {"step": 1} and not (tmp_path / "file.pt.tmp").exists()


def test_a_checkpoint_in_parts_is_loaded_by_one_process(tmp_path):
    class Tokenizer:
        fingerprint = "a"
    model = random_gpt(seed=2)
    parts(tmp_path / "model.pt", model)
    loaded = common.checkpoints.load_model(GPT, tmp_path / "model.pt", "", Tokenizer, cpu())
    assert same(loaded.state_dict(), model.state_dict())
    resized = common.checkpoints.load_model(GPT, tmp_path / "model.pt", "", Tokenizer, cpu(), context=7)
    assert torch.equal(resized.positions.weight, model.positions.weight[:7])
    with pytest.raises(UserError, match="model.pt holds no ScalarModel"):
        common.checkpoints.load_model(ScalarModel, tmp_path / "model.pt", "", Tokenizer, cpu())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.pt"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_damaged_part_is_refused(tmp_path, name, how):
    parts(tmp_path / "model.pt")
    path = tmp_path / "model.pt" / name
    data = path.read_bytes()
    common.checkpoints.load_checkpoint(tmp_path / "model.pt", "", cpu())
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "cut" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    problem = "is missing" if (name, how) == ("state.pt", "missing") else "is damaged or no checkpoint"
    with pytest.raises(UserError, match=f"model.pt {problem}"):
        common.checkpoints.load_checkpoint(tmp_path / "model.pt", "make", cpu())


def test_code_in_a_manipulated_folder_is_not_run(tmp_path):
    """Its checksums are right."""
    class Tokenizer:
        fingerprint = "a"
    folder, mark = tmp_path / "model.pt", tmp_path / "run"
    parts(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(str(mark))))
    state = common.files.load(folder / "state.pt")
    state["files"][".metadata"] = common.files.digest(folder / ".metadata")
    common.files.save(folder / "state.pt", state)
    with pytest.raises(UserError, match="model.pt could not be read"):
        common.checkpoints.load_model(GPT, folder, "", Tokenizer, cpu())
    assert not mark.exists()


def test_a_damaged_state_in_parts_is_kept_and_the_one_before_resumed(letters, every_step):
    whole = config_of(letters, "sft", "whole", epochs=2)
    sft.main(whole)
    config = config_of(letters, "sft", "run", epochs=2, shard=True)
    folder = Path(config.out)

    def work():
        log = common.run.Run.log

        def stop(self, step, **numbers):
            log(self, step, **numbers)
            if step == 4:
                die()
        common.run.Run.log = stop
        sft.main(config)
    children = fork_ranks(2, work)
    assert [ended(child) for child in children] == [-signal.SIGKILL] * 2
    part = folder / "resume.pt/__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-9])
    children = fork_ranks(2, lambda: sft.main(config))
    assert [ended(child) for child in children] == [0, 0]
    nearly(read_log(config.out), read_log(whole.out))


def test_a_full_disk_costs_one_line_and_not_the_state_before(letters, every_step):
    config, errors = config_of(letters, "sft", "run", epochs=2, shard=True), letters.out / "errors"

    def work():
        write, calls = dcp.FileSystemWriter.write_data, []

        def filling(self, plan, planner):
            calls.append(1)
            if len(calls) == 3 and os.environ["RANK"] == "1":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return write(self, plan, planner)
        dcp.FileSystemWriter.write_data = filling
        common.config.guard(lambda: sft.main(config))

    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    children = fork_ranks(2, work, file)
    assert [ended(child) for child in children] == [2, 2], errors.read_text()
    lines = [line for line in errors.read_text().splitlines() if "could not be written" in line]
    assert len(lines) == 2 and "File too large" in lines[0], errors.read_text()
    assert common.files.load(Path(config.out) / "resume.before.pt/state.pt")["step"] == 2
    assert not list(Path(config.out).glob("*.tmp"))


# ---------------------------------------------------------------- sampling

SAMPLING = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from common.runtime import Runtime, RuntimeConfig
from model import GPT, GPTConfig, generate

torch.manual_seed(0)
config = GPTConfig(vocab_size=9, context=64, layers=2, heads=2, width=32)
whole = GPT(config).eval()
gathers = []
for name in ("all_gather_into_tensor", "all_gather_single"):  # FSDP's, in earlier versions of PyTorch and in later ones
    if hasattr(dist, name):
        def counted(*rest, gather=getattr(dist, name), **more):
            gathers.append(1)
            return gather(*rest, **more)
        setattr(dist, name, counted)
from torch.distributed.tensor import DTensor
full = DTensor.full_tensor
DTensor.full_tensor = lambda self, **more: gathers.append(1) or full(self, **more)
for copy in (True, False):
    runtime = Runtime(RuntimeConfig(device="cpu", shard=True, sampling_copy=copy))
    torch.manual_seed(0)
    sharded = runtime.new_model(GPT, config)
    counts = []
    for length in (6, 30):
        prompts = [[1, 2, 3], [4], [5, 6]][: 3 - runtime.rank]  # ranks have different numbers of rows
        uniforms = torch.rand(3, length, generator=torch.Generator().manual_seed(runtime.rank))[: len(prompts)]
        gathers.clear()
        with runtime.sampling(sharded) as model:
            found = generate(model, prompts, length, uniforms)
        counts.append(len(gathers))
        assert found == generate(whole, prompts, length, uniforms), runtime.rank
    # A whole copy is gathered once, whatever the length; without, each token gathers each block.
    assert (counts[0] == counts[1]) == copy and counts[0] > 0, counts
    logits = sharded(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(logits, whole(torch.tensor([[1, 2, 3]])))
    assert isinstance(next(sharded.parameters()), DTensor)
print("right", flush=True)
"""


def test_sampling_where_it_is_sharded_gathers_once_or_for_each_token(tmp_path):
    (tmp_path / "sampling.py").write_text(SAMPLING)
    status, output = torchrun(tmp_path / "sampling.py", 2)
    assert status == 0 and output.count("right") == 2, output
