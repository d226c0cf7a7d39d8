"""The best loss that compute reaches, between and at the budgets that were trained."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

BEFORE_FIRST, INSIDE, NOT_REACHED = -1, 0, 1
BISECTIONS = 60  # halves a bracket below the spacing of float64


class Frontier:
    """Loss as a non-increasing function of log compute, through the running minimum of the losses.

    What PCHIP joins is ln(loss - asymptote): a power law with that asymptote is met exactly between its knots as well,
    while the loss itself, joined so, would lie off by more than the noise where budgets are far apart.

    Leading axes (...), such as bootstrap replicates, are independent frontiers.

    Args:
        log_compute: (..., K) float, strictly ascending along the last axis, K >= 2.
        losses: (..., K) float, finite, above the asymptote.
        asymptote: the loss that no compute gets below, as far as the shape between knots is concerned.
    """

    def __init__(self, log_compute: ArrayLike, losses: ArrayLike, asymptote: float = 0.0) -> None:
        self.asymptote = asymptote
        self.x, losses = np.broadcast_arrays(np.asarray(log_compute, float), np.asarray(losses, float))
        self.losses: NDArray[np.float64] = np.minimum.accumulate(losses, axis=-1)
        self.y = np.log(self.losses - asymptote)
        self.derivatives = pchip_derivatives(self.x, self.y)

    def loss(self, at: ArrayLike) -> NDArray[np.float64]:
        """The loss at log compute `at` (..., J); beyond either end it goes on along the tangent there."""
        at = np.asarray(at, float)
        segment = self._segment(at)
        x0, width, *cubic = self._cubic(segment)
        position = np.clip((at - x0) / width, 0.0, 1.0)
        beyond = at - np.clip(at, self.x[..., :1], self.x[..., -1:])
        end = np.where(beyond < 0, self.derivatives[..., :1], self.derivatives[..., -1:])
        return self.asymptote + np.exp(_hermite(position, *cubic) + np.where(beyond == 0, 0.0, beyond * end))

    def slope(self, at: ArrayLike) -> NDArray[np.float64]:
        """d loss / d log compute at `at` (..., J), which must lie within the frontier."""
        at = np.asarray(at, float)
        x0, width, y0, y1, d0, d1 = self._cubic(self._segment(at))
        t = (at - x0) / width
        exponent = (6 * t * (t - 1) * (y0 - y1) + (1 - t) * (1 - 3 * t) * d0 + t * (3 * t - 2) * d1) / width
        return exponent * (self.loss(at) - self.asymptote)

    def crossing(self, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Where the frontier first is at or below each target (..., J).

        Returns:
            The log compute, and INSIDE where that is exact; or the first knot and BEFORE_FIRST where the target was
            passed before it; or the last knot and NOT_REACHED.
        """
        targets = np.asarray(targets, float)
        reached = self.losses[..., None, :] <= targets[..., None]
        knot = np.where(reached.any(-1), reached.argmax(-1), self.losses.shape[-1] - 1)
        loss = _take(self.losses, knot)
        side = np.where(loss > targets, NOT_REACHED, np.where((knot == 0) & (loss < targets), BEFORE_FIRST, INSIDE))
        between = (side == INSIDE) & (loss < targets)
        x0, width, *cubic = self._cubic(np.maximum(knot - 1, 0))
        height = np.log(np.where(between, targets - self.asymptote, 1.0))
        low, high = np.zeros(targets.shape), np.ones(targets.shape)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = _hermite(middle, *cubic) <= height
            low, high = np.where(below, low, middle), np.where(below, middle, high)
        return np.where(between, x0 + high * width, _take(self.x, knot)), side.astype(np.int8)

    def beyond(self, targets: ArrayLike) -> NDArray[np.float64]:
        """Log compute at which the tangents at the ends meet targets (..., J) that the frontier does not.

        Above the first loss that is the first tangent, else the last; infinite where it is level or never comes as low.
        """
        targets = np.asarray(targets, float)
        before = targets > self.losses[..., :1]
        x, y, derivative = (
            np.where(before, ends[..., :1], ends[..., -1:]) for ends in (self.x, self.y, self.derivatives)
        )
        possible = (derivative < 0) & (targets > self.asymptote)
        way = np.log(np.where(possible, targets - self.asymptote, 1.0)) - y
        return np.where(possible, x + way / np.where(possible, derivative, 1.0), np.where(before, -np.inf, np.inf))

    def _segment(self, at: NDArray[np.float64]) -> NDArray[np.intp]:
        right = (at[..., None] >= self.x[..., None, :]).sum(-1)
        return np.clip(right - 1, 0, self.x.shape[-1] - 2)

    def _cubic(self, segment: NDArray[np.intp]) -> tuple[NDArray[np.float64], ...]:
        """Start, width, the losses at both ends, and the derivatives there times the width."""
        x0, x1 = _take(self.x, segment), _take(self.x, segment + 1)
        width = x1 - x0
        derivatives = (_take(self.derivatives, segment + end) * width for end in (0, 1))
        return x0, width, _take(self.y, segment), _take(self.y, segment + 1), *derivatives


