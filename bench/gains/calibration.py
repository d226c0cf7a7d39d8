"""Does a 90 % interval hold the truth 90 % of the time? Judges estimators on studies whose gains are known.

    python -m bench.gains.calibration --studies 400 --processes 2

prints the table of README.md. A study follows from its setting and its number alone (`draw`), so each can be looked at
again.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from bench.config import BASELINE
from bench.errors import UserError
from bench.gains.compute import compute_gains
from bench.gains.estimators import find_estimator
from bench.gains.resampling import SIGNIFICANT
from bench.gains.synthetic import PowerLawStudy

ESTIMATORS = ("crossing", "scaling_law")
SMALLEST_BUDGET = 1e12  # model FLOPs
LARGEST_GAIN = 4.0
EXPONENT_DIFFERENCE = 0.1  # of a variant's gamma, relative to the baseline's
MARGIN = 3.0  # standard errors by which a truth must lie inside the budgets trained for its error to count as bias

ROWS = {  # a row is one variant of one study; see `judge`
    "setting": pl.String,
    "estimator": pl.String,
    "study": pl.Int64,
    "variant": pl.String,
    "truth": pl.Float64,
    "ceg": pl.Float64,
    "error": pl.Float64,
    "covered_90": pl.Boolean,
    "covered_95": pl.Boolean,
    "points": pl.Int64,
    "points_covered": pl.Int64,
    "two_sided_covered": pl.Boolean,
    "censored": pl.Boolean,
    "bound_holds": pl.Boolean,
    "false_slope": pl.Boolean,
    "false_verdict": pl.Boolean,
    "found_slope": pl.Boolean,
    "not_converged": pl.Float64,
}


@dataclass(frozen=True)
class Setting:
    """A kind of study.

    Attributes:
        unequal: whether each variant's gamma is 10 % above, 10 % below or equal to the baseline's (all equal if not).
        censored: whether a fifth of the last targets lie beyond the variant's largest budget.
        shared_seeds: whether variants are trained with the baseline's seeds.
        shared: share of the noise's variance that a seed does to all variants alike.
        fixed: whether size and noise are those at which a difference of gamma must be found, rather than drawn; no
            gamma is equal then, if they are unequal.
    """

    name: str
    unequal: bool = False
    censored: bool = False
    shared_seeds: bool = True
    shared: float = 0.5
    fixed: bool = False


SETTINGS = (
    Setting("equal gamma"),
    Setting("equal gamma, censored", censored=True),
    Setting("unequal gamma", unequal=True),
    Setting("unequal gamma, censored", unequal=True, censored=True),
    Setting("equal gamma, no shared seeds", shared_seeds=False),
    Setting("power", unequal=True, fixed=True),
)


def draw(setting: Setting, number: int) -> tuple[PowerLawStudy, np.random.Generator]:
    """A study's truth, and the generator that its noise comes from; the same number is a like study in each setting."""
    generator = np.random.default_rng(number)
    variants, budgets, seeds = (int(generator.integers(low, high)) for low, high in ((3, 9), (3, 7), (2, 6)))
    noise, decades = 10 ** generator.uniform(-3, -2), generator.uniform(1, 2.5)
    asymptote, reducible, exponent = (generator.uniform(low, high) for low, high in ((1.5, 2), (1, 2), (0.08, 0.3)))
    if setting.fixed:
        variants, budgets, seeds, noise, decades = 4, 5, 3, 0.002, 2.0
    lowest = -0.25 if setting.censored else 0.25
    log_gains = np.append(0.0, generator.uniform(lowest, 1, variants - 1) * np.log(LARGEST_GAIN))
    signs = generator.choice([-1, 1] if setting.fixed else [-1, 0, 1], variants - 1)
    exponents = exponent * np.append(1.0, 1 + EXPONENT_DIFFERENCE * signs * setting.unequal)
    log_compute = np.linspace(0, decades * np.log(10), budgets)
    # Each variant's law passes the baseline's last loss where its compute is less by its gain.
    log_reducible = np.log(reducible) - exponent * log_compute[-1] + exponents * (log_compute[-1] - log_gains)
    first = 0 if setting.shared_seeds else 10
    study = PowerLawStudy(
        asymptote=asymptote,
        reducible=np.exp(log_reducible),
        exponents=exponents,
        budgets=SMALLEST_BUDGET * np.exp(log_compute),
        seeds=[range(seeds), *[range(first, first + seeds)] * (variants - 1)],
        noise=noise,
        shared=setting.shared,
    )
    return study, generator


def judge(setting: Setting, estimator: str, number: int, replicates: int) -> list[dict[str, Any]]:
    """What one study says about an estimator: a row for each variant that it gives a gain for, with the columns ROWS.

    - error: of ln CEG, in units of `PowerLawStudy.noise_errors`; None where the truth lies within MARGIN of the edge of
      what was trained.
    - covered_90, covered_95: whether the gain's intervals hold the truth; points, points_covered: the same, at 90 %, of
      the curve; two_sided_covered: of an interval with two ends.
    - bound_holds: of what is only bounded, whether the truth is on that side.
    - false_slope, false_verdict: where the gammas are equal, whether that is rejected, before and after Holm's method;
      found_slope: where they are not, whether the verdict says so.
    - not_converged: share of the bootstrap replicates; None without a fit.
    """
    study, generator = draw(setting, number)
    found = compute_gains(
        study.simulate(generator), baseline=BASELINE, estimator=estimator, replicates=replicates, seed=number
    )
    entries = {entry["variant"]: entry for entry in found["gains"]}
    slopes = {entry["variant"]: entry["slope"] for entry in found["classes"]}
    converged = [fit["replicates_converged"] for fit in found["fits"]]
    losses = study.losses()
    log_gains, units = study.log_gains(losses[0]), study.noise_errors()
    about = {"setting": setting.name, "estimator": estimator, "study": number}
    return [
        about
        | {"variant": variant, "truth": float(np.exp(log_gains[place, -1])), "ceg": entries[variant]["ceg"]}
        | _coverage(entries[variant], study.budgets, np.exp(log_gains[place]))
        | {"error": _error(entries[variant]["ceg"], log_gains[place, -1], units[place], study.budgets)}
        | _slope(slopes[variant], study.exponents[place] / study.exponents[0])
        | {"not_converged": 1 - float(np.mean(converged)) if converged else None}
        for place, variant in enumerate(study.variants)
        if variant in entries
    ]


