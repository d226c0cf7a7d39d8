"""Products of tokens with the weight of the expert that each belongs to, all experts in one launch.

Suffixes: M tokens of a tile, N of its columns, K of what a step sums over. `kernels/router.py` sorts tokens by expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, gemm, jit
from kernels.gemm import load_block, next_tile, store_block
from kernels.jit import tl, triton


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y_t = x_t W_e, where e is the expert of token t.

    Nothing waits for the GPU: the sizes of the experts are read there. In PyTorch that holds for bfloat16 on compute
    capability 9.0 and newer (torch.nn.functional.grouped_mm); elsewhere a loop over experts reads them first.
    Sums are in float32, and over tokens in their order.

    Args:
        x: (tokens, D), sorted by expert, in any floating dtype; float32, float16 and bfloat16 have a Triton kernel.
        weight: (experts, D, F) in x's dtype; its transpose, the view of an (experts, F, D), is as fast.
        offsets: (experts,) int32, where each expert's tokens end. They do not fall, and the last is the number of
            tokens; that is not checked, because it would wait for the GPU.

    Returns:
        (tokens, F).

    Raises:
        ValueError: a shape, dtype or device does not fit, or Triton was demanded and cannot run.

    Source: Gale et al. 2022 (MegaBlocks), for why experts of any size belong in one launch.
    """
    x, weight = gemm.autocast_operands(x, weight)
    _check(x, weight, offsets)
    return grouped_product(x, weight, offsets, backend.choose("grouped_gemm", x.device, gemm.why_not_triton(x)))


def grouped_gemm_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A loop over experts."""
    groups = x.split(_sizes(offsets))
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ValueError(f"x must have the shape (tokens, width) and a floating dtype, got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 3 or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have the shape (experts, {x.shape[1]}, features), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if offsets.shape != weight.shape[:1] or offsets.dtype != torch.int32:
        expected = f"({weight.shape[0]},) torch.int32"
        raise ValueError(f"offsets must be {expected}, an end per expert, got {tuple(offsets.shape)} {offsets.dtype}")
    for name, tensor in (("weight", weight), ("offsets", offsets)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


@torch.library.custom_op("cegbench::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, implementation: str) -> Tensor:
    """(tokens, F) of x (tokens, D) and weight (experts, D, F)."""
    return (_triton_product if implementation == "triton" else _torch_product)(x, weight, offsets)


@torch.library.custom_op("cegbench::grouped_outer_product", mutates_args=())
def grouped_outer_product(x: Tensor, d_out: Tensor, offsets: Tensor, transposed: bool, implementation: str) -> Tensor:
    """(experts, D, F), x^T d_out of each expert's rows of x (tokens, D) and d_out (tokens, F). `transposed` lays it out
    in memory as (experts, F, D).
    """
    outer_product = _triton_outer_product if implementation == "triton" else _torch_outer_product
    return outer_product(d_out, x, offsets).mT if transposed else outer_product(x, d_out, offsets)


@grouped_product.register_fake
def _(x, weight, offsets, implementation):
    return _empty_product(x, weight)


@grouped_outer_product.register_fake
def _(x, d_out, offsets, transposed, implementation):
    return _empty_outer_product(d_out, x, offsets).mT if transposed else _empty_outer_product(x, d_out, offsets)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out: Tensor):
    x, weight, offsets = ctx.saved_tensors
    d_x = d_weight = None
    if ctx.needs_input_grad[0]:
        d_x = grouped_product(d_out, weight.mT, offsets, ctx.implementation)
    if ctx.needs_input_grad[1]:
        transposed = weight.stride(1) == 1 and weight.stride(2) != 1
        d_weight = grouped_outer_product(x, d_out, offsets, transposed, ctx.implementation)
    return d_x, d_weight, None, None


grouped_product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.cegbench.grouped_product)
def grouped_product_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.cegbench.grouped_outer_product)
def grouped_outer_product_flops(x_shape, d_out_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * d_out_shape[1]


def _empty_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _empty_outer_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _torch_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if _grouped_mm_takes(x, weight):
        return functional.grouped_mm(x.contiguous(), _with_dense_matrices(weight), offs=offsets)
    return grouped_gemm_reference(x, weight, offsets)


def _torch_outer_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if _grouped_mm_takes(left, right):
        return functional.grouped_mm(left.contiguous().mT, right.contiguous(), offs=offsets)
    groups = zip(left.split(_sizes(offsets)), right.split(_sizes(offsets)), strict=True)
    return torch.stack([rows.mT @ columns for rows, columns in groups])


def _grouped_mm_takes(*tensors: Tensor) -> bool:
    """Whether PyTorch has one kernel for all groups: Hopper or newer, bfloat16, rows of a multiple of 16 bytes."""
    return all(
        tensor.is_cuda
        and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
        and tensor.dtype == torch.bfloat16
        and tensor.shape[-1] % 8 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _sizes(offsets: Tensor) -> list[int]:
    return offsets.diff(prepend=offsets.new_zeros(1)).tolist()


def _with_dense_matrices(weight: Tensor) -> Tensor:
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


def _triton_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = _empty_product(x, weight)
    if out.numel() == 0:
        return out
    (tokens, width), (experts, _, features) = x.shape, weight.shape
    x = jit.with_dense_rows(x).unsqueeze(0)
    weight = _with_dense_matrices(weight)
    transposed = not weight.is_contiguous()
    weight = weight.mT if transposed else weight
    with torch.cuda.device_of(x):
        size, tma = gemm.tile_size(x), jit.tma_reads(x, weight)
        weight_tile = (size.columns, size.step) if transposed else (size.step, size.columns)
        row_tiles = triton.cdiv(tokens, size.rows) + experts - 1  # no split of the tokens needs more
        grouped_product_kernel[(row_tiles * triton.cdiv(features, size.columns),)](
            x=jit.source(x, [1, size.rows, size.step], tma),
            weight=jit.source(weight, [1, *weight_tile], tma),
            offsets=offsets.contiguous(),
            out=out,
            x_strides=x.stride()[:2],
            weight_strides=weight.stride()[:2],
            row_tiles=row_tiles,
            T=tokens,
            D=width,
            F=features,
            EXPERTS=experts,
            BLOCK_E=triton.next_power_of_2(experts),
            TRANSPOSED=transposed,
            **_tile_arguments(x, size, tma),
        )
    return out


def _triton_outer_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out = _empty_outer_product(left, right, offsets)
    if out.numel() == 0:
        return out
    experts, width, features = out.shape
    left, right = (jit.with_dense_rows(tensor).unsqueeze(0) for tensor in (left, right))
    with torch.cuda.device_of(left):
        size, tma = gemm.tile_size(left), left.shape[1] > 0 and jit.tma_reads(left, right)
        tiles = triton.cdiv(width, size.rows) * triton.cdiv(features, size.columns)
        grouped_outer_product_kernel[(tiles, experts)](
            left=jit.source(left, [1, size.step, size.rows], tma),
            right=jit.source(right, [1, size.step, size.columns], tma),
            offsets=offsets.contiguous(),
            out=out,
            left_strides=left.stride()[:2],
            right_strides=right.stride()[:2],
            T=left.shape[1],
            D=width,
            F=features,
            **_tile_arguments(left, size, tma),
        )
    return out


def _tile_arguments(x: Tensor, size: gemm.TileSize, tma: bool) -> dict[str, Any]:
    return {
        "TMA": tma,
        "PRECISION": jit.precision(x),
        "BLOCK_M": size.rows,
        "BLOCK_N": size.columns,
        "BLOCK_K": size.step,
        "num_warps": size.warps,
        "num_stages": size.stages,
        "enable_fp_fusion": True,
    }


@triton.jit
def expert_rows(offsets, expert):
    """The first token of an expert, and the first behind its last."""
    return tl.load(offsets + expert - 1, mask=expert > 0, other=0), tl.load(offsets + expert)


@triton.jit
def grouped_product_kernel(
    x, weight, offsets, out, x_strides, weight_strides, row_tiles, T, D, F,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (T, F) of x (T, D) and weight (experts, D, F) or, TRANSPOSED, (experts, F, D). A tile holds rows of one
    expert; `row_tiles` is an upper bound, and the programs beyond the last tile do nothing.
    """
    tile_row, tile_column = next_tile(row_tiles, tl.cdiv(F, BLOCK_N))
    column = tile_column * BLOCK_N
    experts_E = tl.arange(0, BLOCK_E)
    begins_E = tl.load(offsets + experts_E - 1, mask=(experts_E > 0) & (experts_E < EXPERTS), other=0)
    ends_E = tl.load(offsets + experts_E, mask=experts_E < EXPERTS, other=0)
    tiles_E = tl.where(experts_E < EXPERTS, tl.cdiv(ends_E - begins_E, BLOCK_M), 0)
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile_row).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    begin, end = expert_rows(offsets, expert)
    row = begin + (tile_row - tl.sum(tl.where(experts_E < expert, tiles_E, 0), 0)) * BLOCK_M

    out_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK_K):
        x_MK = load_block(x, x_strides, 0, row, start, T, D, BLOCK_M, BLOCK_K, TMA)
        if TRANSPOSED:
            weight_KN = load_block(weight, weight_strides, expert, column, start, F, D, BLOCK_N, BLOCK_K, TMA).T
        else:
            weight_KN = load_block(weight, weight_strides, expert, start, column, D, F, BLOCK_K, BLOCK_N, TMA)
        out_MN = tl.dot(x_MK, weight_KN, out_MN, input_precision=PRECISION)
    store_block(out, (0, F), 0, row, column, end, F, out_MN, BLOCK_M, BLOCK_N)


