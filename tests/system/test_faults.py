"""What goes wrong outside the algorithm: kills, damaged files, full disks, numbers that are not finite, malformed data."""

import contextlib
import copy
import dataclasses
import errno
import functools
import io
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tqdm import tqdm

import common.config
import common.files
import common.checkpoints
import common.run
import model as model_module
import ppo
import reward
import sft
from common.config import UserError
from common.learner import Learner
from common.run import Run
from common.runtime import RuntimeConfig, Runtime
from conftest import cpu, open_run, random_gpt, read_log, ROOT, same, save, weights, write_lines
from data import batches, collect, readers
from data.tokenizer import Tokenizer, train_bpe
from model import ScalarModel, generate

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}
LONG = {"sft": dict(epochs=8, dropout=0.1), "reward": dict(epochs=6), "ppo": dict(iterations=30)}  # some thirty steps each
SHORT = {"sft": dict(epochs=1), "reward": dict(batch_size=16), "ppo": dict(iterations=3)}  # three or four


def config_of(letters, stage, out, **changes):
    return getattr(letters, stage)(out=str(letters.out / out), **changes)


def fork(work, errors=os.devnull):
    """work() in a child, whose stderr goes to `errors`, a path or an open file's number. -> its id"""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent: a child killed with it would keep it for ever
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors if type(errors) is int else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child, within=120):
    """Its exit status, or minus the signal that killed it."""
    limit = time.monotonic() + within
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("a child did not end")
        time.sleep(0.002)


