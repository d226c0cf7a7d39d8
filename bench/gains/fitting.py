"""Fits scaling laws: the minimum of a Huber loss of ln L, for any law whose ln L is a log-sum-exp of linear functions.

    L = E + K_v C^-gamma_v              ln L = ln(exp(e) + exp(k_v - gamma_v ln C))
    L = E + A / N^alpha + B / D^beta    ln L = ln(exp(e) + exp(a - alpha ln N) + exp(b - beta ln D))

Such a law is a design (n, K, P): the fit to row i is f_i = ln sum_k exp(design[i, k] . parameters). The objective is
that of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3), summed over rows: averaged, it is so small that optimisers
stop too early (Besiroglu et al. 2024, arXiv 2404.10102). Start at `best_fit`; `refit` follows it through a bootstrap.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import qr, solve_triangular
from scipy.optimize import minimize as scipy_minimize

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DELTA = 1e-3  # where the Huber loss turns from quadratic to linear, in nats (Hoffmann et al. 2022)
# Steps tried in each iteration, of which the lowest is taken; the longer ones are for valleys where Newton's is timid.
DAMPINGS = np.array([0.0, 0.0, 0.0, 0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 1e2, 1e4])
LENGTHS = np.array([1.0, 0.3, 3.0, 10.0, *[1.0] * 9])
STRIDE = 5.0  # the most by which a step may change the logarithm of a term
PATIENCE = 60  # iterations before E = 0 is tried
FLAT = 1e-13  # the smallest eigenvalue of a correlation matrix that is more than rounding
NEGLIGIBLE = 1e-6  # share of L below which a constant term may as well be zero
CHUNK = 4_000_000  # numbers in the largest temporary array


@dataclass(frozen=True)
class Fit:
    """Where the search from each start ended.

    Attributes:
        parameters: (B, P); that of a constant term is -inf where the best constant is zero (E = 0).
        objective: (B,) sum over rows of weight x Huber loss.
        converged: (B,) the end is a minimum, to rounding, and identified.
        identified: (B,) the rows with weight determine every free parameter; otherwise the end is one of many as good.
    """

    parameters: Floats
    objective: Floats
    converged: Bools
    identified: Bools

    def take(self, rows: NDArray) -> "Fit":
        """Only these rows."""
        return Fit(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Best:
    """The lowest minimum that a search found.

    Attributes:
        parameters: (P,), as in `Fit`.
        objective: sum over rows of weight x Huber loss.
        converged: as in `Fit`, and Nelder-Mead found nothing lower nearby.
        identified: as in `Fit`.
        agreeing: number of starts whose search converged to this objective, within a millionth. Where the residuals
            far exceed delta the minimum may be flat, like the median of an even number: their parameters then differ.
        starts: number of starts.
    """

    parameters: Floats
    objective: float
    converged: bool
    identified: bool
    agreeing: int
    starts: int


def minimise(
    design: ArrayLike,
    log_loss: ArrayLike,
    starts: ArrayLike,
    weights: ArrayLike | None = None,
    fixed: ArrayLike | None = None,
    *,
    delta: float = DELTA,
    iterations: int = 500,
) -> Fit:
    """Minimises sum_i weights[i] x Huber(log_loss[i] - f_i(parameters)) from each start, all starts at once.

    Each iteration takes the lowest of several damped Newton steps (see `_newton_steps`). Raw ln C, ln N and ln D will
    do as columns: the search runs in orthogonal combinations of them.

    Args:
        design: (n, K, P).
        log_loss: (n,) ln L, or (B, n) for losses of its own per start.
        starts: (B, P), or (P,) for one start.
        weights: (n,), or (B, n) for a set of them per start; not negative; 1 by default.
        fixed: (P,) mask of parameters that keep the value of their start, which may be -inf: that term is absent.
        delta: where the Huber loss turns linear, in nats.
        iterations: after so many a search gives up, not converged.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or a negative weight.
    """
    problem = _Problem.of(design, log_loss, starts, weights, fixed, delta)
    fit = _with_zero_constant(problem, problem.search(min(iterations, PATIENCE)), iterations)
    slow = np.flatnonzero(~fit.converged)
    if iterations > PATIENCE and len(slow):
        fit = _put(fit, slow, problem.at(fit.parameters[slow], slow).search(iterations - PATIENCE))
    return fit


def best_fit(
    design: ArrayLike,
    log_loss: ArrayLike,
    starts: ArrayLike,
    weights: ArrayLike | None = None,
    fixed: ArrayLike | None = None,
    *,
    delta: float = DELTA,
) -> Best:
    """The lowest minimum from all `starts` (B, P), checked without derivatives; arguments as in `minimise`.

    Where a search that did not converge ended lower than all that did, its end is the answer, not converged.
    """
    problem = _Problem.of(design, log_loss, starts, weights, fixed, delta)
    fit = minimise(design, log_loss, starts, weights, fixed, delta=delta)
    lowest = fit.objective <= fit.objective.min() + problem.slack(fit.objective.min())
    best = int(np.lexsort((fit.objective, ~fit.converged, ~lowest))[0])
    objective = float(fit.objective[best])
    polished = _nelder_mead(problem.at(fit.parameters[best : best + 1], np.arange(1)), objective)
    return Best(
        parameters=fit.parameters[best],
        objective=objective,
        converged=bool(fit.converged[best]) and polished >= objective - problem.slack(objective),
        identified=bool(fit.identified[best]),
        agreeing=int((fit.converged & (fit.objective <= objective + problem.slack(objective))).sum()),
        starts=len(fit.parameters),
    )


def refit(
    design: ArrayLike,
    log_loss: ArrayLike,
    parameters: ArrayLike,
    weights: ArrayLike | None = None,
    fixed: ArrayLike | None = None,
    *,
    delta: float = DELTA,
) -> Fit:
    """The minimum for each row of `log_loss` or `weights` (R, n), such as bootstrap replicates, from `parameters` (P,).

    A constant term that is zero in `parameters` (-inf) but free may become positive again.
    """
    log_loss = np.asarray(log_loss, float)
    start = np.array(parameters, float)
    free = ~np.broadcast_to(np.asarray(False if fixed is None else fixed, bool), start.shape)
    start[free & np.isneginf(start)] = log_loss.min() + np.log(0.1)
    return minimise(design, log_loss, start, weights, fixed, delta=delta)


def log_law(design: ArrayLike, parameters: ArrayLike) -> Floats:
    """(n,) ln L that the law with these parameters (P,) says."""
    return np.logaddexp.reduce(_scores(np.asarray(design, float), np.asarray(parameters, float)[None]), axis=0)[0]


@dataclass(frozen=True)
class _Problem:
    """What `minimise` was asked, checked: design (n, K, P), log_loss and weights (B, n), starts (B, P), free (P,)."""

    design: Floats
    log_loss: Floats
    starts: Floats
    weights: Floats
    free: Bools
    delta: float

    @staticmethod
    def of(
        design: ArrayLike,
        log_loss: ArrayLike,
        starts: ArrayLike,
        weights: ArrayLike | None,
        fixed: ArrayLike | None,
        delta: float,
    ) -> "_Problem":
        design = np.asarray(design, float)
        rows, _, size = design.shape
        log_loss, starts = (np.atleast_2d(np.asarray(array, float)) for array in (log_loss, starts))
        weights = np.atleast_2d(np.ones(rows) if weights is None else np.asarray(weights, float))
        if log_loss.shape[1] != rows:
            raise ValueError(f"log_loss has {log_loss.shape[1]} rows, but the design has {rows}")
        batch = max(len(starts), len(weights), len(log_loss))
        log_loss, weights = np.broadcast_to(log_loss, (batch, rows)), np.broadcast_to(weights, (batch, rows))
        starts = np.broadcast_to(starts, (batch, size))
        free = ~np.broadcast_to(np.asarray(False if fixed is None else fixed, bool), (size,))
        if not all(np.isfinite(array).all() for array in (design, log_loss, weights, starts[:, free])):
            raise ValueError("design, log_loss, weights and the starts of free parameters must be finite")
        if (weights < 0).any():
            raise ValueError("weights must not be negative")
        return _Problem(design, log_loss, starts, weights, free, delta)

    def at(self, starts: Floats, chosen: NDArray[np.intp], free: Bools | None = None) -> "_Problem":
        """The `chosen` problems, from other starts, perhaps with fewer free parameters."""
        free = self.free if free is None else free
        return replace(self, log_loss=self.log_loss[chosen], starts=starts, weights=self.weights[chosen], free=free)

    def offset(self, part: slice = slice(None)) -> Floats:
        """(K, B, n) logarithms of the terms of L at the starts, over the measured L."""
        return _scores(self.design, self.starts[part]) - self.log_loss[part]

    def slack(self, objective: float) -> float:
        """A difference in the objective that is not material."""
        return 1e-6 * objective + 1e-22 * float(self.weights.sum(axis=1).max())

    def search(self, iterations: int) -> Fit:
        """The searches, as many at once as fit into memory."""
        rows, terms, size = self.design.shape
        basis, moves = _orthogonal(self.design[:, :, self.free])
        law = _Law(basis, self.delta)
        batch = len(self.starts)
        x, objective = np.empty((batch, basis.shape[-1])), np.empty(batch)
        minimum, identified = np.empty(batch, bool), np.empty(batch, bool)
        chunk = max(1, CHUNK // (rows * terms * max(len(DAMPINGS), size)))
        for part in (slice(first, first + chunk) for first in range(0, batch, chunk)):
            x[part], objective[part], minimum[part], identified[part] = _search(
                law, self.weights[part], self.offset(part), iterations
            )
        parameters = self.starts.copy()
        parameters[:, self.free] += x @ moves.T
        identified &= basis.shape[-1] == self.free.sum()
        return Fit(parameters, objective, minimum & identified, identified)


def _orthogonal(design: Floats) -> tuple[Floats, Floats]:
    """Basis (n, K, R) of the space that the columns of (n, K, F) span, and moves (F, R): basis = design @ moves.

    Columns of different terms stay apart, so that a term that vanishes takes no other with it.
    """
    rows, terms, size = design.shape
    columns = design.reshape(rows * terms, size)
    norms = np.linalg.norm(columns, axis=0)
    norms[norms == 0] = 1
    q, r, order = qr(columns / norms, mode="economic", pivoting=True)
    rank = int((np.abs(np.diag(r)) > 1e-10).sum())
    moves = np.zeros((size, rank))
    moves[order[:rank]] = solve_triangular(r[:rank, :rank], np.eye(rank)) / norms[order[:rank], None]
    return q[:, :rank].reshape(rows, terms, rank), moves


def _scores(design: Floats, parameters: Floats) -> Floats:
    """(K, B, n) logarithms of the terms of L at parameters (B, P), some of which may be -inf."""
    absent = np.isneginf(parameters)
    scores = np.where(absent, 0.0, parameters) @ design.transpose(1, 2, 0)
    scores[absent @ (design != 0).transpose(1, 2, 0)] = -np.inf
    return scores


def _with_zero_constant(problem: _Problem, fit: Fit, iterations: int) -> Fit:
    """The fit, with a constant of zero where the search was heading there: ln E has an infinite way to go."""
    constant = _constant_term(problem)
    if constant is None:
        return fit
    negligible = fit.parameters[:, constant] < problem.log_loss.min() + np.log(NEGLIGIBLE)
    rows = np.flatnonzero(~fit.converged | negligible)
    starts = fit.parameters[rows]
    starts[:, constant] = -np.inf
    without = problem.at(starts, rows, problem.free & (np.arange(len(problem.free)) != constant))
    zero = without.search(iterations)
    fitted = np.logaddexp.reduce(_scores(problem.design, zero.parameters), axis=0)
    slope = np.clip(without.log_loss - fitted, -problem.delta, problem.delta)
    pull = without.weights * slope * np.exp(np.minimum(-fitted, 600))  # less the derivative by the constant
    useless = pull.sum(axis=1) < -1e-6 * np.abs(pull).sum(axis=1)
    kept = zero.converged & useless & (zero.objective <= fit.objective[rows] * (1 + 1e-9))
    return _put(fit, rows[kept], zero.take(kept))


def _constant_term(problem: _Problem) -> int | None:
    """The free parameter e whose term is exp(e) in every row (E), if there are other terms beside it."""
    for term, columns in enumerate(problem.design.transpose(1, 0, 2)):
        used = np.flatnonzero(columns.any(axis=0))
        others = np.delete(problem.design, term, axis=1)
        if (
            len(used) == 1
            and problem.free[used[0]]
            and (columns[:, used[0]] == 1).all()
            and not others[..., used].any()
        ):
            return int(used[0]) if np.isfinite(_scores(others, problem.starts)).any(axis=0).all() else None
    return None


def _put(fit: Fit, rows: NDArray[np.intp], part: Fit) -> Fit:
    """The fit with these rows replaced by those of `part`."""
    merged = {name: values.copy() for name, values in vars(fit).items()}
    for name, values in merged.items():
        values[rows] = getattr(part, name)
    return Fit(**merged)


def _nelder_mead(problem: _Problem, objective: float) -> float:
    """The lowest objective that Nelder-Mead finds around the one start, from a simplex about 1 % above it."""
    free = problem.free & np.isfinite(problem.starts[0])
    basis, _ = _orthogonal(problem.design[:, :, free])
    law = _Law(basis, problem.delta)
    at = (problem.weights, problem.offset())
    size = basis.shape[-1]
    whiten, _ = _whitener(law.derivatives(np.zeros((1, size)), *at)[3])
    simplex = np.vstack([np.zeros(size), np.eye(size) * np.sqrt(0.02 * objective)]) @ whiten[0].T
    found = scipy_minimize(
        lambda x: float(law.objective(x[None], *at)[0]),
        simplex[0],
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 0.0, "fatol": 1e-9 * objective, "maxiter": 200 * size},
    )
    return float(found.fun)


class _Law:
    """The objective and its derivatives in x, where the terms of L, over the measured L, are exp(offset + basis x)."""

    def __init__(self, basis: Floats, delta: float) -> None:
        self.basis, self.delta = basis, delta
        rows, terms, _ = basis.shape
        self.columns = np.ascontiguousarray(basis.transpose(1, 2, 0))  # (K, R, n)
        self.squares = (basis[..., :, None] * basis[..., None, :]).transpose(1, 0, 2, 3).reshape(terms * rows, -1)

    def residuals(self, x: Floats, offset: Floats) -> tuple[Floats, Floats]:
        """ln L less its fit (..., B, n), and each term's share of L (K, ..., B, n); x (..., B, R), offset (K, B, n)."""
        scores = np.stack([x @ columns + start for columns, start in zip(self.columns, offset, strict=True)])
        highest = scores.max(axis=0)
        shares = np.exp(scores - highest)
        total = shares.sum(axis=0)
        return -highest - np.log(total), shares / total

    def shortened(self, steps: Floats) -> Floats:
        """Steps (..., B, R) that change no term by more than e^STRIDE: a term sent to 0 would never come back."""
        change = np.max([np.abs(steps @ columns).max(axis=-1) for columns in self.columns], axis=0)
        return steps * (STRIDE / np.maximum(change, STRIDE))[..., None]

    def objective(self, x: Floats, weights: Floats, offset: Floats) -> Floats:
        """(..., B) objective at x (..., B, R)."""
        size = np.abs(self.residuals(x, offset)[0])
        inside = np.minimum(size, self.delta)
        return (weights * inside * (size - inside / 2)).sum(axis=-1)

    def derivatives(self, x: Floats, weights: Floats, offset: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Objective (B,), gradient (B, R), Hessian (B, R, R), majoriser (B, R, R) and rounding (B,) at x (B, R).

        With f the fit, p its terms' shares, a their rows: grad f = sum p a, Hessian f = sum p a a^T - grad f grad f^T.
        The majoriser is the curvature of the weighted least squares that touches the Huber loss from above.
        """
        residual, shares = self.residuals(x, offset)
        size = np.abs(residual)
        inside = np.minimum(size, self.delta)
        objective = (weights * inside * (size - inside / 2)).sum(axis=-1)
        slope = np.copysign(inside, residual) * weights
        jacobian = sum(
            share[..., None] * rows for share, rows in zip(shares, self.basis.transpose(1, 0, 2), strict=True)
        )
        across = jacobian.transpose(0, 2, 1)
        gradient = -(across @ slope[..., None])[..., 0]
        bend = (slope * shares).transpose(1, 0, 2).reshape(len(x), -1) @ self.squares
        hessian = across @ ((weights * (size < self.delta) + slope)[..., None] * jacobian) - bend.reshape(
            len(x), x.shape[1], x.shape[1]
        )
        majoriser = across @ ((weights * self.delta / np.maximum(size, self.delta))[..., None] * jacobian)
        rounding = 2e-15 * np.abs(slope).sum(axis=-1)
        return objective, gradient, hessian, majoriser, rounding + 1e-28 * weights.sum(axis=-1)


def _search(law: _Law, weights: Floats, offset: Floats, iterations: int) -> tuple[Floats, Floats, Bools, Bools]:
    """x (B, R) searched from 0, objective (B,), whether a minimum (B,) and whether identified (B,)."""
    batch = len(weights)
    x, objective = np.zeros((batch, law.basis.shape[-1])), np.zeros(batch)
    minimum, identified, active = np.zeros(batch, bool), np.zeros(batch, bool), np.arange(batch)
    for _ in range(iterations + 1):
        at = (weights[active], offset[:, active])
        objective[active], gradient, hessian, majoriser, rounding = law.derivatives(x[active], *at)
        steps, decrease, convex, identified[active] = _newton_steps(gradient, hessian, majoriser)
        minimum[active] = convex & (decrease <= rounding)
        trials = x[active] + law.shortened(steps)
        values = law.objective(trials, *at)
        best = np.where(np.isfinite(values), values, np.inf).argmin(axis=0), np.arange(len(active))
        better = values[best] < objective[active]
        # Where no step is lower, rounding or a kink of the curvature ended the search at a minimum.
        minimum[active] |= convex & ~better & (decrease <= 1e-9 * objective[active])
        moved = active[better]
        x[moved], objective[moved] = trials[best][better], values[best][better]
        active = active[better & ~minimum[active]]
        if not len(active):
            break
    return x, objective, minimum, identified


def _newton_steps(gradient: Floats, hessian: Floats, majoriser: Floats) -> tuple[Floats, Floats, Bools, Bools]:
    """Steps (trials, B, R), the decrease (B,) that Newton's predicts, whether convex (B,) and whether identified (B,).

    The damping is a multiple of the majoriser M: step = -(|H| + damping M)^-1 gradient, where |H| has the absolute
    values of H's eigenvalues in the metric of M. Undamped it is Newton's step; at 1 it is close to that of iteratively
    reweighted least squares, which does not overshoot. Neither depends on how the parameters are scaled.
    """
    whiten, smallest = _whitener(majoriser)
    curvature, rotation = np.linalg.eigh(whiten.transpose(0, 2, 1) @ hessian @ whiten)
    whiten = whiten @ rotation
    slope = (whiten.transpose(0, 2, 1) @ gradient[..., None])[..., 0]
    size = np.maximum(np.abs(curvature), 1e-8)
    steps = -(LENGTHS[:, None, None] * slope / (size + DAMPINGS[:, None, None]))[..., None, :]
    return (
        (steps @ whiten.transpose(0, 2, 1))[..., 0, :],
        (slope**2 / size).sum(axis=-1) / 2,
        curvature.min(axis=-1, initial=np.inf) > -1e-4,
        smallest > FLAT,
    )


def _whitener(matrices: Floats) -> tuple[Floats, Floats]:
    """W (B, R, R) with W^T M W = 1, and the smallest eigenvalue (B,) of M scaled to a unit diagonal.

    Directions that M does not feel have a column of 0 in W, so that nothing moves along them.
    """
    scale = np.sqrt(np.diagonal(matrices, axis1=1, axis2=2))
    scale = np.where(scale > 0, scale, 1.0)
    values, vectors = np.linalg.eigh(matrices / (scale[:, :, None] * scale[:, None, :]))
    size = np.where(values > FLAT, 1 / np.sqrt(np.maximum(values, FLAT)), 0.0)
    whiten = vectors * size[:, None, :] / scale[:, :, None]
    return whiten, values.min(axis=-1, initial=np.inf)
