"""The backward kernels: dQ by tiles of queries, dK and dV by tiles of keys, each computing the weights anew from the
log-sum-exp (Dao 2023, FlashAttention-2, algorithm 2). Suffixes as in `tile.py`.

Every sum has one fixed order, so that results are the same bits every time; the price is that two of the seven matrix
products are done twice. ADD_DQ takes the other side of that bargain: the key kernel adds its share of dQ to float32
memory in whatever order tiles finish, and there is no query kernel.
"""

from kernels.attention.fused.tile import kept, load_tile, next_tile, store_tile, tile_pointers, visible, visit
from kernels.jit import LOG2_E, tanh, tl, triton


@triton.jit
def softmax_weights(scores, lse, seen, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Softmax weights of the products QK^T, and d(soft-capped score) / d(scaled score)."""
    slope = 1.0
    factor = scale * LOG2_E
    if SOFTCAP:
        scores = tanh(scores * (scale / softcap))
        slope = 1.0 - scores * scores
        factor = softcap * LOG2_E
    weights = tl.exp2(scores * factor - lse)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return weights, slope


@triton.jit
def store_delta(
    out, d_out_ME, delta, out_strides, batch, head, row, batch_head, S,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta (M): the sum of out * d_out over each row, which is what the softmax takes from every d(weight) of it."""
    out_ME = load_tile(out, out_strides, batch, head, row, S, E, BLOCK_M, BLOCK_E, False, True)
    delta_M = tl.sum(d_out_ME.to(tl.float32) * out_ME.to(tl.float32), 1)
    rows_M = row + tl.arange(0, BLOCK_M)
    tl.store(delta + tl.cast(batch_head, tl.int64) * S + rows_M, delta_M, mask=rows_M < S)
    return delta_M


@triton.jit
def backward_delta_kernel(
    out, d_out, delta, out_strides, d_out_strides, heads, S,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, S), where no query kernel writes it."""
    tiles = tl.cdiv(S, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M
    batch = batch_head // heads
    head = batch_head % heads
    d_out_ME = load_tile(d_out, d_out_strides, batch, head, row, S, E, BLOCK_M, BLOCK_E, False, True)
    store_delta(out, d_out_ME, delta, out_strides, batch, head, row, batch_head, S, E, BLOCK_M, BLOCK_E)


@triton.jit
def backward_query_kernel(
    q, k, v, out, d_out, lse, delta, dq, q_strides, k_strides, v_strides, out_strides, d_out_strides, dq_strides,
    batches, heads, S, heads_at_once, scale, softcap, mask, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq (B, H, S, D), and delta (B, H, S) for the key kernel, which comes after."""
    tile, batch_head = next_tile(tl.cdiv(S, BLOCK_M), batches * heads, heads_at_once, CAUSAL)
    batch = batch_head // heads
    head = batch_head % heads
    if DOCUMENTS:
        mask = (mask[0] + batch * S, mask[1] + batch * S, mask[2])
    row = tile * BLOCK_M
    rows_M = row + tl.arange(0, BLOCK_M)
    first_M, last_M = visible(rows_M, S, mask, CAUSAL, WINDOW, DOCUMENTS, False)
    ranges = visit(row, S, mask, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, DOCUMENTS, False)
    d_out_ME = load_tile(d_out, d_out_strides, batch, head, row, S, E, BLOCK_M, BLOCK_E, TMA, True)
    delta_M = store_delta(out, d_out_ME, delta, out_strides, batch, head, row, batch_head, S, E, BLOCK_M, BLOCK_E)
    lse_M = tl.load(lse + tl.cast(batch_head, tl.int64) * S + rows_M, mask=rows_M < S, other=0.0)
    q_MD = load_tile(q, q_strides, batch, head, row, S, D, BLOCK_M, BLOCK_D, TMA, True)

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(3):
        if phase != 1 or WINDOW or DOCUMENTS:
            for column in tl.range(ranges[phase][0], ranges[phase][1], BLOCK_N):
                columns_N = column + tl.arange(0, BLOCK_N)
                seen_MN = columns_N[None, :] <= last_M[:, None]
                if WINDOW or DOCUMENTS:
                    seen_MN = seen_MN & (columns_N[None, :] >= first_M[:, None])
                k_ND = load_tile(k, k_strides, batch, head // GROUP, column, S, D, BLOCK_N, BLOCK_D, TMA, phase > 0)
                scores_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
                weights_MN, slope_MN = softmax_weights(
                    scores_MN, lse_M[:, None], seen_MN, scale, softcap, SOFTCAP, phase > 0
                )
                v_NE = load_tile(v, v_strides, batch, head // GROUP, column, S, E, BLOCK_N, BLOCK_E, TMA, phase > 0)
                d_weights_MN = tl.dot(d_out_ME, v_NE.T, input_precision=PRECISION)
                if DROPOUT:
                    keep_MN = kept(dropout, batch_head, rows_M[:, None], columns_N[None, :])
                    d_weights_MN = tl.where(keep_MN, d_weights_MN * dropout[2], 0.0)
                d_scores_MN = weights_MN * (d_weights_MN - delta_M[:, None]) * slope_MN
                dq_MD = tl.dot(d_scores_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    store_tile(dq, dq_strides, batch, head, row, S, dq_MD * scale, D, BLOCK_M, BLOCK_D)


@triton.jit
def backward_key_kernel(
    q, k, v, d_out, lse, delta, dq, dk, dv,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    batches, heads, S, heads_at_once, scale, softcap, mask, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    """dk (B, H_kv, S, D) and dv (B, H_kv, S, E), summed over the GROUP query heads of a key head; ADD_DQ, dq as well.

    Tiles of scores are (N, M) here, so that they enter the products for dK and dV as they are.
    """
    key_heads = heads // GROUP
    tile, batch_key_head = next_tile(tl.cdiv(S, BLOCK_N), batches * key_heads, heads_at_once, False)
    batch = batch_key_head // key_heads
    key_head = batch_key_head % key_heads
    if DOCUMENTS:
        mask = (mask[0] + batch * S, mask[1] + batch * S, mask[2])
    column = tile * BLOCK_N
    columns_N = column + tl.arange(0, BLOCK_N)
    first_N, last_N = visible(columns_N, S, mask, CAUSAL, WINDOW, DOCUMENTS, True)
    ranges = visit(column, S, mask, BLOCK_N, BLOCK_M, CAUSAL, WINDOW, DOCUMENTS, True)
    # Queries beyond the sequence have an infinite lse and so no weight: without an upper bound the tail needs no mask.
    BOUNDED: tl.constexpr = WINDOW or DOCUMENTS
    if not BOUNDED:
        ranges = ((ranges[0][0], ranges[2][1]), ranges[1], ranges[2])
    k_ND = load_tile(k, k_strides, batch, key_head, column, S, D, BLOCK_N, BLOCK_D, TMA, True)
    v_NE = load_tile(v, v_strides, batch, key_head, column, S, E, BLOCK_N, BLOCK_E, TMA, True)

    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for phase in tl.static_range(3):
        if phase == 0 or BOUNDED or (phase == 1 and CAUSAL):
            # One loop over the tiles of all heads: a loop over heads around it would cost registers.
            tiles = tl.cdiv(ranges[phase][1] - ranges[phase][0], BLOCK_M)
            for step in tl.range(0, tiles * GROUP):
                member = step // tiles if GROUP > 1 else 0
                row = ranges[phase][0] + (step - member * tiles) * BLOCK_M
                head = key_head * GROUP + member
                batch_head = batch * heads + head
                statistics = tl.cast(batch_head, tl.int64) * S
                rows_M = row + tl.arange(0, BLOCK_M)
                seen_NM = rows_M[None, :] <= last_N[:, None]
                if CAUSAL or DOCUMENTS:
                    seen_NM = seen_NM & (rows_M[None, :] >= first_N[:, None])
                lse_M = tl.load(lse + statistics + rows_M, mask=rows_M < S, other=float("inf"))
                q_MD = load_tile(q, q_strides, batch, head, row, S, D, BLOCK_M, BLOCK_D, TMA, phase > 0 or not BOUNDED)
                scores_NM = tl.dot(k_ND, q_MD.T, input_precision=PRECISION)
                weights_NM, slope_NM = softmax_weights(
                    scores_NM, lse_M[None, :], seen_NM, scale, softcap, SOFTCAP, phase > 0
                )
                d_out_ME = load_tile(
                    d_out, d_out_strides, batch, head, row, S, E, BLOCK_M, BLOCK_E, TMA, phase > 0 or not BOUNDED
                )
                delta_M = tl.load(delta + statistics + rows_M, mask=rows_M < S, other=0.0)
                if DROPOUT:
                    keep_NM = kept(dropout, batch_head, rows_M[None, :], columns_N[:, None])
                    d_weights_NM = tl.dot(v_NE, d_out_ME.T, input_precision=PRECISION)
                    centred_NM = tl.where(keep_NM, d_weights_NM * dropout[2], 0.0) - delta_M[None, :]
                    dropped_NM = tl.where(keep_NM, weights_NM * dropout[2], 0.0)
                else:
                    # A sum that begins at -delta needs fewer registers than one that delta is taken from.
                    centred_NM = tl.broadcast_to(-delta_M[None, :], (BLOCK_N, BLOCK_M))
                    centred_NM = tl.dot(v_NE, d_out_ME.T, centred_NM, input_precision=PRECISION)
                    dropped_NM = weights_NM
                dv_NE = tl.dot(dropped_NM.to(d_out_ME.dtype), d_out_ME, dv_NE, input_precision=PRECISION)
                d_scores_NM = (weights_NM * centred_NM * slope_NM).to(q_MD.dtype)
                dk_ND = tl.dot(d_scores_NM, q_MD, dk_ND, input_precision=PRECISION)
                if ADD_DQ:
                    dq_MD = tl.dot(d_scores_NM.T, k_ND, input_precision=PRECISION) * scale
                    if TMA:
                        dq.atomic_add([batch, head, row, 0], dq_MD.reshape(1, 1, BLOCK_M, BLOCK_D))
                    else:
                        pointers, inside = tile_pointers(dq, dq_strides, batch, head, row, S, D, BLOCK_M, BLOCK_D)
                        tl.atomic_add(pointers, dq_MD, mask=inside, sem="relaxed")
    store_tile(dk, dk_strides, batch, key_head, column, S, dk_ND * scale, D, BLOCK_N, BLOCK_D)
    store_tile(dv, dv_strides, batch, key_head, column, S, dv_NE, E, BLOCK_N, BLOCK_E)
