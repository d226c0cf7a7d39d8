"""Rotary position embedding of queries and keys: reference, Triton kernel, operator.

Shape suffixes: R rows of a tile, each a head at a position, P channel pairs of a row, padded to a power of two.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.attention.op import _empty_heads
from kernels.jit import tl, triton

TILE = 2048  # channel pairs that a program turns; not measured yet
WARPS = 4


def rotary_embedding(
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turns pair i of every head's channels, (a, b), into (a cos - b sin, b cos + a sin), by angle i of its position.

    Runs one Triton kernel for both or PyTorch as `kernels.backend` says; the kernel takes float32, float16 and bfloat16
    and tables that need no gradient, and leaves the heads of a position side by side in memory where they are so.

    Args:
        q: (B, H, S, C), k: (B, K, S, C), any strides; C must be even.
        cosines, sines: (positions, C / 2) of the angles, float32 (any floating dtype will do, less exactly in 16 bits).
        interleaved: whether pair i is channels 2i and 2i + 1, instead of i and i + C / 2 (as in GPT-NeoX and Llama).
        positions: (B, S) integers, rows of the tables; None for 0 to S - 1. To look at the values would make a GPU
            wait, so they are not checked: the kernel turns by NaN what lies outside the tables.

    Returns:
        q and k turned, each in its shape and dtype, under autocast too.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Source: Su et al. 2021.
    """
    _check(q, k, cosines, sines, positions)
    if backend.choose("rotary_embedding", q.device, _why_not_triton(q, k, cosines, sines)) == "torch":
        return rotary_embedding_reference(q, k, cosines, sines, interleaved=interleaved, positions=positions)
    return rotate(q, k, cosines, sines, positions, interleaved, False)


