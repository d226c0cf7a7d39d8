"""Common random numbers: what two models share starts bit-identical, whatever else differs."""

from itertools import combinations
from math import sqrt
from typing import Any

import pytest
import torch
from torch import nn

from models.config import ModelConfig
from models.gpt import GPT
from models.initialisation import initialise
from models.layers import Linear

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "rope": {"position": "rope"},
    "layer_norm": {"norm": "layer_norm"},
    "rms_norm": {"norm": "rms_norm"},
    "flash_attention": {"attention_kernel": "flash"},
    "gqa": {"queries_per_kv_head": 2},
    "mqa": {"queries_per_kv_head": 4},
    "gelu_tanh": {"mlp": "gelu_tanh"},
    "relu_squared": {"mlp": "relu_squared"},
    "swiglu": {"mlp": "swiglu"},
    "bias": {"bias": True},
    "untied": {"tied_head": False},
    "dropout": {"dropout": 0.5},
    "context": {"context": 32},
}


def config(**changed: Any) -> ModelConfig:
    return ModelConfig(**{"vocabulary_size": 19, "context": 16, "layers": 2, "width": 32, "heads": 4} | changed)


def named_parts(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters by name, fused weights taken apart."""
    parts = dict(model.named_parameters())
    for path, module in model.named_modules():
        if len(getattr(module, "rows", ())) > 1:
            weights = parts.pop(f"{path}.weight").split(list(module.rows.values()))
            parts |= {f"{path}.{name}": weight for name, weight in zip(module.rows, weights, strict=True)}
    return parts


@pytest.mark.parametrize(("first", "second"), list(combinations(VARIANTS, 2)))
def test_variants_share_bit_identical_weights(first, second) -> None:
    ours, theirs = (named_parts(GPT(config(**VARIANTS[name]), seed=3)) for name in (first, second))
    shared = [name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape]
    assert {"token_embedding.weight", "blocks.0.attention.qkv.query", "final_norm.weight"} <= set(shared)
    assert ("blocks.1.mlp.down.weight" in shared) == ("swiglu" not in (first, second))
    for name in shared:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_order_of_construction_does_not_matter() -> None:
    def model(names: str) -> nn.Module:
        return nn.ModuleDict({name: Linear(6, 5, config(), bias=True) for name in names})

    forward, backward = model("abc"), model("cba")
    initialise(forward, 0)
    initialise(backward, 0)
    for name, parameter in forward.named_parameters():
        assert torch.equal(parameter, backward.get_parameter(name))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = GPT(config(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = GPT(config(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_no_two_weights_and_no_two_seeds_are_alike(mlp) -> None:
    drawn = [
        parameter.flatten()[:32]
        for seed in (0, 1, 2**40)
        for parameter in named_parts(GPT(config(mlp=mlp), seed=seed)).values()
        if parameter.dim() > 1
    ]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


@pytest.mark.parametrize("parts", [{"norm": "layer_norm"}, {"norm": "rms_norm", "mlp": "swiglu"}])
def test_the_distribution_is_that_of_nanogpt(parts) -> None:
    model = GPT(config(width=128, layers=8, bias=True, **parts))
    for name, parameter in named_parts(model).items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("projection.weight", "down.weight"))
            expected = 0.02 / sqrt(2 * 8) if residual else 0.02
            assert abs(parameter.std() / expected - 1) < 6 / sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean()) < 6 * expected / sqrt(parameter.numel()), name


def test_weights_do_not_change_between_releases() -> None:
    """A change here changes every result: it must be on purpose."""
    weight = GPT(config(), seed=0).token_embedding.weight[0, :4]
    torch.testing.assert_close(weight, torch.tensor([0.019719800, 0.001286007, -0.000625180, -0.014043885]))


def test_parameters_that_nobody_initialises_are_refused() -> None:
    with pytest.raises(TypeError, match=r"0 \(Bilinear\) holds parameters but defines no initialise"):
        initialise(nn.Sequential(nn.Bilinear(2, 2, 2)), 0)


def test_on_the_meta_device_a_model_has_shapes_and_no_values():
    config = ModelConfig(vocabulary_size=50304, context=1024, layers=10, width=768, heads=12)
    with torch.device("meta"):
        model = GPT(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.parameter_counts()["with_head"] == 109_413_120
