"""The benchmark: what its numbers mean, what it writes, and what it says if something is missing. Nothing is timed here."""

import argparse
import json
import sys

import pytest
from torch import nn

import bench
import bench_results
from common import onednn
from common.config import UserError
from common.runtime import Runtime, RuntimeConfig
from conftest import random_gpt

MACHINE = dict(cpu="Some(R) CPU, model 7", flags=["avx2"], cores=2, threads=2, load=0.1, torch="2.13.0", transformers=None, trl=None,
               path=None, quick=False)


def test_a_ratio_is_the_median_of_the_ratios_of_neighboring_runs():
    ours, theirs = iter([9, 1, 2, 4, 9]), iter([9, 3, 4, 4, 9])  # the first are the warm-up
    times, ratios = bench.race([lambda: next(ours), lambda: next(theirs)], rounds=4)
    assert times == [3, 4]  # of 1, 2, 4, 9 and of 3, 4, 4, 9
    assert ratios == [1.5]  # of 3, 2, 1, 1; the quotient of the medians would be 4/3


def test_every_side_of_a_race_is_compared_with_the_first():
    assert bench.race([lambda: 2.0, lambda: 1.0, lambda: 3.0], rounds=1) == ([2.0, 1.0, 3.0], [0.5, 1.5])


def test_an_unknown_part_is_one_line_and_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "ppo", "nonsense"])
    with pytest.raises(SystemExit) as stopped:
        bench.arguments()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and "nonsense" in lines[0]


@pytest.mark.parametrize("path, layer", [("plain", nn.Linear), ("packed", onednn.PackedLinear), (None, nn.Linear)])
def test_the_path_decides_which_weights_are_packed_while_sampling(path, layer):
    machine, model = Runtime(RuntimeConfig(device="cpu")), random_gpt()
    with bench.product_path(path), machine.sampling(machine.place(model)):
        assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {layer}


def test_without_network_the_rows_of_nanogpt_say_how_to_give_the_file_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def fetch(url, *rest, **how):
        raise UserError(f"{url}: no network")
    measured = []
    monkeypatch.setattr(bench.download, "fetch", fetch)
    monkeypatch.setattr(bench, "measure_limits", lambda results: ({}, 1e9))
    monkeypatch.setattr(bench, "measure_race", lambda results, part, *rest: measured.append(part))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.main(argparse.Namespace(parts=["nanogpt", "reward"], path=None, quick=False, nanogpt=None))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "nanogpt" in line]
    assert "--nanogpt FILE" in line and measured == ["reward", "reward"]


def test_a_row_stays_until_it_is_measured_again_or_the_versions_change(tmp_path):
    first = bench_results.Results(MACHINE, tmp_path)
    first.add("a step", "a peer", "steps/s", 1.0)
    first.add("another", "a peer", "steps/s", 2.0)
    second = bench_results.Results(MACHINE | dict(load=0.9), tmp_path)
    second.add("a step", "a peer", "steps/s", 3.0)
    rows = json.loads(second.path.read_text())["rows"]
    assert second.path.name == "some-cpu-model-7.json"
    assert [(row["what"], row["ours"], row["load"]) for row in rows] == [("a step", 3.0, 0.9), ("another", 2.0, 0.1)]
    third = bench_results.Results(MACHINE | dict(torch="2.14.0"), tmp_path)
    assert third.path == second.path and not third.rows


def test_the_table_has_a_column_per_machine(tmp_path, capsys):
    first = bench_results.Results(MACHINE, tmp_path)
    first.add("a step", "a peer", "steps/s", 1234.0, 617.0, 2.0, memory=[2**30, 2**31])
    second = bench_results.Results(MACHINE | dict(cpu="Other", threads=1, path="plain"), tmp_path)
    second.add("a step", "limit", "steps/s", 1.0, 2.0, 0.5, limit=True)
    capsys.readouterr()
    bench_results.print_table([first.path, second.path])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| measurement | against | Some(R) CPU, model 7 | Other, 1 threads, path plain |"
    assert lines[-2:] == ["| a step | a peer | 2.00× (1,234 : 617 steps/s; 1.00 : 2.00 GiB) |  |",
                          "| a step | limit |  | 50% (1.00 : 2.00 steps/s) |"]
