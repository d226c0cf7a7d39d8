"""Finished results in CSV or Parquet files: a row for each budget of each trajectory.

A loss read in mid-schedule is no result and does not belong in such a file.
"""

import glob
from dataclasses import asdict
from pathlib import Path

import polars as pl

from bench.config import ColumnNames, SourceConfig
from bench.errors import UserError
from bench.gains.sources import Results
from bench.gains.sources.columns import COLUMNS, normalise

ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
EMPTY = ["", "NA", "N/A", "null", "None"]
# Beside a column's own name, in whatever case; names of one letter only as they are here.
ALIASES = {
    "loss": ("val_loss", "validation_loss", "L"),
    "loss_se": ("val_loss_se",),
    "params": ("N", "parameters", "Model Size"),
    "tokens": ("D", "Training Tokens"),
    "flops": ("C", "compute", "model_flops", "Training FLOP"),
    "lr": ("learning_rate",),
}


def read(path: Path, config: SourceConfig, name: str) -> Results:
    """The rows of a file, or of all files of a folder or a glob. Columns that are not known are ignored.

    Raises:
        UserError: there is no such file, none can be read, or no row can be used.
    """
    tables, failures = [], []
    for file in _files(path):
        try:
            tables.append(_rename(_read_file(file), config.columns, file))
        except UserError as error:
            failures.append(error)
    if not tables:
        raise failures[0]
    found = normalise(name, pl.concat(tables, how="diagonal_relaxed"))
    found.warnings[:0] = [f"Left out: {failure}." for failure in failures]
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.name.lower().endswith(ENDINGS)]
    else:
        files = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise UserError(f"path={path} is no file, folder or glob with results: name a {', '.join(ENDINGS)}")
    return files


def _read_file(file: Path) -> pl.DataFrame:
    name = file.name.lower()
    if not name.endswith(ENDINGS):
        raise UserError(f"{file} is not one of {', '.join(ENDINGS)}")
    try:
        if name.endswith(".parquet"):
            return pl.read_parquet(file)
        separator = "\t" if name.endswith((".tsv", ".tsv.gz")) else ","
        table = pl.read_csv(file, separator=separator, infer_schema=False, null_values=EMPTY, encoding="utf8-lossy")
        return table.rename(str.strip)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _rename(table: pl.DataFrame, names: ColumnNames, file: Path) -> pl.DataFrame:
    """The columns under the names that `normalise` knows, then those that nobody asked for."""
    found = {column: _find(column, name, table.columns, file) for column, name in asdict(names).items()}
    renamed = [pl.col(own).alias(column) for column, own in found.items() if own is not None]
    others = [own for own in table.columns if own not in {*found.values(), *COLUMNS, "run", "origin"}]
    origin = pl.format("row {} of {}", pl.int_range(1, pl.len() + 1), pl.lit(file.name)).alias("origin")
    return table.select(*renamed, *others, origin)


def _find(column: str, name: str | None, there: list[str], file: Path) -> str | None:
    """What a file calls a column: as the option says, or else by one of its usual names."""
    if name is not None:
        matches = [own for own in there if own == name] or [own for own in there if own.lower() == name.lower()]
        if not matches:
            raise UserError(f"{file} has no column {name} (data.columns.{column}); there are {', '.join(there)}")
    else:
        usual = (column, *ALIASES.get(column, ()))
        lower = [alias.lower() for alias in usual if len(alias) > 1]
        matches = [own for own in there if own in usual or own.lower() in lower]
    if len(matches) > 1:
        raise UserError(f"{file}: {' and '.join(matches)} could all be {column}: choose by data.columns.{column}=...")
    return matches[0] if matches else None
