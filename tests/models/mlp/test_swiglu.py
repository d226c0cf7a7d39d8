import pytest
import torch

from models.config import ModelConfig
from models.mlp.gelu import GeluMlp
from models.mlp.swiglu import SwigluMlp


def config(width: int, **changed: object) -> ModelConfig:
    return ModelConfig(vocabulary_size=5, context=8, layers=1, width=width, heads=1, **changed)


@pytest.mark.parametrize("bias", [True, False])
def test_definition_and_flops(bias) -> None:
    mlp = SwigluMlp(config(12, bias=bias))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 12)
    both = x @ mlp.gate_up.weight.T
    if bias:
        both = both + mlp.gate_up.bias
    gate, up = both[..., :32], both[..., 32:]
    expected = (gate / (1 + torch.exp(-gate)) * up) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), expected + mlp.down.bias if bias else expected, atol=1e-4, rtol=1e-4)
    assert mlp.flops(8) == 3 * 2 * 12 * 32 * 8


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(384, 4, 1024), (768, 4, 2048), (64, 4, 168), (128, 4, 344), (12, 3, 24), (1, 1, 8)]
)
def test_the_hidden_width_is_two_thirds_to_the_nearest_multiple_of_8(width, ratio, hidden) -> None:
    mlp = SwigluMlp(config(width, mlp_ratio=ratio))
    assert mlp.down.in_features == hidden
    assert mlp.gate_up.rows == {"gate": hidden, "up": hidden}
    plain = GeluMlp(config(width, mlp_ratio=ratio))
    assert (mlp.flops(8) == plain.flops(8)) == (ratio * width % 12 == 0)
