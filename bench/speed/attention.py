"""Attention: our kernels are checked against the reference, then timed beside their peers, forward and backward apart.

What is timed is causal. Tensors are (B, H, S, D), and (B, S, H, D) in memory, as a model makes them.
"""

import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import kernels
from bench.config import SpeedConfig, one_line
from bench.errors import UserError
from bench.speed.attention_check import RESULTS, Shape, check, draw, first_key_head, results, root_mean_square
from bench.speed.attention_contestants import CONTESTANTS, Contestant, NotHere
from bench.speed.attention_figures import figures, progress, table
from bench.speed.record import Record, describe_moment, describe_setting, results_path
from bench.speed.timing import Clock, CudaClock, Step, affordable_rounds, host_seconds, interleave
from bench.training.device import Device, open_device

# By type of device. A shape has as many heads as fill the width, and as many sequences as make up the tokens.
GRIDS = {
    "cuda": SpeedConfig(head_sizes=[128, 64], sequences=[512, 1024, 2048, 4096, 8192, 16384], groups=[1, 4]),
    "cpu": SpeedConfig(head_sizes=[64], sequences=[128, 512], groups=[1]),
}
TOKENS = {"cuda": 16384, "cpu": 1024}
WIDTHS = {"cuda": 2048, "cpu": 256}
BACKWARD_FLOPS = 2.5  # times the forward pass: five products instead of two, because the scores are computed anew
LARGEST_ERROR = 0.03  # of a contestant at a timed shape, relative, in the root mean square
SECONDS = 0.5  # of timing for each contestant, shape and direction
COMPILE_SECONDS = 180.0  # a peer that took this long to compile is left out of the shapes that remain
OURS = {"triton": ("ours", "ours_any_order"), "torch": ("ours",)}  # what must run, by implementation
TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}


class WrongResult(Exception):
    """What a contestant computes is not attention."""


class StepFailed(Exception):
    """Names the contestant whose step raised this exception's cause."""


@dataclass(frozen=True)
class Prepared:
    """What is timed of a contestant, and the bytes that both together need beside q, k, v and d_out."""

    forward: Step
    backward: Step
    peak_bytes: int | None


def measure(config: DictConfig) -> int:
    """Checks, times, prints and records; the exit status is 1 where our kernel was wrong or did not run."""
    began = time.monotonic()
    device = open_device(OmegaConf.to_object(config.device))
    shapes = choose_shapes(OmegaConf.to_object(config.speed), device)
    implementation = kernels.backend.choose("flash_attention", device.torch_device)
    path = results_path(config.paths.speed, device, "attention")
    record = Record(path, "attention", describe_setting(device, implementation))
    print(f"{device.description}, {device.precision}: flash_attention is {implementation}'s; checking it", flush=True)
    cases, failures = check(shapes, device, any_order=implementation == "triton")
    record.note_check(cases, failures)
    for failure in failures:
        print(f"wrong: {failure}", file=sys.stderr)
    print(f"check: {cases - len(failures)} of {cases} cases right", flush=True)
    if failures:
        print("flash_attention failed its check, so nothing is timed", file=sys.stderr)
        return 1
    spent, rows = defaultdict(float), []
    try:
        for number, shape in enumerate(shapes, start=1):
            if config.speed.limit is not None and time.monotonic() - began > config.speed.limit:
                print(f"speed.limit={config.speed.limit:g} is over: {len(rows)} of {len(shapes)} shapes were timed")
                break
            row = measure_shape(shape, device, spent)
            record.add(row)
            rows.append(row)
            print(f"[{number}/{len(shapes)}] {progress(row, TITLES)}", flush=True)
        status = int(any(name in row["left_out"] for row in rows for name in OURS[implementation]))
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} of {len(shapes)} shapes were timed", file=sys.stderr)
        status = 130
    print(table(rows, TITLES))
    if path is not None:
        print(f"results: {path}")
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
    """The row of a shape. What befalls a contestant is noted and leaves the others alone.

    Args:
        spent: seconds that each contestant took to compile so far, by name; added to.
    """
    left_out: dict[str, str] = {}
    prepared: dict[str, Prepared] = {}
    clock = None
    try:
        inputs = draw(shape, device)
        truth = first_key_head(inputs)
        clock = open_clock(device)
    except Exception as error:  # too large for this GPU, or it is in no state to go on
        left_out |= dict.fromkeys(TITLES, reason(error))
    for contestant in CONTESTANTS:
        if contestant.name in left_out:
            continue
        try:
            prepared[contestant.name] = prepare(contestant, inputs, truth, spent)
        except Exception as error:
            left_out[contestant.name] = reason(error)
            if not isinstance(error, NotHere):
                print(f"LEFT OUT: {contestant.title}: {left_out[contestant.name]}", file=sys.stderr, flush=True)
    only_backward = {contestant.name for contestant in CONTESTANTS if contestant.backward_only}
    forward = {name: each.forward for name, each in prepared.items() if name not in only_backward}
    backward = {name: each.backward for name, each in prepared.items()}
    return {
        "shape": asdict(shape),
        "forward": figures(time_steps(forward, clock, left_out), shape.flops, device.peak_flops),
        "backward": figures(time_steps(backward, clock, left_out), BACKWARD_FLOPS * shape.flops, device.peak_flops),
        "peak_bytes": {name: each.peak_bytes for name, each in prepared.items()},
        "starved": getattr(clock, "starved", None),
        "left_out": left_out,
        "tiles": tiles(shape, device) if "ours" in prepared else None,
        "measured": describe_moment(device),
    }


