"""What the kernels share: the order of tiles, what a tile sees, loads and stores, soft-cap and dropout.

Shape suffixes: M query rows of a tile, N key rows, D head size of queries and keys, E head size of values, the last two
padded to powers of two. `mask` is (starts, ends, window): first and last position of each position's document, (B, S)
int32, and the number of keys that a query sees to its left.

A query sees one interval of keys, and neither end of it ever moves left along the sequence. So the tiles that a tile of
queries visits form one range, and those it sees whole, which need no mask, form one range inside it. The same holds for
a tile of keys and the queries that see it.
"""

from kernels.jit import tl, triton


@triton.jit
def next_tile(tiles, heads, heads_at_once, LAST_IS_HEAVY: tl.constexpr):
    """This program's (tile, head). The heaviest causal tiles come first, so that light ones fill the gaps at the end,
    and `heads_at_once` heads go together, so that what they read stays in the L2 cache.
    """
    program = tl.program_id(0)
    first_head = program // (tiles * heads_at_once) * heads_at_once
    width = tl.minimum(heads - first_head, heads_at_once)
    rank = program - first_head * tiles
    tile = rank // width
    if LAST_IS_HEAVY:
        tile = tiles - 1 - tile
    return tile, first_head + rank % width


@triton.jit
def visible(
    position, S, mask, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, TO_KEYS: tl.constexpr
):
    """First and last key that the queries at `position` see or, TO_KEYS, first and last query that the keys there are
    seen by. Positions beyond the sequence count as its last, so that padding stays finite.
    """
    starts, ends, window = mask
    position = tl.minimum(position, S - 1)
    first = position * 0
    last = first + (S - 1)
    if DOCUMENTS:
        first = tl.load(starts + position)
        last = tl.load(ends + position)
    if CAUSAL:
        if TO_KEYS:
            first = position
        else:
            last = position
    if WINDOW:
        if TO_KEYS:
            last = tl.minimum(last, position + window)
        else:
            first = tl.maximum(first, position - window)
    return first, last


@triton.jit
def visit(
    row, S, mask, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, TO_KEYS: tl.constexpr,
):  # fmt: skip
    """Ranges (begin, end) of what the tile of ROWS rows from `row` visits, STEP at a time: first what it sees whole and
    needs no mask for, then what lies before that, then what lies after. All begin at multiples of STEP or are empty.
    """
    begin, whole_end = visible(row, S, mask, CAUSAL, WINDOW, DOCUMENTS, TO_KEYS)
    whole_begin, end = visible(row + ROWS - 1, S, mask, CAUSAL, WINDOW, DOCUMENTS, TO_KEYS)
    begin = begin // STEP * STEP
    end = end + 1
    whole_begin = tl.minimum(tl.cdiv(whole_begin, STEP) * STEP, end)
    whole_end = tl.maximum((whole_end + 1) // STEP * STEP, whole_begin)
    return (whole_begin, whole_end), (begin, whole_begin), (whole_end, end)


@triton.jit
def load_tile(
    source, strides, batch, head, row, S,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK) of `source` (B, H, S, SIZE) from `row` on, zero outside it. `source` is a tensor descriptor or, not
    TMA, a pointer; then TAIL says whether the tile may reach beyond the sequence.
    """
    if TMA:
        return source.load([batch, head, row, 0]).reshape(ROWS, BLOCK)
    else:
        pointers, inside = tile_pointers(source, strides, batch, head, row, S, SIZE, ROWS, BLOCK)
        if TAIL:
            return tl.load(pointers, mask=inside, other=0.0)
        elif SIZE == BLOCK:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(tl.arange(0, BLOCK) < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(
    target, strides, batch, head, row, S, value, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes as much of `value` (ROWS, BLOCK) as lies inside `target` (B, H, S, SIZE)."""
    pointers, inside = tile_pointers(target, strides, batch, head, row, S, SIZE, ROWS, BLOCK)
    tl.store(pointers, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def tile_pointers(tensor, strides, batch, head, row, S, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to (ROWS, BLOCK) elements of a tensor (B, H, S, SIZE), and which of them lie inside it."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    corner = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    corner += tl.cast(row, tl.int64) * strides[2]
    pointers = tensor + corner + rows[:, None] * strides[2] + columns[None, :]
    return pointers, (row + rows < S)[:, None] & (columns < SIZE)[None, :]


@triton.jit
def kept(dropout, head, queries, keys):
    """Which weights dropout keeps, a function of (seed, head, query, key) alone, so that forward and backward agree
    whatever their tiles. `kernels/attention/dropout.py` says the same in PyTorch.
    """
    seed, threshold, _ = dropout
    word, _, _, _ = tl.philox(tl.load(seed), queries, keys, head, 0, n_rounds=7)
    return (word >> 8).to(tl.int32) >= threshold
