"""From a table with the columns that others keep to `Results`: what can be derived, and what must be left out."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bench.config import BASELINE, ColumnNames
from bench.errors import UserError
from bench.gains.sources import Results
from bench.gains.sources.runs import COSTS, CURVES, PROVENANCE, RESULTS

COLUMNS = tuple(entry.name for entry in fields(ColumnNames))
TEXT = ("variant", "scale", "run", "origin")
MEASURES = ("flops", "params", *(cost for cost in COSTS if cost != "model_flops"))
# What compute is read from: the first that at least half of the rows have.
COMPUTE_AXES = (
    "model_flops", "flops_6nd", "flops_6nd_head", "flops_palm", "tokens", "seconds", "joules", "dollars", "grams_co2e",
)  # fmt: skip
KEY = ("variant", "scale", "seed", "lr", "budget")
LR_NOT_GIVEN = 0.0
LARGEST_SEED = 2.0**53  # floats tell whole numbers apart up to here
NO_LOSS = 1e6  # nats: what is above comes of something that overflowed
SAME_BUDGET = 0.01  # relative difference in compute below which two results are of one budget
SHARED_BUDGET = 0.05  # the same between variants, whose steps may cost a little more or less
OTHER_UNITS = 1000.0  # ratio of computes from which they are in different units
BITS_PER_NAT = 1 / np.log(2)
BITS_TOLERANCE = 0.03
DOUBTFUL_FLOPS = 20.0  # ratio of flops to 6 x params x tokens


def normalise(
    name: str,
    table: pl.DataFrame,
    curves: pl.DataFrame | None = None,
    runs: Iterable[dict[str, Any]] = (),
) -> Results:
    """`Results` from a table with a row for each finished budget.

    Cells may be numbers or text. `loss` is needed, and one cost. What is missing is derived:

    - model_flops is `flops`, or else 6 x params x tokens; flops_6nd is 6 x params x tokens. Without `tokens`, `flops`
      are taken to be 6 x params x tokens.
    - `variant` is "baseline". The innovations of any other are the parts of its name between "+".
    - `scale` is the number of params, or "all" where that is not known either.
    - `lr` is 0, which means that it was not given.
    - `budget` is the compute: model FLOPs, or the first cost there is. Computes of a variant at a scale within 1 % of
      each other are one budget, their median: seeds differ by the rounding of steps.
    - `seed`: rows alike in variant, scale, lr and budget are repeats and are numbered from 0, in an order that depends
      neither on the rows' nor on the losses'. Seeds pair a variant with the baseline; to pair the best repeat with the
      best would make intervals too narrow.

    A row that cannot be used is left out, and `warnings` says why. Costs beside the compute are different: one that is
    not a number above 0 counts as not measured, which takes away its axis rather than its row.

    Args:
        name: the study's.
        table: with columns of `ColumnNames`, and where they are known `run` (the path of a log, say) and `origin` (what
            to call a row in a warning). Others are ignored.
        curves: losses in mid-schedule: `run` as in `table`, `step`, `val_loss`, costs, and where they are known
            `branch`, `train_loss` and `grad_norm`. Without `branch`, the curve of a run with one result leads to that
            result's budget.
        runs: more about the runs of the table: `path`, which is their `run`, and any of PROVENANCE.

    Raises:
        UserError: a needed column is missing, or no row can be used.
    """
    warnings: list[str] = []
    _require_columns(table)
    table = _derive_costs(_read_cells(table))
    compute = max(COMPUTE_AXES, key=lambda axis: min(table[axis].count(), len(table) / 2))
    table = _without_bad_numbers(table, compute, warnings)
    table = _without_repetitions(_fill_keys(table, compute), warnings)
    table = _without_contradictions(_number_repeats(table), warnings)
    table = _without_other_units(table, compute, warnings)
    table = _without_bits(table, warnings)
    if table.is_empty():
        raise UserError(f"no row of {name} can be used: {' '.join(warnings) or 'it has none.'}")
    _doubt_flops(table, warnings)
    table = _fill_runs(table).sort(KEY)
    return Results(
        name=name,
        results=_in_schema(
            table.with_columns(study=pl.lit(name), val_loss="loss", val_loss_se=_positive("loss_se")), RESULTS
        ),
        curves=_read_curves(name, curves, table, warnings),
        runs=_describe_runs(name, table, runs),
        warnings=warnings,
    )


def _require_columns(table: pl.DataFrame) -> None:
    costs = set(table.columns) & set(MEASURES) - {"params", "optimizer_flops"}
    missing = None
    if "loss" not in table.columns:
        missing = "a column loss"
    elif not costs and not {"params", "tokens"} <= set(table.columns):
        missing = "a cost, such as a column flops or columns params and tokens"
    if missing:
        option = "loss" if "loss" in missing else "flops"
        there = ", ".join(column for column in table.columns if column not in ("origin", "run")) or "none"
        raise UserError(f"the results need {missing}; there are {there}: name yours with data.columns.{option}=...")


def _read_cells(table: pl.DataFrame) -> pl.DataFrame:
    """Every column that is known, as text or Float64; null where a cell is empty, NaN where it is no number."""
    names = (*COLUMNS, "run", "origin")
    read = {name: (_as_text if name in TEXT else _as_numbers)(_cells(table, name)) for name in names}
    table = pl.DataFrame(read).with_row_index("row", offset=1)
    return table.with_columns(origin=pl.coalesce("origin", "run", pl.format("row {}", "row")))


def _cells(table: pl.DataFrame, name: str) -> pl.Series:
    return table[name] if name in table.columns else pl.Series([None] * len(table), dtype=pl.String)


def _as_text(cells: pl.Series) -> pl.Series:
    if cells.dtype != pl.String:
        form = "{:g}" if cells.dtype.is_float() else "{}"
        cells = pl.Series([None if cell is None else form.format(cell) for cell in cells], dtype=pl.String)
    cells = cells.str.strip_chars()
    return cells.set(cells == "", None)


def _as_numbers(cells: pl.Series) -> pl.Series:
    if cells.dtype.is_numeric():
        return cells.cast(pl.Float64)
    text = _as_text(cells)
    numbers = text.cast(pl.Float64, strict=False)
    return numbers.set(numbers.is_null() & text.is_not_null(), np.nan)


def _derive_costs(table: pl.DataFrame) -> pl.DataFrame:
    """Costs, null where they are not known; `tokens_given` are those of the table itself."""
    optimizer = pl.col("optimizer_flops")
    known = table.with_columns(
        *(_positive(name) for name in MEASURES if name != "optimizer_flops"),
        pl.when(optimizer.is_finite() & (optimizer >= 0)).then(optimizer),
    )
    flops, params, tokens = pl.col("flops"), pl.col("params"), pl.col("tokens")
    without_tokens = pl.when(tokens.is_null() & params.is_not_null()).then(flops)
    return known.with_columns(
        tokens_given=tokens,
        tokens=pl.coalesce(tokens, flops / (6 * params)),
        model_flops=pl.coalesce(flops, 6 * params * tokens),
        flops_6nd=pl.coalesce("flops_6nd", 6 * params * tokens, without_tokens),
    )


def _positive(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_finite() & (pl.col(name) > 0)).then(name)


def _without_bad_numbers(table: pl.DataFrame, compute: str, warnings: list[str]) -> pl.DataFrame:
    loss, seed, lr, budget = (pl.col(name) for name in ("loss", "seed", "lr", "budget"))
    bad = {
        "no loss above 0": ~(loss.is_finite() & (loss > 0) & (loss < NO_LOSS)).fill_null(False),
        f"no {'flops' if compute == 'model_flops' else compute} above 0": pl.col(compute).is_null(),
        "a seed that is no whole number": ~((seed == seed.round()) & (seed.abs() <= LARGEST_SEED)),
        "an lr that is no number": ~(lr.is_finite() & (lr >= 0)),
        "a budget that is no number above 0": ~(budget.is_finite() & (budget > 0)),
    }
    everything = len(table)
    for what, condition in bad.items():
        out = table.filter(condition)
        if len(out):
            warnings.append(f"{len(out)} of {everything} rows are left out, the first {_first(out)}: {what}.")
        table = table.filter(~condition.fill_null(False))
    return table


def _fill_keys(table: pl.DataFrame, compute: str) -> pl.DataFrame:
    sizes = pl.Series([None if params is None else f"{params:g}" for params in table["params"]], dtype=pl.String)
    table = table.with_columns(
        variant=pl.col("variant").fill_null(BASELINE),
        scale=pl.coalesce("scale", sizes, pl.lit("all")),
        lr=pl.col("lr").fill_null(LR_NOT_GIVEN),
        seed=pl.col("seed").cast(pl.Int64),
        compute=pl.col(compute),
    )
    one = pl.col("compute").map_batches(_same_budgets, return_dtype=pl.Float64)
    given = pl.col("budget").is_not_null()
    return table.with_columns(budget=pl.coalesce("budget", one.over("scale", "variant", given)))


def _same_budgets(computes: pl.Series) -> pl.Series:
    """For each compute the median of those that are of one budget with it."""
    values = computes.to_numpy()
    labels = np.empty_like(values)
    ascending = np.sort(values)
    while len(ascending):
        end = np.searchsorted(ascending, ascending[0] * (1 + SAME_BUDGET), side="right")
        one, ascending = ascending[:end], ascending[end:]
        labels[(values >= one[0]) & (values <= one[-1])] = np.median(one)
    return pl.Series(labels)


def _without_repetitions(table: pl.DataFrame, warnings: list[str]) -> pl.DataFrame:
    """One of the rows that say the same; but two runs without a seed are repeats, which may have the same loss."""
    said = table.with_columns(repeat=pl.when(pl.col("seed").is_null()).then("run")).sort("run", "row")
    same = [name for name in said.columns if name not in ("run", "origin", "row")]
    once = said.unique(same, keep="first", maintain_order=True)
    again = said.join(once, on="row", how="anti")
    if len(again):
        warnings.append(
            f"{len(again)} of {len(table)} rows say what another row says and are counted once, the first "
            f"{_first(again)}; give repeats a seed."
        )
    return once.drop("repeat")


def _first(rows: pl.DataFrame) -> str:
    return rows.sort("row")["origin"][0]


def _number_repeats(table: pl.DataFrame) -> pl.DataFrame:
    """Gives the rows without a seed the smallest numbers that the others of their group do not have."""
    seeds = table["seed"].to_list()
    for _, rows in table.with_row_index("at").group_by("variant", "scale", "lr", "budget"):
        free = itertools.filterfalse(set(rows["seed"]).__contains__, itertools.count())
        repeats = sorted(rows.filter(pl.col("seed").is_null()).iter_rows(named=True), key=_digest)
        for row, seed in zip(repeats, free, strict=False):
            seeds[row["at"]] = seed
    return table.with_columns(seed=pl.Series(seeds, dtype=pl.Int64))


def _digest(row: dict[str, Any]) -> bytes:
    """A hash of a row's run, or of what the row says where it names none."""
    text = row["run"] or repr([row[name] for name in COLUMNS])
    return hashlib.blake2b(text.encode()).digest()


