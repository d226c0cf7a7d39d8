"""The first half of an MLP, a linear layer and its activation, as one matrix product with an epilogue.

The backward pass computes the linear layer anew instead of keeping its result. Suffixes: M tokens of a tile, N of its
features, K of the width that a step sums over.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, gemm, jit
from kernels.gemm import load_block, next_tile, store_block
from kernels.jit import LOG2_E, tl, triton

MEASURED = Path(__file__).with_name("mlp_measured.json")
WORTHWHILE = 1.05
SQRT_HALF = tl.constexpr(0.7071067811865476)


def linear_relu_squared(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x W^T + b)^2.

    As `linear_gelu` in all else. Source: So et al. 2021 (Primer).
    """
    return _apply("relu_squared", x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x W^T + b), exact and not its tanh approximation.

    Under the backend `auto` the Triton kernel runs only where `mlp_measured.json` says that it was measured faster than
    torch.compile by 5 % or more: on a device of that name, at that width, in 16 bits.

    Args:
        x: (..., D) in any floating dtype, which the others share; float32, float16 and bfloat16 have a Triton kernel.
        weight: (F, D).
        bias: (F,).

    Returns:
        (..., F).

    Raises:
        ValueError: a shape, dtype or device does not fit, or Triton was demanded and cannot run.

    Source: Hendrycks and Gimpel 2016.
    """
    return _apply("gelu", x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(x W_gate^T + b_gate) * (x W_up^T + b_up), where the weight (2 F, D) holds W_gate and below it W_up, and the
    bias (2 F,) likewise.

    As `linear_gelu` in all else. Source: Shazeer 2020.
    """
    return _apply("swiglu", x, weight, bias)


def linear_relu_squared_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.relu(functional.linear(x, weight, bias)).square()


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(functional.linear(x, weight, bias))


def linear_swiglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, up = functional.linear(x, weight, bias).chunk(2, -1)
    return functional.silu(gate) * up


REFERENCES = {
    "relu_squared": linear_relu_squared_reference,
    "gelu": linear_gelu_reference,
    "swiglu": linear_swiglu_reference,
}


def _apply(activation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight, bias = gemm.autocast_operands(x, weight, bias)
    _check(activation, x, weight, bias)
    if _choose(f"linear_{activation}", x) == "torch":
        return REFERENCES[activation](x, weight, bias)
    out = linear_activation(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight, bias, activation)
    return out.view(*x.shape[:-1], out.shape[-1])


def _check(activation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x must have dimensions (..., width) and a floating dtype, got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have the shape (features, {x.shape[-1]}), got {tuple(weight.shape)}")
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"weight must have an even number of rows, gate and up, got {weight.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device},"
                f" got {tensor.dtype} on {tensor.device}"
            )


def _choose(op: str, x: Tensor) -> str:
    if backend.name() == "auto" and not _is_measured_faster(op, x):
        return "torch"
    return backend.choose(op, x.device, gemm.why_not_triton(x))


def _is_measured_faster(op: str, x: Tensor) -> bool:
    if x.device.type != "cuda" or x.element_size() != 2:
        return False
    return _measured_ratio(op, x.device.index, x.shape[-1]) >= WORTHWHILE


@torch.compiler.assume_constant_result
def _measured_ratio(op: str, device_index: int | None, width: int) -> float:
    return _read_ratio(op, device_index, width)


@functools.cache
def _read_ratio(op: str, device_index: int | None, width: int) -> float:
    """Time of torch.compile over that of the kernel, forward and backward; 0 where it is not measured."""
    rows = json.loads(MEASURED.read_text()).get(torch.cuda.get_device_name(device_index), {})
    return rows.get(op, {}).get(str(width), 0.0)


@torch.library.custom_op("cegbench::linear_activation", mutates_args=())
def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """(T, F) of x (T, D), by the Triton kernel; `activation` is one of REFERENCES."""
    out = _empty_out(x, weight, activation)
    _launch(x, weight, bias, None, out, activation)
    return out


@torch.library.custom_op("cegbench::linear_activation_backward", mutates_args=())
def linear_activation_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """(T, rows of the weight): the gradient of x W^T + b, which the kernel computes anew."""
    d_hidden = _empty_hidden(x, weight)
    _launch(x, weight, bias, d_out, d_hidden, activation)
    return d_hidden


@linear_activation.register_fake
def _(x, weight, bias, activation):
    return _empty_out(x, weight, activation)


@linear_activation_backward.register_fake
def _(d_out, x, weight, bias, activation):
    return _empty_hidden(x, weight)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out: Tensor):
    x, weight, bias = ctx.saved_tensors
    d_hidden = linear_activation_backward(d_out, x, weight, bias, ctx.activation)
    d_x = d_hidden @ weight if ctx.needs_input_grad[0] else None
    d_weight = d_hidden.mT @ x if ctx.needs_input_grad[1] else None
    return d_x, d_weight, d_hidden.sum(0) if ctx.needs_input_grad[2] else None, None


