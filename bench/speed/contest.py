"""Contests: contestants are compared with the truth and timed in turns at each shape, once our op passed its check.

What befalls one contestant is noted by name and reason and leaves the others alone.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from bench.config import one_line
from bench.speed.figures import is_ours
from bench.speed.record import Record, describe_setting, results_path
from bench.speed.timing import Clock, CudaClock, Step, affordable_rounds, host_seconds, interleave
from bench.training.device import Device

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Make = Callable[[], Function]  # prepares a contestant, and raises where it cannot

LARGEST_ERROR = 0.03  # of a contestant at a timed shape, relative, in the root mean square
SECONDS = 0.5  # of timing for each contestant, shape and direction
COMPILE_SECONDS = 180.0  # a peer that took this long to compile is left out of the shapes that remain


class NotHere(Exception):
    """Why a contestant does not take part, where nothing is wrong with that."""


class WrongResult(Exception):
    """What a contestant computes is not what it should."""


class StepFailed(Exception):
    """Names the contestant whose step raised this exception's cause."""


@dataclass(frozen=True)
class Plan:
    """What is checked, timed and shown. A shape is anything that `measure_shape` makes a row of."""

    op: str
    title: str  # what is checked
    implementation: str  # of ours: triton or torch
    shapes: Sequence[Any]
    check: Callable[[], tuple[int, list[str]]]  # the number of cases, and what is wrong
    measure_shape: Callable[[Any], dict[str, Any]]
    progress: Callable[[dict[str, Any]], str]
    table: Callable[[list[dict[str, Any]]], str]
    required: Sequence[str]  # contestants without which the exit status is 1


@dataclass(frozen=True)
class Field:
    """The inputs of a contest at one shape, the gradients of the outputs, and the truth by name of result, of which a
    part will do: it is compared with as much of a contestant's, from the start of each dimension. `beside` has further
    steps that are timed, by direction and name.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    truth: dict[str, Tensor]
    beside: dict[str, dict[str, Step]] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What is timed of a contestant, and the bytes that `both` needs beside inputs and gradients."""

    forward: Step
    backward: Step
    both: Step
    peak_bytes: int | None


@dataclass
class Outcome:
    """Seconds of each round by direction and contestant, and what else a row says of a contest."""

    times: dict[str, dict[str, list[float]]]
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    starved: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def measure_all(plan: Plan, config: DictConfig, device: Device) -> tuple[int, list[dict[str, Any]]]:
    """Checks, times, prints and records.

    Returns:
        The exit status, 1 where ours was wrong or did not run, and the rows.
    """
    began = time.monotonic()
    path = results_path(config.paths.speed, device, plan.op)
    record = Record(path, plan.op, describe_setting(device, plan.implementation))
    name = f"{device.description}, {device.precision}"
    print(f"{name}: {plan.title} is {plan.implementation}'s; checking it", flush=True)
    cases, failures = plan.check()
    record.note_check(cases, failures)
    for failure in failures:
        print(f"wrong: {failure}", file=sys.stderr)
    print(f"check: {cases - len(failures)} of {cases} cases right", flush=True)
    if failures:
        print(f"{plan.title} failed its check, so nothing is timed", file=sys.stderr)
        return 1, []
    rows: list[dict[str, Any]] = []
    try:
        for number, shape in enumerate(plan.shapes, start=1):
            if config.speed.limit is not None and time.monotonic() - began > config.speed.limit:
                print(
                    f"speed.limit={config.speed.limit:g} is over: {len(rows)} of {len(plan.shapes)} shapes were timed"
                )
                break
            row = plan.measure_shape(shape)
            record.add(row)
            rows.append(row)
            print(f"[{number}/{len(plan.shapes)}] {plan.progress(row)}", flush=True)
        status = int(any(name in row["left_out"] for row in rows for name in plan.required))
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} of {len(plan.shapes)} shapes were timed", file=sys.stderr)
        status = 130
    print(plan.table(rows))
    if path is not None:
        print(f"results: {path}")
    return status, rows


