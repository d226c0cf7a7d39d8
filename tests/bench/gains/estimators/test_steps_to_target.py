import math

import numpy as np
import pytest
from scipy import stats

from bench.errors import UserError
from bench.gains.sources.runs import read_study
from tests.bench.gains.answers import compute_from

EVALUATIONS = 101
FULL_BASELINE = 27


def arriving_at(evaluation, total=EVALUATIONS, leaving=None):
    """Losses whose mean over 8 first is 3 at `evaluation` (counted from 1); 5 before, 6 between `leaving` and the end.

    Small whole numbers, so that the means are exact.
    """
    losses = [5.0] * (evaluation - 8) + [3.0] * (total - evaluation + 8)
    if leaving is not None:
        losses[leaving:-8] = [6.0] * (total - 8 - leaving)
    return losses


def rows(losses, fork=81, every=500):
    """Metrics: the trunk, the largest budget's branch after `fork`, a smaller budget's, and rows not evaluated."""
    for number, loss in enumerate(losses, start=1):
        step = number * every
        spent = {"tokens": step * 100, "model_flops": step * 1e6, "optimizer_flops": step, "seconds": step * 2.0}
        row = {"step": step, "branch": 64e12 if number > fork else None, "train_loss": loss, "val_loss": loss, **spent}
        yield row
        yield {**row, "step": step + 1, "val_loss": None}
        if 20 <= number <= 30:
            yield {**row, "branch": 1e12, "val_loss": 0.5}


def add(study_folder, variant, losses, cost=1.0, **options):
    metrics = [{**row, "model_flops": row["model_flops"] * cost} for row in rows(losses)]
    study_folder.add(variant, [4, 3.5, 3.2, 3.1], metrics=metrics, **options)


def compute(study_folder):
    return compute_from(read_study(study_folder.path), estimator="steps_to_target", replicates=500)


def gains_of(study_folder, axis="steps"):
    gains = compute(study_folder)
    return {gain["variant"]: gain for gain in gains["gains"] if gain["axis"] == axis}


def test_early_means_are_over_what_there_is(study_folder):
    # Trailing means 9, 6, 5, 4.25; 5.4, 6.17: the last, 37 / 6, is first reached by evaluation 2.
    add(study_folder, "baseline", [9.0, 3.0, 3.0, 2.0, 10.0, 10.0])
    add(study_folder, "rope", [6.0, 7.0, 8.0, 9.0, 9.0, 9.0])
    assert gains_of(study_folder)["rope"]["ceg"] == 2.0
    assert gains_of(study_folder)["rope"]["target_loss"] == pytest.approx(37 / 6)


def test_a_target_never_reached_is_an_upper_bound(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE))
    add(study_folder, "mqa", [4.0] * EVALUATIONS)
    gain = gains_of(study_folder)["mqa"]
    assert (gain["ceg"], gain["lower_bound"], gain["upper_bound"], gain["interval"]) == (None, None, 27 / 101, None)


def test_other_axes_count_what_was_spent_by_then(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE))
    add(study_folder, "mqa", arriving_at(29), cost=0.9)
    assert gains_of(study_folder)["mqa"]["ceg"] == pytest.approx(27 / 29)
    assert gains_of(study_folder, "model_flops")["mqa"]["ceg"] == pytest.approx(27 / 29 / 0.9)
    assert gains_of(study_folder, "seconds")["mqa"]["ceg"] == pytest.approx(27 / 29)


def test_a_baseline_that_rises_again_is_met_where_it_first_had_its_last_loss(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE, leaving=40))
    add(study_folder, "rope", arriving_at(20, leaving=60))
    gain = gains_of(study_folder)["rope"]
    assert (gain["ceg"], gain["baseline_compute"], gain["target_loss"]) == (27 / 20, 27, 3.0)


def test_an_axis_the_evaluations_lack_is_left_out_with_a_warning(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE))
    add(study_folder, "rope", arriving_at(20))
    gains = compute(study_folder)
    assert "joules" not in {gain["axis"] for gain in gains["gains"]}
    assert "rope at tiny: steps_to_target finds no gain on the axis joules." in gains["warnings"]


