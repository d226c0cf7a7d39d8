"""What happens to a trajectory as a job: each mishap ends in one clear sentence and costs nothing that was on disk."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.compose import compose_config
from bench.errors import Stopped, UserError
from bench.runs.claim import ClaimLost, claim_path, newest_number
from bench.runs.folder import RunFolder, read_rows
from bench.training.train import train
from bench.training.trainer import Trainer
from tests.bench.trajectories import counted_rows, folder_of

ROOT = Path(__file__).parents[3]


def before_step(monkeypatch, number: int, do) -> None:
    """Calls `do` before the step of that number, counted over trunk and branches."""
    train_step = Trainer.train_step

    def step(self, rate):
        if self.steps_done == number:
            do(self)
        return train_step(self, rate)

    monkeypatch.setattr(Trainer, "train_step", step)


def stop(trainer):
    raise Stopped


@pytest.fixture
def undisturbed(overrides, tmp_path) -> list[dict]:
    return counted_rows(RunFolder(train(compose_config([*overrides, f"paths.runs={tmp_path}/whole"]))))


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint(overrides, undisturbed):
    """As if it were: larger files are refused. The first checkpoint, without an optimizer's state, still fits."""
    settings = ["logging.checkpoint_seconds=0", "device.threads=1"]  # as this process has
    command = [sys.executable, "-m", "bench", "train", *overrides, *settings]
    limit = 60_000
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: cannot use")
    assert "File too large; mend that and start again" in line
    folder = folder_of(overrides)
    assert folder.state == "failed"
    assert folder.failure.startswith("UserError: cannot use")
    assert len(list(folder.checkpoints.glob("leg-*[0-9]"))) == 1
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert counted_rows(folder) == undisturbed


def test_a_process_that_was_overtaken_writes_nothing_more(overrides, undisturbed, monkeypatch):
    def overtake(trainer):
        folder = trainer.folder.path
        other = {"host": "elsewhere", "pid": 1, "boot": "another", "beat": 0, "released": True}
        claim_path(folder, newest_number(folder) + 1).write_text(json.dumps(other))

    with monkeypatch.context() as patch:
        before_step(patch, 7, overtake)
        with pytest.raises(ClaimLost, match="process 1 on elsewhere has taken over"):
            train(compose_config(overrides))
    folder = folder_of(overrides)
    assert len(read_rows(folder.metrics.path)) == 7
    assert folder.state == "unfinished"
    train(compose_config(overrides))
    assert counted_rows(folder) == undisturbed


def test_a_clock_that_jumps_changes_nothing(overrides, undisturbed, monkeypatch):
    clock = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock.uniform(0, 4e9))
    train(compose_config([*overrides, "logging.checkpoint_seconds=0"]))
    assert counted_rows(folder_of(overrides)) == undisturbed


def test_a_trajectory_is_not_continued_in_another_precision(overrides, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 5, stop)
        with pytest.raises(Stopped):
            train(compose_config(overrides))
    with pytest.raises(UserError, match=r"begun in float32, not bfloat16: set device\.precision=float32"):
        train(compose_config([*overrides, "device.precision=bfloat16"]))
    train(compose_config(overrides))
    assert counted_rows(folder_of(overrides)) == undisturbed


def test_a_study_that_changed_begins_anew_beside_what_is_there(overrides, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 5, stop)
        with pytest.raises(Stopped):
            train(compose_config(overrides))
    before = {path: path.read_bytes() for path in folder_of(overrides).path.rglob("*") if path.is_file()}
    train(compose_config([*overrides, "optimizer.beta2=0.9"]))
    assert {path: path.read_bytes() for path in folder_of(overrides).path.rglob("*") if path.is_file()} == before


def test_on_another_kind_of_device_seconds_are_no_longer_told(overrides, undisturbed, monkeypatch, capsys):
    """Those of two machines add up to nothing that an axis could show; all else is as it was."""
    folder = folder_of(overrides)
    with monkeypatch.context() as patch:
        before_step(patch, 9, stop)
        with pytest.raises(Stopped):
            train(compose_config(overrides))
    told = [row["seconds"] for row in read_rows(folder.metrics.path)]
    run = {**folder.run(), "device": "a faster machine"}
    (folder.path / "run.json").write_text(json.dumps(run))
    train(compose_config([*overrides]))
    assert "begun with device a faster machine:" in capsys.readouterr().out
    assert all(seconds is not None for seconds in told)
    after = [row["seconds"] for row in read_rows(folder.metrics.path)[len(told) :]]
    assert after
    assert set(after) == {None}
    assert counted_rows(folder) == undisturbed


@pytest.mark.parametrize("signals", [1, 5])
def test_a_signal_stops_at_a_checkpoint(overrides, undisturbed, monkeypatch, signals):
    def arrive(trainer):
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_step(patch, 10, arrive)
        with pytest.raises(Stopped) as stopped:
            train(compose_config(overrides))
    assert stopped.value.code == 75
    folder = folder_of(overrides)
    assert folder.state == "unfinished"
    rows = len(read_rows(folder.metrics.path))
    assert rows == 11  # the step in which it arrived is finished
    train(compose_config(overrides))
    assert counted_rows(folder) == undisturbed
