"""A gains dict in the schema of gains.json, small and made up, for the tests of the report."""

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
    """One point of a gain: 2.31 [1.80, 2.96] unless changed."""
    point = {"ceg": 2.31, "interval": [1.80, 2.96], "lower_bound": None, "upper_bound": None}
    return point | changes


POINTS = {
    "layer_norm": make_gain(),
    "rope": make_gain(ceg=None, interval=None, lower_bound=4.0),
    "mqa": make_gain(ceg=None, interval=None, upper_bound=0.5),
    "flash_attention": make_gain(ceg=1.0, interval=[0.9623, 1.0391]),
    "flash_attention+layer_norm+rope": make_gain(ceg=3.483, interval=[2.912, None]),
}


def make_gains(*, points=POINTS, scales=("compact",), seeds=3, axes=AXES, baseline="baseline"):
    """A whole gains dict; `points` maps a variant to its point on every axis and scale."""
    entries, frontiers, runs = [], [], []
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
            "sign": {"verdict": "independent", "interval": point["interval"], "scale": scales[0]},
            "slope": {"verdict": "inconclusive", "value": -0.123, "interval": [-0.34, 0.09]},
        }
        for variant, point in points.items()
        if scales
    ]
    return {
        "schema": 1,
        "study": "quickstart",
        "baseline": baseline,
        "estimator": "crossing",
        "level": 0.95,
        "created": "2026-01-02T03:04:05+00:00",
        "caveats": [],
        "warnings": [],
        "gains": entries,
        "classes": classes,
        "frontiers": frontiers,
        "sign_changes": [],
        "runs": runs,
    }


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
