"""How the trajectories of a study stand, as a table in the terminal: once, or live."""

import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.config import Experiment
from bench.report.format import format_compute, printable
from bench.report.terminal import open_console
from bench.runs.folder import MEASURED
from bench.runs.study import Standing, stand

COLOURS = {"done": "green", "running": "cyan", "failed": "red"}


def print_status(standings: Sequence[Standing], console: Console | None = None) -> None:
    """Prints a row a trajectory and a line of totals; costs are over all branches, FLOPs those of the model."""
    console = console or open_console()
    console.print(_table(standings))
    console.print(_totals(standings))


def watch_status(experiments: Sequence[Experiment], seconds: float, console: Console | None = None) -> None:
    """Looks every `seconds`, until all trajectories are done or failed or Ctrl-C is pressed, then prints the status.

    A terminal shows the table, and where it is too low for that, of the rows neither done nor absent those that fit;
    elsewhere a line of totals is printed whenever it changes.
    """
    console = console or open_console()
    standings: list[Standing] = []
    line = Text()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            standings = [stand(experiment) for experiment in experiments]
            if all(standing.state in ("done", "failed") for standing in standings):
                break
            before, line = line, _totals(standings)
            if console.is_terminal:
                live.update(Group(line, _table(_fitting(standings, console.height))), refresh=True)
            elif line != before:
                console.print(line)
            time.sleep(seconds)
    if standings:
        print_status(standings, console)


def _fitting(standings: Sequence[Standing], height: int) -> Sequence[Standing]:
    room = height - 3  # for the line of totals, the headings and the cursor's line
    if len(standings) <= room:
        return standings
    return [standing for standing in standings if standing.state not in ("done", "absent")][: max(0, room)]


def _table(standings: Sequence[Standing]) -> Table:
    """Columns in which nothing stands, such as joules where none were measured, are left out."""
    axes = [axis for axis in MEASURED if any(standing.costs.get(axis) is not None for standing in standings)]
    hosts = any(standing.host for standing in standings)
    table = Table(box=None, pad_edge=False)
    numbers = ("seed", "lr", "FLOPs spent", "FLOPs left", *MEASURED)
    for heading in ("scale", "variant", "seed", "lr", "state", *["host"] * hosts, *numbers[2:4], *axes, "error"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for standing in standings:
        experiment = standing.experiment
        table.add_row(
            Text(printable(experiment.scale)),
            Text(printable(experiment.variant)),
            str(experiment.seed),
            f"{experiment.optimizer.lr:g}",
            Text(standing.state, COLOURS.get(standing.state, "dim")),
            *[Text(printable(standing.host or ""))] * hosts,
            _flops(standing.spent),
            _flops(standing.left),
            *(format_compute(standing.costs.get(axis)) for axis in axes),
            Text(printable(standing.error)),
        )
    return table


def _totals(standings: Sequence[Standing]) -> Text:
    counts = {state: sum(s.state == state for s in standings) for state in dict.fromkeys(s.state for s in standings)}
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    known = [standing.left for standing in standings if standing.left is not None]
    left = _flops(sum(known)) if len(known) == len(standings) else "an unknown number of"
    spent = [f"{_flops(sum(s.spent for s in standings))} FLOPs", *_measured(standings)]
    return Text(f"{states} of {len(standings)}; {', '.join(spent)} spent, {left} FLOPs left")


def _measured(standings: Sequence[Standing]) -> list[str]:
    """What all trajectories have cost, on those axes that were measured for every one that has begun."""
    begun = [standing.costs for standing in standings if standing.costs]
    sums = {axis: [costs[axis] for costs in begun] for axis in MEASURED}
    return [f"{format_compute(sum(values))} {axis}" for axis, values in sums.items() if values and None not in values]


def _flops(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
