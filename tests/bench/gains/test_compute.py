import math

import numpy as np
import polars as pl
import pytest

from bench.errors import UserError
from bench.gains.compute import summarise
from bench.gains.sources.columns import normalise
from bench.gains.sources.runs import read_study
from bench.gains.study import ALL_SCALES
from tests.bench.gains.answers import compute_from, only

BUDGETS = np.array([1e12, 4e12, 16e12, 64e12])
VARIANTS = {"baseline": 1.0, "flash_attention": 1.0, "rope": 2.0, "layer_norm": 3.0, "layer_norm+rope": 300.0}


def law(gain):
    return 1.8 + 1.2 * (BUDGETS * gain / 1e12) ** -0.18


def write(study_folder, seeds=3, scale="tiny", variants=VARIANTS, noise=0.003, **options):
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        shared = generator.normal(0, 0.02)
        for variant, gain in variants.items():
            losses = law(gain) + shared + generator.normal(0, noise, 4)
            study_folder.add(variant, losses.tolist(), seed=seed, scale=scale, **options)


def compute(study_folder, **options):
    return compute_from(read_study(study_folder.path), **options)


def test_the_schema(study_folder):
    write(study_folder)
    gains = compute(study_folder)
    assert set(gains) == {
        "schema", "study", "baseline", "estimator", "level", "created", "caveats", "warnings", "gains", "classes",
        "correction", "interactions", "contributions", "fits", "forecasts", "power", "frontiers", "sign_changes",
        "runs",
    }  # fmt: skip
    assert (gains["schema"], gains["study"], gains["baseline"]) == (2, "synthetic", "baseline")
    assert (gains["estimator"], gains["level"]) == ("crossing", 0.95)
    assert len(gains["gains"]) == 4 * 10
    assert len(gains["frontiers"]) == 5 * 10
    point = {
        "baseline_compute", "target_loss", "ceg", "interval", "interval_90", "lower_bound", "upper_bound", "p_value",
        "seed_error", "evaluation_error", "extrapolated",
    }  # fmt: skip
    place = {"scale", "variant", "innovations", "axis", "seeds", "lr", "tuning", "untuned", "curve"}
    for gain in gains["gains"]:
        assert set(gain) == point | place
        assert len(gain["curve"]) == 4
        assert all(set(entry) == point for entry in gain["curve"])
        assert gain["curve"][-1] == {key: gain[key] for key in point}
    test = {"verdict", "interval", "interval_90", "p_value", "p_adjusted", "scale"}
    for entry in gains["classes"]:
        assert set(entry) == {"variant", "axis", "sign", "slope"}
        assert set(entry["sign"]) == test
        assert set(entry["slope"]) == test | {"value"}
    bounds = {"lower_bound", "upper_bound", "interval", "interval_90", "p_value"}
    assert len(gains["interactions"]) == 10
    for entry in gains["interactions"]:
        assert set(entry) == bounds | {
            "scale", "axis", "variant", "innovations", "joint", "product", "ratio", "verdict",
        }  # fmt: skip
    assert len(gains["contributions"]) == 2 * 10
    for entry in gains["contributions"]:
        assert set(entry) == bounds | {"scale", "axis", "variant", "innovation", "method", "ceg"}
    assert (gains["fits"], gains["forecasts"], gains["power"]) == ([], [], None)
    for entry in gains["frontiers"]:
        assert set(entry) == {"scale", "variant", "axis", "points"}
        assert set(entry["points"][0]) == {"budget", "compute", "loss", "loss_sd", "val_loss_se", "seeds", "lr"}
    for run in gains["runs"]:
        assert {
            "path", "scale", "variant", "seed", "lr", "state", "git_commit", "device", "versions", "started",
            "parameters", "flops_per_token",
        } <= set(run)  # fmt: skip


def test_the_gains_are_those_of_the_laws(study_folder):
    write(study_folder)
    gains = compute(study_folder)
    rope = only(gains["gains"], variant="rope", axis="model_flops")
    low, high = rope["interval"]
    assert low < 2.0 < high
    assert rope["ceg"] == pytest.approx(2.0, rel=0.1)
    assert (rope["innovations"], rope["seeds"], rope["lr"]) == (["rope"], 3, 1e-3)
    assert (rope["tuning"], rope["untuned"]) == ("single", True)
    flash = only(gains["gains"], variant="flash_attention", axis="model_flops")
    low, high = flash["interval"]
    assert (low or 0) <= 1 <= (high or np.inf)
    both = only(gains["gains"], variant="layer_norm+rope", axis="model_flops")
    assert both["ceg"] is None
    assert both["lower_bound"] == pytest.approx(64)
    assert only(gains["classes"], variant="layer_norm+rope")["sign"]["verdict"] == "independent"
    assert only(gains["classes"], variant="flash_attention")["sign"]["verdict"] == "inconclusive"


def test_an_axis_in_proportion_to_another_has_the_same_gains(study_folder):
    write(study_folder)
    gains = compute(study_folder)["gains"]
    for variant in ("rope", "layer_norm"):
        by_axis = [gain["ceg"] for gain in gains if gain["variant"] == variant]
        assert by_axis == pytest.approx([by_axis[0]] * 10, rel=1e-6)


@pytest.mark.parametrize("more", [[], [256e12]])
def test_a_kernel_gains_on_the_axes_it_makes_cheaper(study_folder, more):
    def cheaper(row):
        return {**row, "seconds": row["seconds"] / 2, "flops_6nd": row["flops_6nd"] * 2}

    # With one budget more it is trained for as many seconds as the baseline; its gain is clear without.
    budgets = [*BUDGETS, *more]
    for seed in (0, 1, 2):
        losses = (
            1.8 + 1.2 * (np.array(budgets) / 1e12) ** -0.18 + np.random.default_rng(seed).normal(0, 0.01, len(budgets))
        ).tolist()
        study_folder.add("baseline", losses[:4], seed=seed)
        study_folder.add("flash_attention", losses, seed=seed, budgets=budgets, change=cheaper)
    gains = compute(study_folder)
    for axis, ceg in (("model_flops", 1.0), ("seconds", 2.0), ("flops_6nd", 0.5)):
        gain = only(gains["gains"], axis=axis)
        assert [gain["ceg"], *gain["interval"]] == pytest.approx([ceg] * 3)
    assert gains["sign_changes"] == [
        {"scale": "tiny", "variant": "flash_attention", "axes": ["seconds"], "against": ["flops_6nd"]}
    ]


def test_axes_that_agree_are_no_sign_change(study_folder):
    write(study_folder)
    assert compute(study_folder)["sign_changes"] == []


def test_every_scale_has_its_gains_and_the_smallest_gives_the_sign(study_folder):
    write(study_folder, scale="a_large", parameters=9000, variants={"baseline": 1, "mqa": 3})
    write(study_folder, scale="small", parameters=10, variants={"baseline": 1, "mqa": 0.5})
    gains = compute(study_folder)
    scales = [gain["scale"] for gain in gains["gains"] if gain["axis"] == "seconds"]
    assert scales == ["small", "a_large", ALL_SCALES]
    sign = only(gains["classes"], variant="mqa")["sign"]
    assert (sign["verdict"], sign["interval"], sign["scale"]) == ("dependent", [None, 1.0], "small")
    assert only(gains["classes"], variant="mqa")["slope"]["scale"] == ALL_SCALES


def test_frontiers_are_the_measured_points(study_folder):
    study_folder.add("baseline", [3.0, 2.5, 2.3, 2.2], seed=0)
    study_folder.add("baseline", [3.2, 2.5, 2.3, 2.2], seed=1)
    study_folder.add("rope", [3.0, 2.5, 2.3, 2.2], seed=0, change=lambda row: {**row, "val_loss_se": None})
    frontiers = compute(study_folder)["frontiers"]
    first = only(frontiers, variant="baseline", axis="seconds")["points"][0]
    assert first == {
        "budget": 1e12, "compute": 100.0, "loss": 3.1, "loss_sd": pytest.approx(0.2 / 2**0.5), "val_loss_se": 0.01,
        "seeds": 2, "lr": 1e-3,
    }  # fmt: skip
    first = only(frontiers, variant="rope", axis="seconds")["points"][0]
    assert (first["loss_sd"], first["val_loss_se"], first["seeds"]) == (None, None, 1)


def test_one_seed_has_a_gain_without_an_interval(study_folder):
    write(study_folder, seeds=1)
    gains = compute(study_folder)
    rope = only(gains["gains"], variant="rope", axis="model_flops")
    assert rope["ceg"] is not None
    assert rope["interval"] is None
    assert all(entry["sign"]["verdict"] == "inconclusive" for entry in gains["classes"])
    assert len([warning for warning in gains["warnings"] if "one seed only" in warning]) == 4


def test_an_axis_on_which_budgets_do_not_cost_more_is_left_out(study_folder):
    study_folder.add("baseline", law(1).tolist())
    study_folder.add("rope", law(2).tolist(), change=lambda row: {**row, "seconds": 5.0})
    gains = compute(study_folder)
    assert "seconds" not in {gain["axis"] for gain in gains["gains"]}
    assert (
        "rope at tiny: a larger budget does not cost more seconds; no gains of rope on that axis." in gains["warnings"]
    )


def test_without_model_flops_classes_are_told_on_the_next_axis(study_folder):
    write(study_folder, seeds=2, change=lambda row: {**row, "model_flops": None})
    gains = compute(study_folder)
    assert {gain["axis"] for gain in gains["gains"]} >= {"seconds", "tokens"}
    assert {entry["axis"] for entry in gains["classes"]} == {"flops_6nd"}


def test_the_same_arguments_give_the_same_numbers(study_folder):
    write(study_folder)
    first, second, other = compute(study_folder), compute(study_folder), compute(study_folder, seed=1)
    assert first["gains"] == second["gains"]
    assert first["gains"] != other["gains"]


def test_any_variant_can_be_the_baseline(study_folder):
    write(study_folder)
    gains = compute(study_folder, baseline="rope")
    layer_norm = only(gains["gains"], variant="layer_norm", axis="model_flops")
    assert layer_norm["ceg"] == pytest.approx(1.5, rel=0.1)
    assert only(gains["gains"], variant="baseline", axis="model_flops")["upper_bound"] == pytest.approx(1)


def test_unusable_variants_do_not_stop_the_others(study_folder):
    write(study_folder, variants={"baseline": 1, "rope": 2})
    study_folder.add("mqa", [3.0], budgets=[1e12])
    study_folder.add("gqa", [3.0, 2.5, 2.3, 2.2], seed=9)
    study_folder.add("muon", [3.0, 2.5, 2.3, 2.2], state="FAILED")
    for seed in (0, 1, 2):
        study_folder.add("swiglu", [3.0, 2.5, 2.6, 2.7], seed=seed)
    gains = compute(study_folder)
    assert {gain["variant"] for gain in gains["gains"]} == {"gqa", "rope", "swiglu"}
    text = " ".join(gains["warnings"])
    assert "mqa at tiny: results at 1 budget make no curve" in text
    assert "gqa at tiny: one seed only" in text
    assert "muon at tiny: none of its trajectories is done" in text
    assert "swiglu at tiny: the loss is higher at budget 1.6e+13, 6.4e+13" in text


