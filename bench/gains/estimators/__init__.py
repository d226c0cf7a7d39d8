"""Ways to turn results into gains over the baseline: each is the class `Estimator` of a file here.

An estimator is made from a `Study`, has a `name` (its file's), `caveats` (sentences printed with its numbers), `axes`
(what it can count compute in) and `scales` (where it can be used), and answers `estimate(scale, axis)`. `reads_curves`
says whether it needs losses in mid-schedule.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.errors import UserError
from bench.gains.resampling import LEVELS, Spread
from bench.gains.study import Pair, Study
from bench.gains.trend import Trend

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Point:
    """The CEG at one loss.

    Attributes:
        baseline_compute: what the baseline needs for `target_loss`, in the axis's unit.
        ceg: None where censored; then one of the bounds is set.
        lower_bound: the CEG is at least this: the variant's smallest budget already passed the loss.
        upper_bound: the CEG is below this: the variant's largest budget did not reach the loss.
        intervals: {level: interval} for `LEVELS`; None where unknown (one seed); a side that the data leave open is
            None.
        p_value: two-sided, of a CEG of 1; None where unknown.
        spread: of ln CEG; None where unknown.
        evaluation_error: of ln CEG, from the finite evaluation set: at most this, as variants are evaluated on the same
            tokens; None where unknown.
        extrapolated: whether the compute of either lies outside what was trained.
    """

    baseline_compute: float
    target_loss: float
    ceg: float | None
    lower_bound: float | None = None
    upper_bound: float | None = None
    intervals: dict[float, Interval] | None = None
    p_value: float | None = None
    spread: Spread | None = None
    evaluation_error: float | None = None
    extrapolated: bool = False


@dataclass(frozen=True)
class Gain:
    """One variant's gain.

    Attributes:
        points: ascending in the baseline's compute; the last is the headline.
        trend: how the gain moves with compute; None where that cannot be said.
        exponent: gamma of the baseline's frontier, by which noise in a loss becomes more noise in a gain as compute
            grows.
    """

    pair: Pair
    points: list[Point]
    trend: Trend | None = None
    exponent: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What an estimator found at one scale on one axis: gains by variant, and laws as gains.json has them."""

    gains: dict[str, Gain] = field(default_factory=dict)
    fits: list[dict[str, Any]] = field(default_factory=list)


class GainEstimator(Protocol):
    name: str
    caveats: tuple[str, ...]
    reads_curves: bool
    axes: list[str]
    scales: list[str]

    def __init__(self, study: Study) -> None: ...

    def estimate(self, scale: str, axis: str) -> Estimate: ...


def find_estimator(name: str) -> type[GainEstimator]:
    """The estimator in the file of that name here.

    Raises:
        UserError: there is none; lists those there are.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        raise UserError(f"estimator={name} is unknown: choose one of {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}").Estimator


def ratio_intervals(log_ratio: float, spread: Spread) -> dict[float, Interval]:
    """Student intervals of a ratio, symmetric in its logarithm, at each level; open above where no float is so high."""
    intervals = {}
    for level in LEVELS:
        margin = spread.margin(level)
        with np.errstate(over="ignore"):
            low, high = np.exp(log_ratio - margin), np.exp(log_ratio + margin)
        intervals[level] = (float(low), float(high) if np.isfinite(high) else None)
    return intervals


def evaluation_error(pair: Pair, slope: NDArray[np.float64] | float) -> float | None:
    """Of ln CEG where the loss falls by `slope` per unit of ln C: from the largest errors of both variants."""
    errors = [tuned.loss_errors.max() for tuned in (pair.baseline, pair.variant)]
    return float(np.hypot(*errors) / np.abs(slope)) if np.isfinite(errors).all() and slope else None
