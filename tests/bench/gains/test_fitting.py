"""The fitting engine against optimisers that share no code with it, and against laws whose parameters are known."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from scipy.special import huber, logsumexp

from bench.gains.fitting import DELTA, _Law, best_fit, minimise, refit

# Besiroglu et al. 2024 (arXiv 2404.10102): their refit of Hoffmann et al.'s table.
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
EPOCH = np.array([np.log(E), np.log(A), np.log(B), ALPHA, BETA])
HOFFMANN = np.array([np.log(1.6934), np.log(406.4), np.log(410.7), 0.3392, 0.2849])

GRIDS = {
    "Hoffmann's, thinned": list(product([-1, 1], [0, 10, 20], [0, 10, 20], [0, 0.5, 1], [0, 0.5, 1])),
    "near": [EPOCH + shift for shift in (-0.05, 0.02, 0.05)],
    "flat exponents": list(product([0.5], [0, 5], [0, 5], [0.01], [0.01])),
    "steep exponents": list(product([0], [20], [20], [1.5, 2], [1.5, 2])),
    "Hoffmann's published optimum": [HOFFMANN],
}


def chinchilla(noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Design and ln L of 240 runs as spread as Hoffmann's: N from 57M to 16B, C from 1.4e18 to 1.3e22 FLOPs."""
    compute = np.repeat(np.geomspace(1.4e18, 1.3e22, 12), 20)
    fractions = np.tile(np.linspace(0, 1, 20), 12)
    centre = np.sqrt(compute / 120)
    n = np.clip(centre * 5 ** (2 * fractions - 1), 57e6, 16e9)
    d = compute / (6 * n)
    rng = np.random.default_rng(seed)
    log_loss = np.log(E + A / n**ALPHA + B / d**BETA) + noise * rng.standard_t(3, len(n))
    design = np.zeros((len(n), 3, 5))
    design[:, 0, 0] = design[:, 1, 1] = design[:, 2, 2] = 1
    design[:, 1, 3], design[:, 2, 4] = -np.log(n), -np.log(d)
    return design, log_loss


def variants(
    count: int, budgets: int, seeds: int, noise: float, shared: bool = False, seed: int = 0, constant: float = 1.8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Design, ln L, a start, each row's (variant, seed): L = E + K_v C^-gamma_v with (e, k_v..., gamma...)."""
    rng = np.random.default_rng(seed)
    variant, budget, run = (index.ravel() for index in np.indices((count, budgets, seeds)))
    log_compute = np.log(np.geomspace(1e15, 64e15, budgets))[budget]
    gamma = np.full(count, 0.15) if shared else 0.15 + 0.02 * rng.standard_normal(count)
    k = np.log(1.5) + 0.1 * rng.standard_normal(count) + gamma * log_compute.mean()
    log_loss = np.log(constant + np.exp(k[variant] - gamma[variant] * log_compute))
    log_loss += noise * rng.standard_normal(len(variant))
    design = np.zeros((len(variant), 2, 1 + count + (1 if shared else count)))
    design[:, 0, 0] = 1
    design[np.arange(len(variant)), 1, 1 + variant] = 1
    design[np.arange(len(variant)), 1, 1 + count + (0 if shared else variant)] = -log_compute
    start = np.concatenate([[0.0], np.full(count, 0.1 * log_compute.mean()), np.full(design.shape[2] - 1 - count, 0.1)])
    return design, log_loss, start, np.stack([variant, run])


def bootstrap(groups: np.ndarray, replicates: int, seed: int = 0) -> np.ndarray:
    """(replicates, n) weights: the seeds of each variant drawn with replacement."""
    seeds = groups[1].max() + 1
    drawn = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), (replicates, groups[0].max() + 1))
    return drawn[:, groups[0], groups[1]].astype(float)


def objective_of(design, log_loss, weights=1.0):
    """The objective as SciPy has it."""
    return lambda parameters: (weights * huber(DELTA, logsumexp(design @ parameters, axis=1) - log_loss)).sum()


