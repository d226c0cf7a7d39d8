"""Against a server of our own: what it has in the end is every row of our files once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bench.compose import compose_config
from bench.config import settle
from bench.errors import UserError
from bench.runs import upload as uploads
from bench.runs.folder import RowFile, RunFolder
from bench.runs.mirror import run_id, written_rows
from bench.runs.upload import Incomplete, upload
from bench.training.train import train
from tests.bench.conftest import ServerRun
from tests.bench.trajectories import interrupted, without_nulls


@pytest.fixture
def config(overrides):
    return compose_config([*overrides, "innovation=[rope]"])


@pytest.fixture
def has(wandb_server, config):
    """Makes the server have the first rows of the trajectory already."""

    def put(count: int) -> ServerRun:
        experiment = settle(config)
        rows = without_nulls(written_rows(experiment.folder))[:count]
        lines = [json.dumps({**row, "_step": number}) for number, row in enumerate(rows)]
        run = wandb_server.runs[run_id(experiment.digest, experiment.study)] = ServerRun(lines=lines)
        return run

    return put


@pytest.mark.parametrize("there", [0, 1, 7, -1, None])
def test_what_is_missing_is_uploaded(there, config, has):
    """The server has none, some, all but one, or all of the rows."""
    folder = train(config)
    ours = without_nulls(written_rows(folder))
    had = len(ours[:there])
    run = has(had)
    assert upload(settle(config)) == f"done: {len(ours) - had} rows uploaded, {had} were there"
    assert run.rows == ours
    assert run.steps == list(range(len(ours)))
    assert set(run.exits) == {0}
    assert upload(settle(config)) == f"done: 0 rows uploaded, {len(ours)} were there"
    assert run.rows == ours


def test_offline_sessions_become_one_run(overrides, wandb_server, monkeypatch):
    config = compose_config([*overrides, "wandb=offline", "innovation=[rope]"])
    interrupted(config, monkeypatch, after=4)
    interrupted(config, monkeypatch, after=9)
    folder = train(config)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 3
    files = sorted(folder.rglob("*"))
    upload(settle(config))
    assert wandb_server.run.rows == without_nulls(written_rows(folder))
    assert sorted(folder.rglob("*")) == files, "an upload leaves nothing behind"
    told = {key: wandb_server.run.told[key] for key in ("project", "groupName", "jobType", "tags", "displayName")}
    assert told == {
        "project": "cegbench",
        "groupName": "test",
        "jobType": "train",
        "tags": ["rope"],
        "displayName": "tiny/rope/seed=0,lr=0.001",
    }
    said = json.loads(wandb_server.run.told["config"])
    run = RunFolder(folder).run()
    assert {key: said[key]["value"] for key in run} == run
    assert said["settings"]["value"]["model"]["position"] == "rope"


@pytest.mark.parametrize("mistake", [KeyboardInterrupt, MemoryError])
def test_interrupted_in_the_middle_and_repeated(mistake, config, wandb_server, monkeypatch):
    folder = train(config)
    ours = without_nulls(written_rows(folder))
    real = uploads.send

    def stop(run, number, row):
        if number == 6:
            raise mistake
        real(run, number, row)

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "send", stop)
        with pytest.raises(mistake):
            upload(settle(config))
    assert wandb_server.run.rows == ours[:6]
    assert 0 not in wandb_server.run.exits, "it is not finished"
    assert upload(settle(config)) == f"done: {len(ours) - 6} rows uploaded, 6 were there"
    assert wandb_server.run.rows == ours
    assert wandb_server.run.exits[-1] == 0


def test_an_unfinished_trajectory_stays_unfinished_and_goes_on(config, wandb_server, monkeypatch):
    interrupted(config, monkeypatch, after=6)
    assert upload(settle(config)) == "unfinished: 6 rows uploaded, 0 were there"
    assert wandb_server.run.exits == []
    folder = train(config)
    assert upload(settle(config)).startswith("done: ")
    assert len(wandb_server.run.rows) == len(written_rows(folder))
    assert wandb_server.run.exits[-1] == 0


def test_a_failed_trajectory_ends_as_failed(config, wandb_server, monkeypatch):
    interrupted(config, monkeypatch, after=6, mistake=ZeroDivisionError)
    assert upload(settle(config)) == "failed: 6 rows uploaded, 0 were there"
    assert set(wandb_server.run.exits) == {1}


def test_a_running_trajectory_has_its_rows_uploaded_unless_its_own_mirror_does(overrides, wandb_server, monkeypatch):
    """In the middle of training, by whether that is offline or online."""
    append, told = RowFile.append, {}
    for mode in ("offline", "online"):
        config = compose_config([*overrides, f"wandb={mode}", f"seed={int(mode == 'online')}"])

        def ask(file, row, config=config, mode=mode):
            append(file, row)
            if row["step"] == 3:
                told.setdefault(mode, upload_elsewhere(config))

        with monkeypatch.context() as patch:
            patch.setattr(RowFile, "append", ask)
            train(config)
    assert told == {
        "offline": "running: 3 rows uploaded, 0 were there",
        "online": "running: its own mirror uploads its rows",
    }
    assert [run.exits for run in wandb_server.runs.values()] == [[], [0]]


def upload_elsewhere(config) -> str:
    """What another process says that uploads."""
    code = """
import sys
from omegaconf import OmegaConf
from bench.config import Config, settle
from bench.runs.upload import upload
print(upload(settle(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(sys.argv[1])))))
"""
    command = [sys.executable, "-c", code, OmegaConf.to_yaml(config)]
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # that of this process
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=own, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_rows_that_do_not_arrive_are_no_success(config, wandb_server):
    """W&B itself tells nobody."""
    folder = train(config)
    wandb_server.takes_rows = False
    with pytest.raises(Incomplete, match=r"^done: some of \d+ rows did not arrive; run the same command again$"):
        upload(settle(config))
    wandb_server.takes_rows = True
    upload(settle(config))
    assert wandb_server.run.rows == without_nulls(written_rows(folder))


def test_without_a_key_nothing_is_uploaded(config, wandb_server, monkeypatch):
    import wandb

    train(config)

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^W&B: No API key configured\.$"):
        upload(settle(config))
