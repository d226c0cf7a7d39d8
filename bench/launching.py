"""A sweep's jobs through Hydra's launchers: a job that is lost costs the sweep nothing but itself."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from bench.compose import hydra_session
from bench.config import one_line
from bench.errors import UserError

TELL_SECONDS = 10.0  # between looks at how far a sweep is


class PoolBroken(Exception):
    """A worker process was killed, which ends joblib's others too; what none of them had begun can be sent again."""


def launch(
    overrides: Sequence[str],
    jobs: Sequence[Sequence[str]],
    task: Callable[[DictConfig], str | None],
    standing: Callable[[], str] | None = None,
) -> list[str | None]:
    """Runs `task` once a job through the chosen `hydra/launcher`, and returns when all have ended.

    A study's trajectories are no product of lists (each variant has its own learning rates), so the jobs go to the
    launcher as they are instead of through a sweeper.

    Args:
        overrides: what all jobs share.
        jobs: the overrides of each job.
        task: a function that can be pickled; it returns what kept it from its work, on one line.
        standing: says how far the sweep is, for launchers whose jobs do not write to this terminal.
    Returns:
        What each job returned, or what went wrong with it on one line; None where nothing did.
    Raises:
        UserError: the launcher cannot send the jobs.
        PoolBroken: joblib lost a worker.
    """
    with hydra_session():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)
        name = config.hydra.runtime.choices["hydra/launcher"]
        gpus = check_gpus(name, config)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=_callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=context, task_function=partial(attempt, task)
        )
        shared = list(config.hydra.overrides.task)  # the launcher itself passes on only those of `hydra`
        size = config.hydra.sweeper.max_batch_size or at_a_time(name, len(jobs), gpus)
        if size < 0:
            raise UserError("hydra.sweeper.max_batch_size must be the number of jobs to send at once")
        outcomes: list[str | None] = []
        with patience(name, launcher), told(standing if name not in ("basic", "joblib") else None):
            for first in range(0, len(jobs), size):
                batch = [[*shared, *job] for job in jobs[first : first + size]]
                outcomes += [job.return_value for job in launcher.launch(batch, initial_job_idx=first)]
        return outcomes


def _callbacks(config: DictConfig) -> Any:
    from hydra._internal.callbacks import Callbacks  # a launcher cannot be made without one

    return Callbacks(config)


def attempt(task: Callable[[DictConfig], str | None], config: DictConfig) -> str | None:
    """Runs a job; what it raises comes back as a line, for not every exception survives the way between processes."""
    try:
        return task(config)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def at_a_time(launcher: str, jobs: int, gpus: float) -> int:
    """Jobs in a batch: submitit starts all those of this machine at once, where others know how many it bears.

    Args:
        gpus: that a job is given; to all that run at once submitit would give the same.
    """
    if launcher != "submitit_local":
        return jobs
    return 1 if gpus else len(os.sched_getaffinity(0))


def check_gpus(name: str, config: DictConfig) -> float:
    """How many GPUs a job is given, as far as the launcher is told.

    Raises:
        UserError: jobs would train on fewer GPUs than they could, or are given; it says what to change.
    """
    key = "ray.remote.num_gpus" if name == "ray" else "gpus_per_node"
    given, processes = OmegaConf.select(config.hydra.launcher, key) or 0, config.device.processes
    if given > 1 and processes not in (0, given):
        raise UserError(
            f"hydra.launcher.{key}={given} gives a trajectory {given} GPUs and device.processes={processes} uses "
            f"{processes}: make them the same, or say device.processes=0"
        )
    hides = name in ("submitit_local", "ray")  # GPUs that a job did not ask for
    if hides and not given and config.device.name != "cpu" and torch.cuda.is_available():
        raise UserError(f"hydra/launcher={name} gives a job no GPU: say hydra.launcher.{key}=1, or device=cpu")
    return given


@contextmanager
def patience(name: str, launcher: Any) -> Iterator[None]:
    """Waits on where a launcher's own code would give up the sweep; what it cannot do at all is a UserError."""
    waits = {"submitit_local": patient_submitit, "submitit_slurm": patient_submitit, "ray": patient_ray}
    try:
        with waits[name](launcher) if name in waits else nullcontext():
            yield
    except (HydraException, AssertionError, AttributeError, LookupError, NameError):  # the last four are our own faults
        raise
    except KeyboardInterrupt:
        if name == "submitit_slurm":
            print("SLURM keeps the jobs it has: squeue and `status` show them, scancel ends them", file=sys.stderr)
        raise
    except Exception as error:
        if type(error).__name__ in ("TerminatedWorkerError", "BrokenProcessPool"):  # of a copy of loky inside joblib
            raise PoolBroken from None
        raise UserError(f"hydra/launcher={name} cannot run the jobs: {' '.join(str(error).split())}") from error


@contextmanager
def forgiving(owner: Any, wait: str, losses: type | tuple[type, ...], account: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, `owner.wait(job)` returns `account(job, error)` instead of raising one of `losses`."""
    original = getattr(owner, wait)

    def wait_or_account(job: Any) -> Any:
        try:
            return original(job)
        except losses as error:
            return account(job, error)

    setattr(owner, wait, wait_or_account)
    try:
        yield
    finally:
        setattr(owner, wait, original)


def lost(why: str) -> JobReturn:
    job = JobReturn(status=JobStatus.COMPLETED)
    job.return_value = f"the job was lost: {why}"
    return job


@contextmanager
def patient_submitit(launcher: Any) -> Iterator[None]:
    """A job that was killed, ran out of time or memory, or lost its node."""
    from submitit.core.core import Job
    from submitit.core.utils import FailedJobError, UncompletedJobError

    def account(job: Job, error: Exception) -> list[JobReturn]:
        return [lost(f"{job.state}, see {job.paths.stderr}")]

    with forgiving(Job, "results", (FailedJobError, UncompletedJobError), account):
        yield


@contextmanager
def patient_ray(launcher: Any) -> Iterator[None]:
    """A worker or a node that died more often than Ray tries again."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        if not ray.is_initialized():
            # The launcher would ask for an amount of memory, which Ray refuses where a cluster runs already.
            ray.init(**OmegaConf.to_container(launcher.ray_cfg.init, resolve=True))
        with forgiving(ray, "get", ray.exceptions.RayError, lambda job, error: lost(one_line(error))):
            yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray had put its own there


@contextmanager
def told(standing: Callable[[], str] | None) -> Iterator[None]:
    """Prints what `standing` says, each time that it changed."""
    if standing is None:
        yield
        return
    ended = threading.Event()

    def tell() -> None:
        said = ""
        while not ended.wait(TELL_SECONDS):
            if (now := standing()) != said:
                print(now, flush=True)
                said = now

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
