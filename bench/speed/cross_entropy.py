"""cross_entropy of logits and linear_cross_entropy of a model's head, each summed over the tokens."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional

import kernels
from bench.speed.contest import Function
from bench.speed.ops import Case, Normal, absent, both, bytes_per_value, compiled, here, liger, measure_cases
from bench.training.device import Device, open_device
from kernels.cross_entropy import cross_entropy_reference
from kernels.linear_cross_entropy import linear_cross_entropy_reference

SIZES = {"cuda": ((16384, 768, 50304),), "cpu": ((128, 32, 500),)}  # tokens, width, vocabulary
CHECKED = {"cuda": ((63, 768, 50304), (1000, 768, 50257)), "cpu": ((63, 48, 257),)}


def measure(config: DictConfig) -> int:
    """The check looks at each token's loss."""
    device = open_device(OmegaConf.to_object(config.device))
    kind = device.torch_device.type
    checked = cases(CHECKED[kind], device, summed=False)
    return measure_cases("cross_entropy", checked, cases(SIZES[kind], device, summed=True), config, device)[0]


def cases(sizes: Sequence[tuple[int, int, int]], device: Device, *, summed: bool) -> list[Case]:
    return [make(*size, device, summed) for size in sizes for make in (of_logits, of_linear)]


def of_logits(tokens: int, width: int, vocabulary: int, device: Device, summed: bool) -> Case:
    targets = draw_targets(tokens, vocabulary, device)
    moved = tokens * vocabulary * bytes_per_value(device)
    return Case(
        name="cross_entropy",
        sizes={"tokens": tokens, "vocabulary": vocabulary},
        inputs={"logits": Normal((tokens, vocabulary))},
        ours=with_targets(kernels.cross_entropy, targets, summed),
        reference=with_targets(cross_entropy_reference, targets, summed),
        peers={
            "eager": here(lambda logits: plain(logits, targets)),
            "compiled": compiled(lambda logits: plain(logits, targets)),
            "liger": absent("its forward pass writes the gradient over the logits, so it cannot run on them twice"),
        },
        bytes=both(moved, 2.0 * moved),
    )


def of_linear(tokens: int, width: int, vocabulary: int, device: Device, summed: bool) -> Case:
    targets = draw_targets(tokens, vocabulary, device)
    flops = 2.0 * tokens * width * vocabulary
    return Case(
        name="linear_cross_entropy",
        sizes={"tokens": tokens, "width": width, "vocabulary": vocabulary},
        inputs={"x": Normal((tokens, width)), "weight": Normal((vocabulary, width), width**-0.5)},
        ours=with_targets(kernels.linear_cross_entropy, targets, summed),
        reference=with_targets(linear_cross_entropy_reference, targets, summed),
        peers={
            "eager": here(lambda x, weight: plain(functional.linear(x, weight), targets)),
            "compiled": compiled(lambda x, weight: plain(functional.linear(x, weight), targets)),
            # Its forward pass computes the gradients too.
            "liger": liger("LigerFusedLinearCrossEntropyFunction", lambda apply: liger_sum(apply, targets)),
        },
        flops=both(flops, 2.0 * flops),
    )


def draw_targets(tokens: int, vocabulary: int, device: Device) -> Tensor:
    """Every eighth is ignored."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device.torch_device)
    targets[::8] = -100
    return targets


def with_targets(losses: Function, targets: Tensor, summed: bool) -> Function:
    return lambda *tensors: losses(*tensors, targets).sum() if summed else losses(*tensors, targets)


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def liger_sum(apply: Function, targets: Tensor) -> Function:
    """With the weight's gradient summed in float32, as ours."""
    options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    return lambda x, weight: apply(x, weight, targets, *options)[0]
