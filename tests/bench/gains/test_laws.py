import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from bench.gains.fitting import DELTA, Best
from bench.gains.laws import (
    ROBUST,
    FittedLaw,
    LossSurfaces,
    Observations,
    PowerLaws,
    describe,
    excess,
    finite_exp,
    fit_law,
    fit_pinned,
    fit_sentences,
    noise_of_means,
)
from bench.gains.study import load_study
from bench.gains.tuning import TunedVariant

COMPUTE = 1e18 * 4.0 ** np.arange(5)
E, K, GAMMA = 1.7, np.array([900.0, 700.0, 1200.0]), np.array([0.16, 0.16, 0.18])
NAMES = ("baseline", "mqa", "rope")


def tuned(losses, **costs):
    """A tuned variant in memory, losses and costs (K,) or (seeds, K)."""
    losses = np.atleast_2d(losses)
    count = losses.shape[1]
    return TunedVariant(
        scale="tiny",
        variant="rope",
        innovations=("rope",),
        scales=("tiny",) * count,
        seeds=tuple(range(len(losses))),
        budgets=np.arange(1.0, count + 1),
        rates=np.full(count, 1e-3),
        losses=losses,
        loss_errors=np.zeros(count),
        costs={axis: np.broadcast_to(np.asarray(values, float), losses.shape) for axis, values in costs.items()},
        tuning="single",
    )


@pytest.fixture
def fitted(make_results):
    """A study of three power laws with given exponents and noise (3, seeds, 5), and its variants."""

    def fit(exponents=GAMMA, noise=0.0):
        losses = {
            name: E + k * COMPUTE**-g + line
            for name, k, g, line in zip(
                NAMES, K, exponents, np.broadcast_to(noise, (3, *np.shape(noise)[1:])), strict=True
            )
        }
        study = load_study(make_results({"tiny": losses}, COMPUTE), baseline="baseline", replicates=200, seed=0)
        return study, [study.tuned["tiny", name] for name in NAMES]

    return fit


def test_observations_are_mean_losses_about_the_middle_of_each_variant():
    variants = [tuned([[1.0, 2.0], [3.0, 4.0]], seconds=[1.0, 100.0]), tuned([5.0, 6.0, 7.0], seconds=[1.0, 10.0, 1e5])]
    seen = Observations.gather(variants, "seconds")
    assert seen.variant.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(seen.centres, np.log([10, 100]))
    np.testing.assert_allclose(seen.log_compute, np.log([0.1, 10, 0.01, 0.1, 1000]))
    np.testing.assert_allclose(np.exp(seen.log_losses), [2, 3, 5, 6, 7])


@pytest.mark.parametrize("shared", [True, False])
def test_the_design_is_the_law(fitted, shared):
    seen = Observations.gather(fitted()[1], "model_flops")
    law = PowerLaws(seen, shared=shared)
    parameters = np.array([np.log(E), *np.log([2.0, 3.0, 4.0]), *([0.2] if shared else [0.1, 0.2, 0.3])])
    log_asymptote, multipliers, exponents = law.split(parameters)
    v, x = seen.variant, seen.log_compute
    expected = np.exp(log_asymptote) + np.exp(multipliers[v] - exponents[v] * x)
    np.testing.assert_allclose(np.exp(law.design @ parameters).sum(axis=1), expected)
    assert exponents.tolist() == ([0.2] * 3 if shared else [0.1, 0.2, 0.3])


@pytest.mark.parametrize(("shared", "exponents"), [(True, np.full(3, 0.16)), (False, GAMMA)])
def test_a_fit_without_noise_finds_the_truth(fitted, shared, exponents):
    study, variants = fitted(exponents)
    law = PowerLaws(Observations.gather(variants, "model_flops"), shared=shared)
    fit = fit_law(law, variants, study)
    log_asymptote, multipliers, found = law.split(fit.parameters)
    assert fit.best.converged
    assert fit.best.agreeing > 1
    assert np.exp(log_asymptote) == pytest.approx(E, rel=1e-6)
    np.testing.assert_allclose(found, exponents, rtol=1e-6)
    np.testing.assert_allclose(multipliers + found * law.observations.centres, np.log(K), rtol=1e-6)


def test_the_line_of_ln_ceg_is_that_of_the_laws_whatever_their_centres():
    # The variant was trained on budgets a hundredfold larger, so that the centres differ.
    variants = [tuned(np.ones(5), seconds=COMPUTE), tuned(np.ones(5), seconds=COMPUTE * 100)]
    law = PowerLaws(Observations.gather(variants, "seconds"), shared=False)
    centres, exponents = law.observations.centres, GAMMA[[0, 2]]
    heights = np.log(K[[0, 2]])
    parameters = np.array([np.log(E), *(heights - exponents * centres), *exponents])
    intercept, gradient = law.line(parameters, 1)
    for log_compute in np.log(COMPUTE):
        log_needed = (heights[1] - heights[0] + exponents[0] * log_compute) / exponents[1]
        assert intercept + gradient * (log_compute - centres[0]) == pytest.approx(log_compute - log_needed)
    moved = law.centred_at(centres + np.log([2.0, 8.0]))
    # In a unit in which the baseline's compute is doubled and the variant's eightfold, the gain is a quarter.
    assert moved.line(parameters, 1) == pytest.approx([intercept - np.log(4), gradient])
    assert law.observations.centres is centres


