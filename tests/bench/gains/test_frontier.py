import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from bench.gains.frontier import BEFORE_FIRST, INSIDE, NOT_REACHED, Frontier, pchip_derivatives

losses = st.lists(st.floats(0.5, 12), min_size=2, max_size=8)
asymptotes = st.floats(0, 0.45)


@st.composite
def frontiers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    y = np.array(draw(losses))
    widths = draw(st.lists(st.floats(0.05, 5), min_size=len(y) - 1, max_size=len(y) - 1))
    return np.concatenate([[0.0], np.cumsum(widths)]) + draw(st.floats(0, 50)), y


@given(frontiers(), asymptotes, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_what_is_interpolated_is_the_logarithm_above_the_asymptote_by_scipys_pchip(points, asymptote, fractions):
    x, y = points
    at = x[0] + np.array(fractions) * (x[-1] - x[0])
    scipys = PchipInterpolator(x, np.log(np.minimum.accumulate(y) - asymptote))
    frontier = Frontier(x, y, asymptote)
    above = np.exp(scipys(at))
    np.testing.assert_allclose(frontier.loss(at), asymptote + above, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(frontier.slope(at), above * scipys(at, 1), rtol=1e-6, atol=1e-6)


@given(frontiers())
def test_derivatives_are_scipys_for_any_data(points):
    x, y = points
    np.testing.assert_allclose(pchip_derivatives(x, y), PchipInterpolator(x, y)(x, 1), rtol=1e-9, atol=1e-9)


@given(frontiers(), asymptotes)
def test_interpolation_never_rises(points, asymptote):
    x, y = points
    loss = Frontier(x, y, asymptote).loss(np.linspace(x[0], x[-1], 200))
    assert (np.diff(loss) <= 1e-9).all()


@given(st.floats(0.03, 0.5), st.floats(0, 3), st.floats(0.5, 5))
def test_a_power_law_with_the_asymptote_is_met_exactly_between_and_beyond_the_budgets(exponent, asymptote, height):
    def law(x):
        return asymptote + height * np.exp(-exponent * x)

    x = np.array([0.0, 1.0, 4.0, 9.0])
    frontier = Frontier(x, law(x), asymptote)
    at = np.linspace(-2, 11, 27)
    np.testing.assert_allclose(frontier.loss(at), law(at), rtol=1e-9)
    inside = np.linspace(0.1, 8.9, 20)
    position, side = frontier.crossing(law(inside))
    np.testing.assert_allclose(position, inside, rtol=1e-7)
    assert (side == INSIDE).all()


def test_losses_at_the_knots_are_exact():
    x, y = np.log([1e12, 3.3e12, 7e12]), np.array([3.1, 2.7, 2.65])
    np.testing.assert_allclose(Frontier(x, y, 2.0).loss(x), y, rtol=1e-15)


def test_a_rising_loss_is_replaced_by_the_lowest_so_far():
    frontier = Frontier([0, 1, 2, 3], [3.0, 2.0, 2.5, 1.0])
    assert frontier.losses.tolist() == [3, 2, 2, 1]
    np.testing.assert_allclose(frontier.loss([1.0, 1.5, 2.0]), 2, rtol=1e-15)


def test_beyond_the_ends_the_loss_follows_the_tangent_above_the_asymptote():
    # ln(L - 1) falls by ln 2 from knot to knot, so L - 1 goes on doubling and halving.
    frontier = Frontier([0, 1], [3.0, 2.0], asymptote=1.0)
    np.testing.assert_allclose(frontier.loss([-1.0, -0.5, 1.5, 2.0]), [5.0, 1 + 2**1.5, 1 + 2**-0.5, 1.5])


@given(frontiers(), asymptotes, st.floats(0, 13))
def test_crossing_is_the_first_compute_at_or_below_the_target(points, asymptote, target):
    x, y = points
    frontier = Frontier(x, y, asymptote)
    (position,), (side,) = frontier.crossing([target])
    lowest = np.minimum.accumulate(y)
    if target < lowest[-1]:
        assert (position, side) == (x[-1], NOT_REACHED)
    elif target > y[0]:
        assert (position, side) == (x[0], BEFORE_FIRST)
    else:
        assert side == INSIDE
        assert x[0] <= position <= x[-1]
        assert frontier.loss([position])[0] <= target + 1e-9
        earlier = np.linspace(x[0], position, 50)[:-1]
        assert (frontier.loss(earlier) >= target - 1e-9).all()


def test_crossing_at_a_knot_is_that_knot_bit_for_bit():
    x, y = np.log([1e12, 3.3e12, 7e12]), np.array([3.1, 2.7, 2.65])
    position, side = Frontier(x, y, 2.0).crossing(y)
    assert (position == x).all()
    assert (side == INSIDE).all()


def test_crossing_of_a_plateau_is_its_start():
    position, side = Frontier([0, 1, 2, 3], [3.0, 2.0, 2.0, 1.0]).crossing([2.0])
    assert (position[0], side[0]) == (1.0, INSIDE)


def test_a_target_below_the_asymptote_is_not_reached():
    position, side = Frontier([0, 1, 2], [3.0, 2.5, 2.2], 2.0).crossing([1.0, -1.0])
    assert position.tolist() == [2.0, 2.0]
    assert (side == NOT_REACHED).all()


@given(frontiers(), asymptotes, st.floats(0, 13), st.floats(0.1, 1))
def test_a_frontier_that_is_lower_everywhere_by_a_factor_never_crosses_later(points, asymptote, target, factor):
    x, y = points
    higher, _ = Frontier(x, y, asymptote).crossing([target])
    lower, _ = Frontier(x, asymptote + factor * (y - asymptote), asymptote).crossing([target])
    assert lower[0] <= higher[0] + 1e-9


@pytest.mark.parametrize("budgets", [2, 3, 5])
def test_replicates_are_independent_of_each_other(budgets):
    generator = np.random.default_rng(0)
    x = np.cumsum(generator.uniform(0.5, 2, (20, budgets)), axis=-1)
    y = generator.uniform(1, 4, (20, budgets))
    at, targets = generator.uniform(x.min(), x.max(), (20, 3)), generator.uniform(1, 4, (20, 3))
    together = Frontier(x, y, 0.5)
    position, side = together.crossing(targets)
    for r in range(20):
        alone = Frontier(x[r], y[r], 0.5)
        assert (alone.loss(at[r]) == together.loss(at)[r]).all()
        assert (alone.crossing(targets[r])[0] == position[r]).all()
        assert (alone.crossing(targets[r])[1] == side[r]).all()
