import csv

import polars as pl
import pytest

from bench.report.spreadsheet import FITS, GAINS, write_fits_table, write_gains_table


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_gain(make_gains, tmp_path):
    gains = make_gains()
    rows = read(write_gains_table(gains, tmp_path / "gains.csv"))
    assert list(rows[0]) == list(GAINS)
    assert [(row["scale"], row["variant"], row["axis"]) for row in rows] == [
        (gain["scale"], gain["variant"], gain["axis"]) for gain in gains["gains"]
    ]
    gain, row = gains["gains"][0], rows[0]
    for column in ("ceg", "p_value", "seed_error", "baseline_compute", "target_loss", "lr"):
        assert float(row[column]) == gain[column]
    assert [float(row["low_95"]), float(row["high_95"])] == gain["interval"]
    assert [float(row["low_90"]), float(row["high_90"])] == gain["interval_90"]
    assert (row["extrapolated"], row["seeds"], row["tuning"]) == ("false", "3", "interior")


def test_what_is_not_known_is_empty(make_gains, tmp_path):
    rows = read(write_gains_table(make_gains(), tmp_path / "gains.csv"))
    bound = next(row for row in rows if row["variant"] == "rope")
    assert (bound["ceg"], bound["low_95"], bound["high_95"], bound["p_value"]) == ("", "", "", "")
    assert float(bound["lower_bound"]) == 4
    half_open = next(row for row in rows if row["variant"] == "flash_attention+layer_norm+rope")
    assert (half_open["low_95"], half_open["high_95"]) == ("2.912", "")


def test_data_frames_read_it(make_gains, tmp_path):
    table = pl.read_csv(write_gains_table(make_gains(), tmp_path / "gains.csv"), schema=GAINS)
    assert len(table) == len(make_gains()["gains"])
    assert table["ceg"].null_count() == 8


@pytest.mark.parametrize("name", ['a "quoted", name', "two\nlines", "λ"])
def test_awkward_names(make_gains, tmp_path, name):
    gains = make_gains()
    gains["gains"][0]["variant"] = name
    assert read(write_gains_table(gains, tmp_path / "gains.csv"))[0]["variant"] == name


def test_no_gains_leave_the_names_of_the_columns(make_gains, tmp_path):
    assert write_gains_table(make_gains() | {"gains": []}, tmp_path / "gains.csv").read_text() == ",".join(GAINS) + "\n"


def test_the_file_is_whole_or_as_it_was(make_gains, tmp_path):
    path = tmp_path / "gains.csv"
    path.write_text("before")
    broken = make_gains()
    broken["gains"][-1]["ceg"] = "no number"
    with pytest.raises(pl.exceptions.ComputeError):
        write_gains_table(broken, path)
    assert path.read_text() == "before"


def test_a_row_for_each_parameter_of_a_fit(make_gains, tmp_path):
    gains = make_gains(fits=True)
    table = pl.read_csv(write_fits_table(gains, tmp_path / "fits.csv"), schema=FITS)
    fit = gains["fits"][0]
    rows = table.filter(
        (pl.col("scale") == fit["scale"]) & (pl.col("axis") == fit["axis"]) & (pl.col("law") == fit["law"])
    )
    shared = rows.filter(pl.col("variant").is_null())
    assert dict(shared.select("parameter", "value").iter_rows()) == fit["parameters"]
    assert list(shared.filter(pl.col("parameter") == "E").select("low_95", "high_95").row(0)) == fit["intervals"]["E"]
    for variant, parameters in fit["variants"].items():
        own = rows.filter(pl.col("variant") == variant)
        assert dict(own.select("parameter", "value").iter_rows()) == parameters
    assert set(table["converged"]) == {fit["converged"] for fit in gains["fits"]}
