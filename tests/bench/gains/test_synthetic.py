import numpy as np
import polars as pl
import pytest
from scipy.optimize import brentq

from bench.gains.estimators import find_estimator
from bench.gains.study import load_study
from bench.gains.synthetic import PowerLawStudy

BUDGETS = 1e12 * np.array([1.0, 5.0, 20.0, 100.0])


def make(seeds: int = 3, first: int = 0, noise: float = 0.01, shared: float = 0.5) -> PowerLawStudy:
    """A baseline and two variants; those have seeds from `first`."""
    return PowerLawStudy(
        asymptote=1.7,
        reducible=np.array([1.5, 1.3, 1.4]),
        exponents=np.array([0.15, 0.15, 0.18]),
        budgets=BUDGETS,
        seeds=[range(seeds), range(first, first + seeds), range(first, first + seeds)],
        noise=noise,
        shared=shared,
    )


def simulated(study: PowerLawStudy) -> np.ndarray:
    """(V, n, K) losses."""
    results = study.simulate(np.random.default_rng(0)).results.sort("variant", "seed", "budget")
    return results["val_loss"].to_numpy().reshape(len(study.variants), -1, len(study.budgets))


def test_gains_are_ratios_of_the_computes_that_reach_a_loss():
    study = make()
    losses = study.losses()[0]

    def needed(place: int, loss: float) -> float:
        excess = study.reducible[place], study.exponents[place]
        return brentq(lambda c: 1.7 + excess[0] * (c / 1e12) ** -excess[1] - loss, 1e6, 1e20, xtol=1, rtol=1e-14)

    ratios = [[needed(0, loss) / needed(place, loss) for loss in losses] for place in range(3)]
    np.testing.assert_allclose(np.exp(study.log_gains(losses)), ratios, rtol=1e-9)
    assert losses[2] == pytest.approx(1.7 + 1.5 * 20**-0.15)


def test_without_noise_the_losses_are_the_laws():
    study = make(noise=0.0)
    np.testing.assert_array_equal(simulated(study), np.repeat(study.losses()[:, None], 3, axis=1))


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_noise_splits_as_stated(shared):
    study = make(seeds=4000, shared=shared)
    noise = (simulated(study) - study.losses()[:, None]) / study.noise
    correlations = np.corrcoef(noise.transpose(0, 2, 1).reshape(12, -1))
    same_variant = np.kron(np.eye(3), np.ones((4, 4))).astype(bool)
    np.testing.assert_allclose(noise.std(axis=1), 1.0, atol=0.06)
    np.testing.assert_allclose(correlations[~same_variant], shared, atol=0.06)
    between_budgets = correlations[same_variant & ~np.eye(12, dtype=bool)]
    np.testing.assert_allclose(between_budgets, shared + (1 - shared) / 2, atol=0.06)


@pytest.mark.parametrize("first", [0, 10], ids=["same seeds", "other seeds"])
def test_noise_errors_are_those_of_mean_losses_over_the_slope(first):
    study = make(seeds=4, first=first, shared=0.8)
    generator = np.random.default_rng(1)
    gaps = []
    for _ in range(500):
        losses = study.simulate(generator).results.filter(pl.col("budget") == BUDGETS[-1])
        means = dict(losses.group_by("variant").agg(pl.col("val_loss").mean()).iter_rows())
        gaps.append(means["variant_1"] - means["baseline"])
    slope = study.exponents[1] * (study.losses()[0, -1] - study.asymptote)
    assert study.noise_errors()[1] == pytest.approx(np.std(gaps) / slope, rel=0.1)


def test_results_can_be_analysed_on_the_axis_that_they_are_counted_in():
    study = load_study(make().simulate(np.random.default_rng(0)), baseline="baseline", replicates=100, seed=0)
    assert study.axes == ["model_flops"]
    assert study.variants("synthetic") == ["variant_1", "variant_2"]
    assert all(study.pair("synthetic", variant).paired for variant in study.variants("synthetic"))
    assert find_estimator("crossing")(study).scales == ["synthetic"]


def test_other_seeds_are_not_paired():
    study = load_study(make(first=10).simulate(np.random.default_rng(0)), baseline="baseline", replicates=100, seed=0)
    pair = study.pair("synthetic", "variant_1")
    assert not pair.paired
    assert pair.variant.seeds == (10, 11, 12)
