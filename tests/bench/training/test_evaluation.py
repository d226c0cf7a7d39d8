import math

import numpy as np
import pytest
import torch
from torch import nn

from bench.config import DeviceConfig
from bench.training.device import open_device
from bench.training.evaluation import Evaluator

DEVICE = open_device(DeviceConfig(name="cpu"))


class Stub(nn.Module):
    """The loss of a token is its target's number; in training mode it would be NaN."""

    def forward(self, inputs, targets):
        assert not torch.is_grad_enabled()
        return targets.float() * (math.nan if self.training else 1.0)


def evaluate(targets, *, token_bytes=None, micro_batch=2):
    targets = np.asarray(targets, dtype=np.int64)
    model = Stub()
    found = Evaluator(np.zeros_like(targets), targets, token_bytes=token_bytes, micro_batch=micro_batch, device=DEVICE)(
        model
    )
    assert model.training, "the mode is put back"
    return found


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 100])
def test_mean_and_standard_error_over_sequences(micro_batch):
    targets = [[1, 3], [2, 4], [0, 0], [7, 1], [5, 5]]
    found = evaluate(targets, micro_batch=micro_batch)
    means = np.mean(targets, axis=1)
    assert found.loss == pytest.approx(means.mean())
    assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(5))
    assert found.tokens == 10


def test_bits_per_byte_counts_the_bytes_of_the_targets():
    token_bytes = np.array([1, 2, 4], dtype=np.uint8)
    found = evaluate([[1, 2], [2, 2]], token_bytes=token_bytes)
    assert found.bits_per_byte == pytest.approx((1 + 2 + 2 + 2) / math.log(2) / (2 + 4 + 4 + 4))
    assert evaluate([[1, 2], [2, 2]]).bits_per_byte is None


def test_one_sequence_has_no_standard_error():
    assert evaluate([[1, 2]]).standard_error is None
