import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.gains.estimators.crossing import Estimator

BUDGETS = np.array([1e12, 4e12, 16e12, 64e12])
IRREDUCIBLE, SCALE, EXPONENT = 1.8, 1.2, 0.18

quick = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
falling = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda drops: 5 - np.cumsum([0.0, *drops]))


def law(compute, gain=1.0, exponent=EXPONENT):
    """L = E + K C^-gamma, with the baseline's compute multiplied by `gain`."""
    return IRREDUCIBLE + SCALE * (np.asarray(compute) * gain / 1e12) ** -exponent


def estimate(study, baseline, variant):
    return Estimator(study).estimate(baseline, variant, "model_flops")


def effect(point):
    """A point as one number that orders bounds after and before the values they enclose."""
    return next(value for value in (point.ceg, point.lower_bound, point.upper_bound) if value is not None)


@pytest.mark.parametrize("gain", [0.25, 1.0, 4.0])
def test_compute_scaled_by_a_factor_is_that_gain_exactly(make_study, gain):
    # Losses of the baseline at compute / gain: the crossing lies on a knot, whatever the curve.
    losses = [3.1, 2.7, 2.2, 2.15]
    points = estimate(*make_study(losses, losses, variant_budgets=list(BUDGETS / gain)))
    assert [point.ceg for point in points] == pytest.approx([gain] * 4, rel=1e-12)


@pytest.mark.parametrize("gain", [1.3, 2.0, 3.0])
def test_power_laws_of_one_exponent_give_their_gain(make_study, gain):
    points = estimate(*make_study(law(BUDGETS), law(BUDGETS, gain)))
    for point in points[1:]:
        assert point.ceg == pytest.approx(gain, rel=0.03)


@pytest.mark.parametrize("exponent", [0.17, 0.2, 0.22])
def test_power_laws_of_two_exponents_give_the_closed_form(make_study, exponent):
    budgets = list(1e12 * 2.0 ** np.arange(9))
    points = estimate(*make_study(law(budgets), law(budgets, 2.0, exponent), budgets=budgets))
    assert len(points) == 9
    for point in points[2:]:
        variant_compute = ((point.target_loss - IRREDUCIBLE) / SCALE) ** (-1 / exponent) * 1e12 / 2
        assert point.ceg == pytest.approx(point.baseline_compute / variant_compute, rel=0.005)


def test_the_gain_is_read_at_the_baselines_last_loss(make_study):
    losses = law(BUDGETS)
    point = estimate(*make_study(losses, law(BUDGETS, 2)))[-1]
    assert (point.baseline_compute, point.target_loss) == (64e12, losses[-1])


def test_a_variant_identical_to_the_baseline_gains_exactly_nothing(make_study):
    losses = law(BUDGETS) + np.random.default_rng(0).normal(0, 0.01, (3, 4))
    points = estimate(*make_study(losses, losses))
    assert [(point.ceg, point.interval) for point in points] == [(1.0, (1.0, 1.0))] * 4


def test_what_a_seed_does_to_both_cancels(make_study):
    noise = np.array([[-0.05], [0.02], [0.04]])
    points = estimate(*make_study(law(BUDGETS) + noise, law(BUDGETS, 2) + noise))
    for point in points[1:]:
        assert point.interval == pytest.approx((point.ceg, point.ceg), rel=1e-9)


def test_noise_that_is_not_shared_widens_the_interval(make_study):
    noise = np.random.default_rng(0).normal(0, 0.005, (3, 4))
    low, high = estimate(*make_study(law(BUDGETS), law(BUDGETS, 2) + noise))[-1].interval
    assert low < 1.95
    assert high > 2.05


def test_a_loss_passed_before_the_first_budget_is_a_lower_bound(make_study):
    point = estimate(*make_study(law(BUDGETS), law(BUDGETS, 1000)))[-1]
    assert (point.ceg, point.upper_bound, point.interval) == (None, None, None)
    assert point.lower_bound == pytest.approx(64)


def test_a_loss_never_reached_is_an_upper_bound(make_study):
    point = estimate(*make_study(law(BUDGETS), law(BUDGETS, 0.5)))[-1]
    assert (point.ceg, point.lower_bound, point.interval) == (None, None, None)
    assert point.upper_bound == pytest.approx(1)


def test_bounds_come_from_the_variants_own_budgets(make_study):
    points = estimate(*make_study(law(BUDGETS), law(BUDGETS, 0.5), variant_budgets=list(BUDGETS / 2)))
    assert points[-1].upper_bound == pytest.approx(2)
    points = estimate(*make_study(law(BUDGETS), law(BUDGETS, 1000), variant_budgets=list(BUDGETS * 2)))
    assert points[-1].lower_bound == pytest.approx(32)


@quick
@given(falling, falling, st.integers(0, 100))
def test_bounds_are_never_tighter_than_the_data_allow(make_study, baseline, variant, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 3, 4))
    for point in estimate(*make_study(baseline + noise[0], variant + noise[1])):
        loosest, tightest = point.baseline_compute / BUDGETS[0], point.baseline_compute / BUDGETS[-1]
        for value in (point.ceg, point.lower_bound, point.upper_bound, *point.interval):
            assert value is None or tightest * (1 - 1e-9) <= value <= loosest * (1 + 1e-9)
        low, high = point.interval
        assert (low or 0) <= effect(point) * (1 + 1e-9)
        assert (high or math.inf) >= effect(point) * (1 - 1e-9)


