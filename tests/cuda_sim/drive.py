"""Run stages of the project on the simulated device and count what each does. test_cuda.py runs it in a process of its own:

    python tests/cuda_sim/drive.py PLAN.json RESULTS.json

The plan: {"jobs": {name: [module, settings of its Config, "H100", "A100", "T4" or "mps", precision]}; "checks": names of
functions of checks.py}. The results: {name: what `run` or `check` returns}.
"""

import collections
import contextlib
import functools
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

sys.path[:0] = [os.fspath(Path(__file__).resolve().parent), os.fspath(Path(__file__).resolve().parents[2])]

import fakecuda  # before torch
import fakemps
import torch

import evaluate
import sample
from common.run import Run
from common.runtime import RuntimeConfig
from data import collect


def counts(gpu):
    return {name: collections.Counter(getattr(gpu, name)) for name in ("syncs", "kernels", "attention")}


def minus(after, before):
    return {name: after[name] - before[name] for name in after}


@contextlib.contextmanager
def settings_of_runs(gpu, precision, snapshots):
    """Inside, stages without --precision compute in `precision`, and the counts at each line of a run's log are appended to
    `snapshots`."""
    log = Run.log

    def log_and_count(self, step, **numbers):
        snapshots.append(counts(gpu))
        log(self, step, **numbers)

    with contextlib.ExitStack() as stack:
        for module in (evaluate, sample, collect):
            in_precision = functools.partial(RuntimeConfig, precision=precision)
            stack.enter_context(mock.patch.object(module, "RuntimeConfig", in_precision))
        stack.enter_context(mock.patch.object(Run, "log", log_and_count))
        yield


def run(gpu, module, settings, precision):
    """A stage's main(config) -> dict(error: a traceback or None, output: what it printed, total: its counts, steps: the
    counts from one log line to the next)."""
    module, snapshots, output, error = importlib.import_module(module), [], io.StringIO(), None
    if hasattr(module.Config, "precision"):
        settings = {"precision": precision, **settings}
    gpu.reset()
    with gpu, settings_of_runs(gpu, precision, snapshots), contextlib.redirect_stdout(output):
        try:
            module.main(module.Config(**settings))
        except Exception:
            error = traceback.format_exc()
    steps = [minus(after, before) for before, after in zip(snapshots, snapshots[1:])]
    return dict(error=error, output=output.getvalue(), total=counts(gpu), steps=steps)


def check(function):
    """Call a function of checks.py -> dict(error: a traceback or None, value: what it returned)."""
    try:
        return dict(error=None, value=function())
    except Exception:
        return dict(error=traceback.format_exc(), value=None)


def as_lists(value):
    """Counters, whose keys may be tuples, as lists of [number, *key], the most frequent first."""
    if isinstance(value, collections.Counter):
        return [[number, *(key if isinstance(key, tuple) else [key])] for key, number in value.most_common()]
    if isinstance(value, dict):
        return {key: as_lists(x) for key, x in value.items()}
    if isinstance(value, list):
        return [as_lists(x) for x in value]
    return value


def main(plan_file, results_file):
    torch.set_num_threads(1)
    plan = json.loads(Path(plan_file).read_text())
    results = {}
    for name, (module, settings, device, precision) in plan["jobs"].items():
        gpu = fakemps.FakeMps() if device == "mps" else fakecuda.FakeCuda(getattr(fakecuda, device))
        results[name] = run(gpu, module, settings, precision)
    for name in plan["checks"]:
        results[name] = check(getattr(importlib.import_module("checks"), name))
    Path(results_file).write_text(json.dumps(as_lists(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
