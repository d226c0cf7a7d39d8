"""Runs of Weights & Biases: offline folders (`wandb/offline-run-*`, or any folder above several), or the server's.

A path that does not exist here and reads `entity/project` or `entity/project/group` is fetched from the server. What a
run is (variant, scale, seed, lr) is looked up in its config, where `model.name` is `name` in `model`; `name`, `group`
and `id` of the run itself will do too. What it measured is looked up in its history. `data.columns.*` names other keys
than those of KEYS. Rows with a budget are results, as this project's own runs write them; of other runs the last loss
is. Costs may be logged in rows of their own: the last before the loss counts.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import polars as pl

from bench.config import ColumnNames, SourceConfig, one_line
from bench.errors import UserError
from bench.gains.sources import Results
from bench.gains.sources.columns import normalise
from bench.gains.sources.runs import COSTS, PROVENANCE

# Where a column is looked up when no option names a key, if not under its own name. `loss` alone is of training.
KEYS = {
    "variant": ("variant", "name"),
    "lr": ("lr", "learning_rate"),
    "loss": ("val_loss", "val/loss", "validation_loss", "eval/loss", "valid/loss"),
    "loss_se": ("val_loss_se",),
    "step": ("step", "iter"),
    "flops": ("model_flops", "flops"),
}
IDENTITY = ("variant", "scale", "seed", "lr", "params")  # in the config; the other columns are in the history
MOMENTARY = ("loss", "loss_se", "budget")  # only of the row in which they are
OUR_CONFIG = {"settings", *PROVENANCE}  # what bench/runs/mirror.py says of a run
OUR_REPORT = "cegbench_report"  # in the config of what bench/report/wandb.py puts beside the runs of a study


@dataclass(frozen=True)
class Run:
    """A run, offline or not.

    Attributes:
        path: entity/project/id, or the name of the offline folder.
        state: "finished", or what W&B calls it otherwise.
        config: nested, with `name`, `group` and `id` where the config has no such keys.
        history: flat rows, `a.b` for `b` in `a`, in the order they were logged.
    """

    path: str
    state: str
    config: dict[str, Any]
    history: list[dict[str, Any]]


def read(path: Path, config: SourceConfig, name: str) -> Results:
    """The finished runs at `path`.

    Raises:
        UserError: there is nothing at `path`, W&B refuses, or no run has a finished result.
    """
    warnings: list[str] = []
    runs = _read_offline(path, warnings) if path.exists() else _fetch(path)
    runs = [run for run in runs if OUR_REPORT not in run.config]
    warnings += [f"{run.path}: it is {run.state}, not finished; left out." for run in runs if run.state != "finished"]
    runs = [run for run in runs if run.state == "finished"]
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for run in runs:
        evaluations = _evaluations(run, config)
        finished = [row for row in evaluations if row["budget"] is not None] or evaluations[-1:]
        if not finished:
            warnings.append(f"{run.path}: its history has no {' or '.join(_keys('loss', config.columns))}; left out.")
        rows += finished
        curves += [row for row in evaluations if row["budget"] is None and row["step"]]
    logged = ", ".join(
        sorted({key for run in runs for row in run.history for key in row if not key.startswith("_")})[:30]
    )
    if not rows:
        advice = f"; name the validation loss with data.columns.loss=..., there are {logged}" if logged else ""
        raise UserError(f"no run in {path} has a finished result: {' '.join(warnings[:3]) or 'it has none.'}{advice}")
    table, losses = _table(rows), _table(curves)
    if not {*COSTS, "flops"} & {*table.columns}:
        raise UserError(
            f"no run in {path} says what it cost: name its data.columns.tokens=..., flops or seconds, or set "
            f"data.tokens_per_step; there are {logged}"
        )
    own = [run for run in runs if run.config.keys() >= OUR_CONFIG]
    provenance = [{"path": run.path, **{key: run.config[key] for key in PROVENANCE}} for run in own]
    results = normalise(name, table, losses.rename({"loss": "val_loss"}) if len(losses) else None, provenance)
    return replace(results, warnings=[*warnings, *results.warnings])


def _evaluations(run: Run, config: SourceConfig) -> list[dict[str, Any]]:
    """A row for each logged loss, with the columns of `ColumnNames`, `run` and `branch`; None where not known.

    Costs may be logged by themselves, before the loss: the last value counts. Of rows for one step the last counts,
    because a run that was resumed repeats some.
    """
    keys = {entry.name: _keys(entry.name, config.columns) for entry in fields(ColumnNames)}
    settings = {"params": config.params, **_flat(run.config)}
    identity = {column: _first(keys[column], settings) for column in IDENTITY}
    costs: dict[str, float | None] = dict.fromkeys(keys.keys() - {*IDENTITY, *MOMENTARY})
    rows: dict[Any, dict[str, Any]] = {}
    for logged in run.history:
        numbers = {column: _number(_first(keys[column], logged)) for column in (*costs, *MOMENTARY)}
        costs |= {column: numbers[column] for column in costs if numbers[column] is not None}
        if numbers["loss"] is None:
            continue
        row = {"run": run.path, "branch": _number(logged.get("branch")), **identity, **numbers, **costs}
        if row["tokens"] is None and row["step"] is not None and config.tokens_per_step:
            row["tokens"] = row["step"] * config.tokens_per_step
        if row["flops"] is None and row["tokens"] is not None and config.flops_per_token:
            row["flops"] = row["tokens"] * config.flops_per_token
        place = len(rows) if row["step"] is None else (row["budget"], row["branch"], row["step"])
        rows.pop(place, None)
        rows[place] = row
    return list(rows.values())


def _keys(column: str, names: ColumnNames) -> tuple[str, ...]:
    chosen = getattr(names, column)
    return (chosen,) if chosen else KEYS.get(column, (column,))


def _first(keys: tuple[str, ...], values: dict[str, Any]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _number(value: Any) -> float | None:
    """W&B writes numbers that are none as text; other text and pictures are no numbers."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Without the columns in which nothing is known. Text beside numbers, as for a scale, is all text."""
    columns = {}
    for column in rows[0] if rows else ():
        cells = [row[column] for row in rows]
        if any(cell is not None for cell in cells):
            numeric = all(isinstance(cell, int | float | None) for cell in cells)
            columns[column] = cells if numeric else [None if cell is None else str(cell) for cell in cells]
    return pl.DataFrame(columns, strict=False)


