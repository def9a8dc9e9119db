"""Run every stage on a tiny made-up world and print a digest of what it leaves: what a change that should change nothing
must not change.

    python tests/digests.py > before.txt        # two minutes; then change the code
    python tests/digests.py | diff before.txt -

It knows only the commands and the files that they leave. Weights and logged numbers are digested without their names, so that
renaming one changes nothing. The same machine and the same versions of packages give the same digests.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
VOLATILE = ("episodes_per_second",)  # logged, but never the same twice


def sha(data):
    return hashlib.sha256(data).hexdigest()[:16]


def weights(path):
    tensors = torch.load(path, weights_only=True)["model"].values()
    return sha("".join(sorted(sha(w.contiguous().numpy().tobytes()) for w in tensors)).encode())


def log(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sha(json.dumps([sorted(repr(x) for name, x in line.items() if name not in VOLATILE) for line in lines]).encode())


def digests(folder):
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".pt":
            yield path.relative_to(folder), weights(path)
        elif path.name == "log.jsonl":
            yield path.relative_to(folder), log(path)
        elif path.suffix in (".jsonl", ".bin", ".txt"):
            yield path.relative_to(folder), sha(path.read_bytes())
        elif path.name == "report.json":
            yield path.relative_to(folder), sha(json.dumps(json.loads(path.read_text())["preference"]).encode())


def command(script, *arguments, processes=1):
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, str(ROOT / script), *map(str, arguments), "--device", "cpu"]


def run(folder, script, *arguments, processes=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(script, *arguments, processes=processes), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def stop_and_resume(folder, script, *arguments):
    """SIGTERM once the log has lines, so that the rest is done by a second command."""
    log = folder / arguments[arguments.index("--out") + 1] / "log.jsonl"
    process = subprocess.Popen(command(script, *arguments), cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.is_file() or not log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()
    run(folder, script, *arguments)


def every_stage(folder, processes):
    data = ("--data", "data")
    prepare = [sys.executable, ROOT / "data/tinyworld/prepare.py", "--out", "data", "--documents", "300", "--log", "700", "--customers",
               "40", "--demonstrations", "64", "--tasks", "4", "--vocab_size", "600"]
    subprocess.run(list(map(str, prepare)), cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def stage(script, *arguments, way=run):
        way(folder, script, *data, *arguments, **({} if way is stop_and_resume else dict(processes=processes)))

    stage("sft.py", "--out", "out/base", "--init", "scratch", "--size", "nano", "--pretrain_mix", 1, "--epochs", 2, "--lr", 3e-3)
    stage("sft.py", "--out", "out/sft", "--init", "out/base/model.pt", "--epochs", 2, "--batch_size", 16, "--pretrain_mix", 0.125)
    stage("data/collect.py", "--sources", "out/sft/model.pt@1,out/base/model.pt@0.7", "--prompts", 40, "--valid_prompts", 12,
          "--most", 5, "--max_new_tokens", 24, "--batch_size", 16, "--no-append")
    stage("reward.py", "--out", "out/reward", "--init", "out/sft/model.pt")
    rl = ("--policy", "out/sft/model.pt", "--reward", "out/reward/model.pt", "--iterations", 4, "--batch_size", 8,
          "--minibatch_size", 4, "--max_new_tokens", 24)
    stage("ppo.py", "--out", "out/ppo", *rl)
    stage("ppo.py", "--out", "out/ppo_noptx", *rl, "--ptx_coef", 0)
    if processes == 1:
        stage("ppo.py", "--out", "out/ppo_resumed", *rl, way=stop_and_resume)
        stage("ppo.py", "--out", "out/ppo_accumulated", *rl, "--micro_batch", 2)
    stage("evaluate.py", "--out", "out", "--prompts", 12, "--max_new_tokens", 24)


def main():
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            every_stage(Path(folder), processes)
            for path, digest in digests(Path(folder)):
                print(f"{processes} {'process  ' if processes == 1 else 'processes'} {digest} {path}", flush=True)


if __name__ == "__main__":
    main()
