"""Attention as it is written down: the specification of every faster kernel here.

Shape suffixes: B batch, H query heads, K key and value heads, G query heads per key head (H = K * G), S sequence,
D head size of queries and keys, E head size of values.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.inputs import check_attention_inputs


def materialised_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale * Q K^T) V with the whole score matrix in memory.

    q: (B, H, S, D); k: (B, H_kv, S, D); v: (B, H_kv, S, D_v), one floating dtype. H must be a multiple of H_kv: query
    head h reads key head h // (H / H_kv), which is multi-head attention for H_kv = H, multi-query for H_kv = 1 and
    grouped-query between. `causal` hides the keys after each query. `dropout_p` drops attention weights whenever it is
    above 0: the caller passes 0 outside training. `scale` defaults to 1 / sqrt(D).

    Returns (B, H, S, D_v) in the dtype of q (under autocast, in autocast's). Raises ValueError naming the argument.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the grouping.
    """
    check_attention_inputs(q, k, v, dropout_p)
    batch, heads, sequence, head_size = q.shape
    key_heads = k.shape[1]
    if scale is None:
        scale = 1.0 / math.sqrt(head_size)
    # The queries of a group are stacked along the sequence, so that shared keys and values are never copied.
    q_BKMD = (q * scale).reshape(batch, key_heads, -1, head_size)
    scores_BHSS = (q_BKMD @ k.transpose(-2, -1)).view(batch, heads, sequence, sequence)
    if causal:
        # Adding in place needs neither a second score matrix nor a backward pass of its own (masked_fill needs both).
        scores_BHSS.add_(torch.full((sequence, sequence), -math.inf, dtype=scores_BHSS.dtype, device=q.device).triu_(1))
    weights_BHSS = functional.softmax(scores_BHSS, dim=-1)
    if dropout_p:
        weights_BHSS = functional.dropout(weights_BHSS, dropout_p)
    out_BKME = weights_BHSS.view(batch, key_heads, -1, sequence) @ v
    return out_BKME.view(batch, heads, sequence, v.shape[-1])
