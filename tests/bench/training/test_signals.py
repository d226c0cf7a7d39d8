import os
import signal
import threading

import pytest

from bench.errors import Stopped
from bench.training.signals import STOPPING, StopSignals


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    before = [signal.getsignal(number) for number in STOPPING]
    yield
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_and_not_died_of(number):
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        with pytest.raises(Stopped) as stopped:
            signals.stop()
    assert stopped.value.code == 75


def test_a_launchers_handler_has_its_turn_after_the_checkpoint():
    """As submitit's, which puts the job into the queue again and exits."""
    heard = []

    def requeue(number, frame):
        heard.append(number)
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == []
            with pytest.raises(SystemExit) as ended:
                signals.stop()
        assert (heard, ended.value.code) == ([signal.SIGUSR2], -1)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped):
                signals.stop()
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_handler_that_returns_wants_the_work_to_go_on():
    """As submitit's for SIGTERM: a job that ended by itself would not be queued again."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as signals:
            for times in (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
                signals.stop()
                assert (len(heard), signals.received) == (times, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_are_passed_on():
    heard = []
    with StopSignals(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
    assert heard == [signal.SIGTERM, signal.SIGUSR2]


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def enter():
        with StopSignals() as signals:
            seen.append((signals.received, [signal.getsignal(number) for number in STOPPING]))

    before = [signal.getsignal(number) for number in STOPPING]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
