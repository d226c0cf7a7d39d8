"""Ops of the models, each with a plain PyTorch reference. Knows nothing of models or runs."""

from kernels import backend
from kernels.attention.flash import flash_attention
from kernels.attention.reference import materialised_attention
from kernels.cross_entropy import cross_entropy
from kernels.grouped_gemm import grouped_gemm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.mlp import linear_gelu, linear_relu_squared, linear_swiglu
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rotary_embedding
from kernels.router import balancing_loss, inverse_order, route, sort_by_expert, update_bias

__all__ = [
    "backend",
    "balancing_loss",
    "cross_entropy",
    "flash_attention",
    "grouped_gemm",
    "inverse_order",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "linear_relu_squared",
    "linear_swiglu",
    "materialised_attention",
    "rms_norm",
    "rotary_embedding",
    "route",
    "sort_by_expert",
    "update_bias",
]
