"""What every attention kernel asks of its inputs."""

import math

import torch
from torch import Tensor


def prepare_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where autocast is on, as PyTorch's own attention takes them."""
    tensors = (q, k, v)
    device_type = q.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x for x in tensors)
    return tensors


def check_attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
    document_ids: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument which does not fit.

    q: (B, H, S, D); k: (B, H_kv, S, D); v: (B, H_kv, S, D_v); H a multiple of H_kv; one floating dtype and one device;
    document_ids: (B, S) integers on the same device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, sequence, head size), got {_shape(tensor)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.shape[0] != q.shape[0] or tensor.shape[2] != q.shape[2]:
            raise ValueError(f"{name} must have the batch and sequence of q, {_shape(q)}, got {_shape(tensor)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have the head size of q, {q.shape[3]}, got {k.shape[3]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have as many heads as k, {k.shape[1]}, got {v.shape[1]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}")
    if window is not None and window < 0:
        raise ValueError(f"window must be a number of keys, 0 or more, got {window}")
    if softcap is not None and not (0.0 < softcap < math.inf):
        raise ValueError(f"softcap must be a positive number, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if document_ids is not None:
        _check_document_ids(document_ids, q)


def _check_document_ids(document_ids: Tensor, q: Tensor) -> None:
    expected = (q.shape[0], q.shape[2])
    if tuple(document_ids.shape) != expected:
        raise ValueError(f"document_ids must have q's batch and sequence, {expected}, got {_shape(document_ids)}")
    if document_ids.dtype.is_floating_point or document_ids.dtype.is_complex or document_ids.dtype == torch.bool:
        raise ValueError(f"document_ids must have an integer dtype, got {document_ids.dtype}")
    if document_ids.device != q.device:
        raise ValueError(f"document_ids must be on the device of q, {q.device}, got {document_ids.device}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
