"""The forward kernel: FlashAttention-2's online softmax in base 2 (Dao 2023, algorithm 1). Suffixes as in `tile.py`."""

from kernels.attention.fused.tile import kept, load_tile, next_tile, store_tile, visible, visit
from kernels.jit import LOG2_E, LOWEST, tanh, tl, triton


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides,
    batches, heads, S, heads_at_once, scale, softcap, mask, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (B, H, S, E), and lse (B, H, S), the log-sum-exp of each row of scores in base 2."""
    tile, batch_head = next_tile(tl.cdiv(S, BLOCK_M), batches * heads, heads_at_once, CAUSAL)
    batch = batch_head // heads
    head = batch_head % heads
    if DOCUMENTS:
        mask = (mask[0] + batch * S, mask[1] + batch * S, mask[2])
    row = tile * BLOCK_M
    rows_M = row + tl.arange(0, BLOCK_M)
    first_M, last_M = visible(rows_M, S, mask, CAUSAL, WINDOW, DOCUMENTS, False)
    ranges = visit(row, S, mask, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, DOCUMENTS, False)
    q_MD = load_tile(q, q_strides, batch, head, row, S, D, BLOCK_M, BLOCK_D, TMA, True)
    factor = softcap * LOG2_E if SOFTCAP else scale * LOG2_E

    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(3):
        if phase != 1 or WINDOW or DOCUMENTS:
            for column in tl.range(ranges[phase][0], ranges[phase][1], BLOCK_N):
                columns_N = column + tl.arange(0, BLOCK_N)
                k_ND = load_tile(k, k_strides, batch, head // GROUP, column, S, D, BLOCK_N, BLOCK_D, TMA, phase > 0)
                scores_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
                if SOFTCAP:
                    scores_MN = tanh(scores_MN * (scale / softcap))
                if phase > 0:
                    seen_MN = columns_N[None, :] <= last_M[:, None]
                    if WINDOW or DOCUMENTS:
                        seen_MN = seen_MN & (columns_N[None, :] >= first_M[:, None])
                    scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
                new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * factor)
                weights_MN = tl.exp2(scores_MN * factor - new_max_M[:, None])
                shrink_M = tl.exp2(max_M - new_max_M)
                sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
                max_M = new_max_M
                if DROPOUT:
                    keep_MN = kept(dropout, batch_head, rows_M[:, None], columns_N[None, :])
                    weights_MN = tl.where(keep_MN, weights_MN, 0.0)
                v_NE = load_tile(v, v_strides, batch, head // GROUP, column, S, E, BLOCK_N, BLOCK_E, TMA, phase > 0)
                acc_ME = acc_ME * shrink_M[:, None]
                acc_ME = tl.dot(weights_MN.to(v_NE.dtype), v_NE, acc_ME, input_precision=PRECISION)

    acc_ME = acc_ME * (dropout[2] / sum_M)[:, None]
    store_tile(out, out_strides, batch, head, row, S, acc_ME, E, BLOCK_M, BLOCK_E)
    tl.store(lse + tl.cast(batch_head, tl.int64) * S + rows_M, max_M + tl.log2(sum_M), mask=rows_M < S)
