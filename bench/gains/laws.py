"""The laws of loss, in the form that `fitting.py` wants, and their fits to results and to bootstrap replicates."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bench.gains.fitting import DELTA, Best, best_fit, log_law, minimise, refit
from bench.gains.resampling import LEVELS, SIGNIFICANT, Resampling, Spread, inflation
from bench.gains.study import Pair, Study
from bench.gains.tuning import TunedVariant

ASYMPTOTES = (0.05, 0.3, 0.5, 0.7, 0.85, 0.95)  # starts, as fractions of the lowest loss
EXPONENTS = (0.05, 0.1, 0.2, 0.4, 0.8)
# Huber's delta is Hoffmann's, but no less than this many standard errors of a mean loss. Below them a fit to a few
# budgets is a median, which jumps from one budget to the next as seeds are resampled, and intervals come out too wide.
ROBUST = 3.0
NEGLIGIBLE = 1e-4  # of ln L: a law that misses by less holds for any purpose
ENOUGH = 0.95  # of the replicates must converge for an interval to be trusted


class Law(Protocol):
    """A family of laws: its design (n, K, P) and starts (S, P) to search from; parameter 0 is ln E."""

    name: str
    design: NDArray[np.float64]
    log_losses: NDArray[np.float64]

    def starts(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Observations:
    """Mean losses of V variants on one axis, a row for each budget of each.

    Attributes:
        variant: (n,) int, 0 the baseline's.
        log_compute: (n,) less the centre of its variant.
        log_losses: (n,) ln of nats per token.
        centres: (V,) of ln C.
    """

    variant: NDArray[np.intp]
    log_compute: NDArray[np.float64]
    log_losses: NDArray[np.float64]
    centres: NDArray[np.float64]

    @classmethod
    def gather(cls, variants: Sequence[TunedVariant], axis: str) -> "Observations":
        computes = [np.log(tuned.costs[axis].mean(axis=0)) for tuned in variants]
        losses = np.concatenate([tuned.losses.mean(axis=0) for tuned in variants])
        centres = np.array([compute.mean() for compute in computes])
        x = np.concatenate([compute - centre for compute, centre in zip(computes, centres, strict=True)])
        variant = np.repeat(np.arange(len(variants)), [len(compute) for compute in computes])
        return cls(variant, x, np.log(losses), centres)


@dataclass(frozen=True)
class FittedLaw:
    """A law's best fit, and where it moves in bootstrap replicates.

    Attributes:
        delta: where Huber's loss turned linear, in nats of ln L.
        misfit: by how much it misses mean losses beyond what seeds explain, in nats of ln L.
        replicates: (R, P) parameters, those that converged.
        share: of the replicates that converged.
    """

    best: Best
    delta: float
    misfit: float
    replicates: NDArray[np.float64]
    share: float

    @property
    def parameters(self) -> NDArray[np.float64]:
        return self.best.parameters

    def spread(
        self,
        units: int,
        estimate: NDArray[np.float64],
        replicates: NDArray[np.float64],
        freedom: float | None = None,
    ) -> Spread | None:
        """Of an estimate (...) from these parameters and its replicates (R, ...); None where nothing was resampled.

        Args:
            units: how many seeds or scales were resampled.
            freedom: degrees of freedom, where they are not one less.
        """
        if units < 2 or not len(self.replicates) or not np.isfinite(replicates).all():
            return None
        return Spread(inflation(units) * (replicates - estimate), units - 1.0 if freedom is None else freedom)

    def spread_of_pair(
        self, pair: Pair, resampling: Resampling, estimate: NDArray[np.float64], replicates: NDArray[np.float64]
    ) -> Spread | None:
        """The same, of what compares the two of a pair."""
        units = resampling.units(pair.baseline.scales, pair.seeds)
        return self.spread(units, estimate, replicates, pair.freedom if units == pair.seeds else None)


def fit_law(law: Law, variants: Sequence[TunedVariant], study: Study) -> FittedLaw:
    """The best fit from all starts to the mean losses of `variants`, and refits to bootstrap replicates of them.

    Means are fitted, not single runs: what a seed does to all variants alike then moves their laws alike, and cancels
    in gains; Huber's loss of single runs would cut it off at each run differently. Where the law misses the means by
    more than seeds explain, replicates also move each mean by as much, at random: a law that does not hold then gets
    the intervals it deserves.
    """
    noise = noise_of_means(variants)
    delta = max(DELTA, ROBUST * noise)
    best = best_fit(law.design, law.log_losses, law.starts(), delta=delta)
    residuals = law.log_losses - log_law(law.design, best.parameters)
    misfit = excess(residuals, law.design.shape[-1], noise)
    losses = np.log(np.concatenate([study.resample(tuned, tuned.losses) for tuned in variants], axis=1))
    if misfit:
        losses += misfit * study.resampling.normal("misfit", losses.shape[1]) / _inflations(variants, study)
    weights = study.resampling.of_scales([scale for tuned in variants for scale in tuned.scales])
    moved = refit(law.design, losses, best.parameters, weights, delta=delta)
    return FittedLaw(best, delta, misfit, moved.parameters[moved.converged], float(moved.converged.mean()))


def _inflations(variants: Sequence[TunedVariant], study: Study) -> NDArray[np.float64]:
    """(n,) by how much deviations of each mean will be inflated; 1 where one seed has none."""
    counts = [study.resampling.units(tuned.scales, len(tuned.seeds)) for tuned in variants]
    factors = [inflation(units) if units > 1 else 1.0 for units in counts]
    return np.repeat(factors, [len(tuned.budgets) for tuned in variants])


def excess(residuals: NDArray[np.float64], parameters: int, noise: float) -> float:
    """By how much a law misses means beyond the `noise` of each, in ln L: 0 unless an F test at 5 % finds that it does.

    Args:
        residuals: (n,), of as many `parameters` fitted.
    """
    freedom = len(residuals) - parameters
    if freedom < 1 or not noise:
        return 0.0
    variance = (residuals**2).sum() / freedom
    # Seeds are so few that their variance is uncertain too; as many degrees of freedom as residuals have is cautious.
    beyond = stats.f.sf(variance / noise**2, freedom, len(residuals)) < SIGNIFICANT
    found = float(np.sqrt(variance - noise**2)) if beyond else 0.0
    return found if found > NEGLIGIBLE else 0.0


def noise_of_means(variants: Sequence[TunedVariant]) -> float:
    """Standard error of the mean ln L of a budget, pooled over those with two seeds or more; 0 where there are none."""
    several = [np.log(tuned.losses) for tuned in variants if len(tuned.seeds) > 1]
    variances = [losses.var(axis=0, ddof=1) / len(losses) for losses in several]
    return float(np.sqrt(np.concatenate(variances).mean())) if variances else 0.0


def fit_pinned(law: Law, asymptote: float, delta: float) -> NDArray[np.float64]:
    """(P,) parameters of the best fit with E held at `asymptote`, which may be 0."""
    starts = law.starts()[: len(EXPONENTS)]  # the exponents of one asymptote: others are not searched for
    starts[:, 0] = np.log(asymptote) if asymptote > 0 else -np.inf
    fits = minimise(law.design, law.log_losses, starts, fixed=np.arange(starts.shape[1]) == 0, delta=delta)
    return fits.parameters[np.argmin(fits.objective)]


def fit_sentences(law: Law, fit: FittedLaw, where: str) -> list[str]:
    """What a reader must know before trusting a fit."""
    sentences = []
    if not fit.best.converged:
        why = "did not converge" if fit.best.identified else "is not determined by so few results"
        sentences.append(f"{where}: the fit of {law.name} {why}; do not rely on it.")
    if fit.misfit:
        sentences.append(
            f"{where}: {law.name} misses mean losses by {fit.misfit:.2%} more than seeds explain, so it is not the law "
            "here; intervals are widened by as much. Trust estimator=crossing more."
        )
    if fit.share < ENOUGH:
        sentences.append(
            f"{where}: {fit.share:.0%} of the bootstrap replicates of {law.name} converged; intervals rest on those."
        )
    return sentences


def finite_exp(log_value: float) -> float | None:
    """exp, None where that is too large for a float: of a law that is not determined."""
    with np.errstate(over="ignore"):
        value = float(np.exp(log_value))
    return value if np.isfinite(value) else None


def describe(
    law: Law, fit: FittedLaw, natural: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]], units: int
) -> dict[str, Any]:
    """The law as gains.json has it, without scale, axis and variants.

    Args:
        natural: {name: function from parameters (..., P) to values (...)} of what is told of the law.
        units: how many independent things the replicates resampled.
    """
    values, intervals = {}, {}
    for name, of in natural.items():
        values[name] = float(of(fit.parameters))
        spread = fit.spread(units, np.array(values[name]), of(fit.replicates))
        margin = None if spread is None else float(spread.margin(LEVELS[0]))
        lowest = min(values[name], 0.0)  # none of them is below 0, but for the exponent of a law that rises
        intervals[name] = None if margin is None else [max(values[name] - margin, lowest), values[name] + margin]
    return {
        "law": law.name,
        "parameters": values,
        "intervals": intervals,
        "delta": fit.delta,
        "misfit": fit.misfit,
        "converged": fit.best.converged,
        "best_starts": fit.best.agreeing,
        "starts": fit.best.starts,
        "replicates_converged": fit.share if units > 1 else None,
    }


class PowerLaws:
    """L = E + K_v C^-gamma_v for V variants with one E, and one gamma where that is shared.

    Parameters are ln E, V times ln K (at each variant's centre of ln C), then gamma once or V times.
    """

    def __init__(self, observations: Observations, *, shared: bool) -> None:
        self.name = "L = E + K C^-gamma" + ("" if shared else ", gamma of each variant")
        self.observations, self.shared = observations, shared
        self.log_losses = observations.log_losses
        n, variants = len(self.log_losses), len(observations.centres)
        self.parameters = 1 + variants + (1 if shared else variants)
        rows = np.arange(n)
        self.design = np.zeros((n, 2, self.parameters))
        self.design[:, 0, 0] = 1
        self.design[rows, 1, 1 + observations.variant] = 1
        exponent = 1 + variants + (0 if shared else observations.variant)
        self.design[rows, 1, exponent] = -observations.log_compute

    def starts(self) -> NDArray[np.float64]:
        """(S, P): a grid over E and gamma, with the K that fit best on average there."""
        seen, losses = self.observations, np.exp(self.log_losses)
        variants, starts = len(seen.centres), []
        for fraction, exponent in itertools.product(ASYMPTOTES, EXPONENTS):
            heights = np.log(losses - fraction * losses.min()) + exponent * seen.log_compute
            multipliers = [heights[seen.variant == v].mean() for v in range(variants)]
            exponents = [exponent] * (self.parameters - 1 - variants)
            starts.append([np.log(fraction * losses.min()), *multipliers, *exponents])
        return np.array(starts)

    def centred_at(self, centres: NDArray[np.float64]) -> "PowerLaws":
        """The same laws on an axis where every variant's ln C is moved by a number of its own."""
        moved = copy(self)
        moved.observations = replace(self.observations, centres=centres)
        return moved

    def line(self, parameters: NDArray[np.float64], place: int) -> NDArray[np.float64]:
        """(..., 2) intercept and gradient of ln CEG of the variant at `place`, over the baseline's ln C - its centre.

        See `trend`; centres differ, so that ln C_v = c_v + (ln K_v - ln K_b + gamma_b (ln C_b - c_b)) / gamma_v.
        """
        centres = self.observations.centres
        _, multipliers, exponents = self.split(parameters)
        with np.errstate(divide="ignore", invalid="ignore"):  # a law that is level has no compute for a loss
            between = (multipliers[..., 0] - multipliers[..., place]) / exponents[..., place]
            gradient = 1 - exponents[..., 0] / exponents[..., place]
        return np.stack([centres[0] - centres[place] + between, gradient], axis=-1)

    def split(
        self, parameters: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """ln E (...), ln K (..., V) at the centres and gamma (..., V) of parameters (..., P)."""
        variants = len(self.observations.centres)
        multipliers, exponents = parameters[..., 1 : 1 + variants], parameters[..., 1 + variants :]
        return parameters[..., 0], multipliers, np.broadcast_to(exponents, multipliers.shape)


class LossSurfaces:
    """L = E + A_v / N^alpha + B_v / D^beta for V variants with one E, alpha and beta.

    Hoffmann et al. 2022 (arXiv 2203.15556), approach 3; D is the tokens, and N = 6ND / 6D. Parameters of the law are
    ln E, V times ln A, V times ln B, alpha and beta.
    """

    name = "L = E + A/N^alpha + B/D^beta"

    def __init__(self, variants: Sequence[TunedVariant]) -> None:
        means = [np.log([tuned.costs[axis].mean(axis=0) for axis in ("flops_6nd", "tokens")]) for tuned in variants]
        log_compute, log_tokens = np.concatenate(means, axis=1)
        log_parameters = log_compute - np.log(6) - log_tokens
        variant = np.repeat(np.arange(len(variants)), [len(tuned.budgets) for tuned in variants])
        self.log_losses = np.log(np.concatenate([tuned.losses.mean(axis=0) for tuned in variants]))
        self.variants = len(variants)
        rows = np.arange(len(variant))
        self.design = np.zeros((len(rows), 3, 3 + 2 * self.variants))
        self.design[:, 0, 0] = 1
        self.design[rows, 1, 1 + variant] = 1
        self.design[rows, 2, 1 + self.variants + variant] = 1
        self.design[:, 1, -2] = -log_parameters
        self.design[:, 2, -1] = -log_tokens
        self.centres = np.array([log_parameters.mean(), log_tokens.mean()])

    def starts(self) -> NDArray[np.float64]:
        """(S, P): a grid over E, alpha and beta, with A and B that share what is left of the mean loss equally."""
        lowest, typical = np.exp(self.log_losses.min()), np.exp(self.log_losses.mean())
        starts = []
        for fraction, alpha, beta in itertools.product(ASYMPTOTES, EXPONENTS, EXPONENTS):
            half = np.log((typical - fraction * lowest) / 2)
            terms = half + np.array([alpha, beta]) * self.centres
            starts.append([np.log(fraction * lowest), *np.repeat(terms, self.variants), alpha, beta])
        return np.array(starts)

    def split(self, parameters: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """ln E (...), ln A and ln B (..., V), alpha and beta (...) of parameters (..., P)."""
        p, v = parameters, self.variants
        return p[..., 0], p[..., 1 : 1 + v], p[..., 1 + v : 1 + 2 * v], p[..., -2], p[..., -1]

    def frontier(self, parameters: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """ln K (..., V) and gamma (...) of L = E + K C^-gamma, the lowest loss at C = 6 N D.

        From dL/dN = 0 at fixed C: with G = (alpha A / beta B)^(1 / (alpha + beta)), N = G (C/6)^(beta / (alpha + beta))
        and D = (C/6) / N (Hoffmann et al. 2022, equation 4), so both terms fall as C^-(alpha beta / (alpha + beta)).
        """
        _, log_a, log_b, alpha, beta = self.split(parameters)
        alpha, beta = alpha[..., None], beta[..., None]
        log_g = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)
        gamma = alpha * beta / (alpha + beta)
        return np.logaddexp(log_a - alpha * log_g, log_b + beta * log_g) + gamma * np.log(6), gamma[..., 0]
