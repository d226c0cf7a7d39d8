import io

from rich.console import Console

from bench.compose import compose_config
from bench.config import settle
from bench.report.status import print_status
from bench.report.terminal import PLAIN_WIDTH
from bench.runs.study import Standing


def printed(standings) -> list[str]:
    stream = io.StringIO()
    print_status(standings, Console(file=stream, width=PLAIN_WIDTH))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_a_row_a_trajectory_and_totals():
    experiment = settle(compose_config(["innovation=[rope]", "lr=0.002"]))
    standings = [
        Standing(experiment, "done", "", 3e9, 0.0),
        Standing(experiment, "failed", "Diverged: step 3: loss [nan]", 1e9, 2e9),
    ]
    assert printed(standings) == [
        "scale variant seed lr state FLOPs spent FLOPs left error",
        "tiny rope 0 0.002 done 3e+09 0",
        "tiny rope 0 0.002 failed 1e+09 2e+09 Diverged: step 3: loss [nan]",
        "1 done, 1 failed of 2; 4e+09 FLOPs spent, 2e+09 left",
    ]


def test_what_is_not_known_is_not_summed():
    experiment = settle(compose_config([]))
    assert printed([Standing(experiment, "absent", "", 0.0, None)])[1:] == [
        "tiny baseline 0 0.001 absent 0 -",
        "1 absent of 1; 0 FLOPs spent, an unknown number left",
    ]
