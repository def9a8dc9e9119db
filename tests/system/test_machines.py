"""Two machines, acted on one: their processes see another machine name and start in another folder."""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import common.config
import common.files
import evaluate
import ppo
import reward
import sft
from common.run import Run
from conftest import ROOT, read_log
from data import collect
from test_faults import ended, fork, fork_ranks, lines_in, nearly, wait_for

STAGES = {"sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate, "collect": collect}


# ---------------------------------------------------------------- separate folders: what is refused

@contextlib.contextmanager
def meeting_place(size):
    """The store that torchrun would keep, and the environment it would give the processes."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield lambda rank: os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo")


def two_machines(folders, main, configs, prepare=lambda: None):
    """main(config) in node1 and node2, one process each, in these folders; prepare() runs in node2's first.
    -> exit statuses, lines printed"""
    with meeting_place(2) as enter:
        def work(rank):
            os.chdir(folders[rank])
            platform.node = lambda: f"node{rank + 1}"
            sys.argv = ["stage.py"]
            enter(rank)
            if rank == 1:
                prepare()
            common.config.guard(lambda: main(configs[rank]))

        said = [folder.parent / f"{folder.name}.stderr" for folder in folders]
        children = [fork(lambda rank=rank: work(rank), said[rank]) for rank in range(2)]
        statuses = [ended(child) for child in children]
    lines = [[line for line in path.read_text().splitlines() if "%|" not in line and line.strip()] for path in said]
    return statuses, lines


@pytest.fixture
def separate(letters):
    """Two folders with a copy of the letters each, and a stage's Config with relative paths."""
    folders = [letters.out / "node1", letters.out / "node2"]
    for folder in folders:
        shutil.copytree(letters.data, folder / "letters")

    def config_of(stage, **changes):
        config = getattr(letters, stage)(**changes)
        paths = {name: os.path.relpath(value, letters.out) for name, value in vars(config).items()
                 if isinstance(value, str) and value.startswith("/")}
        return dataclasses.replace(config, **paths)
    return folders, config_of


def change(path):
    old, new = (b"\1", b"\2") if path.suffix == ".bin" else (b'": "', b'": "h')
    path.write_bytes(path.read_bytes().replace(old, new, 1))


FILES = {"sft": ["letters/demonstrations.train.jsonl", "letters/demonstrations.valid.jsonl", "letters/pretrain.train.bin",
                 "letters/base.pt"],
         "reward": ["letters/comparisons.train.jsonl", "letters/comparisons.valid.jsonl", "letters/sft.pt"],
         "ppo": ["letters/prompts.train.jsonl", "letters/reward.pt"]}


@pytest.mark.parametrize("stage, file", [(stage, file) for stage in FILES for file in FILES[stage]])
def test_a_machine_without_an_input_file_or_with_another_is_named(separate, stage, file):
    folders, config_of = separate
    path, config = folders[1] / file, config_of(stage)
    if path.suffix == ".pt":
        shutil.copy(folders[1] / ("letters/base.pt" if "base" not in file else "letters/sft.pt"), path)
    else:
        change(path)
    expected = f"stage.py: node2 (rank 1) has another {file} than node1 (rank 0); all processes need the same"
    statuses, (first, second) = two_machines(folders, STAGES[stage].main, [config, config])
    assert statuses == [2, 2] and first == second == [expected], (first, second)
    path.unlink()
    statuses, (first, second) = two_machines(folders, STAGES[stage].main, [config, config])
    assert statuses == [2, 2] and len(first) == len(second) == 1, (first, second)
    assert re.match(rf"stage.py: node2 \(rank 1\).* {file} ?", first[0]) or f"node2 (rank 1): {file} is missing" in first[0]
    assert f"{file}" in second[0] and not (folders[0] / config.out / "log.jsonl").exists()


def fake_version():
    torch.__version__ = "2.0.0"


def fake_code():
    digest = common.files.digest
    common.files.digest = lambda path: "other" if Path(path).name == "model.py" else digest(path)


@pytest.mark.parametrize("changes, prepare, what", [
    (dict(lr=0.5), lambda: None, "--lr"), (dict(batch_size=16), lambda: None, "--batch_size"),
    (dict(out="elsewhere"), lambda: None, "--out"), (dict(micro_batch=1), lambda: None, "--micro_batch"),
    (dict(precision="bf16"), lambda: None, "precision"), ({}, fake_version, "version of PyTorch"), ({}, fake_code, "model.py")])
def test_a_machine_with_other_settings_or_versions_is_named(separate, changes, prepare, what):
    folders, config_of = separate
    configs = [config_of("sft"), dataclasses.replace(config_of("sft"), **changes)]
    statuses, (first, second) = two_machines(folders, sft.main, configs, prepare)
    assert statuses == [2, 2]
    assert first == second == [
        f"stage.py: node2 (rank 1) has another {what} than node1 (rank 0); all processes need the same"]


def test_a_machine_without_the_device_is_named_and_the_others_do_not_wait_for_it(separate):
    folders, config_of = separate
    configs = [config_of("sft"), dataclasses.replace(config_of("sft"), device="tpu")]
    statuses, (first, second) = two_machines(folders, sft.main, configs)
    assert statuses == [2, 2] and len(first) == len(second) == 1
    assert first[0].startswith("stage.py: node2 (rank 1): --device tpu: ") and "--device tpu" in second[0]


def test_without_a_shared_folder_a_run_cannot_be_resumed_and_the_next_stage_finds_no_model(separate, monkeypatch):
    folders, config_of = separate
    config = config_of("sft")
    with monkeypatch.context() as patch:
        log = Run.log
        patch.setattr(Run, "log", lambda self, step, **numbers: log(self, step, **numbers) or setattr(
            common.config.Interrupt, "asked", step == 2))
        statuses, _ = two_machines(folders, sft.main, [config, config])
    assert statuses == [130, 130] and (folders[0] / config.out / "resume.pt").exists()
    statuses, lines = two_machines(folders, sft.main, [config, config])
    assert statuses == [2, 2] and lines == [["stage.py: node2 (rank 1) has no sft/resume.pt, unlike node1 (rank 0); "
                                             "give all processes the same folder"]] * 2
    next_stage = config_of("reward", init=str(folders[0].parent / "sft/model.pt"))
    (folders[0] / "sft/resume.pt").rename(folders[0] / "sft/model.pt")
    statuses, lines = two_machines(folders, reward.main, [next_stage, next_stage])
    assert statuses == [2, 2] and lines == [["stage.py: node2 (rank 1) has no sft/model.pt, unlike node1 (rank 0); "
                                             "all processes need the same"]] * 2


@pytest.mark.parametrize("file", ["data/prompts.test.jsonl", "data/tasks.test.jsonl", "out/ppo/model.pt", "out/reward/model.pt",
                                  "out/sft/epoch1.pt"])
def test_a_report_is_refused_if_machines_have_other_data_or_models(chain, tmp_path, file):
    folders = copies_of(chain, tmp_path)
    shutil.copy(folders[1] / file.replace("test", "valid").replace("ppo/", "sft/").replace("epoch1", "epoch2")
                if "reward" not in file else reordered(folders[1] / file), folders[1] / f"{file}.new")
    (folders[1] / f"{file}.new").rename(folders[1] / file)
    config = dataclasses.replace(chain.report, data="data", out="out")
    statuses, (first, second) = two_machines(folders, evaluate.main, [config, config])
    assert statuses == [2, 2] and first == second == [
        f"stage.py: node2 (rank 1) has another {file} than node1 (rank 0); all processes need the same"], (first, second)


def copies_of(chain, folder):
    folders = [folder / "node1", folder / "node2"]
    for node in folders:
        shutil.copytree(chain.data, node / "data")
        shutil.copytree(chain.out, node / "out")
    return folders


def reordered(path):
    """Another reward model: a head that says the opposite."""
    state = common.files.load(path)
    state["model"]["head.weight"].neg_()
    common.files.save(path, state)
    return path


@pytest.mark.parametrize("what", ["out/sft/model.pt", "data/prompts.train.jsonl", "data/comparisons.valid.jsonl.part"])
def test_comparisons_are_refused_if_machines_have_other_models_prompts_or_parts(chain, tmp_path, what):
    folders = copies_of(chain, tmp_path)
    config = dataclasses.replace(chain.collecting, data="data", sources="out/sft/model.pt@1", append=False)
    if what.endswith("part"):
        with contextlib.chdir(folders[0]):
            stop_after_one_batch(config)
    elif what.endswith("jsonl"):
        change(folders[1] / what)
    else:
        shutil.copy(folders[1] / "out/base/model.pt", folders[1] / what)
    statuses, (first, second) = two_machines(folders, collect.main, [config, config])
    advice = "all processes need the same" + " folder" * what.endswith("part")
    assert statuses == [2, 2] and first == second == [
        f"stage.py: node2 (rank 1) has another {what} than node1 (rank 0); {advice}"], (first, second)


def stop_after_one_batch(config):
    """Of the training prompts; the validation prompts are done."""
    with pytest.MonkeyPatch.context() as patch:
        rank_responses = collect.rank_responses

        def stop(*arguments):
            if arguments[5:7] == ("train", 1):
                raise KeyboardInterrupt
            return rank_responses(*arguments)
        patch.setattr(collect, "rank_responses", stop)
        with pytest.raises(KeyboardInterrupt):
            collect.main(config)
    common.files.unlock(config.data)


# ---------------------------------------------------------------- a shared folder, real torchruns

DRIVER = """
import sys, time
sys.path.insert(0, {root!r})
import common.config, common.run, sft
start, log = common.run.Run.__init__, common.run.Run.log
common.run.Run.__init__ = lambda self, *rest: start(self, *rest, save_interval={interval})
common.run.Run.log = lambda self, step, **numbers: log(self, step, **numbers) or time.sleep(0.1)
common.config.launch(sft.main, sft.Config)
"""
FLAGS = ["--data", "letters", "--init", "letters/base.pt", "--batch_size", "8", "--pretrain_mix", "0.25", "--dropout", "0.1",
         "--epochs", "8", "--device", "cpu", "--out", "sft"]  # 32 steps
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def whole(letters):
    """The folder of an uninterrupted run on one machine with four processes, in the background."""
    def work():
        os.chdir(letters.out)
        sft.main(common.config.parse_config(sft.Config, [*FLAGS, "--out", "whole"]))
    children = fork_ranks(4, work)
    yield lambda: letters.out / "whole" if [ended(child) for child in children] == [0] * 4 else None


def assert_like(folder, whole):
    """A finished run with the numbers of another, but for rounding."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    nearly(read_log(folder), read_log(whole))


def a_free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def descendants(process):
    """The ids of a process's children, their children, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def program(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/exe").resolve()


def kill_machine(process):
    """All of it at once, as when the power fails."""
    for number in (process.pid, *descendants(process.pid)):
        os.kill(number, signal.SIGKILL)


def test_a_run_on_two_machines_that_loses_one_ends_and_resumes_with_the_numbers_of_one(letters, whole):
    (letters.out / "driver.py").write_text(DRIVER.format(root=str(ROOT), interval=-1.0))

    def start(name):
        port = a_free_port()
        return [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=localhost:{port}", f"--rdzv_id={name}", "driver.py", *FLAGS],
            cwd=letters.out, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]

    running = start("first")
    wait_for(lambda: lines_in(letters.out / "sft") >= 4)
    kill_machine(running[1])
    assert running[0].wait(30) == 1
    assert not (letters.out / "sft/model.pt").exists() and (letters.out / "sft/resume.pt").exists()
    step = max(common.files.load(path)["step"] for path in (letters.out / "sft").glob("resume*.pt"))
    again = start("second")
    outputs = [process.communicate(timeout=90)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert f"| {step}/32 [00:00<?" in "".join(outputs)  # the progress bar starts there
    assert_like(letters.out / "sft", whole())


# ---------------------------------------------------------------- the Slurm script of the documentation

STUBS = {
    "scontrol": """case "$1" in show) echo localhost; echo localhost;; *) echo "$@" >> scontrol.log;; esac""",
    "scancel": """[ "$1 $2" = "--signal=TERM 7.0" ] && kill -TERM $(cat step.pids)""",  # agents and processes, as Slurm does
    "srun": """
        for node in 1 2; do "$@" & echo $! >> agents; done
        trap 'kill -KILL $(cat agents)' TERM  # as the real one does
        status=0
        while read -r agent; do wait "$agent" || status=1; done < agents
        rm agents
        exit $status""",
    "torchrun": f"""exec {sys.executable} -m torch.distributed.run "$@" """,
}


def test_the_slurm_script_of_the_documentation_saves_at_the_time_limit_and_resumes(letters, whole):
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)[1]
    (letters.out / "train.sbatch").write_text(script.replace("29500", str(a_free_port())))
    subprocess.run(["bash", "-n", "train.sbatch"], cwd=letters.out, check=True)
    (letters.out / "driver.py").write_text(DRIVER.format(root=str(ROOT), interval=3600.0))
    for name, content in STUBS.items():
        path = letters.out / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{content}\n")
        path.chmod(0o755)

    def start():
        return subprocess.Popen(
            ["bash", "train.sbatch", "driver.py", *FLAGS], cwd=letters.out, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, "PATH": f"{letters.out}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                 "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2"})

    job = start()
    wait_for(lambda: lines_in(letters.out / "sft") >= 4)
    processes = [number for number in descendants(job.pid) if program(number) == Path(sys.executable).resolve()]
    (letters.out / "step.pids").write_text(" ".join(map(str, processes)))
    job.terminate()
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and len(processes) == 6, output
    step = common.files.load(letters.out / "sft/resume.pt")["step"]
    assert step == lines_in(letters.out / "sft") < 32, output
    assert (letters.out / "scontrol.log").read_text() == "requeue 7\n"
    job = start()
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 0 and f"| {step}/32 [00:00<?" in output, output
    assert (letters.out / "scontrol.log").read_text() == "requeue 7\n"  # not again, when the run is finished
    assert_like(letters.out / "sft", whole())
