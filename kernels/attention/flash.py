"""Attention without the score matrix in memory."""

from torch import Tensor
from torch.nn import functional

from kernels.attention.inputs import check_attention_inputs


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """The function of `kernels.materialised_attention`, with the same arguments, results and errors, by PyTorch's SDPA.

    SDPA picks the fastest fused kernel that takes these inputs. Where there is none (on a CPU: with dropout, or with
    D_v != D) it keeps the scores in memory after all. Source: Dao et al. 2022 (FlashAttention).
    """
    check_attention_inputs(q, k, v, dropout_p)
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, dropout_p=dropout_p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
