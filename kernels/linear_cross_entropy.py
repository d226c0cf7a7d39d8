"""Cross-entropy of a linear layer whose logits are never in memory all at once.

The forward kernel reduces each tile of logits where it was multiplied (Wijmans et al. 2024, Cut Cross-Entropy). The
backward pass goes through the tokens chunk by chunk (Hsu et al. 2024, Liger Kernel): a kernel computes the logits anew
and stores their gradient, and two matrix products take that to the gradients of x and the weight, the latter summed in
float32.

Shape suffixes: T tokens, D width, V vocabulary; in kernels M tokens of a tile, N its part of the vocabulary, K the part
of the width that a step sums over.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, gemm, jit
from kernels.cross_entropy import (
    LN_2,
    LossOptions,
    capped,
    check_input,
    empty_statistics,
    logit_gradients,
    losses_with_logits,
    statistics_dtype,
)
from kernels.gemm import TileSize, load_block, next_tile, store_block
from kernels.jit import tl, triton

# Neither these nor the tile sizes below are measured yet.
SMALLEST_CHUNK, LARGEST_CHUNK = 1024, 4096
SMALL = TileSize(16, 256, 32, 4, 1)  # for the interpreter
# By whether TMA fills a data centre's shared memory, bits of the dtype, and whether a soft cap needs registers.
TILE_SIZES = {
    (False, 16, False): TileSize(128, 128, 32, 8, 4),
    (False, 16, True): TileSize(128, 128, 32, 8, 4),
    (False, 32, False): TileSize(64, 64, 32, 8, 3),
    (False, 32, True): TileSize(64, 64, 32, 8, 3),
    (True, 16, False): TileSize(128, 256, 64, 8, 3),
    (True, 16, True): TileSize(128, 128, 64, 8, 3),
    (True, 32, False): TileSize(64, 64, 16, 8, 3),
    (True, 32, True): TileSize(64, 64, 16, 8, 3),
}


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy_reference` of the logits x W^T.

    Args:
        x: (..., D) in any floating dtype.
        weight: (V, D) in the dtype of x; under autocast both are taken in autocast's.

    The rest as there.
    """
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    _check_linear(x, weight, targets)
    return losses_with_logits(functional.linear(x, weight), targets, options)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The function of `linear_cross_entropy_reference`, with the same arguments, results and errors, in memory for the
    logits of a quarter of the tokens, but of at least 1024 tokens and at most 4096.

    The weight's gradient is summed in float32 and has the weight's dtype, under autocast too. The Triton kernels give
    NaN for a target outside the vocabulary.
    """
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    _check_linear(x, weight, targets)
    (x,) = gemm.autocast_operands(x)
    implementation = backend.choose("linear_cross_entropy", x.device, gemm.why_not_triton(x))
    x_TD, targets_T = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1).to(torch.int64)
    losses, _ = linear_cross_entropy_op(x_TD, weight, targets_T, *options.values(), implementation)
    return losses.view(targets.shape)


def _check_linear(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    check_input("x", x, targets)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have the shape (vocabulary, {x.shape[-1]}), got {tuple(weight.shape)}")
    x, cast_weight = gemm.autocast_operands(x, weight[:0])
    if cast_weight.dtype != x.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")


@torch.library.custom_op("cegbench::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(losses, lse), both (T,), of x (T, D), a weight (V, D) that is taken in the dtype of x, and targets (T,) int64;
    `implementation` is triton or torch.
    """
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    forward = _linear_statistics_by_triton if implementation == "triton" else _linear_statistics_by_torch
    lse_T, target_scores_T, mean_scores_T = forward(x, weight.to(x.dtype), targets, options)
    losses_T = lse_T - (1.0 - label_smoothing) * target_scores_T - label_smoothing * mean_scores_T
    losses_T += z_loss * lse_T.square()
    return losses_T.masked_fill_(targets == ignore_index, 0.0), lse_T


