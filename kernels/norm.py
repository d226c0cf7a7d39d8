"""RMS and layer normalisation of rows, each with a residual added before it: reference, Triton kernels, operators.

The kernels differ from what torch.compile makes in the backward pass: a fixed number of programs strides over the rows
and keeps its share of the weights' gradients in registers, so that every value is read once.

Shape suffixes: R rows of a tile, D the width of a row, padded to a power of two.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from kernels import backend
from kernels.jit import tl, triton

LARGEST_WIDTH = 8192
TILE = 4096  # elements that a program holds at a time, where a row has no more; not measured yet
ELEMENTS_PER_THREAD = 16  # two loads of 16 bytes in bfloat16; not measured yet
PROGRAMS_PER_MULTIPROCESSOR = 2
PROGRAMS_ON_CPU = 4  # in the interpreter


def rms_norm(x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, epsilon: float = 1e-5):
    """h / sqrt(mean(h^2) + epsilon) * weight over the last dimension, where h = x + residual.

    Runs the Triton kernels or PyTorch as `kernels.backend` says; there are kernels for rows of up to 8192 values in
    float32, float16 and bfloat16. Gradients are the same bits every time.

    Args:
        x: (..., D), a floating dtype. Statistics are taken in float32 (float64 for float64).
        weight: (D,), any floating dtype; None for ones.
        residual: of x's shape, any floating dtype.

    Returns:
        (..., D) in the dtype of x, under autocast too; with a residual also h, in the dtype of x + residual.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Source: Zhang and Sennrich 2019.
    """
    _check(x, weight, None, residual, epsilon)
    if backend.choose("rms_norm", x.device, _why_not_triton(x, residual)) == "torch":
        return _rms_norm(x, weight, residual, epsilon)
    y, h, _ = norm(x, weight, None, residual, epsilon, False)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, epsilon: float = 1e-5
):
    """(h - mean(h)) / sqrt(variance(h) + epsilon) * weight + bias over the last dimension, where h = x + residual.

    Arguments, results and errors are those of `rms_norm`; bias: (D,), any floating dtype; None for zeros.

    Source: Ba et al. 2016.
    """
    _check(x, weight, bias, residual, epsilon)
    if backend.choose("layer_norm", x.device, _why_not_triton(x, residual)) == "torch":
        return _layer_norm(x, weight, bias, residual, epsilon)
    y, h, _ = norm(x, weight, bias, residual, epsilon, True)
    return y if residual is None else (y, h)


def rms_norm_reference(
    x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, epsilon: float = 1e-5
):
    """The function of `rms_norm` in plain PyTorch."""
    _check(x, weight, None, residual, epsilon)
    return _rms_norm(x, weight, residual, epsilon)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, epsilon: float = 1e-5
):
    """The function of `layer_norm` in plain PyTorch."""
    _check(x, weight, bias, residual, epsilon)
    return _layer_norm(x, weight, bias, residual, epsilon)


def _rms_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, epsilon: float):
    h = x if residual is None else x + residual
    h_wide, weight = _widened(h, weight)
    y = functional.rms_norm(h_wide, x.shape[-1:], weight, epsilon).to(x.dtype)
    return y if residual is None else (y, h)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float):
    h = x if residual is None else x + residual
    h_wide, weight, bias = _widened(h, weight, bias)
    y = functional.layer_norm(h_wide, x.shape[-1:], weight, bias, epsilon).to(x.dtype)
    return y if residual is None else (y, h)


def _widened(h: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """All in the dtype that statistics are taken in."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return [None if tensor is None else tensor.to(wide) for tensor in (h, *parameters)]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, epsilon: float) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have rows of at least one value, got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    shapes = (("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:]), ("residual", residual, x.shape))
    for name, tensor, shape in shapes:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number, 0 or more, got {epsilon}")


def _why_not_triton(x: Tensor, residual: Tensor | None) -> str:
    for tensor in (x,) if residual is None else (x, residual):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it has no kernel for {tensor.dtype}"
    if x.shape[-1] > LARGEST_WIDTH:
        return f"its rows end at {LARGEST_WIDTH} values, got {x.shape[-1]}"
    return ""


