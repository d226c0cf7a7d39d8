import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.gains.estimators.crossing import Estimator, shape
from bench.gains.trend import slope_of

BUDGETS = np.array([1e12, 4e12, 16e12, 64e12])
IRREDUCIBLE, SCALE, EXPONENT = 1.8, 1.2, 0.18

quick = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
falling = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda drops: 5 - np.cumsum([0.0, *drops]))


def law(compute, gain=1.0, exponent=EXPONENT):
    """L = E + K C^-gamma, with the baseline's compute multiplied by `gain`."""
    return IRREDUCIBLE + SCALE * (np.asarray(compute) * gain / 1e12) ** -exponent


def estimate(study):
    return Estimator(study).estimate("tiny", "model_flops").gains["rope"].points


def interval(point, level=0.95):
    return point.intervals and point.intervals[level]


def effect(point):
    """A point as one number that orders bounds after and before the values they enclose."""
    return next(value for value in (point.ceg, point.lower_bound, point.upper_bound) if value is not None)


@pytest.mark.parametrize("gain", [0.25, 1.0, 4.0])
def test_compute_scaled_by_a_factor_is_that_gain_exactly(make_study, gain):
    # Losses of the baseline at compute / gain: the crossing lies on a knot, whatever the curve.
    losses = [3.1, 2.7, 2.2, 2.15]
    points = estimate(make_study(losses, losses, variant_budgets=list(BUDGETS / gain)))
    assert [point.ceg for point in points] == pytest.approx([gain] * 4, rel=1e-12)


@pytest.mark.parametrize("gain", [1.3, 2.0, 3.0])
def test_power_laws_of_one_exponent_give_their_gain(make_study, gain):
    points = estimate(make_study(law(BUDGETS), law(BUDGETS, gain)))
    for point in points[1:]:
        assert point.ceg == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize("exponent", [0.17, 0.2, 0.22])
def test_power_laws_of_two_exponents_give_the_closed_form(make_study, exponent):
    budgets = list(1e12 * 2.0 ** np.arange(9))
    points = estimate(make_study(law(budgets), law(budgets, 2.0, exponent), budgets=budgets))
    assert len(points) == 9
    for point in points[2:]:
        variant_compute = ((point.target_loss - IRREDUCIBLE) / SCALE) ** (-1 / exponent) * 1e12 / 2
        assert point.ceg == pytest.approx(point.baseline_compute / variant_compute, rel=0.005)


def test_the_gain_is_read_at_the_baselines_last_loss(make_study):
    losses = law(BUDGETS)
    point = estimate(make_study(losses, law(BUDGETS, 2)))[-1]
    assert (point.baseline_compute, point.target_loss) == (64e12, losses[-1])


def test_a_variant_identical_to_the_baseline_gains_exactly_nothing(make_study):
    losses = law(BUDGETS) + np.random.default_rng(0).normal(0, 0.01, (3, 4))
    points = estimate(make_study(losses, losses))
    assert [(point.ceg, interval(point)) for point in points] == [(1.0, (1.0, 1.0))] * 4


def test_what_a_seed_does_to_both_cancels(make_study):
    noise = np.array([[-0.05], [0.02], [0.04]])
    # A gain of 4 is one budget, so that the crossing is a result itself.
    for point in estimate(make_study(law(BUDGETS) + noise, law(BUDGETS, 4) + noise))[1:]:
        assert interval(point) == pytest.approx((point.ceg, point.ceg), rel=1e-9)
        assert point.spread.error == pytest.approx(0, abs=1e-9)
    # Between results it cancels but for the curve's bend.
    low, high = interval(estimate(make_study(law(BUDGETS) + noise, law(BUDGETS, 2) + noise))[-1])
    assert 1.95 < low < 2 < high < 2.05


def test_noise_that_is_not_shared_widens_the_interval(make_study):
    noise = np.random.default_rng(0).normal(0, 0.005, (3, 4))
    low, high = interval(estimate(make_study(law(BUDGETS), law(BUDGETS, 2) + noise))[-1])
    assert low < 1.95
    assert high > 2.05


def test_a_loss_passed_before_the_first_budget_is_a_lower_bound(make_study):
    point = estimate(make_study(law(BUDGETS), law(BUDGETS, 1000)))[-1]
    assert (point.ceg, point.upper_bound, interval(point)) == (None, None, None)
    assert point.lower_bound == pytest.approx(64)


