"""Which attention weights dropout keeps, by a counter-based generator: the mask is never stored, and forward and
backward compute the same one whatever their tiles.
"""

import torch
from torch import Tensor

ROUNDS = 7  # the fewest with which Philox-4x32 passes BigCrush
WORD = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A weight is dropped when the upper 24 bits of its word lie below this."""
    return round(dropout_p * 2**24)


def kept(seed: Tensor, heads: Tensor, queries: Tensor, keys: Tensor, dropout_p: float) -> Tensor:
    """Whether the weight of (head, query, key) is kept, in the shape that the three int64 tensors broadcast to.

    seed: (1,) int64; heads count through the batch, b * H + h.
    """
    return philox(seed, queries, keys, heads) >> 8 >= threshold(dropout_p)


def philox(seed: Tensor, *counter: Tensor) -> Tensor:
    """First word of Philox-4x32-7 (Salmon et al. 2011), in int64, for a key of 64 bits and a counter of three words."""
    c0, c1, c2 = counter
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(0xD2511F53, c0)
        high_2, low_2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit words, which may not fit into int64's 63."""
    upper, lower = factor * (words >> 16), factor * (words & 0xFFFF)
    return upper + (lower >> 16) >> 16, (upper << 16) + lower & WORD