def _fetch(path: Path) -> list[Run]:
    """Every run of entity/project, or of one group in it, with its whole history.

    Raises:
        UserError: the path is of another form, or W&B refuses: no key, no such project, no connection.
    """
    entity_and_project, group = "/".join(path.parts[:2]), path.parts[2:]
    if path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) not in (2, 3) or Path(path.parts[0]).exists():
        raise UserError(f"there is no folder {path}: set path=... to a folder of W&B runs, or to entity/project")
    import wandb

    try:
        found = wandb.Api().runs(entity_and_project, filters={"group": group[0]} if group else None)
        runs = [
            Run(
                path=f"{entity_and_project}/{run.id}",
                state=run.state,
                config={"name": run.name, "group": run.group, "id": run.id, **run.config},
                history=[_flat(row) for row in run.scan_history()],
            )
            for run in found
        ]
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B: {one_line(error)}; there is no folder {path} either") from None
    if not runs:
        raise UserError(f"W&B has no run in {path}")
    return runs


def _read_offline(path: Path, warnings: list[str]) -> list[Run]:
    """The runs of all .wandb files; files of one run, which was resumed, are put together in order of their folders.

    Raises:
        UserError: there is no such file, or the installed W&B has no definition of what is in it.
    """
    found = [path] if path.is_file() else path.rglob("run-*.wandb")
    files = sorted({file.resolve() for file in found}, key=lambda file: (file.parent.name, file))
    if not files:
        raise UserError(f"{path} holds no offline run of W&B: expected wandb/offline-run-*/run-*.wandb below it")
    runs: dict[str, Run] = {}
    for file in files:
        try:
            run = _read_file(file)
        except (OSError, _DamagedError) as error:
            warnings.append(f"{file.parent.name}: {file.name} cannot be read ({error}); left out.")
            continue
        before = runs.pop(run.config["id"], None)
        if before is not None:
            run = replace(run, config={**before.config, **run.config}, history=[*before.history, *run.history])
        runs[run.config["id"]] = run
    return list(runs.values())


def _read_file(file: Path) -> Run:
    """What one .wandb file says; a run without an exit record was cut off."""
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise UserError(
            "the installed W&B cannot read offline runs: install wandb>=0.19, or sync and use entity/project"
        ) from None
    state = "cut off"
    config: dict[str, Any] = {}
    described: dict[str, str] = {}
    history: list[dict[str, Any]] = []
    for content in _records(file.read_bytes()):
        try:
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                described = {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
                _update(config, record.run.config.update)
            elif kind == "config":
                _update(config, record.config.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                _update(row, record.history.item)
                history.append(_flat(row))
            elif kind == "exit":
                state = "failed" if record.exit.exit_code else "finished"
        except (DecodeError, ValueError):
            raise _DamagedError("a record in it makes no sense") from None
    identity = {key: value or None for key, value in described.items()}
    return Run(file.parent.name, state, {"id": file.stem, **identity, **config}, history)


def _update(values: dict[str, Any], items: Any) -> None:
    """Sets `values` to protobuf items: a key, or a path of nested keys, with a value in JSON."""
    for item in items:
        *outer, key = item.nested_key or [item.key]
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[key] = json.loads(item.value_json)


class _DamagedError(Exception):
    """A .wandb file does not hold what its checksums say."""


BLOCK, HEADER = 1 << 15, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is LevelDB's log behind 7 bytes of its own, up to where it is cut off.

    W&B offers no function to read it. The format: github.com/google/leveldb, doc/log_format.md, with zlib's CRC-32.
    """
    if content[:4] != b":W&B":
        raise _DamagedError("it is no .wandb file")
    position, record = 7, b""
    while position + HEADER.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, length, kind = HEADER.unpack_from(content, position)
        part = content[position + HEADER.size : position + HEADER.size + length]
        if len(part) < length:
            return
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            raise _DamagedError(f"damaged at byte {position}")
        position += HEADER.size + length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield record