def test_a_loss_never_reached_is_an_upper_bound(make_study):
    point = estimate(make_study(law(BUDGETS), law(BUDGETS, 0.5)))[-1]
    assert (point.ceg, point.lower_bound, interval(point)) == (None, None, None)
    assert point.upper_bound == pytest.approx(1)


def test_bounds_come_from_the_variants_own_budgets(make_study):
    points = estimate(make_study(law(BUDGETS), law(BUDGETS, 0.5), variant_budgets=list(BUDGETS / 2)))
    assert points[-1].upper_bound == pytest.approx(2)
    points = estimate(make_study(law(BUDGETS), law(BUDGETS, 1000), variant_budgets=list(BUDGETS * 2)))
    assert points[-1].lower_bound == pytest.approx(32)


@quick
@given(falling, falling, st.integers(0, 100))
def test_bounds_are_never_tighter_than_the_data_allow(make_study, baseline, variant, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 3, 4))
    for point in estimate(make_study(baseline + noise[0], variant + noise[1])):
        loosest, tightest = point.baseline_compute / BUDGETS[0], point.baseline_compute / BUDGETS[-1]
        for value in (point.ceg, point.lower_bound, point.upper_bound):
            assert value is None or tightest * (1 - 1e-9) <= value <= loosest * (1 + 1e-9)
        reach = 2 if point.ceg is not None else 1  # only the interval of a value leaves what was trained, a little
        for end in interval(point):
            assert end is None or tightest / reach * (1 - 1e-9) <= end <= loosest * reach * (1 + 1e-9)
        low, high = interval(point)
        assert (low or 0) <= effect(point) * (1 + 1e-9)
        assert (high or math.inf) >= effect(point) * (1 - 1e-9)


def test_a_bound_within_the_noise_leaves_the_other_side_open_to_the_value(make_study):
    # The variant passes the target before its first budget by 0.001, with seeds 0.1 apart: next to nothing is known.
    losses = np.array([3.0, 2.8, 2.7, 2.6])
    noise = np.array([[-0.05], [0.0], [0.05]])
    point = estimate(make_study(losses, losses - 0.401 + noise))[-1]
    assert point.lower_bound == pytest.approx(64)
    low, high = interval(point)
    assert low < 32
    assert high is None


def test_a_certain_bound_is_the_end_of_its_interval(make_study):
    noise = np.array([[-0.001], [0.0], [0.001]])
    better = estimate(make_study(law(BUDGETS), law(BUDGETS, 1000) + noise))[-1]
    assert interval(better) == (better.lower_bound, None)
    worse = estimate(make_study(law(BUDGETS), law(BUDGETS, 0.5) + noise))[-1]
    assert interval(worse) == (None, worse.upper_bound)


def test_the_interval_is_students_on_the_paired_loss_carried_along_the_frontier(make_study):
    # Two budgets: ln L is a straight line in ln C but for the asymptote, so the ends have a closed form.
    noise = np.array([-0.01, 0.004, 0.02])[:, None]
    budgets = [1e12, 16e12]
    baseline, variant = np.full((3, 2), [3.0, 2.5]), np.array([2.8, 2.0]) + noise - noise.mean()
    study = make_study(baseline, variant, budgets=budgets, replicates=20_000)
    point = estimate(study)[-1]
    asymptote, _ = shape([study.tuned["tiny", name] for name in ("baseline", "rope")], "model_flops")
    error = noise.std(ddof=1) / math.sqrt(3)

    def log_ceg(target):
        height = np.log(np.array([2.8, 2.0, target]) - asymptote)
        return math.log(16) * (1 - (height[0] - height[2]) / (height[0] - height[1]))

    assert math.log(point.ceg) == pytest.approx(log_ceg(2.5))
    for level in (0.95, 0.90):
        reach = stats.t.ppf(0.5 + level / 2, 2) * error
        expected = np.array([log_ceg(2.5 - reach), log_ceg(2.5 + reach)])
        assert np.log(interval(point, level)) == pytest.approx(expected, abs=0.02 * np.ptp(expected))
    # By the delta method, from the same error.
    assert point.spread.error == pytest.approx(abs(log_ceg(2.5 + error) - log_ceg(2.5 - error)) / 2, rel=0.02)
    assert point.spread.freedom == 2


