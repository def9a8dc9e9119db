"""Random numbers as a function of (seed, purpose, step) alone, never of history, rank or number of ranks.

So a run that was stopped and resumed ends with the same weights, and ranks draw the same numbers without communication.
"""

import hashlib

import torch


def seed_of(seed, purpose, step=0):
    """A 63-bit seed that depends on these three values only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed, purpose, step=0):
    """A CPU generator of random numbers for one purpose at one step."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, step))


def seed_torch(seed, purpose, step=0):
    """Seed PyTorch's global generators: for initialization and dropout. Returns the seed."""
    number = seed_of(seed, purpose, step)
    torch.manual_seed(number)
    return number
