"""Cross-entropy of logits, and what that of a linear layer takes from it.

With s the logits after the soft cap and y the target, the loss of a token is
    lse - (1 - label_smoothing) s_y - label_smoothing mean(s) + z_loss lse^2,  lse = log(sum(exp(s))).

Shape suffixes: T tokens, V vocabulary; in kernels M tokens of a tile, N its part of the vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import backend, gemm
from kernels.jit import LOG2_E, LOWEST, tanh, tl, triton

LN_2 = tl.constexpr(math.log(2.0))
LARGEST_BLOCK = 4096  # columns of a tile; not measured yet


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each token.

    Args:
        logits: (..., V) in any floating dtype.
        targets: (...) integers, each in [0, V) or `ignore_index`.
        ignore_index: a token with this target has loss 0 and no gradient.
        softcap: bounds logits smoothly, as softcap * tanh(logit / softcap).
        z_loss: weight of the squared log-sum-exp, which keeps it near 0.
        label_smoothing: share of the target's probability that is spread over the vocabulary, the target included.

    Returns:
        (...) float32, in nats; float64 for float64 logits.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Source: Gemma Team 2024 for the soft cap, Chowdhery et al. 2022 (PaLM) for z-loss, Szegedy et al. 2016 for
    smoothing.
    """
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    check_input("logits", logits, targets)
    return losses_with_logits(logits, targets, options)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The function of `cross_entropy_reference`, with the same arguments, results and errors; its Triton kernels read
    the logits once forward and once backward, and give NaN for a target outside the vocabulary.
    """
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    check_input("logits", logits, targets)
    unsupported = "" if logits.dtype in gemm.DTYPES else f"it has no kernel for {logits.dtype}"
    if backend.choose("cross_entropy", logits.device, unsupported) == "torch":
        return losses_with_logits(logits, targets, options)
    # With two dimensions of tokens, a view such as logits[:, :-1] needs no copy.
    shape = (math.prod(targets.shape[:-1]), targets.shape[-1]) if targets.dim() else (1, 1)
    targets_2d = targets.reshape(shape).to(torch.int64)
    losses, _ = cross_entropy_op(logits.reshape(*shape, logits.shape[-1]), targets_2d, *options.values())
    return losses.view(targets.shape)


@dataclass(frozen=True)
class LossOptions:
    """The arguments of a loss, as `cross_entropy_reference` describes them."""

    ignore_index: int
    softcap: float | None
    z_loss: float
    label_smoothing: float

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a positive number, got {self.softcap}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be a number, 0 or more, got {self.z_loss}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def values(self) -> tuple[int, float | None, float, float]:
        return self.ignore_index, self.softcap, self.z_loss, self.label_smoothing

    def kernel_arguments(self) -> dict[str, float | bool]:
        """What every kernel takes."""
        return {"softcap": self.softcap or 0.0, "SOFTCAP": self.softcap is not None, "enable_fp_fusion": True}

    def share_arguments(self, vocabulary: int) -> dict[str, float]:
        """What a kernel takes to weigh the terms of the loss."""
        return {
            "z_loss": self.z_loss,
            "target_share": 1.0 - self.label_smoothing,
            "uniform_share": self.label_smoothing / vocabulary,
        }


def check_input(name: str, tensor: Tensor, targets: Tensor) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or not tensor.dtype.is_floating_point:
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} must have a last dimension and a floating dtype, got {shape} {tensor.dtype}")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise ValueError(f"targets must have an integer dtype, got {targets.dtype}")
    if targets.shape != tensor.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(tensor.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.device != tensor.device:
        raise ValueError(f"targets must be on the device of {name}, {tensor.device}, got {targets.device}")


def losses_with_logits(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    scores_TV, targets_T = logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1).to(torch.int64)
    scores_TV = scores_TV.to(statistics_dtype(logits))
    if options.softcap is not None:
        scores_TV = options.softcap * torch.tanh(scores_TV / options.softcap)
    losses_T = functional.cross_entropy(
        scores_TV,
        targets_T,
        reduction="none",
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
    )
    if options.z_loss:
        squares_T = torch.logsumexp(scores_TV, 1).square().masked_fill(targets_T == options.ignore_index, 0.0)
        losses_T = losses_T + options.z_loss * squares_T
    return losses_T.view(targets.shape)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def empty_statistics(like: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(like)
    return like.new_empty(targets.shape, dtype=dtype), like.new_empty(targets.shape, dtype=dtype)


# The operators are Triton's alone: elsewhere autograd and torch.compile do as well.


@torch.library.custom_op("cegbench::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(losses, lse), both (A, B) float32, of logits (A, B, V) and targets (A, B) int64."""
    losses, lse = empty_statistics(logits, targets)
    _launch_forward(logits, targets, losses, lse, LossOptions(ignore_index, softcap, z_loss, label_smoothing))
    return losses, lse


