"""The MLP of GPT-2."""

from models.mlp.gelu import GeluMlp


class GeluTanhMlp(GeluMlp):
    """GeluMlp with GELU's tanh approximation, which GPT-2 was trained with."""

    approximate = "tanh"
