"""Bootstrap replicates over scales and seeds, and the intervals and tests that their spread allows.

The bootstrap is Rubin's Bayesian one (The Bayesian Bootstrap, Ann. Statist. 9, 1981): a replicate gives each seed of
each scale an exponential weight, the same for every variant, cost axis and budget. So trajectories stay whole, variants
that share a seed are paired by it, those that do not are independent, and no replicate ever loses a seed.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVELS = (0.95, 0.90)
SIGNIFICANT = 0.05  # the level of every test
SCALES_TO_RESAMPLE = 4  # fewer say too little about how laws differ between scales


@dataclass(frozen=True)
class Spread:
    """How far estimates are off by chance.

    Attributes:
        deviations: (replicates, ...) of each estimate, inflated so that their standard deviation is its standard error.
        freedom: degrees of freedom of that standard error, a number or (...).
    """

    deviations: NDArray[np.float64]
    freedom: float | NDArray[np.float64]

    @property
    def error(self) -> NDArray[np.float64]:
        """(...) standard errors."""
        return self.deviations.std(axis=0)

    def at(self, place: int | NDArray[np.intp]) -> "Spread":
        """That of one or some of several estimates."""
        return Spread(self.deviations[:, place], np.broadcast_to(self.freedom, self.deviations.shape[1:])[place])

    def margin(self, level: float) -> NDArray[np.float64]:
        """(...) half the width of a Student interval."""
        return stats.t.ppf(0.5 + level / 2, self.freedom) * self.error

    def p_value(self, distance: ArrayLike) -> NDArray[np.float64]:
        """(...) two-sided, that an estimate is off by as much as `distance` (...)."""
        return 2 * self.tail(np.abs(distance))

    def tail(self, distance: ArrayLike) -> NDArray[np.float64]:
        """(...) one-sided probability that an estimate is too high by more than `distance` (...)."""
        distance, error = np.asarray(distance, float), self.error
        certain = np.copysign(np.inf, distance)
        ratio = np.divide(distance, error, out=np.where(distance == 0, 0.0, certain), where=error > 0)
        return stats.t.sf(ratio, self.freedom)


class Resampling:
    """Weights of seeds and scales in `replicates` bootstrap replicates; the same `seed` gives the same weights."""

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates = replicates
        self.seed = seed
        self._drawn: dict[str, NDArray[np.float64]] = {}

    def of_seeds(self, scale: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """(replicates, n) weights of seeds at a scale; rows sum to 1."""
        drawn = np.stack([self._draw(f"{scale} {seed}") for seed in seeds], axis=1)
        return drawn / drawn.sum(axis=1, keepdims=True)

    def of_scales(self, scales: Sequence[str]) -> NDArray[np.float64]:
        """(replicates, K) weights of columns at these scales, 1 on average; all 1 where the scales are too few."""
        names = list(dict.fromkeys(scales))
        if len(names) < SCALES_TO_RESAMPLE:
            return np.ones((self.replicates, len(scales)))
        drawn = np.stack([self._draw(name) for name in names], axis=1)
        drawn *= len(names) / drawn.sum(axis=1, keepdims=True)
        return drawn[:, [names.index(scale) for scale in scales]]

    def normal(self, key: str, columns: int) -> NDArray[np.float64]:
        """(replicates, columns) standard normal numbers, the same for the same `key`."""
        return self._generator(key).standard_normal((self.replicates, columns))

    def units(self, scales: Sequence[str], seeds: int) -> int:
        """How many independent things were resampled: scales where there are enough of them, else seeds."""
        return len(set(scales)) if len(set(scales)) >= SCALES_TO_RESAMPLE else seeds

    def _draw(self, key: str) -> NDArray[np.float64]:
        if key not in self._drawn:
            self._drawn[key] = self._generator(key).standard_exponential(self.replicates)
        return self._drawn[key]

    def _generator(self, key: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(key.encode())])


def inflation(units: int) -> float:
    """What turns the spread of replicates over `units` >= 2 seeds or scales into a standard error.

    Weights that are uniform on the simplex give a mean the variance s^2 (n - 1) / (n (n + 1)) instead of s^2 / n.
    """
    return float(np.sqrt((units + 1) / (units - 1)))


def welch(errors: Sequence[NDArray[np.float64]], freedoms: Sequence[float]) -> NDArray[np.float64]:
    """Degrees of freedom of a sum of independent estimates: Welch and Satterthwaite, from errors (...) of each."""
    total = sum(error**2 for error in errors)
    parts = sum(error**4 / freedom for error, freedom in zip(errors, freedoms, strict=True))
    return np.divide(total**2, parts, out=np.full(np.shape(total), float(min(freedoms))), where=np.asarray(parts) > 0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many there are: S. Holm, A simple sequentially rejective multiple test procedure,
    Scand. J. Statist. 6 (1979). None stays None and does not count."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted
