import json
import time

import numpy as np
import pytest

from bench.errors import UserError
from bench.gains import compute_gains

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
    gains = compute_gains(study_folder.path, **{"baseline": "baseline", "estimator": "crossing", **options})
    json.dumps(gains, allow_nan=False)
    return gains


def only(entries, **wanted):
    (found,) = [entry for entry in entries if all(entry[key] == value for key, value in wanted.items())]
    return found


def test_the_schema(study_folder):
    write(study_folder)
    gains = compute(study_folder)
    head = "schema study baseline estimator level created caveats warnings"
    assert list(gains) == [*head.split(), "gains", "classes", "frontiers", "sign_changes", "runs"]
    assert (gains["schema"], gains["study"], gains["baseline"]) == (1, "synthetic", "baseline")
    assert (gains["estimator"], gains["level"]) == ("crossing", 0.95)
    assert len(gains["gains"]) == 4 * 9
    assert len(gains["frontiers"]) == 5 * 9
    point = {"baseline_compute", "target_loss", "ceg", "interval", "lower_bound", "upper_bound"}
    for gain in gains["gains"]:
        assert set(gain) == point | {
            "scale",
            "variant",
            "innovations",
            "axis",
            "seeds",
            "lr",
            "tuning",
            "untuned",
            "curve",
        }
        assert len(gain["curve"]) == 4
        assert all(set(entry) == point for entry in gain["curve"])
        assert gain["curve"][-1] == {key: gain[key] for key in point}
    for entry in gains["classes"]:
        assert set(entry) == {"variant", "axis", "sign", "slope"}
        assert set(entry["sign"]) == {"verdict", "interval", "scale"}
        assert set(entry["slope"]) == {"verdict", "value", "interval"}
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
        assert by_axis == pytest.approx([by_axis[0]] * 9, rel=1e-6)


def test_a_kernel_gains_on_the_axes_it_makes_cheaper(study_folder):
    def cheaper(row):
        return {**row, "seconds": row["seconds"] / 2, "flops_6nd": row["flops_6nd"] * 2}

    for seed in (0, 1, 2):
        losses = (law(1) + np.random.default_rng(seed).normal(0, 0.01, 4)).tolist()
        study_folder.add("baseline", losses, seed=seed)
        study_folder.add("flash_attention", losses, seed=seed, change=cheaper)
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
    assert [gain["scale"] for gain in gains["gains"] if gain["axis"] == "seconds"] == ["small", "a_large"]
    assert only(gains["classes"], variant="mqa")["sign"] == {
        "verdict": "dependent",
        "interval": [None, 1.0],
        "scale": "small",
    }


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


def test_without_model_flops_there_are_gains_but_no_class(study_folder):
    write(study_folder, seeds=2, change=lambda row: {**row, "model_flops": None})
    gains = compute(study_folder)
    assert {gain["axis"] for gain in gains["gains"]} >= {"seconds", "tokens"}
    assert all(entry["sign"]["verdict"] == "inconclusive" for entry in gains["classes"])


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
    gains = compute(study_folder)
    assert {gain["variant"] for gain in gains["gains"]} == {"rope"}
    text = " ".join(gains["warnings"])
    assert "mqa at tiny: results at 1 budget(s)" in text
    assert "gqa at tiny: it shares no seed with baseline" in text
    assert "muon at tiny: none of its trajectories is done" in text


def test_nothing_to_compare(study_folder):
    study_folder.add("baseline", law(1).tolist())
    with pytest.raises(UserError, match="no variant can be compared with baseline: it is the only one with finished"):
        compute(study_folder)


def test_no_variant_that_can_be_compared_says_why(study_folder):
    study_folder.add("baseline", law(1).tolist(), seed=0)
    study_folder.add("rope", law(1).tolist(), seed=1)
    with pytest.raises(UserError, match="no variant can be compared with baseline: rope at tiny: it shares no seed"):
        compute(study_folder)


def test_an_unknown_estimator_lists_those_there_are(study_folder):
    with pytest.raises(UserError, match="estimator=magic is unknown: choose one of crossing, steps_to_target"):
        compute(study_folder, estimator="magic")


def test_five_variants_on_nine_axes_take_well_under_a_few_seconds(study_folder):
    write(study_folder)
    started = time.process_time()
    compute(study_folder, replicates=2000)
    assert time.process_time() - started < 3
