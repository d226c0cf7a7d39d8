import numpy as np
import pytest

from bench.gains.sources.runs import read_results
from bench.gains.tuning import TunedVariant, pool, tune_variant


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


def test_an_evaluation_error_that_was_not_measured_is_nan(study_folder):
    study_folder.add("rope", [3.0, 2.5, 2.2, 2.1], change=lambda row: {**row, "val_loss_se": None})
    assert np.isnan(tune(study_folder).loss_errors).all()


def tuned(losses, compute, scale="tiny", seeds=None, tuning="single"):
    """A tuned variant in memory, losses and compute (seeds, K)."""
    losses = np.atleast_2d(losses)
    count = losses.shape[1]
    return TunedVariant(
        scale=scale,
        variant="rope",
        innovations=("rope",),
        scales=(scale,) * count,
        seeds=tuple(range(len(losses))) if seeds is None else seeds,
        budgets=np.atleast_2d(compute)[0],
        rates=np.full(count, 1e-3),
        losses=losses,
        loss_errors=np.arange(count) / 100,
        costs={"seconds": np.broadcast_to(np.asarray(compute, float), losses.shape)},
        tuning=tuning,
    )


def test_pooled_is_the_budgets_of_all_scales_for_the_seeds_that_all_have():
    tiny = tuned([[3.0, 2.5], [3.1, 2.6], [3.2, 2.7]], [1.0, 2.0], tuning="interior")
    small = tuned([[2.8, 2.3], [2.9, 2.4]], [4.0, 8.0], scale="small", seeds=(2, 1), tuning="edge")
    whole = pool([tiny, small], "both")
    assert (whole.scale, whole.scales, whole.tuning) == ("both", ("tiny", "tiny", "small", "small"), "edge")
    assert whole.seeds == (1, 2)
    assert whole.losses.tolist() == [[3.1, 2.6, 2.9, 2.4], [3.2, 2.7, 2.8, 2.3]]
    assert whole.costs["seconds"].tolist() == [[1, 2, 4, 8]] * 2
    assert whole.loss_errors.tolist() == [0, 0.01, 0, 0.01]
    assert pool([tiny, tuned([[2.8, 2.3]], [4.0, 8.0], seeds=(7,))], "both") is None


def test_the_best_for_their_cost_are_those_that_nothing_cheaper_beats():
    best = tuned([[2.5, 3.0, 2.6, 2.2, 2.5]], [4.0, 1.0, 8.0, 16.0, 2.0]).best_for_cost("seconds")
    assert best.costs["seconds"].tolist() == [[1, 2, 16]]
    assert best.losses.tolist() == [[3.0, 2.5, 2.2]]
    assert best.loss_errors.tolist() == [0.01, 0.04, 0.03]


def test_of_two_that_cost_the_same_the_better_counts():
    best = tuned([[3.0, 2.8, 2.9, 2.0]], [1.0, 1.0, 1.005, 2.0]).best_for_cost("seconds")
    assert best.losses.tolist() == [[2.8, 2.0]]
    # Within the rounding of steps it is the same cost, whichever is a little cheaper.
    best = tuned([[3.0, 2.8, 2.5, 2.0]], [1.0, 1.004, 1.5, 2.0]).best_for_cost("seconds")
    assert best.losses.tolist() == [[2.8, 2.5, 2.0]]


def test_the_best_for_their_cost_cost_more_and_more_for_every_seed():
    seconds = np.array([[1.0, 2.0, 2.1, 4.0], [1.0, 2.0, 1.9, 4.0]])
    best = tuned(np.tile([3.0, 2.8, 2.7, 2.4], (2, 1)), seconds).best_for_cost("seconds")
    assert best.rises_with_budget("seconds")
    assert best.losses[0].tolist() == [3.0, 2.7, 2.4]
