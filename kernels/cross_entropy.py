"""Cross-entropy of logits, and of a linear layer whose logits are never in memory all at once.

With s the logits after the soft cap and y the target, the loss of a token is
    lse - (1 - label_smoothing) s_y - label_smoothing mean(s) + z_loss lse^2,  lse = log(sum(exp(s))).

The linear layer's forward kernel reduces each tile of logits where it was multiplied (Wijmans et al. 2024, Cut
Cross-Entropy). Its backward pass goes through the tokens chunk by chunk (Hsu et al. 2024, Liger Kernel): a kernel
computes the logits anew and stores their gradient, and two matrix products take that to the gradients of x and the
weight, the latter summed in float32.

Shape suffixes: T tokens, D width, V vocabulary; in kernels M tokens of a tile, N its part of the vocabulary, K the part
of the width that a step sums over.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, gemm, jit
from kernels.gemm import TileSize, load_block, next_tile, store_block
from kernels.jit import LOG2_E, LOWEST, tanh, tl, triton

LN_2 = tl.constexpr(math.log(2.0))
# Neither these nor the tile sizes below are measured yet.
LARGEST_BLOCK = 4096
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
    _check_input("logits", logits, targets)
    return _losses_with_logits(logits, targets, options)


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
    return _losses_with_logits(functional.linear(x, weight), targets, options)


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
    _check_input("logits", logits, targets)
    unsupported = "" if logits.dtype in gemm.DTYPES else f"it has no kernel for {logits.dtype}"
    if backend.choose("cross_entropy", logits.device, unsupported) == "torch":
        return _losses_with_logits(logits, targets, options)
    # With two dimensions of tokens, a view such as logits[:, :-1] needs no copy.
    shape = (math.prod(targets.shape[:-1]), targets.shape[-1]) if targets.dim() else (1, 1)
    targets_2d = targets.reshape(shape).to(torch.int64)
    losses, _ = cross_entropy_op(logits.reshape(*shape, logits.shape[-1]), targets_2d, *options.values())
    return losses.view(targets.shape)


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


def _check_input(name: str, tensor: Tensor, targets: Tensor) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or not tensor.dtype.is_floating_point:
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} must have a last dimension and a floating dtype, got {shape} {tensor.dtype}")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise ValueError(f"targets must have an integer dtype, got {targets.dtype}")
    if targets.shape != tensor.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(tensor.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.device != tensor.device:
        raise ValueError(f"targets must be on the device of {name}, {tensor.device}, got {targets.device}")


def _check_linear(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    _check_input("x", x, targets)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have the shape (vocabulary, {x.shape[-1]}), got {tuple(weight.shape)}")
    x, cast_weight = gemm.autocast_operands(x, weight[:0])
    if cast_weight.dtype != x.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")


def _losses_with_logits(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    scores_TV, targets_T = logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1).to(torch.int64)
    scores_TV = scores_TV.to(_statistics_dtype(logits))
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


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _empty_statistics(like: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _statistics_dtype(like)
    return like.new_empty(targets.shape, dtype=dtype), like.new_empty(targets.shape, dtype=dtype)


# The op on logits, which only Triton implements: elsewhere autograd and torch.compile do as well.


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
    losses, lse = _empty_statistics(logits, targets)
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
    return _empty_statistics(logits, targets)


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


# The op on a linear layer.


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
    dx_TD, d_weight_VD = x.new_empty(x.shape), x.new_empty(weight.shape, dtype=_statistics_dtype(x))
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
    return _empty_statistics(x, targets)


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
    statistics_3T = x_TD.new_empty(3, x_TD.shape[0], dtype=_statistics_dtype(x_TD))
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
    scores_TV = logits_TV.to(_statistics_dtype(logits_TV))
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


def _tile_size(tma: bool, bits: int, capped: bool) -> TileSize:
    if backend.interpreting():
        return SMALL
    # GeForce and its like (12.x) have TMA, but less than half the shared memory.
    return TILE_SIZES[tma and jit.target_architecture() < 120, bits, capped]


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


# Kernels.


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
