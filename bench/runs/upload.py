"""Uploads to Weights & Biases what a run's own files hold and the server lacks.

Whatever mirrored a trajectory before, and however often it was resumed offline, it becomes one W&B run with every row
once. What is missing is asked of the server each time: this is safe to interrupt and to repeat, from any machine.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.config import Experiment
from bench.runs.folder import RunFolder
from bench.runs.mirror import send, start_trajectory, written_rows

SETTINGS = {
    "finish_timeout": 300,  # where the connection is lost W&B would try for hours
    # What W&B records of a machine is to be of the one that trained.
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
}


class Incomplete(Exception):
    """The server has fewer rows than were sent to it."""


def upload(experiment: Experiment) -> str:
    """Uploads the missing rows of a trajectory, and ends its W&B run as the trajectory ended; says what it did.

    A trajectory that is not at its end is left as unfinished; one whose own mirror is at work now is left to it.

    Raises:
        UserError: W&B refuses, for want of a key or a connection.
        Incomplete: some rows did not arrive, as the server says when asked again.
    """
    folder = RunFolder(experiment.folder)
    state, rows = folder.state, written_rows(folder.path)
    if state == "running" and (folder.path / "wandb" / "latest-run").resolve().name.startswith("run-"):
        return "running: its own mirror uploads its rows"
    there = _upload(experiment, state, rows)
    # W&B tells nobody when an upload failed for good.
    if there < len(rows) and _upload(experiment, state, []) < len(rows):
        raise Incomplete(f"{state}: some of {len(rows)} rows did not arrive; run the same command again")
    return f"{state}: {max(0, len(rows) - there)} rows uploaded, {there} were there"


def _upload(experiment: Experiment, state: str, rows: list[dict]) -> int:
    """Sends the rows from the first that the server lacks; returns how many it had before."""
    online = replace(experiment, wandb=replace(experiment.wandb, mode="online"))
    config = {**RunFolder(experiment.folder).run(), "settings": experiment.identity}
    ended = state in ("done", "failed")
    with TemporaryDirectory() as scratch:
        run = start_trajectory(online, config, Path(scratch), x_update_finish_state=ended, **SETTINGS)
        exit_code = 1
        try:
            there = run.starting_step
            for number in range(there, len(rows)):
                send(run, number, rows[number])
            exit_code = 0 if state == "done" else 1
        finally:
            run.finish(exit_code=exit_code)
    return there