def _without_contradictions(table: pl.DataFrame, warnings: list[str]) -> pl.DataFrame:
    twice = table.filter(pl.len().over(KEY) > 1).sort(*KEY, "row")
    for (variant, scale), rows in twice.group_by("variant", "scale", maintain_order=True):
        warnings.append(
            f"{variant} at {scale}: {len(rows)} rows differ from others of the same seed, lr and budget, the first "
            f"{_first(rows)}; all of them are left out."
        )
    return table.join(twice, on="row", how="anti")


def _without_other_units(table: pl.DataFrame, compute: str, warnings: list[str]) -> pl.DataFrame:
    """Without variants whose compute is beyond all proportion to the others' at the same scale."""
    axis = "flops" if compute == "model_flops" else compute
    for scale in table["scale"].unique().sort():
        rows = table.filter(pl.col("scale") == scale)
        medians = dict(rows.group_by("variant").agg(pl.col("compute").median()).iter_rows())
        usual = np.median(_standards(medians))
        for variant in sorted(medians):
            factor = medians[variant] / usual
            if max(factor, 1 / factor) >= OTHER_UNITS:
                warnings.append(
                    f"{variant} at {scale}: its {axis} are {factor:.3g} times those of the others, as if they were in "
                    "other units; it is left out."
                )
                table = _without(table, variant, scale)
    return table


