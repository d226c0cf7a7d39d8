"""Attention in plain PyTorch, a block of queries at a time: what the Triton kernels compute, where they cannot run.

Memory is linear in the sequence, keys that no query of a block sees are never touched, and half dtypes are computed in
float32. Shape suffixes: B batch, H query heads, K key heads, S sequence, R queries of a block, M the same for all query
heads of a key head, C keys that a block sees, D head size of queries and keys, E of values.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention.dropout import kept
from kernels.attention.options import AttentionOptions

ROWS = 256


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: AttentionOptions) -> None:
    """Writes out (B, H, S, E) and lse (B, H, S), the log-sum-exp of each row of scores in base 2."""
    for block in blocks(q, k, v, options):
        scores_BKMC, _ = block.scores()
        max_BKM1 = scores_BKMC.amax(-1, keepdim=True)
        weights_BKMC = scores_BKMC.sub_(max_BKM1).exp_()
        sum_BKM1 = weights_BKMC.sum(-1, keepdim=True)
        out[:, :, block.rows] = block.heads(block.drop(weights_BKMC) @ block.v_BKCE / sum_BKM1)
        lse[:, :, block.rows] = block.heads(max_BKM1 / math.log(2) + sum_BKM1.log2())[..., 0]


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
    """Writes dq, dk and dv, the gradients of q, k and v. Source: Dao 2023 (FlashAttention-2), algorithm 2."""
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    for block in blocks(q, k, v, options):
        scores_BKMC, slope = block.scores()
        weights_BKMC = torch.exp(scores_BKMC - block.stack(lse[..., None]) * math.log(2))
        d_out_BKME = block.stack(d_out)
        delta_BKM1 = (d_out_BKME * block.stack(out)).sum(-1, keepdim=True)
        d_weights_BKMC = block.drop(d_out_BKME @ block.v_BKCE.mT)
        d_scores_BKMC = weights_BKMC * (d_weights_BKMC - delta_BKM1) * slope * options.scale
        dq[:, :, block.rows] = block.heads(d_scores_BKMC @ block.k_BKCD)
        dk_sum[:, :, block.columns] += d_scores_BKMC.mT @ block.q_BKMD
        dv_sum[:, :, block.columns] += block.drop(weights_BKMC).mT @ d_out_BKME
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


def blocks(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Iterator["Block"]:
    sequence = q.shape[2]
    for row in range(0, sequence, ROWS):
        yield Block(slice(row, min(row + ROWS, sequence)), q, k, v, options)


class Block:
    """The queries of `rows` and the keys of `columns` that any of them sees."""

    def __init__(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
        self.rows, self.options = rows, options
        self.key_heads, self.dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
        queries = torch.arange(rows.start, rows.stop, device=q.device)
        first_BR, last_BR = torch.zeros_like(queries)[None], torch.full_like(queries, k.shape[2] - 1)[None]
        if options.starts is not None:
            first_BR, last_BR = options.starts[:, rows], options.ends[:, rows]
        if options.causal:
            last_BR = queries[None]
        if options.window is not None:
            first_BR = torch.maximum(first_BR, queries - options.window)
        self.columns = slice(int(first_BR.min()), int(last_BR.max()) + 1)
        self.queries, self.keys = queries, torch.arange(self.columns.start, self.columns.stop, device=q.device)
        self.seen_B1RC = ((self.keys >= first_BR[..., None]) & (self.keys <= last_BR[..., None]))[:, None]
        self.q_BKMD = self.stack(q)
        self.k_BKCD, self.v_BKCE = (x[:, :, self.columns].to(self.dtype) for x in (k, v))

    def stack(self, x: Tensor) -> Tensor:
        """This block's rows of a (B, H, S, ·) tensor as (B, K, M, ·)."""
        return x[:, :, self.rows].to(self.dtype).unflatten(1, (self.key_heads, -1)).flatten(2, 3)

    def heads(self, x: Tensor) -> Tensor:
        """(B, K, M, ·) as (B, H, R, ·)."""
        return x.unflatten(2, (-1, len(self.queries))).flatten(1, 2)

    def scores(self) -> tuple[Tensor, Tensor | float]:
        """Scores (B, K, M, C), minus infinity where hidden, and d(soft-capped score) / d(scaled score)."""
        scores_BKMC, slope = self.q_BKMD @ self.k_BKCD.mT * self.options.scale, 1.0
        if self.options.softcap is not None:
            bent_BKMC = torch.tanh(scores_BKMC / self.options.softcap)
            scores_BKMC, slope = bent_BKMC * self.options.softcap, 1.0 - bent_BKMC**2
        group = scores_BKMC.shape[2] // len(self.queries)
        return scores_BKMC.masked_fill_(~self.seen_B1RC.repeat(1, 1, group, 1), -math.inf), slope

    def drop(self, weights_BKMC: Tensor) -> Tensor:
        """Dropout of attention weights, or of their gradients."""
        p = self.options.dropout_p
        if not p:
            return weights_BKMC
        weights_BHRC = self.heads(weights_BKMC)
        heads = torch.arange(weights_BHRC[:, :, 0, 0].numel(), device=weights_BHRC.device)
        heads_BH11 = heads.view(*weights_BHRC.shape[:2], 1, 1)
        kept_BHRC = kept(self.options.seed, heads_BH11, self.queries[:, None], self.keys, p)
        return (weights_BHRC * kept_BHRC / (1.0 - p)).view(weights_BKMC.shape)
