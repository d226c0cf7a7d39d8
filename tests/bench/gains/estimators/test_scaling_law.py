import math

import numpy as np
import pytest

from bench.gains.estimators.scaling_law import FARTHEST, PINNED, Estimator
from bench.gains.sources.runs import read_study
from bench.gains.study import ALL_SCALES
from tests.bench.gains.answers import compute_from, only

BUDGETS = 1e18 * 4.0 ** np.arange(5)
E = 1.7
SHARED, FREE = "L = E + K C^-gamma", "L = E + K C^-gamma, gamma of each variant"


def law(compute=BUDGETS, gain=1.0, exponent=0.16):
    return E + 1.2 * (np.asarray(compute) * gain / 1e18) ** -exponent


def compute(results, **options):
    return compute_from(results, **{"estimator": "scaling_law", **options})


@pytest.fixture
def noise():
    """(seeds, K) of each of several variants."""
    return np.random.default_rng(0).normal(0, 0.003, (4, 3, 5))


def test_equal_exponents_are_recovered(make_results):
    variants = {"baseline": law(), "rope": law(gain=2.0), "mqa": law(gain=0.5)}
    gains = compute(make_results({"tiny": variants}, BUDGETS))
    for variant, truth in (("rope", 2.0), ("mqa", 0.5)):
        gain = only(gains["gains"], variant=variant, axis="model_flops")
        assert [point["ceg"] for point in gain["curve"]] == pytest.approx([truth] * 5, rel=1e-6)
        assert only(gains["classes"], variant=variant)["slope"]["value"] == pytest.approx(0, abs=1e-5)
    for name in (SHARED, FREE):
        fit = only(gains["fits"], law=name, axis="model_flops")
        assert fit["parameters"]["E"] == pytest.approx(E, rel=1e-6)
        assert fit["converged"] is True
        assert 1 < fit["best_starts"] <= fit["starts"]
        for variant, gain in (("baseline", 1.0), ("rope", 2.0), ("mqa", 0.5)):
            assert fit["variants"][variant]["gamma"] == pytest.approx(0.16, rel=1e-5)
            assert fit["variants"][variant]["K"] == pytest.approx(1.2 * (1e18 / gain) ** 0.16, rel=1e-4)
    assert only(gains["fits"], law=SHARED, axis="model_flops")["parameters"]["gamma"] == pytest.approx(0.16, rel=1e-6)


def test_unequal_exponents_give_the_closed_form_at_every_budget(make_results):
    gains = compute(make_results({"tiny": {"baseline": law(), "rope": law(gain=1.5, exponent=0.18)}}, BUDGETS))
    gain = only(gains["gains"], axis="model_flops")
    for point, budget in zip(gain["curve"], BUDGETS, strict=True):
        needed = ((law(budget) - E) / 1.2) ** (-1 / 0.18) * 1e18 / 1.5
        assert point["target_loss"] == pytest.approx(law(budget), rel=1e-7)
        assert point["ceg"] == pytest.approx(budget / needed, rel=1e-5)
    slope = only(gains["classes"], variant="rope")["slope"]
    assert slope["value"] == pytest.approx(0.18 / 0.16 - 1, rel=1e-4)


def test_gains_beyond_the_data_are_marked(make_results):
    # The variant's own budgets reach the baseline's first losses, and those below its last, only past their ends.
    gains = compute(make_results({"tiny": {"baseline": law(), "rope": law(gain=8.0), "mqa": law(gain=0.3)}}, BUDGETS))
    rope = only(gains["gains"], variant="rope", axis="model_flops")
    assert [point["extrapolated"] for point in rope["curve"]] == [True, True, False, False, False]
    mqa = only(gains["gains"], variant="mqa", axis="model_flops")
    assert [point["extrapolated"] for point in mqa["curve"]] == [False, False, False, False, True]
    assert mqa["ceg"] == pytest.approx(0.3, rel=1e-5)


