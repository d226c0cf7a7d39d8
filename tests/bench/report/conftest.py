"""A gains dict in the schema of gains.json, small and made up, for the tests of the report."""

import math

import pytest

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"quoted\" 'single' & <b>bold</b>",
    "%{x} {{ 7 * 7 }} [red]markup[/red]",
    "\u03bb\u2011norm \u65e5\u672c\u8a9e \U0001f680",
)
AXES = {"model_flops": 1.0, "flops_6nd": 1.04, "seconds": 2e-12, "tokens": 1e-6}


def make_gain(**changes):
    """One point of a gain: 2.31 [1.80, 2.96] unless changed; what follows from the interval follows here too."""
    point = {"ceg": 2.31, "interval": [1.80, 2.96], "lower_bound": None, "upper_bound": None} | changes
    closed = point["ceg"] is not None and point["interval"] is not None and None not in point["interval"]
    error = math.log(point["interval"][1] / point["interval"][0]) / 3.92 if closed else None
    inferred = {
        "interval_90": None if point["interval"] is None else [_narrower(point["ceg"], e) for e in point["interval"]],
        "p_value": math.erfc(abs(math.log(point["ceg"])) / error / math.sqrt(2)) if closed else None,
        "seed_error": error,
        "evaluation_error": 0.004 if closed else None,
        "extrapolated": False,
    }
    return point | inferred | changes


def _narrower(value, end):
    return end if value is None or end is None else value * (end / value) ** (1.645 / 1.96)


POINTS = {
    "layer_norm": make_gain(),
    "rope": make_gain(ceg=None, interval=None, lower_bound=4.0),
    "mqa": make_gain(ceg=None, interval=None, upper_bound=0.5),
    "flash_attention": make_gain(ceg=1.0, interval=[0.9623, 1.0391]),
    "flash_attention+layer_norm+rope": make_gain(ceg=3.483, interval=[2.912, None]),
}


def make_gains(
    *,
    points=POINTS,
    scales=("compact",),
    seeds=3,
    axes=AXES,
    baseline="baseline",
    combinations=False,
    fits=False,
    forecasts=False,
    power=False,
):
    """A whole gains dict; `points` maps a variant to its point on every axis and scale.

    combinations, fits, forecasts, power: whether there are interactions and contributions (of the variants whose name
    has a "+"), fitted laws, forecasts, and a calculation of the seeds needed.
    """
    entries, frontiers, runs = [], [], []
    places = [{"scale": scale, "axis": axis} for scale in scales for axis in axes]
    for rank, scale in enumerate(scales):
        for axis, unit in axes.items():
            for place, variant in enumerate([baseline, *points]):
                frontiers.append(
                    {
                        "scale": scale,
                        "variant": variant,
                        "axis": axis,
                        "points": [
                            {
                                "budget": budget,
                                "compute": budget * unit * 8**rank,
                                "loss": 3.4567 - 0.3 * step - 0.11 * place - 0.2 * rank,
                                "loss_sd": 0.0123 if seeds > 1 else None,
                                "val_loss_se": 0.0045,
                                "seeds": seeds,
                                "lr": 0.001,
                            }
                            for step, budget in enumerate((1e12, 2e12, 4e12))
                        ],
                    }
                )
            for variant, point in points.items():
                entries.append(
                    {
                        "scale": scale,
                        "variant": variant,
                        "innovations": variant.split("+"),
                        "axis": axis,
                        "target_loss": 2.8567,
                        "baseline_compute": 4e12 * unit * 8**rank,
                        **point,
                        "seeds": seeds,
                        "lr": 0.002,
                        "tuning": "edge" if variant == "rope" else "interior",
                        "untuned": variant == "rope",
                        "curve": [
                            {"baseline_compute": budget * unit * 8**rank, "target_loss": 3.4567 - 0.3 * step, **point}
                            for step, budget in enumerate((1e12, 2e12, 4e12))
                        ],
                    }
                )
        for variant in [baseline, *points]:
            for seed in range(seeds):
                runs.append(
                    {
                        "path": f"{scale}/{variant}/seed={seed},lr=0.001,1a2b3c4d",
                        "scale": scale,
                        "variant": variant,
                        "seed": seed,
                        "lr": 0.001,
                        "state": "done",
                        "git_commit": "0123abcd",
                        "device": "CPU, 2 cores",
                        "versions": {"torch": "2.13.0"},
                        "started": "2026-01-02T03:04:05+00:00",
                        "parameters": {"total": 1234567, "without_embeddings": 987654, "with_head": 1020422},
                        "flops_per_token": {"model_flops": 5.4e6, "flops_6nd": 5.9e6},
                    }
                )
    classes = [
        {
            "variant": variant,
            "axis": "model_flops",
            "sign": {
                "verdict": "independent",
                "interval": point["interval"],
                "interval_90": point["interval_90"],
                "p_value": point["p_value"],
                "p_adjusted": None if point["p_value"] is None else min(1.0, 5 * point["p_value"]),
                "scale": scales[0],
            },
            "slope": {
                "verdict": "inconclusive",
                "value": -0.123,
                "interval": [-0.34, 0.09],
                "interval_90": [-0.29, 0.05],
                "p_value": 0.21,
                "p_adjusted": 0.84,
                "scale": scales[-1],
            },
        }
        for variant, point in points.items()
        if scales
    ]
    return {
        "schema": 2,
        "study": "quickstart",
        "baseline": baseline,
        "estimator": "crossing",
        "level": 0.95,
        "created": "2026-01-02T03:04:05+00:00",
        "caveats": [],
        "warnings": [],
        "gains": entries,
        "classes": classes,
        "correction": f"p-values are adjusted by Holm's method over {len(points)} variants",
        "interactions": _interactions(points, places) if combinations else [],
        "contributions": _contributions(points, places) if combinations else [],
        "fits": _fits([baseline, *points], places) if fits else [],
        "forecasts": _forecasts(points, places, axes) if forecasts else [],
        "power": _power(points, places, seeds) if power else None,
        "frontiers": frontiers,
        "sign_changes": [],
        "runs": runs,
    }


