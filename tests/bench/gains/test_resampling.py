import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.gains.resampling import LEVELS, Resampling, Spread, holm, inflation, welch

p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_weights_are_uniform_on_the_simplex(seeds):
    # Dirichlet(1, ..., 1): mean 1/n, variance (n - 1) / (n^2 (n + 1)), covariance -1 / (n^2 (n + 1)).
    weights = Resampling(100_000, 0).of_seeds("tiny", range(seeds))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights.mean(axis=0), 1 / seeds, atol=0.005)
    covariance = np.full((seeds, seeds), -1.0) + np.eye(seeds) * seeds
    np.testing.assert_allclose(np.cov(weights.T), covariance / (seeds**2 * (seeds + 1)), atol=0.02 / seeds**2)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_a_resampled_mean_has_the_bayesian_bootstraps_variance_and_inflated_the_standard_error(seeds):
    sample = np.random.default_rng(0).normal(size=seeds)
    means = Resampling(50_000, 0).of_seeds("tiny", range(seeds)) @ sample
    variance = sample.var()
    assert means.var() == pytest.approx(variance / (seeds + 1), rel=0.03)
    assert inflation(seeds) * means.std() == pytest.approx(sample.std(ddof=1) / np.sqrt(seeds), rel=0.02)


def test_a_seed_has_one_weight_relative_to_others_in_every_variant():
    resampling = Resampling(500, 0)
    first, second = resampling.of_seeds("tiny", [0, 1, 2]), resampling.of_seeds("tiny", [2, 1])
    np.testing.assert_allclose(first[:, 2] / first[:, 1], second[:, 0] / second[:, 1])
    assert (resampling.of_seeds("tiny", [0, 1, 2]) == first).all()


def test_other_seeds_other_scales_and_other_draws_are_independent():
    resampling = Resampling(20_000, 0)
    weights = [
        resampling.of_seeds("tiny", [0, 1]),
        resampling.of_seeds("tiny", [10, 11]),
        resampling.of_seeds("small", [0, 1]),
        Resampling(20_000, 1).of_seeds("tiny", [0, 1]),
    ]
    correlation = np.corrcoef([pair[:, 0] for pair in weights])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.03)


def test_weights_do_not_depend_on_what_was_drawn_before():
    early, late = Resampling(100, 0), Resampling(100, 0)
    late.of_seeds("small", [5, 7])
    assert (early.of_seeds("tiny", [0, 1]) == late.of_seeds("tiny", [0, 1])).all()


def test_few_scales_are_not_resampled():
    resampling = Resampling(100, 0)
    assert (resampling.of_scales(["a", "a", "b", "c"]) == 1).all()
    assert resampling.units(["a", "a", "b", "c"], seeds=5) == 5


def test_columns_of_a_scale_are_resampled_together_with_weight_one_on_average():
    scales = ["a", "a", "b", "c", "d", "d"]
    resampling = Resampling(50_000, 0)
    weights = resampling.of_scales(scales)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 4] == weights[:, 5]).all()
    np.testing.assert_allclose(weights[:, [0, 2, 3, 4]].sum(axis=1), 4)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.02)
    # n^2 (n - 1) / (n^2 (n + 1)) for n = 4.
    np.testing.assert_allclose(weights.var(axis=0), 3 / 5, rtol=0.03)
    assert resampling.units(scales, seeds=5) == 4


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 1000))
def test_degrees_of_freedom_are_welchs(first, second, seed):
    generator = np.random.default_rng(seed)
    one, two = generator.normal(0, 1, first), generator.normal(0, 3, second)
    errors = [np.array(sample.std(ddof=1) / np.sqrt(len(sample))) for sample in (one, two)]
    expected = stats.ttest_ind(one, two, equal_var=False).df
    assert welch(errors, [first - 1, second - 1]) == pytest.approx(expected)


def test_without_spread_the_degrees_of_freedom_are_the_fewest():
    assert welch([np.zeros(2), np.array([0.0, 1.0])], [4, 2]).tolist() == [2, 2]


def test_an_interval_and_its_p_value_are_students():
    sample = np.random.default_rng(1).normal(0.3, 1, 6)
    deviations = sample - sample.mean()
    spread = Spread(deviations / np.sqrt(5), 5.0)  # its standard deviation is the standard error of the mean
    expected = stats.ttest_1samp(sample, 0)
    assert spread.error == pytest.approx(stats.sem(sample))
    assert spread.p_value(sample.mean()) == pytest.approx(expected.pvalue)
    assert spread.tail(sample.mean()) == pytest.approx(stats.ttest_1samp(sample, 0, alternative="greater").pvalue)
    for level in LEVELS:
        interval = expected.confidence_interval(level)
        assert 2 * spread.margin(level) == pytest.approx(interval.high - interval.low)


@pytest.mark.filterwarnings("error")
def test_without_any_spread_a_distance_is_certain_and_none_is_no_evidence():
    still = Spread(np.zeros((100, 3)), 2.0)
    assert still.p_value([-0.1, 0.0, 0.1]).tolist() == [0, 1, 0]
    assert still.tail([-0.1, 0.0, 0.1]).tolist() == [1, 0.5, 0]


def test_a_part_of_a_spread_keeps_its_own_degrees_of_freedom():
    spread = Spread(np.random.default_rng(0).normal(size=(50, 2)) * [1, 5], np.array([3.0, 7.0]))
    part = spread.at(1)
    assert part.freedom == 7
    assert part.margin(0.9) == pytest.approx(spread.margin(0.9)[1])
    assert Spread(spread.deviations, 4.0).at(0).freedom == 4


def test_holm_by_hand():
    # Holm 1979: the smallest times 4, the next times 3, the next times 2; never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.8]) == [1.0, None, 1.0]
    assert holm([]) == []
    assert holm([None]) == [None]


@given(p_values)
def test_holm_is_its_definition(values):
    # Adjusted p of a hypothesis: the largest over those as small of (how many are as large or larger) x p, at most 1.
    known = sorted(p for p in values if p is not None)

    def adjusted(p):
        return min(1.0, max((len(known) - rank) * other for rank, other in enumerate(known) if other <= p))

    assert holm(values) == pytest.approx([None if p is None else adjusted(p) for p in values])


@given(p_values, st.randoms(use_true_random=False))
def test_holm_keeps_order_never_lowers_and_does_not_depend_on_the_order_given(values, random):
    adjusted = holm(values)
    pairs = sorted((p, q) for p, q in zip(values, adjusted, strict=True) if p is not None)
    assert all(p <= q <= 1 for p, q in pairs)
    assert [q for _, q in pairs] == sorted(q for _, q in pairs)
    places = list(range(len(values)))
    random.shuffle(places)
    assert holm([values[place] for place in places]) == [adjusted[place] for place in places]
