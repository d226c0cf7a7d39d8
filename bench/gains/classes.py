"""The class of an innovation: whether it gains at the smallest scale, and whether its gain grows with compute."""

from typing import Any

import numpy as np

from bench.gains.estimators import Point
from bench.gains.study import Study

INVARIANT = 0.1  # |slope| up to which a gain counts as scale-invariant: 26 % per tenfold compute
STEP_ROUNDING = 0.01  # budgets end on whole steps, so that equal budgets differ by less than this


def side_of_one(point: Point) -> int:
    """1 where the whole interval lies above a CEG of 1, -1 where it lies below, 0 where neither can be said.

    An end may be a bound. A CEG is below its upper bound by definition, so a bound of 1 is enough, and since budgets
    end on whole steps it may be off by 1 %. A lower bound must exceed 1 like any other end.
    """
    low, high = point.interval or (None, None)
    if low is not None and low > 1:
        return 1
    limit = 1 + STEP_ROUNDING if high == point.upper_bound else 1
    return -1 if high is not None and high < limit else 0


def sign(point: Point | None, scale: str) -> dict[str, Any]:
    """The paper's test of compute-independence: is the CEG above 1 at the smallest scale?

    "independent" when it is, "dependent" when it is below, "inconclusive" when the interval does not say.
    """
    verdict = {1: "independent", 0: "inconclusive", -1: "dependent"}[0 if point is None else side_of_one(point)]
    interval = None if point is None or point.interval is None else list(point.interval)
    return {"verdict": verdict, "interval": interval, "scale": scale}


def slope(points: dict[str, list[Point]], study: Study, seeds: int) -> dict[str, Any]:
    """d ln CEG / d ln C, C the variant's compute, over the uncensored points {scale: points} of all scales.

    From a straight line through ln C_variant against ln C_baseline, whose slope b is gamma_baseline / gamma_variant for
    power laws with equal asymptotes: the result is 1 / b - 1. The interval is b's t-interval over seeds (resampled
    within each scale, independently between scales), carried over.

    Args:
        seeds: the smallest number of seeds behind any of the points.
    """
    used = [point for curve in points.values() for point in curve if point.ceg is not None]
    log_baseline = np.log([point.baseline_compute for point in used])
    nothing = {"verdict": "inconclusive", "value": None, "interval": None}
    if len(set(log_baseline)) < 2:
        return nothing
    centred = log_baseline - log_baseline.mean()
    line = centred / (centred**2).sum()
    log_ceg = np.log([point.ceg for point in used if point.ceg is not None])
    # ln C_variant = ln C_baseline - ln CEG.
    b = 1 - float(line @ log_ceg)
    if b <= 0:
        return nothing
    value = 1 / b - 1
    deviations = [point.deviations for point in used if point.deviations is not None]
    if seeds < 2 or len(deviations) < len(used):
        return {**nothing, "value": value}
    error = study.standard_error(np.stack(deviations, axis=1) @ line, seeds)
    margin = study.student(seeds) * float(error)
    low, high = 1 / (b + margin) - 1, 1 / (b - margin) - 1 if b > margin else None
    return {"verdict": slope_verdict(low, high), "value": value, "interval": [low, high]}


def slope_verdict(low: float, high: float | None) -> str:
    """What an interval of the slope (high None: open) says about growth with compute."""
    if high is not None and low >= -INVARIANT and high <= INVARIANT:
        return "scale-invariant"
    if low > 0:
        return "compute-dependent"
    if high is not None and high < 0:
        return "fading"
    return "inconclusive"
