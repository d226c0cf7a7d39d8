"""Gains and fitted laws as flat tables, for those who go on in a spreadsheet or a data frame."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from bench.runs.folder import write_whole

GAINS = {
    "scale": pl.String,
    "variant": pl.String,
    "axis": pl.String,
    "ceg": pl.Float64,
    "low_95": pl.Float64,
    "high_95": pl.Float64,
    "low_90": pl.Float64,
    "high_90": pl.Float64,
    "lower_bound": pl.Float64,
    "upper_bound": pl.Float64,
    "p_value": pl.Float64,
    "seed_error": pl.Float64,
    "evaluation_error": pl.Float64,
    "extrapolated": pl.Boolean,
    "baseline_compute": pl.Float64,
    "target_loss": pl.Float64,
    "seeds": pl.Int64,
    "lr": pl.Float64,
    "tuning": pl.String,
}
FITS = {
    "scale": pl.String,
    "axis": pl.String,
    "law": pl.String,
    "variant": pl.String,  # empty where all variants share the parameter
    "parameter": pl.String,
    "value": pl.Float64,
    "low_95": pl.Float64,
    "high_95": pl.Float64,
    "converged": pl.Boolean,
}


def write_gains_table(gains: Mapping[str, Any], path: Path) -> Path:
    """Writes a row for each gain in `gains` (the contents of gains.json) as CSV, whole or not at all.

    The columns are those of GAINS; a cell is empty where a number is not known, or an interval is open.
    """
    table = pl.DataFrame([_gain_row(gain) for gain in gains["gains"]], schema=GAINS)
    write_whole(path, table.write_csv())
    return path


def write_fits_table(gains: Mapping[str, Any], path: Path) -> Path:
    """The same for the laws fitted: a row for each parameter, with the columns of FITS."""
    table = pl.DataFrame([row for fit in gains["fits"] for row in _fit_rows(fit)], schema=FITS)
    write_whole(path, table.write_csv())
    return path


def _gain_row(gain: Mapping[str, Any]) -> dict[str, Any]:
    low_95, high_95 = gain["interval"] or (None, None)
    low_90, high_90 = gain["interval_90"] or (None, None)
    ends = {"low_95": low_95, "high_95": high_95, "low_90": low_90, "high_90": high_90}
    return {column: gain.get(column) for column in GAINS} | ends


def _fit_rows(fit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    head = {column: fit[column] for column in ("scale", "axis", "law", "converged")}
    for name, value in fit["parameters"].items():
        low, high = fit["intervals"].get(name) or (None, None)
        yield head | {"parameter": name, "value": value, "low_95": low, "high_95": high}
    for variant, parameters in fit["variants"].items():
        for name, value in parameters.items():
            yield head | {"variant": variant, "parameter": name, "value": value}