@torch.library.custom_op("cegbench::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    d_losses: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and the weight, each in the dtype of its tensor."""
    options = LossOptions(ignore_index, softcap, z_loss, label_smoothing)
    tokens, vocabulary = x.shape[0], weight.shape[0]
    if not tokens:
        return x.new_empty(x.shape), weight.new_zeros(weight.shape)
    store_d_logits = _store_d_logits_by_triton if implementation == "triton" else _store_d_logits_by_torch
    x_TD, weight_VD, d_losses_T = jit.with_dense_rows(x), weight.to(x.dtype), d_losses.contiguous()
    dx_TD, d_weight_VD = x.new_empty(x.shape), x.new_empty(weight.shape, dtype=statistics_dtype(x))
    chunks = _chunks(tokens)
    buffer = _empty_chunk(x, chunks[0].stop, vocabulary)
    for rows in chunks:
        d_logits_TV = buffer[: rows.stop - rows.start]
        store_d_logits(d_losses_T[rows], x_TD[rows], weight_VD, targets[rows], lse[rows], d_logits_TV, options)
        torch.mm(d_logits_TV, weight_VD, out=dx_TD[rows])
        _add_product(d_weight_VD, d_logits_TV.T, x_TD[rows], keep=rows.start > 0)
    return dx_TD, d_weight_VD.to(weight.dtype)


@linear_cross_entropy_op.register_fake
def _(x, weight, targets, *options):
    return empty_statistics(x, targets)


@linear_cross_entropy_backward_op.register_fake
def _(d_losses, x, weight, targets, lse, *options):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_linear(ctx, inputs, output) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets, output[1])


