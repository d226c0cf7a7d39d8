import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gains.estimators import Gain, Point, ratio_intervals
from bench.gains.interactions import contributions, interactions
from bench.gains.resampling import Spread
from bench.gains.study import Pair
from bench.gains.tuning import TunedVariant

DEVIATIONS = np.random.default_rng(0).normal(size=(2000, 16))
NAMES = "abcd"


def tuned(innovations):
    return TunedVariant(
        scale="tiny",
        variant="+".join(innovations) or "baseline",
        innovations=tuple(innovations),
        scales=("tiny",) * 2,
        seeds=(0, 1, 2),
        budgets=np.array([1.0, 2.0]),
        rates=np.full(2, 1e-3),
        losses=np.zeros((3, 2)),
        loss_errors=np.zeros(2),
        costs={},
        tuning="single",
    )


def make(cegs, *, baseline=(), noise=None):
    """Gains by variant from {innovations: CEG, or ("least" | "most", bound)}; `noise`: {innovations: deviations}."""
    gains = {}
    for innovations, value in cegs.items():
        variant = tuned(tuple(innovations))
        ceg = lower = upper = None
        if isinstance(value, tuple):
            lower, upper = (value[1], None) if value[0] == "least" else (None, value[1])
        else:
            ceg = value
        spread = None if noise is None or ceg is None else Spread(noise[innovations], 2.0)
        point = Point(1e12, 2.0, ceg, lower_bound=lower, upper_bound=upper, spread=spread)
        if spread is not None:
            point = replace(point, intervals=ratio_intervals(math.log(ceg), spread))
        gains[variant.variant] = Gain(Pair(tuned(tuple(baseline)), variant, True), [point])
    return gains


def subsets(names):
    return ["".join(some) for size in range(1, len(names) + 1) for some in itertools.combinations(names, size)]


def brute_force(names, log_gain):
    """Shapley values: the mean, over all orders of adding, of what each adds."""
    values = dict.fromkeys(names, 0.0)
    for order in itertools.permutations(names):
        for place, name in enumerate(order):
            before, after = ("".join(sorted(order[:end])) for end in (place, place + 1))
            values[name] += (log_gain[after] - log_gain.get(before, 0.0)) / math.factorial(len(names))
    return values


def test_gains_that_multiply_interact_in_nothing():
    (entry,) = interactions(make({"a": 2.0, "b": 1.5, "ab": 3.0}))
    assert (entry["variant"], entry["innovations"]) == ("a+b", ["a", "b"])
    assert (entry["joint"], entry["product"]) == (pytest.approx(3.0), pytest.approx(3.0))
    assert entry["ratio"] == pytest.approx(1.0)
    assert (entry["lower_bound"], entry["upper_bound"], entry["interval"], entry["p_value"]) == (None,) * 4
    assert entry["verdict"] == "inconclusive"


def test_the_papers_three_innovations_are_worth_less_together_than_their_product():
    # Published at its compact scale: 1.063 x 1.870 x 1.836 = 3.65 against 3.483.
    (entry,) = interactions(make({"a": 1.063, "b": 1.870, "c": 1.836, "abc": 3.483}))
    assert entry["product"] == pytest.approx(3.65, abs=0.005)
    assert entry["ratio"] == pytest.approx(3.483 / 3.65, abs=0.002)


@pytest.mark.parametrize(
    ("joint", "verdict"), [(4.0, "more than the product"), (2.0, "less than the product"), (3.01, "inconclusive")]
)
def test_the_interval_counts_the_noise_of_all(joint, verdict):
    noise = {"a": 0.01 * DEVIATIONS[:, 0], "b": 0.02 * DEVIATIONS[:, 1], "ab": 0.02 * DEVIATIONS[:, 2]}
    (entry,) = interactions(make({"a": 2.0, "b": 1.5, "ab": joint}, noise=noise))
    error = (noise["ab"] - noise["a"] - noise["b"]).std()
    assert error == pytest.approx(0.03, rel=0.05)
    expected = np.log(joint / 3) + np.array([-1, 1]) * 4.302653 * error
    assert np.log(entry["interval"]) == pytest.approx(expected, rel=1e-5)
    assert entry["verdict"] == verdict
    assert (entry["p_value"] < 0.05) == (verdict != "inconclusive")


def test_what_the_gains_share_cancels():
    shared = 0.5 * DEVIATIONS[:, 0]
    (entry,) = interactions(make({"a": 2.0, "b": 1.5, "ab": 3.3}, noise={"a": shared, "b": 0 * shared, "ab": shared}))
    assert entry["interval"] == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize(
    ("cegs", "lower", "upper"),
    [
        ({"a": 2.0, "b": 1.5, "ab": ("least", 6.0)}, 2.0, None),
        ({"a": 2.0, "b": 1.5, "ab": ("most", 1.5)}, None, 0.5),
        ({"a": ("least", 2.0), "b": 1.5, "ab": 6.0}, None, 2.0),
        ({"a": ("most", 1.0), "b": 1.5, "ab": 6.0}, 4.0, None),
        ({"a": ("most", 1.0), "b": 1.5, "ab": ("least", 6.0)}, 4.0, None),
        ({"a": ("least", 2.0), "b": ("most", 1.5), "ab": 6.0}, None, None),
    ],
)
def test_bounds_give_a_bound_of_the_ratio(cegs, lower, upper):
    (entry,) = interactions(make(cegs))
    assert entry["ratio"] is None
    assert entry["lower_bound"] == (None if lower is None else pytest.approx(lower))
    assert entry["upper_bound"] == (None if upper is None else pytest.approx(upper))
    assert (entry["interval"], entry["p_value"], entry["verdict"]) == (None, None, "inconclusive")


