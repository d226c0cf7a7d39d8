"""This project's own runs: a study's folder as tables."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import polars as pl

from bench.errors import UserError
from bench.gains.sources import Results
from bench.runs.folder import RunFolder, read_rows

# FLOP columns are floats here: counts of a large run do not fit in 64-bit integers.
COSTS = {
    "tokens": pl.Float64,
    "seconds": pl.Float64,
    "joules": pl.Float64,
    "dollars": pl.Float64,
    "grams_co2e": pl.Float64,
    "model_flops": pl.Float64,
    "flops_6nd": pl.Float64,
    "flops_6nd_head": pl.Float64,
    "flops_palm": pl.Float64,
    "optimizer_flops": pl.Float64,
}
KEYS = {
    "study": pl.String,
    "scale": pl.String,
    "variant": pl.String,
    "innovations": pl.List(pl.String),
    "seed": pl.Int64,
    "lr": pl.Float64,
    "run": pl.String,
}
RESULTS = {
    **KEYS,
    "budget": pl.Float64,
    "step": pl.Int64,
    "train_loss": pl.Float64,
    "val_loss": pl.Float64,
    "val_loss_se": pl.Float64,
    "val_tokens": pl.Int64,
    "bits_per_byte": pl.Float64,
    **COSTS,
}
CURVES = {
    **KEYS,
    "branch": pl.Float64,
    "step": pl.Int64,
    "train_loss": pl.Float64,
    "val_loss": pl.Float64,
    "grad_norm": pl.Float64,
    **COSTS,
}
LISTED = 5  # folders named in one warning
PROVENANCE = ("git_commit", "device", "versions", "data", "started", "parameters", "flops_per_token")


def read_study(folder: Path, planned: Collection[Path] | None = None, *, with_curves: bool = True) -> Results:
    """What a study's folder holds: of its runs those whose folders are `planned`, by default all.

    Curves are long; without them the files that hold them are not opened.

    Raises:
        UserError: no trajectory is finished, a file cannot be read, a result is there twice, or runs were trained on
            different data.
    """
    runs, warnings = _planned(folder, read_runs(folder), planned)
    results = read_results(folder, runs)
    if results.is_empty():
        raise UserError(f"{folder} has no finished trajectory: train the study first")
    _check_same_data(folder, runs)
    curves = read_curves(folder, runs if with_curves else [])
    return Results(runs[0]["study"], results, curves, runs, warnings + _unfinished(runs))


def read_runs(study_folder: Path) -> list[dict[str, Any]]:
    """Every run of a study: `path` relative to the study's folder, `state` (as RunFolder has it), provenance, and
    `trajectory_flops`, the model FLOPs of all its legs.

    Raises:
        UserError: there is no such folder, or a run.json cannot be read.
    """
    if not study_folder.is_dir():
        raise UserError(f"there is no folder {study_folder}: train the study first")
    runs = []
    for file in sorted(study_folder.glob("*/*/*/run.json")):
        try:
            run = json.loads(file.read_text())
            identity = {key: run[key] for key in ("study", "scale", "variant", "innovations", "seed", "lr")}
        except ValueError:
            raise UserError(f"{file} is not valid JSON: delete the run's folder and train it again") from None
        except KeyError as error:
            raise UserError(f"{file} has no {error}: delete the run's folder and train it again") from None
        path = file.parent.relative_to(study_folder).as_posix()
        provenance = {key: run.get(key) for key in PROVENANCE}
        state, flops = RunFolder(file.parent).state, _trajectory_flops(run)
        runs.append({"path": path, **identity, "state": state, **provenance, "trajectory_flops": flops})
    return runs


def _trajectory_flops(run: dict[str, Any]) -> float | None:
    """Of the trunk and every branch; None where run.json does not tell."""
    if "legs" not in run:
        return None
    steps = sum(leg["end"] - leg["start"] for leg in run["legs"])
    return steps * run["tokens_per_step"] * run["flops_per_token"]["model_flops"]


def read_results(study_folder: Path, runs: list[dict[str, Any]] | None = None) -> pl.DataFrame:
    """The losses that count: a row per finished budget of each trajectory that is DONE, with the columns of RESULTS
    and `model_flops_with_optimizer`.

    `runs` are those of `read_runs` to take, by default all.
    `lr` is the trajectory's peak rate and `run` its folder, relative to the study's. What was not measured is null.

    Raises:
        UserError: a file cannot be read, or two folders hold a result for one scale, variant, seed, rate and budget.
    """
    results = _read_table(study_folder, runs, "results.jsonl", RESULTS, required=("budget", "val_loss"))
    same = ["scale", "variant", "seed", "lr", "budget"]
    twice = results.group_by(same, maintain_order=True).agg(pl.col("run")).filter(pl.col("run").list.len() > 1)
    for row in twice.iter_rows(named=True):
        folders = sorted(str(study_folder / run) for run in set(row["run"]))
        raise UserError(
            f"two results for {row['variant']} at {row['scale']}, seed {row['seed']}, lr {row['lr']:g}, "
            f"budget {row['budget']:.3g}, in {' and '.join(folders)}: a setting changed in between; "
            "delete the folder that is out of date"
        )
    return results


def read_curves(study_folder: Path, runs: list[dict[str, Any]] | None = None) -> pl.DataFrame:
    """Losses in mid-schedule: the rows with a `val_loss` of each DONE trajectory's metrics; columns of CURVES
    and `model_flops_with_optimizer`.

    `runs` are those of `read_runs` to take, by default all.
    `branch` is the budget whose cooldown the row belongs to, null on the trunk.

    Raises:
        UserError: a file cannot be read.
    """
    return _read_table(study_folder, runs, "metrics.jsonl", CURVES, required=("step",)).filter(
        pl.col("val_loss").is_not_null()
    )


def _read_table(
    study_folder: Path, runs: list[dict[str, Any]] | None, name: str, schema: dict[str, Any], required: tuple[str, ...]
) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {column: [] for column in schema}
    for run in read_runs(study_folder) if runs is None else runs:
        if run["state"] != "done":
            continue
        file = study_folder / run["path"] / name
        for row in _read_complete(file, required):
            values = {**row, **{key: run[key] for key in KEYS if key != "run"}, "run": run["path"]}
            for column in columns:
                columns[column].append(values.get(column))
    try:
        table = pl.DataFrame(columns, schema=schema, strict=True)
    except (TypeError, pl.exceptions.PolarsError) as error:
        raise UserError(f"a {name} in {study_folder} holds a value of the wrong kind: {error}") from None
    return table.with_columns(model_flops_with_optimizer=pl.col("model_flops") + pl.col("optimizer_flops"))


def _read_complete(file: Path, required: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        rows = read_rows(file)
    except ValueError:
        raise UserError(f"{file} is not valid JSON: delete the run's folder and train it again") from None
    for row in rows:
        for key in required:
            if key not in row:
                raise UserError(f"{file} has a row without {key!r}: delete the run's folder and train it again")
    return rows


def _planned(
    folder: Path, runs: list[dict[str, Any]], planned: Collection[Path] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs that belong to the plan, and sentences about those that are missing or lie beside it."""
    if planned is None:
        return runs, []
    wanted = {path.relative_to(folder).as_posix() for path in planned}
    taken = [run for run in runs if run["path"] in wanted]
    warnings = []
    if len(taken) < len(wanted):
        warnings.append(f"{len(wanted) - len(taken)} of {len(wanted)} trajectories of the study are not trained yet.")
    if len(taken) < len(runs):
        warnings.append(
            f"{len(runs) - len(taken)} trajectories in {folder} were trained with other settings than the study has "
            "now and are left out."
        )
    return taken, warnings


