"""Gains as a flat table, for those who go on in a spreadsheet or a data frame."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from bench.runs.folder import write_whole

SCHEMA = {
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


def write_spreadsheet(gains: Mapping[str, Any], path: Path) -> Path:
    """Writes a row for each gain in `gains` (the contents of gains.json) as CSV, whole or not at all.

    The columns are those of SCHEMA; a cell is empty where a number is not known, or an interval is open.
    """
    table = pl.DataFrame([_row(gain) for gain in gains["gains"]], schema=SCHEMA)
    write_whole(path, table.write_csv())
    return path


def _row(gain: Mapping[str, Any]) -> dict[str, Any]:
    low_95, high_95 = gain["interval"] or (None, None)
    low_90, high_90 = gain["interval_90"] or (None, None)
    ends = {"low_95": low_95, "high_95": high_95, "low_90": low_90, "high_90": high_90}
    return {column: gain.get(column) for column in SCHEMA} | ends