@pytest.mark.parametrize("asymptote", [0.0, 1.0])
def test_a_pinned_asymptote_stays_where_it_is(fitted, asymptote):
    _, variants = fitted(np.full(3, 0.16))
    law = PowerLaws(Observations.gather(variants, "model_flops"), shared=True)
    log_asymptote, _, exponents = law.split(fit_pinned(law, asymptote, DELTA))
    assert (np.exp(log_asymptote) if np.isfinite(log_asymptote) else 0.0) == pytest.approx(asymptote)
    # With less of the loss below it, what is left falls more slowly.
    line = np.polyfit(law.observations.log_compute, np.log(np.exp(law.log_losses) - asymptote), 1)
    assert exponents[0] == pytest.approx(-line[0], rel=0.1)
    assert exponents[0] < 0.16


def test_the_noise_of_means_is_pooled_over_budgets_and_variants():
    generator = np.random.default_rng(0)
    losses = np.exp(generator.normal(1.0, 0.01, (2, 400, 50)))
    variants = [tuned(losses[0]), tuned(losses[1][:100]), tuned([3.0, 2.0])]
    expected = 0.01 * np.sqrt((1 / 400 + 1 / 100) / 2)
    assert noise_of_means(variants) == pytest.approx(expected, rel=0.03)
    assert noise_of_means([tuned([3.0, 2.0])]) == 0


def test_hubers_loss_turns_linear_well_beyond_the_noise(fitted):
    noise = np.random.default_rng(0).normal(0, 0.02, (3, 3, 5))
    study, variants = fitted(noise=noise)
    law = PowerLaws(Observations.gather(variants, "model_flops"), shared=True)
    assert fit_law(law, variants, study).delta == pytest.approx(ROBUST * noise_of_means(variants))
    study, variants = fitted()
    assert fit_law(law, variants, study).delta == DELTA


def test_replicates_are_fits_to_resampled_means(fitted):
    study, variants = fitted(np.full(3, 0.16), np.random.default_rng(0).normal(0, 0.003, (3, 3, 5)))
    law = PowerLaws(Observations.gather(variants, "model_flops"), shared=True)
    fit = fit_law(law, variants, study)
    assert (fit.share, fit.misfit) == (1.0, 0.0)
    weights = study.resampling.of_seeds("tiny", (0, 1, 2))
    losses = np.concatenate([weights @ variant.losses for variant in variants], axis=1)
    for row in (0, 1, 2):
        alone = PowerLaws(law.observations, shared=True)
        alone.log_losses = np.log(losses[row])
        found = fit_pinned(alone, float(np.exp(fit.replicates[row, 0])), fit.delta)
        np.testing.assert_allclose(found, fit.replicates[row], atol=1e-4)


def test_a_law_that_does_not_hold_is_found_out_and_has_wider_replicates(fitted):
    noise = np.random.default_rng(0).normal(0, 0.0005, (3, 3, 5))
    study, variants = fitted(np.array([0.12, 0.16, 0.2]), noise)
    seen = Observations.gather(variants, "model_flops")
    wrong, right = (fit_law(PowerLaws(seen, shared=shared), variants, study) for shared in (True, False))
    assert wrong.misfit > 0.002
    assert right.misfit == 0
    assert wrong.replicates[:, 1].std() > 2 * right.replicates[:, 1].std()


def test_what_seeds_explain_is_rarely_called_a_misfit():
    # Fifteen means with three parameters, whose noise is known from three seeds each.
    generator = np.random.default_rng(0)
    design = generator.normal(size=(15, 3))
    found = []
    for _ in range(2000):
        samples = generator.normal(0, 0.01, (3, 15))
        means = samples.mean(axis=0)
        residuals = means - design @ np.linalg.lstsq(design, means, rcond=None)[0]
        found.append(excess(residuals, 3, np.sqrt(samples.var(axis=0, ddof=1).mean() / 3)))
    assert np.mean(np.array(found) > 0) < 0.06
    residuals = generator.normal(0, 0.05, 15)
    assert excess(residuals, 3, 0.01) == pytest.approx(np.sqrt((residuals**2).sum() / 12 - 0.01**2))
    assert excess(residuals, 3, 0.0) == 0
    assert excess(residuals, 15, 0.01) == 0


