"""rms_norm and layer_norm, with and without a residual."""

from collections.abc import Sequence
from itertools import product

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional

import kernels
from bench.speed.contest import Function, Make
from bench.speed.ops import Case, Normal, absent, both, bytes_per_value, compiled, here, liger, measure_cases
from bench.training.device import Device, open_device
from kernels.norm import layer_norm_reference, rms_norm_reference

SIZES = {"cuda": ((16384, 4096), (16384, 768)), "cpu": ((256, 96),)}
CHECKED = {"cuda": ((63, 4096), (1000, 768)), "cpu": ((63, 100),)}
EPSILON = 1e-5
REFERENCES = {"rms_norm": rms_norm_reference, "layer_norm": layer_norm_reference}


def measure(config: DictConfig) -> int:
    device = open_device(OmegaConf.to_object(config.device))
    kind = device.torch_device.type
    return measure_cases("norm", cases(CHECKED[kind], device), cases(SIZES[kind], device), config, device)[0]


def cases(sizes: Sequence[tuple[int, int]], device: Device) -> list[Case]:
    return [case(*each, device) for each in product(REFERENCES, sizes, (False, True))]


def case(name: str, size: tuple[int, int], residual: bool, device: Device) -> Case:
    rows, width = size
    inputs = {"x": Normal(size), "weight": Normal((width,))}
    inputs |= {"bias": Normal((width,))} if name == "layer_norm" else {}
    inputs |= {"residual": Normal(size)} if residual else {}
    moved = rows * width * bytes_per_value(device)
    return Case(
        name=name,
        sizes={"rows": rows, "width": width, "residual": int(residual)},
        inputs=inputs,
        ours=with_residual_last(getattr(kernels, name), residual),
        reference=with_residual_last(REFERENCES[name], residual),
        peers={
            "eager": here(with_residual_last(PLAIN[name], residual)),
            "compiled": compiled(with_residual_last(PLAIN[name], residual)),
            "liger": LIGER[name, residual],
        },
        # x and y, x and the two gradients; with a residual also that and the sum, and the sum's gradient.
        bytes=both(4.0 * moved, 4.0 * moved) if residual else both(2.0 * moved, 3.0 * moved),
    )


def with_residual_last(norm: Function, residual: bool) -> Function:
    if not residual:
        return lambda x, *parameters: norm(x, *parameters, epsilon=EPSILON)
    return lambda x, *parameters: norm(x, *parameters[:-1], residual=parameters[-1], epsilon=EPSILON)


def plain_rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, epsilon: float):
    h = x if residual is None else x + residual
    y = functional.rms_norm(h, weight.shape, weight, epsilon)
    return y if residual is None else (y, h)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, epsilon: float):
    h = x if residual is None else x + residual
    y = functional.layer_norm(h, weight.shape, weight, bias, epsilon)
    return y if residual is None else (y, h)


PLAIN = {"rms_norm": plain_rms_norm, "layer_norm": plain_layer_norm}
# "gemma" has all of it in float32, as ours; the last argument would write over the gradient that it is given.
LIGER: dict[tuple[str, bool], Make] = {
    ("rms_norm", False): liger(
        "LigerRMSNormFunction", lambda apply: lambda x, weight: apply(x, weight, EPSILON, 0.0, "gemma", False)
    ),
    ("rms_norm", True): liger(
        "LigerFusedAddRMSNormFunction",
        lambda apply: lambda x, weight, residual: apply(x, residual, weight, EPSILON, 0.0, "gemma", False),
    ),
    ("layer_norm", False): liger(
        "LigerLayerNormFunction", lambda apply: lambda x, weight, bias: apply(x, weight, bias, EPSILON)
    ),
    ("layer_norm", True): absent("Liger-Kernel has no layer norm with a residual"),
}
