"""Every mistake in a config is named by its field."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from models.config import PART_KINDS, ModelConfig


def config(**changed: Any) -> ModelConfig:
    return ModelConfig(**{"vocabulary_size": 11, "context": 8, "layers": 2, "width": 12, "heads": 3} | changed)


def test_the_defaults_are_the_baseline() -> None:
    baseline = config()
    chosen = {field.name: getattr(baseline, field.name) for field in fields(ModelConfig)[5:]}
    assert chosen == {
        "queries_per_kv_head": 1,
        "mlp_ratio": 4,
        "position": "learned",
        "norm": "none",
        "mlp": "gelu",
        "attention": "softmax",
        "attention_kernel": "materialised",
        "dropout": 0.0,
        "bias": False,
        "tied_head": True,
        "norm_epsilon": 1e-5,
        "initial_std": 0.02,
    }
    assert (baseline.head_size, baseline.kv_heads) == (4, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary_size": 0}, "^vocabulary_size must be at least 1, got 0"),
        ({"context": -1}, "^context must be at least 1"),
        ({"layers": 0}, "^layers must be at least 1"),
        ({"width": 0}, "^width must be at least 1"),
        ({"heads": 0}, "^heads must be at least 1"),
        ({"mlp_ratio": 0}, "^mlp_ratio must be at least 1"),
        ({"queries_per_kv_head": 0}, "^queries_per_kv_head must be at least 1"),
        ({"heads": 5}, "^heads must divide width, got 5 heads and width 12"),
        ({"queries_per_kv_head": 2}, r"^queries_per_kv_head must divide heads \(3\), got 2"),
        ({"dropout": 1.0}, r"^dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "^dropout must lie in"),
        ({"norm_epsilon": 0.0}, "^norm_epsilon must be positive"),
        ({"initial_std": float("inf")}, "^initial_std must be positive"),
        ({"layers": 2.0}, "^layers must be of type int, got 2.0"),
        ({"layers": True}, "^layers must be of type int, got True"),
        ({"width": "12"}, "^width must be of type int, got '12'"),
        ({"bias": 1}, "^bias must be of type bool, got 1"),
        ({"dropout": None}, "^dropout must be of type float, got None"),
        ({"attention_kernel": "fast"}, "^attention_kernel must be one of flash, materialised, got 'fast'"),
        ({"position": "absolute"}, "^position must be one of learned, rope, got 'absolute'"),
        ({"norm": "batch_norm"}, "^norm must be one of layer_norm, none, rms_norm, got 'batch_norm'"),
        ({"mlp": "__init__"}, "^mlp must be one of gelu, gelu_tanh, relu_squared, swiglu, got '__init__'"),
        ({"attention": "../config"}, "^attention must be one of softmax, got '../config'"),
        ({"norm": None}, "^norm must be a name or a mapping with a 'name', got None"),
        ({"position": {"base": 500.0}}, "^position must be a name or a mapping with a 'name'"),
        ({"position": {"name": "rope", "bse": 1.0}}, "^position: 'rope' has no option 'bse'; its options are base"),
        ({"norm": {"name": "none", "width": 3}}, "^norm: 'none' has no option 'width'; it has none"),
        ({"position": {"name": "rope", "base": "big"}}, "^position: base must be of type float, got 'big'"),
    ],
)
def test_a_mistake_names_its_field(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_it_is_frozen_through_and_through() -> None:
    spec = {"name": "rope", "base": 500}
    made = config(position=spec)
    spec["base"] = 1
    assert made.position == {"name": "rope", "base": 500}
    with pytest.raises(FrozenInstanceError):
        made.layers = 3


def test_every_kind_of_part_is_a_field() -> None:
    assert set(PART_KINDS) <= {field.name for field in fields(ModelConfig)}


def test_importing_it_does_not_load_torch() -> None:
    program = "import sys, models.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
