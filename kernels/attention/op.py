"""The PyTorch operators cegbench::attention and cegbench::attention_backward: one boundary around Triton and PyTorch
implementations, with shapes for torch.compile, gradients for autograd and FLOPs for torch.utils.flop_counter.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.attention import blocked
from kernels.attention.options import AttentionOptions


@torch.library.custom_op("cegbench::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    scale: float,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention; `implementation` is triton or torch, the rest `AttentionOptions`."""
    options = AttentionOptions(starts, ends, seed, causal, window, softcap, dropout_p, scale, deterministic)
    out, lse = _empty_results(q, v)
    if out.numel():
        with torch.autocast(q.device.type, enabled=False):
            _implementation(implementation).forward(q, k, v, out, lse, options)
    return out, lse


@torch.library.custom_op("cegbench::attention_backward", mutates_args=())
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    scale: float,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of attention."""
    options = AttentionOptions(starts, ends, seed, causal, window, softcap, dropout_p, scale, deterministic)
    dq, dk, dv = _empty_gradients(q, k, v)
    if out.numel():
        with torch.autocast(q.device.type, enabled=False):
            _implementation(implementation).backward(d_out, q, k, v, out, lse, dq, dk, dv, options)
    return dq, dk, dv


@attention.register_fake
def _(q, k, v, *options):
    return _empty_results(q, v)


@attention_backward.register_fake
def _(d_out, q, k, v, *options):
    return _empty_gradients(q, k, v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, starts, ends, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends, seed)


def _backward(ctx, d_out: Tensor, d_lse: Tensor | None):
    gradients = attention_backward(d_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * (3 + len(ctx.options))


attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.cegbench.attention)
def attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """2 per multiplication and addition of QK^T and PV, masked scores included, as PyTorch counts its own attention."""
    batch, heads, sequence, head_size = q_shape
    return 2 * batch * heads * sequence**2 * (head_size + v_shape[-1])


@register_flop_formula(torch.ops.cegbench.attention_backward)
def attention_backward_flops(d_out_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """The scores anew, and the products for dV, dP, dQ and dK."""
    batch, heads, sequence, head_size = q_shape
    return 2 * batch * heads * sequence**2 * (3 * head_size + 2 * v_shape[-1])


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    statistics = torch.promote_types(q.dtype, torch.float32)
    return _empty_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=statistics)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty_heads(x, x.shape[3]) for x in (q, k, v))


def _empty_heads(like: Tensor, size: int) -> Tensor:
    """(B, H, S, size), with the heads of a position side by side in memory where those of `like` (B, H, S, ·) are, so
    that the transpose around attention in a model costs no copy on either side.
    """
    batch, heads, sequence, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, sequence, heads, size).transpose(1, 2)
    return like.new_empty(batch, heads, sequence, size)


def _implementation(name: str) -> ModuleType:
    if name == "torch":
        return blocked
    from kernels.attention.fused import launch  # Triton is on Linux only

    return launch