@triton.jit
def load_rows(tensor, stride, tile, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile `tile` (ROWS, BLOCK_D) of a tensor (rows, D), in float32, zero outside it."""
    rows_R = tile * ROWS + tl.arange(0, ROWS)
    columns_D = tl.arange(0, BLOCK_D)
    pointers = tensor + tl.cast(rows_R, tl.int64)[:, None] * stride + columns_D[None, :]
    return tl.load(pointers, mask=(rows_R < rows)[:, None] & (columns_D < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(tensor, values_RD, tile, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes as much of a tile as lies inside a contiguous tensor (rows, D)."""
    rows_R = tile * ROWS + tl.arange(0, ROWS)
    columns_D = tl.arange(0, BLOCK_D)
    pointers = tensor + tl.cast(rows_R, tl.int64)[:, None] * D + columns_D[None, :]
    inside = (rows_R < rows)[:, None] & (columns_D < D)[None, :]
    tl.store(pointers, values_RD.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def load_parameter(parameter, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A weight or bias (1, BLOCK_D) in float32, zero beyond D."""
    columns_D = tl.arange(0, BLOCK_D)
    return tl.load(parameter + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_forward_kernel(
    x, weight, bias, residual, y, h, statistics, x_stride, residual_stride, rows, epsilon,
    CENTRED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (rows, D); with a residual h (rows, D); statistics (1 or 2, rows): 1 / deviation and, where CENTRED, mean."""
    tile = tl.program_id(0)
    rows_R = tile * ROWS + tl.arange(0, ROWS)
    h_RD = load_rows(x, x_stride, tile, rows, D, ROWS, BLOCK_D)
    if weight is not None:
        weight_D = load_parameter(weight, D, BLOCK_D)
    if bias is not None:
        bias_D = load_parameter(bias, D, BLOCK_D)
    if residual is not None:
        h_RD += load_rows(residual, residual_stride, tile, rows, D, ROWS, BLOCK_D)
        store_rows(h, h_RD, tile, rows, D, ROWS, BLOCK_D)
        h_RD = h_RD.to(h.dtype.element_ty).to(tl.float32)  # what the backward pass will read
    if CENTRED:
        mean_R = tl.sum(h_RD, 1) / D
        tl.store(statistics + rows + rows_R, mean_R, mask=rows_R < rows)
        h_RD = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], h_RD - mean_R[:, None], 0.0)
    inverse_R = 1.0 / tl.sqrt_rn(tl.sum(h_RD * h_RD, 1) / D + epsilon)
    tl.store(statistics + rows_R, inverse_R, mask=rows_R < rows)
    y_RD = h_RD * inverse_R[:, None]
    if weight is not None:
        y_RD *= weight_D
    if bias is not None:
        y_RD += bias_D
    store_rows(y, y_RD, tile, rows, D, ROWS, BLOCK_D)


@triton.jit
def norm_backward_kernel(
    d_y, d_h, h, weight, statistics, d_x, d_parameters, d_y_stride, d_h_stride, h_stride, rows,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """d_x (rows, D), and this program's share of the gradients of weight and bias, each where there is one:
    d_parameters (programs, 0 to 2, D) float32.
    """
    program = tl.program_id(0)
    d_weight_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d_bias_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if weight is not None:
        weight_D = load_parameter(weight, D, BLOCK_D)
    # Two stages: the next rows are on their way while these are summed.
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=2):
        rows_R = tile * ROWS + tl.arange(0, ROWS)
        d_y_RD = load_rows(d_y, d_y_stride, tile, rows, D, ROWS, BLOCK_D)
        unit_RD = load_rows(h, h_stride, tile, rows, D, ROWS, BLOCK_D)
        inverse_R = tl.load(statistics + rows_R, mask=rows_R < rows, other=0.0)
        if CENTRED:
            mean_R = tl.load(statistics + rows + rows_R, mask=rows_R < rows, other=0.0)
            unit_RD -= mean_R[:, None]
        unit_RD *= inverse_R[:, None]
        d_unit_RD = d_y_RD
        if weight is not None:
            d_weight_RD += d_y_RD * unit_RD
            d_unit_RD = d_y_RD * weight_D
        if BIAS:
            d_bias_RD += d_y_RD
        # What d_unit has along the row itself (and along ones) the norm takes away.
        d_x_RD = d_unit_RD - unit_RD * (tl.sum(d_unit_RD * unit_RD, 1) / D)[:, None]
        if CENTRED:
            d_x_RD -= (tl.sum(d_unit_RD, 1) / D)[:, None]
        d_x_RD *= inverse_R[:, None]
        if d_h is not None:
            d_x_RD += load_rows(d_h, d_h_stride, tile, rows, D, ROWS, BLOCK_D)
        store_rows(d_x, d_x_RD, tile, rows, D, ROWS, BLOCK_D)
    columns_D = tl.arange(0, BLOCK_D)
    if weight is not None:
        d_parameters += program * (1 + BIAS) * D
        tl.store(d_parameters + columns_D, tl.sum(d_weight_RD, 0), mask=columns_D < D)
        d_parameters += D
    elif BIAS:
        d_parameters += program * D
    if BIAS:
        tl.store(d_parameters + columns_D, tl.sum(d_bias_RD, 0), mask=columns_D < D)


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    h: Tensor,
    statistics: Tensor,
    epsilon: float,
    centred: bool,
) -> None:
    """Writes y, h (with a residual) and statistics, all contiguous."""
    x, residual = _as_rows(x), _as_rows(residual)
    sizes = _sizes(x.shape[1])
    with torch.cuda.device_of(x):
        norm_forward_kernel[(triton.cdiv(x.shape[0], sizes["ROWS"]),)](
            x=x,
            weight=_dense(weight),
            bias=_dense(bias),
            residual=residual,
            y=y,
            h=h,
            statistics=statistics,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            rows=x.shape[0],
            epsilon=epsilon,
            CENTRED=centred,
            **sizes,
        )