def _interactions(points, places):
    ratio = {"ratio": 0.82, "interval": [0.71, 0.95], "interval_90": [0.73, 0.93], "p_value": 0.008}
    free = {"lower_bound": None, "upper_bound": None}
    found = {"joint": 3.483, "product": 4.248, **free, **ratio, "verdict": "less than the product"}
    return [
        {**place, "variant": variant, "innovations": variant.split("+"), **found}
        for place in places
        for variant in points
        if "+" in variant
    ]


def _contributions(points, places):
    return [
        {
            **place,
            "variant": variant,
            "innovation": innovation,
            "method": "shapley" if rank else "leave_one_out",
            "lower_bound": None,
            "upper_bound": None,
            "ceg": 1.0 + 0.6 * rank,
            "interval": [0.93 + 0.5 * rank, 1.08 + 0.7 * rank],
            "interval_90": [0.94 + 0.5 * rank, 1.07 + 0.7 * rank],
            "p_value": 0.0004 if rank else 0.97,
        }
        for place in places
        for variant in points
        if "+" in variant
        for rank, innovation in enumerate(variant.split("+"))
    ]


def _fits(variants, places):
    pinned = [
        {"E": E, "gamma": gamma, "gains": {variant: 2.0 + 0.1 * rank for rank, variant in enumerate(variants[1:])}}
        for E, gamma in ((1.7, 0.1654), (1.9, 0.2012))
    ]
    return [
        {
            **place,
            "law": "L = E + K C^-gamma",
            "parameters": {"E": 1.8172, "gamma": 0.1823},
            "intervals": {"E": [1.7611, 1.8702], "gamma": None},
            "variants": {variant: {"K": 412.3 - 20 * rank} for rank, variant in enumerate(variants)},
            "converged": True,
            "best_starts": 17,
            "starts": 20,
            "replicates_converged": 0.994,
            "pinned": pinned,
        }
        for place in places
    ]


def _forecasts(points, places, axes):
    return [
        {
            **place,
            "variant": variant,
            "baseline_compute": 4e12 * 10**decades * axes[place["axis"]],
            "ceg": 2.2,
            "interval": [1.8 - 0.5 * decades, 2.9 + decades],
            "interval_90": [1.9 - 0.5 * decades, 2.8 + decades],
            "decades": decades,
            "extrapolated": True,
        }
        for place in places
        for variant in points
        for decades in (1.0, 2.0)
    ]


def _power(points, places, seeds):
    noise = {"seed_sd": 0.0734, "seeds_needed": 5, "seeds_cautious": 11, "cost": 2.4e14}
    entries = [{**place, "variant": variant, "seeds": seeds, **noise} for place in places for variant in points]
    return {"level": 0.95, "width": 0.1, "entries": entries}


@pytest.fixture(name="make_gain")
def _make_gain():
    return make_gain


@pytest.fixture(name="make_gains")
def _make_gains():
    return make_gains


@pytest.fixture
def hostile():
    """Names that break a page, a plotly label, a template or a terminal which does not escape them."""
    return HOSTILE