def over(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(condition, within=90):
    limit = time.monotonic() + within
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


def inode(path):
    """Which file stands there: another after each atomic write."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def lines_in(folder):
    path = Path(folder) / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same_run(folder, whole):
    """A folder of a run that was stopped, as if it never had been."""
    strip = lambda log: [{k: repr(v) for k, v in line.items() if k != "episodes_per_second"} for line in log]
    names = lambda where: sorted(path.name for path in Path(where).iterdir())
    assert names(folder) == names(whole)
    assert not [name for name in names(folder) if name.endswith(".tmp") or name.startswith("resume")]
    assert strip(read_log(folder)) == strip(read_log(whole))
    for path in Path(whole).glob("*.pt"):
        assert same(weights(Path(folder) / path.name), weights(path)), path.name
    assert (Path(folder) / "samples.txt").read_text() == (Path(whole) / "samples.txt").read_text()


def nearly(a, b):
    """Two logs of the same steps, numbers equal to 1e-4."""
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for these, those in zip(a, b):
        for key in those.keys() - {"episodes_per_second"}:
            assert these[key] == pytest.approx(those[key], rel=1e-4, abs=1e-4), (those["step"], key)


# ---------------------------------------------------------------- killed

@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_one_that_never_was(letters, stage, every_step):
    module, rng = STAGES[stage], random.Random(stage)
    whole, config = (config_of(letters, stage, name, **LONG[stage]) for name in ("whole", "killed"))
    module.main(whole)
    kills, reached = 0, set()
    while True:
        child, saves = fork(lambda: module.main(config)), kills % 4
        for _ in range(saves if kills < 8 else 0):
            before = inode(Path(config.out) / "resume.pt")
            wait_for(lambda: inode(Path(config.out) / "resume.pt") not in (before, None) or over(child))
        if kills < 8:
            time.sleep(rng.uniform(0, 0.03))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        reached.add(lines_in(config.out))
    assert max(reached) >= 6
    assert kills >= 7
    assert_same_run(config.out, whole.out)


MOMENTS = [(torch, "save"), (os, "replace"), (os, "fsync"), (common.files, "digest"), (Path, "unlink"), (Run, "log"), (shutil, "rmtree")]


def count_moments(n, last):
    """From the checkpoint of step `last` on, or from now if that is 0, count the moments before, within and after each call that touches a file;
    at the n-th, die. -> the counter."""
    seen = [] if last else [0]

    def moment():
        if seen:
            seen.append(1)
            if len(seen) - 1 == n:
                die()

    for owner, name in MOMENTS:
        def call(*args, original=getattr(owner, name), name=name, **more):
            if name == "unlink" and not Path(args[0]).exists():
                return original(*args, **more)
            moment()
            if name == "save" and seen and len(seen) == n:  # the next moment is in the middle of the writing
                buffer = io.BytesIO()
                original(args[0], buffer)
                args[1].write(buffer.getvalue()[: buffer.tell() // 2])
                args[1].flush()
            if name == "save":
                moment()
            result = original(*args, **more)
            moment()
            return result
        setattr(owner, name, call)
    checkpoint = Run.checkpoint

    def begin(self, step):
        if step == last:
            seen.append(0)
        checkpoint(self, step)
    Run.checkpoint = begin
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_of_any_write_a_run_goes_on(letters, stage, every_step):
    module = STAGES[stage]
    whole = config_of(letters, stage, "whole", **SHORT[stage])
    module.main(whole)

    def counting(n):
        seen = count_moments(n, last=4 if stage == "sft" else 3)
        module.main(config_of(letters, stage, f"cut{n}", **SHORT[stage]))
        Path(letters.out / "moments").write_text(str(len(seen) - 1))

    assert ended(fork(lambda: counting(0))) == 0
    moments = int((letters.out / "moments").read_text())
    assert moments > 20
    for n in range(1, moments + 1) if stage == "sft" else range(1, moments + 1, 3):
        config = config_of(letters, stage, f"cut{n}", **SHORT[stage])
        assert ended(fork(lambda: counting(n))) == -signal.SIGKILL
        assert ended(fork(lambda: module.main(config))) == 0
        assert_same_run(config.out, whole.out)


def test_a_killed_rerun_never_leaves_a_model_next_to_the_log_of_another_run(letters):
    old, new = (config_of(letters, "sft", name, seed=seed, **SHORT["sft"]) for name, seed in (("old", 0), ("new", 1)))
    for config in (old, new):
        sft.main(config)
    assert read_log(old.out) != read_log(new.out)

    def over(n):
        folder = letters.out / f"cut{n}"
        if not folder.exists():
            shutil.copytree(old.out, folder)
        return dataclasses.replace(new, out=str(folder))

    def counting(n):
        seen = count_moments(n, last=0)
        sft.main(over(n))
        Path(letters.out / "moments").write_text(str(len(seen) - 1))

    assert ended(fork(lambda: counting(0))) == 0
    assert_same_run(over(0).out, new.out)
    moments = int((letters.out / "moments").read_text())
    assert moments > 30
    for n in range(1, moments + 1):
        assert ended(fork(lambda: counting(n))) == -signal.SIGKILL
        folder, models, logs = Path(over(n).out), [], []
        for where in (folder, folder / "before"):
            if (where / "log.jsonl").exists():
                logs.append(read_log(where))
            if (where / "model.pt").exists():
                models.append(old if same(weights(where / "model.pt"), weights(f"{old.out}/model.pt")) else new)
                assert not (where / "log.jsonl").exists() or logs[-1] == read_log(models[-1].out)
        assert new in models or old in models and read_log(old.out) in logs
        assert ended(fork(lambda: sft.main(over(n)))) == 0
        assert_same_run(folder, new.out)


# ---------------------------------------------------------------- many processes

def fork_ranks(size, work, errors=os.devnull):
    """As torchrun would, without its seconds of start; see fork."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))
        work()
    return [fork(lambda: one(rank), errors) for rank in range(size)]


@pytest.mark.parametrize("stage, how", [("sft", {}), ("ppo", {}), ("sft", dict(shard=True)), ("ppo", dict(shard=True))],
                         ids=["sft", "ppo", "sft, sharded", "ppo, sharded"])
def test_a_run_on_two_ranks_that_is_killed_goes_on_in_one_process(letters, stage, how, every_step):
    module, changes = STAGES[stage], dict(sft=dict(epochs=4), ppo=dict(iterations=6))[stage]
    save(random_gpt(kind=ScalarModel, seed=3), letters.data / "reward.pt", letters.tokenizer)
    whole = config_of(letters, stage, "whole", **changes)
    module.main(whole)
    two = config_of(letters, stage, "two", **changes, **how)
    children = fork_ranks(2, lambda: module.main(two))
    wait_for(lambda: lines_in(two.out) >= 3)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert [ended(child) for child in children] == [-signal.SIGKILL] * 2
    assert not (letters.out / "two/model.pt").exists()
    assert list((letters.out / "two").glob("resume*.pt"))
    one = config_of(letters, stage, "two", **changes)
    module.main(one)
    nearly(read_log(two.out), read_log(whole.out))


DRIVER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import common.config, common.run, sft
start, log = common.run.Run.__init__, common.run.Run.log
common.run.Run.__init__ = lambda self, *rest: start(self, *rest, save_interval=float(sys.argv[3]))
def log_or_die(self, step, **numbers):
    log(self, step, **numbers)
    time.sleep(0.1 * (sys.argv[4] == "live"))
    if sys.argv[4] == "die" and self.runtime.rank == 1 and step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
common.run.Run.log = log_or_die
common.config.guard(lambda: sft.main(sft.Config(**json.load(open(sys.argv[2])))))
"""


def torchrun(letters, config, *arguments, every, what, flags=()):
    (letters.out / "driver.py").write_text(DRIVER)
    file = letters.out / f"{Path(config.out).name}.json"
    file.write_text(json.dumps(vars(config)))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags,
         str(letters.out / "driver.py"), str(ROOT), str(file), str(every), what],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_torchrun_recovers_from_a_killed_rank_and_its_sigterm_saves_the_state(letters):
    whole, killed = (config_of(letters, "sft", name, epochs=3) for name in ("whole", "killed"))
    long, stopped = (config_of(letters, "sft", name, epochs=8) for name in ("long", "stopped"))
    recovering = torchrun(letters, killed, every=-1.0, what="die", flags=["--max-restarts=1"])
    stopping = torchrun(letters, stopped, every=3600.0, what="live")
    wait_for(lambda: lines_in(stopped.out) >= 3)
    stopping.terminate()
    sft.main(whole)
    sft.main(long)
    assert stopping.wait(60) != 0
    assert common.files.load(letters.out / "stopped/resume.pt")["step"] == lines_in(stopped.out) < 8 * 4
    sft.main(stopped)
    nearly(read_log(stopped.out), read_log(long.out))
    try:
        output, _ = recovering.communicate(timeout=90)
    finally:
        recovering.terminate()  # and so its ranks, should they wait for each other
    assert recovering.returncode == 0, output
    nearly(read_log(killed.out), read_log(whole.out))
    assert not list((letters.out / "killed").glob("resume*"))


# ---------------------------------------------------------------- damaged files

def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError):
        common.files.load(path)


def test_a_file_cut_anywhere_or_with_one_flipped_bit_is_refused(tmp_path):
    path, rng = tmp_path / "file.pt", random.Random(0)
    common.files.save(path, {"model": {"w": torch.arange(200.0)}, "model_config": {}})
    data = path.read_bytes()
    assert torch.equal(common.files.load(path)["model"]["w"], torch.arange(200.0))
    for cut in {*range(0, len(data), len(data) // 200), *range(len(data) - 80, len(data))}:
        refused(path, data[:cut])
    for _ in range(200):
        place = rng.randrange(len(data))
        refused(path, data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    refused(path, data + b"\n")
    with pytest.raises(UserError, match="^[^\n]*file.pt is damaged or no checkpoint of this project[^\n]*$"):
        common.checkpoints.load_checkpoint(path, "make sft", cpu())
    path.write_bytes(data)
    common.checkpoints.load_checkpoint(path, "make sft", cpu())


MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import common.files
most = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
common.files.load(sys.argv[2])
before = most()
tensors = common.files.load(sys.argv[3])
print(most() - before, sum(tensor.nbytes for tensor in tensors.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_tensors_and_little_more(tmp_path):
    common.files.save(tmp_path / "small.pt", {"w": torch.zeros(1)})
    common.files.save(tmp_path / "large.pt", {str(i): torch.zeros(size * 2**18) for i, size in enumerate([100] + [10] * 10)})
    done = subprocess.run([sys.executable, "-c", MEMORY, str(ROOT), str(tmp_path / "small.pt"), str(tmp_path / "large.pt")],
                          capture_output=True, text=True)
    grown, size = map(int, done.stdout.split())
    assert size == 200 * 2**20 and 0.9 * size < grown < 1.2 * size


def test_a_file_that_is_replaced_while_it_is_loaded_is_read_as_it_was(tmp_path, monkeypatch):
    path, load = tmp_path / "file.pt", torch.load
    common.files.save(path, {"step": 1})

    def replaced(*rest, **more):
        torch.save({"step": 2}, tmp_path / "other.pt")  # without a seal: what load must not return
        os.replace(tmp_path / "other.pt", path)
        return load(*rest, **more)
    monkeypatch.setattr(torch, "load", replaced)
    assert common.files.load(path) == {"step": 1}


def sealed(path, archive):
    buffer = io.BytesIO()
    torch.save(archive, buffer)
    path.write_bytes(buffer.getvalue())
    path.write_bytes(buffer.getvalue() + common.files.SEAL + common.files.digest(path).encode())


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_under_a_right_seal_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / "file.pt", tmp_path / "run"
    sealed(path, {"model": {}, "model_config": {}})
    assert common.files.load(path) == {"model": {}, "model_config": {}}
    sealed(path, {"model": Evil(str(mark)), "model_config": {}})
    with pytest.raises(ValueError):
        common.files.load(path)
    with pytest.raises(UserError, match="file.pt is damaged or no checkpoint"):
        common.checkpoints.load_checkpoint(path, "make sft", cpu())
    path.rename(tmp_path / "resume.pt")
    with pytest.raises(UserError, match="resume.pt is damaged"):
        open_run(dataclasses.make_dataclass("Config", [("out", str, str(tmp_path))])()).resume()
    assert not mark.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1], "text", None, 3,
    {"model": {}}, {"model_config": {}}],
                         ids=["tensor", "list", "text", "nothing", "number", "no config", "no model"])
def test_what_is_sealed_but_no_checkpoint_is_refused(tmp_path, content):
    common.files.save(tmp_path / "file.pt", content)
    with pytest.raises(UserError, match="file.pt is damaged or no checkpoint"):
        common.checkpoints.load_checkpoint(tmp_path / "file.pt", "make sft", cpu())


def test_a_file_without_the_seal_is_refused(tmp_path):
    torch.save({"model": {}, "model_config": {}}, tmp_path / "file.pt")
    with pytest.raises(ValueError):
        common.files.load(tmp_path / "file.pt")
    with pytest.raises(UserError, match="file.pt is damaged or no checkpoint"):
        common.checkpoints.load_checkpoint(tmp_path / "file.pt", "make sft", cpu())


def killed_at(letters, stage, out, step, **changes):
    """The folder of a run that saved every step and was killed after `step` of them."""
    config = config_of(letters, stage, out, **changes)

    def work():
        checkpoint = Run.checkpoint

        def stop(self, at):
            checkpoint(self, at)
            if at == step:
                die()
        Run.checkpoint = stop
        STAGES[stage].main(config)
    assert ended(fork(work)) == -signal.SIGKILL
    return config


def damage(path, place=1000):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_resume_file_gives_way_to_the_one_before(letters, stage, every_step, capsys):
    whole = config_of(letters, stage, "whole", **SHORT[stage])
    STAGES[stage].main(whole)
    config = killed_at(letters, stage, "damaged", 2, **SHORT[stage])
    folder = letters.out / "damaged"
    assert common.files.load(folder / "resume.before.pt")["step"] == 1
    damage(folder / "resume.pt")
    capsys.readouterr()
    STAGES[stage].main(config)
    assert f"{folder}/resume.pt is damaged; resuming from the one before" in capsys.readouterr().out
    assert_same_run(folder, whole.out)


def test_two_damaged_resume_files_are_refused_and_no_resume_starts_over(letters, every_step):
    config = killed_at(letters, "sft", "damaged", 2)
    for name in ("resume.pt", "resume.before.pt"):
        damage(letters.out / "damaged" / name)
    with pytest.raises(UserError, match="resume.pt is damaged; --no-resume starts over"):
        sft.main(config)
    sft.main(config_of(letters, "sft", "damaged", resume=False))
    assert (letters.out / "damaged/model.pt").exists()


def test_a_damaged_resume_file_does_not_take_the_place_of_the_good_one_before(letters, every_step):
    config = killed_at(letters, "sft", "damaged", 2)
    folder = letters.out / "damaged"
    damage(folder / "resume.pt")

    def killed_while_it_saves():
        torch.save = lambda *rest: die()
        sft.main(config)
    assert ended(fork(killed_while_it_saves)) == -signal.SIGKILL
    whole = []
    for path in folder.glob("resume*.pt"):
        with contextlib.suppress(ValueError):
            whole.append(common.files.load(path))
    assert whole


def resume_in(folder, config, runtime):
    return open_run(dataclasses.replace(config, out=str(folder)), dict(model=random_gpt()), runtime=runtime).resume()


def on_two_ranks(config, folders, wait=0.0):
    """Go on with a run in these folders, a rank each; rank 1 reads `wait` seconds late. -> where it goes on or what it says, by rank"""
    said = [Path(f"{config.out}.rank{rank}") for rank in range(2)]

    def work():
        runtime, load = cpu(), common.files.load_mapped
        common.files.load_mapped = lambda path: time.sleep(wait * runtime.rank) or load(path)
        try:
            said[runtime.rank].write_text(str(resume_in(folders[runtime.rank], config, runtime)))
        except UserError as error:
            said[runtime.rank].write_text(str(error))
    assert [ended(child) for child in fork_ranks(2, work)] == [0, 0]
    return [path.read_text() for path in said]


def test_a_rank_that_reads_late_goes_on_from_the_same_file_as_the_others(letters, every_step):
    config, folder = killed_at(letters, "sft", "damaged", 2), letters.out / "damaged"
    damage(folder / "resume.pt")
    assert on_two_ranks(config, [folder, folder], wait=0.5) == ["1", "1"]
    assert (folder / "resume.damaged").exists() and not (folder / "resume.pt").exists()


def test_ranks_that_find_different_resume_files_all_refuse_to_go_on(letters, every_step):  # pitfall 48
    config = killed_at(letters, "sft", "one", 2)
    for name in ("nothing", "damaged"):
        (letters.out / name).mkdir()
    (letters.out / "damaged/resume.pt").write_text("damaged")
    for other in ("nothing", "damaged"):
        folders = [letters.out / "one", letters.out / other]
        assert on_two_ranks(config, folders) == [
            f"{platform.node()} (rank 1) has no {folders[0]}/resume.pt, unlike {platform.node()} (rank 0); "
            "give all processes the same folder"] * 2


# ---------------------------------------------------------------- asked to stop

def test_sigterm_and_ctrl_c_finish_the_step_and_the_same_command_goes_on(letters):
    flags = ["--data", str(letters.data), "--device", "cpu", "--init", f"{letters.data}/base.pt", "--batch_size", "8",
             "--pretrain_mix", "0.25", "--epochs", "25"]
    whole = config_of(letters, "sft", "whole", epochs=25, dropout=0.1)

    def start(out):
        return subprocess.Popen([sys.executable, str(ROOT / "sft.py"), *flags, "--out", str(letters.out / out)],
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE)
    running = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        running[number] = process = start(number.name)
        wait_for(lambda: lines_in(letters.out / number.name) >= 3)
        process.send_signal(number)
        stderr, folder = process.communicate(timeout=60)[1], letters.out / number.name
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        said = [line for line in re.split("[\r\n]", stderr) if line.strip() and "it/s" not in line and "?it" not in line]
        assert len(said) == 1 and said[0].startswith("sft.py: stopped; a run resumes from its last checkpoint")
        assert common.files.load(folder / "resume.pt")["step"] == lines_in(folder) == len(read_log(folder)) < 100
    again = {number: start(number.name) for number in running}
    sft.main(whole)
    for number, process in again.items():
        assert process.wait(60) == 0, process.communicate()[1]
        assert_same_run(letters.out / number.name, whole.out)


def guarded(config, *, main=sft.main):
    def work():
        sys.argv = ["sft.py"]
        common.config.guard(lambda: main(config))
    return work


def slow_steps():
    loss = sft.masked_loss

    def slow(*rest):
        time.sleep(0.4)
        return loss(*rest)
    sft.masked_loss = slow


@pytest.mark.parametrize("signals, saved", [([signal.SIGINT], True), ([signal.SIGINT, signal.SIGINT], False)])
def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not(letters, signals, saved):
    config = config_of(letters, "sft", "stopped")

    def work():
        slow_steps()
        guarded(config)()
    child = fork(work, letters.out / "stderr")
    wait_for(lambda: lines_in(config.out) >= 1)
    for number in signals:
        time.sleep(0.1)
        os.kill(child, number)
    assert ended(child, within=3) == 130
    assert (letters.out / "stopped/resume.pt").exists() == saved
    assert "Traceback" not in (letters.out / "stderr").read_text()


# ---------------------------------------------------------------- two runs, one folder

def test_a_folder_that_a_run_writes_is_refused_to_another_until_it_ends_or_is_killed(letters, every_step):
    whole, config = config_of(letters, "sft", "whole", epochs=3), config_of(letters, "sft", "shared", epochs=3)
    sft.main(whole)

    def waits():
        log = Run.log

        def slow(self, step, **numbers):
            log(self, step, **numbers)
            if step == 3:
                wait_for(lambda: (letters.out / "go").exists())
        Run.log = slow
        sft.main(config)
    first = fork(waits)
    wait_for(lambda: lines_in(config.out) >= 4)
    before = {path.name: path.read_bytes() for path in (letters.out / "shared").iterdir()}
    for again in (config, config_of(letters, "sft", "shared", resume=False)):
        with pytest.raises(UserError, match=f"{config.out} is being written by another run"):
            sft.main(again)
    with pytest.raises(UserError, match=f"{config.out} is being written by another run"):
        reward.main(config_of(letters, "reward", "shared"))
    assert {path.name: path.read_bytes() for path in (letters.out / "shared").iterdir()} == before
    (letters.out / "go").touch()
    assert ended(first) == 0
    assert_same_run(config.out, whole.out)

    (letters.out / "go").unlink()
    second = fork(waits)
    wait_for(lambda: lines_in(config.out) == 4)
    os.kill(second, signal.SIGKILL)
    ended(second)
    sft.main(config)
    assert_same_run(config.out, whole.out)


def test_comparisons_are_collected_by_one_command_at_a_time_in_a_folder(chain, tmp_path):
    shutil.copytree(chain.data, tmp_path / "data")
    config = dataclasses.replace(chain.collecting, data=str(tmp_path / "data"), append=False)
    comparisons = lambda: [Path(f"{config.data}/comparisons.{split}.jsonl").read_bytes() for split in ("train", "valid")]
    before, part = comparisons(), Path(f"{config.data}/comparisons.train.jsonl.part")

    def waits():
        sample = collect.sample

        def slow(*rest):
            if part.exists() and part.read_bytes().count(b"\n") == 2:  # a batch is done
                time.sleep(60)
            return sample(*rest)
        collect.sample = slow
        collect.main(config)

    def refused():
        with pytest.raises(UserError, match=f"^{config.data} is being written by another run$"):
            collect.main(config)
    first = fork(waits)
    wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") == 2)
    done = part.read_bytes()
    refused()
    assert [ended(child, within=20) for child in fork_ranks(2, refused)] == [0, 0]
    assert part.read_bytes() == done and comparisons() == before
    os.kill(first, signal.SIGKILL)
    ended(first)
    for _ in range(2):  # the second is not in the first one's way
        collect.main(config)
        assert comparisons() == before
    assert ended(fork(lambda: collect.main(config))) == 0


# ---------------------------------------------------------------- numbers that are not finite

def state_of(model, optimizer):
    return copy.deepcopy([[p.detach() for p in model.parameters()], [optimizer.state[p] for p in model.parameters()]])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))


@pytest.fixture
def broken_loss(monkeypatch):
    """broken_loss(stage, steps, factor): the loss of these updates is multiplied by `factor`."""
    names = {"sft": "masked_loss", "reward": "ranking_loss", "ppo": "policy_loss"}

    def install(stage, steps, factor=float("nan")):
        module, count, original = STAGES[stage], [0], getattr(STAGES[stage], names[stage])
        per_update = 8 if stage == "reward" else 1  # prompts of a batch, each with its own loss

        def loss(*rest):
            result = original(*rest)
            value, *more = result if isinstance(result, tuple) else (result,)
            if value.requires_grad:
                count[0] += 1
                if (count[0] - 1) // per_update in steps:
                    value = value * factor
            return (value, *more) if more else value
        monkeypatch.setattr(module, names[stage], loss)
    return install


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", STAGES)
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_no_other(letters, stage, broken_loss, monkeypatch, factor):
    broken_loss(stage, {1, 3}, factor)
    happened, step, first = [], Learner.step, []

    def watched(learner, lr):
        first.append(learner)
        before = state_of(learner.model, learner.optimizer)
        norm = step(learner, lr)
        if learner is first[0]:
            happened.append((equal(before, state_of(learner.model, learner.optimizer)), abs(norm) < float("inf")))
            assert all(p.grad is None for p in learner.model.parameters())
        else:
            assert not equal(before, state_of(learner.model, learner.optimizer))
        return norm
    monkeypatch.setattr(Learner, "step", watched)
    config = getattr(letters, stage)(**dict(sft=dict(epochs=2), reward=dict(), ppo=dict(iterations=3))[stage])
    STAGES[stage].main(config)
    assert happened == [(i in (1, 3), i not in (1, 3)) for i in range(len(happened))] and len(happened) >= 6
    counted = [line["skipped"] for line in read_log(config.out)]
    assert counted == sorted(counted) and counted[0] < 2 == counted[-1]
    assert all(torch.isfinite(w).all() for w in weights(f"{config.out}/model.pt").values())


def test_a_run_that_goes_on_goes_on_counting_what_it_skipped(letters, broken_loss, stop_and_go_on):
    broken_loss("sft", {1})
    config = letters.sft(epochs=2)
    stop_and_go_on(sft.main, config, 3)
    assert [line["skipped"] for line in read_log(config.out)] == [0] + [1] * (len(read_log(config.out)) - 1)


@pytest.mark.parametrize("bad, stops", [({1, 2, 3}, True), ({0, 1, 2}, True), ({0, 1, 3, 4, 6, 7}, False), (set(), False)])
@pytest.mark.parametrize("stage", STAGES)
def test_as_many_in_a_row_as_patience_says_stop_the_run(letters, stage, broken_loss, bad, stops):
    broken_loss(stage, bad)
    changes = dict(sft=dict(epochs=3), reward=dict(epochs=2), ppo=dict(iterations=5))[stage]
    config = getattr(letters, stage)(patience=3, **changes)
    if not stops:
        return STAGES[stage].main(config)
    with pytest.raises(UserError, match=r"not finite 3 times in a row \(--patience\)"):
        STAGES[stage].main(config)
    assert not Path(f"{config.out}/model.pt").exists()


def test_skips_in_a_row_before_a_stop_count_when_the_run_goes_on(letters, broken_loss, stop_and_go_on):
    broken_loss("sft", {1, 2, 3, 4})  # the first of them is saved, the second is made again
    with pytest.raises(UserError, match=r"not finite 3 times in a row \(--patience\)"):
        stop_and_go_on(sft.main, letters.sft(patience=3), step=2)


def test_each_optimizer_goes_on_with_its_own_skips(tmp_path):
    config = dataclasses.make_dataclass("Config", [("out", str, str(tmp_path))])()

    def start():
        learners = {name: Learner(torch.nn.Linear(1, 1), 1e-3, cpu(patience=3)) for name in ("policy", "value")}
        return learners, open_run(config, learners, save_interval=-1.0)

    def update(learner, gradient):
        for weight in learner.model.parameters():
            weight.grad = torch.full_like(weight, gradient)
        learner.step(1e-3)

    learners, run = start()
    run.resume()
    for _ in range(2):
        update(learners["policy"], float("nan"))
        update(learners["value"], 1.0)
    run.checkpoint(1)
    learners, run = start()
    assert run.resume() == 1
    for _ in range(2):
        update(learners["value"], float("nan"))
    with pytest.raises(UserError, match="3 times in a row"):
        update(learners["policy"], float("nan"))


def test_saving_before_the_first_good_update_does_not_change_the_run(letters, broken_loss, monkeypatch):
    broken_loss("sft", {0, 1})
    whole, saving = (config_of(letters, "sft", name) for name in ("whole", "saving"))
    sft.main(whole)
    monkeypatch.undo()
    start = Run.__init__
    broken_loss("sft", {0, 1})
    monkeypatch.setattr(Run, "__init__", lambda self, *rest: start(self, *rest[:5], save_interval=-1.0))
    sft.main(saving)
    assert same(weights(f"{whole.out}/model.pt"), weights(f"{saving.out}/model.pt"))


# ---------------------------------------------------------------- a full disk

def test_what_does_not_fit_the_disk_is_named(tmp_path):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises((UserError, OSError), match="resume.pt"):
        common.files.write_atomically(tmp_path / "resume.pt", full)


@pytest.mark.parametrize("room", [0, 5_000, 60_000, -72, -1])  # bytes a file may have; below 0: less than it takes
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_can_be_resumed_later(letters, stage, every_step, room):
    module = STAGES[stage]
    whole, config = (config_of(letters, stage, name, **SHORT[stage]) for name in ("whole", "full"))
    module.main(whole)
    folder = letters.out / "full"

    def work():
        checkpoint = Run.checkpoint

        def filled(self, step):
            if step == 3:
                size = (self.folder / "resume.pt").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (room if room >= 0 else size + room,) * 2)
            checkpoint(self, step)
        Run.checkpoint = filled
        guarded(config, main=module.main)()
    reading, writing = os.pipe()  # a file would be full as well
    status = ended(fork(work, writing))
    os.close(writing)
    with os.fdopen(reading) as file:
        stderr = file.read()
    assert status == 2, stderr
    said = [line for line in re.split("[\r\n]", stderr) if line.startswith("sft.py: ")]
    assert len(said) == 1 and "Traceback" not in stderr, stderr
    assert not list(folder.glob("*.tmp"))
    states = [common.files.load(path) for path in folder.glob("resume*.pt")]
    assert max(state["step"] for state in states) == 2
    module.main(config)
    assert_same_run(folder, whole.out)


# ---------------------------------------------------------------- 16 bits

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_16_bits_change_the_numbers_by_rounding_only_and_losses_stay_in_float32(letters, stage, precision, monkeypatch):
    seen = set()
    for module, name in ((ppo, "policy_loss"), (ppo, "value_loss"), (reward, "ranking_loss"), (sft, "masked_loss"),
                         (model_module.F, "cross_entropy")):
        def watched(*rest, original=getattr(module, name), name=name, **more):
            result = original(*rest, **more)
            first = result[0] if isinstance(result, tuple) else result
            assert first.dtype == torch.float32, name
            assert name != "cross_entropy" or rest[0].dtype == torch.float32  # the logits
            if name in ("policy_loss", "value_loss", "ranking_loss"):
                assert not torch.is_autocast_enabled("cpu"), name
                assert name == "ranking_loss" or all(x.dtype == torch.float32 for x in rest[:3]), name
            seen.add(name)
            return result
        monkeypatch.setattr(module, name, watched)
    changes = dict(sft={}, reward={}, ppo=dict(iterations=1, temperature=0.7))[stage]
    logs = []
    for how in ("float32", precision):
        config = config_of(letters, stage, how, precision=how, **changes)
        STAGES[stage].main(config)
        logs.append(read_log(config.out))
        assert all(w.dtype == torch.float32 for w in weights(f"{config.out}/model.pt").values())
    assert len(logs[0]) == len(logs[1])
    differ = False
    for a, b in zip(*logs):
        assert a["skipped"] == 0 and b["skipped"] <= (2 if precision == "fp16" else 0)  # until the loss scale is found
        for key in a.keys() - {"episodes_per_second", "accuracy", "valid_accuracy", "held_out_accuracy", "clip_fraction",
                               "skipped"}:
            assert b[key] == pytest.approx(a[key], rel=5e-2, abs=5e-2), (a["step"], key)
            differ |= a[key] != b[key]
    assert differ and seen >= dict(sft={"masked_loss"}, reward={"ranking_loss"},
                                   ppo={"policy_loss", "value_loss", "cross_entropy"})[stage]


def test_the_loss_scale_goes_on_where_it_was(letters, stop_and_go_on, monkeypatch):
    scaler, finish, scales = torch.amp.GradScaler, Run.finish, []
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=2.0**14, growth_interval=1))

    def watched(self):
        scales.append(self.parts["model"].scaler.state_dict())
        finish(self)
    monkeypatch.setattr(Run, "finish", watched)
    whole, stopped = (config_of(letters, "sft", name, precision="fp16", epochs=3) for name in ("whole", "stopped"))
    sft.main(whole)
    stop_and_go_on(sft.main, stopped, step=9)
    assert scales[0] == scales[1] and scales[0]["scale"] != 2.0**14
    assert any(line["grad_norm"] != line["grad_norm"] or line["grad_norm"] == float("inf") for line in read_log(whole.out))
    assert_same_run(stopped.out, whole.out)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_the_same_and_are_not_used_while_sampling(monkeypatch, checkpointed):
    """Traced in earnest, but run without the compiler, which takes half a minute of a CPU."""
    compile, compiled, calls = torch.compile, [], []

    def traced(function, **how):
        compiled.append(function.__qualname__)
        traced_function = compile(function, **how, backend="eager")
        return lambda x: calls.append(x.shape) or traced_function(x)
    monkeypatch.setattr(torch, "compile", traced)
    runtime = Runtime(RuntimeConfig(device="cpu", compile=True, activation_checkpointing=checkpointed))
    plain, placed = random_gpt(), runtime.place(random_gpt())
    for T in (8, 5):
        torch.testing.assert_close(placed(torch.arange(T)[None]), plain(torch.arange(T)[None]))
    assert compiled == ["Block.forward", "Block.forward"] and len(calls) == 4
    with runtime.sampling(placed):
        assert generate(placed, [[1, 2]], 4, torch.zeros(1, 4)) == generate(plain, [[1, 2]], 4, torch.zeros(1, 4))
    assert len(calls) == 4


# ---------------------------------------------------------------- malformed data, strange text

TOKENIZER = Tokenizer("bytes", train_bpe(["hello world, words of a world " * 3], 300))
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                   lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=2),
                   max_leaves=5)
TEXT, COUNT = st.text(st.characters(), max_size=8), st.integers(-1, 4)
RIGHT = {"prompt": TEXT, "response": TEXT, "user": TEXT, "labeler": TEXT, "task": TEXT, "context": TEXT, "target": TEXT,
         "responses": st.lists(TEXT, max_size=4), "ranks": st.lists(COUNT | ANY, max_size=4) | st.lists(COUNT, max_size=4),
         "choices": st.lists(TEXT, max_size=3), "answer": COUNT}


@st.composite
def spoilt_files(draw, kind):
    keys = [*readers.KEYS[kind], *dict(tasks=["target", "choices", "answer"]).get(kind, [])]
    records = [{key: draw(RIGHT[key] if draw(st.integers(0, 5)) else ANY) for key in keys if draw(st.integers(0, 9))}
               for _ in range(draw(st.integers(1, 2)))]
    text = "".join(json.dumps(r, ensure_ascii=draw(st.booleans())) + "\n" for r in records)
    data = bytearray(text.encode("utf-8", "replace"))
    harm = draw(st.sampled_from(["none", "cut", "flip"]))
    place = draw(st.integers(0, len(data) - 1))
    if harm == "cut":
        data = data[: max(1, place)]
    if harm == "flip":
        data[place] ^= draw(st.integers(1, 255))
    return bytes(data)


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons", "prompts", "tasks"])
def test_malformed_lines_are_read_or_refused_by_file_and_line(kind, tmp_path):
    path = tmp_path / f"{kind}.train.jsonl"
    config = sft.Config(data=str(tmp_path))

    @hypothesis.settings(max_examples=250, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(spoilt_files(kind))
    def check(data):
        path.write_bytes(data)
        try:
            records = readers.read_jsonl(path, kind)
            if kind == "demonstrations":
                assert len(batches.load_demonstrations(config.data, "train", TOKENIZER, 64)) == len(records)
            if kind == "comparisons":
                assert len(batches.load_comparisons(config.data, "train", TOKENIZER, 64)) == len(records)
            if kind == "tasks":
                for r in records:
                    assert r["choices"][r["answer"]] if r.get("choices") is not None else r["target"]
        except UserError as error:
            assert re.match(rf"{re.escape(str(path))}:\d+: [^\n]+$", str(error)), str(error)
    check()


STRANGE = {"end of text": "a <|endoftext|> b <|endoftext|>", "controls": "".join(map(chr, [*range(32), *range(127, 160)])),
           "right to left": "\u202eabc\u202c \u200f\u0627\u0644\u0639 \u2067x\u2069",
           "joiners": "\u200d\ufeff\u200b" * 9 + "👩\u200d👩\u200d👧",
           "lone surrogates": json.loads(r'"\ud800 a \udfff\ud800"'), "marks": "e" + "\u0301" * 500}
WORDS = random.Random(0).choices(["hello", "world", "of", "zebra", "é"], k=200_000)
HUGE = {"letter": "a" * 10**6, "words": " ".join(WORDS), "spaces": " " * 10**6}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_text_is_ordinary_text(name):
    text, ids = STRANGE[name], TOKENIZER.encode(STRANGE[name])
    assert ids and TOKENIZER.end_of_text not in ids and TOKENIZER.encode_batch([text]) == [ids]
    if name != "lone surrogates":
        assert TOKENIZER.decode(ids) == text


def as_every_kind(folder, text):
    write_lines(folder / "demonstrations.train.jsonl", [{"prompt": text, "response": text}])
    write_lines(folder / "comparisons.train.jsonl",
                [{"prompt": text, "responses": [text, "b"], "ranks": [1, 2], "labeler": "l"}])
    write_lines(folder / "prompts.train.jsonl", [{"prompt": text, "user": "u"}])
    config, prompts = sft.Config(data=str(folder)), folder / "prompts.train.jsonl"
    return [lambda most: batches.load_demonstrations(config.data, "train", TOKENIZER, most),
            lambda most: batches.load_comparisons(config.data, "train", TOKENIZER, most),
            lambda most: readers.encode_prompts(readers.read_jsonl(prompts, "prompts"), TOKENIZER, most, prompts)]


@pytest.mark.parametrize("name", STRANGE)
def test_the_stages_read_strange_text_or_say_that_it_is_too_long(name, tmp_path):
    for load in as_every_kind(tmp_path, STRANGE[name]):
        assert len(load(10_000)) == 1
        with pytest.raises(UserError, match=r"train.jsonl:1: [^\n]*$"):
            load(2)


@pytest.mark.parametrize("name", list(HUGE))
def test_a_prompt_of_a_million_characters_is_refused_within_ten_seconds(name, tmp_path):
    began = time.monotonic()
    for load in as_every_kind(tmp_path, HUGE[name]):
        with pytest.raises(UserError, match=r"train.jsonl:1: [^\n]*$"):
            load(1024)
    assert time.monotonic() - began < 10
