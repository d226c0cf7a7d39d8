"""What every attention kernel asks of its inputs."""

from torch import Tensor


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    """Raise a ValueError that names the argument which does not fit.

    q: (B, H, S, D); k: (B, H_kv, S, D); v: (B, H_kv, S, D_v); H a multiple of H_kv; one floating dtype and one device.
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
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