def _standards(values: dict[str, Any]) -> list[Any]:
    """What the variants of a scale are held against: all of them; of two the baseline, as there is no majority."""
    return [values[BASELINE]] if len(values) == 2 and BASELINE in values else list(values.values())


def _without(table: pl.DataFrame, variant: str, scale: str) -> pl.DataFrame:
    return table.filter((pl.col("variant") != variant) | (pl.col("scale") != scale))


def _without_bits(table: pl.DataFrame, warnings: list[str]) -> pl.DataFrame:
    """Without variants whose losses are those of the others in bits, or the others' in bits are theirs."""
    for scale in table["scale"].unique().sort():
        rows = table.filter(pl.col("scale") == scale)
        means = rows.group_by("variant", "budget").agg(pl.col("loss").mean(), pl.col("compute").mean())
        frontiers = {variant: rows for (variant,), rows in means.sort("compute").group_by("variant")}
        for variant in sorted(frontiers):
            ratios = _loss_ratios(frontiers[variant], _standards(frontiers))
            for factor, unit in ((BITS_PER_NAT, "bits"), (1 / BITS_PER_NAT, "nats, and the others' in bits")):
                if len(ratios) > 1 and (np.abs(ratios / factor - 1) < BITS_TOLERANCE).all():
                    warnings.append(
                        f"{variant} at {scale}: its losses are {factor:.3g} times those of the others at every budget, "
                        f"as if they were in {unit}; it is left out."
                    )
                    table = _without(table, variant, scale)
    return table


