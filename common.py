"""Run plumbing shared by the stages, and nothing that teaches RLHF: the command line, torchrun, schedules,
checkpoints, the log and the progress bar.

Randomness here is a function of (seed, purpose, step) alone: see `generator`. So a run that was stopped and resumed
ends with the same weights as one that never was, and ranks can draw the same numbers without talking.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig


class UserError(Exception):
    """Something a person can mend: one line that says what is wrong, where, and what to do. Exit status 2."""


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

    def convert_arg_line_to_args(self, line):  # a line of an @file: `--name value  # comment`
        return line.split("#")[0].split()


def number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def parse_config(Config, argv=None):
    """Make a command line from a frozen dataclass of hyperparameters and parse it: `--name value`, `--flag` and
    `--no-flag`, `@file` to read arguments from a file; `--help` shows the comment and default of each field.
    Raises UserError for an unknown name, a wrong type, or what Config's __post_init__ refuses by ValueError."""
    source = "".join(inspect.getsource(kind) for kind in reversed(Config.__mro__[:-1]))  # what Config inherits comes first
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    types = get_type_hints(Config)
    doc = inspect.getdoc(inspect.getmodule(Config)) or ""
    parser = Parser(description=doc, fromfile_prefix_chars="@", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        help = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", default=field.default, action=argparse.BooleanOptionalAction,
                                help=help)
        else:
            kind = types[field.name]
            parser.add_argument(f"--{field.name}", default=field.default, type=number if kind is float else kind,
                                help=help, metavar=kind.__name__)
    try:
        return Config(**vars(parser.parse_args(argv)))
    except ValueError as error:
        raise UserError(str(error)) from None


def launch(main, Config):
    """What every script does when run: parse the command line, call main(config); errors in one line."""
    guard(lambda: main(parse_config(Config)))


def guard(work):
    """Call work(); what a person can mend is said in one line, with exit status 2."""
    name = Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Interrupt.take)
    try:
        work()
    except (UserError, OSError) as error:  # an OSError: a full disk, a folder that can't be written
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from the last checkpoint, or starts over where none was made",
              file=sys.stderr)
        sys.exit(130)


class Interrupt:
    """Ctrl-C or SIGTERM. While a Run is under way the step is finished and saved first (see Run.checkpoint); a second one,
    or one at any other time, stops at once."""
    waiting = asked = False

    @classmethod
    def take(cls, number, frame):
        if not cls.waiting or cls.asked:
            raise KeyboardInterrupt
        cls.asked = True


# ---------------------------------------------------------------- processes and devices

@dataclasses.dataclass(frozen=True)
class Machine:
    """How a stage is carried out. It changes the speed and the memory it takes, the results by rounding only."""
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    precision: str = "auto"  # float32, bf16, or fp16 with loss scaling; auto: the best of a GPU, float32 on a CPU
    micro_batch: int = 0  # rows a process holds at once, their gradients adding up over the batch; 0: all of its share
    shard: bool = False  # spread weights, gradients and optimizer over the processes (FSDP2), which all keep them otherwise
    recompute: bool = False  # keep no activations inside the blocks, but compute them again in the backward pass
    compile: bool = False  # torch.compile the blocks
    patience: int = 10  # updates in a row that are skipped for a gradient that is not finite, before the run stops
    resume: bool = True  # go on where a stopped run of the same configuration was

    def __post_init__(self):
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"--precision is auto or one of {', '.join(PRECISIONS)}")
        if self.micro_batch < 0 or self.patience < 1:
            raise ValueError("--micro_batch is at least 0, --patience at least 1")


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products
# What may differ when a run goes on.
HOW = {field.name for field in dataclasses.fields(Machine)} - {"precision"} | {"out", "save_every"}


