import torch

from models.config import ModelConfig
from models.norm.none import NoNorm


def test_it_is_the_identity() -> None:
    norm = NoNorm(ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2))
    x = torch.randn(2, 3, 12)
    assert norm(x) is x
    assert norm.flops(8) == 0
    assert not norm.state_dict()
