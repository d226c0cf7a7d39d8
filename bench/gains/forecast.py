"""Gains at computes beyond the data, with prediction intervals: always marked, and refused where they are too far."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.gains.classes import interval_entries
from bench.gains.estimators import Gain, ratio_intervals
from bench.gains.resampling import Spread

DECADES = 2.0  # beyond the data, unless more is asked for
MOST_DECADES = 12.0  # whatever is asked for


def forecasts(
    gains: Mapping[str, Gain], computes: Sequence[float], *, far: bool, warnings: list[str]
) -> list[dict[str, Any]]:
    """Entries of gains.json's `forecasts` without scale and axis: CEG where the baseline spends `computes`.

    The interval is one for the gain that a study like this one would measure there: uncertainty of the trend, and
    independent of it the noise between as many seeds, which grows as (C / C_last)^gamma while the loss flattens.

    Args:
        far: whether computes more than `DECADES` beyond the data are told as well.
    """
    entries = []
    for variant, gain in gains.items() if computes else ():
        last, trend = gain.points[-1], gain.trend
        if trend is None:
            warnings.append(f"{gain.pair.variant.title}: no forecast, as the trend of its gain is not known.")
            continue
        for compute in computes:
            if not compute > last.baseline_compute:
                warnings.append(f"no forecast at {compute:.3g}: it is not beyond the data; see the curve of gains.")
                continue
            decades = float(np.log10(compute / last.baseline_compute))
            if decades > MOST_DECADES:
                warnings.append(f"no forecast at {compute:.3g}: it lies {decades:.0f} decades beyond the data.")
                continue
            if decades > DECADES and not far:
                warnings.append(
                    f"no forecast at {compute:.3g}: it lies {decades:.1f} decades of compute beyond the data "
                    f"({last.baseline_compute:.3g}). Ask for it with forecast_far=true."
                )
                continue
            value, spread = trend.log_gain(float(np.log(compute))), _prediction(gain, compute)
            entries.append(
                {
                    "variant": variant,
                    "baseline_compute": float(compute),
                    "ceg": float(np.exp(value)),
                    **interval_entries(None if spread is None else ratio_intervals(value, spread)),
                    "decades": decades,
                    "extrapolated": True,
                }
            )
    return entries


def _prediction(gain: Gain, compute: float) -> Spread | None:
    """Of the trend at `compute`, widened by the noise of a measurement there; None where either is not known."""
    last, trend = gain.points[-1], gain.trend.log_gain_spread(float(np.log(compute)))
    noise = next((point.spread for point in reversed(gain.points) if point.spread is not None), None)
    if trend is None or noise is None or not trend.error > 0:
        return trend
    noise_error = noise.error * (compute / last.baseline_compute) ** gain.exponent
    return Spread(trend.deviations * np.hypot(trend.error, noise_error) / trend.error, trend.freedom)