def reference(design, log_loss, weights=1.0, delta=DELTA):
    """The objective and its gradient as PyTorch has them."""
    design, log_loss, weights = (torch.as_tensor(array, dtype=torch.float64) for array in (design, log_loss, weights))

    def value_and_gradient(parameters):
        parameters = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
        fitted = torch.logsumexp(design @ parameters, dim=1)
        losses = torch.nn.functional.huber_loss(fitted, log_loss, reduction="none", delta=delta)
        value = (weights * losses).sum()
        (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.numpy()

    return value_and_gradient


def scipy_optimum(design, log_loss, start, weights=1.0, rounds=8):
    """Parameters and objective where BFGS and Nelder-Mead, in turns, no longer find anything lower."""
    # In orthogonal columns, or neither gets along the ridge between a factor and its exponent.
    _, triangle = np.linalg.qr(design.reshape(-1, design.shape[2]))
    moves = np.linalg.inv(triangle)
    both, value = reference(design @ moves, log_loss, weights), objective_of(design @ moves, log_loss, weights)
    x = triangle @ start
    for step in range(rounds):
        x = minimize(lambda x: [1e6 * part for part in both(x)], x, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        simplex = x + np.vstack([np.zeros(len(x)), np.eye(len(x)) * 0.03 * 0.3**step])
        limits = {"xatol": 1e-10, "fatol": 1e-18, "maxiter": 3000, "maxfev": 3000, "adaptive": True}
        x = minimize(value, x, method="Nelder-Mead", options={"initial_simplex": simplex, **limits}).x
    return moves @ x, value(x)


def natural(parameters: np.ndarray) -> np.ndarray:
    """(E, alpha, beta) of (e, a, b, alpha, beta)."""
    return np.array([np.exp(parameters[0]), parameters[3], parameters[4]])


class TestChinchilla:
    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
    def test_exact_data_give_the_parameters_back_from_any_grid(self, grid):
        best = best_fit(*chinchilla(), grid)
        assert best.converged
        assert best.identified
        assert best.starts == len(grid)
        assert best.parameters == pytest.approx(EPOCH, abs=1e-6)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_heavy_tailed_noise_gives_the_optimum_that_scipy_finds(self, seed):
        design, log_loss = chinchilla(0.01, seed)
        parameters, objective = scipy_optimum(design, log_loss, EPOCH)
        for grid in GRIDS.values():
            best = best_fit(design, log_loss, grid)
            assert best.converged
            assert best.objective <= objective * (1 + 1e-9)
            assert natural(best.parameters) == pytest.approx(natural(parameters), abs=1e-4)

    def test_starts_that_end_elsewhere_do_not_agree(self):
        plateau = np.array([0.5, -900, -900, 0.3, 0.3])  # A / N^alpha is 0 in float64: nothing pulls on alpha
        best = best_fit(*chinchilla(0.01), [HOFFMANN, EPOCH, plateau])
        assert (best.agreeing, best.starts) == (2, 3)
        assert best.converged

    def test_minimum_is_stationary_by_an_independent_gradient(self):
        design, log_loss = chinchilla(0.01, 2)
        best = best_fit(design, log_loss, [HOFFMANN])
        value, gradient = reference(design, log_loss)(best.parameters)
        assert best.objective == pytest.approx(value, rel=1e-12)
        assert np.abs(gradient).max() < 1e-8

    def test_variable_projection_agrees_where_the_noise_is_small(self):
        """VPNLS: E, A, B >= 0 by non-negative least squares for each pair of exponents."""
        design, log_loss = chinchilla()
        log_loss = log_loss + 1e-5 * np.random.default_rng(0).standard_normal(len(log_loss))
        loss, log_n, log_d = np.exp(log_loss), -design[:, 1, 3], -design[:, 2, 4]

        def project(exponents):
            terms = np.stack([np.ones_like(log_n), np.exp(-exponents[0] * log_n), np.exp(-exponents[1] * log_d)], 1)
            return nnls(terms / terms.mean(0) / loss[:, None], np.ones_like(loss))

        options = {"xatol": 1e-9, "fatol": 1e-16}
        exponents = minimize(lambda x: project(x)[1], [0.3, 0.3], method="Nelder-Mead", options=options).x
        constant = project(exponents)[0][0]
        best = best_fit(design, log_loss, [HOFFMANN])
        assert natural(best.parameters) == pytest.approx([constant, *exponents], abs=1e-5)


class TestReplicates:
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("noise", [0.001, 0.01])
    def test_each_is_the_weighted_fit_that_scipy_finds(self, shared, noise):
        design, log_loss, start, groups = variants(3, 5, 4, noise, shared)
        weights = bootstrap(groups, 4)
        best = best_fit(design, log_loss, start)
        fit = refit(design, log_loss, best.parameters, weights)
        assert fit.converged.all()
        for i in range(len(weights)):
            parameters, objective = scipy_optimum(design, log_loss, best.parameters, weights[i])
            assert fit.objective[i] <= objective * (1 + 1e-9)
            # In the loss that is predicted 100 times beyond the data, where all parameters matter.
            beyond = design.copy()
            beyond[:, 1, 4:] *= 1 + np.log(100) / np.log(64e15)
            ours, theirs = (np.logaddexp.reduce(beyond @ p, axis=1) for p in (fit.parameters[i], parameters))
            assert ours == pytest.approx(theirs, abs=1e-5)

    @pytest.mark.parametrize("noise", [0.001, 0.01])
    @pytest.mark.parametrize(
        ("count", "budgets", "seeds", "shared"), [(3, 3, 2, True), (5, 4, 3, False), (8, 6, 3, False)]
    )
    def test_they_converge_on_small_studies(self, noise, count, budgets, seeds, shared):
        design, log_loss, start, groups = variants(count, budgets, seeds, noise, shared)
        best = best_fit(design, log_loss, start)
        assert best.converged
        assert refit(design, log_loss, best.parameters, bootstrap(groups, 100)).converged.mean() > 0.99

    def test_batch_and_single_fits_agree(self):
        design, log_loss, start, groups = variants(3, 5, 4, 0.003)
        weights = bootstrap(groups, 20)
        together = refit(design, log_loss, start, weights)
        for i in range(len(weights)):
            alone = minimise(design, log_loss, start, weights[i])
            assert alone.parameters[0] == pytest.approx(together.parameters[i], abs=1e-6)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 3), min_size=60, max_size=60), st.sampled_from([0.001, 0.01]))
    def test_integer_weights_are_repeated_rows(self, repeats, noise):
        design, log_loss, start, _ = variants(3, 5, 4, noise, shared=True)
        repeats = np.array(repeats) + (np.arange(60) % 4 == 0)  # every budget keeps a row
        weighted = minimise(design, log_loss, start, repeats)
        repeated = minimise(np.repeat(design, repeats, axis=0), np.repeat(log_loss, repeats), start)
        assert weighted.converged[0]
        assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)
        assert weighted.parameters == pytest.approx(repeated.parameters, abs=1e-5)


