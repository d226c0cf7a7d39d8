"""The estimator of Sanderson et al. 2025 (arXiv 2505.04075, results.ipynb), kept to compare with what was published."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bench.errors import UserError
from bench.gains.estimators import Estimate, Gain, Point, ratio_intervals
from bench.gains.study import ALL_SCALES, Pair, Study
from bench.gains.tuning import TunedVariant

WINDOW = 8  # evaluations in the trailing mean


class Estimator:
    """First evaluation at which the smoothed loss is at or below the baseline's last smoothed loss; the ratio of costs.

    Losses are those evaluated in mid-schedule, every `evaluation.every` steps, on the path to the largest budget at the
    best learning rate; the smoothed loss is the mean of the last 8 evaluations, of fewer at the start. The cost on the
    axis `steps` is the evaluation's number, counted from 1; on other axes it is what was spent by then.

    The interval is CEG x exp(-+ t_{n-1} SE), SE the standard error of ln CEG from a bootstrap over seeds. A CEG below
    which more than (1 - level) / 2 of the replicates never arrive has an open lower side.
    """

    name = "steps_to_target"
    reads_curves = True
    caveats = (
        "steps_to_target reads losses in mid-schedule, so it compares different stages of the learning-rate schedule.",
        f"steps_to_target smooths over {WINDOW} evaluations, which delays every crossing, and does not interpolate: "
        "its ratios are fractions of two whole numbers of evaluations.",
        "steps_to_target aims at the baseline's last loss but takes the first crossing: where the baseline's loss rose "
        "again, most of the run is ignored.",
        "The axis steps ignores that a step may cost more or less FLOPs in one variant than in another.",
    )

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axes = [*study.axes, "steps"]
        self.scales = [scale for scale in study.scales if scale != ALL_SCALES]

    def estimate(self, scale: str, axis: str) -> Estimate:
        """One point a variant; variants that have none, for want of evaluations in mid-schedule, are left out.

        Raises:
            UserError: nothing was evaluated in mid-schedule, or not at the same steps.
        """
        pairs = [self.study.pair(scale, variant) for variant in self.study.variants(scale)]
        found = {pair.variant.variant: self._point(pair, axis) for pair in pairs}
        return Estimate(
            {variant: Gain(pair, [point]) for pair, (variant, point) in zip(pairs, found.items(), strict=True) if point}
        )

    def _point(self, pair: Pair, axis: str) -> Point | None:
        """None where the axis was not measured at the evaluations."""
        baseline, variant = pair.baseline, pair.variant
        base_steps, base_losses, base_cost = self._curve(baseline, axis)
        steps, losses, cost = self._curve(variant, axis)
        both = min(len(steps), len(base_steps))
        if (steps[: both - 1] != base_steps[: both - 1]).any():
            raise UserError(
                f"{variant.title} and {baseline.variant} were evaluated at different steps: train both with the same "
                "evaluation.every"
            )
        if not (np.isfinite(base_cost).all() and np.isfinite(cost).all()):
            self.study.warnings.append(f"{variant.title}: {self.name} finds no gain on the axis {axis}.")
            return None
        target, base_first, _ = _first_at_target(base_losses.mean(axis=0), None)
        _, first, reached = _first_at_target(losses.mean(axis=0), target)
        log_ratio = float(np.log(base_cost[base_first] / cost[first]))
        spread, intervals = None, None
        if pair.seeds > 1 and reached:
            resampling = self.study.resampling
            targets, base_firsts, _ = _first_at_target(
                resampling.of_seeds(pair.baseline.scale, baseline.seeds) @ base_losses, None
            )
            _, firsts, arrived = _first_at_target(
                resampling.of_seeds(pair.variant.scale, variant.seeds) @ losses, targets
            )
            spread = pair.spread(-np.log(base_cost[base_firsts]), -np.log(cost[firsts]))
            intervals = {
                level: (None if (~arrived).mean() > (1 - level) / 2 else low, high)
                for level, (low, high) in ratio_intervals(log_ratio, spread).items()
            }
        return Point(
            baseline_compute=float(base_cost[base_first]),
            target_loss=float(target),
            ceg=float(np.exp(log_ratio)) if reached else None,
            upper_bound=None if reached else float(np.exp(log_ratio)),
            intervals=intervals,
            p_value=None if spread is None else float(spread.p_value(log_ratio)),
            spread=spread,
        )

    def _curve(
        self, tuned: TunedVariant, axis: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Steps (T,), losses (seeds, T) and mean costs (T,) on the path to the largest budget."""
        rows = self.study.curves.filter(
            (pl.col("scale") == tuned.scale) & (pl.col("variant") == tuned.variant) & (pl.col("lr") == tuned.rates[-1])
        )
        paths = [_path(rows.filter(pl.col("seed") == seed), tuned.budgets[-1]) for seed in tuned.seeds]
        if any(path.is_empty() for path in paths):
            raise UserError(
                f"{tuned.title}: no loss was evaluated in mid-schedule, which steps_to_target needs; "
                "train with evaluation.every=500 or the like, or use estimator=crossing"
            )
        steps = paths[0]["step"].to_numpy()
        if any(path["step"].to_list() != steps.tolist() for path in paths):
            raise UserError(
                f"{tuned.title}: its seeds were evaluated at different steps: train them with one evaluation.every"
            )
        if axis == "steps":
            costs = np.arange(1.0, len(steps) + 1)
        else:
            costs = np.mean([path[axis].cast(pl.Float64).fill_null(np.nan).to_numpy() for path in paths], axis=0)
        return steps, np.array([path["val_loss"].to_numpy() for path in paths]), costs


def _path(rows: pl.DataFrame, budget: float) -> pl.DataFrame:
    """The evaluations on the way to a budget: its branch, and the trunk before it."""
    branch = rows.filter(pl.col("branch") == budget)
    trunk = rows.filter(pl.col("branch").is_null())
    if not branch.is_empty():
        trunk = trunk.filter(pl.col("step") < branch["step"].min())
    return pl.concat([trunk, branch]).sort("step")


def _first_at_target(
    losses: NDArray[np.float64], target: NDArray[np.float64] | float | None
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.bool_]]:
    """Target, first evaluation at or below it (the last where none is), and whether there is one; losses (..., T).

    A target of None is the last smoothed loss.
    """
    smooth = _trailing_mean(losses)
    target = smooth[..., -1] if target is None else np.asarray(target)
    at_target = smooth <= target[..., None]
    reached = at_target.any(axis=-1)
    first = np.where(reached, at_target.argmax(axis=-1), losses.shape[-1] - 1)
    return target, first, np.asarray(reached)


def _trailing_mean(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last WINDOW entries of (..., T), of all there are at the start."""
    return np.stack(
        [losses[..., max(0, t + 1 - WINDOW) : t + 1].mean(axis=-1) for t in range(losses.shape[-1])], axis=-1
    )
