import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.compose import compose_config
from bench.runs.folder import read_rows
from bench.runs.mirror import NoMirror, open_mirror
from bench.training.train import train


def test_disabled_is_no_mirror(experiment):
    assert isinstance(open_mirror(experiment, {}), NoMirror)


def test_what_wandb_refuses_is_one_line(overrides, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(["train", *overrides, "wandb=online"]) == 2
    error = capsys.readouterr().err
    assert error == "error: W&B: No API key configured. Use `wandb login` to log in.; or use wandb=offline\n"


@pytest.mark.slow
def test_an_offline_run_holds_our_rows(overrides, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(compose_config([*overrides, "wandb=offline", "innovation=[rope]"]))
    wandb.teardown()  # writes the rest of the file
    (offline,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(offline)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    ours = read_rows(folder / "metrics.jsonl")
    assert [row["train_loss"] for row in history if "grad_norm" in row] == [row["train_loss"] for row in ours]
    assert [row["val_loss"] for row in history if "val_loss" in row] == [
        row["val_loss"] for row in read_rows(folder / "results.jsonl")
    ]
    metrics = {record["metric"].get("name"): record["metric"] for record in records if record["type"] == "metric"}
    assert metrics["val_loss"]["step_metric"] == "model_flops"
    assert metrics["val_loss"]["summary"] == {"min": True}
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["job_type"], run["tags"]) == ("cegbench", "test", "train", ["rope"])
    assert run["config"]["update"]["settings"]["model"]["position"] == "rope"