def _check_same_data(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Losses on different text say nothing about each other."""
    first: dict[str, str] = {}
    for run in runs:
        fingerprint = (run["data"] or {}).get("fingerprint")
        if run["state"] == "done" and fingerprint is not None:
            first.setdefault(fingerprint, run["path"])
    if len(first) > 1:
        paths = " and ".join(str(folder / path) for path in list(first.values())[:2])
        raise UserError(f"{paths} were trained on different data: delete those of the older data and train them again")


def _unfinished(runs: list[dict[str, Any]]) -> list[str]:
    """Sentences about the trajectories that do not count."""
    warnings = []
    remedies = {"running": "wait for them", "unfinished": "go on with `train`", "failed": "see the file FAILED there"}
    for state, remedy in remedies.items():
        paths = [run["path"] for run in runs if run["state"] == state]
        if paths:
            more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
            listed = ", ".join(paths[:LISTED]) + more
            warnings.append(f"{len(paths)} of {len(runs)} trajectories {state} and left out ({remedy}): {listed}.")
    done = {(run["scale"], run["variant"]) for run in runs if run["state"] == "done"}
    for scale, variant in sorted({(run["scale"], run["variant"]) for run in runs} - done):
        warnings.append(f"{variant} at {scale}: none of its trajectories is done, so it has no gain.")
    return warnings