def prepare(contestant: Contestant, inputs: list[Tensor], truth: list[Tensor], spent: dict[str, float]) -> Prepared:
    """Compiles a contestant and compares its results with the truth; raises where it cannot be timed."""
    q, k, v, d_out = inputs
    if contestant.device not in (None, q.device.type):
        raise NotHere("for an NVIDIA GPU only" if contestant.device == "cuda" else "for a CPU only")
    if not contestant.ours and spent[contestant.name] > COMPILE_SECONDS:
        raise NotHere(f"it had already compiled for {COMPILE_SECONDS:.0f} seconds")
    began = time.monotonic()
    try:
        attention = contestant.make(q.shape[2], q.device)
        found = results(attention, inputs)
    finally:
        spent[contestant.name] += time.monotonic() - began
    for name, part, exact in zip(RESULTS, found, truth, strict=True):
        error = root_mean_square(part[:1, : exact.shape[1]] - exact)
        if not error <= LARGEST_ERROR * root_mean_square(exact) + 1e-4:  # not a number is wrong too
            raise WrongResult(f"its {name} is wrong: the error is {error:.2g}, the truth {root_mean_square(exact):.2g}")
    del found
    peak = peak_bytes(lambda: results(attention, inputs)) if q.is_cuda else None
    out = attention(q, k, v)
    backward = partial(torch.autograd.grad, out, (q, k, v), d_out, retain_graph=True)
    return Prepared(partial(attention, q, k, v), backward, peak)


def time_steps(steps: dict[str, Step], clock: Clock, left_out: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each round, by contestant. One whose step fails is left out, and the others are timed anew."""
    steps = {name: naming(name, step) for name, step in steps.items()}
    while steps:
        try:
            began = time.perf_counter()
            interleave(steps, clock, rounds=1, warm_up=2)
            rounds = affordable_rounds(SECONDS * len(steps), (time.perf_counter() - began) / 3)
            return interleave(steps, clock, rounds=rounds)
        except StepFailed as failure:
            (name,) = failure.args
            left_out[name] = reason(failure.__cause__)
            del steps[name]
        except Exception as error:  # the clock's: the GPU is in no state to go on
            left_out.update(dict.fromkeys(steps, reason(error)))
            return {}
    return {}


def naming(name: str, step: Step) -> Step:
    def named() -> None:
        try:
            step()
        except Exception as error:
            raise StepFailed(name) from error

    return named


def peak_bytes(run: Step) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def tiles(shape: Shape, device: Device) -> dict[str, dict[str, int]] | None:
    """The tile sizes that our kernels take on this GPU; None where they do not run."""
    kind = device.torch_device
    if kind.type != "cuda" or kernels.backend.choose("flash_attention", kind) != "triton":
        return None
    from kernels.attention.fused.launch import padded, target_architecture
    from kernels.attention.fused.tile_sizes import KERNELS, tile_size

    size, bits = padded(shape.head_size), torch.finfo(getattr(torch, device.precision)).bits
    return {kernel: asdict(tile_size(kernel, target_architecture(), size, bits, True)) for kernel in KERNELS}


def open_clock(device: Device) -> Clock:
    return CudaClock(device.torch_device) if device.torch_device.type == "cuda" else host_seconds


def reason(error: BaseException | None) -> str:
    text = one_line(error)
    return text if isinstance(error, NotHere | WrongResult) else f"{type(error).__name__}: {text}"[:200]
