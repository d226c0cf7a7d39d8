"""What a person sees while a trajectory trains: a bar on a terminal, plain lines elsewhere."""

import multiprocessing
import sys
import time
from typing import Any, Protocol

from bench.errors import UserError


class ProgressDisplay(Protocol):
    def update(self, steps_done: int, numbers: dict[str, float | None]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def open_progress(kind: str, title: str, total_steps: int, done_steps: int = 0) -> ProgressDisplay:
    """A display for `total_steps` steps of which `done_steps` were done before; kind: auto | bar | lines | none."""
    if kind == "auto":
        alone = multiprocessing.parent_process() is None  # workers of a sweep share one terminal
        kind = "bar" if alone and sys.stdout.isatty() else "lines"
    displays = {"bar": Bar, "lines": Lines, "none": Silent}
    if kind not in displays:
        raise UserError(f"logging.progress={kind} is unknown: choose auto, bar, lines or none")
    return displays[kind](title, total_steps, done_steps)


def describe(numbers: dict[str, float | None]) -> str:
    """Loss, tokens/s, FLOP/s, and MFU where the peak is known."""
    parts = [f"loss {numbers['loss']:.4f}", f"{_scaled(numbers['tokens_per_second'])}tok/s"]
    parts.append(f"{_scaled(numbers['flops_per_second'])}FLOP/s")
    if numbers.get("mfu") is not None:
        parts.append(f"MFU {100 * numbers['mfu']:.1f}%")  # type: ignore[operator]
    return "  ".join(parts)


def _scaled(value: float | None) -> str:
    assert value is not None
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {letter}"
    return f"{value:.1f} "


class Bar:
    def __init__(self, title: str, total_steps: int, done_steps: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task(title, total=total_steps, completed=done_steps, text="")
        self.progress.start()

    def update(self, steps_done: int, numbers: dict[str, float | None]) -> None:
        self.progress.update(self.task, completed=steps_done, text=describe(numbers))

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()


class Lines:
    """At most a line every ten seconds, each whole in itself: several trajectories may write to one log."""

    interval = 10.0

    def __init__(self, title: str, total_steps: int, done_steps: int) -> None:
        self.title, self.total = title, total_steps
        self.first_step, self.first_time = done_steps, time.monotonic()
        self.last_time = self.first_time

    def update(self, steps_done: int, numbers: dict[str, float | None]) -> None:
        now = time.monotonic()
        if now - self.last_time < self.interval:
            return
        self.last_time = now
        pace = (now - self.first_time) / max(1, steps_done - self.first_step)
        left = pace * (self.total - steps_done)
        self.say(f"step {steps_done}/{self.total}  {describe(numbers)}  {left:.0f} s left")

    def say(self, text: str) -> None:
        print(f"{self.title}: {text}", flush=True)

    def close(self) -> None:
        pass


class Silent:
    def __init__(self, *_: Any) -> None:
        pass

    def update(self, steps_done: int, numbers: dict[str, float | None]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
