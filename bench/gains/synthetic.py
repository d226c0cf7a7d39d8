"""Studies made up from power laws, so that their gains are known: what estimators are judged by (`calibration.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bench.config import BASELINE
from bench.gains.sources import Results
from bench.gains.sources.runs import CURVES, RESULTS

SCALE = "synthetic"
LR = 1e-3


@dataclass(frozen=True)
class PowerLawStudy:
    """V variants at one scale, L_v = E + R_v (C / C_1)^-gamma_v at K budgets C_1 ... C_K; the first is the baseline.

    Attributes:
        asymptote: E, nats.
        reducible: (V,) R, how far each lies above the asymptote at the smallest budget, nats.
        exponents: (V,) gamma.
        budgets: (K,) model FLOPs, ascending.
        seeds: of each variant, V times.
        noise: standard deviation of a loss between seeds, nats.
        shared: share of the noise's variance that a seed does to all its results alike, whatever the variant: common
            random numbers. Of the rest one half is a trajectory's at all its budgets, the other a result's alone.
    """

    asymptote: float
    reducible: NDArray[np.float64]
    exponents: NDArray[np.float64]
    budgets: NDArray[np.float64]
    seeds: Sequence[Sequence[int]]
    noise: float
    shared: float = 0.5

    @property
    def variants(self) -> list[str]:
        return [BASELINE, *(f"variant_{place}" for place in range(1, len(self.reducible)))]

    def losses(self) -> NDArray[np.float64]:
        """(V, K) without noise."""
        log_compute = np.log(self.budgets / self.budgets[0])
        return self.asymptote + self.reducible[:, None] * np.exp(-self.exponents[:, None] * log_compute)

    def log_gains(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """(V, J) ln CEG over the baseline at each loss (J,), none of them at or below the asymptote."""
        log_compute = np.log(self.reducible[:, None] / (losses - self.asymptote)) / self.exponents[:, None]
        return log_compute[0] - log_compute

    def noise_errors(self) -> NDArray[np.float64]:
        """(V,) standard error of ln CEG at the baseline's last loss, were both losses read at trained budgets.

        By the delta method: the standard error of the difference in loss over the slope of the variant's law there.
        What a seed does to all its results cancels where both have the same seeds.
        """
        last = self.losses()[0, -1] - self.asymptote
        left = np.array([1 - self.shared * (set(seeds) == set(self.seeds[0])) for seeds in self.seeds])
        counts = np.array([len(seeds) for seeds in self.seeds])
        return self.noise * np.sqrt(left * (1 / counts + 1 / counts[0])) / (self.exponents * last)

    def simulate(self, generator: np.random.Generator) -> Results:
        """The study as if it had been trained, counted in model FLOPs only."""
        row_of = {seed: row for row, seed in enumerate(sorted({seed for seeds in self.seeds for seed in seeds}))}
        shape = (len(row_of), len(self.reducible), len(self.budgets))
        alone = np.sqrt((1 - self.shared) / 2)
        of_seed = np.sqrt(self.shared) * generator.standard_normal((len(row_of), 1, 1))
        of_trajectory = alone * generator.standard_normal((*shape[:2], 1))
        losses = self.losses() + self.noise * (of_seed + of_trajectory + alone * generator.standard_normal(shape))
        rows = [
            {
                "study": "synthetic",
                "scale": SCALE,
                "variant": variant,
                "innovations": [] if variant == BASELINE else [variant],
                "seed": seed,
                "lr": LR,
                "run": f"{variant}/{seed}",
                "budget": budget,
                "step": step,
                "val_loss": losses[row_of[seed], place, step - 1],
                "model_flops": budget,
            }
            for place, (variant, seeds) in enumerate(zip(self.variants, self.seeds, strict=True))
            for seed in seeds
            for step, budget in enumerate(self.budgets, 1)
        ]
        unmeasured = {"model_flops_with_optimizer": pl.Float64}
        results, curves = ({**schema, **unmeasured} for schema in (RESULTS, CURVES))
        return Results("synthetic", pl.DataFrame(rows, schema=results), pl.DataFrame(schema=curves), [], [])
