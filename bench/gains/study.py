"""What estimators see of a study: every variant at its best rates, the axes that were measured, and the bootstrap."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from bench.errors import UserError
from bench.gains.table import read_results, read_runs
from bench.gains.tuning import TunedVariant, tune_variant

AXES = (
    "model_flops",
    "flops_6nd",
    "flops_6nd_head",
    "flops_palm",
    "model_flops_with_optimizer",
    "seconds",
    "joules",
    "dollars",
    "tokens",
)
MEASURED_AXES = ("seconds", "joules", "dollars")  # depend on the device; the others are counted
LISTED = 5  # folders named in one warning


@dataclass(frozen=True)
class Study:
    """A study's finished runs, ready to be compared.

    Attributes:
        scales: smallest model first; those where the baseline can be used.
        tuned: (scale, variant) -> its results; baseline included.
        axes: cost axes on which every result has a positive number.
        level: of intervals, such as 0.95.
        replicates: bootstrap replicates.
        warnings: sentences for the reader; estimators add theirs.
    """

    folder: Path
    name: str
    baseline: str
    runs: list[dict[str, Any]]
    scales: list[str]
    tuned: dict[tuple[str, str], TunedVariant]
    axes: list[str]
    level: float
    replicates: int
    seed: int
    warnings: list[str]

    def pair(self, scale: str, variant: str) -> tuple[TunedVariant, TunedVariant] | None:
        """Baseline and variant, both with only the seeds that both have; None, with a warning, where there are none."""
        baseline, tuned = self.tuned[scale, self.baseline], self.tuned[scale, variant]
        common = [seed for seed in baseline.seeds if seed in tuned.seeds]
        if not common:
            self.warnings.append(
                f"{tuned.title}: it shares no seed with {self.baseline}, so they cannot be paired; it is left out."
            )
            return None
        alone = len(set(baseline.seeds) | set(tuned.seeds)) - len(common)
        if alone:
            self.warnings.append(
                f"{tuned.title}: compared with {self.baseline} on the {len(common)} seed(s) that both have; "
                f"{alone} not used."
            )
        if len(common) == 1:
            self.warnings.append(
                f"{tuned.title}: one seed only, so its gains have no interval. Train two or more, better three."
            )
        return baseline.with_seeds(common), tuned.with_seeds(common)

    def weights(self, scale: str, seeds: int) -> NDArray[np.float64]:
        """(replicates, seeds) weights of bootstrap resamples, rows summing to 1.

        The same for every variant and axis of a scale, so that a replicate has the same seeds for variant and baseline;
        independent between scales.
        """
        generator = np.random.default_rng([self.seed, self.scales.index(scale)])
        return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=self.replicates) / seeds

    def standard_error(self, replicates: NDArray[np.float64], seeds: int) -> NDArray[np.float64]:
        """Of a mean over seeds, from bootstrap replicates (R, ...), whose own spread is sqrt((n-1)/n) too small."""
        return replicates.std(axis=0) * np.sqrt(seeds / (seeds - 1))

    def student(self, seeds: int) -> float:
        """How many standard errors an interval extends to either side."""
        return float(stats.t.ppf(0.5 + self.level / 2, seeds - 1))


def load_study(
    folder: Path,
    *,
    baseline: str,
    level: float,
    replicates: int,
    seed: int,
    planned: Collection[Path] | None = None,
) -> Study:
    """Reads a study's folder; of its runs only those `planned`, where that is given.

    Raises:
        UserError: nothing can be compared: no finished run, no usable baseline, or an option is out of range.
    """
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, such as 0.95; it is {level}")
    if replicates < 100:
        raise UserError(f"replicates must be at least 100; it is {replicates}")
    runs, warnings = _planned(folder, read_runs(folder), planned)
    results = read_results(folder, runs)
    if results.is_empty():
        raise UserError(f"{folder} has no finished trajectory: train the study first")
    if baseline not in results["variant"]:
        variants = ", ".join(sorted(set(results["variant"])))
        raise UserError(f"the baseline {baseline} has no finished trajectory in {folder}; there are {variants}")
    _check_same_data(folder, runs)
    warnings += _unfinished(runs)
    axes = _measured_axes(results, runs, warnings)
    tuned: dict[tuple[str, str], TunedVariant] = {}
    for (scale, variant), rows in results.group_by("scale", "variant", maintain_order=True):
        found = tune_variant(rows.to_dicts(), axes, warnings)
        if found is not None:
            tuned[str(scale), str(variant)] = found
    for scale in sorted({scale for scale, _ in tuned if (scale, baseline) not in tuned}):
        warnings.append(f"{scale}: the baseline {baseline} has no usable results there, so it has no gains.")
    scales = [scale for scale, variant in tuned if variant == baseline]
    if not scales:
        raise UserError(
            f"the baseline {baseline} cannot be used: {' '.join(w for w in warnings if w.startswith(baseline))}"
        )
    size = {run["scale"]: (run["parameters"] or {}).get("total", 0) for run in runs if run["variant"] == baseline}
    scales.sort(key=lambda scale: (size[scale], tuned[scale, baseline].budgets[0], scale))
    return Study(folder, runs[0]["study"], baseline, runs, scales, tuned, axes, level, replicates, seed, warnings)


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


def _measured_axes(results: pl.DataFrame, runs: list[dict[str, Any]], warnings: list[str]) -> list[str]:
    axes, unmeasured = [], []
    for axis in AXES:
        good = (results[axis].is_finite() & (results[axis] > 0)).fill_null(False)
        if good.all():
            axes.append(axis)
        elif results[axis].is_null().all():
            unmeasured.append(axis)
        else:
            warnings.append(
                f"The axis {axis} is left out: {(~good).sum()} of {len(good)} results have no number above 0 there."
            )
    if unmeasured:
        warnings.append(f"Not measured in these runs: {', '.join(unmeasured)}.")
    if not axes:
        raise UserError("no cost axis has a number above 0 in every result: nothing to measure gains in")
    devices = sorted({str(run["device"]) for run in runs if run["state"] == "done"})
    measured = [axis for axis in axes if axis in MEASURED_AXES]
    if len(devices) > 1 and measured:
        warnings.append(
            f"Gains in {', '.join(measured)} compare runs of different devices ({', '.join(devices)}) and say little."
        )
    return axes
