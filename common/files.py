"""Files that are replaced atomically, checkpoints with a checksum, and locks on folders."""

import fcntl
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from common.config import UserError


def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")  # a killed run's leftover is overwritten by the next
    try:
        try:
            remove(temporary)  # a folder, if a sharded run left it
            write(temporary)
        except (RuntimeError, OSError) as error:  # torch.save turns a full disk into a RuntimeError
            raise UserError(f"{path} could not be written: {str(error).splitlines()[0]}") from None
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


SEAL = b"\nsha256 "  # appended to each checkpoint, followed by its checksum


def save(path, state):
    """torch.save, atomically, with a checksum at the end: `load` detects any change."""
    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
        sealed = SEAL + digest(temporary).encode()
        with open(temporary, "ab") as file:
            file.write(sealed)

    write_atomically(path, write)


def load(path):
    """Read what `save` wrote, twice, so that it is never in memory twice: once for the checksum, once for the values.
    ValueError if any bit differs, or if it contains more than plain values and tensors."""
    with open(path, "rb") as file:  # opened once: the path may be replaced meanwhile
        if not is_intact(file):
            raise ValueError("cut short, damaged or not of this project")
        file.seek(0)
        return unpack(file)


def load_mapped(path):
    """As `load`, without the checksum, and tensors are read from the file when they are used."""
    return unpack(os.fspath(path), mmap=True)


def unpack(file, mmap=False):
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)  # no code in it is run
    except Exception as error:  # torch raises a dozen kinds here
        raise ValueError("more than plain values and tensors") from error


def is_intact(file):
    """Whether an open file, or the file at a path, ends with the checksum of its contents."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            return is_intact(opened)
    checksum, last = hashlib.sha256(), b""
    for block in iter(lambda: file.read(2**20), b""):
        last += block
        checksum.update(last[: -len(SEAL) - 64])
        last = last[-len(SEAL) - 64 :]
    return last == SEAL + checksum.hexdigest().encode()


def remove(path):
    """Remove a file or a folder, if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(source, target):
    """Rename a file or a folder. What was at `target` is removed before."""
    if Path(source).is_dir() or Path(target).is_dir():
        remove(target)
    os.replace(source, target)


def digest(path, made_by=None):
    """A fingerprint of a file's contents, or of all files of a folder. A checkpoint folder has those of its files in state.pt.
    UserError if it is missing; `made_by` is the command that makes it."""
    path = Path(path)
    if (path / "state.pt").is_file():
        path = path / "state.pt"
    if path.is_dir():
        return hashlib.sha256("".join(digest(p) for p in sorted(path.iterdir()) if p.is_file()).encode()).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} is missing" + (f"; in the default run `{made_by}` makes it" if made_by else "")) from None


class PlainReader(dcp.FileSystemReader):
    """Reads a folder of tensors without running code that a manipulated file may contain: PyTorch's reader unpickles
    .metadata."""

    def read_metadata(self):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = PlainUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainUnpickler(pickle.Unpickler):
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {"Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex",
                                                  "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "StorageMeta"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not expected here")
        return super().find_class(module, name)


LOCKS = {}  # folder -> open file, which holds the lock until it is closed or the process ends


def lock(folder, runtime):
    """Keep other commands from writing into the folder until `unlock`. UserError, on every rank, if another command holds
    the lock. Rank 0 holds it; locking twice in one process is allowed."""
    taken, name = [], Path(folder).resolve()
    if runtime.is_main and name not in LOCKS:
        handle = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[name] = handle
        except BlockingIOError:
            os.close(handle)
            taken.append(name)
        except OSError:  # a file system without locks
            os.close(handle)
    if runtime.all_gather(taken):
        raise UserError(f"{folder} is being written by another run")


def unlock(folder):
    if handle := LOCKS.pop(Path(folder).resolve(), None):
        os.close(handle)
