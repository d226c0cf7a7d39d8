"""Prepares and starts the attention kernels: grid, tile sizes, and tensor descriptors where the hardware has TMA."""

from typing import Any

import torch
from torch import Tensor

from kernels.attention.dropout import threshold
from kernels.attention.fused.backward import backward_delta_kernel, backward_key_kernel, backward_query_kernel
from kernels.attention.fused.forward import forward_kernel
from kernels.attention.fused.tile_sizes import SMALL, TileSize, tile_size
from kernels.attention.options import AttentionOptions
from kernels.backend import interpreting
from kernels.jit import precision, source, target_architecture, tma_reads, triton, with_dense_rows

CACHE_BYTES = 32 * 2**20  # keys and values of the heads that run together, which the L2 cache (50 MB on an H100) keeps
DELTA_ROWS = 64


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: AttentionOptions) -> None:
    """Writes out (B, H, S, E) and lse (B, H, S), the log-sum-exp of each row of scores in base 2."""
    q, k, v = map(with_dense_rows, (q, k, v))
    size, tma = choose_tile("forward", q, v, options), tma_reads(q, k, v)
    with torch.cuda.device_of(q):
        forward_kernel[grid(q, size.queries, q.shape[1])](
            q=tiles_of(q, size.queries, tma),
            k=tiles_of(k, size.keys, tma),
            v=tiles_of(v, size.keys, tma),
            out=out,
            lse=lse,
            **strides(q=q, k=k, v=v, out=out),
            **shared_arguments(q, k, v, options, size, tma, heads_of_a_program=1),
        )


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    options: AttentionOptions,
) -> None:
    """Writes dq, dk and dv, the gradients of q, k and v."""
    q, k, v, d_out = map(with_dense_rows, (q, k, v, d_out))
    delta, tma = torch.empty_like(lse), tma_reads(q, k, v, d_out)
    with torch.cuda.device_of(q):
        if options.deterministic:
            backward_query(d_out, q, k, v, out, lse, delta, dq, options, tma)
            backward_key(d_out, q, k, v, lse, delta, None, dk, dv, options, tma)
        else:
            sums = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device)
            backward_delta(d_out, out, delta)
            # The interpreter knows no reduce-add to a descriptor.
            backward_key(d_out, q, k, v, lse, delta, sums, dk, dv, options, tma and not interpreting())
            dq.copy_(sums)


def backward_query(d_out, q, k, v, out, lse, delta, dq, options: AttentionOptions, tma: bool) -> None:
    """Writes dq, and delta for `backward_key`."""
    size = choose_tile("backward_query", q, v, options)
    backward_query_kernel[grid(q, size.queries, q.shape[1])](
        q=tiles_of(q, size.queries, tma),
        k=tiles_of(k, size.keys, tma),
        v=tiles_of(v, size.keys, tma),
        d_out=tiles_of(d_out, size.queries, tma),
        out=out,
        lse=lse,
        delta=delta,
        dq=dq,
        **strides(q=q, k=k, v=v, out=out, d_out=d_out, dq=dq),
        **shared_arguments(q, k, v, options, size, tma, heads_of_a_program=1),
    )


def backward_delta(d_out: Tensor, out: Tensor, delta: Tensor) -> None:
    """Writes delta where `backward_query` does not run."""
    heads, length, size = out.shape[1:]
    backward_delta_kernel[grid(out, DELTA_ROWS, heads)](
        out=out,
        d_out=d_out,
        delta=delta,
        **strides(out=out, d_out=d_out),
        heads=heads,
        S=length,
        E=size,
        BLOCK_E=padded(size),
        BLOCK_M=DELTA_ROWS,
        enable_fp_fusion=True,
    )


def backward_key(d_out, q, k, v, lse, delta, dq_sums, dk, dv, options: AttentionOptions, tma: bool) -> None:
    """Writes dk and dv, and adds to dq_sums (B, H, S, D) float32 where it is given."""
    add_dq = dq_sums is not None
    size = choose_tile("backward_key_adding_dq" if add_dq else "backward_key", q, v, options)
    backward_key_kernel[grid(q, size.keys, k.shape[1])](
        q=tiles_of(q, size.queries, tma),
        k=tiles_of(k, size.keys, tma),
        v=tiles_of(v, size.keys, tma),
        d_out=tiles_of(d_out, size.queries, tma),
        lse=lse,
        delta=delta,
        dq=tiles_of(dq_sums, size.queries, tma) if add_dq else None,
        dk=dk,
        dv=dv,
        **strides(q=q, k=k, v=v, d_out=d_out, dq=dq_sums if add_dq else q, dk=dk, dv=dv),
        **shared_arguments(q, k, v, options, size, tma, heads_of_a_program=q.shape[1] // k.shape[1]),
        ADD_DQ=add_dq,
    )


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, size: TileSize, tma: bool, *, heads_of_a_program: int
) -> dict[str, Any]:
    """What every kernel but delta's takes."""
    batch, heads, length, head_size = q.shape
    value_size = v.shape[3]
    group = heads // k.shape[1]
    bytes_of_a_key_head = length * (head_size + value_size) * k.element_size()
    heads_at_once = group * max(1, CACHE_BYTES // bytes_of_a_key_head)
    return {
        "batches": batch,
        "heads": heads,
        "S": length,
        "heads_at_once": heads_at_once // heads_of_a_program,
        "scale": options.scale,
        "softcap": options.softcap or 0.0,
        "mask": (options.starts, options.ends, options.window or 0),
        "dropout": (options.seed, threshold(options.dropout_p), 1.0 / (1.0 - options.dropout_p)),
        "GROUP": group,
        "D": head_size,
        "E": value_size,
        "BLOCK_D": padded(head_size),
        "BLOCK_E": padded(value_size),
        "CAUSAL": options.causal,
        "WINDOW": options.window is not None,
        "DOCUMENTS": options.starts is not None,
        "SOFTCAP": options.softcap is not None,
        "DROPOUT": options.dropout_p > 0.0,
        "TMA": tma,
        "PRECISION": precision(q),
        "BLOCK_M": size.queries,
        "BLOCK_N": size.keys,
        "num_warps": size.warps,
        "num_stages": size.stages,
        "enable_fp_fusion": True,
    }


def choose_tile(kernel: str, q: Tensor, v: Tensor, options: AttentionOptions) -> TileSize:
    if interpreting():
        return SMALL
    head_size = padded(max(q.shape[3], v.shape[3]))
    return tile_size(kernel, target_architecture(), head_size, q.element_size() * 8, options.causal)


def grid(q: Tensor, rows: int, heads: int) -> tuple[int]:
    return (q.shape[0] * heads * triton.cdiv(q.shape[2], rows),)


def strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()}


def padded(size: int) -> int:
    """A head size as tiles have it: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def tiles_of(tensor: Tensor, rows: int, tma: bool) -> Any:
    """What a kernel reads tiles of `rows` rows from."""
    return source(tensor, [1, 1, rows, padded(tensor.shape[3])], tma)
