"""Which GPT to build. Light to import: torch is loaded only when a config is made, to look its parts up."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from models.parts import check_part, check_type, find_attention_kernel

PartSpec = Any
"""A part's name, or a mapping {"name": name, **options}. (Any, because Hydra's schemas know no such union.)"""

PART_KINDS = ("position", "norm", "mlp", "attention")


@dataclass(frozen=True)
class ModelConfig:
    """A GPT. The defaults are the baseline: nanoGPT without the normalisation inside its blocks.

    The fields named in PART_KINDS choose a part each: NAME is the file models/<field>/NAME.py.
    Raises ValueError naming the field.
    """

    vocabulary_size: int
    context: int
    """Longest sequence, in tokens."""
    layers: int
    width: int
    heads: int
    """Query heads; each is width / heads wide."""
    queries_per_kv_head: int = 1
    """1 is multi-head attention, `heads` is multi-query, between is grouped-query."""
    mlp_ratio: int = 4
    """Hidden width of the MLP over `width`."""
    position: PartSpec = "learned"
    norm: PartSpec = "none"
    """Normalisation before attention and MLP in each block. A LayerNorm after the last block is always there."""
    mlp: PartSpec = "gelu"
    attention: PartSpec = "softmax"
    attention_kernel: str = "materialised"
    """NAME is the function kernels.NAME_attention: the same function of its inputs at another speed."""
    dropout: float = 0.0
    """Of embeddings, attention weights and both residual branches."""
    bias: bool = False
    """In linear layers and in LayerNorm."""
    tied_head: bool = True
    """The logit head shares the token embedding's weights."""
    norm_epsilon: float = 1e-5
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in PART_KINDS:
                check_type(field.name, getattr(self, field.name), field.type)
        for name in ("vocabulary_size", "context", "layers", "width", "heads", "queries_per_kv_head", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} heads and width {self.width}")
        if self.heads % self.queries_per_kv_head:
            raise ValueError(f"queries_per_kv_head must divide heads ({self.heads}), got {self.queries_per_kv_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name in ("norm_epsilon", "initial_std"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _check_parts(self)

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads // self.queries_per_kv_head


def _check_parts(config: ModelConfig) -> None:
    for kind in PART_KINDS:
        spec = getattr(config, kind)
        if isinstance(spec, Mapping):
            spec = dict(spec)
            # A copy, so that a change to the caller's mapping does not reach this frozen config.
            object.__setattr__(config, kind, spec)
        check_part(kind, spec)
    find_attention_kernel(config.attention_kernel)
