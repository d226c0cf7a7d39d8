"""What all text logs have in common: which files there are, whose they are, and the way to `Results`."""

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench.config import SourceConfig
from bench.errors import UserError
from bench.gains.sources import Results
from bench.gains.sources.columns import normalise

EXTENSIONS = (".log", ".txt", ".out")
STEP = r"\d{1,12}"
# A loss as "%.4f" and the like print it. One of fewer decimals may be cut off where the file ends, so something must
# follow it.
LOSS = r"(-?\d+\.\d{4,}|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?=[\s,])|nan|-?inf)"
# A file's name that tells runs of one variant apart, rather than naming the variant: a seed, or what uuid4 made up.
RUN = re.compile(r"(?:seed)?[-_=]?(?P<seed>\d{1,9})|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
PLACEHOLDERS = {"scale": r"[^/]+?", "variant": r"[^/]+?", "seed": r"\d{1,9}", "lr": r"[-+.\de]+", "_": r"[^/]*?"}

NEARLY = 0.95  # of a schedule: an evaluation before is none of its end, though no other was due


@dataclass(frozen=True)
class Log:
    """What a log says; the dictionaries are by step, ascending.

    Attributes:
        losses: validation loss, nats per token.
        seconds: training time by then; a step where that is not known is missing.
        trained: number of the last step that is mentioned at all.
        planned: the step at which the schedule ends; None where the log does not say.
        params: parameters as in 6 x params x tokens.
        lr: peak learning rate.
    """

    losses: dict[int, float]
    seconds: dict[int, float]
    trained: int
    planned: int | None = None
    tokens_per_step: float | None = None
    params: float | None = None
    lr: float | None = None


def read_logs(path: Path, config: SourceConfig, name: str, parse: Callable[[str], Log]) -> Results:
    """Every log at `path` (a file, a folder or a glob): its last validation loss is a result, all of them a curve.

    A log that does not reach the end of its schedule gives no result, and one that cannot be read takes no other with
    it; `warnings` names them.

    Raises:
        UserError: there is no log, none holds a finished result, or `data.pattern` is wrong.
    """
    files, root = _find_logs(path)
    pattern = _compile(config.pattern) if config.pattern else None
    warnings: list[str] = []
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for file in files:
        run = file.relative_to(root).as_posix()
        try:
            identity = identify(run, pattern)
            log = parse(file.read_text(encoding="utf-8", errors="replace"))
            doubt = _doubt(log)
            evaluations = _evaluations(log, config)
        except UserError as reason:
            warnings.append(f"{run}: {reason}; left out.")
            continue
        except OSError as error:
            warnings.append(f"{run}: cannot be read ({error.strerror}); left out.")
            continue
        if doubt:
            warnings.append(f"{run}: {doubt}.")
        evaluations = [{"run": run, **row} for row in evaluations]
        # Without a scale, variants of one size may differ in parameters: their number is not to set them apart.
        known = {"scale": "all", "lr": log.lr, "params": log.params or config.params}
        rows.append({**known, **evaluations[-1], **identity})
        curves += [row for row in evaluations if row["step"]]
    if not rows:
        raise UserError(f"no log in {path} holds a finished result: {' '.join(warnings[:3])}")
    results = normalise(name, _table(rows), _table(curves).rename({"loss": "val_loss"}))
    return replace(results, warnings=[*warnings, *results.warnings])


def identify(run: str, pattern: re.Pattern[str] | None = None) -> dict[str, str]:
    """Variant, scale, seed and learning rate, as far as a log's relative path says them.

    Without a pattern, a file whose name is a seed ("3", "seed=3") or a UUID is a run of the variant that its folder
    names; any other file is itself named by its variant. The folder above the variant, if there is one, is the scale.

    Raises:
        UserError: the path is not as the pattern says.
    """
    if pattern is not None:
        match = pattern.search(run)
        if match is None:
            raise UserError("its path does not have the form that data.pattern says")
        return match.groupdict()
    *folders, file = run.split("/")
    stem = file.rsplit(".", 1)[0]
    repeat = RUN.fullmatch(stem)
    names = folders if repeat else [*folders, stem]
    found = {
        "scale": names[-2] if len(names) > 1 else None,
        "variant": names[-1] if names else None,
        "seed": repeat["seed"] if repeat else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def follow(events: Iterable[tuple[int, float | None, float]]) -> tuple[dict[int, float], dict[int, float]]:
    """Validation losses and times by step, from (step, loss or None, time or NaN) in the order they were logged.

    Where evaluations go back to an earlier step, training was resumed or begun anew, and what comes later holds.
    """
    losses: dict[int, float] = {}
    times: dict[int, float] = {}
    evaluated = -1
    for step, loss, time in events:
        if loss is not None:
            if step < evaluated:
                losses = {known: value for known, value in losses.items() if known < step}
                times = {known: value for known, value in times.items() if known <= step}
            losses[step] = loss
            evaluated = step
        if loss is None or not np.isnan(time):
            times[step] = time
    return dict(sorted(losses.items())), dict(sorted(times.items()))


def _find_logs(path: Path) -> tuple[list[Path], Path]:
    """The logs, in order of their paths, and the folder that their names are relative to."""
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()]
        root, expected = path, f"a file that ends in {', '.join(EXTENSIONS)}"
    elif glob.has_magic(str(path)):
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        root, expected = next(parent for parent in path.parents if not glob.has_magic(str(parent))), "such a file"
    else:
        raise UserError(f"there is no file or folder {path}: set path=... to a log, a folder of logs or a glob")
    if not files:
        raise UserError(f"{path} holds no log: expected {expected}")
    return sorted(files), root


def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern such as "{scale}/{variant}/{seed}.log", for the end of a path; {_} is anything within a name."""
    parts = re.split(r"(\{\w*\})", pattern)
    names = [part[1:-1] for part in parts[1::2]]
    for name in names:
        if name not in PLACEHOLDERS or (name != "_" and names.count(name) > 1):
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            raise UserError(f"data.pattern={pattern}: {{{name}}} is unknown or there twice: use {known}")
    for index, name in enumerate(names):
        group = "?:" if name == "_" else f"?P<{name}>"
        parts[2 * index + 1] = f"({group}{PLACEHOLDERS[name]})"
    parts[0::2] = [re.escape(part) for part in parts[0::2]]
    return re.compile(f"(?:^|/){''.join(parts)}$")


def _doubt(log: Log) -> str | None:
    """What the reader should know of a log whose last loss counts as that of a finished schedule.

    Raises:
        UserError: it does not count.
    """
    *earlier, last = [0, *(step for step in log.losses if step)]
    if last == 0:
        raise UserError("has no validation loss after step 0")
    if log.planned is None:
        if log.trained > last:
            raise UserError(f"goes on after its last evaluation, at step {last}: a loss in mid-schedule is no result")
        return None
    if last >= log.planned:
        return None
    end = f"its last evaluation is at step {last} of {log.planned}"
    if log.planned - last >= last - earlier[-1] or last < NEARLY * log.planned:
        raise UserError(f"{end}: a loss in mid-schedule is no result")
    return f"{end}, which is taken as the end of its schedule"


def _evaluations(log: Log, config: SourceConfig) -> list[dict[str, Any]]:
    tokens_per_step = log.tokens_per_step or config.tokens_per_step
    rows = []
    for step, loss in log.losses.items():
        tokens = step * tokens_per_step if tokens_per_step else None
        flops = tokens * config.flops_per_token if tokens and config.flops_per_token else None
        rows.append({"step": step, "loss": loss, "tokens": tokens, "flops": flops, "seconds": log.seconds.get(step)})
    if not any(rows[-1][cost] for cost in ("tokens", "seconds")):
        raise UserError("does not say what a step costs, nor how long it took: set data.tokens_per_step")
    return rows


def _table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Without the columns in which nothing is known."""
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table.select(column for column in table.columns if table[column].count())
