import pytest
import torch

from models.config import ModelConfig
from models.norm.rms_norm import RmsNorm


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_definition(epsilon) -> None:
    config = ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2, bias=True, norm_epsilon=epsilon)
    norm = RmsNorm(config)
    torch.nn.init.normal_(norm.weight)
    x = 3 * torch.randn(2, 4, 12) + 1
    expected = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert norm.flops(8) == 0