def test_an_estimate_without_resampled_units_has_no_spread():
    best = Best(np.zeros(2), 0.0, True, True, 1, 1)
    fit = FittedLaw(best, DELTA, 0.0, np.random.default_rng(0).normal(size=(1000, 2)), 1.0)
    assert fit.spread(1, np.array(0.0), fit.replicates[:, 0]) is None
    assert FittedLaw(best, DELTA, 0.0, np.zeros((0, 2)), 0.0).spread(3, np.array(0.0), np.zeros(0)) is None
    spread = fit.spread(3, np.array(0.0), fit.replicates[:, 0])
    assert spread.freedom == 2
    assert spread.error == pytest.approx(np.sqrt(4 / 2) * fit.replicates[:, 0].std())


def test_what_is_told_of_a_law():
    best = Best(np.array([np.log(2.0)]), 0.0, True, True, 20, 30)
    fit = FittedLaw(best, 0.004, 0.0, np.log(np.random.default_rng(0).normal(2, 0.1, (4000, 1))), 0.99)

    class OnlyConstant:
        name = "L = E"

    told = describe(OnlyConstant(), fit, {"E": lambda parameters: np.exp(parameters[..., 0])}, 3)
    low, high = told.pop("intervals")["E"]
    assert (high - low) / 2 == pytest.approx(4.302653 * np.sqrt(2) * 0.1, rel=0.05)
    assert told == {
        "law": "L = E",
        "parameters": {"E": pytest.approx(2.0)},
        "delta": 0.004,
        "misfit": 0.0,
        "converged": True,
        "best_starts": 20,
        "starts": 30,
        "replicates_converged": 0.99,
    }


def test_what_no_float_can_hold_is_none():
    assert finite_exp(1.0) == pytest.approx(np.e)
    assert finite_exp(-1e6) == 0
    assert finite_exp(1e6) is None
    assert finite_exp(710.0) is None


def test_a_fit_that_cannot_be_relied_on_says_so(fitted):
    law = PowerLaws(Observations.gather(fitted()[1], "model_flops"), shared=True)

    def said(converged, identified, share, misfit=0.0):
        best = Best(np.zeros(5), 0.0, converged, identified, 1, 1)
        return fit_sentences(law, FittedLaw(best, DELTA, misfit, np.zeros((1, 5)), share), "tiny, axis seconds")

    assert said(True, True, 1.0) == []
    assert said(False, True, 1.0) == [
        "tiny, axis seconds: the fit of L = E + K C^-gamma did not converge; do not rely on it."
    ]
    assert said(False, False, 1.0) == [
        "tiny, axis seconds: the fit of L = E + K C^-gamma is not determined by so few results; do not rely on it."
    ]
    (sentence,) = said(True, True, 1.0, misfit=0.012)
    assert sentence.startswith("tiny, axis seconds: L = E + K C^-gamma misses mean losses by 1.20% more than seeds")
    (sentence,) = said(True, True, 0.5)
    assert sentence.startswith("tiny, axis seconds: 50% of the bootstrap replicates of L = E + K C^-gamma converged")


@given(
    st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
    st.floats(50, 2000),
    st.floats(50, 2000),
    st.floats(1e17, 1e24),
)
def test_the_frontier_of_a_surface_is_its_lowest_loss_at_each_compute(alpha, beta, a, b, compute):
    law = LossSurfaces([tuned([3.0, 2.5, 2.2], flops_6nd=[6e16, 6e18, 6e20], tokens=[1e9, 1e10, 1e11])])
    parameters = np.array([np.log(1.8), np.log(a), np.log(b), alpha, beta])
    multipliers, gamma = law.frontier(parameters)

    def loss(log_size):
        return 1.8 + a * np.exp(-alpha * log_size) + b * (compute / 6 / np.exp(log_size)) ** -beta

    lowest = minimize_scalar(loss, bounds=(0, np.log(compute / 6)), method="bounded", options={"xatol": 1e-10}).fun
    assert 1.8 + np.exp(multipliers[0]) * compute**-gamma == pytest.approx(lowest, rel=1e-9)
    assert gamma == pytest.approx(alpha * beta / (alpha + beta))


def test_the_design_of_a_surface_is_the_law():
    generator = np.random.default_rng(0)
    sizes, tokens = np.exp(generator.uniform(15, 22, (2, 5))), np.exp(generator.uniform(18, 25, (2, 5)))
    variants = [tuned(np.ones(5), flops_6nd=6 * n * d, tokens=d) for n, d in zip(sizes, tokens, strict=True)]
    law = LossSurfaces(variants)
    parameters = np.array([np.log(1.8), *np.log([400.0, 500.0]), *np.log([2000.0, 1500.0]), 0.34, 0.37])
    log_e, log_a, log_b, alpha, beta = law.split(parameters)
    assert np.exp(log_e) == pytest.approx(1.8)
    expected = 1.8 + np.exp(log_a)[:, None] * sizes**-alpha + np.exp(log_b)[:, None] * tokens**-beta
    np.testing.assert_allclose(np.exp(law.design @ parameters).sum(axis=1), expected.ravel())
