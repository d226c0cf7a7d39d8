"""From finished results to the contents of gains.json."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bench.errors import UserError
from bench.gains.classes import classify, interval_entries, side_of_one
from bench.gains.estimators import Estimate, Gain, Point, find_estimator
from bench.gains.forecast import forecasts
from bench.gains.interactions import contributions, interactions
from bench.gains.power import power
from bench.gains.resampling import LEVELS
from bench.gains.sources import Results
from bench.gains.study import ALL_SCALES, UNMEASURED, Study, load_study
from bench.gains.tuning import TunedVariant

SCHEMA = 2
LISTED = 5  # places named in one warning
Estimates = dict[tuple[str, str], Estimate]


def compute_gains(
    results: Results,
    *,
    baseline: str,
    estimator: str,
    replicates: int = 2000,
    seed: int = 0,
    targets: Sequence[float] = (),
    forecast: Sequence[float] = (),
    forecast_far: bool = False,
    power_width: float | None = None,
) -> dict[str, Any]:
    """The compute-equivalent gain of every variant of a study over its baseline, on every cost axis, at every scale.

    Args:
        results: what was trained; `bench.gains.sources` reads it.
        baseline: the variant that others are compared with.
        estimator: the name of a file in bench/gains/estimators/.
        replicates, seed: of the bootstrap; the same arguments give the same numbers.
        targets: losses at which gains are wanted, besides those that the baseline's budgets reached.
        forecast: computes of the baseline, on the axis that classes are told on, beyond the data.
        forecast_far: whether to tell those more than two decades beyond.
        power_width: if given, how many seeds intervals within [CEG / (1 + width), CEG (1 + width)] need.

    Returns:
        The contents of gains.json; README.md has the formulas. Numbers are finite; what is not known is None.

    Raises:
        UserError: nothing can be computed, or an option is out of range.
    """
    _check_numbers("targets", targets, "losses, such as 3.2")
    _check_numbers("forecast", forecast, "computes, such as 1e18")
    _check_numbers("power_width", [] if power_width is None else [power_width], "above 0, such as 0.1")
    chosen = find_estimator(estimator)
    study = load_study(results, baseline=baseline, replicates=replicates, seed=seed, targets=targets)
    method = chosen(study)
    estimates = {(scale, axis): method.estimate(scale, axis) for scale in method.scales for axis in method.axes}
    if not any(estimate.gains or estimate.fits for estimate in estimates.values()):
        alone = ["it is the only variant with results."] if results.results["variant"].n_unique() == 1 else []
        reasons = [warning for warning in study.warnings if not warning.startswith(UNMEASURED)]
        raise UserError(f"no variant can be compared with {baseline}: {' '.join([*alone, *summarise(reasons)])}")
    axis = next(axis for _, axis in estimates)
    # A variant's trend is that at its last scale: all of them pooled, where it has several.
    told = {variant: gain for scale in method.scales for variant, gain in estimates[scale, axis].gains.items()}
    found = {
        "schema": SCHEMA,
        "study": study.name,
        "baseline": baseline,
        "estimator": estimator,
        "level": LEVELS[0],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "caveats": list(method.caveats),
        "gains": [entry for (_, on), estimate in estimates.items() for entry in _gains(estimate.gains, on)],
        **_classes([estimates[scale, axis].gains for scale in method.scales], axis),
        "interactions": _placed(estimates, interactions),
        "contributions": _placed(estimates, contributions),
        "fits": [fit for estimate in estimates.values() for fit in estimate.fits],
        "forecasts": [
            {"scale": told[entry["variant"]].pair.variant.scale, "axis": axis, **entry}
            for entry in forecasts(told, forecast, far=forecast_far, warnings=study.warnings)
        ],
        "power": None if power_width is None else _power(study, estimates, axis, power_width),
        "frontiers": [
            _frontier(tuned, axis)
            for (scale, _), tuned in study.tuned.items()
            if scale in study.scales
            for axis in study.axes
        ],
        "sign_changes": _sign_changes(estimates),
        "runs": study.runs,
    }
    return {**found, "warnings": summarise(study.warnings)}


def _check_numbers(option: str, values: Sequence[float], what: str) -> None:
    for value in values:
        if not 0 < value < np.inf:
            raise UserError(f"{option} must be {what}; it is {value:g}")


def _gains(gains: dict[str, Gain], axis: str) -> list[dict[str, Any]]:
    return [
        {
            "scale": gain.pair.variant.scale,
            "variant": variant,
            "innovations": list(gain.pair.variant.innovations),
            "axis": axis,
            **_point(gain.points[-1]),
            "seeds": gain.pair.seeds,
            "lr": float(gain.pair.variant.rates[-1]) or None,  # 0 says that it was not given
            "tuning": gain.pair.variant.tuning,
            "untuned": gain.pair.variant.tuning != "interior",
            "curve": [_point(point) for point in gain.points],
        }
        for variant, gain in gains.items()
    ]


def _point(point: Point) -> dict[str, Any]:
    return {
        "baseline_compute": point.baseline_compute,
        "target_loss": point.target_loss,
        "ceg": point.ceg,
        **interval_entries(point.intervals),
        "lower_bound": point.lower_bound,
        "upper_bound": point.upper_bound,
        "p_value": point.p_value,
        "seed_error": None if point.spread is None else float(point.spread.error),
        "evaluation_error": point.evaluation_error,
        "extrapolated": point.extrapolated,
    }


def _classes(gains: Sequence[Mapping[str, Gain]], axis: str) -> dict[str, Any]:
    """Entries `classes` and `correction`: the sign at a variant's smallest scale, the slope at its last.

    Args:
        gains: at each scale, smallest first and all of them pooled last.
    """
    smallest = {variant: gain for at_scale in reversed(gains) for variant, gain in at_scale.items()}
    last = {variant: gain for at_scale in gains for variant, gain in at_scale.items()}
    variants = sorted(smallest)
    found = classify({variant: smallest[variant] for variant in variants}, last)
    correction = f"p-values are adjusted by Holm's method over the {len(variants)} variants, for each test by itself."
    if len(variants) < 2:
        correction = "p-values need no adjustment, as one variant was tested."
    return {"classes": [{"axis": axis, **entry} for entry in found], "correction": correction}


def _placed(estimates: Estimates, find: Callable[[dict[str, Gain]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `find` says of the gains at each scale on each axis, each entry with its place."""
    return [
        {"scale": scale, "axis": axis, **entry}
        for (scale, axis), estimate in estimates.items()
        for entry in find(estimate.gains)
    ]