def test_its_biases_are_in_the_output(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE))
    add(study_folder, "rope", arriving_at(20))
    caveats = " ".join(compute(study_folder)["caveats"])
    for word in ("mid-schedule", "smooths over 8", "does not interpolate", "first crossing", "ignores that a step"):
        assert word in caveats


def test_the_interval_is_students_on_ln_ceg(study_folder):
    # Straight lines: the variant's seeds arrive 7 evaluations apart, about evaluation 53.
    evaluation = np.arange(1, EVALUATIONS + 1)
    for seed in (0, 1, 2):
        add(study_folder, "baseline", (10 - 0.05 * evaluation).tolist(), seed=seed)
        add(study_folder, "layer_norm", (10 - 0.1 * (evaluation - 7 * (seed - 1))).tolist(), seed=seed)
    gain = gains_of(study_folder)["layer_norm"]
    assert gain["ceg"] == 101 / 53
    error = 7 / math.sqrt(3) / 53
    for name, student in (("interval", 4.302653), ("interval_90", 2.919986)):
        low, high = gain[name]
        assert math.log(high / low) / 2 == pytest.approx(student * error, rel=0.1)
    assert gain["seed_error"] == pytest.approx(error, rel=0.1)
    assert gain["p_value"] == pytest.approx(2 * stats.t.sf(math.log(gain["ceg"]) / gain["seed_error"], 2))


def test_seeds_that_agree_leave_no_interval_to_speak_of(study_folder):
    for seed in (0, 1):
        add(study_folder, "baseline", arriving_at(40), seed=seed)
        add(study_folder, "rope", arriving_at(20), seed=seed)
    assert gains_of(study_folder)["rope"]["interval"] == pytest.approx([2.0, 2.0])


def test_scales_are_not_pooled(study_folder):
    for scale in ("tiny", "small"):
        add(study_folder, "baseline", arriving_at(40), scale=scale)
        add(study_folder, "rope", arriving_at(20), scale=scale)
    assert {gain["scale"] for gain in compute(study_folder)["gains"]} == {"tiny", "small"}


def test_replicates_that_never_arrive_open_the_lower_side(study_folder):
    for seed, last in ((0, 4.0), (1, 3.0)):
        add(study_folder, "baseline", [*arriving_at(40)[:-8], *[3.5] * 8], seed=seed)
        add(study_folder, "rope", [5.0] * 40 + [last] * 61, seed=seed)
    gain = gains_of(study_folder)["rope"]
    assert gain["ceg"] is not None
    assert gain["interval"][0] is None


def test_a_study_without_evaluations_in_mid_schedule(study_folder):
    for variant in ("baseline", "rope"):
        study_folder.add(variant, [4, 3.5, 3.2, 3.1])
    with pytest.raises(
        UserError, match=r"baseline at tiny: no loss was evaluated in mid-schedule.* evaluation.every=500"
    ):
        gains_of(study_folder)


def test_evaluations_at_other_steps(study_folder):
    add(study_folder, "baseline", arriving_at(FULL_BASELINE))
    study_folder.add("rope", [4, 3.5, 3.2, 3.1], metrics=list(rows(arriving_at(20), every=250)))
    with pytest.raises(
        UserError, match=r"rope at tiny and baseline were evaluated at different steps.*same evaluation.every"
    ):
        gains_of(study_folder)


def test_seeds_evaluated_at_other_steps(study_folder):
    for variant in ("baseline", "rope"):
        add(study_folder, variant, arriving_at(FULL_BASELINE))
        study_folder.add(variant, [4, 3.5, 3.2, 3.1], seed=1, metrics=list(rows(arriving_at(20), every=250)))
    with pytest.raises(
        UserError, match=r"its seeds were evaluated at different steps: train them with one evaluation.every"
    ):
        gains_of(study_folder)
