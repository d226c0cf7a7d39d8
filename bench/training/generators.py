"""Every random generator that a part of a model may draw from: PyTorch's, Python's and NumPy's own."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """Different in every process of a trajectory: what they drop out must not be the same."""
    if rank:  # hashed, as PyTorch's generator on the CPU takes note of the lowest 32 bits only
        digest = hashlib.blake2b(f"{seed}/{rank}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "big")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def generator_tensors(rank: int) -> dict[str, Tensor]:
    """The states of this process's generators in PyTorch, named by its rank."""
    states = {f"generator.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"generator.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def other_generators() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, as JSON has them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def restore_generators(tensors: dict[str, Tensor], others: dict[str, Any], rank: int) -> None:
    """Undoes all draws since the states were taken; a process that was not there then keeps its own states."""
    if str(rank) not in others:
        return
    version, words, gauss = others[str(rank)]["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(others[str(rank)]["numpy"]))  # noqa: NPY002
    torch.set_rng_state(tensors[f"generator.cpu.{rank}"])
    if torch.cuda.is_available() and f"generator.cuda.{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"generator.cuda.{rank}"])
