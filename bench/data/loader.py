"""Batches as a function of (seed, position), nothing else: no state to save, no dependence on micro-batch size."""

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from bench.data.shards import Tokens
from bench.errors import UserError


class Loader:
    """The training stream of one seed.

    The corpus is cut into windows of `context` tokens, never across shards; what is left at a shard's end is not used.
    Each epoch visits every window once, in an order fixed by (seed, epoch). Position s of the stream lies in window
    order[s // context % windows] at offset s % context; its target is the corpus's next token.

    Raises UserError when the corpus has less than one window.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int):
        if seed < 0:
            raise UserError(f"seed={seed} must not be negative")
        self.context = context
        self.seed = seed
        self.windows = _Windows(tokens, context)
        if len(self.windows) == 0:
            raise UserError(
                f"the training split has {len(tokens):,} tokens, less than one window of {context:,} and its target: "
                "give more text or lower the context"
            )
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, position: int, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each (sequences, context) int64: the stream from `position` on.

        position: training tokens consumed so far, any integer >= 0.
        """
        if position < 0 or sequences < 1:
            raise ValueError(f"position={position} must be >= 0 and sequences={sequences} >= 1")
        first, offset = divmod(position, self.context)
        rows = np.empty((sequences + (offset > 0), self.context + 1), dtype=np.int64)
        for row, window in enumerate(rows, start=first):
            epoch, place = divmod(row, len(self.windows))
            self.windows.copy(int(self._order(epoch)[place]), window)
        taken = slice(offset, offset + sequences * self.context)
        shape = (sequences, self.context)
        inputs, targets = (part.reshape(-1)[taken].reshape(shape) for part in (rows[:, :-1], rows[:, 1:]))
        return inputs, targets

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # NumPy promises the raw bits of a bit generator for ever, but not what `permutation` makes of them.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self.windows))
            self._orders = {past: order for past, order in self._orders.items() if past == epoch - 1}
            order = np.argsort(keys, kind="stable")
            self._orders[epoch] = order.astype(np.min_scalar_type(len(self.windows)))
        return self._orders[epoch]


def evaluation_batch(tokens: Tokens, context: int, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), each (sequences, context) int64: disjoint windows, evenly spaced over the validation split.

    The same for every variant and seed. Raises UserError when the split has fewer windows.
    """
    windows = _Windows(tokens, context)
    if not 1 <= sequences <= len(windows):
        raise UserError(
            f"{sequences:,} evaluation sequences of {context:,} tokens asked for, the validation split has "
            f"{len(windows):,}: ask for at least 1 and at most that many, or raise data.validation_fraction"
        )
    rows = np.empty((sequences, context + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        windows.copy(index * len(windows) // sequences, row)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


class _Windows:
    """The windows of `context` tokens and one target more, numbered through all shards."""

    def __init__(self, tokens: Tokens, context: int):
        if context < 1:
            raise ValueError(f"context={context} must be at least 1")
        self._shards, self._context = tokens.shards, context
        counts = [max(len(shard) - 1, 0) // context for shard in tokens.shards]
        self._firsts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def copy(self, index: int, out: np.ndarray) -> None:
        """Fills `out`, shape (context + 1,), with window `index`."""
        shard = bisect_right(self._firsts, index) - 1
        start = (index - self._firsts[shard]) * self._context
        out[:] = self._shards[shard][start : start + self._context + 1]
