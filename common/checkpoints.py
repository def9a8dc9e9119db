"""Checkpoints: how they are written and read, and how models are loaded from those of other runs.

A checkpoint is one file, the torch.save of a dict with a checksum at its end. With --shard it is a folder of the same name, in
which all processes write their parts of the tensors at the same time (torch.distributed.checkpoint):

    state.pt                    all other values, and the checksums of the other files
    .metadata, __RANK_0.distcp  the tensors

Either can be read by any number of processes, sharded or not.
"""

import copy
import dataclasses
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)

from common import files, gpt2, sharding
from common.config import UserError
from common.learner import Learner
from model import GPT, PRESETS, GPTConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # copies on rank 0; the others get {}
PARTS = StateDictOptions()  # those of this rank, not copies


# ---------------------------------------------------------------- writing and reading

def save(path, state, tensors, runtime):
    """state: a dict of plain values, the same on all ranks. tensors: {name: a nested dict of tensors}, as `state_dicts` gives them.
    `read` gives both back in one dict. What was at `path` is replaced."""
    if runtime.config.shard:
        save_folder(Path(path), state, tensors, runtime)
    elif runtime.is_main:
        files.save(path, state | tensors)
    runtime.barrier()


def model_tensors(model, runtime):
    return get_model_state_dict(model, options=PARTS if runtime.config.shard else WHOLE)


def state_dicts(parts, runtime):
    """{name: model or Learner} -> {name: its weights, "name optimizer": Adam's averages}, for `save`."""
    result = {}
    for name, part in parts.items():
        learner = part if isinstance(part, Learner) else None
        result[name] = model_tensors(learner.model if learner else part, runtime)
        if learner and learner.optimizer.state:  # without a state, PyTorch would take a step to make one
            options = PARTS if runtime.config.shard else WHOLE
            everything = get_optimizer_state_dict(part.model, part.optimizer, options=options)
            result[f"{name} optimizer"] = everything.get("state", {})  # whole: {} but on rank 0
    return result


def save_folder(path, state, tensors, runtime):
    temporary = path.with_name(f"{path.name}.tmp")
    if runtime.is_main:
        files.remove(temporary)
        temporary.mkdir(parents=True)
    runtime.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
        names = [file.name for file in temporary.glob(f"__{runtime.rank}_*")]
        if runtime.is_main:
            names.append(".metadata")
        digests = dict(runtime.all_gather([(name, files.digest(temporary / name)) for name in names]))
        if runtime.is_main:
            files.save(temporary / "state.pt", state | {"files": digests, "shapes": shapes(tensors)})
            files.replace(temporary, path)
    except CheckpointException as failed:  # raised on all ranks
        raise cause(failed, f"{path} could not be written") from None
    finally:
        if runtime.is_main:
            files.remove(temporary)


def shapes(tensors):
    """A nested dict of tensors -> the same with their shapes, as lists."""
    return {name: shapes(value) if isinstance(value, dict) else list(value.shape) for name, value in tensors.items()}


def read(path, runtime):
    """What `save` wrote, on every rank. A file's tensors are mapped: what is not used is not read. A folder's are without
    values, on the meta device; `load_tensors` reads them. ValueError, on every rank, if anything was changed. One rank
    of each machine checks a file; the ranks share the files of a folder."""
    path, state, intact = Path(path), None, True
    if path.is_dir():
        try:
            state = files.load(path / "state.pt")
            mine = sorted(state["files"])[runtime.rank :: runtime.world_size]
            intact = all(files.digest(path / name) == state["files"][name] for name in mine)
            intact &= "shapes" in state
        except (OSError, ValueError, KeyError, TypeError, UserError):
            intact = False
    elif runtime.local_rank == 0:
        intact = files.is_intact(path)
    if not all(runtime.all_gather([intact])):
        raise ValueError("cut short, damaged or not of this project")
    if state is None:
        return files.load_mapped(path)
    names = state.pop("shapes")
    with torch.device("meta"):
        return state | empty_tensors(names)


def empty_tensors(shapes):
    return {name: empty_tensors(value) if isinstance(value, dict) else torch.empty(value) for name, value in shapes.items()}


