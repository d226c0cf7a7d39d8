"""`gains` on results that were not trained here, and what it writes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from bench.__main__ import main
from bench.commands import others_results
from bench.compose import GAINS_FOLDER, choices, compose_config
from bench.config import Config, ResultsConfig, settle
from bench.report.spreadsheet import GAINS as COLUMNS

GAINS = {"baseline": 1.0, "rope": 2.0, "mqa": 1.5}


@pytest.fixture
def table(tmp_path) -> Path:
    """A study of three seeds and four budgets whose gains are those of GAINS."""
    rows = ["variant,scale,seed,lr,flops,loss"]
    for seed in range(3):
        generator = np.random.default_rng(seed)
        for variant, gain in GAINS.items():
            for flops in (1e15, 4e15, 16e15, 64e15):
                loss = 1.8 + 1.2 * (gain * flops / 1e15) ** -0.18 + generator.normal(0, 1e-3)
                rows.append(f"{variant},tiny,{seed},1e-3,{flops},{loss:.6f}")
    file = tmp_path / "results.csv"
    file.write_text("\n".join(rows))
    return file


def test_a_table_becomes_a_report(table, tmp_path, capsys):
    output = tmp_path / "deep" / "output"
    assert main(["gains", "data=table", f"path={table}", f"output={output}", "replicates=200"]) == 0
    printed = capsys.readouterr().out
    assert all(str(output / name) in printed for name in ("gains.json", "gains.csv", "report.html"))
    gains = json.loads((output / "gains.json").read_text())
    assert (gains["study"], gains["baseline"], gains["estimator"]) == ("results", "baseline", "crossing")
    assert len(gains["runs"]) == 9
    assert "rope" in (output / "report.html").read_text()
    with (output / "gains.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    found = {row["variant"]: row for row in rows if row["axis"] == "model_flops"}
    assert set(found) == {"rope", "mqa"}
    for variant, row in found.items():
        assert float(row["ceg"]) == pytest.approx(GAINS[variant], rel=0.1)
        ends = [float(row[column]) for column in ("low_95", "low_90", "ceg", "high_90", "high_95")]
        assert ends == sorted(set(ends))


def test_another_baseline_and_name(table, tmp_path):
    settings = ["baseline=mqa", "name=mine", "replicates=200", "data.columns.loss=loss"]
    assert main(["gains", "data=table", f"path={table}", f"output={tmp_path}", *settings]) == 0
    gains = json.loads((tmp_path / "gains.json").read_text())
    assert (gains["study"], gains["baseline"]) == ("mine", "mqa")
    (gain,) = [gain for gain in gains["gains"] if (gain["variant"], gain["axis"]) == ("rope", "model_flops")]
    assert gain["ceg"] == pytest.approx(2 / 1.5, rel=0.1)


def test_settings_of_the_analysis_arrive(table, tmp_path):
    settings = ["power=true", "power_width=0.25", "forecast=[1e18]", "estimator=scaling_law", "replicates=100"]
    settings += ["targets=[2.5]"]
    assert main(["gains", "data=table", f"path={table}", f"output={tmp_path}", *settings]) == 0
    gains = json.loads((tmp_path / "gains.json").read_text())
    assert gains["estimator"] == "scaling_law"
    assert gains["power"]["width"] == 0.25
    assert any(point["target_loss"] == pytest.approx(2.5) for point in gains["gains"][0]["curve"])
    assert {forecast["baseline_compute"] for forecast in gains["forecasts"]} == {1e18}
    assert "gamma" in (tmp_path / "fits.csv").read_text()


def test_what_is_wrong_with_the_rows_is_in_the_report(table, tmp_path):
    table.write_text(table.read_text() + "\nswiglu,tiny,0,1e-3,1e15,oops")
    assert main(["gains", "data=table", f"path={table}", f"output={tmp_path}", "replicates=200"]) == 0
    warnings = json.loads((tmp_path / "gains.json").read_text())["warnings"]
    assert "1 of 37 rows are left out, the first row 37 of results.csv: no loss above 0." in warnings


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=table"], "path is missing: say path=results.csv"),
        (["data=table", "path=TABLE"], "output is missing: say output=gains"),
        (["data=table", "path=/no/where.csv", "output=TMP"], "/no/where.csv is no file, folder or glob"),
        (["data=table", "path=TABLE", "output=TABLE"], "choose another output"),
        (["data=table", "path=TABLE", "output=TMP", "outptu=x"], "outptu"),
        (["data=table", "path=TABLE", "output=TMP", "data.columns.los=x"], "los"),
        (["data=table", "path=TABLE", "output=TMP", "data.columns.loss=x"], "there are variant, scale"),
        (["data=table", "path=TABLE", "output=TMP", "replicates=many"], "could not be converted to Integer"),
        (["data=table", "path=TABLE", "output=TMP", "study=quickstart"], "study"),
        (["data=table", "path=TABLE", "output=TMP", "baseline=adamw"], "adamw"),
        (["data=table", "path=TABLE", "output=TMP", "estimator=magic"], "choose one of crossing"),
        (["data=tabel"], "data=tabel is no source of results: choose from "),
        (["data=tabel", "path=TABLE"], "data=tabel is no source of results: choose from "),
        (["path=TABLE"], "say what it holds: choose data= from "),
        (["data=embedded", "path=TABLE"], "data=embedded is no source of results: choose from "),
        (["data=tabel", "study=quickstart"], "data=tabel is unknown: choose from embedded"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(overrides, sentence, table, tmp_path, capsys):
    filled = [override.replace("TABLE", str(table)).replace("TMP", str(tmp_path)) for override in overrides]
    assert main(["gains", *filled]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv"}


@pytest.mark.parametrize("source", choices("data", GAINS_FOLDER))
def test_every_source_has_a_configuration_of_its_name(source):
    settings = OmegaConf.to_object(compose_config([f"data={source}", "path=x"], GAINS_FOLDER))
    assert isinstance(settings, ResultsConfig)
    assert settings.data.source == source


@pytest.mark.parametrize("overrides", [[], ["study=quickstart"], ["data=text", "study.name=x"], ["study.name=x"]])
def test_a_study_of_ours_is_no_others_results(overrides):
    assert others_results(overrides) is None


@pytest.mark.parametrize("path", ["results.csv", "mine/*.csv", "mine", "mine/"])
def test_a_study_is_named_after_its_path(table, tmp_path, monkeypatch, path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.csv").write_text(table.read_text())
    monkeypatch.chdir(tmp_path)
    _, _, results, _ = others_results(["data=table", f"path={path}", "output=x"])
    assert results.name == ("results" if path == "results.csv" else "mine")


def test_how_gains_are_measured_is_no_part_of_a_runs_identity():
    plain = settle(compose_config([]))
    analysis = [
        "estimator=x",
        "replicates=5",
        "power=true",
        "power_width=0.5",
        "forecast=[1e20]",
        "forecast_far=true",
        "output=x",
    ]
    assert settle(compose_config(analysis)).digest == plain.digest
    assert plain.identity.keys() & {override.partition("=")[0] for override in analysis} == set()


def test_both_routes_share_the_settings_of_the_analysis():
    ours, theirs = OmegaConf.structured(Config), OmegaConf.structured(ResultsConfig)
    shared = ("estimator", "replicates", "targets", "power", "power_width", "forecast", "forecast_far", "output")
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