def test_a_variant_like_the_baseline_is_nowhere_beyond_the_data(make_results, noise):
    losses = law() + noise[0]
    gains = compute(make_results({"tiny": {"baseline": losses, "flash_attention": losses}}, BUDGETS))
    gain = only(gains["gains"], axis="model_flops")
    assert [point["extrapolated"] for point in gain["curve"]] == [False] * 5
    assert [gain["ceg"], *gain["interval"]] == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize(("gain", "bound"), [(1e-4, "upper_bound"), (1e5, "lower_bound")])
def test_what_lies_too_far_beyond_the_data_is_only_bounded(make_results, gain, bound):
    gains = compute(make_results({"tiny": {"baseline": law(), "rope": law(gain=gain)}}, BUDGETS))
    found = only(gains["gains"], axis="model_flops")
    assert (found["ceg"], found["interval"]) == (None, None)
    assert {name for name in ("lower_bound", "upper_bound") if found[name] is not None} == {bound}
    assert found[bound] == pytest.approx(1.0 if bound == "upper_bound" else BUDGETS[-1] / BUDGETS[0])
    assert FARTHEST < 1e4


def test_a_bound_is_on_the_side_on_which_the_variant_was_not_trained(make_study):
    # It gains, but its budgets are so small that its law would have to be followed a thousandfold upwards.
    small = BUDGETS / 1e6
    study = make_study(law(), law(small, 2.0), budgets=BUDGETS, variant_budgets=small)
    point = Estimator(study).estimate("tiny", "model_flops").gains["rope"].points[-1]
    assert (point.ceg, point.lower_bound) == (None, None)
    assert point.upper_bound == pytest.approx(BUDGETS[-1] / small[-1])


def test_the_unit_of_compute_does_not_matter(make_results, noise):
    variants = {"baseline": law() + noise[0], "rope": law(gain=2.0, exponent=0.17) + noise[1]}
    one, other = (
        only(compute(make_results({"tiny": variants}, BUDGETS * unit))["gains"], axis="model_flops")
        for unit in (1.0, 1e-15)
    )
    for name in ("ceg", "p_value", "seed_error"):
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert one["interval"] == pytest.approx(other["interval"], rel=1e-4)


def test_too_few_budgets_are_one_sentence_and_the_others_still_come_out(study_folder):
    for seed in (0, 1):
        study_folder.add("baseline", law().tolist(), seed=seed, budgets=BUDGETS)
        study_folder.add("rope", law(gain=2.0).tolist(), seed=seed, budgets=BUDGETS)
        study_folder.add("mqa", law(gain=2.0)[:2].tolist(), seed=seed, budgets=BUDGETS[:2])
    gains = compute(read_study(study_folder.path))
    assert {gain["variant"] for gain in gains["gains"]} == {"rope"}
    assert [warning for warning in gains["warnings"] if "scaling_law needs" in warning] == [
        "mqa at tiny: scaling_law needs 3 budgets, to tell an asymptote from an exponent, and found 2; no gain of mqa. "
        "Train more, or use estimator=crossing."
    ]


def test_the_gains_with_the_asymptote_pinned_elsewhere(make_results):
    gains = compute(make_results({"tiny": {"baseline": law(), "rope": law(gain=2.0)}}, BUDGETS))
    lowest = law(gain=2.0)[-1]
    for fit in gains["fits"]:
        assert [row["E"] for row in fit["pinned"]] == pytest.approx([fraction * lowest for fraction in PINNED])
        exponents = [row["gamma"] for row in fit["pinned"]]
        assert exponents == sorted(exponents)
        below, above = (row for row in fit["pinned"] if abs(row["E"] - E) < 0.25 * lowest)
        assert below["E"] < E < above["E"]
        assert all(set(row["gains"]) == {"rope"} for row in fit["pinned"])
    shared = only(gains["fits"], law=SHARED, axis="model_flops")
    assert all(row["gains"]["rope"] == pytest.approx(2.0, rel=0.1) for row in shared["pinned"])


