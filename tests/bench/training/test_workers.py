"""Signals while workers are being started; test_several_processes.py has what they do once they train."""

import os
import signal

import pytest

from bench.errors import Stopped, TrajectoryFailed
from bench.training import workers


def signalled(number: int):
    """Stands for an engine that a signal reaches before it has started any worker."""
    return lambda config, entrypoint: lambda *arguments: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_that_no_worker_can_hear_stops_at_once(monkeypatch, number):
    """Noted only, it would be lost, and the job trained on until it was killed."""
    monkeypatch.setattr(workers, "elastic_launch", signalled(number))
    with pytest.raises(Stopped):
        workers.start_workers(2, print)


def test_a_launchers_handler_hears_of_it(monkeypatch):
    """It may end the job; where it returns, the work goes on."""
    heard = []

    def end_at_the_third(number, frame):
        heard.append(number)
        if len(heard) == 3:
            raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, end_at_the_third)
    try:
        monkeypatch.setattr(workers, "elastic_launch", signalled(signal.SIGUSR2))
        with pytest.raises(SystemExit):
            workers.start_workers(2, print)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGUSR2, Stopped), (signal.SIGTERM, Stopped), (signal.SIGHUP, TrajectoryFailed)]
)
def test_workers_that_die_of_it_before_they_train(number, expected):
    """As they do while they load libraries."""
    with pytest.raises(expected):
        workers.start_workers(2, signal_from_worker, number, os.getpid())


def signal_from_worker(number: int, parent: int) -> None:
    os.kill(parent, number)
    signal.pause()
