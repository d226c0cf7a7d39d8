"""Signals that ask a trajectory to stop: it writes a checkpoint first, and what was to happen then happens after."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from bench.errors import Stopped

# SIGTERM: whoever runs this machine wants it back. SIGUSR2: what SLURM is asked to send before a job's time is up;
# submitit puts the job into the queue again when it arrives.
STOPPING = (signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """While entered, notes the signals of STOPPING instead of dying of them.

    Signals reach Python's main thread only; elsewhere nothing is noted, and they do what they did before.

    Args:
        passed_on: also called with every signal that arrives.
    """

    def __init__(self, passed_on: Callable[[int], None] | None = None) -> None:
        self.received: int | None = None
        self.passed_on = passed_on
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.passed_on:
            self.passed_on(number)

    def stop(self) -> None:
        """Lets the handler that was there before have the signal: a launcher's may queue the job again and end it.

        It returns where that handler does, which means that the work should go on: on SIGTERM submitit waits for the
        scheduler to kill the job, as one that had ended by itself would not be queued again.

        Raises:
            Stopped: there was no such handler.
        """
        number, self.received = self.received, None
        handler = self.previous.get(number) if number is not None else None
        if not callable(handler):
            raise Stopped
        handler(number, None)
