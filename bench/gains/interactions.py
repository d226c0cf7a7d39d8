"""What innovations are worth together: joint gains against products of single ones, and each one's share of them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np

from bench.gains.classes import interval_entries
from bench.gains.estimators import Gain, ratio_intervals
from bench.gains.resampling import SIGNIFICANT, Spread

Innovations = frozenset[str]


@dataclass(frozen=True)
class LogGain:
    """ln CEG of a variant, or a weighted sum of such.

    Attributes:
        low, high: what it is known to lie between; equal where it is known.
        spread: of it; None where unknown.
    """

    low: float
    high: float
    spread: Spread | None

    @classmethod
    def of(cls, gain: Gain) -> "LogGain":
        """The headline of a variant."""
        point = gain.points[-1]
        if point.ceg is not None:
            return cls(float(np.log(point.ceg)), float(np.log(point.ceg)), point.spread)
        low = -np.inf if point.lower_bound is None else float(np.log(point.lower_bound))
        high = np.inf if point.upper_bound is None else float(np.log(point.upper_bound))
        return cls(low, high, None)

    @classmethod
    def sum(cls, terms: Sequence[tuple[float, "LogGain"]]) -> "LogGain":
        """sum of weight * gain; where one is only bounded, so is the sum."""
        ends = [sorted((weight * gain.low, weight * gain.high)) for weight, gain in terms]
        low, high = (sum(end) for end in zip(*ends, strict=True))
        spreads = [gain.spread for _, gain in terms]
        if low != high or any(spread is None for spread in spreads):
            return cls(low, high, None)
        deviations = sum(weight * gain.spread.deviations for weight, gain in terms)
        return cls(low, high, Spread(deviations, min(float(spread.freedom) for spread in spreads)))

    def entries(self, name: str) -> dict[str, Any]:
        """Value `name` or bounds, intervals and p-value, as gains.json has them."""
        exact = self.low == self.high
        return {
            name: float(np.exp(self.low)) if exact else None,
            "lower_bound": float(np.exp(self.low)) if not exact and np.isfinite(self.low) else None,
            "upper_bound": float(np.exp(self.high)) if not exact and np.isfinite(self.high) else None,
            **interval_entries(None if self.spread is None else ratio_intervals(self.low, self.spread)),
            "p_value": None if self.spread is None else float(self.spread.p_value(self.low)),
        }


def interactions(gains: Mapping[str, Gain]) -> list[dict[str, Any]]:
    """Every combination whose innovations were also trained one by one: its gain over the product of theirs.

    Args:
        gains: by variant, at one scale on one axis.

    Returns:
        Entries of gains.json's `interactions` without scale and axis.
    """
    known = _by_innovations(gains)
    found = []
    for added, (variant, joint) in known.items():
        singles = [known[one][1] for one in (frozenset({name}) for name in sorted(added)) if one in known]
        if len(added) < 2 or len(singles) < len(added):
            continue
        product = LogGain.sum([(1.0, single) for single in singles])
        entries = LogGain.sum([(1.0, joint), *((-1.0, single) for single in singles)]).entries("ratio")
        clear = entries["p_value"] is not None and entries["p_value"] < SIGNIFICANT
        found.append(
            {
                "variant": variant,
                "innovations": sorted(added),
                "joint": joint.entries("joint")["joint"],
                "product": product.entries("product")["product"],
                **entries,
                "verdict": ("more" if entries["ratio"] > 1 else "less") + " than the product"
                if clear
                else "inconclusive",
            }
        )
    return found


def contributions(gains: Mapping[str, Gain]) -> list[dict[str, Any]]:
    """The factor that each innovation contributes inside each combination.

    Where all its subsets were trained it is exp of the Shapley value of ln CEG: the mean over all orders of adding
    innovations of what this one adds (L. Shapley, A Value for n-Person Games, 1953), so that factors multiply to the
    joint gain. Otherwise it is what leaving it out loses, where the rest was trained.
    """
    known = _by_innovations(gains)
    found = []
    for added, (variant, joint) in known.items():
        if len(added) < 2:
            continue
        subsets = [frozenset(some) for size in range(1, len(added)) for some in itertools.combinations(added, size)]
        full = all(subset in known for subset in subsets)
        for innovation in sorted(added):
            rest = added - {innovation}
            if full:
                terms = _shapley(innovation, added)
                share = LogGain.sum([(weight, known[subset][1]) for subset, weight in terms.items()])
            elif rest in known:
                share = LogGain.sum([(1.0, joint), (-1.0, known[rest][1])])
            else:
                continue
            method = "shapley" if full else "leave_one_out"
            found.append({"variant": variant, "innovation": innovation, "method": method, **share.entries("ceg")})
    return found


def _shapley(innovation: str, added: Innovations) -> dict[Innovations, float]:
    """{subset: weight} of ln CEG; the empty set, whose ln CEG is 0, is left out."""
    count, weights = len(added), {}
    for size in range(count):
        share = factorial(size) * factorial(count - size - 1) / factorial(count)
        for others in itertools.combinations(added - {innovation}, size):
            weights[frozenset(others) | {innovation}] = share
            if others:
                weights[frozenset(others)] = -share
    return weights


def _by_innovations(gains: Mapping[str, Gain]) -> dict[Innovations, tuple[str, LogGain]]:
    """{innovations beyond the baseline's: (variant, ln CEG)}, of variants that have all the baseline's."""
    found: dict[Innovations, list[tuple[str, LogGain]]] = {}
    for variant, gain in gains.items():
        own, base = frozenset(gain.pair.variant.innovations), frozenset(gain.pair.baseline.innovations)
        if base < own:
            found.setdefault(own - base, []).append((variant, LogGain.of(gain)))
    return {added: variants[0] for added, variants in found.items() if len(variants) == 1}
