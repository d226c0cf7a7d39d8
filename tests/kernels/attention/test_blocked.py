"""What blocks of queries are for: memory linear in the sequence. Values are held in test_flash.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import blocked
from kernels.attention.documents import document_bounds
from kernels.attention.options import AttentionOptions

SEQUENCE = 2048


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest(options: AttentionOptions) -> int:
    """Elements of the largest tensor in a forward and a backward pass of one head."""
    q, k, v, d_out, out, dq, dk, dv = (torch.randn(1, 1, SEQUENCE, 8) for _ in range(8))
    lse = torch.empty(1, 1, SEQUENCE)
    with Largest() as mode:
        blocked.forward(q, k, v, out, lse, options)
        blocked.backward(d_out, q, k, v, out, lse, dq, dk, dv, options)
    return mode.elements


def options(document_ids: Tensor | None = None, window: int | None = None, dropout_p: float = 0.0) -> AttentionOptions:
    starts, ends = (None, None) if document_ids is None else document_bounds(document_ids)
    return AttentionOptions(starts, ends, torch.tensor([5]), True, window, 5.0, dropout_p, 0.3, True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_no_score_matrix(dropout_p) -> None:
    assert largest(options(dropout_p=dropout_p)) == blocked.ROWS * SEQUENCE


def test_keys_outside_the_window_are_not_touched() -> None:
    assert largest(options(window=64)) == blocked.ROWS * (blocked.ROWS + 64)


def test_keys_of_other_documents_are_not_touched() -> None:
    ids = torch.arange(SEQUENCE)[None] // blocked.ROWS
    assert largest(options(document_ids=ids)) == blocked.ROWS**2
