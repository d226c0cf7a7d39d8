"""The reference against the definition of attention, one query at a time."""

import functools
import math

import pytest
import torch
from torch import Tensor

from kernels import materialised_attention


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    batch, heads, sequence, _ = q.shape
    group = heads // k.shape[1]
    out = torch.full((batch, heads, sequence, v.shape[-1]), math.nan, dtype=q.dtype)
    for b in range(batch):
        ids = [0] * sequence if document_ids is None else document_ids[b].tolist()
        for h in range(heads):
            for i in range(sequence):
                first, last = i, i
                while first > 0 and ids[first - 1] == ids[i] and (window is None or i - first < window):
                    first -= 1
                while not causal and last < sequence - 1 and ids[last + 1] == ids[i]:
                    last += 1
                seen = slice(first, last + 1)
                scores = (k[b, h // group, seen] * q[b, h, i]).sum(-1) * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                weights = scores.exp() / scores.exp().sum()
                out[b, h, i] = (weights[:, None] * v[b, h // group, seen]).sum(0)
    return out


def random_inputs(heads: int, key_heads: int, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(heads, 5), (key_heads, 5), (key_heads, 3)]
    return tuple(torch.randn(2, h, sequence, size, dtype=torch.float64) for h, size in shapes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.3])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("sequence", [1, 2, 13])
def test_definition_in_float64(sequence, heads, key_heads, scale, causal) -> None:
    inputs = random_inputs(heads, key_heads, sequence)
    expected = by_definition(*inputs, causal=causal, scale=1 / math.sqrt(5) if scale is None else scale)
    torch.testing.assert_close(materialised_attention(*inputs, causal=causal, scale=scale), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 1, 4, 12, 100])
@pytest.mark.parametrize("softcap", [None, 0.4])
@pytest.mark.parametrize("documents", [False, True])
def test_what_a_query_sees(causal, window, softcap, documents) -> None:
    inputs = random_inputs(4, 2, 13)
    ids = torch.tensor([[7] * 5 + [2] + [7] * 7, [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, -5, 3, 3]]) if documents else None
    options = {"causal": causal, "window": window, "softcap": softcap, "document_ids": ids, "scale": 1.5}
    torch.testing.assert_close(materialised_attention(*inputs, **options), by_definition(*inputs, **options))


@pytest.mark.parametrize("options", [{}, {"softcap": 0.5}, {"window": 2, "causal": False, "scale": 1.5}])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_gradients_by_finite_differences(key_heads, options) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(4, key_heads, 5)]
    assert torch.autograd.gradcheck(functools.partial(materialised_attention, **options), inputs, fast_mode=True)


def test_large_scores_do_not_overflow() -> None:
    q = torch.full((1, 1, 7, 4), 1e4)
    v = torch.randn(1, 1, 7, 4)
    torch.testing.assert_close(
        materialised_attention(q, q, v), v.cumsum(2) / torch.arange(1, 8)[:, None], atol=1e-5, rtol=1e-5
    )


def test_inputs_are_left_alone() -> None:
    inputs = [torch.randn(2, 4, 9, 8) for _ in range(3)]
    before = [tensor.clone() for tensor in inputs]
    materialised_attention(*inputs, softcap=2.0, window=3)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_dtypes_stay(dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in random_inputs(4, 2, 9)]
    assert materialised_attention(*inputs, softcap=2.0, window=3).dtype == dtype
