"""Prepares and starts the attention kernels: grid, tile sizes, and tensor descriptors where the hardware has TMA."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.dropout import threshold
from kernels.attention.fused.backward import backward_delta_kernel, backward_key_kernel, backward_query_kernel
from kernels.attention.fused.forward import forward_kernel
from kernels.attention.fused.tile_sizes import SMALL, TileSize, tile_size
from kernels.attention.options import AttentionOptions
from kernels.backend import interpreting

CACHE_BYTES = 32 * 2**20  # keys and values of the heads that run together, which the L2 cache (50 MB on an H100) keeps
DELTA_ROWS = 64


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: AttentionOptions) -> None:
    """Writes out (B, H, S, E) and lse (B, H, S), the log-sum-exp of each row of scores in base 2."""
    q, k, v = map(with_dense_rows, (q, k, v))
    size, tma = choose_tile("forward", q, v, options), tma_reads(q, k, v)
    with on_device_of(q):
        forward_kernel[grid(q, size.queries, q.shape[1])](
            q=source(q, size.queries, tma),
            k=source(k, size.keys, tma),
            v=source(v, size.keys, tma),
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
    with on_device_of(q):
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
        q=source(q, size.queries, tma),
        k=source(k, size.keys, tma),
        v=source(v, size.keys, tma),
        d_out=source(d_out, size.queries, tma),
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
        q=source(q, size.queries, tma),
        k=source(k, size.keys, tma),
        v=source(v, size.keys, tma),
        d_out=source(d_out, size.queries, tma),
        lse=lse,
        delta=delta,
        dq=source(dq_sums, size.queries, tma) if add_dq else None,
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
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
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


def target_architecture() -> int:
    """Such as 90, of the device that Triton compiles for; 0 in the interpreter."""
    return 0 if interpreting() else int(triton.runtime.driver.active.get_current_target().arch)


def grid(q: Tensor, rows: int, heads: int) -> tuple[int]:
    return (q.shape[0] * heads * triton.cdiv(q.shape[2], rows),)


def strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()}


def padded(size: int) -> int:
    """A head size as tiles have it: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def source(tensor: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel reads tiles of `rows` rows from."""
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, padded(tensor.shape[3])])


def tma_reads(*tensors: Tensor) -> bool:
    """Whether there is TMA and it can read these: rows of consecutive elements, all else a multiple of 16 bytes."""
    if not interpreting() and target_architecture() < 90:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[3] * tensor.element_size() >= 16
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but that of the head size, which must be 1."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