def launch_backward(
    d_y: Tensor, d_h: Tensor | None, h: Tensor, weight: Tensor | None, statistics: Tensor, d_x: Tensor, bias: bool
) -> Tensor:
    """Writes d_x, contiguous, and returns each program's share of the parameters' gradients (programs, 0 to 2, D)."""
    d_y, d_h, h = _as_rows(d_y), _as_rows(d_h), _as_rows(h)
    rows, width = h.shape
    sizes = _sizes(width)
    programs = min(_programs(h.device), triton.cdiv(rows, sizes["ROWS"]))
    d_parameters = statistics.new_empty(programs, (weight is not None) + bias, width)
    with torch.cuda.device_of(h):
        norm_backward_kernel[(programs,)](
            d_y=d_y,
            d_h=d_h,
            h=h,
            weight=_dense(weight),
            statistics=statistics,
            d_x=d_x,
            d_parameters=d_parameters,
            d_y_stride=d_y.stride(0),
            d_h_stride=0 if d_h is None else d_h.stride(0),
            h_stride=h.stride(0),
            rows=rows,
            CENTRED=statistics.shape[0] == 2,
            BIAS=bias,
            **sizes,
        )
    return d_parameters


def _sizes(width: int) -> dict[str, int | bool]:
    """How both kernels tile rows of that width."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {
        "D": width,
        "BLOCK_D": block,
        "ROWS": rows,
        "num_warps": rows * block // (32 * ELEMENTS_PER_THREAD),
        "enable_fp_fusion": True,
    }


@functools.cache
def _programs(device: torch.device) -> int:
    """Of the backward kernel: the same for every number of rows that fills the device."""
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _as_rows(tensor: Tensor | None) -> Tensor | None:
    """(rows, D) with consecutive values in a row, any stride between rows."""
    if tensor is None:
        return None
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@torch.library.custom_op("cegbench::norm", mutates_args=())
def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, statistics) by the Triton kernel: h is empty without a residual; statistics, (1 or 2, ...) float32, are
    1 / deviation and, where `centred`, the mean.
    """
    results = _empty_results(x, residual, centred)
    if x.numel():
        launch_forward(x, weight, bias, residual, *results, epsilon, centred)
    return results


@torch.library.custom_op("cegbench::norm_backward", mutates_args=())
def norm_backward(
    d_y: Tensor, d_h: Tensor | None, h: Tensor, weight: Tensor | None, statistics: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """(d_x, d_parameters) by the Triton kernel: the gradient of h, in its dtype, and those of weight and bias, each
    where there is one, (0 to 2, D) float32.
    """
    d_x, d_parameters = _empty_gradients(h, weight, statistics, bias)
    if not h.numel():
        return d_x, d_parameters.zero_()
    return d_x, launch_backward(d_y, d_h, h, weight, statistics, d_x, bias).sum(0)


@norm.register_fake
def _(x, weight, bias, residual, epsilon, centred):
    return _empty_results(x, residual, centred)


@norm_backward.register_fake
def _(d_y, d_h, h, weight, statistics, bias):
    return _empty_gradients(h, weight, statistics, bias)


def _empty_results(x: Tensor, residual: Tensor | None, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    h_shape, h_dtype = (0, x.dtype) if residual is None else (x.shape, torch.promote_types(x.dtype, residual.dtype))
    return (
        x.new_empty(x.shape),
        x.new_empty(h_shape, dtype=h_dtype),
        x.new_empty((1 + centred, *x.shape[:-1]), dtype=torch.float32),
    )


def _empty_gradients(h: Tensor, weight: Tensor | None, statistics: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), statistics.new_empty((weight is not None) + bias, h.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, residual, _, _ = inputs
    _, h, statistics = output
    ctx.set_materialize_grads(False)  # an unused h would cost a tensor of zeros, and reading it
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias, residual)]
    ctx.save_for_backward(x if residual is None else h, weight, statistics)


def _backward(ctx, d_y: Tensor | None, d_h: Tensor | None, d_statistics: None):
    h, weight, statistics = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype, residual_dtype = ctx.dtypes
    if d_y is None:
        d_y = torch.zeros_like(h, dtype=x_dtype)
    d_x, d_parameters = norm_backward(
        d_y, None if residual_dtype is None else d_h, h, weight, statistics, bias_dtype is not None
    )
    return (
        d_x.to(x_dtype),
        None if weight is None else d_parameters[0].to(weight_dtype),
        None if bias_dtype is None else d_parameters[-1].to(bias_dtype),
        None if residual_dtype is None else d_x.to(residual_dtype),
        None,
        None,
    )


norm.register_autograd(_backward, setup_context=_setup_context)
