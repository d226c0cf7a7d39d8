"""The gains that Sanderson et al. 2025 published (arXiv 2505.04075, results.ipynb), and what they are in FLOPs.

Their evaluations are every 500 of 50,000 iterations, 101 in all; their gains are ratios of the numbers of two of them.
"""

import pytest
import torch

from bench.compose import compose_config
from bench.config import settle
from bench.gains import compute_gains
from bench.gains.sources.runs import read_study
from models.flops import flops_per_sequence
from models.gpt import GPT

EVALUATIONS = 101
# Where each first reaches the baseline's last smoothed loss, counted from 1; None where never. `sparse` is their native
# sparse attention, which also has one key and value head. The full baseline diverges, and first passes its last loss
# at evaluation 27.
ARRIVES = {
    "compact": {
        "baseline": 101, "sparse": None, "mqa": None, "flash_attention": 95, "rope": 54, "layer_norm": 55,
        "flash_attention+layer_norm+rope": 29,
    },
    "full": {
        "baseline": 27, "sparse": 28, "mqa": 29, "flash_attention": 27, "rope": 20, "layer_norm": 19,
        "flash_attention+layer_norm+rope": 15,
    },
}  # fmt: skip
PUBLISHED = {
    "compact": {
        "sparse": None, "mqa": None, "flash_attention": 1.063, "rope": 1.870, "layer_norm": 1.836,
        "flash_attention+layer_norm+rope": 3.483,
    },
    "full": {
        "sparse": 0.964, "mqa": 0.931, "flash_attention": 1.000, "rope": 1.350, "layer_norm": 1.421,
        "flash_attention+layer_norm+rope": 1.800,
    },
}  # fmt: skip
# FLOPs per token over the baseline's, of 6 N + 12 L H Q T as in their code's estimate of utilisation.
MQA_FLOPS = {"compact": 0.954, "full": 0.914}


def losses(scale, variant):
    """Losses whose mean over 8 first is 3 at the evaluation of arrival: 5 before; the full scale's rise again."""
    arrives = ARRIVES[scale][variant]
    if arrives is None:
        return [5.0] * EVALUATIONS
    curve = [5.0] * (arrives - 8) + [3.0] * (EVALUATIONS - arrives + 8)
    if scale == "full":
        curve[40:-8] = [6.0] * (EVALUATIONS - 48)
    return curve


@pytest.fixture
def gains(study_folder):
    """{(scale, variant, axis): entry of gains.json}, one seed each, as published."""
    for scale, variants in ARRIVES.items():
        for variant in variants:
            flops = MQA_FLOPS[scale] if variant == "mqa" else 1.0
            metrics = [
                {
                    "step": 500 * number,
                    "branch": 64e12,
                    "val_loss": loss,
                    "tokens": 500 * number * 262_144,
                    "model_flops": 500e9 * number * flops,
                    "optimizer_flops": 0,
                }
                for number, loss in enumerate(losses(scale, variant), 1)
            ]
            study_folder.add(variant, [4.0, 3.5, 3.2, 3.1], scale=scale, metrics=metrics)
    found = compute_gains(
        read_study(study_folder.path), baseline="baseline", estimator="steps_to_target", replicates=100
    )
    return {(gain["scale"], gain["variant"], gain["axis"]): gain for gain in found["gains"]}


def test_the_published_gains_are_ratios_of_evaluations(gains):
    for scale, variants in PUBLISHED.items():
        for variant, published in variants.items():
            gain = gains[scale, variant, "steps"]
            if published is None:
                assert gain["ceg"] is None
                assert gain["upper_bound"] == ARRIVES[scale]["baseline"] / EVALUATIONS
            else:
                assert round(gain["ceg"], 3) == published


def test_a_gain_in_flops_is_that_in_steps_but_for_what_a_step_costs(gains):
    for (scale, variant, axis), gain in gains.items():
        if axis == "model_flops" and gain["ceg"] is not None:
            cost = MQA_FLOPS[scale] if variant == "mqa" else 1.0
            assert gain["ceg"] == pytest.approx(gains[scale, variant, "steps"]["ceg"] / cost)


def test_multi_query_attention_at_the_full_scale_loses_in_steps_and_gains_in_flops(gains):
    assert round(gains["full", "mqa", "steps"]["ceg"], 3) == 0.931
    assert round(gains["full", "mqa", "model_flops"]["ceg"], 2) == 1.02


def test_at_the_compact_scale_it_is_censored_on_either_axis(gains):
    assert gains["compact", "mqa", "steps"]["upper_bound"] == 1.0
    assert gains["compact", "mqa", "model_flops"]["upper_bound"] == pytest.approx(1 / 0.954)


def test_flash_attention_computes_the_same_function_so_its_gain_is_the_noise_floor(gains):
    assert gains["compact", "flash_attention", "steps"]["ceg"] == pytest.approx(101 / 95)
    assert gains["full", "flash_attention", "steps"]["ceg"] == 1.0


@pytest.mark.parametrize(("scale", "context"), [("compact", 512), ("full", 1024)])
def test_our_own_models_count_as_much_for_multi_query_attention(scale, context):
    def flops(*innovations):
        config = settle(
            compose_config([f"scale=sanderson_{scale}", f"innovation=[{','.join(innovations)}]"])
        ).model_config(50257)
        with torch.device("meta"):
            return flops_per_sequence(GPT(config), context)

    baseline, mqa = flops(), flops("mqa")
    assert mqa["flops_palm"] / baseline["flops_palm"] == pytest.approx(MQA_FLOPS[scale], abs=0.002)
    # Model FLOPs count only the keys that a causal mask lets through, so that the same saving is a larger share.
    share = mqa["model_flops"] / baseline["model_flops"]
    assert share == pytest.approx({"compact": 0.9526, "full": 0.9078}[scale], abs=1e-4)
