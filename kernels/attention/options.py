"""What an attention call asks for, beside its tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """Settled arguments of `kernels.flash_attention`.

    `starts` and `ends` (B, S) int32 are the first and last position of each position's document, `seed` (1,) int64 is
    dropout's. `deterministic` forbids sums whose order may change.
    """

    starts: Tensor | None
    ends: Tensor | None
    seed: Tensor | None
    causal: bool
    window: int | None
    softcap: float | None
    dropout_p: float
    scale: float
    deterministic: bool
