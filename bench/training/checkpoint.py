"""Checkpoints: complete or absent, newest first, and nothing in them that needs unpickling.

A checkpoint is a folder `leg-LLL-step-SSSSSSSS` that holds

    model.safetensors       the weights, by parameter name
    training.safetensors    the optimizer's state and the random generators
    progress.json           where the trajectory stood, and a hash of both files

It is written beside under another name and renamed, so a kill leaves the ones before it untouched.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TENSOR_FILES = ("model.safetensors", "training.safetensors")
PATTERN = re.compile(r"leg-\d{3,}-step-\d{8,}")


@dataclass
class Progress:
    """Where a trajectory stands. Everything else (tokens, FLOPs, data position) follows from `step`."""

    leg: int
    step: int
    seconds: float  # spent on the path from step 0 to here, without evaluations and checkpoints
    joules: float | None
    metrics_size: int  # bytes of metrics.jsonl and results.jsonl that belong to this state
    results_size: int

    @property
    def name(self) -> str:
        return checkpoint_name(self.leg, self.step)


def checkpoint_name(leg: int, step: int) -> str:
    return f"leg-{leg:03d}-step-{step:08d}"


def save_checkpoint(folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Writes a complete checkpoint under `folder` and returns its path."""
    target = folder / progress.name
    beside = folder / f"{progress.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(_parameters(model), beside / TENSOR_FILES[0])
    save_file({**_optimizer_tensors(model, optimizer), **_generator_states()}, beside / TENSOR_FILES[1])
    account = {**asdict(progress), "hashes": {name: _hash(beside / name) for name in TENSOR_FILES}}
    (beside / "progress.json").write_text(json.dumps(account))
    for path in (*beside.iterdir(), beside):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    _sync(folder)
    return target


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts a checkpoint's state into the model, the optimizer and the global generators."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, saved in load_file(path / TENSOR_FILES[0]).items():
            parameters[name].copy_(saved)
    saved = load_file(path / TENSOR_FILES[1])
    _restore_optimizer(model, optimizer, saved)
    torch.set_rng_state(saved["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in saved:
        torch.cuda.set_rng_state(saved["generator.cuda"])
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    account = json.loads((path / "progress.json").read_text())
    del account["hashes"]
    return Progress(**account)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest sound checkpoint, and the newer ones that were passed over because they are damaged."""
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        if is_sound(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("leg-*") if PATTERN.fullmatch(path.name)]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def is_sound(path: Path) -> bool:
    try:
        hashes = json.loads((path / "progress.json").read_text())["hashes"]
        return all(_hash(path / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune_checkpoints(folder: Path, keep: set[Path], newest: int = 2) -> None:
    """Removes all but the newest few and those in `keep`, and what interrupted writes left."""
    for path in list_checkpoints(folder)[:-newest]:
        if path not in keep:
            shutil.rmtree(path)
    for path in folder.glob("*.partial"):
        shutil.rmtree(path)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _names_by_index(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer's state_dict counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _names_by_index(model, optimizer)
    return {
        f"optimizer.{key}.{names[index]}": value.detach().contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    indices = {name: index for index, name in enumerate(_names_by_index(model, optimizer))}
    for full_name, value in saved.items():
        if full_name.startswith("optimizer."):
            _, key, name = full_name.split(".", 2)
            state.setdefault(indices[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _generator_states() -> dict[str, Tensor]:
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