def test_spread_in_measured_compute_widens_the_interval(make_study):
    speed = np.array([[0.9], [1.0], [1.15]])
    losses = np.full((3, 4), law(BUDGETS))
    steady = estimate(make_study(losses, np.full((3, 4), law(BUDGETS, 2))))[-1]
    shaky = estimate(
        make_study(
            losses,
            np.full((3, 4), law(BUDGETS, 2)),
            budgets=np.tile(BUDGETS, (3, 1)),
            variant_budgets=speed * BUDGETS,
        )
    )[-1]
    assert interval(steady) == pytest.approx((steady.ceg, steady.ceg))
    error = math.log(interval(shaky)[1] / interval(shaky)[0]) / 2
    expected = stats.t.ppf(0.975, 2) * speed.std(ddof=1) / speed.mean() / math.sqrt(3)
    assert error == pytest.approx(expected, rel=0.1)


def test_the_level_sets_the_width(make_study):
    noise = np.random.default_rng(0).normal(0, 0.003, (3, 4))
    point = estimate(make_study(law(BUDGETS), law(BUDGETS, 2) + noise))[-1]
    (low, high), (inner_low, inner_high) = interval(point), interval(point, 0.90)
    assert low < inner_low < point.ceg < inner_high < high


@quick
@given(st.floats(0.3, 4), st.integers(0, 1000))
def test_an_interval_excludes_one_just_where_its_p_value_says(make_study, gain, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 3, 4))
    for point in estimate(make_study(law(BUDGETS) + noise[0], law(BUDGETS, gain) + noise[1])):
        for level in (0.95, 0.90):
            low, high = interval(point, level)
            # An end at the edge of the data is a bound that may itself be 1: the last budgets of both.
            if 1 not in (low, high):
                excludes = (low or 0) > 1 or (high or math.inf) < 1
                assert excludes == (point.p_value < 1 - level)


def test_a_variant_that_was_not_trained_with_the_baselines_compute_has_no_p_value(make_study):
    noise = np.random.default_rng(0).normal(0, 0.003, (3, 4))
    points = estimate(make_study(law(BUDGETS), law(BUDGETS) + noise, variant_budgets=BUDGETS / 4))
    assert [point.p_value is None for point in points] == [False, False, False, True]
    points = estimate(make_study(law(BUDGETS), law(BUDGETS) + noise, variant_budgets=BUDGETS * 0.995))
    assert all(point.p_value is not None for point in points)


def test_without_a_shared_seed_both_noises_count(make_study):
    noise = np.random.default_rng(0).normal(0, 0.005, (2, 5, 4))
    losses = (law(BUDGETS) + noise[0], law(BUDGETS, 4) + noise[0] + noise[1] / 10)
    paired = estimate(make_study(*losses, replicates=5000))[-1].spread
    apart = estimate(make_study(*losses, first_seed=10, replicates=5000))[-1].spread
    slope = -0.18 * (law(64e12) - IRREDUCIBLE)
    # At the crossing the variant's third budget is compared with the baseline's last.
    ends = losses[0][:, 3], losses[1][:, 2]
    assert apart.error == pytest.approx(math.hypot(*(stats.sem(end) for end in ends)) / -slope, rel=0.1)
    assert apart.freedom == pytest.approx(stats.ttest_ind(*ends, equal_var=False).df, rel=0.05)
    assert paired.error == pytest.approx(stats.sem(ends[1] - ends[0]) / -slope, rel=0.1)
    assert paired.freedom == 4


def test_one_seed_has_a_gain_without_an_interval(make_study):
    points = estimate(make_study(law(BUDGETS), law(BUDGETS, 4)))
    for point in points:
        assert (point.intervals, point.p_value, point.spread) == (None, None, None)
    assert points[-1].ceg == pytest.approx(4)


def test_evaluation_error_is_that_of_two_losses_along_the_frontier(make_study):
    point = estimate(make_study(law(BUDGETS), law(BUDGETS, 4), loss_error=0.002))[-1]
    # d L / d ln C of the variant at the target is -gamma (L - E).
    assert point.evaluation_error == pytest.approx(math.sqrt(2) * 0.002 / (0.18 * (law(64e12) - 1.8)), rel=1e-3)
    assert estimate(make_study(law(BUDGETS), law(BUDGETS, 4)))[-1].evaluation_error is None