class TestInvariance:
    @settings(max_examples=20, deadline=None)
    @given(st.floats(-60, 60))
    def test_another_unit_of_compute_changes_the_factors_only(self, shift):
        design, log_loss, start, _ = variants(3, 5, 3, 0.003)
        shifted = design.copy()
        shifted[:, 1, 4:] -= shift * (design[:, 1, 4:] != 0)
        first = minimise(design, log_loss, start).parameters[0]
        second = minimise(shifted, log_loss, start + np.r_[0, np.full(3, 0.1 * shift), np.zeros(3)]).parameters[0]
        assert second[[0, 4, 5, 6]] == pytest.approx(first[[0, 4, 5, 6]], abs=1e-6)
        assert second[1:4] == pytest.approx(first[1:4] + shift * first[4:], abs=1e-5)

    def test_scaled_columns_scale_the_parameters(self):
        design, log_loss, start, _ = variants(2, 5, 3, 0.01)
        scale = np.array([1, 1e-4, 1e4, 1e3, 1e-3])
        first, second = minimise(design, log_loss, start), minimise(design * scale, log_loss, start / scale)
        assert second.parameters * scale == pytest.approx(first.parameters, abs=1e-5)
        assert second.converged.all()


class TestZeroConstant:
    @pytest.mark.parametrize("noise", [0.003, 0.01])
    def test_losses_that_fall_faster_than_a_power_law_leave_no_constant(self, noise):
        design, log_loss, start, _ = variants(2, 6, 3, noise, shared=True, constant=-0.5)
        best = best_fit(design, log_loss, [start, start + 0.1])
        # Without E the law is linear: ln L = k_v - gamma ln C.
        parameters, objective = scipy_optimum(design[:, 1:, 1:], log_loss, start[1:])
        assert np.exp(best.parameters[0]) == 0
        assert best.converged
        assert best.agreeing == 2
        assert best.objective == pytest.approx(objective, rel=1e-6)
        assert best.parameters[1:] == pytest.approx(parameters, abs=1e-4)

    def test_starts_agree_on_a_flat_minimum(self):
        design, log_loss, start, _ = variants(2, 6, 3, 0.0, shared=True, constant=-0.5)
        starts = [start, start + 0.1, start - 0.1]
        best = best_fit(design, log_loss, starts)
        assert best.converged
        assert best.agreeing == 3
        # With residuals far beyond delta the loss is all but absolute: the line can move a little without cost.
        assert np.ptp(minimise(design, log_loss, starts).parameters[:, 3]) > 1e-5

    def test_a_true_power_law_has_a_constant_of_rounding(self):
        design, log_loss, start, _ = variants(2, 6, 1, 0.0, constant=0.0)
        best = best_fit(design, log_loss, start)
        assert best.converged
        assert np.exp(best.parameters[0]) < 1e-6
        assert np.logaddexp.reduce(design @ np.maximum(best.parameters, -99), axis=1) == pytest.approx(
            log_loss, abs=1e-9
        )

    def test_replicates_may_leave_zero_again(self):
        zero = variants(2, 6, 3, 0.001, shared=True, constant=-0.5)
        positive = variants(2, 6, 3, 0.001, shared=True, constant=1.8)
        best = best_fit(*zero[:3])
        fit = refit(positive[0], positive[1], best.parameters, np.ones((1, len(positive[1]))))
        assert fit.parameters[0] == pytest.approx(best_fit(*positive[:3]).parameters, abs=1e-6)


