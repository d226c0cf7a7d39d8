import io

import pytest
from rich.console import Console

from bench.compose import compose_config
from bench.config import settle
from bench.report import status
from bench.report.status import print_status, watch_status
from bench.report.terminal import PLAIN_WIDTH
from bench.runs.study import Standing


@pytest.fixture(scope="module")
def experiment():
    return settle(compose_config(["innovation=[rope]", "lr=0.002"]))


def plain(stream: io.StringIO) -> list[str]:
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def printed(standings) -> list[str]:
    stream = io.StringIO()
    print_status(standings, Console(file=stream, width=PLAIN_WIDTH))
    return plain(stream)


def test_a_row_a_trajectory_and_totals(experiment):
    standings = [
        Standing(experiment, "done", "", 3e9, 0.0, None, {}),
        Standing(experiment, "failed", "Diverged: step 3: loss [nan]", 1e9, 2e9, None, {}),
    ]
    assert printed(standings) == [
        "scale variant seed lr state FLOPs spent FLOPs left error",
        "tiny rope 0 0.002 done 3e+09 0",
        "tiny rope 0 0.002 failed 1e+09 2e+09 Diverged: step 3: loss [nan]",
        "1 done, 1 failed of 2; 4e+09 FLOPs spent, 2e+09 FLOPs left",
    ]


def test_what_is_not_known_is_not_summed(experiment):
    assert printed([Standing(experiment, "absent", "", 0.0, None, None, {})])[1:] == [
        "tiny rope 0 0.002 absent 0 -",
        "1 absent of 1; 0 FLOPs spent, an unknown number of FLOPs left",
    ]


def test_who_trains_and_what_was_measured(experiment):
    measured = {"seconds": 61.728, "joules": None, "dollars": 0.05, "grams_co2e": None}
    standings = [
        Standing(experiment, "running", "", 1e9, 2e9, "node[7]", measured),
        Standing(experiment, "unfinished", "", 1e9, 2e9, None, {**measured, "joules": 1234.5, "dollars": None}),
        Standing(experiment, "absent", "", 0.0, 3e9, None, {}),
    ]
    assert printed(standings) == [
        "scale variant seed lr state host FLOPs spent FLOPs left seconds joules dollars error",
        "tiny rope 0 0.002 running node[7] 1e+09 2e+09 61.7 - 0.0500",
        "tiny rope 0 0.002 unfinished 1e+09 2e+09 61.7 1234 -",
        "tiny rope 0 0.002 absent 0 3e+09 - - -",
        "1 running, 1 unfinished, 1 absent of 3; 2e+09 FLOPs, 123 seconds spent, 7e+09 FLOPs left",
    ]


@pytest.fixture
def looks(experiment, monkeypatch):
    """Lets each look at a trajectory find the next of some states, and then be interrupted; counts the pauses."""
    pauses = []

    def see(*states):
        waiting = iter(states)

        def stand(_):
            state = next(waiting, None)
            if state is None:
                raise KeyboardInterrupt
            return Standing(experiment, state, "", 1e9, 0.0, "here" if state == "running" else None, {})

        monkeypatch.setattr(status, "stand", stand)
        monkeypatch.setattr(status.time, "sleep", pauses.append)
        return pauses

    return see


def test_watching_elsewhere_than_on_a_terminal(experiment, looks):
    pauses, stream = looks("absent", "running", "running", "failed"), io.StringIO()
    watch_status([experiment], 5, Console(file=stream, width=PLAIN_WIDTH))
    assert plain(stream) == [
        "1 absent of 1; 1e+09 FLOPs spent, 0 FLOPs left",
        "1 running of 1; 1e+09 FLOPs spent, 0 FLOPs left",
        "scale variant seed lr state FLOPs spent FLOPs left error",
        "tiny rope 0 0.002 failed 1e+09 0",
        "1 failed of 1; 1e+09 FLOPs spent, 0 FLOPs left",
    ]
    assert pauses == [5, 5, 5]


def test_an_interrupted_watch_ends_with_the_table(experiment, looks):
    looks("running")
    stream = io.StringIO()
    watch_status([experiment], 5, Console(file=stream, width=PLAIN_WIDTH))
    assert plain(stream)[-2:] == [
        "tiny rope 0 0.002 running here 1e+09 0",
        "1 running of 1; 1e+09 FLOPs spent, 0 FLOPs left",
    ]
    looks()
    stream = io.StringIO()
    watch_status([experiment], 5, Console(file=stream, width=PLAIN_WIDTH))
    assert plain(stream) == []


def test_watching_on_a_terminal_shows_every_look(experiment, looks):
    looks("absent", "running", "done")
    stream = io.StringIO()
    watch_status([experiment], 1, Console(file=stream, width=PLAIN_WIDTH, height=25, force_terminal=True))
    shown = stream.getvalue()
    assert all(f"1 {state} of 1" in shown for state in ("absent", "running", "done"))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor comes back"


@pytest.mark.parametrize(("running", "rows"), [(2, 2), (20, 7)])
def test_a_low_terminal_shows_what_moves_and_fits(experiment, looks, running, rows):
    states = ["done"] * 10 + ["running"] * running + ["absent"] * 10
    looks(*states, *["done"] * len(states))
    stream = io.StringIO()
    console = Console(file=stream, width=PLAIN_WIDTH, height=10, force_terminal=True, color_system=None)
    watch_status([experiment] * len(states), 1, console)
    live = [line for line in plain(stream) if "1e+09" in line and "done" not in line]
    assert len(live) == 2 * rows, "drawn when found, and once more before it is wiped away"
    assert all("running here" in line for line in live)
