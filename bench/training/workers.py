"""Starts the processes of a trajectory that is given several GPUs or machines, with torchrun's own engine.

A job is one trajectory and one process, whoever launched it; here it becomes several. Where a job has several machines,
`srun` runs it once on each of them, and each starts the workers of its machine.
"""

import logging
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bench.config import DeviceConfig
from bench.errors import Stopped, TrajectoryFailed, UserError
from bench.runs.claim import ClaimLost, FolderTaken
from bench.training.signals import StopSignals
from bench.training.world import step_address, tasks_of_step


def workers_to_start(config: DeviceConfig, environment: Mapping[str, str] = os.environ) -> int:
    """How many workers this process should start; 0 where it does the work itself, as a worker or alone.

    Raises:
        UserError: there are fewer GPUs than that.
    """
    started = "TORCHELASTIC_RUN_ID" in environment or environment.get("WORLD_SIZE", "1") not in ("", "1")
    if started or config.processes == 1:
        return 0
    gpus = 0 if config.name == "cpu" else torch.cuda.device_count()
    processes = config.processes or max(1, gpus)
    if gpus and processes > gpus:
        raise UserError(
            f"device.processes={processes}, but only {gpus} GPUs are visible here: set it to at most {gpus}"
        )
    return processes if processes * tasks_of_step(environment) > 1 else 0


def start_workers(processes: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Runs `work` in so many processes here (and on the other machines of this SLURM step), and waits for them.

    Args:
        work: a function of a module; it and its arguments are pickled.
    Where a signal stopped them, but a handler that was there before wants the work to go on, they are started again.

    Raises:
        Stopped: a signal asked for it; where training had begun, a checkpoint was written.
        UserError, TrajectoryFailed: as `work` raised it; TrajectoryFailed also where a worker died.
    """
    with (
        StopSignals(_pass_on) as signals,
        tempfile.TemporaryDirectory() as logs,
        _quiet_engine(),
        _shared_cores(processes),
    ):
        while _were_stopped(_launch_config(processes, logs), signals, work, *arguments):
            signals.stop()


def _were_stopped(config: LaunchConfig, signals: StopSignals, work: Callable[..., Any], *arguments: Any) -> bool:
    """Runs the workers; whether a signal stopped them before they were done."""
    try:
        elastic_launch(config, _work)(work, *arguments)
    except Stopped:
        return True
    except SignalException as error:  # the terminal was closed
        raise TrajectoryFailed(f"ended by signal {int(error.sigval)}: start it again to go on") from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == Stopped.code or -failure.exitcode == signals.received:  # it had not begun to train
            return True
        raise _what_failed(failure) from None
    return False


def _launch_config(processes: int, logs: str) -> LaunchConfig:
    machines = tasks_of_step()
    if machines > 1:
        host, port = step_address()
        endpoint, name = f"{host}:{port}", os.environ["SLURM_JOB_ID"]
    else:
        endpoint, name = "localhost:0", uuid.uuid4().hex
    return LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours: workers need time for a checkpoint
    )


@record  # what it raises is told to the process that started it
def _work(work: Callable[..., Any], *arguments: Any) -> None:
    # The engine sends it when the process that started this one is gone, a terminal when the user has had enough. As a
    # KeyboardInterrupt it would take the others' connections down in an order that can block for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    work(*arguments)


def _what_failed(failure: ProcessFailure) -> Exception:
    """The exception that a worker's "Type: text" tells of, as the command line knows it."""
    if failure.exitcode < 0:
        return TrajectoryFailed(f"a worker was killed by signal {-failure.exitcode}: start it again to go on")
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    kind, _, text = message.partition(": ")
    kinds = {"UserError": UserError, "FolderTaken": FolderTaken, "ClaimLost": ClaimLost, "Diverged": TrajectoryFailed}
    return kinds[kind](text) if kind in kinds else TrajectoryFailed(message)


def _pass_on(number: int) -> None:
    workers = multiprocessing.active_children()
    if not workers:  # nobody would ever act on it
        raise Stopped
    for worker in workers:
        if worker.pid is not None:
            os.kill(worker.pid, number)


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """The engine would print, at length, what is told in one line."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _shared_cores(processes: int) -> Iterator[None]:
    """Lets the workers share the machine's cores, unless the environment says how many each has."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