def test_intervals_are_students_on_replicates_of_seeds(make_results, noise):
    variants = {"baseline": law() + noise[0], "rope": law(gain=2.0) + noise[1]}
    gains = compute(make_results({"tiny": variants}, BUDGETS))
    gain = only(gains["gains"], axis="model_flops")
    for name, student in (("interval", 4.302653), ("interval_90", 2.919986)):
        low, high = np.log(gain[name])
        assert (low + high) / 2 == pytest.approx(math.log(gain["ceg"]))
        assert (high - low) / 2 == pytest.approx(student * gain["seed_error"], rel=1e-5)
    # By the delta method: noise of 0.003 in each result of a curve that falls by gamma (L - E) per unit of ln C.
    assert 0.1 < gain["seed_error"] / (0.003 * math.sqrt(2 / 3) / (0.16 * (law()[-1] - E))) < 3
    fit = only(gains["fits"], law=SHARED, axis="model_flops")
    low, high = fit["intervals"]["E"]
    assert low <= fit["parameters"]["E"] <= high
    assert fit["replicates_converged"] >= 0.95


def test_what_a_seed_does_to_all_does_not_widen_the_gain(make_results):
    shared = np.array([[-0.02], [0.0], [0.02]])
    variants = {"baseline": law() + shared, "rope": law(gain=2.0) + shared}
    gain = only(compute(make_results({"tiny": variants}, BUDGETS))["gains"], axis="model_flops")
    low, high = gain["interval"]
    assert 1.9 < low < 2.0 < high < 2.1


def test_one_seed_has_gains_and_fits_without_intervals(make_results):
    gains = compute(make_results({"tiny": {"baseline": law(), "rope": law(gain=2.0)}}, BUDGETS))
    gain = only(gains["gains"], axis="model_flops")
    assert (gain["interval"], gain["p_value"], gain["seed_error"]) == (None, None, None)
    fit = only(gains["fits"], law=SHARED, axis="model_flops")
    assert set(fit["intervals"].values()) == {None}
    assert fit["replicates_converged"] is None


def test_exponents_that_differ_are_found_to(make_results, noise):
    variants = {
        "baseline": law() + noise[0] / 10,
        "rope": law(gain=1.5, exponent=0.2) + noise[1] / 10,
        "mqa": law(gain=1.5, exponent=0.13) + noise[2] / 10,
    }
    gains = compute(make_results({"tiny": variants}, BUDGETS))
    verdicts = {entry["variant"]: entry["slope"]["verdict"] for entry in gains["classes"]}
    assert verdicts == {"rope": "compute-dependent", "mqa": "fading"}


def test_a_ladder_of_scales_with_one_budget_each_is_fitted_together(make_results):
    scales = {f"s{k}": {"baseline": [law()[k]], "rope": [law(gain=2.0)[k]]} for k in range(5)}
    gains = compute(make_results(scales, {f"s{k}": [BUDGETS[k]] for k in range(5)}))
    gain = only(gains["gains"], axis="model_flops")
    assert gain["scale"] == ALL_SCALES
    assert gain["ceg"] == pytest.approx(2.0, rel=1e-5)
    assert [fit["scale"] for fit in gains["fits"] if fit["axis"] == "model_flops"] == [ALL_SCALES] * 2


@pytest.mark.parametrize(
    ("baseline", "variant"),
    [
        ([3.0, 3.1, 3.2, 3.3], [3.0, 2.5, 2.4, 2.3]),
        ([3.0, 2.5, 2.4, 2.3], [2.3, 2.4, 2.5, 3.0]),
        ([3.0, 2.5, 2.4, 2.3], [2.4, 2.4, 2.4, 2.4]),
        ([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]),
        ([9.0, 2.5, 2.4, 2.399], [2.9, 2.8, 2.2, 0.01]),
    ],
)
@pytest.mark.parametrize("noisy", [0.0, 0.3])
def test_losses_that_no_power_law_fits_still_give_finite_numbers(make_results, baseline, variant, noisy):
    noise = noisy * np.random.default_rng(0).uniform(0, 1, (2, 2, 4))
    compute(
        make_results(
            {"tiny": {"baseline": baseline + noise[0], "rope": variant + noise[1]}}, 1e18 * 4.0 ** np.arange(4)
        )
    )
