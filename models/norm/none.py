"""No normalisation."""

from torch import Tensor, nn

from models.config import ModelConfig


class NoNorm(nn.Module):
    """The identity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def flops(self, sequence_length: int) -> int:
        return 0
