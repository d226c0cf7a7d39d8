"""Rotary position embedding (Su et al. 2021)."""

import torch
from torch import Tensor, nn

from kernels import rotary_embedding
from models.config import ModelConfig


class RotaryPositions(nn.Module):
    """Rotates queries and keys by angles that grow with the position, so that their products depend on distance alone.

    Channel i of a head is paired with channel i + D/2 (the half-split layout of GPT-NeoX and Llama) and turned by
    position * base^(-2i/D). The head size D must be even.
    """

    def __init__(self, config: ModelConfig, *, base: float = 10000.0) -> None:
        super().__init__()
        if config.head_size % 2:
            raise ValueError(f"position: rope needs an even head size, got width / heads = {config.head_size}")
        if not base > 0.0:
            raise ValueError(f"position: base must be positive, got {base}")
        pairs = torch.arange(config.head_size // 2, dtype=torch.float64)
        positions = torch.arange(config.context, dtype=torch.float64)
        # Angles reach the context length in radians: in float32 their last bits would already be wrong.
        angles_TP = positions[:, None] * base ** (-2.0 * pairs / config.head_size)
        self.register_buffer("cos_TP", angles_TP.cos().float(), persistent=False)
        self.register_buffer("sin_TP", angles_TP.sin().float(), persistent=False)

    def embed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def rotate(self, q_BHTD: Tensor, k_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_embedding(q_BHTD, k_BHTD, self.cos_TP, self.sin_TP)

    def flops(self, sequence_length: int) -> int:
        """Pointwise work: not counted."""
        return 0
