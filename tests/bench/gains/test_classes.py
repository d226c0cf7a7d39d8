from types import SimpleNamespace

import numpy as np
import pytest

from bench.gains.classes import classify, interval_entries, side_of_one
from bench.gains.estimators import Gain, Point, ratio_intervals
from bench.gains.resampling import Spread
from bench.gains.trend import Trend, slope_of


def point(ceg=None, p_value=None, lower=None, upper=None, intervals=None):
    return Point(1e12, 2.0, ceg, lower_bound=lower, upper_bound=upper, p_value=p_value, intervals=intervals)


def trend(gradient, error=None, freedom=2.0):
    """With a gradient whose standard error is exactly `error`."""
    if error is None:
        return Trend(30.0, 0.5, gradient, None)
    return Trend(30.0, 0.5, gradient, Spread(np.array([[0.0, -error], [0.0, error]]), freedom))


def gain(point, trend=None, scale="tiny"):
    return Gain(SimpleNamespace(variant=SimpleNamespace(scale=scale)), [point], trend)


def signs(*points):
    gains = {f"v{number}": gain(one) for number, one in enumerate(points)}
    return [entry["sign"] for entry in classify(gains, gains)]


def slopes(*trends):
    gains = {f"v{number}": gain(point(2.0), one, "all scales") for number, one in enumerate(trends)}
    return [entry["slope"] for entry in classify(gains, gains)]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (point(2.0, 0.049), "independent"),
        (point(2.0, 0.051), "inconclusive"),
        (point(lower=4.0, p_value=0.01), "independent"),
        (point(lower=1.0, p_value=0.01), "independent"),
        (point(lower=4.0, p_value=0.2), "inconclusive"),
        (point(lower=4.0), "inconclusive"),
        (point(2.0), "inconclusive"),
        (point(1.0, 1.0), "inconclusive"),
        (point(0.5, 0.01), "dependent"),
        (point(0.9, 0.3), "inconclusive"),
        (point(upper=1.0, p_value=0.001), "dependent"),
        (point(upper=1.004, p_value=0.001), "dependent"),
        (point(upper=1.0, p_value=0.3), "inconclusive"),
    ],
)
def test_the_sign_is_the_side_on_which_a_gain_of_one_is_rejected(found, verdict):
    (sign,) = signs(found)
    assert (sign["verdict"], sign["scale"]) == (verdict, "tiny")
    assert sign["p_value"] == sign["p_adjusted"] == found.p_value
    assert side_of_one(found) == {"independent": 1, "dependent": -1, "inconclusive": 0}[verdict]


def test_verdicts_on_signs_are_by_p_values_adjusted_for_how_many_are_judged():
    # Holm over the three that are known: 3 x 0.01, 2 x 0.02, 1 x 0.045.
    found = signs(point(2.0, 0.045), point(0.5, 0.01), point(2.0), point(1.5, 0.02))
    assert [sign["p_adjusted"] for sign in found] == [0.045, 0.03, None, 0.04]
    assert [sign["verdict"] for sign in found] == ["independent", "dependent", "inconclusive", "independent"]
    found = signs(point(2.0, 0.03), point(2.0, 0.04))
    assert [sign["p_adjusted"] for sign in found] == [0.06, 0.06]
    assert {sign["verdict"] for sign in found} == {"inconclusive"}


def test_a_sign_has_the_intervals_of_its_point():
    intervals = {0.95: (1.2, None), 0.90: (1.3, 3.0)}
    (sign,) = signs(point(2.0, 0.01, intervals=intervals))
    assert (sign["interval"], sign["interval_90"]) == ([1.2, None], [1.3, 3.0])


@pytest.mark.parametrize(
    ("gradient", "error", "verdict"),
    [
        (0.3, 0.05, "compute-dependent"),
        (-0.3, 0.05, "fading"),
        (0.0, 0.01, "scale-invariant"),
        (0.02, 0.01, "scale-invariant"),
        (0.0, 0.05, "inconclusive"),
        (0.3, 0.2, "inconclusive"),
        (0.02, 0.0, "compute-dependent"),
        (0.0, 0.0, "scale-invariant"),
        (0.3, None, "inconclusive"),
        (1.2, 0.01, "compute-dependent"),
    ],
)
def test_the_verdict_on_a_slope(gradient, error, verdict):
    (slope,) = slopes(trend(gradient, error))
    assert (slope["verdict"], slope["scale"]) == (verdict, "all scales")
    assert slope["value"] == slope_of(gradient)


def test_the_p_value_and_interval_of_a_slope_are_students():
    # t of 0.3 / 0.05 = 6 with 2 degrees of freedom: p = 1 - 6 / sqrt(38).
    (slope,) = slopes(trend(0.3, 0.05))
    assert slope["p_value"] == pytest.approx(1 - 6 / np.sqrt(38))
    reach = 4.302653 * 0.05
    assert slope["interval"] == pytest.approx([slope_of(0.3 - reach), slope_of(0.3 + reach)], rel=1e-5)
    reach = 2.919986 * 0.05
    assert slope["interval_90"] == pytest.approx([slope_of(0.3 - reach), slope_of(0.3 + reach)], rel=1e-5)


def test_a_side_on_which_the_slope_is_infinite_is_open():
    (slope,) = slopes(trend(0.9, 0.1))
    assert slope["interval"][1] is None
    assert slope["interval"][0] == pytest.approx(slope_of(0.9 - 4.302653 * 0.1), rel=1e-5)


def test_invariance_is_rejecting_a_slope_of_a_tenth_either_way():
    # The upper edge, a slope of 0.1, is a gradient of 0.1 / 1.1; one-sided at 5 % t is 2.92.
    edge = 0.1 / 1.1
    (inside,) = slopes(trend(0.0, edge / 2.93))
    (outside,) = slopes(trend(0.0, edge / 2.91))
    assert (inside["verdict"], outside["verdict"]) == ("scale-invariant", "inconclusive")


def test_verdicts_on_slopes_are_by_adjusted_p_values():
    alone, *_ = slopes(trend(0.3, 0.05))
    both = slopes(trend(0.3, 0.05), trend(0.0, 0.5))
    assert alone["verdict"] == "compute-dependent"
    assert both[0]["p_adjusted"] == pytest.approx(2 * alone["p_value"])
    assert both[0]["verdict"] == "inconclusive"
    unknown = slopes(trend(0.3, 0.05), trend(0.0), None)
    assert unknown[0]["p_adjusted"] == alone["p_value"]


def test_without_a_trend_nothing_is_said():
    (slope,) = slopes(None)
    assert slope == {
        "verdict": "inconclusive",
        "value": None,
        "interval": None,
        "interval_90": None,
        "p_value": None,
        "p_adjusted": None,
        "scale": "all scales",
    }


def test_both_levels_of_an_interval_are_told():
    spread = Spread(np.array([-0.1, 0.1]), 1e9)
    entries = interval_entries(ratio_intervals(np.log(2.0), spread))
    assert entries["interval"] == pytest.approx([2 * np.exp(-0.196), 2 * np.exp(0.196)], rel=1e-4)
    assert entries["interval_90"] == pytest.approx([2 * np.exp(-0.1645), 2 * np.exp(0.1645)], rel=1e-4)
    assert interval_entries(None) == {"interval": None, "interval_90": None}


def test_an_interval_too_wide_for_a_number_is_open():
    entries = interval_entries(ratio_intervals(0.0, Spread(np.array([-100.0, 100.0]), 1.0)))
    assert entries["interval"] == [0.0, None]
