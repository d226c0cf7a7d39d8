"""CEG from L(N, D), for studies that vary both the size of the model and the number of tokens."""

from typing import Any

import numpy as np

from bench.gains.estimators import Estimate, Gain, Point, ratio_intervals
from bench.gains.laws import FittedLaw, LossSurfaces, describe, finite_exp, fit_law, fit_sentences
from bench.gains.study import Pair, Study
from bench.gains.tuning import STEP_ROUNDING


class Estimator:
    """L = E + A_v / N^alpha + B_v / D^beta: E and exponents of all variants, A and B of each.

    Fitted by a Huber loss of ln L summed over results (Hoffmann et al. 2022, Besiroglu et al. 2024), with D the tokens
    and N = 6ND / 6D. At each compute C = 6ND the best split of it gives the frontier L = E + K_v C^-gamma, gamma =
    alpha beta / (alpha + beta), so that CEG = (K_baseline / K_v)^(1 / gamma) at every compute.

    Intervals are Student's, from refits to bootstrap replicates over scales where there are four or more, and seeds.
    """

    name = "loss_surface"
    reads_curves = False
    caveats = (
        "loss_surface counts compute as 6 N D and compares models of the size that is best for each compute, which "
        "need not have been trained.",
        "loss_surface gives all variants the same exponents, so its gains cannot depend on scale: use scaling_law to "
        "test that.",
    )

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axes = ["flops_6nd"] if {"flops_6nd", "tokens"} <= set(study.axes) else []
        self.scales = [scale for scale in study.scales if self.axes and self._varies(scale)]
        if not self.axes:
            study.warnings.append("loss_surface needs the number of parameters and of tokens of every result.")
        elif not self.scales:
            study.warnings.append("loss_surface needs models of several sizes, each trained as the baseline.")

    def _varies(self, scale: str) -> bool:
        """Whether the models of the baseline there differ in size by more than rounding."""
        costs = self.study.tuned[scale, self.study.baseline].costs
        sizes = costs["flops_6nd"] / costs["tokens"]
        return bool(sizes.max() > 1.01 * sizes.min())

    def estimate(self, scale: str, axis: str) -> Estimate:
        names = [self.study.baseline, *self.study.variants(scale)]
        tuned = [self.study.tuned[scale, name] for name in names]
        law = LossSurfaces(tuned)
        fit = fit_law(law, tuned, self.study)
        self.study.warnings.extend(fit_sentences(law, fit, scale))
        pairs = [self.study.pair(scale, name) for name in names[1:]]
        gains = {pair.variant.variant: self._gain(pair, place, law, fit, axis) for place, pair in enumerate(pairs, 1)}
        units = self.study.resampling.units(tuned[0].scales, len(tuned[0].seeds))
        return Estimate(gains, [{"scale": scale, "axis": axis, **_entry(law, fit, names, units)}])

    def _gain(self, pair: Pair, place: int, law: LossSurfaces, fit: FittedLaw, axis: str) -> Gain:
        """The gain of the variant at `place` among the law's, where 0 is the baseline."""
        (multipliers, gamma), (moved, moved_gamma) = law.frontier(fit.parameters), law.frontier(fit.replicates)
        log_ceg = float((multipliers[0] - multipliers[place]) / gamma)
        replicates = (moved[:, 0] - moved[:, place]) / moved_gamma
        spread = fit.spread_of_pair(pair, self.study.resampling, np.array(log_ceg), replicates)
        asymptote = float(np.exp(fit.parameters[0]))
        trained = np.log(pair.variant.costs[axis].mean(axis=0))
        middle, reach = (trained.max() + trained.min()) / 2, np.ptp(trained) / 2 + np.log1p(STEP_ROUNDING)
        points = [
            Point(
                baseline_compute=float(compute),
                target_loss=float(asymptote + np.exp(multipliers[0] - gamma * np.log(compute))),
                ceg=float(np.exp(log_ceg)),
                intervals=None if spread is None else ratio_intervals(log_ceg, spread),
                p_value=None if spread is None else float(spread.p_value(log_ceg)),
                spread=spread,
                extrapolated=bool(np.abs(np.log(compute) - log_ceg - middle) > reach),
            )
            for compute in np.sort(pair.baseline.best_for_cost(axis).costs[axis].mean(axis=0))
        ]
        return Gain(pair, points, exponent=float(gamma))


def _entry(law: LossSurfaces, fit: FittedLaw, names: list[str], units: int) -> dict[str, Any]:
    """The law as gains.json has it: A and B of the baseline among its parameters, and those of each variant."""
    natural = {
        "E": lambda parameters: np.exp(law.split(parameters)[0]),
        "A": lambda parameters: np.exp(law.split(parameters)[1][..., 0]),
        "B": lambda parameters: np.exp(law.split(parameters)[2][..., 0]),
        "alpha": lambda parameters: law.split(parameters)[3],
        "beta": lambda parameters: law.split(parameters)[4],
    }
    _, log_a, log_b, _, _ = law.split(fit.parameters)
    log_k, gamma = law.frontier(fit.parameters)
    variants = {
        name: {"A": finite_exp(a), "B": finite_exp(b), "K": finite_exp(k), "gamma": float(gamma)}
        for name, a, b, k in zip(names, log_a, log_b, log_k, strict=True)
    }
    return {**describe(law, fit, natural, units), "variants": variants, "pinned": []}