def bad_table():
    """Rows of a study of which every variant but `rope` is bad in a way of its own."""
    noise = iter(np.random.default_rng(0).normal(0, 0.003, 1000))

    def rows(variant, gain=1.0, seeds=(0, 1, 2), budgets=4, unit=1.0):
        return [
            {"variant": variant, "seed": seed, "flops": unit * compute, "loss": loss + next(noise)}
            for seed in seeds
            for compute, loss in list(zip(BUDGETS, law(gain), strict=True))[:budgets]
        ]

    table = rows("baseline") + rows("rope", 2.0)
    table += rows("one_budget", budgets=1)
    table += rows("two_budgets", 2.0, budgets=2)
    table += rows("one_seed", 2.0, seeds=(0,))
    table += [{**row, "loss": 5.5 - row["loss"]} for row in rows("rising")]
    table += [{**row, "loss": math.nan} for row in rows("not_a_number")]
    table += [{**row, "loss": -row["loss"] if row["seed"] else row["loss"]} for row in rows("negative")]
    table += rows("duplicates", 2.0) + rows("duplicates", 2.0)
    table += rows("petaflops", 2.0, unit=1e-15)
    table += [{**row, "loss": row["loss"] / math.log(2)} for row in rows("bits")]
    return table


@pytest.mark.parametrize("estimator", ["crossing", "scaling_law"])
def test_whatever_is_wrong_with_others_a_good_variant_comes_out_as_if_alone(estimator):
    table = bad_table()
    gains = compute_from(normalise("bad", pl.DataFrame(table)), estimator=estimator)
    good = [row for row in table if row["variant"] in ("baseline", "rope")]
    alone = compute_from(normalise("good", pl.DataFrame(good)), estimator=estimator)
    rope, expected = (only(found["gains"], variant="rope", axis="model_flops") for found in (gains, alone))
    # An asymptote is shared with the others, so that the shape between budgets may differ a little.
    assert rope["ceg"] == pytest.approx(expected["ceg"], rel=0.05)
    assert rope["interval"][0] < 2 < rope["interval"][1]
    assert expected["interval"][0] < 2 < expected["interval"][1]
    text = " ".join(gains["warnings"])
    for variant, why in (
        ("one_budget", "results at 1 budget make no curve"),
        ("one_seed", "one seed only"),
        ("rising", "the loss is higher at budget"),
        ("duplicates", "all of them are left out"),
        ("petaflops", "in other units"),
        ("bits", "as if they were in bits"),
    ):
        assert any(variant in warning and why in warning for warning in gains["warnings"]), variant
    assert "no loss above 0" in text
    found = {gain["variant"] for gain in gains["gains"]}
    assert found.isdisjoint({"one_budget", "not_a_number", "duplicates", "petaflops", "bits"})
    assert {"rope", "one_seed"} <= found
    for variant in ("two_budgets", "rising"):
        assert (variant in found) == (estimator == "crossing")


