"""The class of an innovation: whether it gains at the smallest scale, and whether its gain grows with compute.

Each is a test for every innovation, so each family of p-values is adjusted by Holm's method: among all innovations, the
chance of one false verdict is that of one test.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gains.estimators import Gain, Interval, Point
from bench.gains.resampling import LEVELS, SIGNIFICANT, Spread, holm
from bench.gains.trend import slope_of

INVARIANT = 0.1  # |slope| up to which a gain counts as scale-invariant: 26 % per tenfold compute


def side_of_one(point: Point) -> int:
    """1 where a CEG of 1 is rejected upwards, -1 where downwards, 0 where neither, each at 5 %."""
    if point.p_value is None or point.p_value >= SIGNIFICANT:
        return 0
    return _direction(point)


def _direction(point: Point) -> int:
    """Which side of 1 a point lies on, bounds included: an upper bound of 1 and a lower one are both a side."""
    if point.ceg is not None:
        return 1 if point.ceg > 1 else -1
    return 1 if point.lower_bound is not None else -1


def classify(smallest: Mapping[str, Gain], last: Mapping[str, Gain]) -> list[dict[str, Any]]:
    """Sign and slope of every innovation.

    Args:
        smallest: variant -> its gain at the smallest scale where it has one.
        last: variant -> its gain at the last scale, all of them pooled, where it has one.

    Returns:
        The `classes` of gains.json, without `axis`.
    """
    variants = list(smallest)
    signs = _signs([smallest[variant] for variant in variants])
    slopes = _slopes([last[variant] for variant in variants])
    return [
        {"variant": variant, "sign": sign, "slope": slope}
        for variant, sign, slope in zip(variants, signs, slopes, strict=True)
    ]


def _signs(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """The paper's test of compute-independence: is the CEG above 1 at the smallest scale?

    "independent" when it is, "dependent" when it is below, "inconclusive" when the test does not say.
    """
    points = [gain.points[-1] for gain in gains]
    found = []
    for gain, point, p_adjusted in zip(gains, points, holm([point.p_value for point in points]), strict=True):
        clear = p_adjusted is not None and p_adjusted < SIGNIFICANT
        found.append(
            {
                "verdict": {1: "independent", -1: "dependent"}[_direction(point)] if clear else "inconclusive",
                **interval_entries(point.intervals),
                "p_value": point.p_value,
                "p_adjusted": p_adjusted,
                "scale": gain.pair.variant.scale,
            }
        )
    return found


def _slopes(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """d ln CEG / d ln C, C the variant's compute: zero is the hypothesis that gamma_variant = gamma_baseline.

    "compute-dependent" where zero is rejected upwards, "fading" where downwards; else "scale-invariant" where slopes of
    `INVARIANT` and more, either way, are rejected (two one-sided tests), else "inconclusive".
    """
    known = [(gain.trend, None if gain.trend is None else gain.trend.gradient_spread) for gain in gains]
    p_values = [None if spread is None else float(spread.p_value(trend.gradient)) for trend, spread in known]
    differs = holm(p_values)
    equal = holm([None if spread is None else _equivalence(trend.gradient, spread) for trend, spread in known])
    found = []
    for gain, (trend, spread), p_value, p_differs, p_equal in zip(gains, known, p_values, differs, equal, strict=True):
        verdict = "inconclusive"
        if p_differs is not None and p_differs < SIGNIFICANT:
            verdict = "compute-dependent" if trend.gradient > 0 else "fading"
        elif p_equal is not None and p_equal < SIGNIFICANT:
            verdict = "scale-invariant"
        intervals = None if spread is None else {level: _interval(trend.gradient, spread, level) for level in LEVELS}
        found.append(
            {
                "verdict": verdict,
                "value": None if trend is None else slope_of(trend.gradient),
                **interval_entries(intervals),
                "p_value": p_value,
                "p_adjusted": p_differs,
                "scale": gain.pair.variant.scale,
            }
        )
    return found


def _equivalence(gradient: float, spread: Spread) -> float:
    """The larger p-value of two one-sided tests that the slope lies beyond `INVARIANT` above or below."""
    below, above = (edge / (1 + edge) for edge in (-INVARIANT, INVARIANT))
    return float(max(spread.tail(gradient - below), spread.tail(above - gradient)))


def _interval(gradient: float, spread: Spread, level: float) -> Interval:
    """Of the slope, carried over from the gradient; a side where the slope is infinite is None."""
    margin = float(spread.margin(level))
    return slope_of(gradient - margin), slope_of(gradient + margin)


def interval_entries(intervals: Mapping[float, Interval] | None) -> dict[str, Any]:
    """The entries `interval` and `interval_90` of gains.json."""
    names = ("interval", "interval_90")
    return {
        name: None if intervals is None else list(intervals[level]) for name, level in zip(names, LEVELS, strict=True)
    }
