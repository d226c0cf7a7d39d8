"""What the kernels of matrix products share: operands, tile sizes, the order of tiles, loads and stores.

Operands have three dimensions here, (batch, rows, columns); a matrix is a batch of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import interpreting
from kernels.jit import has_tma, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TileSize:
    """Rows and columns of a tile of the result, and how much of the sum one step takes."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


SMALL = TileSize(32, 32, 16, 4, 1)  # for the interpreter: small matrices have many tiles
# By whether there is TMA, and bits of the dtype. They compile without spills; none is measured yet.
TILE_SIZES = {
    (False, 16): TileSize(128, 128, 32, 8, 4),
    (False, 32): TileSize(64, 64, 16, 4, 3),
    (True, 16): TileSize(128, 128, 64, 8, 3),
    (True, 32): TileSize(64, 64, 16, 4, 3),
}


def autocast_operands(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as PyTorch's own matrix products take them."""
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def why_not_triton(x: Tensor) -> str:
    """Why no kernel can multiply tensors such as x; empty where one can."""
    if x.dtype not in DTYPES:
        return f"it has no kernel for {x.dtype}"
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return "the interpreter's bfloat16 products are wrong"
    return ""


def tile_size(x: Tensor) -> TileSize:
    return SMALL if interpreting() else TILE_SIZES[has_tma(), x.element_size() * 8]


@triton.jit
def next_tile(row_tiles, column_tiles):
    """(row, column) of this program's tile. Eight rows of tiles go together, so that what they read stays in the L2
    cache.
    """
    program = tl.program_id(0)
    first = program // (8 * column_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    rank = program - first * column_tiles
    return first + rank % height, rank // height


@triton.jit
def load_block(
    source, strides, batch, row, column, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_COLUMNS) of `source` (batches, rows, columns), zero outside it. `source` is a tensor
    descriptor or, not TMA, a pointer to a tensor with these strides of batches and rows.
    """
    if TMA:
        return source.load([batch, row, column]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        pointers, inside = _block(source, strides, batch, row, column, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_block(
    target, strides, batch, row, column, rows, columns, value,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes as much of `value` as lies inside `target` (batches, rows, columns)."""
    pointers, inside = _block(target, strides, batch, row, column, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.store(pointers, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _block(tensor, strides, batch, row, column, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    row_range = tl.arange(0, BLOCK_ROWS)
    column_range = tl.arange(0, BLOCK_COLUMNS)
    corner = tl.cast(batch, tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1] + column
    pointers = tensor + corner + row_range[:, None] * strides[1] + column_range[None, :]
    return pointers, (row + row_range < rows)[:, None] & (column + column_range < columns)[None, :]
