"""The reference against the definition of attention, one query at a time."""

import math

import pytest
import torch
from torch import Tensor

from kernels import materialised_attention


def by_definition(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    batch, heads, sequence, _ = q.shape
    group = heads // k.shape[1]
    out = torch.full((batch, heads, sequence, v.shape[-1]), math.nan, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(sequence):
                keys = i + 1 if causal else sequence
                scores = (k[b, h // group, :keys] * q[b, h, i]).sum(-1) * scale
                weights = scores.exp() / scores.exp().sum()
                out[b, h, i] = (weights[:, None] * v[b, h // group, :keys]).sum(0)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("sequence", [1, 2, 13])
def test_definition_in_float64(sequence, heads, key_heads, scale, causal) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, sequence, 5, dtype=torch.float64)
    k = torch.randn(2, key_heads, sequence, 5, dtype=torch.float64)
    v = torch.randn(2, key_heads, sequence, 3, dtype=torch.float64)
    expected = by_definition(q, k, v, causal, 1 / math.sqrt(5) if scale is None else scale)
    torch.testing.assert_close(materialised_attention(q, k, v, causal=causal, scale=scale), expected)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_gradients_by_finite_differences(key_heads) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, key_heads, 5, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, key_heads, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(materialised_attention, (q, k, v), fast_mode=True)


def test_large_scores_do_not_overflow() -> None:
    q = torch.full((1, 1, 7, 4), 1e4)
    v = torch.randn(1, 1, 7, 4)
    torch.testing.assert_close(
        materialised_attention(q, q, v), v.cumsum(2) / torch.arange(1, 8)[:, None], atol=1e-5, rtol=1e-5
    )


def test_inputs_are_left_alone() -> None:
    inputs = [torch.randn(2, 4, 9, 8) for _ in range(3)]
    before = [tensor.clone() for tensor in inputs]
    materialised_attention(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
