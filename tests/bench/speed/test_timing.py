"""Turns, clocks and medians, on made-up times."""

import pytest
import torch

from bench.speed import timing
from bench.speed.timing import CudaClock, affordable_rounds, host_seconds, interleave, summarise


def test_contestants_take_turns_in_alternating_order_and_warm_up_rounds_do_not_count() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}

    def clock(step) -> float:
        step()
        return float(len(calls))

    times = interleave(steps, clock, rounds=2, warm_up=2)
    assert "".join(calls) == "abccbaabccba"
    assert times == {"a": [7.0, 12.0], "b": [8.0, 11.0], "c": [9.0, 10.0]}


def test_the_host_clock_runs_the_step() -> None:
    calls: list[str] = []
    assert host_seconds(lambda: calls.append("step")) >= 0.0
    assert calls == ["step"]


def test_rounds_fill_the_time_between_few_and_many() -> None:
    assert affordable_rounds(1.0, 0.1) == 10
    assert affordable_rounds(1.0, 100.0) == timing.FEWEST_ROUNDS
    assert affordable_rounds(1.0, 1e-9) == timing.MOST_ROUNDS


def test_a_summary_is_the_median_and_the_spread_in_milliseconds() -> None:
    assert summarise([0.005, 0.001, 0.002, 0.004, 0.100, 0.003]) == pytest.approx(
        {"milliseconds": 3.5, "p20": 2.0, "p80": 5.0}
    )


class FakeEvents:
    """torch.cuda.Event on a GPU that is idle at a launch as often as `idle` says; keeps what happened in `log`."""

    def __init__(self, idle: list[bool]) -> None:
        self.idle, self.log = idle, []

    def __call__(self, enable_timing: bool) -> "FakeEvents":
        assert enable_timing
        return self

    def record(self) -> None:
        self.log.append("event")

    def query(self) -> bool:
        return self.idle.pop(0)

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, end) -> float:
        return 2.5


@pytest.fixture
def make_clock(monkeypatch):
    monkeypatch.setattr(timing, "CACHE_BYTES", 8)

    def make(idle: list[bool]) -> tuple[CudaClock, FakeEvents]:
        events = FakeEvents(idle)
        monkeypatch.setattr(torch.cuda, "Event", events)
        clock = CudaClock(torch.device("cpu"))
        clock.buffer.fill_(1)
        return clock, events

    return make


def test_the_cuda_clock_flushes_before_and_launches_between_two_events(make_clock) -> None:
    clock, events = make_clock([False])

    def launch() -> None:
        assert not clock.buffer.any()
        events.log.append("launch")

    assert clock(launch) == 0.0025
    assert events.log == ["event", "launch", "event", "wait"]
    assert (clock.starved, clock.flushes) == (0, 2)


def test_a_launch_that_waited_for_the_host_is_timed_again_behind_more_flushes(make_clock) -> None:
    clock, events = make_clock([True, False])
    clock(lambda: None)
    assert (events.log.count("wait"), clock.flushes, clock.starved) == (2, 2, 0)  # once may be a hiccup
    clock, events = make_clock([True, True, True, False])
    clock(lambda: None)
    assert (events.log.count("wait"), clock.flushes, clock.starved) == (4, 8, 0)


def test_a_launch_that_always_waits_is_counted(make_clock) -> None:
    clock, events = make_clock([True] * timing.TRIES)
    assert clock(lambda: None) == 0.0025
    assert (clock.starved, clock.flushes, events.idle) == (1, timing.MOST_FLUSHES, [])
