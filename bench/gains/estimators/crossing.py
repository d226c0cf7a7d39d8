"""CEG where the variant's frontier crosses the baseline's loss, between trained budgets and never beyond them."""

import numpy as np
from numpy.typing import NDArray

from bench.gains.estimators import Point
from bench.gains.frontier import BEFORE_FIRST, INSIDE, NOT_REACHED, Frontier
from bench.gains.study import Study
from bench.gains.tuning import TunedVariant

Interval = tuple[float | None, float | None]


class Estimator:
    """CEG = C_baseline(L) / C_variant(L) on seed-averaged frontiers, at each loss L that a baseline budget reached.

    The last point, at the loss of the baseline's largest budget, is the gain.

    The interval inverts a t-test on the loss: it holds every CEG at which the variant's loss is within t_{n-1} standard
    errors of the baseline's. The standard error is that of the paired difference at the crossing (at the nearest budget
    where censored), from a bootstrap over the seeds that both have. A side that leaves the measured range is open.
    """

    name = "crossing"
    caveats = (
        "A gain is read where both variants reached the loss with a finished schedule; otherwise it is only bounded.",
        "Intervals are about seeds (Student's t on seed pairs). They leave out the choice of learning rates and the "
        "finite evaluation set, and with two seeds they are wide: at 95 % t is 12.7.",
    )

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axes = study.axes

    def estimate(self, baseline: TunedVariant, variant: TunedVariant, axis: str) -> list[Point]:
        """Points ascending in baseline compute, at the budgets where the baseline improved.

        Args:
            baseline, variant: with the same seeds.
            axis: where both cost more with more budget.
        """
        losses = np.minimum.accumulate(baseline.losses.mean(axis=0))
        knots = np.flatnonzero(np.diff(losses, prepend=np.inf) < 0)
        targets = losses[knots]
        compute = baseline.costs[axis].mean(axis=0)[knots]
        frontier = Frontier(np.log(variant.costs[axis].mean(axis=0)), variant.losses.mean(axis=0))
        position, side = frontier.crossing(targets)
        ceg = np.exp(np.log(compute) - position)
        seeds = len(variant.seeds)
        intervals: list[Interval | None] = [None] * len(knots)
        deviations: list[NDArray[np.float64] | None] = [None] * len(knots)
        if seeds > 1:
            gaps = self._gaps(baseline, variant, axis, knots, position - np.log(compute))
            margins = self.study.student(seeds) * self.study.standard_error(gaps, seeds)
            intervals = _intervals(frontier, np.log(compute), targets, margins)
            deviations = _deviations(frontier, position, side, gaps)
        return [
            Point(
                baseline_compute=float(compute[j]),
                target_loss=float(targets[j]),
                ceg=float(ceg[j]) if side[j] == INSIDE else None,
                lower_bound=float(ceg[j]) if side[j] == BEFORE_FIRST else None,
                upper_bound=float(ceg[j]) if side[j] == NOT_REACHED else None,
                interval=intervals[j],
                deviations=deviations[j],
            )
            for j in range(len(knots))
        ]

    def _gaps(
        self,
        baseline: TunedVariant,
        variant: TunedVariant,
        axis: str,
        knots: NDArray[np.intp],
        offset: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """(replicates, knots): the variant's loss less the baseline's, at the log ratio of computes `offset` (knots,).

        Both move with the replicate, and so does compute where it is measured.
        """
        weights = self.study.weights(variant.scale, len(variant.seeds))
        base_compute = np.log(weights @ baseline.costs[axis])[:, knots]
        base_loss = np.minimum.accumulate(weights @ baseline.losses, axis=-1)[:, knots]
        frontier = Frontier(np.log(weights @ variant.costs[axis]), weights @ variant.losses)
        return frontier.loss(base_compute + offset) - base_loss


def _intervals(
    frontier: Frontier,
    log_compute: NDArray[np.float64],
    targets: NDArray[np.float64],
    margins: NDArray[np.float64],
) -> list[Interval | None]:
    """CEGs at which the variant's loss is within `margins` of the targets; all arrays (knots,)."""
    low_at, low_side = frontier.crossing(targets - margins)
    high_at, high_side = frontier.crossing(targets + margins)
    low, high = np.exp(log_compute - low_at), np.exp(log_compute - high_at)
    return [
        (
            None if low_side[j] == NOT_REACHED else float(low[j]),
            None if high_side[j] == BEFORE_FIRST else float(high[j]),
        )
        for j in range(len(targets))
    ]


def _deviations(
    frontier: Frontier, position: NDArray[np.float64], side: NDArray[np.int8], gaps: NDArray[np.float64]
) -> list[NDArray[np.float64] | None]:
    """Gaps in loss as changes of ln CEG, along the tangent at the crossing; None where censored or level."""
    slope = frontier.slope(position)
    usable = (side == INSIDE) & (slope < 0)
    return [gaps[:, j] / slope[j] if usable[j] else None for j in range(len(position))]