def test_a_bound_within_the_noise_leaves_the_other_side_open_to_the_value(make_study):
    # The variant passes the target before its first budget by 0.001, with seeds 0.1 apart: next to nothing is known.
    losses = np.array([3.0, 2.8, 2.7, 2.6])
    noise = np.array([[-0.05], [0.0], [0.05]])
    point = estimate(*make_study(losses, losses - 0.401 + noise))[-1]
    assert point.lower_bound == pytest.approx(64)
    low, high = point.interval
    assert low < 32
    assert high is None


def test_a_certain_bound_is_the_end_of_its_interval(make_study):
    noise = np.array([[-0.001], [0.0], [0.001]])
    better = estimate(*make_study(law(BUDGETS), law(BUDGETS, 1000) + noise))[-1]
    assert better.interval == (better.lower_bound, None)
    worse = estimate(*make_study(law(BUDGETS), law(BUDGETS, 0.5) + noise))[-1]
    assert worse.interval == (None, worse.upper_bound)


def test_the_interval_is_students_on_the_paired_loss_carried_along_the_frontier(make_study):
    # Two budgets make the frontier a straight line, so the ends have a closed form.
    noise = np.array([-0.01, 0.004, 0.02])[:, None]
    budgets = [1e12, 16e12]
    baseline, variant = np.full((3, 2), [3.0, 2.5]), np.array([2.8, 2.0]) + noise - noise.mean()
    point = estimate(*make_study(baseline, variant, budgets=budgets))[-1]
    per_nat = math.log(16) / 0.8
    error = noise.std(ddof=1) / math.sqrt(3)
    middle = math.log(16) - (2.8 - 2.5) * per_nat
    half = stats.t.ppf(0.975, 2) * error * per_nat
    assert math.log(point.ceg) == pytest.approx(middle)
    assert np.log(point.interval) == pytest.approx([middle - half, middle + half], abs=0.05 * half)


def test_spread_in_measured_compute_widens_the_interval(make_study):
    speed = np.array([[0.9], [1.0], [1.15]])
    losses = np.full((3, 4), law(BUDGETS))
    steady = estimate(*make_study(losses, np.full((3, 4), law(BUDGETS, 2))))[-1]
    study, baseline, variant = make_study(
        losses,
        np.full((3, 4), law(BUDGETS, 2)),
        budgets=np.tile(BUDGETS, (3, 1)).tolist(),
        variant_budgets=(speed * BUDGETS).tolist(),
    )
    shaky = estimate(study, baseline, variant)[-1]
    assert steady.interval == pytest.approx((steady.ceg, steady.ceg))
    error = math.log(shaky.interval[1] / shaky.interval[0]) / 2
    expected = stats.t.ppf(0.975, 2) * speed.std(ddof=1) / speed.mean() / math.sqrt(3)
    assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_covers_the_truth(make_study, seeds):
    generator = np.random.default_rng(1)
    studies, covered = 300, 0
    for _ in range(studies):
        shared, first, second = generator.normal(0, [[[0.01]], [[0.002]], [[0.002]]], (3, seeds, 4))
        # A gain of 4 is one budget, so that interpolation plays no part.
        point = estimate(*make_study(law(BUDGETS) + shared + first, law(BUDGETS, 4) + shared + second))[-1]
        low, high = point.interval
        covered += (low or 0) <= 4 <= (high or math.inf)
    assert 0.90 <= covered / studies <= 0.99


def test_the_level_sets_the_width(make_study):
    noise = np.random.default_rng(0).normal(0, 0.003, (3, 4))
    wide, narrow = (
        estimate(*make_study(law(BUDGETS), law(BUDGETS, 2) + noise, level=level))[-1].interval for level in (0.95, 0.5)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_baseline_that_gets_worse_again_counts_as_far_as_it_improved(make_study):
    points = estimate(*make_study([3.0, 2.5, 2.6, 2.7], [3.0, 2.5, 2.3, 2.2]))
    assert [(point.baseline_compute, point.target_loss, point.ceg) for point in points] == [
        (1e12, 3.0, 1),
        (4e12, 2.5, 1),
    ]


@quick
@given(falling, falling, st.floats(1e-20, 1e20))
def test_the_unit_of_compute_does_not_matter(make_study, baseline, variant, unit):
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 3, 4))
    one = estimate(*make_study(baseline + noise[0], variant + noise[1]))
    other = estimate(*make_study(baseline + noise[0], variant + noise[1], budgets=list(BUDGETS * unit)))
    for point, same in zip(one, other, strict=True):
        assert effect(point) == pytest.approx(effect(same), rel=1e-6)
        assert [end is None for end in point.interval] == [end is None for end in same.interval]


@quick
@given(falling, falling, st.floats(0, 2))
def test_a_lower_loss_at_every_budget_is_never_a_smaller_gain(make_study, baseline, variant, shift):
    for worse, better in zip(
        estimate(*make_study(baseline, variant)), estimate(*make_study(baseline, variant - shift)), strict=True
    ):
        assert effect(better) >= effect(worse) * (1 - 1e-9)


@quick
@given(falling)
def test_gains_multiply_along_a_chain_of_scaled_copies(make_study, losses):
    twice = estimate(*make_study(losses, losses, variant_budgets=list(BUDGETS / 2)))[-1].ceg
    thrice = estimate(*make_study(losses, losses, budgets=list(BUDGETS / 2), variant_budgets=list(BUDGETS / 6)))[-1].ceg
    both = estimate(*make_study(losses, losses, variant_budgets=list(BUDGETS / 6)))[-1].ceg
    assert twice * thrice == pytest.approx(both)
