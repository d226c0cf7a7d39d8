"""Every trajectory of a study, or of a plain sweep: the dearest first, and failures told at the end.

What is done is left out, and what another process trains, on whatever machine, is left to it: several machines may
train one study in one folder. A sweep that was stopped goes on with the same command.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.compose import override_key, split_sweep
from bench.data import open_dataset
from bench.errors import UserError
from bench.launching import PoolBroken, launch
from bench.runs.claim import newest_number
from bench.runs.folder import RunFolder
from bench.runs.study import plan_study, settle_jobs, study_experiments
from bench.training.plan import plan_ahead
from bench.training.train import TAKEN, train_in_turn

LOOK_SECONDS = 2.0  # between looks at what other processes train


@dataclass(frozen=True)
class Job:
    overrides: list[str]
    folder: RunFolder
    flops: float  # that it will take in all


def train_sweep(overrides: list[str]) -> int:
    """Trains what is not done; the exit status is 1 where something is not done in the end."""
    refuse_copies()
    shared, total, jobs = plan_jobs(overrides)
    print(f"{total} trajectories, {total - len(jobs)} of them done", flush=True)
    problems: dict[Path, str | None] = {}
    ready, taken = jobs, []
    while ready:
        problems |= send(shared, label(ready, total))
        taken, ready = wait_for_others([*taken, *(job for job in ready if problems[job.folder.path] == TAKEN)])
    return report_failures(jobs, problems)


def refuse_copies() -> None:
    """Under torchrun or srun each process would run the whole sweep."""
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        processes = os.environ.get(variable) or "1"
        if not processes.isdecimal():
            raise UserError(f"{variable}={processes} is no number of processes: unset it")
        if int(processes) > 1:
            raise UserError(
                f"{variable}={processes}: each of these processes would run the whole sweep; start it once, "
                "and say device.processes= for several processes to a trajectory"
            )


def plan_jobs(overrides: list[str]) -> tuple[list[str], int, list[Job]]:
    """The overrides that all share, the number of trajectories, and a job for each that is not done, dearest first.

    Data are prepared here, and not in every worker; a mistake in the settings ends the sweep before it begins.
    """
    if any(override_key(override) == "study" for override in overrides):
        shared, settings, experiments = overrides, plan_study(overrides), study_experiments(overrides)
    else:
        shared, settings = split_sweep(overrides)
        experiments = settle_jobs(shared, settings)
    distinct = {experiment.folder: (own, experiment) for own, experiment in zip(settings, experiments, strict=True)}
    jobs = []
    for path, (own, experiment) in distinct.items():
        folder = RunFolder(path)
        if folder.state != "done":
            dataset = open_dataset(experiment.data, Path(experiment.paths.data), progress=print)
            jobs.append(Job(own, folder, plan_ahead(experiment, dataset.vocabulary_size).model_flops))
    return shared, len(distinct), sorted(jobs, key=lambda job: -job.flops)


def label(jobs: list[Job], total: int) -> list[tuple[list[str], RunFolder]]:
    """Each job's overrides, with its number in the order of launching, and its folder."""
    first = total - len(jobs) + 1
    return [([*job.overrides, f"logging.label={n}/{total}"], job.folder) for n, job in enumerate(jobs, start=first)]


def send(shared: list[str], jobs: list[tuple[list[str], RunFolder]]) -> dict[Path, str | None]:
    """Launches jobs; returns for each folder what kept its trajectory from being done."""

    def standing() -> str:
        states = [folder.state for _, folder in jobs]
        return f"{states.count('done')} of {len(jobs)} done, {states.count('running')} running"

    if not jobs:
        return {}
    claims = {folder.path: newest_number(folder.path) for _, folder in jobs}
    try:
        problems = launch(shared, [own for own, _ in jobs], train_in_turn, standing)
    except PoolBroken:
        untouched = [(own, folder) for own, folder in jobs if newest_number(folder.path) == claims[folder.path]]
        begun = [folder for _, folder in jobs if newest_number(folder.path) != claims[folder.path]]
        if not begun:
            raise UserError("a worker process was killed before it began to train") from None
        return dict.fromkeys((folder.path for folder in begun), "a worker process was killed") | send(shared, untouched)
    return {folder.path: problem for (_, folder), problem in zip(jobs, problems, strict=True)}


def wait_for_others(jobs: list[Job]) -> tuple[list[Job], list[Job]]:
    """Waits until other processes have ended these trajectories, or left one unfinished: still theirs, and ready."""
    if jobs:
        print(f"waiting for {len(jobs)} trajectories that other processes train", flush=True)
    while jobs:
        states = [job.folder.state for job in jobs]
        ready = [job for job, state in zip(jobs, states, strict=True) if state in ("unfinished", "absent")]
        jobs = [job for job, state in zip(jobs, states, strict=True) if state == "running"]
        if ready:
            return jobs, ready
        time.sleep(LOOK_SECONDS)
    return [], []


def report_failures(jobs: list[Job], problems: dict[Path, str | None]) -> int:
    """Lists the trajectories that are not done; the exit status is 1 where there are any."""
    failed = [job.folder for job in jobs if job.folder.state != "done"]
    for folder in failed:
        why = folder.failure if folder.state == "failed" else problems.get(folder.path) or folder.state
        print(f"failed: {folder.path}: {why}", file=sys.stderr)
    return 1 if failed else 0
