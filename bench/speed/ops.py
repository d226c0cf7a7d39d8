"""Cases: an op's function at one size, checked against its reference, then timed beside its peers and a plain copy."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from bench.config import one_line
from bench.speed.contest import (
    Field,
    Function,
    Make,
    NotHere,
    Plan,
    excess,
    hold_contest,
    measure_all,
    outputs,
    results,
)
from bench.speed.ops_figures import DIRECTIONS, TITLES, describe, figures, progress, table
from bench.speed.record import describe_moment
from bench.speed.timing import Step
from bench.training.device import Device
from kernels import backend

GPU_ONLY = ("compiled", "liger")


@dataclass(frozen=True)
class Normal:
    """A tensor of normal random numbers."""

    shape: tuple[int, ...]
    deviation: float = 1.0


@dataclass(frozen=True)
class Case:
    """All contestants, the reference too, are functions of the inputs, and give a tensor or a tuple of tensors."""

    name: str  # of our function
    sizes: dict[str, int]
    inputs: dict[str, Normal]
    ours: Function
    reference: Function
    peers: dict[str, Make] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)  # by direction, without what is computed a second time
    bytes: dict[str, float] = field(default_factory=dict)  # by direction, that must be read and written at least

    @property
    def shape(self) -> dict[str, Any]:
        return {"function": self.name, **self.sizes}


def measure_cases(
    op: str,
    checked: Sequence[Case],
    timed: Sequence[Case],
    config: DictConfig,
    device: Device,
) -> tuple[int, list[dict[str, Any]]]:
    """Checks and times ours on Triton where it can run here, even where `auto` would not take it, else on PyTorch.

    Returns:
        The exit status, 1 where ours was wrong or did not run, and the rows.
    """
    kind = device.torch_device.type
    implementation = "triton" if kind == "cuda" and not backend.why_not_triton(kind) else "torch"
    spent: dict[str, float] = defaultdict(float)
    plan = Plan(
        op=op,
        title=op,
        implementation=implementation,
        shapes=timed,
        check=lambda: check(checked, device),
        measure_shape=lambda case: measure_case(case, device, spent),
        progress=progress,
        table=table,
        required=("ours",),
    )
    with backend.use(implementation):
        return measure_all(plan, config, device)


def check(cases: Sequence[Case], device: Device) -> tuple[int, list[str]]:
    """Whether ours is right in the device's precision and in float32.

    Returns:
        The number of cases, and those where it is wrong or raises, each with what is wrong.
    """
    precisions = list(dict.fromkeys((device.precision, "float32")))
    failures = []
    for case in cases:
        for precision in precisions:
            try:
                problem = check_case(case, device.torch_device, getattr(torch, precision))
            except Exception as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            if problem:
                failures.append(f"{describe(case.shape)}, {precision}: {problem}")
    return len(cases) * len(precisions), failures


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with ours; empty where nothing is."""
    inputs, gradients = draw(case, device, dtype)
    exact_gradients = [gradient.double() for gradient in gradients]
    exact = results(case.reference, [tensor.detach().double().requires_grad_() for tensor in inputs], exact_gradients)
    plain = results(case.reference, inputs, gradients)
    return excess(results(case.ours, inputs, gradients), plain, named(case, exact), torch.finfo(dtype).eps)


def measure_case(case: Case, device: Device, spent: dict[str, float]) -> dict[str, Any]:
    """The row of a case.

    Args:
        spent: seconds that each contestant took to compile so far, by name; added to.
    """

    def drawn() -> Field:
        inputs, gradients = draw(case, device.torch_device, getattr(torch, device.precision))
        wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
        truth = results(case.reference, wide, [gradient.float() for gradient in gradients])
        return Field(inputs, gradients, named(case, truth), copies(case.bytes, device.torch_device))

    makes = {name: partial(on_device, name, make, device) for name, make in case.peers.items()}
    makes = {"ours": lambda: case.ours, **makes}
    everyone = {direction: set() for direction in DIRECTIONS}
    outcome = hold_contest(drawn, makes, TITLES, device, spent, everyone)
    row = {"shape": case.shape}
    for name, times in outcome.times.items():
        row[name] = figures(times, case.flops.get(name), device.peak_flops, case.bytes.get(name))
    return row | {
        "peak_bytes": outcome.peak_bytes,
        "starved": outcome.starved,
        "left_out": outcome.left_out,
        "measured": describe_moment(device),
    }


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and gradients of the outputs, the same every time. A scalar is a loss, whose gradient is 1."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for normal in case.inputs.values():
        tensor = torch.randn(normal.shape, generator=generator, device=device, dtype=dtype)
        inputs.append(tensor.mul_(normal.deviation).requires_grad_())
    with torch.no_grad():
        outs = outputs(case.reference, inputs)
    gradients = []
    for out in outs:
        gradient = torch.empty_like(out)
        gradients.append(gradient.normal_(generator=generator) if out.dim() else gradient.fill_(1.0))
    return inputs, gradients


def named(case: Case, found: list[Tensor]) -> dict[str, Tensor]:
    """Results by name."""
    gradients = [f"gradient of {name}" for name in case.inputs]
    outs = [f"result {number}" for number in range(1, 1 + len(found) - len(gradients))]
    return dict(zip([*outs, *gradients], found, strict=True))


def on_device(name: str, make: Make, device: Device) -> Function:
    if name in GPU_ONLY and device.torch_device.type != "cuda":
        raise NotHere("for an NVIDIA GPU only")
    return make()


def copies(amounts: dict[str, float], device: torch.device) -> dict[str, dict[str, Step]]:
    """By direction a plain copy that reads and writes as many bytes, for the bandwidth that can be had."""
    source = torch.ones(int(max(amounts.values(), default=0.0)) // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    steps = {}
    for direction, amount in amounts.items():
        half = int(amount) // 2
        steps[direction] = {"copy": partial(target[:half].copy_, source[:half])}
    return steps


def bytes_per_value(device: Device) -> int:
    return torch.finfo(getattr(torch, device.precision)).bits // 8


def both(forward: float, backward: float) -> dict[str, float]:
    """Amounts by direction."""
    return dict(zip(DIRECTIONS, (forward, backward, forward + backward), strict=True))


def here(function: Function) -> Make:
    return lambda: function


def compiled(function: Function) -> Make:
    def make() -> Function:
        import torch._functorch.config

        torch.compiler.reset()  # one function may be compiled eight times only
        torch._functorch.config.donated_buffer = False  # refuses to run a backward pass twice after one forward pass
        return torch.compile(function, dynamic=False, fullgraph=True)

    return make


def absent(why: str) -> Make:
    def make() -> Function:
        raise NotHere(why)

    return make


def liger(name: str, adapt: Callable[[Function], Function]) -> Make:
    """A contestant that `adapt` makes of the function that applies this class of `liger_kernel.ops`."""

    def make() -> Function:
        try:
            import liger_kernel.ops
        except ModuleNotFoundError as error:
            raise NotHere(f"{error.name} is not installed; it comes with the package liger-kernel") from None
        return adapt(getattr(liger_kernel.ops, name).apply)

    return make
