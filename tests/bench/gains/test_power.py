import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.gains.estimators import Gain, Point
from bench.gains.power import MOST_SEEDS, power, seeds_needed
from bench.gains.resampling import Spread
from bench.gains.study import Pair

deviations, widths = st.floats(1e-3, 1), st.floats(0.01, 1)


def reach(seeds, deviation, level=0.95):
    """Half the width of Student's interval of ln CEG, from scipy's own interval of a mean."""
    low, high = stats.t.interval(level, seeds - 1, scale=deviation / np.sqrt(seeds))
    return (high - low) / 2


@given(deviations, widths, st.sampled_from([0.90, 0.95]))
def test_they_are_the_fewest_whose_interval_is_narrow_enough(deviation, width, level):
    found = seeds_needed(deviation, width, level)
    if found is None:
        assert reach(MOST_SEEDS, deviation, level) > np.log1p(width)
        return
    assert reach(found, deviation, level) <= np.log1p(width) * (1 + 1e-12)
    assert found == 2 or reach(found - 1, deviation, level) > np.log1p(width)


def test_by_hand():
    # An SD of 0.05 and a tenth either way: 3 seeds reach 0.124 and 4 reach 0.0796; ln 1.1 is 0.0953.
    assert seeds_needed(0.05, 0.1) == 4
    assert seeds_needed(0.0, 0.1) == 2
    assert seeds_needed(100.0, 0.01) is None


@given(deviations, deviations, widths, widths)
def test_more_noise_and_narrower_intervals_never_need_fewer(first, second, narrow, wide):
    def count(deviation, width):
        return seeds_needed(deviation, width) or MOST_SEEDS + 1

    quiet, noisy = sorted((first, second))
    narrow, wide = sorted((narrow, wide))
    assert count(quiet, wide) <= count(noisy, wide) <= count(noisy, narrow)


def gain(make_study, seeds, error, freedom=None):
    study = make_study(np.full((seeds, 4), [3.0, 2.5, 2.3, 2.2]), [2.9, 2.4, 2.2, 2.1])
    pair = Pair(study.tuned["tiny", "baseline"], study.tuned["tiny", "rope"], True)
    spread = None if error is None else Spread(np.array([-error, error]), seeds - 1.0 if freedom is None else freedom)
    return {"rope": Gain(pair, [Point(64e12, 2.2, 2.0, spread=spread)])}


FOUR = {"baseline": 4, "rope": 4}


def test_what_is_told_of_a_variant(make_study):
    # A standard error of 0.05 from 4 seeds is an SD of 0.1.
    (entry,) = power(gain(make_study, 4, 0.05), "tiny", "model_flops", 0.1, {"baseline": 3e12, "rope": 5e12}, FOUR)
    assert (entry["scale"], entry["variant"], entry["axis"], entry["seeds"]) == ("tiny", "rope", "model_flops", 4)
    assert entry["seed_sd"] == pytest.approx(0.1)
    assert entry["seeds_needed"] == seeds_needed(0.1, 0.1) == 7
    assert entry["cost"] == 3 * 8e12
    # The 80 % upper limit of an SD with 3 degrees of freedom: chi-squared is above 1.005 with probability 0.8.
    assert entry["seeds_cautious"] == seeds_needed(0.1 * np.sqrt(3 / 1.0052), 0.1)


def test_seeds_that_the_baseline_has_are_not_paid_for_again(make_study):
    costs, trained = {"baseline": 3e12, "rope": 5e12}, {"baseline": 6, "rope": 4}
    (entry,) = power(gain(make_study, 4, 0.05), "tiny", "model_flops", 0.1, costs, trained)
    assert entry["seeds_needed"] == 7
    assert entry["cost"] == 1 * 3e12 + 3 * 5e12


def test_what_is_trained_already_costs_nothing(make_study):
    (entry,) = power(gain(make_study, 4, 0.001), "tiny", "model_flops", 0.1, {"baseline": 3e12, "rope": 5e12}, FOUR)
    assert (entry["seeds_needed"], entry["cost"]) == (2, 0)


def test_more_than_can_be_trained_has_no_cost(make_study):
    (entry,) = power(gain(make_study, 2, 9.0), "tiny", "model_flops", 0.01, {"baseline": 1.0, "rope": 1.0}, FOUR)
    assert (entry["seeds_needed"], entry["seeds_cautious"], entry["cost"]) == (None, None, None)


def test_where_the_noise_is_not_known_nothing_is_told(make_study):
    assert power(gain(make_study, 2, None), "tiny", "model_flops", 0.1, {"baseline": 1.0, "rope": 1.0}, FOUR) == []


def test_the_upper_limit_covers_the_true_deviation_four_times_in_five():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(20_000, 4)).std(axis=1, ddof=1)
    limits = samples * np.sqrt(3 / stats.chi2.ppf(0.2, 3))
    assert (limits > 1).mean() == pytest.approx(0.8, abs=0.01)
