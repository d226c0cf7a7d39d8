"""`wandb-sync` and `report` as a person meets them."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.commands import write_gains
from bench.runs.folder import RunFolder
from bench.runs.mirror import written_rows
from bench.runs.study import study_experiments
from tests.bench.report.conftest import make_gains


@pytest.fixture
def study(overrides) -> list[str]:
    kept = [override for override in overrides if not override.startswith("study.name")]
    variants = ["study.variants=[[],[rope]]", "study.seeds=[0,1]"]
    return ["study=default", "study.name=small", "study.scales=[tiny]", *variants, *kept]


@pytest.fixture
def trained(study, capsys) -> list[str]:
    assert main(["train", "-m", *study]) == 0
    capsys.readouterr()
    return study


# wandb-sync


def test_a_study_is_uploaded_and_uploaded_again(trained, wandb_server, capsys):
    """Whatever wandb.mode says: here the trajectories had no mirror at all."""
    experiments = study_experiments(trained)
    assert main(["wandb-sync", *trained]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(wandb_server.runs) == len(experiments) == 4
    for number, (experiment, line) in enumerate(zip(experiments, lines, strict=True), start=1):
        rows = len(written_rows(experiment.folder))
        assert line == f"{number}/4 {experiment.folder}: done: {rows} rows uploaded, 0 were there"
    held = {name: list(run.lines) for name, run in wandb_server.runs.items()}
    assert main(["wandb-sync", *trained]) == 0
    assert capsys.readouterr().out.count(": done: 0 rows uploaded") == 4
    assert {name: run.lines for name, run in wandb_server.runs.items()} == held


def test_what_is_not_begun_is_left_out(study, wandb_server, capsys):
    assert main(["train", *[o for o in study if not o.startswith("study.")], "scale=tiny", "study.name=small"]) == 0
    capsys.readouterr()
    assert [RunFolder(experiment.folder).state for experiment in study_experiments(study)].count("done") == 1
    assert main(["wandb-sync", *study]) == 0
    assert capsys.readouterr().out.startswith("1/1 ")
    assert len(wandb_server.runs) == 1


def test_rows_that_do_not_arrive_end_in_status_1(trained, wandb_server, capsys):
    wandb_server.takes_rows = False
    assert main(["wandb-sync", *trained]) == 1
    assert capsys.readouterr().out.count("rows did not arrive; run the same command again") == 4


def test_a_users_mistake_of_syncing_is_one_line_and_status_2(study, trained, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.CommError("Failed to get resume status:\nconnection refused")

    monkeypatch.setattr(wandb, "init", refuse)
    for overrides, error in [
        (trained, "W&B: Failed to get resume status: connection refused"),
        ([*study, "study.name=other"], "no trajectory of this study has been trained here yet"),
        ([*study, "study.variants=[]"], "lists no variants"),
    ]:
        assert main(["wandb-sync", *overrides]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {error}") or error in told
        assert told.count("\n") == 1


# report


@pytest.fixture
def measured(study) -> Path:
    """The folder of a study whose gains were measured."""
    folder = study_experiments(study)[0].folder.parents[2]
    write_gains(make_gains(fits=True), folder)
    return folder


def test_a_report_is_written_again_as_gains_wrote_it(trained, capsys):
    assert main(["gains", *trained, "replicates=100"]) == 0
    folder = study_experiments(trained)[0].folder.parents[2]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {"gains.json", "gains.csv", "report.html"} <= before.keys()
    (folder / "gains.csv").unlink()
    (folder / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", *trained]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert str(folder / "report.html") in capsys.readouterr().out
    assert not (folder / "wandb").exists()


def test_a_report_of_another_folder(study, measured, tmp_path):
    measured.rename(tmp_path / "elsewhere")
    assert main(["report", f"output={tmp_path / 'elsewhere'}"]) == 0


def test_a_report_goes_to_wandb_beside_the_studys_runs(study, measured, capsys):
    wandb = pytest.importorskip("wandb")
    assert main(["report", *study, "--wandb", "wandb=offline"]) == 0
    wandb.teardown()
    (offline,) = (measured / "wandb").glob("offline-run-*")
    assert f"W&B: {offline}" in capsys.readouterr().out
    assert list(offline.rglob("*.plotly.json"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--wandb"], "add wandb=online or wandb=offline"),
        (["--wandb", "wandb=offline", "wandb.mode=loud"], "W&B: "),
        (["--wand"], "--wand is not of the form key=value"),
        (["study.name=other"], "run `python -m bench gains study=other` first"),
    ],
)
def test_a_users_mistake_of_reporting_is_one_line_and_status_2(study, measured, capsys, more, sentence):
    assert main(["report", *study, *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"schema": 1})])
def test_gains_that_cannot_be_used(study, content, capsys):
    folder = study_experiments(study)[0].folder.parents[2]
    folder.mkdir(parents=True)
    (folder / "gains.json").write_text(content)
    assert main(["report", *study]) == 2
    error = capsys.readouterr().err
    assert "gains.json" in error
    assert "run `python -m bench gains study=small` first" in error
    assert error.count("\n") == 1
    assert (folder / "gains.json").read_text() == content