def rotary_embedding_reference(
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `rotary_embedding` in plain PyTorch."""
    _check(q, k, cosines, sines, positions)
    if positions is None:
        cosines, sines = cosines[: q.shape[2]], sines[: q.shape[2]]
    else:
        rows_B1S = positions.long()[:, None]
        cosines, sines = cosines[rows_B1S], sines[rows_B1S]
    return _turn(q, cosines, sines, interleaved), _turn(k, cosines, sines, interleaved)


def _turn(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, C) turned; cosines and sines broadcast to (B, H, S, C / 2)."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        pairs = torch.stack((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        return pairs.flatten(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(x.dtype)


def _check(q: Tensor, k: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            got = tuple(tensor.shape)
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, sequence, head size), got {got}")
    batch, _, sequence, size = q.shape
    if size % 2:
        raise ValueError(f"q must have an even head size, got {size}")
    if (k.shape[0], *k.shape[2:]) != (batch, sequence, size):
        raise ValueError(f"k must have the batch, sequence and head size of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    for name, tensor in (("q", q), ("k", k), ("cosines", cosines), ("sines", sines)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if cosines.dim() != 2 or cosines.shape[1] != size // 2:
        raise ValueError(f"cosines must have the shape (positions, {size // 2}), got {tuple(cosines.shape)}")
    if sines.shape != cosines.shape:
        raise ValueError(f"sines must have the shape of cosines, {tuple(cosines.shape)}, got {tuple(sines.shape)}")
    if positions is None:
        if cosines.shape[0] < sequence:
            raise ValueError(f"cosines must have a row for each of {sequence} positions, got {tuple(cosines.shape)}")
        return
    if positions.shape != (batch, sequence):
        raise ValueError(f"positions must have the shape {(batch, sequence)}, got {tuple(positions.shape)}")
    if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
        raise ValueError(f"positions must have an integer dtype, got {positions.dtype}")
    if positions.device != q.device:
        raise ValueError(f"positions must be on the device of q, {q.device}, got {positions.device}")


def _why_not_triton(q: Tensor, k: Tensor, cosines: Tensor, sines: Tensor) -> str:
    for tensor in (q, k):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it has no kernel for {tensor.dtype}"
    if cosines.requires_grad or sines.requires_grad:
        return "its kernel gives no gradients of the tables"
    return ""


@triton.jit
def rotate_tile(
    x, out, x_strides, out_strides, cosines, sines, positions, tile, heads, S, table_rows,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turns ROWS rows of a batch of x (B, heads, S, 2 PAIRS), the heads of a position one after the other."""
    tiles = tl.cdiv(S * heads, ROWS)
    batch = tl.cast(tile // tiles, tl.int64)
    rows_R = tile % tiles * ROWS + tl.arange(0, ROWS)
    position_R = rows_R // heads
    head_R = tl.cast(rows_R % heads, tl.int64)
    valid_R = rows_R < S * heads
    pairs_P = tl.arange(0, BLOCK_P)

    sequence_R = tl.cast(position_R, tl.int64)
    x += batch * x_strides[0] + (head_R * x_strides[1] + sequence_R * x_strides[2])[:, None]
    out += batch * out_strides[0] + (head_R * out_strides[1] + sequence_R * out_strides[2])[:, None]
    if positions is not None:
        position_R = tl.load(positions + batch * S + position_R, mask=valid_R, other=0)
    angles = tl.cast(position_R, tl.int64)[:, None] * PAIRS + pairs_P[None, :]
    known = ((position_R >= 0) & (position_R < table_rows))[:, None] & (pairs_P < PAIRS)[None, :]
    cosines_RP = tl.load(cosines + angles, mask=known, other=float("nan")).to(tl.float32)
    sines_RP = tl.load(sines + angles, mask=known, other=float("nan")).to(tl.float32)
    if INVERSE:
        sines_RP = -sines_RP

    if INTERLEAVED:
        channels = tl.arange(0, 2 * BLOCK_P)[None, :]
        inside = valid_R[:, None] & (channels < 2 * PAIRS)
        x_RC = tl.load(x + channels, mask=inside, other=0.0).to(tl.float32)
        first_RP, second_RP = tl.split(tl.reshape(x_RC, (ROWS, BLOCK_P, 2)))
    else:
        inside = valid_R[:, None] & (pairs_P < PAIRS)[None, :]
        first_RP = tl.load(x + pairs_P[None, :], mask=inside, other=0.0).to(tl.float32)
        second_RP = tl.load(x + PAIRS + pairs_P[None, :], mask=inside, other=0.0).to(tl.float32)
    turned_first_RP = (first_RP * cosines_RP - second_RP * sines_RP).to(out.dtype.element_ty)
    turned_second_RP = (second_RP * cosines_RP + first_RP * sines_RP).to(out.dtype.element_ty)
    if INTERLEAVED:
        turned_RC = tl.reshape(tl.join(turned_first_RP, turned_second_RP), (ROWS, 2 * BLOCK_P))
        tl.store(out + channels, turned_RC, mask=inside)
    else:
        tl.store(out + pairs_P[None, :], turned_first_RP, mask=inside)
        tl.store(out + PAIRS + pairs_P[None, :], turned_second_RP, mask=inside)


@triton.jit
def rotary_kernel(
    q, k, q_out, k_out, q_strides, k_strides, q_out_strides, k_out_strides, cosines, sines, positions,
    batches, q_heads, k_heads, S, table_rows,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q_out and k_out: the first programs turn tiles of q, the others tiles of k."""
    program = tl.program_id(0)
    q_tiles = batches * tl.cdiv(S * q_heads, ROWS)
    if program < q_tiles:
        rotate_tile(
            q, q_out, q_strides, q_out_strides, cosines, sines, positions, program, q_heads, S, table_rows,
            PAIRS, INTERLEAVED, INVERSE, BLOCK_P, ROWS,
        )  # fmt: skip
    else:
        rotate_tile(
            k, k_out, k_strides, k_out_strides, cosines, sines, positions, program - q_tiles, k_heads, S, table_rows,
            PAIRS, INTERLEAVED, INVERSE, BLOCK_P, ROWS,
        )  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Writes q_out and k_out."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batches, _, sequence, size = q.shape
    block = triton.next_power_of_2(size // 2)
    rows = max(1, TILE // block)
    tiles = sum(batches * triton.cdiv(sequence * x.shape[1], rows) for x in (q, k))
    with torch.cuda.device_of(q):
        rotary_kernel[(tiles,)](
            q=q,
            k=k,
            q_out=q_out,
            k_out=k_out,
            q_strides=q.stride()[:3],
            k_strides=k.stride()[:3],
            q_out_strides=q_out.stride()[:3],
            k_out_strides=k_out.stride()[:3],
            cosines=cosines.contiguous(),
            sines=sines.contiguous(),
            positions=None if positions is None else positions.contiguous(),
            batches=batches,
            q_heads=q.shape[1],
            k_heads=k.shape[1],
            S=sequence,
            table_rows=cosines.shape[0],
            PAIRS=size // 2,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            BLOCK_P=block,
            ROWS=rows,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


@torch.library.custom_op("cegbench::rotate", mutates_args=())
def rotate(
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k turned by the Triton kernel, `inverse` by the angles' opposites, which is the gradient."""
    q_out, k_out = _empty_results(q, k)
    if q.numel() or k.numel():
        launch(q, k, cosines, sines, positions, q_out, k_out, interleaved, inverse)
    return q_out, k_out


@rotate.register_fake
def _(q, k, cosines, sines, positions, interleaved, inverse):
    return _empty_results(q, k)


def _empty_results(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_heads(q, q.shape[3]), _empty_heads(k, k.shape[3])


def _setup_context(ctx, inputs, output) -> None:
    _, _, cosines, sines, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cosines, sines, positions)


def _backward(ctx, d_q: Tensor, d_k: Tensor):
    gradients = rotate(d_q, d_k, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return *gradients, None, None, None, None, None


rotate.register_autograd(_backward, setup_context=_setup_context)
