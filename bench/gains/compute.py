"""From a study's folder to the contents of gains.json."""

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import UserError
from bench.gains.classes import side_of_one, sign, slope
from bench.gains.estimators import GainEstimator, Point, find_estimator
from bench.gains.study import Study, load_study
from bench.gains.tuning import TunedVariant

SCHEMA = 1
CLASS_AXIS = "model_flops"
Pairs = dict[tuple[str, str], tuple[TunedVariant, TunedVariant]]
Curves = dict[tuple[str, str, str], list[Point]]


def compute_gains(
    study_folder: Path,
    *,
    baseline: str,
    estimator: str,
    planned: Collection[Path] | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The compute-equivalent gain of every variant of a study over its baseline, on every cost axis, at every scale.

    Args:
        study_folder: holds <scale>/<variant>/<run>/ folders; only runs that are DONE count.
        baseline: the variant that others are compared with.
        estimator: the name of a file in bench/gains/estimators/.
        planned: folders of the runs to take; None takes all there are.
        level: of the intervals.
        replicates, seed: of the bootstrap; the same arguments give the same numbers.

    Returns:
        The contents of gains.json; README.md has the formulas. Numbers are finite; what is not known is None.

    Raises:
        UserError: nothing can be computed, or a file cannot be read.
    """
    chosen = find_estimator(estimator)
    study = load_study(
        Path(study_folder), planned=planned, baseline=baseline, level=level, replicates=replicates, seed=seed
    )
    method = chosen(study)
    pairs = _pairs(study)
    curves = _curves(study, method, pairs)
    gains = [_gain(pairs[scale, variant][1], axis, points) for (scale, variant, axis), points in curves.items()]
    return {
        "schema": SCHEMA,
        "study": study.name,
        "baseline": baseline,
        "estimator": estimator,
        "level": level,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "caveats": list(method.caveats),
        "warnings": list(dict.fromkeys(study.warnings)),
        "gains": gains,
        "classes": _classes(study, pairs, curves),
        "frontiers": [_frontier(tuned, axis) for tuned in study.tuned.values() for axis in study.axes],
        "sign_changes": _sign_changes(curves),
        "runs": study.runs,
    }


def _pairs(study: Study) -> Pairs:
    """(scale, variant) -> baseline and variant with the seeds that both have."""
    pairs: Pairs = {}
    for scale in study.scales:
        for variant in sorted(
            variant for found, variant in study.tuned if found == scale and variant != study.baseline
        ):
            pair = study.pair(scale, variant)
            if pair is not None:
                pairs[scale, variant] = pair
    if not pairs:
        why = " ".join(study.warnings) or "it is the only one with finished trajectories."
        raise UserError(f"no variant can be compared with {study.baseline}: {why}")
    return pairs


def _curves(study: Study, method: GainEstimator, pairs: Pairs) -> Curves:
    curves: Curves = {}
    for (scale, variant), pair in pairs.items():
        for axis in method.axes:
            level = [tuned.title for tuned in pair if axis in tuned.costs and not tuned.rises_with_budget(axis)]
            if level:
                study.warnings.append(
                    f"{level[0]}: a larger budget does not cost more {axis}; no gains of {variant} on that axis."
                )
                continue
            points = method.estimate(*pair, axis)
            if points:
                curves[scale, variant, axis] = points
            else:
                study.warnings.append(f"{variant} at {scale}: {method.name} finds no gain on the axis {axis}.")
    return curves


def _gain(variant: TunedVariant, axis: str, points: list[Point]) -> dict[str, Any]:
    return {
        "scale": variant.scale,
        "variant": variant.variant,
        "innovations": list(variant.innovations),
        "axis": axis,
        **_point(points[-1]),
        "seeds": len(variant.seeds),
        "lr": float(variant.rates[-1]),
        "tuning": variant.tuning,
        "untuned": variant.tuning != "interior",
        "curve": [_point(point) for point in points],
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "baseline_compute": point.baseline_compute,
        "target_loss": point.target_loss,
        "ceg": point.ceg,
        "interval": None if point.interval is None else list(point.interval),
        "lower_bound": point.lower_bound,
        "upper_bound": point.upper_bound,
    }


def _classes(study: Study, pairs: Pairs, curves: Curves) -> list[dict[str, Any]]:
    smallest = study.scales[0]
    classes = []
    for variant in sorted({variant for _, variant in pairs}):
        points = {scale: curves.get((scale, variant, CLASS_AXIS), []) for scale in study.scales}
        seeds = min(len(tuned.seeds) for (_, name), (_, tuned) in pairs.items() if name == variant)
        last = points[smallest][-1] if points[smallest] else None
        classes.append(
            {
                "variant": variant,
                "axis": CLASS_AXIS,
                "sign": sign(last, smallest),
                "slope": slope(points, study, seeds),
            }
        )
    return classes


def _frontier(tuned: TunedVariant, axis: str) -> dict[str, Any]:
    seeds = len(tuned.seeds)
    spread = tuned.losses.std(axis=0, ddof=1) if seeds > 1 else None
    compute, loss = tuned.costs[axis].mean(axis=0), tuned.losses.mean(axis=0)
    points = [
        {
            "budget": float(tuned.budgets[k]),
            "compute": float(compute[k]),
            "loss": float(loss[k]),
            "loss_sd": None if spread is None else float(spread[k]),
            "val_loss_se": float(tuned.loss_errors[k]) if np.isfinite(tuned.loss_errors[k]) else None,
            "seeds": seeds,
            "lr": float(tuned.rates[k]),
        }
        for k in range(len(tuned.budgets))
    ]
    return {"scale": tuned.scale, "variant": tuned.variant, "axis": axis, "points": points}


def _sign_changes(curves: Curves) -> list[dict[str, Any]]:
    """Variants that gain on some axes and lose on others, where the intervals exclude 1."""
    sides: dict[tuple[str, str], dict[int, list[str]]] = {}
    for (scale, variant, axis), points in curves.items():
        axes = sides.setdefault((scale, variant), {1: [], 0: [], -1: []})
        axes[side_of_one(points[-1])].append(axis)
    return [
        {"scale": scale, "variant": variant, "axes": axes[1], "against": axes[-1]}
        for (scale, variant), axes in sides.items()
        if axes[1] and axes[-1]
    ]
