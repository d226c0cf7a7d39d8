"""How the gain moves with compute: a straight line of ln CEG over the baseline's ln C, for its slope and for forecasts.

Power laws with one asymptote give exactly such a line. With L - E = K_b C_b^-g_b = K_v C_v^-g_v at equal loss,
ln CEG = ln C_b - ln C_v = (ln K_b - ln K_v) / g_v + (1 - g_b / g_v) ln C_b.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from bench.gains.resampling import Spread

EXACT, AT_LEAST, AT_MOST = 0, 1, -1
ITERATIONS = 100


@dataclass(frozen=True)
class Trend:
    """ln CEG = intercept + gradient * (ln C_baseline - centre).

    Attributes:
        spread: of (intercept, gradient), deviations (replicates, 2); None where seeds cannot tell.
    """

    centre: float
    intercept: float
    gradient: float
    spread: Spread | None

    def log_gain(self, log_compute: float) -> float:
        return self.intercept + self.gradient * (log_compute - self.centre)

    def log_gain_spread(self, log_compute: float) -> Spread | None:
        if self.spread is None:
            return None
        return Spread(self.spread.deviations @ np.array([1.0, log_compute - self.centre]), self.spread.freedom)

    @property
    def gradient_spread(self) -> Spread | None:
        return None if self.spread is None else Spread(self.spread.deviations[:, 1], self.spread.freedom)


def slope_of(gradient: float) -> float | None:
    """d ln CEG / d ln C with C the variant's compute, from that over the baseline's; None where it is infinite.

    For power laws with one asymptote it is gamma_variant / gamma_baseline - 1.
    """
    return gradient / (1 - gradient) if gradient < 1 else None


def censored_line(
    x: NDArray[np.float64], y: ArrayLike, kinds: NDArray[np.int8], sigma: float, weights: ArrayLike = 1.0
) -> NDArray[np.float64]:
    """Maximum likelihood of a line through values, some known only as a bound (Tobin, Econometrica 26, 1958).

    Args:
        x: (J,), centred by the caller.
        y: (..., J) values, or the bounds.
        kinds: (J,) EXACT, AT_LEAST or AT_MOST; at least two different x are EXACT.
        sigma: standard deviation of a value about the line.
        weights: (..., J).

    Returns:
        (..., 2) intercept and gradient.
    """
    y, weights = np.broadcast_arrays(np.asarray(y, float), np.asarray(weights, float))
    columns = np.stack([np.ones_like(x), x], axis=-1)
    exact, sign = kinds == EXACT, np.where(kinds == AT_LEAST, 1.0, -1.0)
    line = _newton_step(columns, np.where(exact, weights * y, 0.0), np.where(exact, weights, 0.0))
    for _ in range(ITERATIONS):
        # The log-likelihood of a bound is ln Phi(u); m = phi(u) / Phi(u) is its derivative, -m (m + u) the next, which
        # lies between 0 and -1 but for rounding.
        z = (y - line @ columns.T) / sigma
        u = -sign * z
        mills = np.sqrt(2 / np.pi) / special.erfcx(-u / np.sqrt(2))
        gradient = np.where(exact, z, sign * mills) * weights
        curvature = np.where(exact, 1.0, np.clip(mills * (mills + u), 0.0, 1.0)) * weights
        step = sigma * _newton_step(columns, gradient, curvature)
        line = line + step
        if np.abs(step).max() < 1e-10:
            break
    return line


def _newton_step(
    columns: NDArray[np.float64], gradient: NDArray[np.float64], curvature: NDArray[np.float64]
) -> NDArray[np.float64]:
    normal = np.einsum("...j,jp,jq->...pq", curvature, columns, columns)
    return np.linalg.solve(normal, (gradient @ columns)[..., None])[..., 0]
