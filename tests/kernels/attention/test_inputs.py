"""Both kernels refuse the same inputs, naming the argument."""

import pytest
import torch

from kernels import flash_attention, materialised_attention

KERNELS = pytest.mark.parametrize("kernel", [materialised_attention, flash_attention])


@KERNELS
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(4, 8, 16)}, r"^q must have 4 dimensions .* got \(4, 8, 16\)"),
        ({"v": torch.zeros(8, 16)}, r"^v must have 4 dimensions"),
        ({"q": torch.zeros(2, 4, 8, 16, dtype=torch.int64)}, r"^q must have a floating dtype, got torch.int64"),
        ({"k": torch.zeros(2, 2, 8, 16, dtype=torch.float64)}, r"^k must have the dtype of q, torch.float32"),
        ({"v": torch.zeros(2, 2, 8, 16, device="meta")}, r"^v must be on the device of q, cpu, got meta"),
        ({"k": torch.zeros(3, 2, 8, 16)}, r"^k must have the batch and sequence of q, \(2, 4, 8, 16\)"),
        ({"v": torch.zeros(2, 2, 9, 16)}, r"^v must have the batch and sequence of q"),
        ({"k": torch.zeros(2, 2, 8, 32)}, r"^k must have the head size of q, 16, got 32"),
        ({"v": torch.zeros(2, 1, 8, 16)}, r"^v must have as many heads as k, 2, got 1"),
        (
            {"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)},
            r"^k must have a number of heads that divides",
        ),
        (
            {"k": torch.zeros(2, 0, 8, 16), "v": torch.zeros(2, 0, 8, 16)},
            r"^k must have a number of heads that divides",
        ),
        ({"dropout_p": 1.0}, r"^dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"^dropout_p must lie in"),
        ({"dropout_p": float("nan")}, r"^dropout_p must lie in"),
        ({"window": -1}, r"^window must be a number of keys, 0 or more, got -1"),
        ({"softcap": 0.0}, r"^softcap must be a positive number, got 0.0"),
        ({"softcap": -30.0}, r"^softcap must be a positive number, got -30.0"),
        ({"softcap": float("nan")}, r"^softcap must be a positive number, got nan"),
        ({"softcap": float("inf")}, r"^softcap must be a positive number, got inf"),
        ({"scale": float("nan")}, r"^scale must be finite, got nan"),
        ({"scale": float("-inf")}, r"^scale must be finite, got -inf"),
        ({"document_ids": torch.zeros(8, dtype=torch.int64)}, r"^document_ids must have q's .* \(2, 8\), got \(8,\)"),
        ({"document_ids": torch.zeros(1, 8, dtype=torch.int64)}, r"^document_ids must have q's batch and sequence"),
        ({"document_ids": torch.zeros(2, 8)}, r"^document_ids must have an integer dtype, got torch.float32"),
        ({"document_ids": torch.zeros(2, 8, dtype=torch.bool)}, r"^document_ids must have an integer dtype"),
        (
            {"document_ids": torch.zeros(2, 8, dtype=torch.int64, device="meta")},
            r"^document_ids must be on the device of q, cpu, got meta",
        ),
    ],
)
def test_a_mistake_is_named(kernel, changed, message) -> None:
    arguments = {"q": torch.zeros(2, 4, 8, 16), "k": torch.zeros(2, 2, 8, 16), "v": torch.zeros(2, 2, 8, 16)} | changed
    with pytest.raises(ValueError, match=message):
        kernel(**arguments)
