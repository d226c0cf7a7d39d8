"""Whether attention is right: flash_attention on small odd shapes, and the truth about a part of a large one."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

import kernels
from bench.config import one_line
from bench.speed import contest
from bench.speed.attention_contestants import Attention
from bench.training.device import Device

CHECKED_SEQUENCES = (63, 1000)
RESULTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    key_heads: int
    sequence: int
    head_size: int

    @property
    def flops(self) -> float:
        """Of the forward pass: two products, of which the causal mask leaves half."""
        return 2.0 * self.batch * self.heads * self.sequence**2 * self.head_size


def check(shapes: list[Shape], device: Device, *, any_order: bool) -> tuple[int, list[str]]:
    """Whether flash_attention is right for the head and group sizes of `shapes`, causal and not, at odd lengths.

    Args:
        any_order: checks it with sums in any order too.
    Returns:
        The number of cases, and those where it is wrong or raises, each with what is wrong.
    """
    sizes = dict.fromkeys((shape.head_size, shape.heads // shape.key_heads) for shape in shapes)
    cases = list(product(sizes, CHECKED_SEQUENCES, (True, False), (True, False) if any_order else (True,)))
    failures = []
    for (head_size, group), sequence, causal, deterministic in cases:
        try:
            problem = check_case(head_size, group, sequence, causal, deterministic, device)
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
        if problem:
            case = f"head size {head_size}, {group} query heads a key head, {sequence} positions"
            case += (", causal" if causal else ", not causal") + ("" if deterministic else ", sums in any order")
            failures.append(f"{case}: {problem}")
    return len(cases), failures


def check_case(head_size: int, group: int, sequence: int, causal: bool, deterministic: bool, device: Device) -> str:
    """What is wrong with flash_attention; empty where its error, beside the reference in float64, is at most twice that
    of the reference in the same dtype, plus a few ulp.
    """
    inputs = draw(Shape(2, 2 * group, 2, sequence, head_size), device)
    reference = partial(kernels.materialised_attention, causal=causal)
    exact = results(reference, [tensor.detach().double().requires_grad_() for tensor in inputs])
    plain = results(reference, inputs)
    with kernels.backend.use("auto", deterministic=deterministic):
        fused = results(lambda q, k, v: kernels.flash_attention(q, k, v, causal=causal), inputs)
    # Fused backward passes subtract float32 numbers of this size, which cancel where a query sees one key.
    values = inputs[2].detach().double().repeat_interleave(group, 1)
    cancelled = (inputs[3].double() @ values.mT).abs().max() * torch.finfo(torch.float32).eps
    named = dict(zip(RESULTS, exact, strict=True))
    return contest.excess(fused, plain, named, torch.finfo(inputs[0].dtype).eps, cancelled)


def draw(shape: Shape, device: Device) -> list[Tensor]:
    """Normal q, k, v and d_out, the same every time; zeros would let the GPU clock higher than real data do."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    dtype = getattr(torch, device.precision)
    tensors = []
    for heads in (shape.heads, shape.key_heads, shape.key_heads, shape.heads):
        size = (shape.batch, shape.sequence, heads, shape.head_size)
        tensors.append(torch.randn(size, generator=generator, device=device.torch_device, dtype=dtype).transpose(1, 2))
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


def results(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """out, dq, dk and dv for q, k, v and d_out."""
    return contest.results(attention, inputs[:3], inputs[3:])


def first_key_head(inputs: list[Tensor]) -> list[Tensor]:
    """`results` of the reference in float32 for the first sequence's first key head, one of its query heads at a time
    to need little memory.
    """
    q, k, v, d_out = (tensor.detach()[:1].float() for tensor in inputs)
    parts = []
    for head in range(q.shape[1] // k.shape[1]):
        part = [q[:, head : head + 1], k[:, :1], v[:, :1], d_out[:, head : head + 1]]
        parts.append(results(kernels.materialised_attention, [tensor.clone().requires_grad_() for tensor in part]))
    out, dq, dk, dv = zip(*parts, strict=True)
    return [torch.cat(out, 1), torch.cat(dq, 1), sum(dk), sum(dv)]