@pytest.mark.parametrize("estimator", ["crossing", "scaling_law"])
def test_everything_at_once(make_results, estimator):
    generator = np.random.default_rng(0)
    budgets = {"small": [1e15, 4e15, 16e15], "large": [32e15, 128e15, 512e15]}
    singles = {"baseline": 1.0, "a": 1.5, "b": 2.0, "a+b": 3.0}
    scales = {
        scale: {
            variant: 1.8 + 3 * (np.array(spent) * gain / 1e15) ** -0.2 + generator.normal(0, 0.003, (3, 3))
            for variant, gain in singles.items()
        }
        for scale, spent in budgets.items()
    }
    results = make_results(scales, budgets, params=lambda scale, *_: {"small": 1e6, "large": 8e6}[scale])
    gains = compute_from(results, estimator=estimator, forecast=[2e18, 1e25], power_width=0.1)
    places = {(gain["scale"], gain["variant"]) for gain in gains["gains"]}
    assert places == {(scale, variant) for scale in ("small", "large", ALL_SCALES) for variant in ("a", "b", "a+b")}
    pooled = only(gains["gains"], scale=ALL_SCALES, variant="a+b", axis="model_flops")
    assert len(pooled["curve"]) == 6
    assert pooled["interval"][0] < 3 < pooled["interval"][1]
    interaction = only(gains["interactions"], scale=ALL_SCALES, axis="model_flops")
    assert interaction["innovations"] == ["a", "b"]
    assert interaction["interval"][0] < 1 < interaction["interval"][1]
    shares = [
        entry["ceg"]
        for entry in gains["contributions"]
        if (entry["scale"], entry["axis"]) == (ALL_SCALES, "model_flops")
    ]
    assert math.prod(shares) == pytest.approx(pooled["ceg"])
    assert {entry["baseline_compute"] for entry in gains["forecasts"]} == {2e18}
    assert {(entry["scale"], entry["axis"]) for entry in gains["forecasts"]} == {(ALL_SCALES, "model_flops")}
    assert len([warning for warning in gains["warnings"] if "decades of compute beyond" in warning]) == 1
    power = gains["power"]
    assert (power["level"], power["width"]) == (0.95, 0.1)
    assert {(entry["scale"], entry["axis"]) for entry in power["entries"]} == {
        ("small", "model_flops"),
        ("large", "model_flops"),
    }
    assert bool(gains["fits"]) == (estimator == "scaling_law")
    assert gains["correction"] == (
        "p-values are adjusted by Holm's method over the 3 variants, for each test by itself."
    )
    assert not [entry for entry in gains["classes"] if entry["slope"]["verdict"] in ("compute-dependent", "fading")]


def test_what_seeds_would_cost_is_that_of_their_budgets(study_folder):
    write(study_folder, variants={"baseline": 1.0, "rope": 2.0})
    (entry,) = compute(study_folder, power_width=0.02)["power"]["entries"]
    assert entry["seeds_needed"] > entry["seeds"] == 3
    assert entry["cost"] == (entry["seeds_needed"] - 3) * 2 * BUDGETS.sum()


def test_an_asked_for_forecast_far_beyond_is_told(study_folder):
    write(study_folder, variants={"baseline": 1.0, "rope": 2.0})
    (entry,) = compute(study_folder, forecast=[64e18], forecast_far=True)["forecasts"]
    assert (entry["decades"], entry["extrapolated"]) == (pytest.approx(6), True)


def test_sentences_are_told_once_and_those_of_many_places_together():
    assert summarise(["Nothing.", "rope at tiny: bad.", "Nothing.", "mqa at tiny: bad."]) == [
        "Nothing.",
        "rope at tiny: bad.",
        "mqa at tiny: bad.",
    ]
    many = [f"v{number} at tiny: one seed only." for number in range(7)]
    assert summarise([*many, many[0]]) == [
        "v0 at tiny, v1 at tiny, v2 at tiny, v3 at tiny, v4 at tiny and 2 more: one seed only."
    ]


def test_nothing_to_compare(study_folder):
    study_folder.add("baseline", law(1).tolist())
    with pytest.raises(
        UserError, match="no variant can be compared with baseline: it is the only variant with results"
    ):
        compute(study_folder)


def test_no_variant_that_can_be_compared_says_why(study_folder):
    study_folder.add("baseline", law(1).tolist())
    study_folder.add("rope", [3.0], budgets=[1e12])
    with pytest.raises(
        UserError, match="no variant can be compared with baseline: rope at tiny: results at 1 budget make"
    ):
        compute(study_folder)


def test_an_unknown_estimator_lists_those_there_are(study_folder):
    write(study_folder, seeds=1)
    listed = "crossing, loss_surface, scaling_law, steps_to_target"
    with pytest.raises(UserError, match=f"estimator=magic is unknown: choose one of {listed}"):
        compute(study_folder, estimator="magic")


