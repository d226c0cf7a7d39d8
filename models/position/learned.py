"""Absolute positions, learned."""

from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import Embedding


class LearnedPositions(nn.Module):
    """Adds a learned vector per position to the token embeddings, as GPT-2 does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config.context, config)

    def embed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.embedding.weight[: x_BTD.shape[1]]

    def rotate(self, q_BHTD: Tensor, k_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        return q_BHTD, k_BHTD

    def flops(self, sequence_length: int) -> int:
        return 0
