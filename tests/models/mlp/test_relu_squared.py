import torch

from models.config import ModelConfig
from models.mlp.relu_squared import ReluSquaredMlp


def test_definition_and_flops() -> None:
    config = ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2, mlp_ratio=3, bias=True)
    mlp = ReluSquaredMlp(config)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 12)
    inner = (x @ mlp.up.weight.T + mlp.up.bias).clamp(min=0.0) ** 2
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.T + mlp.down.bias, atol=1e-4, rtol=1e-4)
    assert mlp.flops(8) == 2 * 2 * 12 * 36 * 8
