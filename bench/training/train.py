"""A trajectory as a job: skipped when done, resumed when cut, tried again when it failed."""

import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import threading
import time
import traceback
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bench.config import Experiment, settle
from bench.data import Dataset, open_dataset
from bench.errors import UserError
from bench.runs.folder import RunFolder
from bench.runs.mirror import open_mirror
from bench.training.device import Device, open_device
from bench.training.trainer import Trainer
from kernels import backend

PACKAGES = ("torch", "numpy", "triton")


def train(config: DictConfig, *, wait: bool = False) -> Path:
    """Trains the trajectory of a composed configuration, unless it is done, and returns its folder.

    Args:
        wait: where another process is training it, wait until that has stopped.
    Raises:
        UserError: a mistake in the settings, or not enough memory.
        Diverged: the loss or a gradient was not finite; FAILED in the folder holds the account.
    """
    experiment = settle(config)
    folder = RunFolder(experiment.folder)
    if folder.state == "done":
        return folder.path
    with folder.claimed(wait=wait):
        if folder.state == "done":
            return folder.path
        folder.begin()
        try:
            _train(experiment, folder, config)
        except torch.OutOfMemoryError:
            folder.fail("UserError: out of GPU memory")
            size = experiment.device.micro_batch or experiment.training.sequences
            raise UserError(f"the GPU ran out of memory: set device.micro_batch below {size}") from None
        except Exception:
            folder.fail(traceback.format_exc())
            raise
    return folder.path


def train_in_turn(config: DictConfig) -> None:
    """The job of a sweep. A worker may outlive a killed sweep for a moment: the sweep's successor waits for it."""
    if multiprocessing.parent_process() is not None:
        end_with_parent()
    train(config, wait=True)


@cache
def end_with_parent() -> None:
    """Ends this worker process when its parent is gone. It would train on, and then wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(experiment: Experiment, folder: RunFolder, config: DictConfig) -> None:
    begun = folder.run() if folder.described else None
    if begun and not experiment.device.threads:
        # The order of a sum depends on the number of threads: a resumed trajectory keeps the one it began with.
        experiment = replace(experiment, device=replace(experiment.device, threads=begun["threads"]))
    device = open_device(experiment.device)
    dataset = open_dataset(experiment.data, Path(experiment.paths.data), progress=print)
    if begun and begun["data"]["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"the data changed since {folder.path} was begun: delete that folder to train it on the new data"
        )
    trainer = Trainer(experiment, dataset, device, folder)
    run = describe_run(experiment, dataset, device, trainer)
    folder.describe(OmegaConf.to_yaml(config, resolve=True), run)
    mirror = open_mirror(experiment, {**run, "settings": experiment.identity})
    exit_code = 1
    try:
        with backend.use(device.kernels):
            trainer.run(mirror)
        exit_code = 0
    finally:
        mirror.finish(exit_code)
    folder.finish()


def describe_run(experiment: Experiment, dataset: Dataset, device: Device, trainer: Trainer) -> dict[str, Any]:
    """run.json: what was trained, of what, with which versions, and what a token costs."""
    flops = {name: value / trainer.costs.tokens for name, value in trainer.costs.flops.items()}
    return {
        "study": experiment.study,
        "scale": experiment.scale,
        "variant": experiment.variant,
        "innovations": list(experiment.innovations),
        "seed": experiment.seed,
        "lr": experiment.optimizer.lr,
        "hash": experiment.digest,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device.description,
        "precision": device.precision,
        "kernels": device.implementation,
        "threads": torch.get_num_threads(),
        "parameters": trainer.model.parameter_counts(),
        "flops_per_token": flops,
        "tokens_per_step": trainer.costs.tokens,
        "legs": [asdict(leg) for leg in trainer.legs],
        "data": {
            "name": experiment.data.name,
            "fingerprint": dataset.fingerprint,
            "training_tokens": len(dataset.train),
            "validation_tokens": len(dataset.validation),
            "vocabulary_size": dataset.vocabulary_size,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The commit of the checkout, with a `+` where tracked files differ from it; None outside one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.returncode else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
