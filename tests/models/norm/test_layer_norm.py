import pytest
import torch

from models.config import ModelConfig
from models.norm.layer_norm import LayerNorm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_definition(bias, epsilon) -> None:
    config = ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2, bias=bias, norm_epsilon=epsilon)
    norm = LayerNorm(config)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = 3 * torch.randn(2, 4, 12) + 1
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected + norm.bias if bias else expected)
    assert (norm.bias is not None) == bias
    assert norm.flops(8) == 0
