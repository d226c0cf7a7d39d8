import math

import torch

from models.config import ModelConfig
from models.mlp.gelu_tanh import GeluTanhMlp


def test_definition_and_flops() -> None:
    config = ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2)
    mlp = GeluTanhMlp(config)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 12)
    inner = x @ mlp.up.weight.T
    inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.T, atol=1e-4, rtol=1e-4)
    assert mlp.flops(8) == 2 * 2 * 12 * 48 * 8
