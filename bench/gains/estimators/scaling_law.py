"""CEG from power laws with one asymptote, fitted to all variants at once: the estimator that sees past the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gains.estimators import Estimate, Gain, Point, evaluation_error, ratio_intervals
from bench.gains.laws import (
    FittedLaw,
    Observations,
    PowerLaws,
    describe,
    finite_exp,
    fit_law,
    fit_pinned,
    fit_sentences,
)
from bench.gains.study import ALL_SCALES, Pair, Study
from bench.gains.trend import Trend
from bench.gains.tuning import STEP_ROUNDING, TunedVariant

PINNED = (0.0, 0.25, 0.5, 0.75, 0.9)  # asymptotes to try in place of the best, as fractions of the lowest loss
FEWEST_BUDGETS = 3
Pinned = dict[float, NDArray[np.float64]]  # E -> the best parameters with it
FARTHEST = 100.0  # a compute beyond the data by more than this factor is not told


class Estimator:
    """L = E + K_v C^-gamma_v: one E for all variants, K and gamma of each, by Huber's loss of ln L summed over budgets.

    Gains are read from the laws, at the baseline's budgets; the headline is at its largest. Beside these laws stand
    those with one gamma for all, whose gain is the same at every compute, and whether the gammas differ is the test of
    the trend: d ln CEG / d ln C = gamma_v / gamma_baseline - 1.

    Intervals are Student's, from refits to bootstrap replicates over seeds (and scales, where there are four or more).
    """

    name = "scaling_law"
    reads_curves = False
    caveats = (
        "scaling_law holds as far as power laws with one asymptote for all variants do: see how gains move where the "
        "asymptote is pinned elsewhere.",
        "Intervals are about seeds, and about the law where it visibly fails. They leave out the choice of learning "
        "rates and the finite evaluation set.",
    )

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axes = study.axes
        self.scales = study.scales
        self._fitted: dict[tuple[str, str], list[tuple[PowerLaws, FittedLaw, Pinned]]] = {}

    def estimate(self, scale: str, axis: str) -> Estimate:
        pairs = [pair for pair in self.study.comparisons(scale, axis) if self._has_enough(pair)]
        if not pairs:
            return Estimate()
        tuned = [self.study.tuned[scale, name] for name in (self.study.baseline, *(p.variant.variant for p in pairs))]
        if scale == ALL_SCALES:
            tuned = [variant.best_for_cost(axis) for variant in tuned]
        fits = self._fit(scale, axis, tuned)
        law, fit, _ = fits[1]
        exponents = law.split(fit.parameters)[2]
        gains = {}
        for place, pair in enumerate(pairs, 1):
            rising = next((tuned[which].title for which in (0, place) if not exponents[which] > 0), None)
            if rising is None:
                gains[pair.variant.variant] = self._gain(pair, place, law, fit, axis)
            else:
                self.study.warnings.append(
                    f"{rising}: its law does not fall with {axis}; no gain of {pair.variant.variant} there."
                )
        units = self.study.resampling.units(tuned[0].scales, min(pair.seeds for pair in pairs))
        return Estimate(gains, [_entry(scale, axis, *fit, tuned, units) for fit in fits])

    def _has_enough(self, pair: Pair) -> bool:
        for tuned in (pair.baseline, pair.variant):
            if len(tuned.budgets) < FEWEST_BUDGETS:
                self.study.warnings.append(
                    f"{tuned.title}: scaling_law needs {FEWEST_BUDGETS} budgets, to tell an asymptote from an "
                    f"exponent, and found {len(tuned.budgets)}; no gain of {pair.variant.variant}. Train more, or "
                    "use estimator=crossing."
                )
                return False
        return True

    def _fit(self, scale: str, axis: str, tuned: Sequence[TunedVariant]) -> list[tuple[PowerLaws, FittedLaw, Pinned]]:
        """The laws with one gamma and with one each; a fit serves all axes on which the curves have its shape."""
        seen, place = Observations.gather(tuned, axis), (scale, self.study.alike(scale, axis))
        if place not in self._fitted:
            self._fitted[place] = []
            for law in (PowerLaws(seen, shared=shared) for shared in (True, False)):
                fit, asymptotes = fit_law(law, tuned, self.study), np.array(PINNED) * np.exp(law.log_losses.min())
                pinned = {float(asymptote): fit_pinned(law, asymptote, fit.delta) for asymptote in asymptotes}
                self._fitted[place].append((law, fit, pinned))
                self.study.warnings.extend(fit_sentences(law, fit, f"{scale}, axis {axis}"))
        return [(law.centred_at(seen.centres), *rest) for law, *rest in self._fitted[place]]

    def _gain(self, pair: Pair, place: int, law: PowerLaws, fit: FittedLaw, axis: str) -> Gain:
        """The gain of the variant at `place` among the law's, where 0 is the baseline."""
        trained = pair.baseline.costs[axis].mean(axis=0)
        computes = np.unique(np.append(trained, self._computes_at_targets(pair, law, fit, trained)))
        line, moved = law.line(fit.parameters, place), law.line(fit.replicates, place)
        spread = fit.spread_of_pair(pair, self.study.resampling, line, moved)
        trend = Trend(float(law.observations.centres[0]), *map(float, line), spread)
        points = [self._point(pair, place, law, fit, trend, axis, compute) for compute in computes]
        return Gain(pair, points, trend, float(law.split(fit.parameters)[2][0]))

    def _computes_at_targets(
        self, pair: Pair, law: PowerLaws, fit: FittedLaw, trained: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What the baseline needs, by its law, for the losses asked for, without those outside what was trained."""
        log_asymptote, multipliers, exponents = law.split(fit.parameters)
        above = np.array(self.study.targets) - np.exp(log_asymptote)
        log_above = np.log(above, out=np.full(above.shape, -np.inf), where=above > 0)
        computes = np.exp(law.observations.centres[0] + (multipliers[0] - log_above) / exponents[0])
        inside = (trained.min() < computes) & (computes < trained.max())
        self.study.warn_of_targets(pair.baseline, np.array(self.study.targets)[~inside])
        return computes[inside]

    def _point(
        self, pair: Pair, place: int, law: PowerLaws, fit: FittedLaw, trend: Trend, axis: str, compute: float
    ) -> Point:
        """Where the baseline spends `compute`."""
        log_ceg, spread = trend.log_gain(np.log(compute)), trend.log_gain_spread(np.log(compute))
        log_asymptote, multipliers, exponents = law.split(fit.parameters)
        above = np.exp(multipliers[0] - exponents[0] * (np.log(compute) - law.observations.centres[0]))
        trained = pair.variant.costs[axis].mean(axis=0)
        needed, first, last = np.log(compute) - log_ceg, np.log(trained.min()), np.log(trained.max())
        beyond = max(first - needed, needed - last)
        told = beyond <= np.log(FARTHEST)
        return Point(
            baseline_compute=float(compute),
            target_loss=float(np.exp(log_asymptote) + above),
            ceg=float(np.exp(log_ceg)) if told else None,
            lower_bound=float(compute / trained.min()) if not told and needed < first else None,
            upper_bound=float(compute / trained.max()) if not told and needed > last else None,
            intervals=ratio_intervals(log_ceg, spread) if told and spread is not None else None,
            p_value=None if spread is None else float(spread.p_value(log_ceg)),
            spread=spread if told else None,
            evaluation_error=evaluation_error(pair, float(exponents[place] * above)),
            extrapolated=bool(beyond > np.log1p(STEP_ROUNDING)),
        )


def _entry(
    scale: str, axis: str, law: PowerLaws, fit: FittedLaw, pinned: Pinned, tuned: Sequence[TunedVariant], units: int
) -> dict[str, Any]:
    """The law as gains.json has it, with the gains at the baseline's largest budget where E is held elsewhere."""
    _, multipliers, exponents = law.split(fit.parameters)
    log_heights = multipliers + exponents * law.observations.centres
    variants = {
        variant.variant: {"K": finite_exp(log_height), "gamma": float(exponent)}
        for variant, log_height, exponent in zip(tuned, log_heights, exponents, strict=True)
    }
    natural = {"E": lambda parameters: np.exp(parameters[..., 0])}
    if law.shared:
        natural["gamma"] = lambda parameters: parameters[..., -1]
    largest = float(np.log(tuned[0].costs[axis].mean(axis=0)[-1]) - law.observations.centres[0])
    elsewhere = [
        {
            "E": asymptote,
            "gamma": float(law.split(parameters)[2][0]),
            "gains": {
                variant.variant: finite_exp(intercept + gradient * largest)
                for place, variant in enumerate(tuned[1:], 1)
                for intercept, gradient in [law.line(parameters, place).tolist()]
            },
        }
        for asymptote, parameters in pinned.items()
    ]
    described = describe(law, fit, natural, units)
    return {"scale": scale, "axis": axis, **described, "variants": variants, "pinned": elsewhere}
