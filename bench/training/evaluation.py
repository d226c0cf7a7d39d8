"""The validation loss: the same tokens for every variant, with its standard error."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bench.training.device import Device


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    standard_error: float | None  # of `loss`, over sequences; None for a single sequence
    tokens: int
    bits_per_byte: float | None  # None where the bytes of the tokens are not known


class Evaluator:
    """Evaluates models on fixed sequences.

    Args:
        inputs, targets: (sequences, context) int64 token ids.
        token_bytes: bytes of each token id, or None.
        micro_batch: sequences per forward pass.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        *,
        token_bytes: np.ndarray | None,
        micro_batch: int,
        device: Device,
    ) -> None:
        self.inputs, self.targets = torch.from_numpy(inputs), torch.from_numpy(targets)
        self.bytes = None if token_bytes is None else int(token_bytes[targets].sum(dtype=np.int64))
        self.micro_batch = micro_batch
        self.device = device

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Evaluation:
        was_training = model.training
        model.eval()
        means = []
        for inputs, targets in zip(
            self.inputs.split(self.micro_batch), self.targets.split(self.micro_batch), strict=True
        ):
            with self.device.autocast():
                losses = model(inputs.to(self.device.torch_device), targets.to(self.device.torch_device))
            means.append(losses.double().mean(dim=1).cpu())
        model.train(was_training)
        per_sequence = torch.cat(means)
        count = len(per_sequence)
        loss = per_sequence.mean().item()
        error = per_sequence.std().item() / math.sqrt(count) if count > 1 else None
        bits = None if not self.bytes else loss * self.targets.numel() / math.log(2) / self.bytes
        return Evaluation(loss, error, self.targets.numel(), bits)