@torch.library.custom_op("cegbench::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(
    d_losses: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the logits."""
    d_logits = logits.new_empty(logits.shape)
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    _launch_backward(d_losses, logits, targets, lse, d_logits, options)
    return d_logits


@cross_entropy_op.register_fake
def _(logits, targets, *options):
    return empty_statistics(logits, targets)


@cross_entropy_backward_op.register_fake
def _(d_losses, logits, targets, lse, *options):
    return logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _cross_entropy_backward(ctx, d_losses: Tensor, d_lse: Tensor | None):
    d_logits = cross_entropy_backward_op(d_losses, *ctx.saved_tensors, *ctx.options)
    return d_logits, None, *[None] * len(ctx.options)


cross_entropy_op.register_autograd(_cross_entropy_backward, setup_context=_save_logits)


def _launch_forward(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, options: LossOptions) -> None:
    """Writes losses and lse, both (A, B), of logits (A, B, V)."""
    rows, columns = _block(logits)
    if losses.numel():
        with torch.cuda.device_of(logits):
            cross_entropy_forward_kernel[(triton.cdiv(losses.numel(), rows),)](
                targets=targets.contiguous(),
                losses=losses,
                lse=lse,
                SMOOTHING=options.label_smoothing > 0.0,
                **_logit_arguments(logits, rows, columns, options),
            )


def _launch_backward(
    d_losses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, d_logits: Tensor, options: LossOptions
) -> None:
    """Writes d_logits (A, B, V), the gradient of the logits."""
    rows, columns = _block(logits)
    if d_logits.numel():
        with torch.cuda.device_of(logits):
            cross_entropy_backward_kernel[
                (triton.cdiv(d_losses.numel(), rows) * triton.cdiv(logits.shape[2], columns),)
            ](
                d_losses=d_losses.contiguous(),
                targets=targets.contiguous(),
                lse=lse,
                d_logits=d_logits,
                **_logit_arguments(logits, rows, columns, options),
            )


def _block(logits: Tensor) -> tuple[int, int]:
    """Rows and columns that a program takes at once: of a small vocabulary many rows."""
    columns = min(triton.next_power_of_2(logits.shape[2]), LARGEST_BLOCK)
    return max(1, 1024 // columns), columns


def _logit_arguments(logits: Tensor, rows: int, columns: int, options: LossOptions) -> dict[str, Any]:
    outer, inner, vocabulary = logits.shape
    return {
        "logits": logits,
        "strides": logits.stride(),
        "rows": outer * inner,
        "inner": inner,
        "V": vocabulary,
        "ignore_index": options.ignore_index,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "num_warps": 8,
        **options.kernel_arguments(),
        **options.share_arguments(vocabulary),
    }


@triton.jit
def capped(logits, softcap, SOFTCAP: tl.constexpr):
    """(scores, factor, slope): factor * scores are the soft-capped logits in units of ln 2, and slope is their
    derivative by the logits.
    """
    if SOFTCAP:
        bent = tanh(logits / softcap)
        return bent, softcap * LOG2_E, 1.0 - bent * bent
    else:
        return logits, LOG2_E, 1.0


@triton.jit
def logit_gradients(
    logits_MN, is_target_MN, lse_M, d_losses_M, softcap, z_loss, target_share, uniform_share, SOFTCAP: tl.constexpr
):
    """The gradient of the logits, in float32."""
    scores_MN, factor, slope = capped(logits_MN, softcap, SOFTCAP)
    weights_MN = tl.exp2(scores_MN * factor - (lse_M * LOG2_E)[:, None])
    weights_MN = weights_MN * (1.0 + 2.0 * z_loss * lse_M)[:, None] - uniform_share
    weights_MN = tl.where(is_target_MN, weights_MN - target_share, weights_MN)
    return weights_MN * d_losses_M[:, None] * slope


@triton.jit
def cross_entropy_forward_kernel(
    logits, targets, losses, lse, strides, rows, inner, V, ignore_index, softcap, z_loss, target_share, uniform_share,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """losses and lse of BLOCK_M of the tokens, in one pass over their logits: an online log-sum-exp in base 2."""
    rows_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    targets_M = tl.load(targets + rows_M, mask=rows_M < rows, other=ignore_index)
    counts_M = targets_M != ignore_index
    logits_M = row_pointers(logits, strides, rows_M, inner)
    column_stride = tl.cast(strides[2], tl.int64)
    max_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    score_sum_M = tl.zeros([BLOCK_M], tl.float32)
    for column in tl.range(0, V, BLOCK_N):
        columns_N = column + tl.arange(0, BLOCK_N)
        inside_MN = counts_M[:, None] & (columns_N < V)[None, :]
        logits_MN = tl.load(logits_M[:, None] + columns_N[None, :] * column_stride, mask=inside_MN, other=0.0)
        scores_MN, factor, _ = capped(logits_MN.to(tl.float32), softcap, SOFTCAP)
        if SMOOTHING:
            score_sum_M += tl.sum(scores_MN, 1)
        scores_MN = tl.where(inside_MN, scores_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * factor)
        sum_M = sum_M * tl.exp2(max_M - new_max_M) + tl.sum(tl.exp2(scores_MN * factor - new_max_M[:, None]), 1)
        max_M = new_max_M
    lse_M = (max_M + tl.log2(sum_M)) * LN_2

    in_vocabulary_M = counts_M & (targets_M >= 0) & (targets_M < V)
    target_M = tl.load(logits_M + targets_M * column_stride, mask=in_vocabulary_M, other=float("nan"))
    score_M, factor, _ = capped(target_M.to(tl.float32), softcap, SOFTCAP)
    scale = factor * LN_2
    loss_M = lse_M - target_share * (score_M * scale) + z_loss * lse_M * lse_M
    if SMOOTHING:
        loss_M -= uniform_share * (score_sum_M * scale)
    tl.store(losses + rows_M, tl.where(counts_M, loss_M, 0.0), mask=rows_M < rows)
    tl.store(lse + rows_M, lse_M, mask=rows_M < rows)


@triton.jit
def cross_entropy_backward_kernel(
    d_losses, logits, targets, lse, d_logits, strides, rows, inner, V,
    ignore_index, softcap, z_loss, target_share, uniform_share,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of d_logits, whose memory is contiguous."""
    column_tiles = tl.cdiv(V, BLOCK_N)
    rows_M = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_N = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    targets_M = tl.load(targets + rows_M, mask=rows_M < rows, other=ignore_index)
    counts_M = targets_M != ignore_index
    lse_M = tl.load(lse + rows_M, mask=counts_M, other=0.0)
    d_losses_M = tl.load(d_losses + rows_M, mask=counts_M, other=0.0)
    logits_M = row_pointers(logits, strides, rows_M, inner)
    pointers_MN = logits_M[:, None] + columns_N[None, :] * tl.cast(strides[2], tl.int64)
    logits_MN = tl.load(pointers_MN, mask=counts_M[:, None] & (columns_N < V)[None, :], other=0.0)
    d_logits_MN = logit_gradients(
        logits_MN.to(tl.float32), columns_N[None, :] == targets_M[:, None], lse_M, d_losses_M,
        softcap, z_loss, target_share, uniform_share, SOFTCAP,
    )  # fmt: skip
    results_MN = d_logits + (rows_M.to(tl.int64) * V)[:, None] + columns_N[None, :]
    inside_MN = (rows_M < rows)[:, None] & (columns_N < V)[None, :]
    tl.store(results_MN, d_logits_MN.to(d_logits.dtype.element_ty), mask=inside_MN)


@triton.jit
def row_pointers(logits, strides, rows_M, inner):
    """Where rows of logits (outer, inner, V) begin."""
    outer_M = (rows_M // inner).to(tl.int64)
    return logits + outer_M * strides[0] + (rows_M % inner).to(tl.int64) * strides[1]