class TestFixed:
    def test_pinned_constants_at_once_equal_scipy_one_by_one(self):
        design, log_loss, start, _ = variants(2, 5, 3, 0.003, shared=True)
        pins = np.log([0.5, 1.0, 1.5])
        starts = np.tile(start, (3, 1))
        starts[:, 0] = pins
        fit = minimise(design, log_loss, starts, fixed=[True, False, False, False])
        assert fit.converged.all()
        assert (fit.parameters[:, 0] == pins).all()
        for i, pin in enumerate(pins):

            def objective(x, pin=pin):
                return huber(DELTA, np.logaddexp(pin, design[:, 1, 1:] @ x) - log_loss).sum()

            options = {"xatol": 1e-9, "fatol": 1e-18, "maxiter": 5000, "maxfev": 5000}
            x = fit.parameters[i, 1:]
            found = minimize(objective, x, method="Nelder-Mead", options=options)
            assert fit.objective[i] == pytest.approx(objective(x), rel=1e-9)
            assert found.fun >= fit.objective[i] * (1 - 1e-9)

    def test_a_term_may_be_held_absent(self):
        design, log_loss, start, _ = variants(2, 5, 3, 0.003)
        start[0] = -np.inf
        held = minimise(design, log_loss, start, fixed=np.arange(5) == 0)
        without = minimise(design[:, 1:, 1:], log_loss, start[1:])
        assert held.converged.all()
        assert held.parameters[0, 0] == -np.inf
        assert held.parameters[:, 1:] == pytest.approx(without.parameters, abs=1e-7)

    def test_nothing_free_evaluates_the_objective(self):
        design, log_loss = chinchilla(0.01)
        fit = minimise(design, log_loss, EPOCH, fixed=np.ones(5, bool))
        assert fit.objective[0] == pytest.approx(reference(design, log_loss)(EPOCH)[0])
        assert (fit.parameters[0] == EPOCH).all()
        assert fit.converged.all()


