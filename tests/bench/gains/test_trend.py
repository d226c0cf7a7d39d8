import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm

from bench.gains.resampling import Spread
from bench.gains.trend import AT_LEAST, AT_MOST, EXACT, Trend, censored_line, slope_of

X = np.array([-2.0, -1.0, 0.0, 1.5, 2.5])
seeds = st.integers(0, 10_000)


def maximum_likelihood(x, y, kinds, sigma, weights=1.0):
    """The Tobit likelihood of a line, maximised without derivatives."""
    signs = {EXACT: None, AT_LEAST: 1, AT_MOST: -1}
    weights = np.broadcast_to(weights, x.shape)

    def objective(line):
        total = 0.0
        for at, value, kind, weight in zip(x, y, kinds, weights, strict=True):
            fitted = line[0] + line[1] * at
            sign = signs[int(kind)]
            if sign is None:
                total -= weight * norm.logpdf(value, fitted, sigma)
            else:
                total -= weight * norm.logcdf(sign * (fitted - value) / sigma)
        return total

    start = np.polyfit(x[kinds == EXACT], y[kinds == EXACT], 1)[::-1]
    for _ in range(4):
        start = minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13}).x
    return start


@given(seeds)
def test_without_bounds_it_is_least_squares(seed):
    generator = np.random.default_rng(seed)
    y, weights = generator.normal(size=5), generator.uniform(0.1, 3, 5)
    gradient, intercept = np.polyfit(X, y, 1, w=np.sqrt(weights))
    line = censored_line(X, y, np.full(5, EXACT), 0.1, weights)
    np.testing.assert_allclose(line, [intercept, gradient], atol=1e-9)


@settings(max_examples=30)
@given(seeds, st.floats(0.02, 1))
def test_with_bounds_it_is_the_maximum_of_the_tobit_likelihood(seed, sigma):
    generator = np.random.default_rng(seed)
    y, weights = generator.normal(size=5), generator.uniform(0.3, 2, 5)
    kinds = np.array([EXACT, EXACT, *generator.choice([EXACT, AT_LEAST, AT_MOST], 3)])
    generator.shuffle(kinds)
    line = censored_line(X, y, kinds, sigma, weights)
    expected = maximum_likelihood(X, y, kinds, sigma, weights)
    np.testing.assert_allclose(line, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "far"), [(AT_LEAST, -50.0), (AT_MOST, 50.0)])
def test_a_bound_that_the_line_satisfies_by_far_changes_nothing(kind, far):
    y = np.array([0.1, 0.4, 0.3, 0.6, far])
    kinds = np.array([EXACT] * 4 + [kind])
    gradient, intercept = np.polyfit(X[:4], y[:4], 1)
    np.testing.assert_allclose(censored_line(X, y, kinds, 0.1), [intercept, gradient], atol=1e-9)


@pytest.mark.parametrize(("kind", "value"), [(AT_LEAST, 3.0), (AT_MOST, -3.0)])
def test_a_bound_that_the_line_violates_pulls_it_but_not_to_the_other_side(kind, value):
    y = np.array([0.0, 0.0, 0.0, 0.0, value])
    kinds = np.array([EXACT] * 4 + [kind])
    line = censored_line(X, y, kinds, 0.3)
    as_value = censored_line(X, y, np.full(5, EXACT), 0.3)
    assert 0 < line[1] / as_value[1] <= 1.3
    assert np.sign(line[1]) == np.sign(value)


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2])
def test_a_violated_bound_counts_as_a_value_where_there_is_hardly_any_noise(sigma):
    y = np.array([0.0, 0.0, 0.0, 0.0, 2.0])
    line = censored_line(X, y, np.array([EXACT] * 4 + [AT_LEAST]), sigma)
    gradient, intercept = np.polyfit(X, y, 1)
    np.testing.assert_allclose(line, [intercept, gradient], atol=2 * sigma)


def test_a_batch_is_its_members_one_by_one():
    generator = np.random.default_rng(0)
    y, weights = generator.normal(size=(20, 5)), generator.uniform(0.2, 2, (20, 5))
    kinds = np.array([EXACT, AT_LEAST, EXACT, EXACT, AT_MOST])
    together = censored_line(X, y, kinds, 0.2, weights)
    for row in range(20):
        np.testing.assert_allclose(together[row], censored_line(X, y[row], kinds, 0.2, weights[row]), atol=1e-8)


@given(st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_the_slope_of_two_power_laws_is_the_ratio_of_their_exponents_less_one(baseline, variant):
    # ln CEG over the baseline's ln C, from the laws themselves.
    log_compute = np.array([20.0, 30.0])
    log_variant = (np.log(2.0) - np.log(1.5) + baseline * log_compute) / variant
    (gradient, _) = np.polyfit(log_compute, log_compute - log_variant, 1)
    assert gradient == pytest.approx(1 - baseline / variant)
    assert slope_of(gradient) == pytest.approx(variant / baseline - 1)


def test_a_gain_that_grows_as_fast_as_compute_has_no_finite_slope():
    assert slope_of(1.0) is None
    assert slope_of(1.5) is None
    assert slope_of(0.0) == 0


def test_a_trend_and_its_spread_at_a_compute():
    deviations = np.random.default_rng(0).normal(size=(400, 2)) * [0.1, 0.02]
    trend = Trend(centre=30.0, intercept=0.5, gradient=0.1, spread=Spread(deviations, 2.0))
    assert trend.log_gain(32.0) == pytest.approx(0.7)
    spread = trend.log_gain_spread(32.0)
    assert spread.error == pytest.approx((deviations[:, 0] + 2 * deviations[:, 1]).std())
    assert spread.freedom == 2
    assert trend.gradient_spread.error == pytest.approx(deviations[:, 1].std())


def test_a_trend_without_seeds_has_no_spread():
    trend = Trend(30.0, 0.5, 0.1, None)
    assert trend.log_gain_spread(32.0) is None
    assert trend.gradient_spread is None