def test_a_combination_whose_parts_were_not_all_trained_is_not_compared():
    assert interactions(make({"a": 2.0, "ab": 3.0})) == []
    assert interactions(make({"a": 2.0, "b": 1.5})) == []


def test_a_part_without_an_interval_leaves_the_ratio_without_one():
    noise = {"a": 0.01 * DEVIATIONS[:, 0], "ab": 0.01 * DEVIATIONS[:, 1], "b": 0.01 * DEVIATIONS[:, 2]}
    gains = make({"a": 2.0, "b": 1.5, "ab": 3.3}, noise=noise)
    gains["b"] = Gain(gains["b"].pair, [replace(gains["b"].points[0], spread=None)])
    (entry,) = interactions(gains)
    assert entry["ratio"] == pytest.approx(1.1)
    assert (entry["interval"], entry["p_value"], entry["verdict"]) == (None, None, "inconclusive")


def test_only_what_a_variant_adds_to_the_baseline_counts():
    gains = make({"ra": 2.0, "rb": 1.5, "rab": 3.3, "ab": 9.0}, baseline="r")
    (entry,) = interactions(gains)
    assert (entry["variant"], entry["innovations"]) == ("r+a+b", ["a", "b"])
    assert entry["ratio"] == pytest.approx(1.1)
    assert {share["innovation"] for share in contributions(gains)} == {"a", "b"}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_contributions_are_shapley_values_over_all_orders(count):
    generator = np.random.default_rng(count)
    names = NAMES[:count]
    log_gain = {subset: generator.normal() for subset in subsets(names)}
    noise = {subset: 0.01 * DEVIATIONS[:, place] for place, subset in enumerate(log_gain)}
    entries = contributions(make({subset: math.exp(value) for subset, value in log_gain.items()}, noise=noise))
    found = {entry["innovation"]: entry for entry in entries if entry["variant"] == "+".join(names)}
    assert {entry["method"] for entry in found.values()} == {"shapley"}
    for name, value in brute_force(names, log_gain).items():
        assert math.log(found[name]["ceg"]) == pytest.approx(value)
    # Its noise is the same sum of those of all, so a replicate's value is the Shapley value of the replicate.
    replicates = [brute_force(names, {subset: noise[subset][row] for subset in noise}) for row in range(200)]
    for name in names:
        low, high = np.log(found[name]["interval"])
        error = np.std([replicate[name] for replicate in replicates])
        assert (high - low) / 2 / 4.302653 == pytest.approx(error, rel=0.15)


@given(st.lists(st.floats(0.05, 20), min_size=7, max_size=7))
def test_factors_multiply_to_the_joint_gain(cegs):
    gains = dict(zip(subsets("abc"), cegs, strict=True))
    factors = [entry["ceg"] for entry in contributions(make(gains)) if entry["variant"] == "a+b+c"]
    assert len(factors) == 3
    assert math.prod(factors) == pytest.approx(gains["abc"])


@given(st.lists(st.floats(0.05, 20), min_size=3, max_size=3))
def test_independent_innovations_contribute_what_they_gain_alone(cegs):
    alone = dict(zip("abc", cegs, strict=True))
    gains = {subset: math.prod(alone[name] for name in subset) for subset in subsets("abc")}
    for entry in contributions(make(gains)):
        assert entry["ceg"] == pytest.approx(alone[entry["innovation"]])


def test_without_all_subsets_it_is_what_leaving_one_out_loses():
    entries = contributions(make({"ab": 3.0, "ac": 4.0, "abc": 8.0}))
    found = {entry["innovation"]: entry for entry in entries}
    assert {entry["method"] for entry in entries} == {"leave_one_out"}
    assert found["c"]["ceg"] == pytest.approx(8 / 3)
    assert found["b"]["ceg"] == pytest.approx(2.0)
    assert "a" not in found  # b and c were not trained without it


def test_a_bound_among_the_subsets_bounds_the_shares():
    entries = contributions(make({"a": ("least", 4.0), "b": 2.0, "ab": 8.0}))
    shares = {entry["innovation"]: entry for entry in entries}
    # ln CEG of a: (ln A + ln 8 - ln 2) / 2, and of b: (ln 2 + ln 8 - ln A) / 2, with A at least 4.
    assert (shares["a"]["ceg"], shares["b"]["ceg"]) == (None, None)
    assert shares["a"]["lower_bound"] == pytest.approx(4.0)
    assert shares["b"]["upper_bound"] == pytest.approx(2.0)
    assert (shares["a"]["upper_bound"], shares["b"]["lower_bound"]) == (None, None)
