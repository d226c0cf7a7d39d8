"""Attention: our kernels are checked against the reference, then timed beside their peers, forward and backward apart.

What is timed is causal. Tensors are (B, H, S, D), and (B, S, H, D) in memory, as a model makes them.
"""

from collections import defaultdict
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import kernels
from bench.config import SpeedConfig
from bench.errors import UserError
from bench.speed.attention_check import RESULTS, Shape, check, draw, first_key_head
from bench.speed.attention_contestants import CONTESTANTS, Attention, Contestant
from bench.speed.attention_figures import figures, progress, table
from bench.speed.contest import Field, NotHere, Plan, hold_contest, measure_all
from bench.speed.record import describe_moment
from bench.training.device import Device, open_device

# By type of device. A shape has as many heads as fill the width, and as many sequences as make up the tokens.
GRIDS = {
    "cuda": SpeedConfig(head_sizes=[128, 64], sequences=[512, 1024, 2048, 4096, 8192, 16384], groups=[1, 4]),
    "cpu": SpeedConfig(head_sizes=[64], sequences=[128, 512], groups=[1]),
}
TOKENS = {"cuda": 16384, "cpu": 1024}
WIDTHS = {"cuda": 2048, "cpu": 256}
BACKWARD_FLOPS = 2.5  # times the forward pass: five products instead of two, because the scores are computed anew
OURS = {"triton": ("ours", "ours_any_order"), "torch": ("ours",)}  # what must run, by implementation
TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}


def measure(config: DictConfig) -> int:
    """Checks, times, prints and records; the exit status is 1 where our kernel was wrong or did not run."""
    device = open_device(OmegaConf.to_object(config.device))
    shapes = choose_shapes(OmegaConf.to_object(config.speed), device)
    implementation = kernels.backend.choose("flash_attention", device.torch_device)
    spent: dict[str, float] = defaultdict(float)
    plan = Plan(
        op="attention",
        title="flash_attention",
        implementation=implementation,
        shapes=shapes,
        check=lambda: check(shapes, device, any_order=implementation == "triton"),
        measure_shape=lambda shape: measure_shape(shape, device, spent),
        progress=partial(progress, titles=TITLES),
        table=partial(table, titles=TITLES),
        required=OURS[implementation],
    )
    status, _ = measure_all(plan, config, device)
    return status


def choose_shapes(wanted: SpeedConfig, device: Device) -> list[Shape]:
    """The product of group sizes, head sizes and sequence lengths, the device's own where none are wanted.

    Raises:
        UserError: a size is not positive.
    """
    kind = device.torch_device.type
    sizes = {}
    for name in ("groups", "head_sizes", "sequences"):
        sizes[name] = getattr(wanted, name) or getattr(GRIDS[kind], name)
        if min(sizes[name]) < 1:
            raise UserError(f"speed.{name} must be numbers above 0, got {list(sizes[name])}")
    shapes = []
    for group, head_size, sequence in product(*sizes.values()):
        key_heads = max(1, WIDTHS[kind] // (head_size * group))
        shapes.append(Shape(max(1, TOKENS[kind] // sequence), key_heads * group, key_heads, sequence, head_size))
    return shapes


def measure_shape(shape: Shape, device: Device, spent: dict[str, float]) -> dict[str, Any]:
    """The row of a shape.

    Args:
        spent: seconds that each contestant took to compile so far, by name; added to.
    """

    def drawn() -> Field:
        inputs = draw(shape, device)
        return Field(inputs[:3], inputs[3:], dict(zip(RESULTS, first_key_head(inputs), strict=True)))

    makes = {each.name: partial(make, each, shape.sequence, device.torch_device) for each in CONTESTANTS}
    only_backward = {contestant.name for contestant in CONTESTANTS if contestant.backward_only}
    titles = {contestant.name: contestant.title for contestant in CONTESTANTS}
    outcome = hold_contest(drawn, makes, titles, device, spent, {"forward": only_backward, "backward": set()})
    return {
        "shape": asdict(shape),
        "forward": figures(outcome.times["forward"], shape.flops, device.peak_flops),
        "backward": figures(outcome.times["backward"], BACKWARD_FLOPS * shape.flops, device.peak_flops),
        "peak_bytes": outcome.peak_bytes,
        "starved": outcome.starved,
        "left_out": outcome.left_out,
        "tiles": tiles(shape, device) if "ours" in outcome.peak_bytes else None,
        "measured": describe_moment(device),
    }


def make(contestant: Contestant, sequence: int, device: torch.device) -> Attention:
    if contestant.device not in (None, device.type):
        raise NotHere("for an NVIDIA GPU only" if contestant.device == "cuda" else "for a CPU only")
    return contestant.make(sequence, device)


def tiles(shape: Shape, device: Device) -> dict[str, dict[str, int]] | None:
    """The tile sizes that our kernels take on this GPU; None where they do not run."""
    kind = device.torch_device
    if kind.type != "cuda" or kernels.backend.choose("flash_attention", kind) != "triton":
        return None
    from kernels.attention.fused.launch import padded, target_architecture
    from kernels.attention.fused.tile_sizes import KERNELS, tile_size

    size, bits = padded(shape.head_size), torch.finfo(getattr(torch, device.precision)).bits
    return {kernel: asdict(tile_size(kernel, target_architecture(), size, bits, True)) for kernel in KERNELS}
