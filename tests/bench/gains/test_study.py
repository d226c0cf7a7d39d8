import json

import numpy as np
import pytest

from bench.errors import UserError
from bench.gains.study import AXES, load_study

LOSSES = [3.0, 2.5, 2.3, 2.2]


def load(study_folder, **options):
    settings = {"baseline": "baseline", "level": 0.95, "replicates": 200, "seed": 0, **options}
    return load_study(study_folder.path, **settings)


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
    study_folder.add("baseline", LOSSES, change=lambda row: {**row, "joules": None, "dollars": None})
    study = load(study_folder)
    assert study.axes == [axis for axis in AXES if axis not in ("joules", "dollars")]
    assert study.warnings == ["Not measured in these runs: joules, dollars."]


def test_no_axis_at_all(study_folder):
    study_folder.add("baseline", LOSSES, change=lambda row: {"budget": row["budget"], "val_loss": row["val_loss"]})
    with pytest.raises(UserError, match="no cost axis has a number above 0 in every result"):
        load(study_folder)


def test_measured_axes_of_two_devices_are_flagged(study_folder):
    study_folder.add("baseline", LOSSES, device="cpu")
    study_folder.add("rope", LOSSES, device="H100")
    assert load(study_folder).warnings == [
        "Gains in seconds, joules, dollars compare runs of different devices (H100, cpu) and say little."
    ]


def test_unfinished_and_failed_trajectories_are_listed(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    study_folder.add("rope", LOSSES, seed=1, state="FAILED")
    for seed in range(7):
        study_folder.add("mqa", LOSSES, seed=seed, state=None)
    unfinished, failed, without = load(study_folder).warnings
    assert unfinished.startswith("7 of 10 trajectories unfinished and left out (go on with `train`): tiny/mqa/seed=0,")
    assert unfinished.endswith("tiny/mqa/seed=4,lr=0.001,00000008 and 2 more.")
    assert failed == (
        "1 of 10 trajectories failed and left out (see the file FAILED there): tiny/rope/seed=1,lr=0.001,00000003."
    )
    assert without == "mqa at tiny: none of its trajectories is done, so it has no gain."


def test_scales_are_ordered_by_model_size(study_folder):
    for scale, parameters in (("a_big", 9000), ("b_tiny", 10), ("c_small", 500)):
        study_folder.add("baseline", LOSSES, scale=scale, parameters=parameters)
    assert load(study_folder).scales == ["b_tiny", "c_small", "a_big"]


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
    baseline, rope = study.pair("tiny", "rope")
    assert baseline.seeds == rope.seeds == (1, 2)
    np.testing.assert_allclose(baseline.losses[:, 0], [3.01, 3.02])
    np.testing.assert_allclose(rope.losses[:, 0], [3.1, 3.2])
    assert study.warnings == ["rope at tiny: compared with baseline on the 2 seed(s) that both have; 2 not used."]


def test_a_variant_without_a_seed_of_the_baseline(study_folder):
    study_folder.add("baseline", LOSSES, seed=0)
    study_folder.add("rope", LOSSES, seed=1)
    study = load(study_folder)
    assert study.pair("tiny", "rope") is None
    assert study.warnings == [
        "rope at tiny: it shares no seed with baseline, so they cannot be paired; it is left out."
    ]


def test_one_seed_is_flagged(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    study = load(study_folder)
    study.pair("tiny", "rope")
    assert study.warnings == [
        "rope at tiny: one seed only, so its gains have no interval. Train two or more, better three."
    ]


def test_bootstrap_weights_are_resamples_shared_within_a_scale(study_folder):
    for scale in ("tiny", "small"):
        study_folder.add("baseline", LOSSES, scale=scale)
    study = load(study_folder)
    weights = study.weights("tiny", 3)
    assert weights.shape == (200, 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights * 3, np.round(weights * 3))
    assert (weights == study.weights("tiny", 3)).all()
    assert (weights != study.weights("small", 3)).any()
    assert (weights != load(study_folder, seed=1).weights("tiny", 3)).any()


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_standard_error_is_that_of_a_mean(study_folder, seeds):
    study_folder.add("baseline", LOSSES)
    study = load(study_folder, replicates=20000)
    sample = np.random.default_rng(0).normal(size=seeds)
    error = study.standard_error(study.weights("tiny", seeds) @ sample, seeds)
    assert error == pytest.approx(sample.std(ddof=1) / np.sqrt(seeds), rel=0.03)


def test_students_factor(study_folder):
    study_folder.add("baseline", LOSSES)
    assert load(study_folder).student(2) == pytest.approx(12.706, abs=1e-3)
    assert load(study_folder, level=0.9).student(3) == pytest.approx(2.920, abs=1e-3)


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


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_out_of_range(study_folder, level):
    with pytest.raises(UserError, match=f"level must lie between 0 and 1, such as 0.95; it is {level}"):
        load(study_folder, level=level)


def test_too_few_replicates(study_folder):
    with pytest.raises(UserError, match="replicates must be at least 100; it is 10"):
        load(study_folder, replicates=10)


def test_runs_on_different_data_are_not_compared(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    for number, file in enumerate(sorted(study_folder.path.glob("*/*/*/run.json"))):
        run = json.loads(file.read_text())
        run["data"] = {"name": "text", "fingerprint": f"{number}"}
        file.write_text(json.dumps(run))
    with pytest.raises(UserError, match="trained on different data"):
        load(study_folder)


def test_only_planned_runs_are_taken_and_the_rest_is_named(study_folder):
    study_folder.add("baseline", LOSSES)
    study_folder.add("rope", LOSSES)
    baseline = next(file.parent for file in study_folder.path.glob("*/baseline/*/run.json"))
    study = load(study_folder, planned=[baseline, baseline.parent / "seed=9,lr=1,00000000"])
    assert [run["variant"] for run in study.runs] == ["baseline"]
    assert study.warnings == [
        "1 of 2 trajectories of the study are not trained yet.",
        f"1 trajectories in {study_folder.path} were trained with other settings than the study has now and are left "
        "out.",
    ]