def _coverage(entry: Mapping[str, Any], budgets: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """The columns of `judge` on intervals and bounds; truths (K,) are CEGs at the baseline's budgets (K,)."""
    at = [int(np.abs(np.log(budgets / point["baseline_compute"])).argmin()) for point in entry["curve"]]
    points = [_holds(point, "interval_90", truths[k]) for point, k in zip(entry["curve"], at, strict=True)]
    censored = entry["ceg"] is None
    two_sided = entry["interval_90"] is not None and None not in entry["interval_90"]
    covered = _holds(entry, "interval_90", truths[at[-1]])
    return {
        "covered_90": covered,
        "covered_95": _holds(entry, "interval", truths[at[-1]]),
        "points": len(points),
        "points_covered": sum(points),
        "two_sided_covered": covered if two_sided else None,
        "censored": censored,
        "bound_holds": _within(entry["lower_bound"], truths[at[-1]], entry["upper_bound"]) if censored else None,
    }


def _holds(point: Mapping[str, Any], interval: str, truth: float) -> bool:
    """Whether an interval holds the truth; where there is none, whether the bounds do."""
    low, high = point[interval] or (point["lower_bound"], point["upper_bound"])
    return _within(low, truth, high)


def _within(low: float | None, truth: float, high: float | None) -> bool:
    return bool((low is None or low <= truth) and (high is None or truth <= high))


def _error(ceg: float | None, log_gain: float, unit: float, budgets: np.ndarray) -> float | None:
    """Of ln CEG in `unit`s. Near the edge None whatever was found: where some are censored, the others are biased."""
    room = min(log_gain, np.log(budgets[-1] / budgets[0]) - log_gain)
    return None if ceg is None or room < MARGIN * unit else float((np.log(ceg) - log_gain) / unit)


def _slope(slope: Mapping[str, Any], ratio: float) -> dict[str, bool | None]:
    """The columns of `judge` on the test of d ln CEG / d ln C; `ratio` is the variant's gamma over the baseline's."""
    if ratio == 1:
        rejected = slope["p_value"] is not None and slope["p_value"] < SIGNIFICANT
        verdict = slope["verdict"] in ("compute-dependent", "fading")
        return {"false_slope": rejected, "false_verdict": verdict, "found_slope": None}
    verdict = slope["verdict"] == ("compute-dependent" if ratio > 1 else "fading")
    return {"false_slope": None, "false_verdict": None, "found_slope": verdict}


def summarise(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """A line for each setting and estimator, from the rows of `judge`.

    bias is the mean error over the standard deviation of errors; false_family is the share of studies with a false
    verdict, of those where one could be.
    """
    false_verdict = pl.col("false_verdict")
    studies = pl.col("study")
    return (
        pl.DataFrame(list(rows), schema=ROWS)
        .group_by("setting", "estimator", maintain_order=True)
        .agg(
            studies=studies.n_unique(),
            variants=pl.len(),
            covered_90=pl.col("covered_90").mean(),
            covered_95=pl.col("covered_95").mean(),
            points_covered=pl.col("points_covered").sum() / pl.col("points").sum(),
            two_sided_covered=pl.col("two_sided_covered").mean(),
            censored=pl.col("censored").mean(),
            bound_holds=pl.col("bound_holds").mean(),
            bias=pl.col("error").mean() / pl.col("error").std(),
            false_slope=pl.col("false_slope").mean(),
            false_family=studies.filter(false_verdict).n_unique()
            / studies.filter(false_verdict.is_not_null()).n_unique(),
            found_slope=pl.col("found_slope").mean(),
            not_converged=pl.col("not_converged").mean(),
        )
    )


HEADS = {
    "setting": "setting",
    "estimator": "estimator",
    "studies": "studies",
    "variants": "variants",
    "covered_90": "90 % covers",
    "covered_95": "95 % covers",
    "points_covered": "whole curve, 90 %",
    "two_sided_covered": "two-sided, 90 %",
    "censored": "censored",
    "bound_holds": "bounds hold",
    "bias": "bias",
    "false_slope": "false slopes",
    "false_family": "false in family",
    "found_slope": "slopes found",
    "not_converged": "not converged",
}


def markdown(summary: pl.DataFrame) -> str:
    """The table of README.md."""
    lines = [HEADS.values(), ["---" if head in ("setting", "estimator") else "---:" for head in HEADS]]
    lines += [[_cell(head, row[head]) for head in HEADS] for row in summary.iter_rows(named=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(head: str, value: Any) -> str:
    if value is None or value != value:
        return "–"
    if head == "bias":
        return f"{value:+.2f}"
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gains.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=400, help="in each setting (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first study (default %(default)s)")
    parser.add_argument("--estimator", nargs="+", default=ESTIMATORS, help="files of bench/gains/estimators/")
    parser.add_argument("--replicates", type=int, default=200, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write a row for each variant of each study")
    chosen = parser.parse_args(arguments)
    # Studies outside, so that what is there when it is interrupted has as many of each kind.
    tasks = [
        (setting, estimator, number, chosen.replicates)
        for number in range(chosen.first, chosen.first + chosen.studies)
        for setting in SETTINGS
        for estimator in chosen.estimator
    ]
    try:
        for estimator in chosen.estimator:
            find_estimator(estimator)
        rows, finished = _judge_all(tasks, chosen.processes)
    except UserError as error:
        parser.error(str(error))
    order = [setting.name for setting in SETTINGS]
    rows.sort(key=lambda row: (order.index(row["setting"]), row["estimator"], row["study"], row["variant"]))
    if rows:
        print(markdown(summarise(rows)))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=0))
    return 0 if finished else 130


def _judge_all(tasks: Sequence[tuple[Setting, str, int, int]], processes: int) -> tuple[list[dict[str, Any]], bool]:
    """The rows of all tasks, and whether all were finished: an interruption ends it with what is there."""
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[threads] = "1"  # before the processes load NumPy: more threads would only fight over cores
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(processes, ignore) as pool:
        judged = pool.imap_unordered(_judge_task, tasks)
        try:
            for found in track(judged, "studies", len(tasks), console=Console(stderr=True)):
                rows += found
        except KeyboardInterrupt:
            return rows, False
    return rows, True


def _judge_task(task: tuple[Setting, str, int, int]) -> list[dict[str, Any]]:
    return judge(*task)


if __name__ == "__main__":
    sys.exit(main())
