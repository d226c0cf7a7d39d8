import pytest
import torch

from kernels import materialised_attention
from models.attention.softmax import SoftmaxAttention
from models.config import ModelConfig
from models.position.rope import RotaryPositions


def config(queries: int = 1, **changed: object) -> ModelConfig:
    sizes = {"vocabulary_size": 5, "context": 8, "layers": 1, "width": 16, "heads": 4}
    return ModelConfig(**sizes, queries_per_kv_head=queries, **changed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["materialised", "flash"])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_heads_are_slices_of_the_fused_projection(queries, kernel, causal) -> None:
    attention = SoftmaxAttention(config(queries, attention_kernel=kernel), causal=causal)
    positions = RotaryPositions(config())
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 16)
    projected, shared = x @ attention.qkv.weight.T, 16 // queries
    assert projected.shape[-1] == 16 + 2 * shared
    q = projected[..., :16].reshape(2, 7, 4, 4).transpose(1, 2)
    k = projected[..., 16 : 16 + shared].reshape(2, 7, 4 // queries, 4).transpose(1, 2)
    v = projected[..., 16 + shared :].reshape(2, 7, 4 // queries, 4).transpose(1, 2)
    heads = materialised_attention(*positions.rotate(q, k), v, causal=causal)
    expected = torch.cat(heads.unbind(1), dim=-1) @ attention.projection.weight.T
    torch.testing.assert_close(attention(x, positions), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("causal", "pairs"), [(True, 15), (False, 25)])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_flops_count_visible_pairs(queries, causal, pairs) -> None:
    attention = SoftmaxAttention(config(queries), causal=causal)
    projections = 2 * 16 * (16 + 2 * 16 // queries) + 2 * 16 * 16
    assert attention.flops(5) == 5 * projections + 4 * 16 * pairs
