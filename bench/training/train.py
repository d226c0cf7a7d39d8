"""A trajectory as a job: skipped when done, resumed when cut, tried again when it failed; in one process or several."""

import errno
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import threading
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bench.config import Experiment, settle
from bench.data import Dataset, open_dataset
from bench.errors import Stopped, TrajectoryFailed, UserError
from bench.runs.claim import ClaimLost, FolderTaken
from bench.runs.folder import RunFolder
from bench.runs.mirror import Mirror, NoMirror, open_mirror
from bench.training.device import Device, open_device
from bench.training.trainer import Diverged, Trainer
from bench.training.workers import start_workers, workers_to_start
from bench.training.world import World, find_world, joined
from kernels import backend

# What a step's seconds and joules depend on, in run.json, beside what belongs to a trajectory's identity.
PACE = ("device", "kernels", "threads", "processes", "parallel", "compile", "micro_batch")
TAKEN = "another process trains it"
PACKAGES = ("torch", "numpy", "triton")
# What the disk may say to a write, and only the user can mend.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


def train(config: DictConfig) -> Path:
    """Trains the trajectory of a composed configuration, unless it is done, and returns its folder.

    Raises:
        UserError: a mistake in the settings, not enough memory, a disk that cannot be written, or another process that
            trains it.
        Diverged: the loss or a gradient was not finite; FAILED in the folder holds the account.
        ClaimLost: this process was suspended for so long that another one took the folder over.
        Stopped: a signal asked for it; the trajectory goes on from there when it is trained again.
    """
    experiment = settle(config)
    folder = RunFolder(experiment.folder)
    if folder.state == "done":
        return folder.path
    if processes := workers_to_start(experiment.device):
        train_with_workers(processes, folder, config)
        return folder.path
    world = find_world()
    with joined(world), ExitStack() as stack:

        def claim() -> bool:
            stack.enter_context(folder.claimed())
            return folder.state != "done"

        if world.first(claim):
            train_claimed(experiment, folder, config, world)
    return folder.path


def train_with_workers(processes: int, folder: RunFolder, config: DictConfig) -> None:
    """Trains in processes of its own; FAILED tells what went wrong first, in whichever of them that was."""
    try:
        start_workers(processes, train_as_worker, config)
    except (FolderTaken, ClaimLost):
        raise
    except (UserError, TrajectoryFailed) as error:
        if str(error) not in folder.failure:
            folder.fail(f"{type(error).__name__}: {error}")
        raise


def train_claimed(experiment: Experiment, folder: RunFolder, config: DictConfig, world: World) -> None:
    """Trains in a folder that the first process of this world has claimed; FAILED tells what went wrong."""
    try:
        world.first(folder.begin)
        _train(experiment, folder, config, world)
    except ClaimLost:
        raise
    except Diverged:  # in all processes alike: the first to end would end the others before they have written
        account = traceback.format_exc()
        world.first(lambda: folder.fail(account))
        raise
    except torch.OutOfMemoryError:
        size = experiment.device.micro_batch or experiment.training.sequences // world.size
        problem = UserError(f"the GPU ran out of memory: set device.micro_batch below {size}")
        _fail(folder, world, "UserError: out of GPU memory")
        raise problem from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            _fail(folder, world, traceback.format_exc())
            raise
        sentence = f"cannot use {error.filename or folder.path}: {error.strerror}"
        _fail(folder, world, f"UserError: {sentence}")
        raise UserError(f"{sentence}; mend that and start again: what was written before is as it was") from None
    except Exception:
        _fail(folder, world, traceback.format_exc())
        raise


def _fail(folder: RunFolder, world: World, account: str) -> None:
    if world.leads:
        folder.fail(account)


def train_as_worker(config: DictConfig) -> None:
    """One of the processes that a job starts for its trajectory."""
    end_with_parent()
    train(config)


def train_in_turn(config: DictConfig) -> str | None:
    """The job of a sweep; returns TAKEN where another process trains the trajectory, which is then left to it."""
    if multiprocessing.parent_process() is not None:
        end_with_parent()
    try:
        train(config)
    except FolderTaken:
        return TAKEN
    return None


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


def _train(experiment: Experiment, folder: RunFolder, config: DictConfig, world: World) -> None:
    begun = world.first(lambda: folder.run() if folder.described else None)
    if begun and not experiment.device.threads and begun.get("processes", 1) == world.size:
        # The order of a sum depends on the number of threads: a resumed trajectory keeps the one it began with.
        experiment = replace(experiment, device=replace(experiment.device, threads=begun.get("threads", 0)))
    device = open_device(experiment.device, world.local_rank)
    data = Path(experiment.paths.data)
    world.first(lambda: open_dataset(experiment.data, data, progress=print).fingerprint)  # prepares it, once for all
    dataset = open_dataset(experiment.data, data, progress=print)
    if begun:
        check_unchanged(begun, folder, dataset, device)
    trainer = Trainer(experiment, dataset, device, folder, world)
    run = describe_run(experiment, dataset, device, trainer)
    changed = [key for key in PACE if begun and begun.get(key, run[key]) != run[key]]
    trainer.measured = not changed
    mirror: Mirror = NoMirror()
    if world.leads:
        if changed:
            was = ", ".join(f"{key} {begun[key]}" for key in changed)
            print(f"{folder.path} was begun with {was}: from here on seconds and joules would mean nothing")
        folder.describe(OmegaConf.to_yaml(config, resolve=True), run)
        mirror = open_mirror(experiment, {**run, "settings": experiment.identity})
    try:
        with backend.use(device.kernels):
            trainer.run(mirror)
    except (Diverged, Stopped):  # in all processes alike
        world.first(lambda: mirror.finish(1))
        raise
    except BaseException:
        mirror.finish(1)
        raise
    world.first(lambda: mirror.finish(0))
    world.first(folder.finish)


def check_unchanged(begun: dict[str, Any], folder: RunFolder, dataset: Dataset, device: Device) -> None:
    """Refuses to go on with what would make a trajectory of two halves.

    Args:
        begun: run.json, from when it was begun.
    Raises:
        UserError: the data or the precision are others.
    """
    if begun["data"]["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"the data changed since {folder.path} was begun: delete that folder to train it on the new data"
        )
    if begun["precision"] != device.precision:
        raise UserError(
            f"{folder.path} was begun in {begun['precision']}, not {device.precision}: set device.precision="
            f"{begun['precision']}, or delete that folder"
        )


def describe_run(experiment: Experiment, dataset: Dataset, device: Device, trainer: Trainer) -> dict[str, Any]:
    """run.json: what was trained, of what, with which versions, and what a token costs."""
    processes = trainer.world.size
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
        "device": f"{processes} x {device.description}" if processes > 1 else device.description,
        "precision": device.precision,
        "kernels": device.implementation,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "parallel": experiment.device.parallel if processes > 1 else None,
        "compile": experiment.device.compile,
        "micro_batch": trainer.micro_batch,
        "energy": {"source": trainer.meter.source, "problem": trainer.meter.problem},
        "cost": trainer.prices.account(),
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
