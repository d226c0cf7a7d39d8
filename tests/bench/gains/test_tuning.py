import numpy as np
import pytest

from bench.gains.table import read_results
from bench.gains.tuning import tune_variant


def tune(study_folder, warnings=None):
    rows = read_results(study_folder.path).to_dicts()
    return tune_variant(rows, ["model_flops", "seconds"], [] if warnings is None else warnings)


def test_the_best_rate_is_chosen_at_each_budget(study_folder):
    for seed in (0, 1):
        study_folder.add("rope", [3.0, 2.5, 2.3, 2.2], seed=seed, lr=1e-3)
        study_folder.add("rope", [3.1, 2.4, 2.2, 2.3], seed=seed, lr=2e-3)
        study_folder.add("rope", [3.2, 2.6, 2.4, 2.4], seed=seed, lr=4e-3)
    warnings = []
    tuned = tune(study_folder, warnings)
    assert tuned.rates.tolist() == [1e-3, 2e-3, 2e-3, 1e-3]
    assert tuned.losses.tolist() == [[3.0, 2.4, 2.2, 2.2]] * 2
    assert (tuned.seeds, tuned.tuning) == ((0, 1), "edge")
    assert tuned.costs["model_flops"].tolist() == [[1e12, 4e12, 16e12, 64e12]] * 2
    assert warnings == []


@pytest.mark.parametrize(
    ("rates", "tuning"), [([1e-3], "single"), ([1e-3, 2e-3], "edge"), ([5e-4, 1e-3, 2e-3], "interior")]
)
def test_tuning_says_where_the_best_rate_lies(study_folder, rates, tuning):
    for lr in rates:
        study_folder.add("rope", [3, 2.5, 2.2, 2.1 if lr == 1e-3 else 2.2], lr=lr)
    assert tune(study_folder).tuning == tuning


def test_rates_are_compared_on_the_seeds_they_share(study_folder):
    # Seed 1 is a hard one; a rate must not win by having been spared it.
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], seed=0, lr=1e-3)
    study_folder.add("rope", [4.0, 3.5, 3.2, 3.1], seed=1, lr=1e-3)
    study_folder.add("rope", [3.1, 2.6, 2.3, 2.2], seed=0, lr=2e-3)
    tuned = tune(study_folder)
    assert tuned.rates.tolist() == [1e-3] * 4
    assert tuned.seeds == (0, 1)


def test_a_seed_without_the_best_rate_of_every_budget_is_not_used(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.2], seed=0, lr=1e-3)
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.2], seed=1, lr=1e-3)
    study_folder.add("rope", [3.1, 2.6, 2.3, 2.1], seed=0, lr=2e-3)
    warnings = []
    assert tune(study_folder, warnings).seeds == (0,)
    assert warnings == ["rope at tiny: seed(s) 1 lack a result at the best rate of some budget and are not used."]


def test_rates_without_a_common_seed(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], seed=0, lr=1e-3)
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], seed=1, lr=2e-3)
    warnings = []
    assert tune(study_folder, warnings) is None
    assert warnings == [
        "rope at tiny: no seed was trained at all of its learning rates (budget 1e+12), so none can be called best; "
        "it is left out. Train the same seeds at every rate."
    ]


def test_seeds_that_share_no_budget(study_folder):
    study_folder.add("rope", [3.0, 2.5], seed=0, budgets=[1e12, 2e12])
    study_folder.add("rope", [2.4, 2.3], seed=1, budgets=[4e12, 8e12])
    warnings = []
    assert tune(study_folder, warnings) is None
    assert warnings == ["rope at tiny: no seed has a result at every budget; it is left out."]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_rate_that_diverged_is_not_used_but_brackets_the_best(study_folder, bad):
    study_folder.add("rope", [3.1, 2.6, 2.3, 2.2], lr=5e-4)
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], lr=1e-3)
    study_folder.add("rope", [2.9, 2.4, 2.1, bad], lr=2e-3)
    warnings = []
    tuned = tune(study_folder, warnings)
    assert tuned.rates.tolist() == [2e-3, 2e-3, 2e-3, 1e-3]
    assert tuned.tuning == "interior"
    assert warnings == [
        "rope at tiny: a loss at budget 6.4e+13 with lr 0.002 is not finite; that rate is not used there."
    ]


def test_a_budget_without_a_finite_loss_is_left_out(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.2, float("nan")])
    warnings = []
    assert tune(study_folder, warnings).budgets.tolist() == [1e12, 4e12, 16e12]
    assert "rope at tiny: no rate has finite losses at budget 6.4e+13; that budget is left out." in warnings


def test_one_budget_is_too_few_and_two_are_few(study_folder):
    warnings = []
    study_folder.add("rope", [3.0, 2.5], budgets=[1e12, 2e12])
    assert tune(study_folder, warnings).losses.shape == (1, 2)
    assert warnings == [
        "rope at tiny: only two budgets; the loss is taken to be linear in log compute between them. Train three."
    ]
    study_folder.add("rope", [3.0], scale="small", budgets=[1e12])
    rows = [row for row in read_results(study_folder.path).to_dicts() if row["scale"] == "small"]
    assert tune_variant(rows, ["seconds"], warnings) is None
    assert warnings[-1] == (
        "rope at small: results at 1 budget(s) make no curve; it is left out. Train at least three budgets."
    )


def test_a_loss_that_rises_with_compute_is_named(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.6, 2.7])
    warnings = []
    tune(study_folder, warnings)
    assert warnings == [
        "rope at tiny: the loss is higher at budget 1.6e+13, 6.4e+13 than at the one before; "
        "the lowest so far is used there."
    ]


def test_an_evaluation_error_that_was_not_measured_is_nan(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], change=lambda row: {**row, "val_loss_se": None})
    assert np.isnan(tune(study_folder).loss_errors).all()
