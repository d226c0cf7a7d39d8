"""The validation loss: the same tokens for every variant, with its standard error."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bench.training.device import Device
from bench.training.world import ALONE, World


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    standard_error: float | None  # of `loss`, over sequences; None for a single sequence
    tokens: int
    bits_per_byte: float | None  # None where the bytes of the tokens are not known


class Evaluator:
    """Evaluates models on fixed sequences, each process its share of them.

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
        world: World = ALONE,
    ) -> None:
        self.inputs, self.targets = torch.from_numpy(inputs), torch.from_numpy(targets)
        self.bytes = None if token_bytes is None else int(token_bytes[targets].sum(dtype=np.int64))
        self.micro_batch = micro_batch
        self.device, self.world = device, world

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Evaluation:
        was_training = model.training
        model.eval()
        means = []
        count = len(self.inputs)
        share = -(-count // self.world.size)
        # All processes make the same number of passes, as sharded models need: the last repeat the last sequence.
        own = torch.arange(self.world.rank * share, (self.world.rank + 1) * share).clamp(max=count - 1)
        for rows in own.split(self.micro_batch):
            inputs, targets = (part[rows].to(self.device.torch_device) for part in (self.inputs, self.targets))
            with self.device.autocast():
                losses = model(inputs, targets)
            means.append(losses.double().mean(dim=1).cpu())
        model.train(was_training)
        per_sequence = self.world.concatenate(torch.cat(means))[:count]
        loss = per_sequence.mean().item()
        error = per_sequence.std().item() / math.sqrt(count) if count > 1 else None
        bits = None if not self.bytes else loss * self.targets.numel() / math.log(2) / self.bytes
        return Evaluation(loss, error, self.targets.numel(), bits)
