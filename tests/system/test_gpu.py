"""`make gpu` (tests/gpu.py) on a simulated device, with small models. What needs hardware is not measured there."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gpu
from common.config import UserError
from conftest import ROOT

simulated = pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None,
                               reason="the simulated device needs g++ and the CPU build of PyTorch")
H200 = dict(bandwidth=4.21e12, rate=762e12)  # as measured (docs/speed.md)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """One that the parent process finds, and a folder for gpu.json. Returns a function that runs `make gpu` with small models and
    these changes of its Size -> (exit status, what is in gpu.json)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a GPU", total_memory=2**30))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*checks, **changes):
        monkeypatch.setitem(gpu.SIZES, "simulated", dataclasses.replace(gpu.SIMULATED, **changes))
        with pytest.raises(SystemExit) as exit:
            gpu.main(["--size", "simulated", *checks])
        return exit.value.code, json.loads((tmp_path / "gpu.json").read_text())
    return run


def verdicts(result):
    """{check: the verdicts of its rows}"""
    return {name: [row["passed"] for row in result["table"] if row["check"] == name] for name in gpu.CHECKS}


def script_that(code):
    """Instead of Python with gpu.py: Python with this code."""
    return dict(python=(sys.executable, "-c", code), not_measured=("rates",))


# ---------------------------------------------------------------- on the simulated device

@simulated
def test_every_check_passes_on_a_simulated_gpu_or_is_not_measured(tmp_path):
    command = [sys.executable, "tests/cuda_sim/script.py", "tests/gpu.py", "--size", "simulated"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    for name, passed in verdicts(result).items():
        assert passed == [None] if name in gpu.SIMULATED.not_measured else passed and set(passed) == {True}, name
    for row in result["table"]:
        verdict = "passed" if row["passed"] else "not measured"
        assert f"| {row['what']} | {row['measured']} | {row['limit']} | {verdict} |" in done.stdout
    assert result["device"] == "simulated"


@simulated
def test_a_speed_below_its_share_of_what_was_measured_there_fails(a_gpu):
    status, result = a_gpu("decoding", not_measured=())  # the simulated device copies fast, and decodes slowly
    assert status == 1
    assert verdicts(result)["rates"] == [True, True] and verdicts(result)["decoding"] == [False]
    weights, cache = 2 * (gpu.parameters(gpu.SIMULATED) - 256 * 32), 8 * 64 * 2 * 2 * 32 * 2  # bytes: 2 layers of width 32
    limit = 8 * result["bandwidth"] / (weights + cache)
    assert result["table"][-1]["limit"] == f"≥ 60.0% of {limit:,.0f}"


# ---------------------------------------------------------------- limits

def test_limits_of_speed_follow_from_bandwidth_and_rate():
    on = gpu.Setup(gpu.Size(), None, **H200)
    weights, cache = 2 * (124_439_808 - 1024 * 768), 64 * 128 * 12 * 2 * 768 * 2  # bytes; a token needs no position but its own
    assert gpu.token_seconds(on, 64, 128) == pytest.approx((weights + cache) / 4.21e12)
    assert gpu.sft_limit(on) == pytest.approx(762e12 / (6 * 124_439_808 + 6 * 12 * 768 * 1024))
    assert 0.055 * gpu.ppo_limit(on) == pytest.approx(100, abs=1)
    half = gpu.Setup(gpu.Size(), None, H200["bandwidth"] / 2, H200["rate"] / 2)
    assert gpu.token_seconds(half, 64, 128) == pytest.approx(2 * gpu.token_seconds(on, 64, 128))
    assert gpu.sft_limit(half) == pytest.approx(gpu.sft_limit(on) / 2)
    assert gpu.ppo_limit(half) == pytest.approx(gpu.ppo_limit(on) / 2)


def test_a_speed_passes_from_its_share_of_the_limit_on():
    row = gpu.speed_row("x", 60, "tokens/s", 0.6, 100)
    assert row == dict(what="x", measured="60 tokens/s", limit="≥ 60.0% of 100", passed=True)
    assert not gpu.speed_row("x", 59, "tokens/s", 0.6, 100)["passed"]


# ---------------------------------------------------------------- what goes wrong

def test_an_error_in_a_check_is_a_failed_row_with_its_reason(tmp_path, monkeypatch, capsys):
    def broken(on):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu.CHECKS, "fp16", broken)
    gpu.main(["--size", "simulated", "--folder", str(tmp_path), "fp16"])
    [row] = json.loads((tmp_path / "fp16.json").read_text())
    assert row == gpu.row("fp16", "RuntimeError: CUDA error: an illegal memory access was encountered", "", False)
    assert "in broken" in capsys.readouterr().err


def test_a_check_whose_process_dies_does_not_end_the_others(a_gpu, capsys):
    status, result = a_gpu("fp16", "faults", **script_that("import os; os.kill(os.getpid(), 9)"))
    assert status == 1
    assert [(row["check"], row["measured"], row["passed"]) for row in result["table"]] == [
        ("rates", "needs a GPU", None), ("fp16", "exit status -9", False), ("faults", "exit status -9", False)]
    assert "| faults | exit status -9 |  | FAILED |" in capsys.readouterr().out


def test_a_check_that_hangs_is_ended_with_all_that_it_started(a_gpu, tmp_path):
    code = f"""if True:
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        open("{tmp_path}/pid", "w").write(str(child.pid))
        child.wait()"""
    status, result = a_gpu("fp16", **script_that(code), seconds=3)
    assert status == 1 and result["table"][-1]["measured"] == "not finished after 3 seconds"
    state = subprocess.run(["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True).stdout
    assert state.strip() in ("", "Z", "Zs")  # nobody may have collected the dead process yet


def test_the_exit_status_is_0_if_no_row_failed(a_gpu):
    assert a_gpu("fp16", not_measured=("rates", "fp16"))[0] == 0


def test_without_a_gpu_there_is_one_line_and_exit_status_2():
    done = subprocess.run([sys.executable, "tests/gpu.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "gpu.py: PyTorch finds no Nvidia GPU here\n")


def test_an_unknown_check_is_named():
    with pytest.raises(UserError, match="speed: no such check; there are rates, float32"):
        gpu.main(["speed"])
