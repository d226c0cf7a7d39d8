import math

import numpy as np
import pytest

from bench.gains.estimators import Gain, Point
from bench.gains.forecast import forecasts
from bench.gains.resampling import Spread
from bench.gains.study import Pair
from bench.gains.trend import Trend

LAST = 64e12


def gain(make_study, *, trend_error=0.02, noise=0.05, trend=True, exponent=0.2):
    """2 CEG at the last budget, growing as C^0.1."""
    study = make_study(np.full((3, 4), [3.0, 2.5, 2.3, 2.2]), [2.9, 2.4, 2.2, 2.1])
    pair = Pair(study.tuned["tiny", "baseline"], study.tuned["tiny", "rope"], True)
    spread = None
    if trend_error is not None:
        # Intercept and gradient independent: the signs of two columns are those of a 2 x 2 design.
        signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
        spread = Spread(signs * [trend_error, trend_error / 2], 2.0)
    line = Trend(math.log(LAST), math.log(2.0), 0.1, spread) if trend else None
    known = None if noise is None else Spread(np.array([-noise, noise]), 2.0)
    return {"rope": Gain(pair, [Point(LAST, 2.2, 2.0, spread=known)], line, exponent)}


def told(gains, *computes, far=False):
    warnings = []
    return forecasts(gains, computes, far=far, warnings=warnings), warnings


def test_the_gain_is_that_of_the_trend(make_study):
    (entry,), warnings = told(gain(make_study), 10 * LAST)
    assert warnings == []
    assert entry["ceg"] == pytest.approx(2 * 10**0.1)
    assert (entry["variant"], entry["baseline_compute"]) == ("rope", 10 * LAST)
    assert (entry["decades"], entry["extrapolated"]) == (pytest.approx(1), True)


def test_the_interval_is_for_a_measurement_there(make_study):
    (entry,), _ = told(gain(make_study), 10 * LAST)
    trend_error = math.hypot(0.02, 0.01 * math.log(10))
    # The same noise in loss is more in ln CEG where the loss falls less: as C^gamma.
    error = math.hypot(trend_error, 0.05 * 10**0.2)
    for name, student in (("interval", 4.302653), ("interval_90", 2.919986)):
        low, high = entry[name]
        assert low == pytest.approx(entry["ceg"] * math.exp(-student * error), rel=1e-5)
        assert high == pytest.approx(entry["ceg"] * math.exp(student * error), rel=1e-5)


def test_the_interval_widens_with_distance_and_is_wider_than_the_trends(make_study):
    gains = gain(make_study)
    entries, _ = told(gains, 2 * LAST, 8 * LAST, 50 * LAST)
    widths = [math.log(entry["interval"][1] / entry["interval"][0]) for entry in entries]
    trends = [2 * gains["rope"].trend.log_gain_spread(math.log(f * LAST)).margin(0.95) for f in (2, 8, 50)]
    assert widths == sorted(widths)
    assert all(width > trend for width, trend in zip(widths, trends, strict=True))


def test_without_noise_it_is_a_number_without_width(make_study):
    (entry,), _ = told(gain(make_study, trend_error=0.0, noise=0.0), 10 * LAST)
    assert entry["interval"] == pytest.approx([entry["ceg"]] * 2)


def test_without_seeds_there_is_no_interval(make_study):
    (entry,), _ = told(gain(make_study, trend_error=None, noise=None), 10 * LAST)
    assert entry["ceg"] == pytest.approx(2 * 10**0.1)
    assert (entry["interval"], entry["interval_90"]) == (None, None)


def test_more_than_two_decades_are_refused_unless_asked_for(make_study):
    entries, warnings = told(gain(make_study), 99 * LAST, 101 * LAST)
    assert [entry["baseline_compute"] for entry in entries] == [99 * LAST]
    assert warnings == [
        f"no forecast at {101 * LAST:.3g}: it lies 2.0 decades of compute beyond the data (6.4e+13). Ask for it with "
        "forecast_far=true."
    ]
    entries, warnings = told(gain(make_study), 1e4 * LAST, far=True)
    assert entries[0]["decades"] == pytest.approx(4)
    assert warnings == []


@pytest.mark.parametrize("compute", [LAST, LAST / 10, 0.0, -1.0, math.nan])
@pytest.mark.filterwarnings("error")
def test_inside_the_data_there_is_nothing_to_forecast(make_study, compute):
    entries, (warning,) = told(gain(make_study), compute, far=True)
    assert entries == []
    assert "it is not beyond the data; see the curve of gains" in warning


def test_without_a_trend_there_is_no_forecast(make_study):
    entries, warnings = told(gain(make_study, trend=False), 10 * LAST)
    assert entries == []
    assert warnings == ["rope at tiny: no forecast, as the trend of its gain is not known."]


def test_nothing_asked_for_is_nothing_said(make_study):
    assert told(gain(make_study, trend=False)) == ([], [])