linear_activation.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.cegbench.linear_activation)
def linear_activation_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.cegbench.linear_activation_backward)
def linear_activation_backward_flops(d_out_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """The linear layer anew; PyTorch multiplies, and counts, the rest."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def _empty_out(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if activation == "swiglu" else 1))


def _empty_hidden(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, d_out: Tensor | None, out: Tensor, activation: str) -> None:
    """Writes the activation into `out` or, where `d_out` is given, the gradient of what goes into it."""
    if out.numel() == 0:
        return
    gated = activation == "swiglu"
    tokens, features = x.shape[0], weight.shape[0] // (2 if gated else 1)
    x, weight = (jit.with_dense_rows(tensor).unsqueeze(0) for tensor in (x, weight))
    d_out = d_out if d_out is None else jit.with_dense_rows(d_out)
    with torch.cuda.device_of(x):
        size, tma = gemm.tile_size(x), jit.tma_reads(x, weight)
        columns = size.columns // 2 if gated else size.columns  # gate and up share the registers of one tile
        linear_activation_kernel[(triton.cdiv(tokens, size.rows) * triton.cdiv(features, columns),)](
            x=jit.source(x, [1, size.rows, size.step], tma),
            weight=jit.source(weight, [1, columns, size.step], tma),
            bias=bias if bias is None else bias.contiguous(),
            d_out=d_out,
            out=out,
            x_strides=x.stride()[:2],
            weight_strides=weight.stride()[:2],
            d_out_stride=0 if d_out is None else d_out.stride(0),
            T=tokens,
            F=features,
            D=x.shape[2],
            ACTIVATION=activation,
            TMA=tma,
            PRECISION=jit.precision(x),
            BLOCK_M=size.rows,
            BLOCK_N=columns,
            BLOCK_K=size.step,
            num_warps=size.warps,
            num_stages=size.stages,
            enable_fp_fusion=True,
        )


@triton.jit
def linear_activation_kernel(
    x, weight, bias, d_out, out, x_strides, weight_strides, d_out_stride, T, F, D,
    ACTIVATION: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (T, F), the activation of x W^T + b or, given d_out (T, F), the gradient of the latter, (T, F) or for swiglu
    (T, 2 F), gate and up side by side.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    ROWS: tl.constexpr = 2 if GATED else 1
    tile_row, tile_column = next_tile(tl.cdiv(T, BLOCK_M), tl.cdiv(F, BLOCK_N))
    row = tile_row * BLOCK_M
    column = tile_column * BLOCK_N

    hidden_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK_K):
        x_MK = load_block(x, x_strides, 0, row, start, T, D, BLOCK_M, BLOCK_K, TMA)
        weight_NK = load_block(weight, weight_strides, 0, column, start, ROWS * F, D, BLOCK_N, BLOCK_K, TMA)
        hidden_MN = tl.dot(x_MK, weight_NK.T, hidden_MN, input_precision=PRECISION)
        if GATED:
            weight_NK = load_block(weight, weight_strides, 0, column + F, start, ROWS * F, D, BLOCK_N, BLOCK_K, TMA)
            up_MN = tl.dot(x_MK, weight_NK.T, up_MN, input_precision=PRECISION)

    if bias is not None:
        columns_N = column + tl.arange(0, BLOCK_N)
        hidden_MN += tl.load(bias + columns_N, mask=columns_N < F, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_MN += tl.load(bias + F + columns_N, mask=columns_N < F, other=0.0).to(tl.float32)[None, :]
    if d_out is None:
        result_MN = activate(hidden_MN, up_MN, ACTIVATION)
        store_block(out, (0, F), 0, row, column, T, F, result_MN, BLOCK_M, BLOCK_N)
    else:
        d_MN = load_block(d_out, (0, d_out_stride), 0, row, column, T, F, BLOCK_M, BLOCK_N, False).to(tl.float32)
        if GATED:
            gate = sigmoid(hidden_MN)
            d_up_MN = d_MN * hidden_MN * gate
            store_block(out + F, (0, ROWS * F), 0, row, column, T, F, d_up_MN, BLOCK_M, BLOCK_N)
            d_MN = d_MN * up_MN * gate * (1.0 + hidden_MN * (1.0 - gate))
        else:
            d_MN = d_MN * slope(hidden_MN, ACTIVATION)
        store_block(out, (0, ROWS * F), 0, row, column, T, F, d_MN, BLOCK_M, BLOCK_N)


@triton.jit
def activate(hidden, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu_squared":
        positive = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
    elif ACTIVATION == "gelu":
        half = 0.5 * hidden
        return half + half * tl.math.erf(hidden * SQRT_HALF)
    else:
        return hidden * sigmoid(hidden) * up


@triton.jit
def slope(hidden, ACTIVATION: tl.constexpr):
    """The activation's derivative, for those without a gate."""
    if ACTIVATION == "relu_squared":
        return 2.0 * tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        density = 0.3989422804014327 * tl.exp2(hidden * hidden * (-0.5 * LOG2_E))
        return 0.5 + 0.5 * tl.math.erf(hidden * SQRT_HALF) + hidden * density


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))