def pchip_derivatives(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Derivatives at the knots that keep a cubic Hermite interpolant monotone wherever the data are.

    Weighted harmonic means inside, a shape-preserving three-point formula at the ends: Fritsch and Butland, "A method
    for constructing local monotone piecewise cubic interpolants", SIAM J. Sci. Stat. Comput. 5 (1984).

    Args:
        x: (..., K) strictly ascending, K >= 2.
        y: (..., K).
    """
    width = np.diff(x)
    secant = np.diff(y) / width
    if x.shape[-1] == 2:
        return np.concatenate([secant, secant], axis=-1)
    before, after = secant[..., :-1], secant[..., 1:]
    weight_before = 2 * width[..., 1:] + width[..., :-1]
    weight_after = width[..., 1:] + 2 * width[..., :-1]
    monotone = before * after > 0
    harmonic = weight_before / np.where(monotone, before, 1.0) + weight_after / np.where(monotone, after, 1.0)
    inside = np.where(monotone, (weight_before + weight_after) / harmonic, 0.0)
    first = _end_derivative(width[..., 0], width[..., 1], secant[..., 0], secant[..., 1])
    last = _end_derivative(width[..., -1], width[..., -2], secant[..., -1], secant[..., -2])
    return np.concatenate([first[..., None], inside, last[..., None]], axis=-1)


def _end_derivative(
    width: NDArray[np.float64],
    next_width: NDArray[np.float64],
    secant: NDArray[np.float64],
    next_secant: NDArray[np.float64],
) -> NDArray[np.float64]:
    derivative = ((2 * width + next_width) * secant - width * next_secant) / (width + next_width)
    derivative = np.where(derivative * secant <= 0, 0.0, derivative)
    overshoots = (secant * next_secant <= 0) & (np.abs(derivative) > 3 * np.abs(secant))
    return np.where(overshoots, 3 * secant, derivative)


def _hermite(
    t: NDArray[np.float64],
    y0: NDArray[np.float64],
    y1: NDArray[np.float64],
    d0: NDArray[np.float64],
    d1: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The cubic on [0, 1]; exact at both ends."""
    s = 1 - t
    return y0 * s * s * (1 + 2 * t) + y1 * t * t * (3 - 2 * t) + d0 * t * s * s - d1 * t * t * s


def _take(values: NDArray[np.float64], index: NDArray[np.intp]) -> NDArray[np.float64]:
    """values (..., K) at index (..., J)."""
    shape = np.broadcast_shapes(values.shape[:-1], index.shape[:-1])
    return np.take_along_axis(
        np.broadcast_to(values, (*shape, values.shape[-1])), np.broadcast_to(index, (*shape, index.shape[-1])), axis=-1
    )
