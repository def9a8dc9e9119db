"""A run's folder: checkpoints, resuming, the log; and loading the models that other runs left.

    model.pt      the trained model, when the run is finished
    resume.pt     all that it takes to resume, while it is not; resume.before.pt is the one before
    log.jsonl     one line per step
    samples.txt   what the model generates during training
"""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from tqdm import tqdm

from common import files
from common.config import Interrupt, UserError
from common.learner import Learner
from common.runtime import RESUMABLE_CHANGES
from model import GPT, GPTConfig

SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors on rank 0, whatever the sharding
LOAD = StateDictOptions(full_state_dict=True)


class Run:
    """One run's folder. Only rank 0 writes.

    `inputs` are the files that the run starts from: a resume.pt made from other contents is refused. `parts` are {name: model
    or Learner}, saved and restored together. Weights are saved unsharded, so a run may resume with another number of
    processes. resume.pt stores the lengths of log and samples: on resume, lines written after the checkpoint are truncated.

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
            if path.suffix == ".pt" and self.folder.resolve() in path.resolve().parents:
                raise UserError(f"--out {config.out}: the run would replace {path}, which it starts from; choose another folder")
        if runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        files.lock(self.folder, runtime)

    def resume(self):
        """Restore the parts from a stopped run of the same configuration, if any. Returns the step to start from."""
        self.sizes = {"log.jsonl": 0, "samples.txt": 0}
        step, state = 0, self.last_state() if self.may_resume else None
        if state:
            step, self.sizes = state["step"], state["sizes"]
            for name, part in self.parts.items():
                self.restore(name, part, state)
        if self.runtime.is_main:
            if step == 0:
                self.start_over()
            for name, size in self.sizes.items():
                with open(self.folder / name, "ab") as file:
                    file.truncate(min(size, file.tell()))
        self.runtime.barrier()
        Interrupt.waiting = True
        return step

    def restore(self, name, part, state):
        if name not in self.learners:
            set_model_state_dict(part, state[name], options=LOAD)
            return
        set_model_state_dict(part.model, state[name], options=LOAD)
        part.load_state(state[f"{name} learner"])
        if f"{name} optimizer" in state:
            set_optimizer_state_dict(part.model, part.optimizer, state[f"{name} optimizer"], options=LOAD)

    def start_over(self):
        """Clear the folder of another run. A finished run's model is moved last: if this is interrupted, the next start
        finds it and moves the rest."""
        before, model, log = (self.folder / name for name in ("before", "model.pt", "log.jsonl"))
        for path in self.folder.glob("resume*.pt"):
            path.unlink()
        others = [path for name in ("epoch*.pt", "iteration*.pt", "value.pt") for path in self.folder.glob(name)]
        if not model.is_file():
            for path in others:
                path.unlink()
            return
        if log.is_file() and before.is_dir():  # nothing has been moved yet: before/ is of a still older run
            shutil.rmtree(before)
        before.mkdir(exist_ok=True)
        for path in (log, self.folder / "samples.txt", *others, model):
            if path.is_file():
                os.replace(path, before / path.name)
        print(f"{self.folder}: the finished run that was here is kept in {before} until this one is finished")

    def last_state(self):
        """The newest undamaged resume file, or None. All ranks must read the same one; only then a damaged one is renamed, so
        that a slow rank finds the same files as the others."""
        paths = [path for path in (self.folder / "resume.pt", self.folder / "resume.before.pt") if path.is_file()]
        found = state = None
        for path in paths:
            try:
                state = files.load(path)
                config, inputs, found = state["config"], state["inputs"], state["step"]
                break
            except (ValueError, KeyError, TypeError):
                found = "damaged"
        self.runtime.check_same({f"{self.folder}/resume.pt": found}, "give all processes the same folder")
        if found == "damaged":
            raise UserError(f"{paths[0]} is damaged; --no-resume starts over")
        if not state:
            return None
        for name in self.config:
            if self.config[name] != config.get(name):
                raise UserError(f"{path} is of a run with --{name} {config.get(name)}, not {self.config[name]}; "
                                "--no-resume starts over")
        for name, digest in self.inputs.items():
            if inputs.get(name) != digest:
                raise UserError(f"{path} is of a run on another {name}; --no-resume starts over")
        if any(f"{name} learner" not in state for name in self.learners):
            raise UserError(f"{path} is of an earlier version; --no-resume starts over")
        if self.runtime.is_main and path is not paths[0]:
            print(f"{paths[0]} is damaged; resuming from the one before")
            paths[0].rename(paths[0].with_suffix(".damaged"))  # so that it does not replace the good one
        return state

    def checkpoint(self, step):
        """Save what resuming from `step` takes, if the last save is long enough ago. After Ctrl-C: save and stop."""
        due = self.runtime.is_main and time.monotonic() - self.saved_at > self.pause
        due, stop = self.runtime.all_reduce(due, Interrupt.asked)
        if not due and not stop:
            return
        state, started = {}, time.monotonic()
        for name, part in self.parts.items():
            if name in self.learners:
                state[name] = get_model_state_dict(part.model, options=SAVE)
                state[f"{name} learner"] = part.state()
                if part.optimizer.state:  # reading it before the first step would take a step
                    state[f"{name} optimizer"] = get_optimizer_state_dict(part.model, part.optimizer, options=SAVE)
            else:
                state[name] = get_model_state_dict(part, options=SAVE)
        if self.runtime.is_main:
            self.sizes = {name: (self.folder / name).stat().st_size for name in self.sizes}
            state |= {"step": step, "config": self.config, "inputs": self.inputs, "sizes": self.sizes}
            path = self.folder / "resume.pt"
            if path.is_file():
                os.replace(path, self.folder / "resume.before.pt")
            files.save(path, state)
        self.runtime.barrier()
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
        weights = get_model_state_dict(model, options=SAVE)
        if self.runtime.is_main:
            files.save(self.folder / name, {
                "model": weights, "model_config": dataclasses.asdict(model.config), "config": self.config,
                "data": self.data, "tokenizer": self.tokenizer.fingerprint, "inputs": self.inputs, **more})
        self.runtime.barrier()

    def finish(self):
        """The run is complete: nothing is left to resume."""
        Interrupt.waiting = False
        if self.runtime.is_main:
            if (self.folder / "before").is_dir():  # while resume.pt exists, so that this is repeated if interrupted
                shutil.rmtree(self.folder / "before")
            for path in (*self.folder.glob("resume*"), *self.folder.glob("*.tmp")):
                path.unlink(missing_ok=True)
            files.unlock(self.folder)
        self.runtime.barrier()


def progress_bar(runtime, start, steps, description):
    return tqdm(range(start, steps), initial=start, total=steps, desc=description, disable=not runtime.is_main, leave=True,
                dynamic_ncols=True, mininterval=0.5)


def checkpoint_of(path):
    """A run's folder -> its model.pt; anything else stays: a checkpoint, or GPT-2 weights."""
    model = Path(path) / "model.pt"
    return str(model) if model.is_file() else path


