"""The MLP of GPT-2."""

from torch import Tensor
from torch.nn import functional

from models.mlp.gelu import GeluMlp


class GeluTanhMlp(GeluMlp):
    """GeluMlp with GELU's tanh approximation, which GPT-2 was trained with."""

    def activate(self, x_BTD: Tensor) -> Tensor:
        return functional.gelu(self.up(x_BTD), approximate="tanh")