def leave():
    """At exit: end the process group, and with it gloo's threads, which stay as long as anything holds the group. One that is left
    while Python shuts down aborts the process now and then (SIGABRT), when all work is done."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """Who is running, and how: one process, or this one among those that torchrun started (one a GPU, or several on a
    CPU). `how` is a Machine."""

    def __init__(self, how=Machine()):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local, self.how = int(os.environ.get("LOCAL_RANK", 0)), how
        device = how.device
        if device == "auto":
            device = f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            if self.device.type not in ("cpu", "cuda"):
                raise RuntimeError("neither cpu nor cuda")
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
        precision = how.precision
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            precision = precision.replace("auto", "bf16" if torch.cuda.is_bf16_supported() else "fp16")
        self.dtype = PRECISIONS[precision.replace("auto", "float32")]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.skips, self.skipped = Counter(), 0  # updates left out: in a row, by optimizer; and in all
        if (self.size > 1 or how.shard) and not dist.is_initialized():
            if self.size == 1 and "MASTER_ADDR" not in os.environ:
                raise UserError("--shard spreads a model over processes: start it with torchrun")
            store, rank, size = next(dist.rendezvous("env://"))
            # After a restart by torchrun the store still holds where the dead ranks were to be found: look elsewhere.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
            atexit.register(leave)
        if how.shard:
            self.mesh = init_device_mesh(self.device.type, (self.size,))
            atexit.register(self.mesh._pg_registry.clear)  # DTensor's caches keep the mesh, and it would keep the group

    @property
    def main(self):
        return self.rank == 0

    # ---- which rows are whose

    def rows(self, count):
        """This rank's share of `count` rows of the global batch."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def micro_batches(self, mine, count, length):
        """`mine`, this rank's share of `count` rows of the global batch, in lists of at most --micro_batch rows: rows of like
        length together, so that little is padded, and as many lists on every rank, so that they stay in step."""
        parts = self.parts(count)
        mine = sorted(mine, key=length) if parts > 1 else mine
        return [mine[i * len(mine) // parts : (i + 1) * len(mine) // parts] for i in range(parts)]

    def parts(self, count):
        return -(-count // (self.size * self.how.micro_batch)) if self.how.micro_batch else 1

    def check_share(self, count, flag):
        if count // self.size < self.parts(count):
            raise UserError(f"--{flag}: {count} rows a step leave some of {self.size} ranks without one" +
                            f" in a --micro_batch of {self.how.micro_batch}" * bool(self.how.micro_batch))

    def shares(self, items, batch):
        """This rank's part of the items, in lists of at most `batch`, as many on every rank: (list, True); a rank that has
        none left gets (the first item, False), to stay in step with the others."""
        for i in range(0, len(items), batch * self.size):
            some = items[i : i + batch * self.size]
            mine = some[self.rows(len(some))]
            yield (mine, True) if mine else (items[:1], False)

    def spread(self, count, work):
        """[work(0), ..., work(count - 1)], each computed by one rank and known to all."""
        done = self.gather([(i, work(i)) for i in range(self.rank, count, self.size)])
        return [x for _, x in sorted(done, key=lambda pair: pair[0])]

    # ---- talking to each other

    def sum(self, *numbers):
        """Each number (a float or a 0-d tensor), summed over all ranks, as floats."""
        total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device).detach() for n in numbers])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items):
        """A list from each rank -> all of them in rank order, on every rank."""
        if self.size == 1:
            return items
        lists = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def first(self, work):
        """What work() returns, done by one rank of each machine and then by its others, which find it done: a download."""
        result = work() if self.local == 0 else None
        self.barrier()
        return result if self.local == 0 else work()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    # ---- models

    def place(self, model):
        """The model on this rank's device; with --shard, a part of it."""
        model.recompute = self.how.recompute
        if self.how.compile:
            for block in model.blocks:
                block.compile(dynamic=True)
        if not self.how.shard:
            model.to(self.device)
        else:
            mixed = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
            for block in model.blocks:  # gathered one block at a time, and let go after use
                fully_shard(block, mesh=self.mesh, mp_policy=mixed, reshard_after_forward=True)
            fully_shard(model, mesh=self.mesh, reshard_after_forward=True)  # the embeddings and the last layer: in float32
            with torch.no_grad():  # which module is the root is settled in its first pass: before any block's alone
                model(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return model

    def wrap(self, model):
        """The model whose backward pass averages gradients over the ranks. See `backward`."""
        return DistributedDataParallel(model) if self.size > 1 and not self.how.shard else model

    def autocast(self):
        """Matrix products in --precision, from float32 weights, but for the last layer's (model.last_layer)."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def adding(self, model, more):
        """A pass after which `more` will follow before the update: its gradients need not be averaged yet."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(not more)
            yield
        else:
            with model.no_sync() if more and isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                yield

    def backward(self, loss):
        """The backward pass of this rank's part of a global mean: its sum over the global count. As gradients are averaged
        over the ranks, it is multiplied by their number; for fp16, by the loss scale."""
        self.scaler.scale(loss * self.size).backward()

    @contextlib.contextmanager
    def sampling(self, model):
        """Inside, model.hidden and model.unembed may be called by themselves. Yields `anyone` for model.generate, where ranks
        share weights and must go on together, else None."""
        if not isinstance(model, FSDPModule):
            yield None
            return
        model.unshard()  # the embeddings and the last norm; blocks are gathered as they are called
        yield lambda left: self.sum(left)[0]
        model.reshard()


def keep_freed_memory():
    """Linux's malloc returns large blocks to the kernel as soon as they are free, and the next tensor of that size waits for
    new, zeroed pages: a quarter of a step at 124M parameters."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        never_trim, never_map = (-1, -1), (-4, 0)  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        for parameter, value in (never_trim, never_map):
            ctypes.CDLL(None).mallopt(parameter, value)


def seed_of(seed, purpose, step=0):
    """A 63-bit seed that depends on these three and nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed, purpose, step=0):
    """A CPU generator of random numbers for one purpose at one step."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, step))


# ---------------------------------------------------------------- optimisation

def adam(model, lr):
    """Adam as in the paper: beta1 0.9, beta2 0.95 (C), no weight decay."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(step, steps, final=0.1):
    """Fraction of the peak learning rate: a half cosine from 1 down to `final` (C.1, C.2), no warmup."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_constant(step, warmup=10, start=0.1):
    """Fraction of the peak learning rate: a line from `start` to 1 over `warmup` steps, then 1 (C.4)."""
    return min(1.0, start + (1 - start) * step / warmup)


def update(optimizer, model, lr, ranks, max_norm=1.0):
    """One step with the gradients clipped to a global norm (GPT-3's: 1). Returns the norm before clipping. A gradient that
    is not finite is dropped; UserError after --patience of them in a row."""
    ranks.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        ranks.scaler.step(optimizer)
    ranks.scaler.update()
    ranks.skips[id(optimizer)] = 0 if math.isfinite(norm) else ranks.skips[id(optimizer)] + 1
    ranks.skipped += not math.isfinite(norm)
    if ranks.skips[id(optimizer)] >= ranks.how.patience:
        raise UserError(f"the gradient was not finite {ranks.how.patience} times in a row (--patience): the run diverged; a "
                        "lower --lr may help")
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- checkpoints and the log

def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader finds the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")  # one name: what a killed run leaves, the next one replaces
    try:
        try:
            write(temporary)
        except (RuntimeError, OSError) as error:  # a full disk, which torch.save makes a RuntimeError of
            raise UserError(f"{path} could not be written: {str(error).splitlines()[0]}") from None
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


SEAL = b"\nsha256 "  # what follows the archive in each of our files, and then its checksum


def save(path, state):
    """torch.save, atomically, and sealed: `load` recognises any change."""
    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
        sealed = SEAL + digest(temporary).encode()
        with open(temporary, "ab") as file:
            file.write(sealed)

    write_atomically(path, write)


def load(path):
    """What `save` wrote, read twice rather than held twice: for its checksum in blocks, then tensor by tensor. ValueError
    where it is not that to the bit, or holds more than plain values and tensors."""
    with open(path, "rb") as file:  # opened once: a file that takes its name meanwhile is not mixed with it
        checksum, last = hashlib.sha256(), b""
        for block in iter(lambda: file.read(2**20), b""):
            last += block
            checksum.update(last[: -len(SEAL) - 64])
            last = last[-len(SEAL) - 64 :]
        if last != SEAL + checksum.hexdigest().encode():
            raise ValueError("cut short, damaged or not of this project")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)  # no code in it is run
        except Exception as error:  # torch raises a dozen kinds here
            raise ValueError("more than plain values and tensors") from error


def load_checkpoint(path, made_by):
    """What `Run.save_model` wrote: a dict. `made_by` is the command that makes the file, for who lacks it."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; in the default run `{made_by}` makes it")
    try:
        checkpoint = load(path)
        if isinstance(checkpoint, dict) and {"model", "model_config"} <= checkpoint.keys():
            return checkpoint
        raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged or no checkpoint of this project") from None


