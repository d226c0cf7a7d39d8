"""Layer normalisation (Ba et al. 2016)."""

import torch
from torch import Tensor, nn

from kernels import layer_norm
from models.config import ModelConfig
from models.layers import Draw


class LayerNorm(nn.LayerNorm):
    """Subtracts the mean over the width, divides by the standard deviation, then scales (and shifts, with bias)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.width, eps=config.norm_epsilon, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return layer_norm(x_BTD, self.weight, self.bias, epsilon=self.eps)

    @torch.no_grad()
    def initialise(self, draw: Draw) -> None:
        self.reset_parameters()

    def flops(self, sequence_length: int) -> int:
        """Pointwise work and sums only: no matrix multiplication."""
        return 0