def test_a_baseline_that_gets_worse_again_counts_as_far_as_it_improved(make_study):
    points = estimate(make_study([3.0, 2.5, 2.6, 2.7], [3.0, 2.5, 2.3, 2.2]))
    assert [(point.baseline_compute, point.target_loss, point.ceg) for point in points] == [
        (1e12, 3.0, 1),
        (4e12, 2.5, 1),
    ]


@quick
@given(falling, falling, st.floats(1e-20, 1e20))
def test_the_unit_of_compute_does_not_matter(make_study, baseline, variant, unit):
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 3, 4))
    one = estimate(make_study(baseline + noise[0], variant + noise[1]))
    other = estimate(make_study(baseline + noise[0], variant + noise[1], budgets=list(BUDGETS * unit)))
    for point, same in zip(one, other, strict=True):
        assert effect(point) == pytest.approx(effect(same), rel=1e-6)
        assert [end is None for end in interval(point)] == [end is None for end in interval(same)]


@quick
@given(falling)
def test_gains_multiply_along_a_chain_of_scaled_copies(make_study, losses):
    twice = estimate(make_study(losses, losses, variant_budgets=list(BUDGETS / 2)))[-1].ceg
    thrice = estimate(make_study(losses, losses, budgets=list(BUDGETS / 2), variant_budgets=list(BUDGETS / 6)))[-1].ceg
    both = estimate(make_study(losses, losses, variant_budgets=list(BUDGETS / 6)))[-1].ceg
    assert twice * thrice == pytest.approx(both)


def trend(study):
    return Estimator(study).estimate("tiny", "model_flops").gains["rope"].trend


@pytest.mark.parametrize("exponent", [0.16, 0.18, 0.2])
def test_the_trend_of_power_laws_is_that_of_their_exponents(make_study, exponent):
    budgets = list(1e12 * 2.0 ** np.arange(9))
    found = trend(make_study(law(budgets), law(budgets, 2.0, exponent), budgets=budgets))
    assert slope_of(found.gradient) == pytest.approx(exponent / 0.18 - 1, abs=1e-3)
    assert found.spread is None


def test_the_asymptote_and_the_exponent_are_those_of_the_laws(make_study):
    study = make_study(law(BUDGETS), law(BUDGETS, 2.0, 0.25))
    asymptote, exponent = shape([study.tuned["tiny", name] for name in ("baseline", "rope")], "model_flops")
    assert asymptote == pytest.approx(IRREDUCIBLE, rel=1e-4)
    assert exponent == pytest.approx(EXPONENT, rel=1e-3)


def test_a_bound_enters_the_trend_where_the_line_violates_it(make_study):
    # The second and third targets are reached; the last is just out of reach, so that its gain is below 1.
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 4))
    losses = law(BUDGETS, 3.0)
    losses[2:] = law(64e12) + np.array([0.002, 0.001])
    study = make_study(law(BUDGETS) + noise, losses + noise)
    points = estimate(study)
    assert points[-1].upper_bound == pytest.approx(1)
    exact = [point for point in points if point.ceg is not None]
    assert len(exact) == 2
    slope = np.diff(np.log([point.ceg for point in exact])) / np.diff(np.log([p.baseline_compute for p in exact]))
    assert trend(study).gradient < slope[0] - 0.05


@pytest.mark.parametrize("gain", [1000, 0.01])
def test_a_trend_needs_two_values(make_study, gain):
    assert trend(make_study(law(BUDGETS), law(BUDGETS, gain))) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("baseline", "variant"),
    [
        ([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]),
        ([3.0, 2.5, 2.4, 2.3], [2.0, 2.0, 2.0, 2.0]),
        ([3.0, 2.5, 2.4, 2.3], [2.4, 2.5, 2.6, 2.7]),
        ([3.0, 3.1, 3.2, 3.3], [3.0, 2.5, 2.4, 2.3]),
        ([3.0, 2.5, 2.5, 2.3], [3.0, 2.4, 2.4, 2.4]),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_curves_that_are_flat_or_rise_give_numbers_all_the_same(make_study, baseline, variant, noise):
    generator = np.random.default_rng(0)
    studies = [np.array(losses) + noise * generator.normal(size=(3, 4)) for losses in (baseline, variant)]
    for point in estimate(make_study(*studies)):
        numbers = [point.ceg, point.lower_bound, point.upper_bound, point.p_value, *interval(point)]
        assert all(number is None or math.isfinite(number) for number in numbers)
        assert effect(point) > 0