def hold_contest(
    draw: Callable[[], Field],
    makes: dict[str, Make],
    titles: dict[str, str],
    device: Device,
    spent: dict[str, float],
    directions: dict[str, set[str]],
) -> Outcome:
    """Prepares the contestants and times them in each direction.

    Args:
        draw: makes the inputs.
        makes: contestants, by name; the names of ours begin with `ours`.
        titles: of the contestants, for what is said of them.
        spent: seconds that each contestant took to compile so far, by name; added to.
        directions: forward, backward or both, and who does not take part in it.
    """
    outcome = Outcome({direction: {} for direction in directions})
    try:
        clock = open_clock(device)
        drawn = draw()
    except Exception as error:  # too large for this GPU, or it is in no state to go on
        outcome.left_out |= dict.fromkeys(makes, reason(error))
        return outcome
    prepared = prepare_all(makes, drawn, titles, spent, outcome.left_out)
    for direction, absent in directions.items():
        steps = {name: getattr(each, direction) for name, each in prepared.items() if name not in absent}
        outcome.times[direction] = time_steps(steps | drawn.beside.get(direction, {}), clock, outcome.left_out)
    outcome.peak_bytes = {name: each.peak_bytes for name, each in prepared.items()}
    outcome.starved = getattr(clock, "starved", None)
    return outcome


def prepare_all(
    makes: dict[str, Make], drawn: Field, titles: dict[str, str], spent: dict[str, float], left_out: dict[str, str]
) -> dict[str, Prepared]:
    """Those that can be timed; the others go to `left_out`, with their reasons."""
    prepared = {}
    for name, make in makes.items():
        try:
            if not is_ours(name) and spent[name] > COMPILE_SECONDS:
                raise NotHere(f"it had already compiled for {COMPILE_SECONDS:.0f} seconds")
            prepared[name] = prepare(name, make, drawn, spent)
        except Exception as error:
            left_out[name] = reason(error)
            if not isinstance(error, NotHere):
                print(f"LEFT OUT: {titles[name]}: {left_out[name]}", file=sys.stderr, flush=True)
    return prepared


def prepare(name: str, make: Make, drawn: Field, spent: dict[str, float]) -> Prepared:
    """Compiles a contestant and compares its results with the truth; raises where it cannot be timed."""
    # Its own, because some write over what they are given.
    inputs = [tensor.detach().clone().requires_grad_() for tensor in drawn.inputs]
    gradients = [tensor.clone() for tensor in drawn.gradients]
    began = time.monotonic()
    try:
        function = make()
        found = results(function, inputs, gradients)
    finally:
        spent[name] += time.monotonic() - began
    compare(found, drawn.truth)
    del found
    both = partial(results, function, inputs, gradients)
    peak = peak_bytes(both) if inputs[0].is_cuda else None
    backward = partial(torch.autograd.grad, outputs(function, inputs), inputs, gradients, retain_graph=True)
    return Prepared(partial(function, *inputs), backward, both, peak)


def results(function: Function, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the inputs for `gradients` of the outputs."""
    outs = outputs(function, inputs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, gradients)]


def outputs(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    found = function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def compare(found: list[Tensor], truth: dict[str, Tensor]) -> None:
    """Raises WrongResult where a result is far from the truth."""
    for part, (name, exact) in zip(found, truth.items(), strict=True):
        error = root_mean_square(part[tuple(map(slice, exact.shape))] - exact)
        if not error <= LARGEST_ERROR * root_mean_square(exact) + 1e-4:  # not a number is wrong too
            raise WrongResult(f"its {name} is wrong: the error is {error:.2g}, the truth {root_mean_square(exact):.2g}")


def excess(
    found: list[Tensor], plain: list[Tensor], exact: dict[str, Tensor], epsilon: float, further: Tensor | float = 0.0
) -> str:
    """What is wrong with results; empty where their error, beside the reference in float64, is at most twice that of
    the reference in the same dtype, plus a few ulp.

    Args:
        plain, exact: results of the reference, in the same dtype and in float64.
        epsilon: of that dtype.
        further: error that is allowed beyond that.
    """
    for (name, truth), rounded, result in zip(exact.items(), plain, found, strict=True):
        allowed = 2 * (rounded - truth).abs().max() + 4 * epsilon * truth.abs().max().clamp(min=1.0) + further
        error = (result - truth).abs().max()
        if not error <= allowed:  # not a number is wrong too
            return f"{name} is off by {error:.2g}, {allowed:.2g} allowed"
    return ""


def root_mean_square(tensor: Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()


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


def open_clock(device: Device) -> Clock:
    return CudaClock(device.torch_device) if device.torch_device.type == "cuda" else host_seconds


def reason(error: BaseException | None) -> str:
    text = one_line(error)
    return text if isinstance(error, NotHere | WrongResult) else f"{type(error).__name__}: {text}"[:200]