class TestFlags:
    def test_too_few_iterations_are_not_converged(self):
        assert not minimise(*chinchilla(0.01), HOFFMANN, iterations=1).converged.any()

    def test_two_budgets_do_not_determine_three_parameters(self):
        design, log_loss, start, _ = variants(1, 2, 3, 0.003)
        best = best_fit(design, log_loss, start)
        assert not best.identified
        assert not best.converged
        assert np.isfinite(best.parameters[1:]).all()

    def test_equal_columns_are_not_identified(self):
        design, log_loss, start, _ = variants(2, 5, 3, 0.003)
        twice = np.concatenate([design, design[..., -1:]], axis=2)
        fit = minimise(twice, log_loss, np.append(start, 0.0))
        assert not fit.identified.any()
        assert not fit.converged.any()
        assert fit.objective == pytest.approx(minimise(design, log_loss, start).objective)

    def test_a_variant_without_weight_is_not_identified_in_that_replicate_only(self):
        design, log_loss, start, groups = variants(2, 5, 3, 0.003)
        weights = np.stack([np.ones(len(log_loss)), groups[0] == 0])
        fit = refit(design, log_loss, start, weights)
        assert fit.identified.tolist() == [True, False]
        assert fit.converged.tolist() == [True, False]

    @pytest.mark.parametrize("change", ["rows", "infinite", "start", "negative"])
    def test_impossible_arguments_raise(self, change):
        design, log_loss = chinchilla()
        start, weights = EPOCH.copy(), np.ones(len(log_loss))
        if change == "rows":
            log_loss = log_loss[1:]
        if change == "infinite":
            log_loss[3] = np.nan
        if change == "start":
            start[0] = -np.inf
        if change == "negative":
            weights[0] = -1
        with pytest.raises(ValueError, match=r"must|has 239 rows"):
            minimise(design, log_loss, start, weights)


def test_losses_of_their_own_are_fitted_each_for_itself():
    design, log_loss, start, _ = variants(2, 5, 3, 0.003)
    losses = log_loss + np.random.default_rng(1).normal(0, 0.003, (4, len(log_loss)))
    together = refit(design, losses, start)
    for row, parameters in zip(losses, together.parameters, strict=True):
        alone = minimise(design, row, start)
        assert together.converged.all()
        assert alone.parameters[0] == pytest.approx(parameters, rel=1e-6)


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_derivatives_match_finite_differences(delta):
    design, log_loss = chinchilla(0.01)
    weights, offset = np.random.default_rng(0).uniform(0, 2, (1, len(log_loss))), np.tile(-log_loss, (3, 1, 1))
    law = _Law(design, delta)
    objective, gradient, hessian, _, _ = law.derivatives(EPOCH[None], weights, offset)
    value, expected = reference(design, log_loss, weights[0], delta)(EPOCH)
    assert objective[0] == pytest.approx(value, rel=1e-12)
    assert law.objective(EPOCH, weights, offset) == pytest.approx(value, rel=1e-12)
    assert gradient[0] == pytest.approx(expected, rel=1e-10)
    step = 1e-8 * np.eye(5)  # too short for a residual to cross delta
    ahead, behind = (law.derivatives(EPOCH + sign * step, weights.repeat(5, 0), offset)[1] for sign in (1, -1))
    assert (ahead - behind) / 2e-8 == pytest.approx(hessian[0], rel=1e-4, abs=1e-5 * np.abs(hessian).max())
