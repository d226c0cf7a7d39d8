import numpy as np
import polars as pl
import pytest
from scipy import stats

from bench.errors import UserError
from bench.gains.sources import Results
from bench.gains.sources.runs import read_study
from bench.gains.study import ALL_SCALES, AXES, load_study

LOSSES = [3.0, 2.5, 2.3, 2.2]


def load(study_folder, **options):
    return load_study(
        read_study(study_folder.path), **{"baseline": "baseline", "replicates": 200, "seed": 0, **options}
    )


def test_every_cost_axis_is_measured(study_folder):
    study_folder.add("baseline", LOSSES)
    study = load(study_folder)
    assert study.axes == list(AXES)
    assert study.warnings == []
    costs = study.tuned["tiny", "baseline"].costs
    np.testing.assert_allclose(costs["model_flops_with_optimizer"], 1.01 * costs["model_flops"])


@pytest.mark.parametrize("value", [None, 0, -1, float("nan"), float("inf")])
def test_an_axis_without_a_number_in_every_result_is_left_out(study_folder, value):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES, change=lambda row: {**row, "joules": value} if row["budget"] > 1e13 else row)
    study = load(study_folder)
    assert study.axes == [axis for axis in AXES if axis != "joules"]
    assert study.warnings == ["The axis joules is left out: 2 of 8 results have no number above 0 there."]


def test_axes_that_nobody_measured_are_named_in_one_sentence(study_folder):
    study_folder.add("baseline", LOSSES, change=lambda row: {**row, "joules": None, "grams_co2e": None})
    study = load(study_folder)
    assert study.axes == [axis for axis in AXES if axis not in ("joules", "grams_co2e")]
    assert study.warnings == ["Not measured in these runs: joules, grams_co2e."]


def test_no_axis_at_all(study_folder):
    study_folder.add("baseline", LOSSES, change=lambda row: {"budget": row["budget"], "val_loss": row["val_loss"]})
    with pytest.raises(UserError, match="no cost axis has a number above 0 in every result"):
        load(study_folder)


def test_measured_axes_of_two_devices_are_flagged(study_folder):
    study_folder.add("baseline", LOSSES, device="cpu")
    study_folder.add("rope", LOSSES, device="H100")
    assert load(study_folder).warnings == [
        "Gains in seconds, joules, dollars, grams_co2e compare runs of different devices (H100, cpu) and say little."
    ]


def test_what_the_source_found_comes_first_among_the_warnings(study_folder):
    study_folder.add("baseline", LOSSES, change=lambda row: {**row, "joules": None})
    study_folder.add("rope", LOSSES, state="FAILED")
    failed, without, unmeasured = load(study_folder).warnings
    assert failed.startswith("1 of 2 trajectories failed")
    assert without == "rope at tiny: none of its trajectories is done, so it has no gain."
    assert unmeasured.startswith("Not measured")


def test_scales_are_ordered_by_model_size(study_folder):
    for scale, parameters in (("a_big", 9000), ("b_tiny", 10), ("c_small", 500)):
        study_folder.add("baseline", LOSSES, scale=scale, parameters=parameters)
    assert load(study_folder).scales == ["b_tiny", "c_small", "a_big", ALL_SCALES]


def test_without_runs_that_say_so_the_size_of_a_model_is_what_its_flops_are_for_a_token(make_results):
    results = make_results(
        {"a": {"baseline": LOSSES}, "b": {"baseline": LOSSES}}, params=lambda scale, *_: {"a": 9e8, "b": 1e7}[scale]
    )
    for run in results.runs:
        run["parameters"] = None
    assert load_study(results, baseline="baseline", replicates=200, seed=0).scales == ["b", "a", ALL_SCALES]


def test_a_scale_without_a_baseline(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES, scale="small")
    study = load(study_folder)
    assert study.scales == ["tiny"]
    assert study.warnings == ["small: the baseline baseline has no usable results there, so it has no gains."]


def test_pairs_have_the_seeds_that_both_have(study_folder):
    for seed in (0, 1, 2):
        study_folder.add("baseline", np.add(LOSSES, seed / 100).tolist(), seed=seed)
    for seed in (1, 2, 5):
        study_folder.add("rope", np.add(LOSSES, seed / 10).tolist(), seed=seed)
    study = load(study_folder)
    pair = study.pair("tiny", "rope")
    assert pair.baseline.seeds == pair.variant.seeds == (1, 2)
    assert (pair.seeds, pair.paired) == (2, True)
    np.testing.assert_allclose(pair.baseline.losses[:, 0], [3.01, 3.02])
    np.testing.assert_allclose(pair.variant.losses[:, 0], [3.1, 3.2])
    assert study.warnings == ["rope at tiny: compared with baseline on the 2 seeds that both have; 2 not used."]