def _loss_ratios(frontier: pl.DataFrame, standards: list[pl.DataFrame]) -> NDArray[np.float64]:
    """A variant's losses over the median of the standards', at its budgets where enough of them have a loss."""
    ratios = []
    for compute, loss in frontier.select("compute", "loss").iter_rows():
        close = (pl.col("compute") / compute).log().abs() < SHARED_BUDGET
        losses = [loss for standard in standards for loss in standard.filter(close)["loss"]]
        if len(losses) >= min(3, len(standards)):
            ratios.append(loss / np.median(losses))
    return np.array(ratios)


def _doubt_flops(table: pl.DataFrame, warnings: list[str]) -> None:
    ratio = pl.col("flops") / (6 * pl.col("params") * pl.col("tokens_given"))
    doubtful = table.filter(ratio.log().abs() > np.log(DOUBTFUL_FLOPS))
    if len(doubtful):
        warnings.append(
            f"{len(doubtful)} of {len(table)} rows have flops more than {DOUBTFUL_FLOPS:g} times above or below 6 x "
            f"params x tokens, the first {_first(doubtful)}: check the units."
        )


def _fill_runs(table: pl.DataFrame) -> pl.DataFrame:
    rate = pl.when(pl.col("lr") != LR_NOT_GIVEN).then(pl.format(",lr={}", "lr")).otherwise(pl.lit(""))
    named = table.with_columns(run=pl.coalesce("run", pl.format("{}/{}/seed={}{}", "scale", "variant", "seed", rate)))
    return named.with_columns(innovations=pl.col("variant").map_elements(_innovations, pl.List(pl.String)))


def _innovations(variant: str) -> list[str]:
    return [] if variant == BASELINE else sorted({part.strip() for part in variant.split("+")} - {""})


def _in_schema(table: pl.DataFrame, schema: dict[str, Any]) -> pl.DataFrame:
    columns = [
        (pl.col(name) if name in table.columns else pl.lit(None)).cast(kind, strict=False).alias(name)
        for name, kind in schema.items()
    ]
    return table.select(columns).with_columns(
        model_flops_with_optimizer=pl.col("model_flops") + pl.col("optimizer_flops")
    )


def _describe_runs(name: str, table: pl.DataFrame, more: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {run["path"]: run for run in more}
    described = []
    for row in table.unique("run", keep="first", maintain_order=True).iter_rows(named=True):
        place = {key: row[key] for key in ("scale", "variant", "innovations", "seed", "lr")}
        provenance = {key: known.get(row["run"], {}).get(key) for key in PROVENANCE}
        if provenance["parameters"] is None and row["params"] is not None:
            provenance["parameters"] = {"total": round(row["params"])}
        described.append({"path": row["run"], "study": name, **place, "state": "done", **provenance})
    return described


def _read_curves(name: str, curves: pl.DataFrame | None, table: pl.DataFrame, warnings: list[str]) -> pl.DataFrame:
    """The evaluations of the runs that have a result."""
    if curves is None or curves.is_empty():
        return _in_schema(pl.DataFrame(schema={"model_flops": pl.Float64, "optimizer_flops": pl.Float64}), CURVES)
    only_budget = pl.when(pl.len().over("run") == 1).then("budget").alias("only_budget")
    place = ["run", "scale", "variant", "innovations", "seed", "lr"]
    runs = table.select(*place, pl.col("params").alias("params_of_run"), only_budget).unique("run", maintain_order=True)
    numbers = ("branch", "step", "train_loss", "val_loss", "grad_norm", *MEASURES)
    read = pl.DataFrame(
        {"run": _as_text(curves["run"])} | {name: _as_numbers(_cells(curves, name)) for name in numbers}
    )
    read = read.join(runs, on="run", how="inner").with_columns(
        branch=pl.coalesce("branch", "only_budget"), params=pl.coalesce("params", "params_of_run")
    )
    read = _derive_costs(read)
    usable = read.filter(pl.col("val_loss").is_finite() & pl.col("step").is_finite())
    if len(usable) < len(read):
        warnings.append(
            f"{len(read) - len(usable)} of {len(read)} evaluations in mid-schedule have no loss and are left out."
        )
    return _in_schema(usable.sort("run", "step").with_columns(study=pl.lit(name)), CURVES)