def load_checkpoint(path, made_by):
    """What `Run.save_model` wrote: a dict. `made_by` is the command that makes the file, for the error message."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; in the default run `{made_by}` makes it")
    try:
        checkpoint = files.load(path)
        if isinstance(checkpoint, dict) and {"model", "model_config"} <= checkpoint.keys():
            return checkpoint
        raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged or no checkpoint of this project") from None


def load_model(kind, path, made_by, tokenizer, **changes):
    """The model of a checkpoint, as a GPT or ScalarModel, on the CPU; `changes` replace fields of its GPTConfig. A GPT may
    also be GPT-2's weights as transformers saves them: a folder, a .safetensors or a .bin file."""
    if kind is GPT and (Path(path).is_dir() or Path(path).suffix in (".safetensors", ".bin")):
        try:
            model = kind.from_gpt2(path, **changes).float()
        except ValueError as error:
            raise UserError(str(error)) from None
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(f"{path} has a vocabulary of {model.config.vocab_size}, the dataset's tokenizer.json one of "
                            f"{tokenizer.vocab_size}")
        return model
    checkpoint = load_checkpoint(path, made_by)
    if checkpoint.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{path} was trained with another vocabulary than the dataset's tokenizer.json")
    try:
        model = kind(GPTConfig(**checkpoint["model_config"] | changes))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} holds no {kind.__name__}") from None
    return model