@pytest.mark.parametrize("seeds", [(10, 11), (2, 11)])
def test_with_fewer_than_two_shared_seeds_all_of_both_are_compared_as_independent(study_folder, seeds):
    for seed in (0, 1, 2):
        study_folder.add("baseline", LOSSES, seed=seed)
    for seed in seeds:
        study_folder.add("rope", LOSSES, seed=seed)
    study = load(study_folder)
    pair = study.pair("tiny", "rope")
    assert (pair.baseline.seeds, pair.variant.seeds) == ((0, 1, 2), seeds)
    assert (pair.seeds, pair.paired) == (2, False)
    assert study.warnings == [
        "rope at tiny: it shares fewer than two seeds with baseline, so they are compared as independent samples, with "
        "wider intervals. Train the same seeds."
    ]


@pytest.mark.parametrize(("seeds", "shared"), [((0,), True), ((1,), False)])
def test_one_seed_is_flagged_once(study_folder, seeds, shared):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES, seed=seeds[0])
    study = load(study_folder)
    assert study.pair("tiny", "rope") is study.pair("tiny", "rope")
    assert (study.pair("tiny", "rope").seeds, study.pair("tiny", "rope").paired) == (1, shared)
    assert study.warnings == [
        "rope at tiny: one seed only, so its gains have no interval. Train two or more, better three."
    ]


def test_paired_spread_is_that_of_differences_and_unpaired_that_of_both(study_folder):
    generator = np.random.default_rng(0)
    samples = generator.normal(loc=[[[0.0]], [[3.0]]], size=(2, 6, 1))
    for seed in range(6):
        study_folder.add("baseline", LOSSES, seed=seed)
        study_folder.add("rope", LOSSES, seed=seed)
        study_folder.add("mqa", LOSSES, seed=seed + 10)
    study = load(study_folder, replicates=40_000)
    for variant, expected, freedom in (
        ("rope", stats.sem(samples[1] - samples[0])[0], 5),
        ("mqa", np.hypot(*stats.sem(samples, axis=1)[:, 0]), stats.ttest_ind(*samples, equal_var=False).df[0]),
    ):
        pair = study.pair("tiny", variant)
        moved = [
            study.resample(tuned, np.broadcast_to(sample, (6, 4))) - sample.mean()
            for tuned, sample in zip((pair.baseline, pair.variant), samples, strict=True)
        ]
        spread = pair.spread(*moved)
        np.testing.assert_allclose(spread.error, expected, rtol=0.02)
        np.testing.assert_allclose(spread.freedom, freedom, rtol=0.02)


def test_a_study_without_a_finished_trajectory(study_folder):
    study_folder.add("baseline", LOSSES, state=None)
    with pytest.raises(UserError, match="has no finished trajectory: train the study first"):
        load(study_folder)


def test_a_study_without_its_baseline(study_folder):
    study_folder.add("rope", LOSSES)
    study_folder.add("mqa", LOSSES)
    with pytest.raises(UserError, match=r"the baseline baseline has no finished trajectory in .*; there are mqa, rope"):
        load(study_folder)


def test_a_baseline_that_cannot_be_used_says_why(study_folder):
    study_folder.add("baseline", [3.0], budgets=[1e12])
    with pytest.raises(UserError, match="the baseline baseline cannot be used: baseline at tiny: results at 1 budget"):
        load(study_folder)


def test_too_few_replicates(study_folder):
    study_folder.add("baseline", LOSSES)
    with pytest.raises(UserError, match="replicates must be at least 100; it is 10"):
        load(study_folder, replicates=10)


