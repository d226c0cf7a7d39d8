"""Softmax attention: multi-head, grouped-query and multi-query.

Shape suffixes: B batch, T tokens, D width, H query heads, K key and value heads, C channels of a head.
"""

from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import Linear
from models.parts import find_attention_kernel


class SoftmaxAttention(nn.Module):
    """One fused projection to queries, keys and values, the config's attention kernel, one projection back.

    `causal` lets a token see itself and those before it; without it, every token sees all.
    """

    def __init__(self, config: ModelConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.causal = causal
        self.dropout = config.dropout
        self.kernel = find_attention_kernel(config.attention_kernel)
        shared = config.kv_heads * config.head_size
        rows = {"query": config.width, "key": shared, "value": shared}
        self.qkv = Linear(config.width, rows, config, bias=config.bias)
        self.projection = Linear(config.width, config.width, config, bias=config.bias, residual=True)

    def forward(self, x_BTD: Tensor, position: nn.Module) -> Tensor:
        q_BTD, k_BTX, v_BTX = self.qkv(x_BTD).split(list(self.qkv.rows.values()), dim=-1)
        q_BHTC, k_BKTC = position.rotate(self._split_heads(q_BTD), self._split_heads(k_BTX))
        v_BKTC = self._split_heads(v_BTX)
        dropout = self.dropout if self.training else 0.0
        out_BHTC = self.kernel(q_BHTC, k_BKTC, v_BKTC, causal=self.causal, dropout_p=dropout)
        return self.projection(out_BHTC.transpose(1, 2).reshape(x_BTD.shape))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def flops(self, sequence_length: int) -> int:
        """Both projections, and 2 C each for a score and its share of the output, per head and visible pair."""
        pairs = sequence_length * (sequence_length + 1) // 2 if self.causal else sequence_length**2
        width = self.projection.in_features
        return self.qkv.flops(sequence_length) + 4 * width * pairs + self.projection.flops(sequence_length)