def load_tensors(path, tensors):
    """Fill a nested dict of tensors, whole or sharded, from a folder that `save` wrote: each rank reads its part."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about a missing process group
            dcp.load(tensors, storage_reader=files.PlainReader(path))
    except CheckpointException as failed:
        raise cause(failed, f"{path} could not be read") from None


def cause(failed, problem):
    """The exception to raise for one of torch.distributed.checkpoint, which wraps whatever a rank raised, Ctrl-C included."""
    error = next(iter(failed.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt()
    text = str(error).splitlines()[0] if str(error) else ""
    return UserError(f"{problem}: {type(error).__name__} {text}".rstrip())


# ---------------------------------------------------------------- a stopped run

def restore(name, part, state, path):
    """Load what `state_dicts` and `Learner.state` gave for a model or a Learner; `state` is what `read` gave for `path`."""
    model = part.model if isinstance(part, Learner) else part
    if path.is_dir():
        load_tensors(path, {name: get_model_state_dict(model, options=PARTS)})
    else:
        set_model_state_dict(model, state[name], options=StateDictOptions(full_state_dict=True))
    if isinstance(part, Learner):
        part.load_state(state[f"{name} learner"])
        if f"{name} optimizer" in state:
            restore_optimizer(f"{name} optimizer", part, state, path)


def restore_optimizer(name, learner, state, path):
    """Adam's averages; its hyperparameters are the run's own."""
    everything = get_optimizer_state_dict(learner.model, learner.optimizer, options=PARTS)
    if path.is_dir():
        load_tensors(path, {name: everything["state"]})
    else:
        everything["state"] = copy.deepcopy(state[name])  # the file is mapped
    options = StateDictOptions(full_state_dict=not path.is_dir())
    set_optimizer_state_dict(learner.model, learner.optimizer, everything, options=options)


# ---------------------------------------------------------------- models of other runs

def checkpoint_of(path):
    """A run's folder -> its model.pt. Any other path is returned unchanged: a checkpoint, or GPT-2 weights."""
    model = Path(path) / "model.pt"
    return str(model) if is_checkpoint(model) else path


def load_checkpoint(path, made_by, runtime):
    """What `Run.save_model` wrote: see `read`. `made_by` is the command that makes it, for the error message."""
    if not is_checkpoint(path):
        raise UserError(f"{path} is missing; in the default run `{made_by}` makes it")
    try:
        checkpoint = read(path, runtime)
        if isinstance(checkpoint, dict) and {"model", "model_config"} <= checkpoint.keys():
            return checkpoint
        raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged or no checkpoint of this project") from None


def load_model(kind, path, made_by, tokenizer, runtime, new_head=False, context=0, **changes):
    """The model of a checkpoint, placed by the runtime; `changes` replace fields of its GPTConfig. A GPT may also be GPT-2's
    weights as transformers saves them: a folder, a .safetensors or a .bin file.

    new_head: a ScalarModel with the weights of a GPT and a random head. context: cut the context to this number of tokens, or
    extend it by random positions; 0: as it is. UserError if it is missing, damaged, of another kind or vocabulary."""
    saved_as = GPT if new_head else kind
    if is_gpt2(path) and saved_as is GPT:
        try:
            fields, weights = gpt2.read_mapped(path, PRESETS)
        except ValueError as error:
            raise UserError(str(error)) from None
        if fields["vocab_size"] != tokenizer.vocab_size:
            raise UserError(f"{path} has a vocabulary of {fields['vocab_size']}, the dataset's tokenizer.json one of "
                            f"{tokenizer.vocab_size}")
    else:
        checkpoint = load_checkpoint(path, made_by, runtime)
        if checkpoint.get("tokenizer") != tokenizer.fingerprint:
            raise UserError(f"{path} was trained with another vocabulary than the dataset's tokenizer.json")
        fields, weights = checkpoint["model_config"], checkpoint["model"]
    try:
        config = GPTConfig(**fields | changes)
        expected, _ = sharding.build(saved_as, config)
        if {n: w.shape for n, w in expected.state_dict().items()} != {n: w.shape for n, w in weights.items()}:
            raise ValueError
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path} holds no {saved_as.__name__}") from None
    if context:
        if weights["positions.weight"].is_meta:
            weights["positions.weight"] = torch.empty(weights["positions.weight"].shape)
            load_tensors(path, {"model": {"positions.weight": weights["positions.weight"]}})
        weights["positions.weight"] = gpt2.resize_positions(weights["positions.weight"], context)
        config = dataclasses.replace(config, context=context)
    model = runtime.new_model(kind, config) if new_head else runtime.place(sharding.build(kind, config)[0])
    sharding.fill(model, {name: weight for name, weight in weights.items() if not weight.is_meta})
    in_folder = [name for name, weight in weights.items() if weight.is_meta]
    if in_folder:
        own = get_model_state_dict(model, options=PARTS)  # the model's own tensors, also if it is not sharded
        load_tensors(path, {"model": {name: own[name] for name in in_folder}})
    return model


def is_gpt2(path):
    """Whether a path is of GPT-2's weights rather than of a checkpoint, which may be a folder, too."""
    return Path(path).suffix in (".safetensors", ".bin") or Path(path).is_dir() and not is_checkpoint(path)


def is_checkpoint(path):  # a file, or a folder as --shard leaves it
    return Path(path).is_file() or (Path(path) / "state.pt").is_file()
