import numpy as np
import pytest

from bench.gains.classes import side_of_one, sign, slope, slope_verdict
from bench.gains.estimators import Point
from bench.gains.estimators.crossing import Estimator

BUDGETS = list(1e12 * 2.0 ** np.arange(9))


def point(ceg=None, interval=None, lower=None, upper=None):
    return Point(
        baseline_compute=1e12,
        target_loss=2.0,
        ceg=ceg,
        lower_bound=lower,
        upper_bound=upper,
        interval=interval,
        deviations=None,
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (point(2.0, (1.5, 2.5)), "independent"),
        (point(2.0, (1.01, None)), "independent"),
        (point(lower=4.0, interval=(4.0, None)), "independent"),
        (point(lower=4.0, interval=(1.3, None)), "independent"),
        (point(lower=4.0, interval=(0.9, None)), "inconclusive"),
        (point(lower=4.0), "inconclusive"),
        (point(2.0), "inconclusive"),
        (point(1.0, (1.0, 1.0)), "inconclusive"),
        (point(2.0, (None, None)), "inconclusive"),
        (point(0.9, (0.8, 1.05)), "inconclusive"),
        (point(0.5, (0.4, 0.6)), "dependent"),
        (point(upper=1.0, interval=(None, 1.0)), "dependent"),
        (point(upper=1.004, interval=(None, 1.004)), "dependent"),
        (point(upper=1.02, interval=(None, 1.02)), "inconclusive"),
        (point(upper=1.0, interval=(None, 1.005)), "inconclusive"),
        (None, "inconclusive"),
    ],
)
def test_sign(found, verdict):
    result = sign(found, "tiny")
    assert (result["verdict"], result["scale"]) == (verdict, "tiny")
    if found is not None:
        assert side_of_one(found) == {"independent": 1, "dependent": -1, "inconclusive": 0}[verdict]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.2, 0.5, "compute-dependent"),
        (0.05, 0.5, "compute-dependent"),
        (0.05, None, "compute-dependent"),
        (-0.5, -0.05, "fading"),
        (-0.1, 0.1, "scale-invariant"),
        (0.02, 0.05, "scale-invariant"),
        (0.0, 0.0, "scale-invariant"),
        (-0.05, 0.11, "inconclusive"),
        (-0.05, None, "inconclusive"),
    ],
)
def test_slope_verdict(low, high, verdict):
    assert slope_verdict(low, high) == verdict


def law(exponent, gain=1.0):
    return 1.8 + 1.2 * (np.array(BUDGETS) * gain / 1e12) ** -exponent


def slope_of(make_study, baseline, variant):
    study, *pair = make_study(baseline, variant, budgets=BUDGETS)
    return slope({"tiny": Estimator(study).estimate(*pair, "model_flops")}, study, len(pair[0].seeds))


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(0.14, "fading"), (0.18, "scale-invariant"), (0.25, "compute-dependent")]
)
def test_the_slope_of_power_laws_is_the_ratio_of_exponents_less_one(make_study, exponent, verdict):
    noise = np.random.default_rng(0).normal(0, 0.0005, (3, 9))
    result = slope_of(make_study, law(0.18), law(exponent, 2.0) + noise)
    assert result["value"] == pytest.approx(exponent / 0.18 - 1, abs=0.03)
    low, high = result["interval"]
    assert low < result["value"] < high
    assert result["verdict"] == verdict


def test_the_interval_of_the_slope_covers_the_truth(make_study):
    generator = np.random.default_rng(0)
    covered, studies = 0, 100
    for _ in range(studies):
        noise = generator.normal(0, 0.002, (2, 3, 9))
        low, high = slope_of(make_study, law(0.18) + noise[0], law(0.18, 4.0) + noise[1])["interval"]
        covered += low <= 0 <= high
    assert 0.88 <= covered / studies <= 1.0


def test_an_identical_variant_is_scale_invariant(make_study):
    result = slope_of(make_study, law(0.18) + np.zeros((3, 1)), law(0.18) + np.zeros((3, 1)))
    assert result == {"verdict": "scale-invariant", "value": 0.0, "interval": [0.0, 0.0]}


def test_points_of_all_scales_lie_on_one_line(make_study):
    study, *pair = make_study(law(0.18) + np.zeros((2, 1)), law(0.18), budgets=BUDGETS)
    flat = Estimator(study).estimate(*pair, "model_flops")[-1]
    still = np.zeros(500)
    small = Point(1e12, 3.0, 1.0, None, None, None, still)
    large = Point(1e14, 2.0, 10.0, None, None, None, still)
    # Ten times the gain for ten times the variant's compute.
    result = slope({"tiny": [small], "big": [large]}, study, 2)
    assert result["value"] == pytest.approx(1.0)
    assert result["verdict"] == "compute-dependent"
    assert flat.ceg == 1.0


def test_one_seed_gives_a_slope_without_an_interval(make_study):
    result = slope_of(make_study, law(0.18), law(0.25, 2.0))
    assert (result["verdict"], result["interval"]) == ("inconclusive", None)
    assert result["value"] == pytest.approx(0.25 / 0.18 - 1, abs=0.03)


@pytest.mark.parametrize("points", [[], [point(2.0, (1.5, 2.5))], [point(lower=4.0)] * 3])
def test_fewer_than_two_points_give_no_slope(make_study, points):
    study, *_ = make_study([3, 2.5, 2.3, 2.2], [3, 2.5, 2.3, 2.2])
    assert slope({"tiny": points}, study, 3) == {"verdict": "inconclusive", "value": None, "interval": None}
