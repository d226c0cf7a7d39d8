import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.ratio_axis import RatioAxis, log_ticks

RATIOS = st.floats(1e-3, 1e3)


@st.composite
def any_gain(draw):
    kind = draw(st.sampled_from(("value", "open", "lower", "upper", "nothing")))
    value, spread = draw(RATIOS), draw(st.floats(1, 50))
    gain = {"ceg": None, "interval": None, "lower_bound": None, "upper_bound": None}
    if kind == "value":
        return gain | {"ceg": value, "interval": [value / spread, value * spread]}
    if kind == "open":
        return gain | {"ceg": value, "interval": draw(st.sampled_from(([value / spread, None], [None, None])))}
    return gain | ({f"{kind}_bound": value} if kind != "nothing" else {})


@given(st.lists(any_gain(), max_size=6))
def test_every_value_bound_and_1_are_inside(gains):
    axis = RatioAxis.around(gains)
    assert axis.low < 1 < axis.high
    assert 1.0 in axis.ticks
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 12
    for gain in gains:
        for key in ("ceg", "lower_bound", "upper_bound"):
            if gain[key] is not None:
                assert axis.low < gain[key] < axis.high
        span = axis.span(gain)
        if span:
            assert 0 <= span[0] <= span[1] <= 1


@given(st.floats(1e-6, 1e20), st.floats(1.01, 1e12))
def test_ticks_are_round_inside_and_neither_few_nor_many(low, factor):
    ticks = log_ticks(low, low * factor)
    assert all(low * 0.999999 <= tick <= low * factor * 1.000001 for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 12


def test_positions_are_logarithmic_and_clipped():
    axis = RatioAxis(0.25, 4.0)
    assert axis.ticks == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert [axis.position(value) for value in (0.25, 0.5, 1, 2, 4)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert (axis.position(0.0), axis.position(100)) == (0.0, 1.0)


def test_spans_of_intervals_bounds_and_neither(make_gain):
    axis = RatioAxis(0.25, 4.0)
    bound = {"ceg": None, "interval": None}
    assert axis.span(make_gain(interval=[0.5, 2.0])) == pytest.approx((0.25, 0.75))
    assert axis.span(make_gain(interval=[0.5, None])) == pytest.approx((0.25, 1.0))
    assert axis.span(make_gain(**bound, lower_bound=2.0)) == pytest.approx((0.75, 1.0))
    assert axis.span(make_gain(**bound, upper_bound=0.5)) == pytest.approx((0.0, 0.25))
    assert axis.span(make_gain(interval=None)) is None
    assert axis.span(make_gain(**bound)) is None


def test_one_enormous_interval_does_not_squeeze_the_rest(make_gain):
    axis = RatioAxis.around([make_gain(), make_gain(ceg=1.1, interval=[1e-9, 1e9])])
    assert math.log(axis.high / axis.low) < math.log(60)
