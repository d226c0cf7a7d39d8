"""What estimators see of a study: every variant at its best rates, the axes that were measured, and who is compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bench.errors import UserError
from bench.gains.resampling import Resampling, Spread, inflation, welch
from bench.gains.sources import Results
from bench.gains.tuning import TunedVariant, pool, tune_variant
from bench.runs.folder import MEASURED

AXES = (
    "model_flops",
    "flops_6nd",
    "flops_6nd_head",
    "flops_palm",
    "model_flops_with_optimizer",
    "seconds",
    "joules",
    "dollars",
    "grams_co2e",
    "tokens",
)
UNMEASURED = "Not measured in these runs: "
LONGEST = 200  # characters of names in one sentence
ALL_SCALES = "all scales"  # the pseudo-scale at which the budgets of all scales are pooled


@dataclass(frozen=True)
class Pair:
    """The baseline and a variant as they are compared: on the seeds that both have, where these are two or more.

    Attributes:
        paired: whether their seeds are the same, so that what a seed does to both cancels.
    """

    baseline: TunedVariant
    variant: TunedVariant
    paired: bool

    @property
    def seeds(self) -> int:
        """How many seeds the interval rests on."""
        return min(len(self.baseline.seeds), len(self.variant.seeds))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of what rests on the seeds of both together."""
        counts = len(self.baseline.seeds), len(self.variant.seeds)
        return min(counts) - 1.0 if self.paired else sum(counts) - 2.0

    def spread(self, baseline: NDArray[np.float64], variant: NDArray[np.float64]) -> Spread:
        """Of a variant's value less the baseline's, from replicates (R, ...) of both about their estimates."""
        counts = [len(self.baseline.seeds), len(self.variant.seeds)]
        parts = [inflation(n) * values for n, values in zip(counts, (baseline, variant), strict=True)]
        freedoms = [n - 1.0 for n in counts]
        freedom = freedoms[0] if self.paired else welch([part.std(axis=0) for part in parts], freedoms)
        return Spread(parts[1] - parts[0], freedom)


