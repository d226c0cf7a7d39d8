"""rotary_embedding of as many key heads as query heads, half-split; tensors are (B, S, H, C) in memory."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import kernels
from bench.speed.contest import Function
from bench.speed.ops import Case, Normal, both, bytes_per_value, compiled, here, liger, measure_cases
from bench.training.device import Device, open_device
from kernels.rope import rotary_embedding_reference

SIZES = {"cuda": ((8, 16, 2048, 128), (8, 12, 1024, 64)), "cpu": ((2, 4, 128, 32),)}  # (B, H, S, C)
CHECKED = {"cuda": ((2, 3, 1000, 128), (2, 3, 63, 64)), "cpu": ((2, 3, 63, 32),)}
BASE = 10000.0


def measure(config: DictConfig) -> int:
    device = open_device(OmegaConf.to_object(config.device))
    kind = device.torch_device.type
    return measure_cases("rope", cases(CHECKED[kind], device), cases(SIZES[kind], device), config, device)[0]


def cases(sizes: Sequence[tuple[int, int, int, int]], device: Device) -> list[Case]:
    return [case(*size, device) for size in sizes]


def case(batch: int, heads: int, sequence: int, size: int, device: Device) -> Case:
    frequencies = BASE ** -(torch.arange(0, size, 2, device=device.torch_device) / size)
    angles = torch.arange(sequence, device=device.torch_device)[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    doubled = [torch.cat((table, table), -1)[None] for table in (cosines, sines)]
    reference = on_heads(rotary_embedding_reference, cosines, sines)
    memory = Normal((batch, sequence, heads, size))
    moved = 4.0 * batch * sequence * heads * size * bytes_per_value(device)
    return Case(
        name="rotary_embedding",
        sizes={"batch": batch, "heads": heads, "sequence": sequence, "head_size": size},
        inputs={"q": memory, "k": memory},
        ours=on_heads(kernels.rotary_embedding, cosines, sines),
        reference=reference,
        peers={
            "eager": here(reference),
            "compiled": compiled(reference),
            "liger": liger("LigerRopeFunction", lambda apply: on_heads(apply, *doubled)),
        },
        bytes=both(moved, moved),
    )


def on_heads(rotate: Function, *tables: Tensor) -> Function:
    """Of q and k (B, S, H, C), as (B, H, S, C)."""
    return lambda q, k: tuple(rotate(q.transpose(1, 2), k.transpose(1, 2), *tables))
