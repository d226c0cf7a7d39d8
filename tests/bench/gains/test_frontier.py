import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from bench.gains.frontier import BEFORE_FIRST, INSIDE, NOT_REACHED, Frontier, pchip_derivatives

losses = st.lists(st.floats(0.5, 12), min_size=2, max_size=8)


@st.composite
def frontiers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    y = np.array(draw(losses))
    widths = draw(st.lists(st.floats(0.05, 5), min_size=len(y) - 1, max_size=len(y) - 1))
    return np.concatenate([[0.0], np.cumsum(widths)]) + draw(st.floats(0, 50)), y


@given(frontiers(), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_interpolation_is_scipys_pchip(points, fractions):
    x, y = points
    at = x[0] + np.array(fractions) * (x[-1] - x[0])
    scipys = PchipInterpolator(x, np.minimum.accumulate(y))
    frontier = Frontier(x, y)
    np.testing.assert_allclose(frontier.loss(at), scipys(at), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(frontier.slope(at), scipys(at, 1), rtol=1e-6, atol=1e-6)


@given(frontiers())
def test_derivatives_are_scipys_for_any_data(points):
    x, y = points
    np.testing.assert_allclose(pchip_derivatives(x, y), PchipInterpolator(x, y)(x, 1), rtol=1e-9, atol=1e-9)


@given(frontiers())
def test_interpolation_never_rises(points):
    x, y = points
    loss = Frontier(x, y).loss(np.linspace(x[0], x[-1], 200))
    assert (np.diff(loss) <= 1e-9).all()


def test_losses_at_the_knots_are_exact():
    x, y = np.log([1e12, 3.3e12, 7e12]), np.array([3.1, 2.7, 2.65])
    assert (Frontier(x, y).loss(x) == y).all()


def test_a_rising_loss_is_replaced_by_the_lowest_so_far():
    frontier = Frontier([0, 1, 2, 3], [3.0, 2.0, 2.5, 1.0])
    assert frontier.y.tolist() == [3, 2, 2, 1]
    assert frontier.loss([1.0, 1.5, 2.0]).tolist() == [2, 2, 2]


def test_beyond_the_ends_the_loss_follows_the_tangent():
    frontier = Frontier([0, 1], [3.0, 2.0])
    np.testing.assert_allclose(frontier.loss([-0.5, 1.5]), [3.5, 1.5])


@given(frontiers(), st.floats(0, 13))
def test_crossing_is_the_first_compute_at_or_below_the_target(points, target):
    x, y = points
    frontier = Frontier(x, y)
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
    position, side = Frontier(x, y).crossing(y)
    assert (position == x).all()
    assert (side == INSIDE).all()


def test_crossing_of_a_plateau_is_its_start():
    position, side = Frontier([0, 1, 2, 3], [3.0, 2.0, 2.0, 1.0]).crossing([2.0])
    assert (position[0], side[0]) == (1.0, INSIDE)


@given(frontiers(), st.floats(0, 13), st.floats(0, 3))
def test_a_frontier_that_is_lower_everywhere_by_a_constant_never_crosses_later(points, target, shift):
    x, y = points
    higher, _ = Frontier(x, y).crossing([target])
    lower, _ = Frontier(x, y - shift).crossing([target])
    assert lower[0] <= higher[0] + 1e-12


@pytest.mark.parametrize("budgets", [2, 3, 5])
def test_replicates_are_independent_of_each_other(budgets):
    generator = np.random.default_rng(0)
    x = np.cumsum(generator.uniform(0.5, 2, (20, budgets)), axis=-1)
    y = generator.uniform(1, 4, (20, budgets))
    at, targets = generator.uniform(x.min(), x.max(), (20, 3)), generator.uniform(1, 4, (20, 3))
    together = Frontier(x, y)
    position, side = together.crossing(targets)
    for r in range(20):
        alone = Frontier(x[r], y[r])
        assert (alone.loss(at[r]) == together.loss(at)[r]).all()
        assert (alone.crossing(targets[r])[0] == position[r]).all()
        assert (alone.crossing(targets[r])[1] == side[r]).all()