@dataclass(frozen=True)
class Study:
    """Finished results, ready to be compared.

    Attributes:
        scales: smallest model first; those where the baseline has a curve; last `ALL_SCALES`, where there are several.
        tuned: (scale, variant) -> its results; baseline included.
        axes: cost axes on which every result has a positive number.
        curves: losses in mid-schedule, as in `Results`.
        targets: losses at which gains are wanted, besides those that the baseline's budgets reached.
        warnings: sentences for the reader; estimators add theirs.
    """

    name: str
    baseline: str
    runs: list[dict[str, Any]]
    curves: pl.DataFrame
    scales: list[str]
    tuned: dict[tuple[str, str], TunedVariant]
    axes: list[str]
    resampling: Resampling
    warnings: list[str]
    targets: Sequence[float] = ()
    _pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def variants(self, scale: str) -> list[str]:
        """Names of the variants at a scale, without the baseline."""
        return sorted(variant for found, variant in self.tuned if found == scale and variant != self.baseline)

    def pair(self, scale: str, variant: str) -> Pair:
        """Baseline and variant on the seeds that both have; all seeds of each where they share fewer than two."""
        if (scale, variant) not in self._pairs:
            self._pairs[scale, variant] = self._match(self.tuned[scale, self.baseline], self.tuned[scale, variant])
        return self._pairs[scale, variant]

    def _match(self, baseline: TunedVariant, tuned: TunedVariant) -> Pair:
        common = [seed for seed in baseline.seeds if seed in tuned.seeds]
        alone = len(set(baseline.seeds) | set(tuned.seeds)) - len(common)
        paired = len(common) > 1 or not alone
        if paired:
            baseline, tuned = baseline.with_seeds(common), tuned.with_seeds(common)
        pair = Pair(baseline, tuned, paired)
        if pair.seeds == 1:
            self.warnings.append(
                f"{tuned.title}: one seed only, so its gains have no interval. Train two or more, better three."
            )
        elif not paired:
            self.warnings.append(
                f"{tuned.title}: it shares fewer than two seeds with {self.baseline}, so they are compared as "
                "independent samples, with wider intervals. Train the same seeds."
            )
        elif alone:
            self.warnings.append(
                f"{tuned.title}: compared with {self.baseline} on the {len(common)} seeds that both have; "
                f"{alone} not used."
            )
        return pair

    def comparisons(self, scale: str, axis: str) -> list[Pair]:
        """The pairs that can be compared on a cost axis: both cost more with more budget.

        Pooled over scales, each comes with the budgets that are best for their cost on this axis.
        """
        found = []
        for variant in self.variants(scale):
            pair = self.pair(scale, variant)
            if scale == ALL_SCALES:
                best = [tuned.best_for_cost(axis) for tuned in (pair.baseline, pair.variant)]
                if min(len(tuned.budgets) for tuned in best) > 1:
                    found.append(Pair(*best, pair.paired))
                continue
            level = [t.title for t in (pair.baseline, pair.variant) if not t.rises_with_budget(axis)]
            if level:
                self.warnings.append(
                    f"{level[0]}: a larger budget does not cost more {axis}; no gains of {variant} on that axis."
                )
            else:
                found.append(pair)
        return found

    def warn_of_targets(self, baseline: TunedVariant, losses: Iterable[float]) -> None:
        """A sentence for each loss that was asked for and is not between those of the baseline's budgets."""
        for loss in losses:
            self.warnings.append(
                f"{baseline.title}: its budgets do not enclose the target loss {loss:g}, so no gain is read there."
            )

    def alike(self, scale: str, axis: str) -> str:
        """The first axis there on which every variant's costs are those of `axis` times a number of its own.

        What only asks for the shape of curves, such as an exponent, is the same on both.
        """
        found = [tuned for (where, _), tuned in self.tuned.items() if where == scale]
        for other in self.axes:
            ratios = [tuned.costs[axis] / tuned.costs[other] for tuned in found]
            if all(np.ptp(ratio) <= 1e-9 * ratio.max() for ratio in ratios):
                return other
        return axis

    def resample(self, tuned: TunedVariant, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(replicates, K) means over seeds of `values` (n, K) in each bootstrap replicate."""
        scales = np.array(tuned.scales)
        means = np.empty((self.resampling.replicates, len(scales)))
        for scale in dict.fromkeys(tuned.scales):
            columns = scales == scale
            means[:, columns] = self.resampling.of_seeds(scale, tuned.seeds) @ values[:, columns]
        return means


def load_study(results: Results, *, baseline: str, replicates: int, seed: int, targets: Sequence[float] = ()) -> Study:
    """Chooses rates and axes; the sentences of `results` and what is found here are the study's warnings.

    Raises:
        UserError: nothing can be compared: no finished result, no usable baseline, or an option is out of range.
    """
    if replicates < 100:
        raise UserError(f"replicates must be at least 100; it is {replicates}")
    table, warnings = results.results, list(results.warnings)
    if table.is_empty():
        raise UserError(f"{results.name} has no finished trajectory: train the study first")
    if baseline not in table["variant"]:
        variants = ", ".join(sorted(set(table["variant"])))
        found = f"there are {variants}." if len(variants) < LONGEST else f"there are {variants[:LONGEST]} and more."
        raise UserError(
            f"the baseline {baseline} has no finished trajectory in {results.name}; {found} {' '.join(warnings[:3])}"
        )
    axes = _measured_axes(table, results.runs, warnings)
    tuned: dict[tuple[str, str], TunedVariant] = {}
    for (scale, variant), rows in table.group_by("scale", "variant", maintain_order=True):
        if scale == ALL_SCALES:
            raise UserError(f'no scale may be called "{ALL_SCALES}": that is the name for all of them pooled')
        found = tune_variant(rows.to_dicts(), axes, warnings)
        if found is not None:
            tuned[str(scale), str(variant)] = found
    if not any(variant == baseline for _, variant in tuned):
        why = " ".join(warning for warning in warnings if warning.startswith(baseline))
        raise UserError(f"the baseline {baseline} cannot be used: {why}")
    _warn_of_twins(tuned.values(), warnings)
    scales = _by_size(tuned, results.runs)
    pooled = _pool_scales(tuned, scales, warnings)
    _drop_without_curve(tuned, pooled, baseline, warnings)
    scales = [scale for scale in scales if (scale, baseline) in tuned] + [ALL_SCALES] * bool(pooled)
    if not scales:
        raise UserError(f"the baseline {baseline} cannot be used: {' '.join(w for w in warnings if baseline in w)}")
    curves, runs, draws = results.curves, results.runs, Resampling(replicates, seed)
    return Study(results.name, baseline, runs, curves, scales, {**tuned, **pooled}, axes, draws, warnings, targets)


def _warn_of_twins(tuned: Iterable[TunedVariant], warnings: list[str]) -> None:
    names: dict[frozenset[str], set[str]] = {}
    for found in tuned:
        names.setdefault(frozenset(found.innovations), set()).add(found.variant)
    for twins in names.values():
        if len(twins) > 1:
            warnings.append(
                f"{' and '.join(sorted(twins))} are the same innovations: none of their combinations is told."
            )


def _by_size(tuned: dict[tuple[str, str], TunedVariant], runs: Iterable[dict[str, Any]]) -> list[str]:
    """The scales, smallest model first, then smallest budget."""
    size = {run["scale"]: (run["parameters"] or {}).get("total", 0) for run in runs}
    order = {}
    for (scale, _), found in tuned.items():
        parameters = size.get(scale, 0)
        if not parameters and {"flops_6nd", "tokens"} <= found.costs.keys():
            parameters = float((found.costs["flops_6nd"] / found.costs["tokens"]).mean()) / 6
        order[scale] = min(order.get(scale, (np.inf,)), (parameters, found.budgets[0], scale))
    return sorted(order, key=lambda scale: order[scale])


def _pool_scales(
    tuned: dict[tuple[str, str], TunedVariant], scales: list[str], warnings: list[str]
) -> dict[tuple[str, str], TunedVariant]:
    """Every variant that has results at two or more scales, at `ALL_SCALES`."""
    pooled = {}
    for variant in sorted({variant for _, variant in tuned}):
        parts = [tuned[scale, variant] for scale in scales if (scale, variant) in tuned]
        if len(parts) < 2:
            continue
        whole = pool(parts, ALL_SCALES)
        if whole is None:
            warnings.append(f"{variant}: its scales have no seed in common, so it is not pooled over scales.")
        else:
            pooled[ALL_SCALES, variant] = whole
    return pooled


def _drop_without_curve(
    tuned: dict[tuple[str, str], TunedVariant],
    pooled: dict[tuple[str, str], TunedVariant],
    baseline: str,
    warnings: list[str],
) -> None:
    """Takes out, with sentences, what has too few budgets to make a curve, and scales where the baseline has none."""
    if not any(variant == baseline for _, variant in pooled):
        pooled.clear()
    curves = {place for place, found in tuned.items() if len(found.budgets) > 1}
    for (scale, variant), found in list(tuned.items()):
        # With one budget a scale for everyone it is the scales together that make the curves.
        by_design = (scale, baseline) not in curves and (ALL_SCALES, variant) in pooled
        if (scale, variant) not in curves:
            del tuned[scale, variant]
            if not by_design:
                warnings.append(
                    f"{found.title}: results at 1 budget make no curve; it is left out. Train at least three."
                )
            continue
        if (scale, baseline) not in curves:
            del tuned[scale, variant]
            continue
        if len(found.budgets) == 2:
            warnings.append(
                f"{found.title}: only two budgets; the curve between them is taken to be the simplest. Train three."
            )
        mean = found.losses.mean(axis=0)
        if (np.diff(mean) > 0).any():
            rising = ", ".join(f"{budget:.3g}" for budget in found.budgets[1:][np.diff(mean) > 0])
            warnings.append(
                f"{found.title}: the loss is higher at budget {rising} than at the one before; the lowest so far is "
                "used there."
            )
    for scale in sorted({scale for scale, _ in curves if (scale, baseline) not in curves}):
        warnings.append(f"{scale}: the baseline {baseline} has no usable results there, so it has no gains.")


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
        warnings.append(f"{UNMEASURED}{', '.join(unmeasured)}.")
    if not axes:
        raise UserError("no cost axis has a number above 0 in every result: nothing to measure gains in")
    devices = sorted({str(run["device"]) for run in runs if run["state"] == "done"})
    measured = [axis for axis in axes if axis in MEASURED]
    if len(devices) > 1 and measured:
        warnings.append(
            f"Gains in {', '.join(measured)} compare runs of different devices ({', '.join(devices)}) and say little."
        )
    return axes
