"""Attention without the score matrix in memory."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernels import backend
from kernels.attention.documents import document_bounds
from kernels.attention.inputs import check_attention_inputs, prepare_attention_inputs
from kernels.attention.op import attention

LARGEST_HEAD = 256


def flash_attention(
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
    """The function of `kernels.materialised_attention`, with the same arguments, results and errors, in memory linear
    in the sequence and without work on keys that the window or the documents hide.

    Runs the Triton kernels or PyTorch as `kernels.backend` says; in PyTorch its fused attention where that takes the
    arguments. Head sizes up to 256 and the dtypes float32, float16 and bfloat16 have a Triton kernel. Results are the
    same bits every time, gradients too. Dropout draws one seed from PyTorch's generator of the device.

    Source: Dao 2023 (FlashAttention-2).
    """
    q, k, v = prepare_attention_inputs(q, k, v)
    check_attention_inputs(
        q, k, v, window=window, softcap=softcap, dropout_p=dropout_p, scale=scale, document_ids=document_ids
    )
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if scale <= 0.0:  # the kernels take maxima before they scale; so does PyTorch's on a CPU, to NaN
        q, scale = q * scale, 1.0
    if window is not None and window >= q.shape[2] - 1:
        window = None
    implementation = backend.choose("flash_attention", q.device, _why_not_triton(q, v))
    plain = window is None and softcap is None and document_ids is None
    if implementation == "torch" and plain and _sdpa_is_fused(q, k, v, dropout_p):
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout_p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    starts, ends = (None, None) if document_ids is None else document_bounds(document_ids)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else None
    options = (starts, ends, seed, causal, window, softcap, dropout_p, scale, backend.deterministic())
    return attention(q, k, v, *options, implementation)[0]


def _why_not_triton(q: Tensor, v: Tensor) -> str:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no kernel for {q.dtype}"
    largest = max(q.shape[3], v.shape[3])
    if largest > LARGEST_HEAD:
        return f"its head sizes end at {LARGEST_HEAD}, got {largest}"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "the interpreter's bfloat16 products are wrong"
    return ""


def _sdpa_is_fused(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    """Whether PyTorch's own attention keeps no score matrix for these arguments."""
    if q.shape[3] != v.shape[3]:
        return False
    if q.device.type == "cuda":
        return q.dtype != torch.float32 or q.shape[1] == k.shape[1]
    return dropout_p == 0.0