@triton.jit
def grouped_outer_product_kernel(
    left, right, offsets, out, left_strides, right_strides, T, D, F, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (experts, D, F), left^T right over the tokens of each expert, of left (T, D) and right (T, F)."""
    tile_row, tile_column = next_tile(tl.cdiv(D, BLOCK_M), tl.cdiv(F, BLOCK_N))
    row = tile_row * BLOCK_M
    column = tile_column * BLOCK_N
    expert = tl.program_id(1)
    begin, end = expert_rows(offsets, expert)
    tail = begin + (end - begin) // BLOCK_K * BLOCK_K

    out_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for token in tl.range(begin, tail, BLOCK_K):
        left_KM = load_block(left, left_strides, 0, token, row, T, D, BLOCK_K, BLOCK_M, TMA)
        right_KN = load_block(right, right_strides, 0, token, column, T, F, BLOCK_K, BLOCK_N, TMA)
        out_MN = tl.dot(left_KM.T, right_KN, out_MN, input_precision=PRECISION)
    if tail < end:
        inside_K = (tail + tl.arange(0, BLOCK_K) < end)[:, None]
        left_KM = load_block(left, left_strides, 0, tail, row, T, D, BLOCK_K, BLOCK_M, TMA)
        right_KN = load_block(right, right_strides, 0, tail, column, T, F, BLOCK_K, BLOCK_N, TMA)
        left_KM = tl.where(inside_K, left_KM, 0.0)
        right_KN = tl.where(inside_K, right_KN, 0.0)  # both, because 0 times the next expert's infinity is NaN
        out_MN = tl.dot(left_KM.T, right_KN, out_MN, input_precision=PRECISION)
    store_block(out, (tl.cast(D, tl.int64) * F, F), expert, row, column, D, F, out_MN, BLOCK_M, BLOCK_N)
