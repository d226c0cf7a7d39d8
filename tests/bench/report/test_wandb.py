"""What a report leaves in an offline run of W&B, as wandb's own reader tells it."""

import csv
import json
import re
from pathlib import Path

import pytest

from bench.commands import write_gains
from bench.config import SourceConfig, WandbConfig
from bench.errors import UserError
from bench.gains.sources.wandb import read
from bench.report.figures import all_figures
from bench.report.wandb import publish
from tests.bench.report.conftest import HOSTILE, make_gain, make_gains
from tests.bench.trajectories import read_offline_run

wandb = pytest.importorskip("wandb")


def published(gains, folder, study="quickstart") -> tuple[Path, dict[str, dict], dict]:
    """The offline run, its records by kind (the last of each), and what it logged."""
    place = Path(publish(gains, write_gains(gains, folder), WandbConfig(mode="offline"), study))
    wandb.teardown()
    records = {record["type"]: record for record in read_offline_run(place)}
    logged: dict[str, dict] = {}
    for name, value in records["history"]["history"]["item"].items():
        if not name.startswith("_"):
            key, _, detail = name.rpartition(".")
            logged.setdefault(key, {})[detail] = value
    return place, records, logged


@pytest.fixture
def gains() -> dict:
    return make_gains(scales=("compact", "full"), fits=True, forecasts=True)


def test_tables_figures_and_files_arrive(gains, tmp_path):
    place, records, logged = published(gains, tmp_path)
    run = records["run"]["run"]
    assert (run["project"], run["run_group"], run["job_type"]) == ("cegbench", "quickstart", "report")
    assert run["config"]["update"]["cegbench_report"]["baseline"] == "baseline"
    for name in ("gains", "fits"):
        table = json.loads((place / "files" / logged[name]["path"]).read_text())
        with (tmp_path / f"{name}.csv").open() as file:
            heading, *rows = csv.reader(file)
        assert table["columns"] == heading
        as_text = [["" if cell is None else str(cell) for cell in row] for row in table["data"]]
        assert [[same(cell) for cell in row] for row in as_text] == [[same(cell) for cell in row] for row in rows]
    drawn = {key: place / "files" / value["path"] for key, value in logged.items() if value["_type"] == "plotly-file"}
    assert len(drawn) == sum(len(by_axis) for by_axis in all_figures(gains).values())
    ours = all_figures(gains)["loss-1"]["seconds"]
    theirs = json.loads(drawn["seconds/loss-1 full"].read_text())
    assert [trace["y"] for trace in theirs["data"]] == [trace["y"] for trace in ours["data"]]
    assert (place / "files" / logged["report"]["path"]).read_bytes() == (tmp_path / "report.html").read_bytes()
    artifact = records["artifact"]["artifact"]
    assert (artifact["name"], artifact["type"]) == ("gains-quickstart", "gains")
    assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {
        "gains.json",
        "gains.csv",
        "fits.csv",
        "report.html",
    }
    assert records["exit"]["exit"].get("exit_code", 0) == 0


def same(cell: str) -> str:
    """A cell of a table, by its value where it is a number or a truth."""
    try:
        return str(float(cell))
    except ValueError:
        return cell.lower()


@pytest.mark.parametrize("hostile", [*HOSTILE, "a/b", "../../up", "x" * 300])
def test_names_of_any_kind_survive(hostile, tmp_path):
    gains = make_gains(points={hostile: make_gain()}, scales=(hostile,), axes={"model_flops": 1.0}, seeds=1)
    place, _, logged = published(gains, tmp_path, study=hostile)
    written = [path for path in tmp_path.rglob("*.plotly.json") if path.is_file()]
    assert len(written) == 2
    assert all(path.is_relative_to(place) for path in written)
    assert len([key for key in logged if key.startswith("model_flops/")]) == 2


def test_a_study_without_gains(tmp_path):
    _, _, logged = published(make_gains(points={}, scales=()), tmp_path)
    assert set(logged) == {"gains", "report"}


def test_the_newest_report_is_the_same_run(gains, tmp_path):
    identities = {published(gains, tmp_path)[1]["run"]["run"]["run_id"] for _ in range(2)}
    assert identities == {"report-quickstart"}


def test_a_report_is_no_run_whose_gains_are_measured(gains, tmp_path):
    published(gains, tmp_path)
    with pytest.raises(UserError, match=r"no run in \S+ has a finished result: it has none\.$"):
        read(tmp_path, SourceConfig(source="wandb"), "quickstart")


def test_what_wandb_refuses_is_one_line(gains, tmp_path):
    files = write_gains(gains, tmp_path)
    with pytest.raises(UserError, match=re.escape("W&B: Invalid project name 'a/b'")):
        publish(gains, files, WandbConfig(mode="offline", project="a/b"), "quickstart")