def load_model(kind, path, made_by, tokenizer, **changes):
    """The model of a checkpoint, as a GPT or ScalarModel, on the CPU; `changes` replace fields of its GPTConfig. A GPT may
    also be GPT-2's weights in transformers' layout: a folder, a .safetensors or a .bin file."""
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


def digest(path):
    """A fingerprint of a file's contents, or of all files of a folder."""
    if Path(path).is_dir():
        return hashlib.sha256("".join(digest(p) for p in sorted(Path(path).iterdir()) if p.is_file()).encode()).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


LOCKS = {}  # folder: its open file, which holds the lock until it is closed, or this process ends


def lock(folder, ranks):
    """Keep other commands from writing into the folder until `unlock`. UserError, on every rank, where one does. Rank 0 has the
    lock; to lock once more what this process has is no error."""
    taken, name = [], Path(folder).resolve()
    if ranks.main and name not in LOCKS:
        handle = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[name] = handle
        except OSError:
            os.close(handle)
            taken.append(name)
    if ranks.gather(taken):
        raise UserError(f"{folder} is being written by another run")


def unlock(folder):
    os.close(LOCKS.pop(Path(folder).resolve()))


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of any sharding, whole and on rank 0


class Run:
    """One run's folder: model.pt, resume.pt (and the one before it), log.jsonl, samples.txt. Only rank 0 writes.

    resume.pt holds how long the log and the samples were when it was written; what stands behind that is cut off when
    the run goes on, so no step stands there twice. `inputs` are the files that the run starts from: a resume.pt that
    came of other contents is refused. `parts` are {name: model or (model, its optimizer)}; whole weights are saved however
    they are sharded, so a run may go on with other processes than it began with.

    A model.pt never stands beside the log of another run: a run that starts over where one was finished moves that one's files
    into before/ first, and removes them when it is finished itself."""

    def __init__(self, folder, config, ranks, inputs=(), every=30.0):  # seconds from one resume.pt to the next
        self.folder, self.ranks, self.every, self.pause = Path(folder), ranks, every, every
        self.inputs = {str(path): digest(path) for path in inputs}
        self.config = {k: v for k, v in dataclasses.asdict(config).items() if k not in HOW}
        self.saved_at = time.monotonic()
        for path in map(Path, inputs):
            if path.suffix == ".pt" and path.resolve().parent == self.folder.resolve():
                raise UserError(f"--out {folder}: the run would replace {path}, which it starts from; choose another folder")
        if ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder, ranks)

    def resume(self, wanted=True, **parts):
        """Load what a stopped run of the same configuration left into `parts`.
        Returns the step to go on from, 0 for a fresh start."""
        self.sizes = {"log.jsonl": 0, "samples.txt": 0}
        step, state = 0, self.last_state() if wanted else None
        if state:
            for name, part in parts.items():
                model, optimizer = part if isinstance(part, tuple) else (part, None)
                set_model_state_dict(model, state[name], options=StateDictOptions(full_state_dict=True))
                if optimizer:
                    self.ranks.skips[id(optimizer)] = state.get(f"{name} skips", 0)  # an older resume.pt has none
                if optimizer and f"{name} optimizer" in state:
                    set_optimizer_state_dict(model, optimizer, state[f"{name} optimizer"],
                                             options=StateDictOptions(full_state_dict=True))
            step, self.sizes, self.ranks.skipped = state["step"], state["sizes"], state["skipped"]
            self.ranks.scaler.load_state_dict(state["scaler"])
        if self.ranks.main:
            if step == 0:
                self.start_over()
            for name, size in self.sizes.items():  # forget what was written after the state was
                with open(self.folder / name, "ab") as file:
                    file.truncate(min(size, file.tell()))
        self.ranks.barrier()
        Interrupt.waiting = True
        return step

    def start_over(self):
        """Clear the folder of another run. The model of a finished one is moved last: when this is cut short, the next start finds
        it and moves the rest."""
        before, model, log = (self.folder / name for name in ("before", "model.pt", "log.jsonl"))
        for path in self.folder.glob("resume*.pt"):
            path.unlink()
        others = [path for name in ("epoch*.pt", "iteration*.pt", "value.pt") for path in self.folder.glob(name)]
        if not model.is_file():
            for path in others:
                path.unlink()
            return
        if log.is_file() and before.is_dir():  # nothing is moved yet: what is there is of a still older run
            shutil.rmtree(before)
        before.mkdir(exist_ok=True)
        for path in (log, self.folder / "samples.txt", *others, model):
            if path.is_file():
                os.replace(path, before / path.name)
        print(f"{self.folder}: the finished run that was here is kept in {before} until this one is finished")

    def last_state(self):
        """The newest resume file that is whole, or None. Every rank must have read the same one, and only then a damaged one is
        moved: a rank that is slow finds the files as the others did."""
        paths = [path for path in (self.folder / "resume.pt", self.folder / "resume.before.pt") if path.is_file()]
        found = state = None
        for path in paths:
            try:
                state = load(path)
                before, inputs, found = state["config"], state["inputs"], state["step"]
                break
            except (ValueError, KeyError, TypeError):
                found = "damaged"
        if len(set(self.ranks.gather([found]))) > 1:
            raise UserError(f"{self.folder}: not all processes find the same resume.pt there; give them a folder that they share")
        if found == "damaged":
            raise UserError(f"{paths[0]} is damaged; --no-resume starts over")
        if not state:
            return None
        for name in self.config:
            if self.config[name] != before.get(name):
                raise UserError(f"{path} is of a run with --{name} {before.get(name)}, not {self.config[name]}; "
                                "--no-resume starts over")
        for name, was in self.inputs.items():
            if inputs.get(name) != was:
                raise UserError(f"{path} is of a run on another {name}; --no-resume starts over")
        if self.ranks.main and path is not paths[0]:
            print(f"{paths[0]} is damaged; going on from the one before")
            paths[0].rename(paths[0].with_suffix(".damaged"))  # so that it doesn't take the place of the good one
        return state

    def checkpoint(self, step, **parts):
        """Leave all it takes to go on from `step`, if the last time is long enough ago or somebody wants to stop."""
        due, stop = self.ranks.sum(self.ranks.main and time.monotonic() - self.saved_at > self.pause, Interrupt.asked)
        if not due and not stop:
            return
        state, began = {}, time.monotonic()
        for name, part in parts.items():
            model, optimizer = part if isinstance(part, tuple) else (part, None)
            state[name] = get_model_state_dict(model, options=FULL)
            if optimizer:
                state[f"{name} skips"] = self.ranks.skips[id(optimizer)]
            if optimizer and optimizer.state:  # asked for before its first step, it would take one
                state[f"{name} optimizer"] = get_optimizer_state_dict(model, optimizer, options=FULL)
        if self.ranks.main:
            self.sizes = {name: (self.folder / name).stat().st_size for name in self.sizes}
            state |= {"step": step, "config": self.config, "inputs": self.inputs, "sizes": self.sizes,
                      "scaler": self.ranks.scaler.state_dict(), "skipped": self.ranks.skipped}
            path = self.folder / "resume.pt"
            if path.is_file():
                os.replace(path, self.folder / "resume.before.pt")
            save(path, state)
        self.ranks.barrier()
        self.saved_at = time.monotonic()
        self.pause = self.every * max(1.0, self.saved_at - began)  # large models save for seconds: a thirtieth of the time at most
        if stop:
            raise KeyboardInterrupt

    def log(self, step, **numbers):
        if self.ranks.main:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **numbers, "skipped": self.ranks.skipped}) + "\n")

    def samples(self, text):
        if self.ranks.main:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def save_model(self, model, data, name="model.pt", **more):
        """Weights, model config, the run's config and the dataset, for the next stage."""
        weights = get_model_state_dict(model, options=FULL)
        if self.ranks.main:
            save(self.folder / name, {"model": weights, "model_config": dataclasses.asdict(model.config),
                                      "config": self.config, "data": str(data), **more})
        self.ranks.barrier()

    def finish(self):
        """The run is complete: nothing is left to resume."""
        Interrupt.waiting = False
        if self.ranks.main:
            if (self.folder / "before").is_dir():  # while there is a resume.pt, so that this is done again when cut short
                shutil.rmtree(self.folder / "before")
            for path in (*self.folder.glob("resume*"), *self.folder.glob("*.tmp")):
                path.unlink(missing_ok=True)
            unlock(self.folder)
        self.ranks.barrier()


def bar(ranks, steps, start, what):
    """A progress bar over range(start, steps), on rank 0 only."""
    return tqdm(range(start, steps), initial=start, total=steps, desc=what, disable=not ranks.main, leave=True,
                dynamic_ncols=True, mininterval=0.5)
