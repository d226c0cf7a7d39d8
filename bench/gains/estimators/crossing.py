"""CEG where the variant's frontier crosses the baseline's loss, between trained budgets and never beyond them."""

import numpy as np
from numpy.typing import NDArray

from bench.gains.estimators import Estimate, Gain, Interval, Point, evaluation_error
from bench.gains.fitting import minimise
from bench.gains.frontier import BEFORE_FIRST, INSIDE, NOT_REACHED, Frontier
from bench.gains.laws import Observations, PowerLaws
from bench.gains.resampling import LEVELS, Resampling, Spread
from bench.gains.study import ALL_SCALES, Pair, Study
from bench.gains.trend import AT_LEAST, AT_MOST, EXACT, Trend, censored_line
from bench.gains.tuning import STEP_ROUNDING, TunedVariant

HEADROOM = 0.05  # the asymptote stays below the lowest loss by this share of the range of losses
LEAST_SQUARES = 1.0  # nats: no residual is as large, so that Huber's loss is the square
REACH = np.log(2)  # how far outside what was trained the end of a value's interval may lie, in ln C
NO_ERROR = 0.01  # of ln CEG about its trend, where seeds do not tell


class Estimator:
    """CEG = C_baseline(L) / C_variant(L) on seed-averaged frontiers, at each loss L that a baseline budget reached.

    The last point, at the loss of the baseline's largest budget, is the gain. Further losses may be asked for.

    The interval inverts a t-test on the loss: it holds every CEG at which the variant's loss is within t standard
    errors of the baseline's. The standard error is that of the difference in loss at the crossing (at the nearest
    budget where censored), from a bootstrap over seeds. A side that leaves the measured range is open, but for the
    ends of a value's interval close to it, which lie on the tangent.
    """

    name = "crossing"
    reads_curves = False
    caveats = (
        "A gain is read where both variants reached the loss with a finished schedule; otherwise it is only bounded. "
        "An interval may end outside what was trained, on the tangent there, by up to a factor of 2.",
        "Intervals are about seeds (Student's t on seed pairs). They leave out the choice of learning rates and the "
        "finite evaluation set, and with two seeds they are wide: at 95 % t is 12.7.",
    )

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axes = study.axes
        self.scales = study.scales
        self._shapes: dict[tuple[str, str], tuple[float, float]] = {}

    def estimate(self, scale: str, axis: str) -> Estimate:
        pairs = self.study.comparisons(scale, axis)
        if not pairs:
            return Estimate()
        if scale == ALL_SCALES:
            self.study.warnings.append(
                f"{ALL_SCALES}: crossing reads gains between budgets of models of different sizes; where these are far "
                "apart that moves gains by more than intervals say. Compare with estimator=loss_surface."
            )
        place = scale, self.study.alike(scale, axis)
        if place not in self._shapes:
            self._shapes[place] = shape([pairs[0].baseline, *(pair.variant for pair in pairs)], axis)
        return Estimate({pair.variant.variant: self._gain(pair, axis, *self._shapes[place]) for pair in pairs})

    def _gain(self, pair: Pair, axis: str, asymptote: float, exponent: float) -> Gain:
        baseline, variant = (
            Frontier(np.log(tuned.costs[axis].mean(axis=0)), tuned.losses.mean(axis=0), asymptote)
            for tuned in (pair.baseline, pair.variant)
        )
        at, targets, budgets = self._targets(pair, baseline)
        position, side = variant.crossing(targets)
        log_ceg, slope = at - position, variant.slope(position)
        inside = (side == INSIDE) & (slope < 0)
        gaps = self._gaps(pair, axis, baseline, at, position - at) if pair.seeds > 1 else None
        intervals = [None] * len(at) if gaps is None else _intervals(variant, at, targets, side, gaps)
        p_values = [None] * len(at) if gaps is None else _p_values(variant, at, targets, side, gaps)
        # A gap in loss is a change of ln CEG along the tangent at the crossing.
        spread = None if gaps is None else Spread(gaps.deviations / np.where(inside, slope, -np.inf), gaps.freedom)
        computes = np.where(budgets < 0, np.exp(at), pair.baseline.costs[axis].mean(axis=0)[budgets])
        points = [
            Point(
                baseline_compute=float(computes[j]),
                target_loss=float(targets[j]),
                ceg=float(np.exp(log_ceg[j])) if side[j] == INSIDE else None,
                lower_bound=float(np.exp(log_ceg[j])) if side[j] == BEFORE_FIRST else None,
                upper_bound=float(np.exp(log_ceg[j])) if side[j] == NOT_REACHED else None,
                intervals=intervals[j],
                p_value=p_values[j],
                spread=None if spread is None or not inside[j] else spread.at(j),
                evaluation_error=evaluation_error(pair, float(slope[j])) if inside[j] else None,
            )
            for j in range(len(at))
        ]
        kinds = np.select([side == NOT_REACHED, side == BEFORE_FIRST], [AT_MOST, AT_LEAST], EXACT).astype(np.int8)
        trained = np.flatnonzero(budgets >= 0)  # what lies between budgets adds nothing to the trend
        scales = [pair.baseline.scales[budget] for budget in budgets[trained]]
        own = None if spread is None else spread.at(trained)
        trend = _trend(at[trained], log_ceg[trained], kinds[trained], own, self.study.resampling, scales)
        return Gain(pair, points, trend, exponent)

    def _targets(
        self, pair: Pair, baseline: Frontier
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
        """Log computes of the baseline (J,), ascending, the losses there (J,), and which budget each is, or -1.

        At every budget where the baseline improved, and at each loss that was asked for and lies between them.
        """
        knots = np.flatnonzero(np.diff(baseline.losses, prepend=np.inf) < 0)
        asked = np.array([loss for loss in self.study.targets if loss not in baseline.losses])
        at, side = baseline.crossing(asked)
        self.study.warn_of_targets(pair.baseline, asked[side != INSIDE])
        found = np.append(baseline.x[knots], at[side == INSIDE])
        losses = np.append(baseline.losses[knots], asked[side == INSIDE])
        budgets = np.append(knots, np.full((side == INSIDE).sum(), -1))
        order = np.argsort(found)
        return found[order], losses[order], budgets[order]

    def _gaps(
        self, pair: Pair, axis: str, baseline: Frontier, at: NDArray[np.float64], offset: NDArray[np.float64]
    ) -> Spread:
        """Of the variant's loss less the baseline's, where these spend `at` + `offset` and `at` (J,), logarithms.

        Losses move with the replicate, and so does compute where it is measured.
        """
        moved = [
            Frontier(
                np.log(self.study.resample(tuned, tuned.costs[axis])),
                self.study.resample(tuned, tuned.losses),
                baseline.asymptote,
            )
            for tuned in (pair.baseline, pair.variant)
        ]
        between = np.stack([np.interp(at, baseline.x, knot) for knot in np.eye(len(baseline.x))])
        moved_at = at + (moved[0].x - baseline.x) @ between
        losses = [moved[0].loss(moved_at), moved[1].loss(moved_at + offset)]
        return pair.spread(*(loss - loss.mean(axis=0) for loss in losses))


def shape(variants: list[TunedVariant], axis: str) -> tuple[float, float]:
    """An asymptote for the frontiers' shape between budgets, and the baseline's exponent, from one power law for each.

    Three budgets or more; with fewer the asymptote is 0.
    """
    shared = min(len(tuned.budgets) for tuned in variants) < 3
    laws = PowerLaws(Observations.gather(variants, axis), shared=shared)
    fits = minimise(laws.design, laws.log_losses, laws.starts(), delta=LEAST_SQUARES)
    best = fits.parameters[np.argmin(np.where(fits.converged, fits.objective, np.inf))]
    everything = np.concatenate([tuned.losses.ravel() for tuned in variants])
    lowest = everything.min()
    log_asymptote, _, exponents = laws.split(best)
    asymptote = float(min(np.exp(log_asymptote), lowest - HEADROOM * (everything.max() - lowest)))
    return max(asymptote, 0.0), float(max(exponents[0], 0.0))


def _intervals(
    frontier: Frontier,
    log_compute: NDArray[np.float64],
    targets: NDArray[np.float64],
    side: NDArray[np.int8],
    gaps: Spread,
) -> list[dict[float, Interval] | None]:
    """CEGs at which the variant's loss is within t standard errors of the targets; all arrays (knots,)."""
    found: list[dict[float, Interval] | None] = [{} for _ in targets]
    for level in LEVELS:
        margins = gaps.margin(level)
        low, high = (
            _end(frontier, log_compute, targets + sign * margins, open_side, side == INSIDE)
            for sign, open_side in ((-1, NOT_REACHED), (1, BEFORE_FIRST))
        )
        for j, intervals in enumerate(found):
            intervals[level] = low[j], high[j]
    return found


def _end(
    frontier: Frontier,
    log_compute: NDArray[np.float64],
    losses: NDArray[np.float64],
    open_side: int,
    inside: NDArray[np.bool_],
) -> list[float | None]:
    """CEGs at `losses`; None where those lie outside what was trained on the open side.

    Of a gain that is a value (`inside`) an end may lie up to `REACH` outside, on the frontier's tangent.
    """
    at, side = frontier.crossing(losses)
    beyond = frontier.beyond(losses)
    near = inside & (np.abs(beyond - at) <= REACH)
    position = np.where((side == open_side) & near, beyond, at)
    known = (side != open_side) | near
    return [float(np.exp(log_compute[j] - position[j])) if known[j] else None for j in range(len(losses))]


def _p_values(
    frontier: Frontier,
    log_compute: NDArray[np.float64],
    targets: NDArray[np.float64],
    side: NDArray[np.int8],
    gaps: Spread,
) -> list[float | None]:
    """Two-sided, that the variant needs as much compute as the baseline; None where nothing trained says so.

    The interval excludes 1 where this is below 1 less its level: both compare the same loss with the same error.
    Where the baseline's compute lies outside what was trained of the variant, the nearest there stands for it: losses
    fall with compute, so the true p-value is lower still, unless the loss lies on the same side.
    """
    first, last = frontier.x[0], frontier.x[-1]
    reach = np.where(side == INSIDE, REACH, 0.0)
    distance = frontier.loss(np.clip(log_compute, first - reach, last + reach)) - targets
    unknown = ((side == NOT_REACHED) & (log_compute > last + STEP_ROUNDING)) | (
        (side == BEFORE_FIRST) & (log_compute < first - STEP_ROUNDING)
    )
    return [None if out else float(p) for p, out in zip(gaps.p_value(distance), unknown, strict=True)]


def _trend(
    log_compute: NDArray[np.float64],
    log_ceg: NDArray[np.float64],
    kinds: NDArray[np.int8],
    spread: Spread | None,
    resampling: Resampling,
    scales: list[str],
) -> Trend | None:
    """A line through points and bounds, as they move with seeds and scales; None with fewer than two values."""
    exact = kinds == EXACT
    if exact.sum() < 2:
        return None
    centre = float(log_compute.mean())
    x = log_compute - centre
    errors = None if spread is None else spread.error[exact]
    sigma = NO_ERROR if errors is None else float(max(np.sqrt((errors**2).mean()), 1e-6))
    intercept, gradient = censored_line(x, log_ceg, kinds, sigma)
    if spread is None:
        return Trend(centre, float(intercept), float(gradient), None)
    values = log_ceg + np.where(exact, spread.deviations, 0.0)
    moved = censored_line(x, values, kinds, sigma, resampling.of_scales(scales))
    freedom = np.broadcast_to(spread.freedom, x.shape)[exact].min()
    return Trend(centre, float(intercept), float(gradient), Spread(moved - [intercept, gradient], freedom))
