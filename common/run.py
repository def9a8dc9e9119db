"""A run's folder: checkpoints, resuming, the log.

    model.pt      the trained model, when the run is finished
    resume.pt     all that it takes to resume, while it is not; resume.before.pt is the one before
    log.jsonl     one line per step
    samples.txt   what the model generates during training

With --shard, checkpoints are folders of the same names (common/checkpoints.py).
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from common import checkpoints, files
from common.config import Interrupt, UserError
from common.learner import Learner
from common.runtime import RESUMABLE_CHANGES


class Run:
    """One run's folder. Only rank 0 writes, except for checkpoints with --shard.

    `inputs` are the files that the run starts from: a resume.pt made from other contents is refused. `parts` are {name: model
    or Learner}, saved and restored together; a run may resume with another number of processes. resume.pt stores the lengths
    of log and samples: on resume, lines written after the checkpoint are truncated.

    A model.pt never stands next to the log of another run: a run that starts over moves the files of a finished one to
    before/, and removes them when it is finished itself."""

    def __init__(self, config, runtime, tokenizer, inputs=(), parts=None, save_interval=30.0):  # in seconds
        self.folder, self.runtime, self.tokenizer = Path(config.out), runtime, tokenizer
        self.parts, self.data, self.may_resume = parts or {}, str(getattr(config, "data", "")), getattr(config, "resume", True)
        self.learners = {name: part for name, part in self.parts.items() if isinstance(part, Learner)}
        self.save_interval, self.pause, self.saved_at = save_interval, save_interval, time.monotonic()
        self.inputs = runtime.check_same_files(inputs)
        self.config = {k: v for k, v in dataclasses.asdict(config).items() if k not in RESUMABLE_CHANGES}
        for path in map(Path, inputs):
            if path.suffix == ".pt" and self.folder.resolve() in (path.resolve(), *path.resolve().parents):
                raise UserError(f"--out {config.out}: the run would replace {path}, which it starts from; choose another folder")
        if runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        files.lock(self.folder, runtime)

    def resume(self):
        """Restore the parts from a stopped run of the same configuration, if any. Returns the step to start from."""
        self.sizes = {"log.jsonl": 0, "samples.txt": 0}
        step, (path, state) = 0, self.last_state() if self.may_resume else (None, None)
        if state:
            step, self.sizes = state["step"], state["sizes"]
            for name, part in self.parts.items():
                checkpoints.restore(name, part, state, path)
        if self.runtime.is_main:
            if step == 0:
                self.start_over()
            for name, size in self.sizes.items():
                with open(self.folder / name, "ab") as file:
                    file.truncate(min(size, file.tell()))
        self.runtime.barrier()
        Interrupt.waiting = True
        return step

    def start_over(self):
        """Clear the folder of another run. A finished run's model is moved last: if this is interrupted, the next start
        finds it and moves the rest."""
        before, model, log = (self.folder / name for name in ("before", "model.pt", "log.jsonl"))
        for path in self.folder.glob("resume*.pt"):
            files.remove(path)
        others = [path for name in ("epoch*.pt", "iteration*.pt", "value.pt") for path in self.folder.glob(name)]
        if not model.exists():
            for path in others:
                files.remove(path)
            return
        if log.is_file() and before.is_dir():  # nothing has been moved yet: before/ is of a still older run
            shutil.rmtree(before)
        before.mkdir(exist_ok=True)
        for path in (log, self.folder / "samples.txt", *others, model):
            if path.exists():
                files.replace(path, before / path.name)
        print(f"{self.folder}: the finished run that was here is kept in {before} until this one is finished")

    def last_state(self):
        """The newest undamaged resume file -> its path and contents; None, None if there is none. All ranks must find the same
        one; only then a damaged one is renamed, so that a slow rank finds the same files as the others."""
        damaged = []
        for path in (self.folder / "resume.pt", self.folder / "resume.before.pt"):
            self.runtime.check_same({str(path): path.exists() or None}, "give all processes the same folder")
            if not path.exists():
                continue
            try:
                state = checkpoints.read(path, self.runtime)
                config, inputs, found = state["config"], state["inputs"], state["step"]
            except (ValueError, KeyError, TypeError):
                found = "damaged"
            self.runtime.check_same({str(path): found}, "give all processes the same folder")
            if found != "damaged":
                break
            damaged.append(path)
        else:
            if damaged:
                raise UserError(f"{damaged[0]} is damaged; --no-resume starts over")
            return None, None
        for name in self.config:
            if self.config[name] != config.get(name):
                raise UserError(f"{path} is of a run with --{name} {config.get(name)}, not {self.config[name]}; "
                                "--no-resume starts over")
        for name, digest in self.inputs.items():
            if inputs.get(name) != digest:
                raise UserError(f"{path} is of a run on another {name}; --no-resume starts over")
        if any(f"{name} learner" not in state for name in self.learners):
            raise UserError(f"{path} is of an earlier version; --no-resume starts over")
        if self.runtime.is_main and damaged:
            print(f"{damaged[0]} is damaged; resuming from the one before")
            files.replace(damaged[0], damaged[0].with_suffix(".damaged"))  # so that it does not replace the good one
        return path, state

    def checkpoint(self, step):
        """Save what resuming from `step` takes, if the last save is long enough ago. After Ctrl-C: save and stop."""
        due = self.runtime.is_main and time.monotonic() - self.saved_at > self.pause
        due, stop = self.runtime.all_reduce(due, Interrupt.asked)
        if not due and not stop:
            return
        started, path = time.monotonic(), self.folder / "resume.pt"
        state = {"step": step, "config": self.config, "inputs": self.inputs}
        state |= {f"{name} learner": learner.state() for name, learner in self.learners.items()}
        if self.runtime.is_main:
            self.sizes = {name: (self.folder / name).stat().st_size for name in self.sizes}
            if path.exists():
                files.replace(path, self.folder / "resume.before.pt")
        checkpoints.save(path, state | {"sizes": self.sizes}, checkpoints.state_dicts(self.parts, self.runtime), self.runtime)
        self.saved_at = time.monotonic()
        self.pause = self.save_interval * max(1.0, self.saved_at - started)  # saving takes at most a thirtieth of the time
        if stop:
            raise KeyboardInterrupt

    def log(self, step, **numbers):
        if self.runtime.is_main:
            skipped = sum(learner.skipped for learner in self.learners.values())
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **numbers, "skipped": skipped}) + "\n")

    def print(self, text):
        if self.runtime.is_main:
            tqdm.write(text)

    def samples(self, text):
        if self.runtime.is_main:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def progress_bar(self, start, steps):
        """A progress bar over range(start, steps), on rank 0 only."""
        return progress_bar(self.runtime, start, steps, str(self.folder))

    def save_model(self, model, name="model.pt", **more):
        """Weights, model config, the run's config, dataset and inputs, for the next stage."""
        state = {"model_config": dataclasses.asdict(model.config), "config": self.config, "data": self.data,
                 "tokenizer": self.tokenizer.fingerprint, "inputs": self.inputs, **more}
        tensors = {"model": checkpoints.model_tensors(model, self.runtime)}
        checkpoints.save(self.folder / name, state, tensors, self.runtime)

    def finish(self):
        """The run is complete: nothing is left to resume."""
        Interrupt.waiting = False
        if self.runtime.is_main:
            if (self.folder / "before").is_dir():  # while resume.pt exists, so that this is repeated if interrupted
                shutil.rmtree(self.folder / "before")
            for path in (*self.folder.glob("resume*"), *self.folder.glob("*.tmp")):
                files.remove(path)
            files.unlock(self.folder)
        self.runtime.barrier()


def progress_bar(runtime, start, steps, description):
    return tqdm(range(start, steps), initial=start, total=steps, desc=description, disable=not runtime.is_main, leave=True,
                dynamic_ncols=True, mininterval=0.5)
