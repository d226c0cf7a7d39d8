"""Where documents begin and end, and what attention makes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import flash_attention
from kernels.attention.documents import document_bounds
from tests.kernels.attention.exactness import DEVICE, IMPLEMENTATIONS, random_inputs, running

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@given(st.integers(0, 20).flatmap(lambda n: st.lists(st.lists(st.integers(-2, 1), min_size=n, max_size=n), max_size=3)))
def test_bounds_of_runs_of_equal_ids(rows) -> None:
    sequence = len(rows[0]) if rows else 0
    starts, ends = document_bounds(torch.tensor(rows, dtype=torch.int64).view(len(rows), sequence))
    assert starts.dtype == ends.dtype == torch.int32
    assert starts.shape == ends.shape == (len(rows), sequence)
    for ids, firsts, lasts in zip(rows, starts.tolist(), ends.tolist(), strict=True):
        for i, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            assert 0 <= first <= i <= last < sequence
            assert len(set(ids[first : last + 1])) == 1
            assert first == 0 or ids[first - 1] != ids[i]
            assert last == sequence - 1 or ids[last + 1] != ids[i]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype) -> None:
    starts, ends = document_bounds(torch.tensor([[1, 1, 0, 1]], dtype=dtype))
    assert starts.tolist() == [[0, 0, 2, 3]]
    assert ends.tolist() == [[1, 1, 2, 3]]


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_one_document_equals_none(implementation, causal) -> None:
    inputs, _ = random_inputs((2, 2, 1, 40, 16, 16), torch.float32)
    with running(implementation):
        one = flash_attention(*inputs, causal=causal, document_ids=torch.full((2, 40), 5, device=DEVICE))
        torch.testing.assert_close(one, flash_attention(*inputs, causal=causal))


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_a_document_for_each_position_gives_its_value(implementation, causal) -> None:
    (q, k, v), _ = random_inputs((2, 2, 2, 40, 16, 16), torch.float32)
    ids = torch.arange(40, device=DEVICE).expand(2, -1) % 2
    with running(implementation):
        torch.testing.assert_close(flash_attention(q, k, v, causal=causal, document_ids=ids), v)


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_documents_equal_separate_calls(implementation, causal) -> None:
    (q, k, v), _ = random_inputs((1, 2, 1, 70, 16, 16), torch.float32)
    lengths = [5, 33, 1, 31]
    ids = torch.tensor([3, 8, 3, 8], device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))[None]
    with running(implementation):
        packed = flash_attention(q, k, v, causal=causal, document_ids=ids)
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        apart = torch.cat([flash_attention(*part, causal=causal) for part in parts], 2)
    torch.testing.assert_close(packed, apart)
