"""Rotations: against complex numbers, and the two properties that define RoPE."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import ModelConfig
from models.position.rope import RotaryPositions

CONTEXT, SIZE = 64, 8


def rope(**options: float) -> RotaryPositions:
    config = ModelConfig(vocabulary_size=5, context=CONTEXT, layers=1, width=4 * SIZE, heads=4)
    return RotaryPositions(config, **options)


def at(vector: Tensor, position: int) -> Tensor:
    """The vector as the only non-zero one of a sequence, (1, 1, CONTEXT, SIZE)."""
    return torch.zeros(1, 1, CONTEXT, SIZE).index_fill(2, torch.tensor([position]), 1.0) * vector


def turned(positions: RotaryPositions, vector: Tensor, position: int) -> Tensor:
    return positions.rotate(at(vector, position), at(vector, position))[0][0, 0, position]


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_pairs_are_multiplied_by_unit_complex_numbers(base) -> None:
    q, k = torch.randn(2, 4, 50, SIZE), torch.randn(2, 2, 50, SIZE)
    for result, x in zip(rope(base=base).rotate(q, k), (q, k), strict=True):
        angles = torch.arange(50.0)[:, None] / base ** (torch.arange(0, SIZE, 2) / SIZE)
        expected = torch.complex(x[..., : SIZE // 2], x[..., SIZE // 2 :]) * torch.polar(torch.ones(50, 4), angles)
        torch.testing.assert_close(result, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=1e-5)


def test_the_default_base_is_that_of_the_paper() -> None:
    q = torch.randn(1, 4, CONTEXT, SIZE)
    assert torch.equal(rope().rotate(q, q)[0], rope(base=10000.0).rotate(q, q)[0])


@settings(max_examples=60)
@given(
    first=st.integers(0, CONTEXT - 1),
    second=st.integers(0, CONTEXT - 1),
    shift=st.integers(0, CONTEXT - 1),
    seed=st.integers(0, 1000),
    base=st.floats(2.0, 1e6),
)
def test_products_depend_on_the_distance_alone(first, second, shift, seed, base) -> None:
    shift = min(shift, CONTEXT - 1 - max(first, second))
    q, k = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed))
    positions = rope(base=base)
    here = turned(positions, q, first) @ turned(positions, k, second)
    there = turned(positions, q, first + shift) @ turned(positions, k, second + shift)
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(position=st.integers(0, CONTEXT - 1), seed=st.integers(0, 1000))
def test_norms_are_preserved(position, seed) -> None:
    q = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(turned(rope(), q, position).norm(), q.norm())


def test_the_first_position_and_the_embeddings_are_left_alone() -> None:
    q, x = torch.randn(SIZE), torch.randn(2, 7, 4 * SIZE)
    assert torch.equal(turned(rope(), q, 0), q)
    assert rope().embed(x) is x


def test_positions_are_told_apart() -> None:
    q = torch.ones(SIZE)
    results = torch.stack([turned(rope(), q, position) for position in range(CONTEXT)])
    distances = torch.cdist(results, results) + torch.eye(CONTEXT)
    assert distances.min() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype) -> None:
    q = torch.randn(1, 4, 9, SIZE, dtype=dtype)
    assert all(result.dtype == dtype for result in rope().rotate(q, q))


def test_it_has_no_weights_and_no_flops() -> None:
    assert not rope().state_dict()
    assert rope().flops(CONTEXT) == 0


def test_mistakes() -> None:
    odd = ModelConfig(vocabulary_size=5, context=8, layers=1, width=6, heads=2)
    with pytest.raises(ValueError, match="position: rope needs an even head size, got width / heads = 3"):
        RotaryPositions(odd)
    for base in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="position: base must be positive, got"):
            rope(base=base)