def _power(study: Study, estimates: Estimates, axis: str, width: float) -> dict[str, Any]:
    entries = []
    for (scale, on), estimate in estimates.items():
        if on == axis and scale != ALL_SCALES:
            costs = {
                variant: _trajectory_cost(study, study.tuned[scale, variant], axis)
                for variant in (study.baseline, *estimate.gains)
            }
            seeds = {variant: len(study.tuned[scale, variant].seeds) for variant in costs}
            entries += power(estimate.gains, scale, axis, width, costs, seeds)
            study.warnings.extend(
                f"{gain.pair.variant.title}: no seeds needed are told, as the noise of its gain is not known."
                for gain in estimate.gains.values()
                if gain.points[-1].spread is None
            )
    return {"level": LEVELS[0], "width": width, "entries": entries}


def _trajectory_cost(study: Study, tuned: TunedVariant, axis: str) -> float:
    """What one seed of a variant costs, all its budgets included: as its runs say, else each budget by itself."""
    said = [
        run["trajectory_flops"]
        for run in study.runs
        if (run["scale"], run["variant"]) == (tuned.scale, tuned.variant) and run.get("trajectory_flops")
    ]
    if axis == "model_flops" and said:
        return float(np.mean(said))
    return float(tuned.costs[axis].mean(axis=0).sum())


def _frontier(tuned: TunedVariant, axis: str) -> dict[str, Any]:
    """The measured points of one variant; pooled over scales, those that are best for their cost."""
    best = tuned.best_for_cost(axis) if tuned.scale == ALL_SCALES else tuned
    seeds = len(best.seeds)
    spread = best.losses.std(axis=0, ddof=1) if seeds > 1 else None
    compute, loss = best.costs[axis].mean(axis=0), best.losses.mean(axis=0)
    points = [
        {
            "budget": float(best.budgets[k]),
            "compute": float(compute[k]),
            "loss": float(loss[k]),
            "loss_sd": None if spread is None else float(spread[k]),
            "val_loss_se": float(best.loss_errors[k]) if np.isfinite(best.loss_errors[k]) else None,
            "seeds": seeds,
            "lr": float(best.rates[k]) or None,
        }
        for k in range(len(best.budgets))
    ]
    return {"scale": tuned.scale, "variant": tuned.variant, "axis": axis, "points": points}


def _sign_changes(estimates: Estimates) -> list[dict[str, Any]]:
    """Variants that gain on some axes and lose on others, where a gain of 1 is rejected on both."""
    sides: dict[tuple[str, str], dict[int, list[str]]] = {}
    for (scale, axis), estimate in estimates.items():
        for variant, gain in estimate.gains.items():
            axes = sides.setdefault((scale, variant), {1: [], 0: [], -1: []})
            axes[side_of_one(gain.points[-1])].append(axis)
    return [
        {"scale": scale, "variant": variant, "axes": axes[1], "against": axes[-1]}
        for (scale, variant), axes in sides.items()
        if axes[1] and axes[-1]
    ]


def summarise(warnings: Sequence[str]) -> list[str]:
    """Each sentence once; of those that say the same of many places, one that lists the places."""
    places: dict[str, list[str]] = {}
    for warning in dict.fromkeys(warnings):
        place, colon, said = warning.partition(": ")
        places.setdefault(said if colon else place, []).append(place if colon else "")
    found = []
    for said, where in places.items():
        if len(where) <= LISTED:
            found += [f"{place}: {said}" if place else said for place in where]
        else:
            found.append(f"{', '.join(where[:LISTED])} and {len(where) - LISTED} more: {said}")
    return found
