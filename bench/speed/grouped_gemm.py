"""grouped_gemm of tokens that are spread over the experts at random."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional

import kernels
from bench.speed.contest import Function
from bench.speed.ops import Case, Normal, both, compiled, here, measure_cases
from bench.training.device import Device, open_device
from kernels.grouped_gemm import grouped_gemm_reference

SIZES = {"cuda": ((16384, 8, 768, 3072), (16384, 64, 768, 3072)), "cpu": ((256, 4, 32, 64),)}  # tokens, experts, D, F
CHECKED = {"cuda": ((63, 8, 768, 3072), (1000, 64, 768, 3072)), "cpu": ((63, 8, 24, 40),)}


def measure(config: DictConfig) -> int:
    device = open_device(OmegaConf.to_object(config.device))
    kind = device.torch_device.type
    return measure_cases("grouped_gemm", cases(CHECKED[kind], device), cases(SIZES[kind], device), config, device)[0]


def cases(sizes: Sequence[tuple[int, int, int, int]], device: Device) -> list[Case]:
    return [case(*size, device) for size in sizes]


def case(tokens: int, experts: int, width: int, features: int, device: Device) -> Case:
    offsets = draw_offsets(tokens, experts, device)
    reference = with_offsets(grouped_gemm_reference, offsets)
    flops = 2.0 * tokens * width * features
    return Case(
        name="grouped_gemm",
        sizes={"tokens": tokens, "experts": experts, "width": width, "features": features},
        inputs={"x": Normal((tokens, width)), "weight": Normal((experts, width, features), width**-0.5)},
        ours=with_offsets(kernels.grouped_gemm, offsets),
        reference=reference,
        peers={
            "eager": here(reference),
            "grouped_mm": here(with_grouped_mm(offsets)),
            "compiled": compiled(with_grouped_mm(offsets)),
        },
        flops=both(flops, 2.0 * flops),
    )


def draw_offsets(tokens: int, experts: int, device: Device) -> Tensor:
    """Where each expert's tokens end."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    chosen = torch.randint(experts, (tokens,), generator=generator, device=device.torch_device)
    return chosen.bincount(minlength=experts).cumsum(0).to(torch.int32)


def with_offsets(product: Function, offsets: Tensor) -> Function:
    return lambda x, weight: product(x, weight, offsets)


def with_grouped_mm(offsets: Tensor) -> Function:
    return lambda x, weight: functional.grouped_mm(x, weight, offs=offsets)
