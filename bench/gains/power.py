"""How many seeds an interval of a wanted width needs, given the noise seen, and what they cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from bench.gains.estimators import Gain
from bench.gains.resampling import LEVELS

CAUTION = 0.8  # confidence of the upper limit of the noise
MOST_SEEDS = 1000


def seeds_needed(deviation: float, width: float, level: float = LEVELS[0]) -> int | None:
    """Fewest seeds n >= 2 at which a Student interval of ln CEG reaches no farther than ln(1 + width) to either side.

    Args:
        deviation: standard deviation of ln CEG between seeds.

    Returns:
        None where `MOST_SEEDS` are not enough.
    """
    seeds = np.arange(2, MOST_SEEDS + 1)
    reach = stats.t.ppf(0.5 + level / 2, seeds - 1) * deviation / np.sqrt(seeds)
    enough = reach <= np.log1p(width)
    return int(seeds[enough.argmax()]) if enough.any() else None


def power(
    gains: Mapping[str, Gain],
    scale: str,
    axis: str,
    width: float,
    costs: Mapping[str, float],
    trained: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Entries of gains.json's `power` for the variants at one scale, those whose noise is known.

    Args:
        costs: variant -> what a trajectory of it costs on `axis`, all its budgets included; the baseline as well.
        trained: variant -> its seeds; the baseline as well.
    """
    entries = []
    for variant, gain in gains.items():
        spread, seeds = gain.points[-1].spread, gain.pair.seeds
        if spread is None:
            continue
        deviation = float(spread.error) * np.sqrt(seeds)
        limit = deviation * np.sqrt(spread.freedom / stats.chi2.ppf(1 - CAUTION, spread.freedom))
        needed = seeds_needed(deviation, width)
        both = (variant, gain.pair.baseline.variant)
        extra = None if needed is None else sum(max(needed - trained[name], 0) * costs[name] for name in both)
        entries.append(
            {
                "scale": scale,
                "variant": variant,
                "axis": axis,
                "seeds": seeds,
                "seed_sd": deviation,
                "seeds_needed": needed,
                "seeds_cautious": seeds_needed(float(limit), width),
                "cost": extra,
            }
        )
    return entries
