import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize_scalar

from bench.errors import UserError
from bench.gains.sources.columns import normalise
from bench.gains.study import ALL_SCALES
from tests.bench.gains.answers import compute_from

# Besiroglu et al. 2024, table 1: their refit of Chinchilla's approach 3.
EPOCH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
SIZES = np.geomspace(5e7, 2e10, 6)
COMPUTES = 1e19 * 6.0 ** np.arange(4)


def surface(size, tokens, a=482.01, b=2085.43):
    return EPOCH["E"] + a * size ** -EPOCH["alpha"] + b * tokens ** -EPOCH["beta"]


def best_loss(compute, **variant):
    """The lowest loss at a compute, by search over the size of the model."""

    def loss(log_size):
        return surface(np.exp(log_size), compute / 6 / np.exp(log_size), **variant)

    return minimize_scalar(loss, bounds=(5, 40), method="bounded", options={"xatol": 1e-11}).fun


def table(variants, noise=0.0, seeds=1):
    """A row for each size, compute and seed of each variant, {name: (A, B)}."""
    generator, rows = np.random.default_rng(0), []
    for variant, (a, b) in variants.items():
        for size in SIZES:
            for compute in COMPUTES:
                for seed in range(seeds):
                    tokens = compute / 6 / size
                    loss = surface(size, tokens, a, b) * np.exp(noise * generator.normal())
                    row = {"variant": variant, "params": size, "tokens": tokens, "loss": loss, "seed": seed}
                    rows.append({**row, "scale": f"{size:g}"})
    return normalise("surface", pl.DataFrame(rows))


def compute(results, **options):
    return compute_from(results, **{"estimator": "loss_surface", **options})


BASELINE = (EPOCH["A"], EPOCH["B"])


def test_epochs_refit_of_chinchilla_comes_back_from_a_table():
    # On a grid as Hoffmann et al. 2022 had it, with Epoch's columns: no tokens, no variant, no seed.
    rows = []
    for size in np.geomspace(57e6, 16e9, 12):
        for spent in np.geomspace(1.4e18, 1.3e22, 9):
            rows.append({"params": size, "flops": spent, "loss": surface(size, spent / 6 / size)})
    gains = compute(normalise("chinchilla", pl.DataFrame(rows)))
    (fit,) = gains["fits"]
    assert (fit["scale"], fit["axis"], fit["law"]) == (ALL_SCALES, "flops_6nd", "L = E + A/N^alpha + B/D^beta")
    assert list(fit["parameters"]) == ["E", "A", "B", "alpha", "beta"]
    for name in ("E", "alpha", "beta"):
        assert fit["parameters"][name] == pytest.approx(EPOCH[name], abs=1e-6)
    for name in ("A", "B"):
        assert fit["parameters"][name] == pytest.approx(EPOCH[name], rel=1e-4)
    assert (fit["converged"], fit["best_starts"] > 1) == (True, True)
    assert (gains["gains"], gains["classes"]) == ([], [])


def test_each_variant_has_its_own_surface():
    variants = {"baseline": BASELINE, "rope": (400.0, 1900.0), "mqa": (500.0, 2000.0)}
    (fit,) = compute(table(variants))["fits"]
    for name, (a, b) in variants.items():
        assert fit["variants"][name]["A"] == pytest.approx(a, rel=1e-4)
        assert fit["variants"][name]["B"] == pytest.approx(b, rel=1e-4)
    assert fit["parameters"]["A"] == fit["variants"]["baseline"]["A"]
    assert fit["parameters"]["E"] == pytest.approx(EPOCH["E"], abs=1e-6)
    gamma = EPOCH["alpha"] * EPOCH["beta"] / (EPOCH["alpha"] + EPOCH["beta"])
    assert fit["variants"]["mqa"]["gamma"] == pytest.approx(gamma, rel=1e-6)


def test_the_gain_is_the_ratio_of_computes_on_the_best_frontiers():
    gains = compute(table({"baseline": BASELINE, "rope": (400.0, 1900.0)}))
    (gain,) = gains["gains"]
    for point in gain["curve"]:
        at = point["baseline_compute"]
        assert point["target_loss"] == pytest.approx(best_loss(at), rel=1e-6)
        assert best_loss(at / point["ceg"], a=400.0, b=1900.0) == pytest.approx(best_loss(at), rel=1e-6)
    variant = gains["fits"][0]["variants"]["rope"]
    law = EPOCH["E"] + variant["K"] * at ** -variant["gamma"]
    assert law == pytest.approx(best_loss(at, a=400.0, b=1900.0), rel=1e-6)


def test_computes_that_the_variant_was_not_trained_with_are_marked():
    gains = compute(table({"baseline": BASELINE, "rope": (300.0, 1300.0), "mqa": BASELINE}))
    marks = {gain["variant"]: [point["extrapolated"] for point in gain["curve"]] for gain in gains["gains"]}
    assert marks["rope"][0] is True
    assert marks["rope"][-1] is False
    assert set(marks["mqa"]) == {False}


def test_intervals_come_from_scales_where_there_are_four_or_more():
    gains = compute(table({"baseline": BASELINE, "rope": (400.0, 1900.0)}, noise=0.002))
    (gain,) = gains["gains"]
    low, high = gain["interval"]
    assert 0 < low < gain["ceg"] < high
    (fit,) = gains["fits"]
    assert set(fit["intervals"]) == {"E", "A", "B", "alpha", "beta"}
    for name, (low, high) in fit["intervals"].items():
        assert low <= fit["parameters"][name] <= high
    assert fit["replicates_converged"] > 0.9


def test_it_needs_parameters_and_tokens(make_results):
    results = make_results({"tiny": {"baseline": [3.0, 2.5, 2.3], "rope": [2.9, 2.4, 2.2]}}, [1e12, 4e12, 16e12])
    with pytest.raises(UserError, match="loss_surface needs the number of parameters and of tokens of every result"):
        compute(results)


def test_it_needs_several_sizes(make_results):
    results = make_results(
        {"tiny": {"baseline": [3.0, 2.5, 2.3], "rope": [2.9, 2.4, 2.2]}}, [1e12, 4e12, 16e12], params=lambda *_: 1e4
    )
    with pytest.raises(UserError, match="loss_surface needs models of several sizes"):
        compute(results)
