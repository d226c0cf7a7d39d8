"""Ops of the models, each with a plain PyTorch reference. Knows nothing of models or runs."""

from kernels import backend
from kernels.attention.flash import flash_attention
from kernels.attention.reference import materialised_attention

__all__ = ["backend", "flash_attention", "materialised_attention"]
