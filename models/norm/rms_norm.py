"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor, nn

from kernels import rms_norm
from models.config import ModelConfig
from models.layers import Draw


class RmsNorm(nn.Module):
    """Divides by the root of the mean square over the width, then scales. It takes no mean away and has no bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, epsilon=self.epsilon)

    @torch.no_grad()
    def initialise(self, draw: Draw) -> None:
        self.weight.fill_(1.0)

    def flops(self, sequence_length: int) -> int:
        """Pointwise work and sums only: no matrix multiplication."""
        return 0