@pytest.mark.parametrize("estimator", ["crossing", "scaling_law"])
def test_gains_are_read_at_the_losses_asked_for(make_results, estimator):
    # Power laws of two exponents: the gain is another at every loss, and known.
    budgets = 1e15 * 4.0 ** np.arange(5)
    generator = np.random.default_rng(0)
    clean = {
        "baseline": 1.8 + 1.2 * (budgets / 1e15) ** -0.16,
        "rope": 1.8 + 1.2 * (1.5 * budgets / 1e15) ** -0.18,
    }
    losses = {variant: loss + generator.normal(0, 1e-4, (3, 5)) for variant, loss in clean.items()}
    results = make_results({"small": losses}, budgets)
    asked = [2.75, 2.5, 1.9, 9.0, 1.0]
    plain = compute_from(results, estimator=estimator)
    gains = compute_from(results, estimator=estimator, targets=asked)
    (curve,) = (gain["curve"] for gain in gains["gains"])
    assert [point["baseline_compute"] for point in curve] == sorted(point["baseline_compute"] for point in curve)
    for loss in asked[:2]:
        (point,) = [point for point in curve if point["target_loss"] == pytest.approx(loss, abs=1e-9)]
        baseline = ((loss - 1.8) / 1.2) ** (-1 / 0.16)
        variant = ((loss - 1.8) / 1.2) ** (-1 / 0.18) / 1.5
        assert point["baseline_compute"] == pytest.approx(1e15 * baseline, rel=0.01)
        assert point["ceg"] == pytest.approx(baseline / variant, rel=0.01)
        assert point["interval"][0] < baseline / variant < point["interval"][1]
    for loss in asked[2:]:
        sentence = f"baseline at small: its budgets do not enclose the target loss {loss:g}, so no gain is read there."
        assert sentence in gains["warnings"]
    # Neither the headline nor the trend rests on what was asked.
    assert [point for point in curve if point in plain["gains"][0]["curve"]] == plain["gains"][0]["curve"]
    assert gains["classes"] == plain["classes"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"power_width": -2.0}, "power_width must be above 0, such as 0.1; it is -2"),
        ({"power_width": math.inf}, "power_width must be above 0"),
        ({"targets": [math.nan]}, "targets must be losses, such as 3.2; it is nan"),
        ({"targets": [2.0, 0.0]}, "targets must be losses"),
        ({"forecast": [math.inf]}, "forecast must be computes, such as 1e18; it is inf"),
        ({"forecast": [-1.0]}, "forecast must be computes"),
    ],
)
def test_numbers_that_cannot_be_meant(make_results, options, sentence):
    with pytest.raises(UserError, match=sentence):
        compute_from(make_results({"small": {"baseline": law(1), "rope": law(2)}}), **options)


def test_a_variant_is_classed_where_it_was_trained(make_results):
    # One variant at each of two scales: neither is inconclusive because the other's scale is the smallest.
    generator = np.random.default_rng(0)

    def losses(gain):
        return law(gain) + generator.normal(0, 0.002, (3, 4))

    scales = {"a": {"baseline": losses(1), "rope": losses(2)}, "b": {"baseline": losses(1), "mqa": losses(0.5)}}
    gains = compute_from(make_results(scales), forecast=[1e15])
    for variant, scale, verdict in (("rope", "a", "independent"), ("mqa", "b", "dependent")):
        sign = only(gains["classes"], variant=variant)["sign"]
        assert (sign["scale"], sign["verdict"]) == (scale, verdict)
    assert {(entry["scale"], entry["variant"]) for entry in gains["forecasts"]} == {("a", "rope"), ("b", "mqa")}


def test_two_names_for_the_same_innovations_are_no_combination(make_results):
    variants = {"baseline": law(1), "a": law(1.5), "b": law(2), "a+b": law(3), "b+a": law(2.5)}
    gains = compute_from(make_results({"small": variants}))
    assert gains["interactions"] == []
    assert "a+b and b+a are the same innovations: none of their combinations is told." in gains["warnings"]


def test_one_variant_needs_no_correction(make_results):
    gains = compute_from(make_results({"small": {"baseline": law(1), "rope": law(2)}}))
    assert gains["correction"] == "p-values need no adjustment, as one variant was tested."
