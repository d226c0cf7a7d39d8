"""The estimator of Sanderson et al. 2025 (arXiv 2505.04075, results.ipynb), kept to compare with what was published."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bench.errors import UserError
from bench.gains.estimators import Point
from bench.gains.study import Study
from bench.gains.table import read_curves
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
        self.axes = ["steps", *study.axes]
        self.curves = read_curves(study.folder, study.runs)

    def estimate(self, baseline: TunedVariant, variant: TunedVariant, axis: str) -> list[Point]:
        """One point, or none where the axis was not measured at the evaluations.

        Raises:
            UserError: there are no evaluations in mid-schedule, or not at the same steps.
        """
        base_steps, base_losses, base_cost = self._curve(baseline, axis)
        steps, losses, cost = self._curve(variant, axis)
        both = min(len(steps), len(base_steps))
        if (steps[: both - 1] != base_steps[: both - 1]).any():
            raise UserError(
                f"{variant.title} and {baseline.variant} were evaluated at different steps: train both with the same "
                "evaluation.every"
            )
        if not (np.isfinite(base_cost).all() and np.isfinite(cost).all()):
            return []
        target, base_first, _ = _first_at_target(base_losses.mean(axis=0), None)
        _, first, reached = _first_at_target(losses.mean(axis=0), target)
        ratio = float(base_cost[base_first] / cost[first])
        interval, deviations = None, None
        if len(variant.seeds) > 1 and reached:
            weights = self.study.weights(variant.scale, len(variant.seeds))
            targets, base_firsts, _ = _first_at_target(weights @ base_losses, None)
            _, firsts, arrived = _first_at_target(weights @ losses, targets)
            deviations = np.log(base_cost[base_firsts] / cost[firsts]) - np.log(ratio)
            error = self.study.standard_error(deviations, len(variant.seeds))
            factor = np.exp(self.study.student(len(variant.seeds)) * error)
            open_below = (~arrived).mean() > (1 - self.study.level) / 2
            interval = (None if open_below else float(ratio / factor), float(ratio * factor))
        return [
            Point(
                baseline_compute=float(base_cost[base_first]),
                target_loss=float(target),
                ceg=ratio if reached else None,
                lower_bound=None,
                upper_bound=None if reached else ratio,
                interval=interval,
                deviations=deviations,
            )
        ]

    def _curve(
        self, tuned: TunedVariant, axis: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Steps (T,), losses (seeds, T) and mean costs (T,) on the path to the largest budget."""
        rows = self.curves.filter(
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
