"""Attention as it is written down: the specification of every faster kernel here.

Shape suffixes: B batch, H query heads, K key and value heads, G query heads per key head (H = K * G), S sequence,
D head size of queries and keys, E head size of values.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.inputs import check_attention_inputs, prepare_attention_inputs


def materialised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V with the whole score matrix in memory.

    Args:
        q: (B, H, S, D), and k: (B, H_kv, S, D), v: (B, H_kv, S, D_v), one floating dtype. H must be a multiple of H_kv:
            query head h reads key head h // (H / H_kv), which is multi-head attention for H_kv = H, multi-query for
            H_kv = 1 and grouped-query between.
        causal: hides the keys after each query.
        window: how many keys to the left of its own position a query sees; None for all.
        softcap: bounds scaled scores smoothly, as softcap * tanh(score / softcap).
        dropout_p: share of attention weights dropped, whenever it is above 0: the caller passes 0 outside training.
        scale: of the scores, 1 / sqrt(D) by default.
        document_ids: (B, S) integers. A document is a run of equal ids, and a query sees the keys of its own only.

    Returns:
        (B, H, S, D_v) in the dtype of q (under autocast, in autocast's).

    Raises:
        ValueError: an argument does not fit; the message names it.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the grouping; Gemma Team 2024 for the soft cap.
    """
    q, k, v = prepare_attention_inputs(q, k, v)
    check_attention_inputs(
        q, k, v, window=window, softcap=softcap, dropout_p=dropout_p, scale=scale, document_ids=document_ids
    )
    batch, heads, sequence, head_size = q.shape
    key_heads = k.shape[1]
    if scale is None:
        scale = 1.0 / math.sqrt(head_size)
    # The queries of a group are stacked along the sequence, so that shared keys and values are never copied.
    q_BKMD = (q * scale).reshape(batch, key_heads, -1, head_size)
    scores_BHSS = (q_BKMD @ k.transpose(-2, -1)).view(batch, heads, sequence, sequence)
    if softcap is not None:
        scores_BHSS = softcap * torch.tanh(scores_BHSS / softcap)
    hidden = _hidden(sequence, causal, window, document_ids, q.device)
    if hidden is not None:
        # Adding in place needs neither a second score matrix nor a backward pass of its own (masked_fill needs both).
        scores_BHSS.add_(
            torch.zeros(hidden.shape, dtype=scores_BHSS.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        )
    weights_BHSS = functional.softmax(scores_BHSS, dim=-1)
    if dropout_p:
        weights_BHSS = functional.dropout(weights_BHSS, dropout_p)
    out_BKME = weights_BHSS.view(batch, key_heads, -1, sequence) @ v
    return out_BKME.view(batch, heads, sequence, v.shape[-1])


def _hidden(
    sequence: int, causal: bool, window: int | None, document_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Bool (S, S) or, with documents, (B, 1, S, S): which keys (last) each query (last but one) does not see."""
    hidden = None
    if causal:
        hidden = torch.ones(sequence, sequence, dtype=torch.bool, device=device).triu_(1)
    if window is not None:
        left = torch.ones(sequence, sequence, dtype=torch.bool, device=device).tril_(-1 - window)
        hidden = left if hidden is None else hidden | left
    if document_ids is not None:
        borders = functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)).cumsum(1)
        others = (borders[:, :, None] != borders[:, None, :])[:, None]
        hidden = others if hidden is None else hidden | others
    return hidden