def _linear_cross_entropy_backward(ctx, d_losses: Tensor, d_lse: Tensor | None):
    gradients = linear_cross_entropy_backward_op(d_losses, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, *[None] * len(ctx.options)


linear_cross_entropy_op.register_autograd(_linear_cross_entropy_backward, setup_context=_save_linear)


@register_flop_formula(torch.ops.cegbench.linear_cross_entropy)
def linear_cross_entropy_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 per multiplication and addition of x W^T."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.cegbench.linear_cross_entropy_backward)
def linear_cross_entropy_backward_flops(d_losses_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """The logits anew, and the products for the gradients of x and the weight."""
    return 3 * linear_cross_entropy_flops(x_shape, weight_shape)


def _chunks(tokens: int) -> list[slice]:
    """Consecutive tokens whose logits are in memory together."""
    size = min(max(-(-tokens // 4), SMALLEST_CHUNK), LARGEST_CHUNK)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _empty_chunk(x: Tensor, tokens: int, vocabulary: int) -> Tensor:
    """(tokens, vocabulary), with rows that begin at multiples of 128 bytes, as kernels and cuBLAS like it."""
    return x.new_empty(tokens, -(-vocabulary // 64) * 64)[:, :vocabulary]


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """total = keep * total + a b, where a and b may have half the bits of the total."""
    if total.dtype == a.dtype or not total.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=float(keep))
    else:  # a float32 sum of the tensor cores, which addmm cannot add to a float32 total in every supported PyTorch
        product = torch.mm(a, b, out_dtype=total.dtype)
        (total.add_ if keep else total.copy_)(product)


def _linear_statistics_by_torch(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, score of the target and mean score of each token, (T,) each."""
    statistics_3T = x_TD.new_empty(3, x_TD.shape[0], dtype=statistics_dtype(x_TD))
    for rows in _chunks(x_TD.shape[0]):
        statistics_3T[:, rows] = _chunk_statistics(x_TD[rows], weight_VD, targets_T[rows], options)
    return statistics_3T.unbind()


def _chunk_statistics(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, options: LossOptions) -> Tensor:
    scores_TV = _capped_scores(functional.linear(x_TD, weight_VD), options)[0]
    target_scores_T = scores_TV.gather(1, _indices(targets_T, options))[:, 0]
    return torch.stack((scores_TV.logsumexp(1), target_scores_T, scores_TV.mean(1)))


def _store_d_logits_by_torch(
    d_losses_T: Tensor,
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    d_logits_TV: Tensor,
    options: LossOptions,
) -> None:
    torch.mm(x_TD, weight_VD.T, out=d_logits_TV)
    scores_TV, bent_TV = _capped_scores(d_logits_TV, options)
    weights_TV = scores_TV.sub_(lse_T[:, None]).exp_().mul_(1.0 + 2.0 * options.z_loss * lse_T[:, None])
    weights_TV -= options.label_smoothing / weight_VD.shape[0]
    indices_T1 = _indices(targets_T, options)
    weights_TV.scatter_add_(1, indices_T1, torch.full_like(lse_T[:, None], options.label_smoothing - 1.0))
    weights_TV *= d_losses_T.masked_fill(targets_T == options.ignore_index, 0.0)[:, None]
    if bent_TV is not None:
        weights_TV *= bent_TV.square_().neg_().add_(1.0)
    d_logits_TV.copy_(weights_TV)


def _capped_scores(logits_TV: Tensor, options: LossOptions) -> tuple[Tensor, Tensor | None]:
    """Soft-capped logits, and their tanh where there is a cap; either may take the memory of the logits."""
    scores_TV = logits_TV.to(statistics_dtype(logits_TV))
    if options.softcap is None:
        return scores_TV, None
    bent_TV = scores_TV.div_(options.softcap).tanh_()
    return bent_TV * options.softcap, bent_TV


def _indices(targets_T: Tensor, options: LossOptions) -> Tensor:
    """(T, 1) places in the vocabulary, any for ignored tokens."""
    return targets_T.masked_fill(targets_T == options.ignore_index, 0)[:, None]


def _linear_statistics_by_triton(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | float]:
    """As `_linear_statistics_by_torch`; the target's score is NaN where the target lies outside the vocabulary, and the
    mean score 0 where no loss needs it.
    """
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    size, arguments = _product_arguments(x_TD, weight_VD, options)
    log_sums = x_TD.new_empty(-(-vocabulary // size.columns), tokens, dtype=torch.float32)
    sums = torch.empty_like(log_sums) if options.label_smoothing else None
    target_scores_T = torch.full_like(targets_T, math.nan, dtype=torch.float32)
    if tokens:
        with torch.cuda.device_of(x_TD):
            linear_forward_kernel[_grid(tokens, vocabulary, size)](
                targets=targets_T,
                log_sums=log_sums,
                sums=sums,
                target_scores=target_scores_T,
                **arguments,
            )
    return log_sums.logsumexp(0), target_scores_T, 0.0 if sums is None else sums.sum(0) / vocabulary


def _store_d_logits_by_triton(
    d_losses_T: Tensor,
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    d_logits_TV: Tensor,
    options: LossOptions,
) -> None:
    size, arguments = _product_arguments(x_TD, weight_VD, options)
    with torch.cuda.device_of(x_TD):
        linear_backward_kernel[_grid(*d_logits_TV.shape, size)](
            d_losses=d_losses_T,
            targets=targets_T,
            lse=lse_T,
            d_logits=d_logits_TV,
            d_logits_strides=(0, d_logits_TV.stride(0)),
            ignore_index=options.ignore_index,
            **arguments,
            **options.share_arguments(weight_VD.shape[0]),
        )


def _grid(tokens: int, vocabulary: int, size: TileSize) -> tuple[int]:
    return (triton.cdiv(tokens, size.rows) * triton.cdiv(vocabulary, size.columns),)


def _tile_size(tma: bool, bits: int, soft_capped: bool) -> TileSize:
    if backend.interpreting():
        return SMALL
    # GeForce and its like (12.x) have TMA, but less than half the shared memory.
    return TILE_SIZES[tma and jit.target_architecture() < 120, bits, soft_capped]


def _product_arguments(x_TD: Tensor, weight_VD: Tensor, options: LossOptions) -> tuple[TileSize, dict[str, Any]]:
    """Tile size, and what the kernels take that compute tiles of x W^T."""
    x, weight = jit.with_dense_rows(x_TD)[None], jit.with_dense_rows(weight_VD)[None]
    tma = jit.tma_reads(x, weight)
    size = _tile_size(tma, x.element_size() * 8, options.softcap is not None)
    return size, {
        "x": jit.source(x, [1, size.rows, size.step], tma),
        "weight": jit.source(weight, [1, size.columns, size.step], tma),
        "x_strides": x.stride()[:2],
        "weight_strides": weight.stride()[:2],
        "T": x.shape[1],
        "V": weight.shape[1],
        "D": x.shape[2],
        "TMA": tma,
        "PRECISION": jit.precision(x),
        "BLOCK_M": size.rows,
        "BLOCK_N": size.columns,
        "BLOCK_K": size.step,
        "num_warps": size.warps,
        "num_stages": size.stages,
        **options.kernel_arguments(),
    }


@triton.jit
def linear_forward_kernel(
    x, weight, targets, log_sums, sums, target_scores, x_strides, weight_strides, T, V, D, softcap,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one tile of logits the log-sum-exp of each row and, where it is given, the sum, both (tiles, T); and the
    targets' scores (T).
    """
    row_tile, column_tile = next_tile(tl.cdiv(T, BLOCK_M), tl.cdiv(V, BLOCK_N))
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    logits_MN = logits_tile(
        x, weight, x_strides, weight_strides, row, column, T, V, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    scores_MN, factor, _ = capped(logits_MN, softcap, SOFTCAP)
    scale = factor * LN_2
    rows_M = row + tl.arange(0, BLOCK_M)
    part_M = tl.cast(column_tile, tl.int64) * T + rows_M
    if sums is not None:  # logits outside the vocabulary are 0
        tl.store(sums + part_M, tl.sum(scores_MN, 1) * scale, mask=rows_M < T)
    if column + BLOCK_N > V:
        scores_MN = tl.where((tl.arange(0, BLOCK_N) < V - column)[None, :], scores_MN, float("-inf"))
    max_M = tl.max(scores_MN, 1) * factor
    sum_M = tl.sum(tl.exp2(scores_MN * factor - max_M[:, None]), 1)
    tl.store(log_sums + part_M, (max_M + tl.log2(sum_M)) * LN_2, mask=rows_M < T)
    places_M, inside_M = target_places(targets, rows_M, column, T, V, BLOCK_N)
    is_target_MN = tl.arange(0, BLOCK_N)[None, :] == places_M[:, None]
    target_score_M = tl.sum(tl.where(is_target_MN, scores_MN, 0.0), 1) * scale
    tl.store(target_scores + rows_M, target_score_M, mask=inside_M)


@triton.jit
def linear_backward_kernel(
    d_losses, x, weight, targets, lse, d_logits, x_strides, weight_strides, d_logits_strides, T, V, D,
    ignore_index, softcap, z_loss, target_share, uniform_share,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of d_logits (T, V), from logits that are computed anew."""
    row_tile, column_tile = next_tile(tl.cdiv(T, BLOCK_M), tl.cdiv(V, BLOCK_N))
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    logits_MN = logits_tile(
        x, weight, x_strides, weight_strides, row, column, T, V, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    rows_M = row + tl.arange(0, BLOCK_M)
    counts_M = tl.load(targets + rows_M, mask=rows_M < T, other=ignore_index) != ignore_index
    lse_M = tl.load(lse + rows_M, mask=counts_M, other=0.0)
    d_losses_M = tl.load(d_losses + rows_M, mask=counts_M, other=0.0)
    places_M, _ = target_places(targets, rows_M, column, T, V, BLOCK_N)
    d_logits_MN = logit_gradients(
        logits_MN, tl.arange(0, BLOCK_N)[None, :] == places_M[:, None], lse_M, d_losses_M,
        softcap, z_loss, target_share, uniform_share, SOFTCAP,
    )  # fmt: skip
    # Into the padding too, whose width suits vector stores.
    store_block(d_logits, d_logits_strides, 0, row, column, T, d_logits_strides[1], d_logits_MN, BLOCK_M, BLOCK_N)


@triton.jit
def logits_tile(
    x, weight, x_strides, weight_strides, row, column, T, V, D, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of x W^T, zero outside it."""
    logits_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        x_MK = load_block(x, x_strides, 0, row, k, T, D, BLOCK_M, BLOCK_K, TMA)
        weight_NK = load_block(weight, weight_strides, 0, column, k, V, D, BLOCK_N, BLOCK_K, TMA)
        logits_MN = tl.dot(x_MK, weight_NK.T, logits_MN, input_precision=PRECISION)
    return logits_MN


@triton.jit
def target_places(targets, rows_M, column, T, V, BLOCK_N: tl.constexpr):
    """The targets' places in the BLOCK_N columns from `column` on, -1 for those elsewhere, and which are not."""
    targets_M = tl.load(targets + rows_M, mask=rows_M < T, other=-1)
    inside_M = (targets_M >= column) & (targets_M < tl.minimum(column + BLOCK_N, V))
    return tl.where(inside_M, targets_M - column, -1).to(tl.int32), inside_M