def test_two_budgets_are_few_and_one_is_too_few(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", [3.0, 2.5], budgets=[1e12, 2e12])
    study_folder.add("mqa", [3.0], budgets=[1e12])
    study = load(study_folder)
    assert study.variants("tiny") == ["rope"]
    assert sorted(study.warnings) == [
        "mqa at tiny: results at 1 budget make no curve; it is left out. Train at least three.",
        "rope at tiny: only two budgets; the curve between them is taken to be the simplest. Train three.",
    ]


def test_a_loss_that_rises_with_compute_is_named(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", [3.0, 2.5, 2.6, 2.7])
    assert load(study_folder).warnings == [
        "rope at tiny: the loss is higher at budget 1.6e+13, 6.4e+13 than at the one before; "
        "the lowest so far is used there."
    ]


LADDER = {"a": [1e12], "b": [8e12], "c": [64e12]}


def ladder(losses):
    """{scale: {variant: [loss]}} from {variant: losses at a, b, c}."""
    return {scale: {variant: [line[k]] for variant, line in losses.items()} for k, scale in enumerate("abc")}


def load_table(results, **options):
    return load_study(results, **{"baseline": "baseline", "replicates": 200, "seed": 0, **options})


def test_a_ladder_with_one_budget_a_scale_is_one_curve(make_results):
    study = load_table(make_results(ladder({"baseline": [3.0, 2.6, 2.3], "rope": [2.9, 2.5, 2.2]}), LADDER))
    assert study.scales == [ALL_SCALES]
    (pair,) = study.comparisons(ALL_SCALES, "model_flops")
    assert pair.variant.scales == ("a", "b", "c")
    assert pair.variant.losses.tolist() == [[2.9, 2.5, 2.2]]
    assert pair.baseline.costs["model_flops"].tolist() == [[1e12, 8e12, 64e12]]
    assert not [warning for warning in study.warnings if "no curve" in warning]


def test_a_variant_at_one_rung_of_such_a_ladder_is_left_out_and_says_so(make_results):
    scales = ladder({"baseline": [3.0, 2.6, 2.3], "rope": [2.9, 2.5, 2.2]})
    scales["b"]["mqa"] = [2.5]
    study = load_table(make_results(scales, LADDER))
    assert study.variants(ALL_SCALES) == ["rope"]
    assert any(warning.startswith("mqa at b: results at 1 budget make no curve") for warning in study.warnings)


def test_scales_with_curves_have_their_own_place_beside_the_pool(make_results):
    study = load_table(make_results({scale: {"baseline": LOSSES, "rope": LOSSES} for scale in "ab"}))
    assert study.scales == ["a", "b", ALL_SCALES]
    assert all(study.variants(scale) == ["rope"] for scale in study.scales)


def test_one_scale_is_not_pooled(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    assert load(study_folder).scales == ["tiny"]


def test_without_a_seed_at_every_scale_nothing_is_pooled(study_folder):
    study_folder.add("baseline", LOSSES, scale="tiny", seed=0)
    study_folder.add("baseline", LOSSES, scale="small", seed=1)
    study = load(study_folder)
    assert ALL_SCALES not in study.scales
    assert "baseline: its scales have no seed in common, so it is not pooled over scales." in study.warnings


def test_budgets_that_a_cheaper_one_beats_do_not_count_in_the_pool(make_results):
    study = load_table(
        make_results(
            {
                "a": {"baseline": [3.0, 2.8, 2.7], "rope": [2.9, 2.7, 2.6]},
                "b": {"baseline": [3.5, 2.9, 2.5], "rope": [3.4, 2.8, 2.4]},
            },
            {"a": [1e12, 4e12, 16e12], "b": [2e12, 8e12, 32e12]},
        )
    )
    (pair,) = study.comparisons(ALL_SCALES, "model_flops")
    for tuned in (pair.baseline, pair.variant):
        assert tuned.scales == ("a", "a", "a", "b")
        assert tuned.costs["model_flops"].tolist() == [[1e12, 4e12, 16e12, 32e12]]


def test_a_scale_may_not_have_the_name_of_the_pool(make_results):
    with pytest.raises(UserError, match='no scale may be called "all scales"'):
        load_table(make_results({ALL_SCALES: {"baseline": LOSSES}}))


def test_a_curve_needs_a_cost_that_rises(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES, change=lambda row: {**row, "seconds": 5.0})
    study = load(study_folder)
    assert study.comparisons("tiny", "seconds") == []
    assert len(study.comparisons("tiny", "tokens")) == 1
    assert study.warnings[-1] == (
        "rope at tiny: a larger budget does not cost more seconds; no gains of rope on that axis."
    )


def test_no_result_at_all():
    empty = pl.DataFrame(schema={"variant": pl.String})
    with pytest.raises(UserError, match="nothing has no finished trajectory: train the study first"):
        load_table(Results("nothing", empty, empty, [], []))
