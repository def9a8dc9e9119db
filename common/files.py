"""Files that are replaced atomically, checkpoints with a checksum, and locks on folders."""

import fcntl
import hashlib
import os
from pathlib import Path

import torch

from common.config import UserError


def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")  # a killed run's leftover is overwritten by the next
    try:
        try:
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


def digest(path):
    """A fingerprint of a file's contents, or of all files of a folder."""
    if Path(path).is_dir():
        return hashlib.sha256("".join(digest(p) for p in sorted(Path(path).iterdir()) if p.is_file()).encode()).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


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
