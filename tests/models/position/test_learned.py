import torch

from models.config import ModelConfig
from models.position.learned import LearnedPositions

CONFIG = ModelConfig(vocabulary_size=5, context=8, layers=1, width=12, heads=2)


def test_a_vector_per_position_is_added_once() -> None:
    positions = LearnedPositions(CONFIG)
    torch.nn.init.normal_(positions.embedding.weight)
    x, q, k = torch.randn(2, 6, 12), torch.randn(2, 2, 6, 6), torch.randn(2, 1, 6, 6)
    added = positions.embed(x) - x
    torch.testing.assert_close(added, positions.embedding.weight[:6].expand(2, 6, 12))
    rotated = positions.rotate(q, k)
    assert rotated[0] is q
    assert rotated[1] is k
    assert positions.flops(8) == 0
